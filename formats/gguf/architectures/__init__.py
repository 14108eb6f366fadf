"""Architectures: what GGUF names, orders and states differently from transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.formats.gguf.architectures.base import Architecture
from quantize.formats.gguf.architectures.bert import BERT
from quantize.formats.gguf.architectures.deepseek2 import DEEPSEEK2, DEEPSEEK3
from quantize.formats.gguf.architectures.falcon import FALCON
from quantize.formats.gguf.architectures.gemma import GEMMA
from quantize.formats.gguf.architectures.gemma2 import GEMMA2
from quantize.formats.gguf.architectures.gemma3 import GEMMA3
from quantize.formats.gguf.architectures.gemma4 import GEMMA4
from quantize.formats.gguf.architectures.glm4moe import GLM4MOE
from quantize.formats.gguf.architectures.gpt2 import GPT2
from quantize.formats.gguf.architectures.gptoss import GPT_OSS
from quantize.formats.gguf.architectures.granite import GRANITE
from quantize.formats.gguf.architectures.jamba import JAMBA
from quantize.formats.gguf.architectures.lfm2 import LFM2
from quantize.formats.gguf.architectures.llama import LLAMA
from quantize.formats.gguf.architectures.llama4 import LLAMA4
from quantize.formats.gguf.architectures.mamba import MAMBA
from quantize.formats.gguf.architectures.mixtral import MIXTRAL
from quantize.formats.gguf.architectures.phi3 import PHI3
from quantize.formats.gguf.architectures.qwen2 import QWEN2
from quantize.formats.gguf.architectures.qwen2moe import QWEN2MOE
from quantize.formats.gguf.architectures.qwen3 import QWEN3
from quantize.formats.gguf.architectures.qwen3moe import QWEN3MOE
from quantize.formats.gguf.architectures.qwen3next import QWEN3NEXT
from quantize.formats.gguf.architectures.qwen35 import QWEN35, QWEN35MOE
from quantize.formats.gguf.architectures.settings import Keys, Settings
from quantize.formats.gguf.architectures.starcoder2 import STARCODER2
from quantize.formats.gguf.architectures.t5 import T5, UMT5

__all__ = ["ARCHITECTURES", "Architecture", "names", "of_config", "of_metadata"]

# A new architecture takes a file of its own and a line here.
ARCHITECTURES: tuple[Architecture, ...] = (
    LLAMA,
    MIXTRAL,
    QWEN2,
    QWEN2MOE,
    QWEN3,
    QWEN3MOE,
    QWEN3NEXT,
    QWEN35,
    QWEN35MOE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA4,
    GRANITE,
    PHI3,
    GPT2,
    GPT_OSS,
    DEEPSEEK2,
    DEEPSEEK3,
    GLM4MOE,
    LLAMA4,
    FALCON,
    STARCODER2,
    MAMBA,
    JAMBA,
    LFM2,
    BERT,
    T5,
    UMT5,
)


def names() -> list[str]:
    """Returns what GGUF calls the architectures, in order."""
    return list(dict.fromkeys(architecture.name for architecture in ARCHITECTURES))


def of_config(config: Mapping[str, Any], file: Path, arch: str | None = None) -> Architecture:
    """Returns the architecture of a transformers model.

    Args:
        config: Its config.
        file: Where it is from, for messages.
        arch: What GGUF calls the architecture, to take it as that whatever its class.

    Raises:
        InputError: the class, or `arch`, is not known.
    """
    text = Settings(config, file)
    kind = text.own.get("model_type")
    if arch is not None:
        found = [architecture for architecture in ARCHITECTURES if architecture.name == arch]
        if not found:
            raise InputError(f"'{arch}' is no GGUF architecture that is known", f"known are {', '.join(names())}")
        alike = [a for a in found if a.model_type == kind or kind in a.model_types]
        return (alike or [a for a in found if _routes(a) == bool(text.experts)] or found)[0]
    classes = config.get("architectures") or []
    name = classes[0] if classes else None
    for architecture in ARCHITECTURES:
        if name == architecture.model_class or name in architecture.classes:
            return architecture
    for architecture in ARCHITECTURES:
        if (text.nested or name is None) and (kind == architecture.model_type or kind in architecture.model_types):
            return architecture
    raise InputError(
        f"{file}: the model class '{name or kind}' is not known",
        f"--arch llama takes it as a Llama; the names that --arch knows: {', '.join(names())}",
    )


def _routes(architecture: Architecture) -> bool:
    return any("_exps" in target for rule in architecture.rules for target in rule.targets)


def of_metadata(keys: Keys) -> Architecture:
    """Returns the architecture of a GGUF file.

    Raises:
        InputError: it is not known.
    """
    for architecture in ARCHITECTURES:
        if architecture.name == keys.prefix and architecture.claims(keys):
            return architecture
    raise InputError(
        f"{keys.file}: GGUF architecture '{keys.prefix}' cannot be read", f"known are {', '.join(names())}"
    )
