"""The on-disk formats, one module each. A new one takes its module and one line in the table below."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from quantize.errors import InputError, unknown_name
from quantize.formats.awq import AWQFormat
from quantize.formats.base import Checkpoint, Format, Piece, TensorInfo
from quantize.formats.compressed_tensors import CompressedTensorsFormat
from quantize.formats.exl2 import EXL2Format
from quantize.formats.gguf import GGUFFormat
from quantize.formats.gptq import GPTQ, GPTQ_V2
from quantize.formats.hf import HFFormat
from quantize.formats.mlx import MLXFormat

__all__ = ["FORMATS", "Checkpoint", "Format", "Piece", "TensorInfo", "find", "named", "table"]

# Asked in this order whether a path is theirs: the plain folder comes last.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        GGUFFormat(),
        AWQFormat(),
        GPTQ,
        GPTQ_V2,
        EXL2Format(),
        MLXFormat(),
        CompressedTensorsFormat(),
        HFFormat(),
    )
}


def table() -> dict[str, Format]:
    """Our formats and those that other packages announce under the entry point `quantize.formats`."""
    others = (entry.load()() for entry in entry_points(group="quantize.formats"))
    return {f.name: f for f in others} | FORMATS


def named(name: str) -> Format:
    """Returns the format called `name`.

    Raises:
        UsageError: there is none; the message lists the choices.
    """
    known = table()
    if name not in known:
        raise unknown_name("format", name, known)
    return known[name]


def find(path: Path) -> Format:
    """Returns the format that `path` is in.

    Raises:
        InputError: none recognises it.
    """
    for candidate in table().values():
        if candidate.sniff(path):
            return candidate
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: one file of weights, no model", f"name its folder: {path.parent}")
    raise InputError(f"{path}: no model that can be read", "name a folder with config.json and safetensors, or a .gguf")
