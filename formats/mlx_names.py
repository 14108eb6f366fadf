"""Where MLX has a model's tensors: the same names as transformers', but for experts, which are stacked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.formats.base import Layout, Piece
from quantize.formats.container import layout

# Architectures whose names and values mlx-lm takes as transformers stores them, but for what is done here.
KNOWN = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "cohere",
    "starcoder2", "stablelm", "glm4", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
)  # fmt: skip

_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_UNMIXTRAL = {ours: theirs for theirs, ours in _MIXTRAL.items()}
_EXPERT = re.compile(r"(?P<stem>.+)\.experts\.(?P<index>\d+)\.(?P<leaf>w[123]|(gate|up|down)_proj)\.weight")
_STACK = re.compile(r"(?P<stem>.+)\.switch_mlp\.(?P<leaf>(gate|up|down)_proj)\.weight")
_SLICE = re.compile(r"(?P<stack>.+)@(?P<index>\d+)")


def require_known(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses what mlx-lm has under other names or values.

    Raises:
        InputError: naming the architecture and those that are known.
    """
    kind = config.get("model_type")
    if kind not in KNOWN:
        raise InputError(
            f"{path}: models of type '{kind}' cannot be written for MLX yet", f"those that can: {', '.join(KNOWN)}"
        )


def module(name: str) -> str:
    """Returns MLX's module of a stored tensor: for an expert, of its stack."""
    found = _EXPERT.fullmatch(name)
    if not found:
        return name.removesuffix(".weight")
    return f"{found['stem']}.switch_mlp.{_MIXTRAL.get(found['leaf'], found['leaf'])}"


def place(name: str, leaf: str = "weight") -> str:
    """Returns MLX's name of an array of a stored tensor; `STACK@INDEX` for an expert's slice of a stack."""
    if not name.endswith(".weight"):
        return name
    found = _EXPERT.fullmatch(name)
    return f"{module(name)}.{leaf}" + (f"@{int(found['index'])}" if found else "")


def expert(name: str, index: int) -> str | None:
    """Returns transformers' name of one matrix of a stack; None if it is no stack of experts."""
    found = _STACK.fullmatch(name)
    if not found:
        return None
    mixtral = found["stem"].endswith(".block_sparse_moe")
    leaf = _UNMIXTRAL[found["leaf"]] if mixtral else found["leaf"]
    return f"{found['stem']}.experts.{index}.{leaf}.weight"


def stacked_layouts(files: Mapping[str, Sequence[Piece]], header: Mapping[str, Any]) -> dict[str, Layout]:
    """Returns layouts in which all slices of a stack lie one after the other, as one array of the file.

    Raises:
        InputError: a slice is missing, or two differ in shape.
    """
    stacks: dict[str, dict[int, Piece]] = {}
    arranged: dict[str, list[Piece | str]] = {name: [] for name in files}
    for file, pieces in files.items():
        for piece in pieces:
            found = _SLICE.fullmatch(piece.name)
            if found is None:
                arranged[file].append(piece)
                continue
            if found["stack"] not in stacks:
                arranged[file].append(found["stack"])
            stacks.setdefault(found["stack"], {})[int(found["index"])] = piece
    whole = {name: _whole(name, slices) for name, slices in stacks.items()}
    return {
        file: _with_slices(layout([whole[p] if isinstance(p, str) else p for p in pieces], header), stacks)
        for file, pieces in arranged.items()
    }


def _whole(name: str, slices: Mapping[int, Piece]) -> Piece:
    first = next(iter(slices.values()))
    alike = {(piece.dtype, piece.shape) for piece in slices.values()}
    if sorted(slices) != list(range(len(slices))) or len(alike) > 1:
        raise InputError(f"the experts of '{name}' are not complete, or differ in shape", "MLX stacks them")
    return Piece(name, first.dtype, (len(slices), *first.shape))


def _with_slices(found: Layout, stacks: Mapping[str, Mapping[int, Piece]]) -> Layout:
    where: dict[str, tuple[int, int]] = {}
    for name, (offset, nbytes) in found.where.items():
        slices = stacks.get(name)
        if slices is None:
            where[name] = offset, nbytes
            continue
        each = nbytes // len(slices)
        where |= {piece.name: (offset + index * each, each) for index, piece in slices.items()}
    return Layout(found.header, where, found.size, tuple(found.where))
