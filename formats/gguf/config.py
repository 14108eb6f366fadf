"""The metadata of a GGUF model as a transformers config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.errors import InputError
from quantize.formats.container import read_rows
from quantize.formats.gguf.architectures import ARCHITECTURES, Architecture
from quantize.formats.gguf.container import Part, Stored
from quantize.schemes import GGMLBlock, Plain

# GGUF key after the architecture's name, and its name in config.json.
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}
# Factors that llama.cpp multiplies into the rotary frequencies; config.json holds their parameters instead.
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Keys:
    """The metadata keys of one architecture."""

    file: Path
    prefix: str
    metadata: Mapping[str, Any]

    def whole(self, key: str, default: int | None = None) -> int:
        """Returns a whole number, or `default` when the key is absent.

        Raises:
            InputError: it is absent without a default, is no whole number, or differs between layers.
        """
        found = self.number(key, default)
        if not isinstance(found, int):
            raise InputError(f"{self.file}: '{self.prefix}.{key}' is no whole number")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a number, or `default` when the key is absent.

        Raises:
            InputError: it is absent without a default, is no number, or differs between layers.
        """
        found = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(found, list) and len(set(found)) == 1:
            found = found[0]
        if found is None:
            raise InputError(f"{self.file}: lacks the metadata key '{self.prefix}.{key}'")
        if not isinstance(found, int | float):
            what = "differs between layers, which cannot be read yet" if isinstance(found, list) else "is no number"
            raise InputError(f"{self.file}: '{self.prefix}.{key}' {what}")
        return found


def find_architecture(first: Part) -> Architecture:
    """Returns the architecture that the header names.

    Raises:
        InputError: it is no model, or of an architecture that cannot be read.
    """
    file, metadata = first.file, first.metadata
    kind, name = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind != "model":
        raise InputError(f"{file}: a GGUF file of type '{kind}', not a model")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{file}: GGUF architecture '{name}' cannot be read yet", f"known are {known}")
    if metadata.get(f"{name}.expert_count"):
        raise InputError(f"{file}: a mixture of experts of GGUF architecture '{name}' cannot be read yet")
    return ARCHITECTURES[name]


def read_config(first: Part, tensors: Mapping[str, Stored], factors: Stored | None) -> dict[str, Any]:
    """Returns the transformers config of a model.

    Args:
        first: The header that holds its metadata.
        tensors: Its tensors by transformers name.
        factors: Its divisors of the rotary frequencies, if it has any.

    Raises:
        InputError: the architecture or one of its options is unknown, or a key is missing.
    """
    architecture, metadata = find_architecture(first), first.metadata
    keys = _Keys(first.file, metadata["general.architecture"], metadata)
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
    }
    config |= {ours: keys.whole(theirs) for theirs, ours in _KEYS.items()}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = keys.whole("attention.head_count_kv", heads)
    config["head_dim"] = head_dim = keys.whole("attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.whole(key, head_dim) != head_dim:
            what = f"'{keys.prefix}.{key}' differs from the head size {head_dim}, which cannot be read yet"
            raise InputError(f"{first.file}: {what}")
    config["rms_norm_eps"] = keys.number("attention.layer_norm_rms_epsilon")
    config["hidden_act"] = "silu"
    if "model.embed_tokens.weight" not in tensors:
        raise InputError(f"{first.file}: lacks tensor 'token_embd.weight'")
    config["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    for flag, leaves in architecture.biases.items():
        if flag:
            config[flag] = f"model.layers.0.{leaves[0]}.bias" in tensors
    config |= _rope(keys, head_dim, config["max_position_embeddings"], factors)
    # A sentencepiece vocabulary that names no ids has llama.cpp's; a byte-level one has none.
    ids = {"bos": 1, "eos": 2} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        config[f"{ours}_token_id"] = metadata.get(f"tokenizer.ggml.{theirs}_token_id", ids.get(ours))
    return config | {"dtype": _dtype_name(tensors)}


def _dtype_name(tensors: Mapping[str, Stored]) -> str:
    """Returns the dtype to compute in; norms are float32 in every file and only count when all else is."""
    schemes = {stored.scheme for stored in tensors.values()}
    if Plain(torch.bfloat16) in schemes or any(isinstance(scheme, GGMLBlock) for scheme in schemes):
        return "bfloat16"
    return "float16" if Plain(torch.float16) in schemes else "float32"


def _rope(keys: _Keys, head_dim: int, context: int, factors: Stored | None) -> dict[str, Any]:
    """Returns the rotary settings, under transformers 5's one key and the two that older readers know."""
    theta, start = keys.number("rope.freq_base", 10000.0), f"{keys.prefix}.rope.scaling."
    scaling = {k.removeprefix(start): v for k, v in keys.metadata.items() if k.startswith(start)}
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    kind = scaling.get("type", "none" if factor in (0, 1) else "linear")
    # What only GGUF can state must be neutral; `finetuned` tells of the past and changes nothing.
    neutral = {"yarn_ext_factor": (1, -1), "yarn_attn_factor": (1,), "attn_factor": (1,)}
    known = {"type", "factor", "finetuned", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"}
    odd = sorted(k for k, v in scaling.items() if k not in known and v not in neutral.get(k, ()))
    if kind not in ("none", "linear", "yarn") or odd:
        what = f"rope scaling '{kind}'" + (f" with {', '.join(odd)}" if odd else "")
        raise InputError(f"{keys.file}: {what} cannot be read yet")
    found: dict[str, Any] = {}
    if kind == "yarn":
        found = {"rope_type": "yarn", "factor": factor}
        found["original_max_position_embeddings"] = scaling.get("original_context_length", context)
        found |= {k: scaling[f"yarn_{k}"] for k in ("beta_fast", "beta_slow") if f"yarn_{k}" in scaling}
    elif kind == "linear" and factor not in (0, 1):
        found = {"rope_type": "linear", "factor": factor}
    values = [] if factors is None else [float(str(v)) for v in read_rows(factors.extent).float().numpy()]
    if any(value != 1 for value in values):
        llama3 = llama3_rope(values, theta, head_dim)
        if llama3 is None or found:
            what = f"'{ROPE_FACTORS}' scales the rotary frequencies in a way that no config.json states"
            raise InputError(f"{keys.file}: {what}", "use the model it was made from")
        found = llama3
    older = {"rope_theta": theta} | ({"rope_scaling": found} if found else {})
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | found} | older


def llama3_rope(factors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any] | None:
    """Returns the 'llama3' parameters that make exactly these divisors of the rotary frequencies, or None.

    Only the ratios of the two limits and the original context show in the divisors, so the limits are taken
    as the 1 and 4 of all published models. Then the last divisor is the factor, each one between gives the
    context, and the whole list, computed anew, must agree to float32's precision.
    """
    low, high, factor = 1.0, 4.0, factors[-1]
    # How often each frequency turns per position.
    turns = [theta ** (-2 * i / head_dim) / (2 * math.pi) for i in range(len(factors))]
    if len(factors) != head_dim // 2 or factor <= 1:
        return None

    def divisor(turn: float, context: int) -> float:
        smooth = min(max((context * turn - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - smooth) / factor + smooth)

    contexts = {8192}
    for value, turn in zip(factors, turns, strict=True):
        if 1 < value < factor:
            smooth = (1 / value - 1 / factor) / (1 - 1 / factor)
            contexts.add(round((smooth * (high - low) + low) / turn))
    for context in sorted(contexts):
        made = [divisor(turn, context) for turn in turns]
        if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(made, factors, strict=True)):
            found = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
            }
            return found | {"original_max_position_embeddings": context}
    return None
