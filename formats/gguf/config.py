"""The metadata of a GGUF model as a transformers config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantize.errors import InputError
from quantize.formats.gguf.architectures import Architecture, of_metadata
from quantize.formats.gguf.architectures.base import HEAD
from quantize.formats.gguf.architectures.rope import FACTORS, LONG, SHORT
from quantize.formats.gguf.architectures.settings import Keys
from quantize.formats.gguf.container import Part, Stored
from quantize.schemes import GGMLBlock, Plain

#: Tensors that the config states.
COMPUTED = (FACTORS, LONG, SHORT)


def read_keys(first: Part) -> tuple[Architecture, Keys]:
    """Returns the architecture that the header names, and its metadata.

    Raises:
        InputError: it is no model, or of an architecture that cannot be read.
    """
    file, metadata = first.file, first.metadata
    kind, name = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind != "model":
        raise InputError(f"{file}: a GGUF file of type '{kind}', not a model")
    keys = Keys(file, str(name), metadata)
    return of_metadata(keys), keys


def read_config(architecture: Architecture, keys: Keys, tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Returns the transformers config of a model.

    Args:
        architecture: Its declaration.
        keys: Its metadata.
        tensors: Its tensors by name in the file.

    Raises:
        InputError: one of its options is unknown, or a key is missing.
    """
    if "token_embd.weight" not in tensors:
        raise InputError(f"{keys.file}: lacks tensor 'token_embd.weight'")
    shapes = {name: stored.shape for name, stored in tensors.items()}
    factors = {name: _values(tensors[name]) for name in COMPUTED if name in tensors}
    config = architecture.config(keys, shapes, factors)
    config["vocab_size"] = shapes["token_embd.weight"][0]
    for rule in architecture.rules:
        present = rule.targets[0].format(n=0) in tensors
        if rule.group == HEAD:
            config["tie_word_embeddings"] = not present
        elif rule.group:
            config[rule.group] = config.get(rule.group, False) or present
    # A sentencepiece vocabulary that names no ids has llama.cpp's; a byte-level one has none.
    ids = {"bos": 1, "eos": 2} if keys.metadata.get("tokenizer.ggml.model") == "llama" else {}
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        config[f"{ours}_token_id"] = keys.metadata.get(f"tokenizer.ggml.{theirs}_token_id", ids.get(ours))
    return config | {"dtype": _dtype_name(tensors)}


def _values(stored: Stored) -> list[float]:
    # The shortest decimals of float32, as the config had them.
    return [float(str(value)) for value in stored.read().float().numpy().reshape(-1)]


def _dtype_name(tensors: Mapping[str, Stored]) -> str:
    """Returns the dtype to compute in; norms are float32 in every file and only count when all else is."""
    schemes = {stored.scheme for stored in tensors.values()}
    if Plain(torch.bfloat16) in schemes or any(isinstance(scheme, GGMLBlock) for scheme in schemes):
        return "bfloat16"
    return "float16" if Plain(torch.float16) in schemes else "float32"
