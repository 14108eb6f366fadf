"""The `general.*` metadata: what the model is called, whose it is, how it likes to be sampled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.formats.base import Checkpoint
from quantize.formats.gguf.metadata import Kind, Value, f32, text, texts, u32

_SIZE = re.compile(r"(\d+x)?\d+([._]\d+)?[kmbt]", re.I)
_VERSION = re.compile(r"v\d+([._]\d+)*", re.I)
# generation_config.json's keys that llama.cpp takes as the model's own sampling.
_SAMPLING = {"temperature": "temp", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat"}


def general_metadata(checkpoint: Checkpoint, sizes: Mapping[str, int], experts: int) -> dict[str, Value]:
    """Returns name, size, licence and sampling of a model, as far as its files say.

    Args:
        checkpoint: The model.
        sizes: Weights of each tensor, by name in the file.
        experts: The number of routed experts.
    """
    found = {f"general.{key}": text(value) for key, value in _parts(_name(checkpoint)).items()}
    found["general.size_label"] = text(size_label(sizes, experts))
    return found | _card(checkpoint.side_files.get("README.md")) | _sampling(checkpoint)


def _name(checkpoint: Checkpoint) -> str:
    path = checkpoint.path.resolve()
    name = path.stem if path.suffix == ".gguf" else path.name
    if path.parent.name == "snapshots":  # the hub's cache names the folder by its revision
        name = path.parent.parent.name.split("--")[-1]
    return name


def _parts(name: str) -> dict[str, str]:
    """Returns what a name such as `Qwen3-8B-Instruct-v2` says: basename before the size, finetune behind it."""
    words = [word for word in re.split(r"[-_ ]", name) if word]
    found = {"name": " ".join(words) or "model"}
    versions = [word for word in words if _VERSION.fullmatch(word)]
    words = [word for word in words if word not in versions]
    size = next((i for i, word in enumerate(words) if i and _SIZE.fullmatch(word)), None)
    if size is not None:
        found["basename"] = "-".join(words[:size])
        if words[size + 1 :]:
            found["finetune"] = "-".join(words[size + 1 :])
    if versions:
        found["version"] = versions[-1]
    return found


def size_label(sizes: Mapping[str, int], experts: int) -> str:
    """Returns the number of weights as a name has it: `135M`, `8x7B` with what one expert and all else hold."""
    routed = sum(size for name, size in sizes.items() if "_exps." in name)
    total = sum(sizes.values())
    if not (experts and routed):
        return _rounded(total)
    return f"{experts}x{_rounded(total - routed + routed // experts)}"


def _rounded(count: int) -> str:
    """Returns a count with two digits or more."""
    for unit, power in (("T", 12), ("B", 9), ("M", 6), ("K", 3)):
        if count > 10**power or unit == "K":
            value = count / 10**power
            return f"{value:.{max(2 - len(str(round(value)).lstrip('0')), 0)}f}{unit}"
    raise AssertionError("the last unit takes all")


def _card(file: Path | None) -> dict[str, Value]:
    """Returns what the block at the top of a model card says of licence, tags and languages."""
    if file is None:
        return {}
    import yaml

    try:
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", file.read_text(encoding="utf-8"), re.S)
        said = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}  # a card is for people; nothing depends on it
    if not isinstance(said, dict):
        return {}
    found: dict[str, Value] = {}
    for key, name in (("license", "license"), ("license_name", "license.name"), ("license_link", "license.link")):
        if isinstance(said.get(key), str):
            found[f"general.{name}"] = text(said[key])
    for key, name in (("tags", "tags"), ("language", "languages")):
        values = said.get(key)
        values = [values] if isinstance(values, str) else values
        if isinstance(values, list) and values:
            found[f"general.{name}"] = texts(str(value) for value in values)
    return found


def pooling(checkpoint: Checkpoint, arch: str) -> dict[str, Value]:
    """Returns how a model of sentence-transformers makes one vector of all: by mean, by first or by last token."""
    for name, file in checkpoint.side_files.items():
        if not name.endswith("_Pooling/config.json"):
            continue
        said = _object(file)
        for key, number in (("mean_tokens", 1), ("cls_token", 2), ("lasttoken", 3)):
            if said.get(f"pooling_mode_{key}"):
                return {f"{arch}.pooling_type": u32(number)}
    return {}


def _object(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file that nothing depends on; an empty one when there is none."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _sampling(checkpoint: Checkpoint) -> dict[str, Value]:
    file = checkpoint.side_files.get("generation_config.json")
    if file is None:
        return {}
    said = _object(file)
    found: dict[str, Value] = {}
    if isinstance(said.get("top_k"), int):
        found["general.sampling.top_k"] = Value(Kind.I32, said["top_k"])
    for key, name in _SAMPLING.items():
        if isinstance(said.get(key), int | float):
            found[f"general.sampling.{name}"] = f32(said[key])
    return found
