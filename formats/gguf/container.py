"""The GGUF container: what a file's header says, and where its tensors lie.

One file, or the parts `NAME-00001-of-0000N.gguf` of one model; the first part holds the metadata. Tensors follow the
header, each aligned.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize.errors import InputError, UsageError
from quantize.formats.container import Extent, read_rows
from quantize.formats.gguf.byteorder import can_swap, swap_blocks
from quantize.formats.gguf.header import SHORT, Field, Header, open_header
from quantize.formats.gguf.metadata import ALIGNMENT, LETTERS, Kind, Value
from quantize.kernels.cpu.ggml import BLOCKS
from quantize.schemes import DTYPES, GGMLBlock, Plain, Scheme, Shape

PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a part: logical shape in torch's order, grid, and bytes.

    `extent` is of the dtype when plain; of uint8 `[rows, bytes of a row]` when quantized. The numbers there are
    big-endian when `swapped`: `read` turns them round, nothing else does.
    """

    shape: Shape
    scheme: Scheme
    extent: Extent
    swapped: bool = False

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows `start` to `stop` as they are coded, little-endian, in a tensor that owns its memory.

        Raises:
            InputError: the file cannot be read or ends early, or the type is not known in big-endian order.
        """
        name = str(self.scheme)
        if self.swapped and isinstance(self.scheme, GGMLBlock) and not can_swap(name):
            raise InputError(f"{self.extent.file}: {name} in big-endian order cannot be read")
        rows = read_rows(self.extent, start, stop)
        if self.swapped and rows.numel():
            size = BLOCKS[name].nbytes
            raw = rows.reshape(-1).view(torch.uint8).numpy().reshape(-1, size)
            if isinstance(self.scheme, Plain):
                raw[:] = raw[:, ::-1].copy()
            else:
                swap_blocks(name, raw)
        return rows


@dataclass(frozen=True, slots=True)
class Part:
    """The header of one file.

    Attributes:
        file: Where it lies.
        metadata: Values by key; arrays of more than 256 values are left at their type and length (`array`).
        tensors: Tensors in file order.
        fields: Where each metadata value lies.
        big_endian: Whether the numbers in the file are.
        start: Offset of the data section.
    """

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    fields: dict[str, Field]
    big_endian: bool
    start: int

    def array(self, key: str) -> list[Any]:
        """Returns all elements of an array, however long.

        Raises:
            InputError: there is no such key, it holds no array, or the file has changed.
        """
        if key not in self.fields or not self.fields[key].array:
            raise InputError(f"{self.file}: lacks the array '{key}'")
        return list(self.value(key).data)

    def value(self, key: str) -> Value:
        """Returns a value with its type, an array whole.

        Raises:
            KeyError: there is no such key.
            InputError: the file cannot be read any more.
        """
        field = self.fields[key]
        with open_header(self.file) as header:
            header.start()
            if field.offset > len(header.data):
                raise InputError(f"{self.file}: truncated inside its header", "download it again")
            return Value(field.kind, header.value(field), field.array)


def read_part(file: Path) -> Part:
    """Returns the header of one GGUF file; no tensor data is read.

    Raises:
        InputError: the file is missing, no GGUF file, of an unreadable version, truncated, or several joined.
    """
    with open_header(file) as header:
        return _read_header(header)


def _read_header(header: Header) -> Part:
    file = header.file
    tensor_count, pair_count = header.start()
    fields = header.fields(pair_count)
    metadata = {key: _shown(header, field) for key, field in fields.items()}
    entries = header.entries(tensor_count)

    alignment = metadata.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{file}: {ALIGNMENT} is {alignment}, no power of two")
    begin, size, end = -(-header.position // alignment) * alignment, len(header.data), header.position
    swapped = header.order == ">"
    tensors: dict[str, Stored] = {}
    for name, (shape, kind, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        if tensors and begin + offset < end:
            raise InputError(f"{file}: tensor '{name}' overlaps another", "download it again")
        tensors[name] = stored = _stored(file, name, shape, kind, begin + offset, swapped)
        end = begin + offset + stored.extent.nbytes
        if end > size:
            what = f"truncated: tensor '{name}' ends at byte {end} of {size}"
            raise InputError(f"{file}: {what}", "download it again")
    padded = -(-end // alignment) * alignment
    if b"GGUF" in (header.data[end : end + 4], header.data[padded : padded + 4]):
        raise InputError(
            f"{file}: parts joined byte-wise: a second GGUF header starts at byte {end}",
            "name the first of the parts themselves; to join them: quantize convert NAME-00001-of-0000N.gguf --to gguf",
        )
    return Part(file, metadata, tensors, fields, swapped, begin)


def _shown(header: Header, field: Field) -> Any:
    """Returns a value, of a long array its type and length."""
    if not field.array or field.count <= SHORT:
        return header.value(field)
    name = "string" if field.kind is Kind.TEXT else np.dtype(LETTERS[field.kind]).name
    return {"type": name, "length": field.count}


@cache
def _types() -> dict[int, str]:
    """The names of GGML's types by their numbers."""
    return {block.id: name for name, block in BLOCKS.items()}


def _stored(file: Path, name: str, shape: Shape, kind: int, offset: int, swapped: bool) -> Stored:
    """Returns one checked tensor entry; its range in the file is checked by the caller."""
    count = math.prod(shape)
    if count == 0:
        raise InputError(f"{file}: tensor '{name}' is empty: {list(shape)}")
    known = _types().get(kind)
    if known is None:
        raise InputError(f"{file}: tensor '{name}' has the unknown GGML type {kind}")
    block = BLOCKS[known]
    if block.weights == 1:
        dtype = DTYPES[known]
        return Stored(shape, Plain(dtype), Extent(file, dtype, shape, offset, count * dtype.itemsize), swapped)
    try:
        scheme = GGMLBlock(known)
    except UsageError:
        raise InputError(f"{file}: tensor '{name}' is of type {known}, which cannot be read yet") from None
    if reason := scheme.reject(shape):
        raise InputError(f"{file}: tensor '{name}': {reason}")
    width = shape[-1] // block.weights * block.nbytes
    extent = Extent(file, torch.uint8, (*shape[:-1], width), offset, count // shape[-1] * width)
    return Stored(shape, scheme, extent, swapped)


def part_files(path: Path) -> list[Path]:
    """Returns the files of the model at `path`: a file, any part of a split one, or a folder with one model.

    Raises:
        InputError: a part is missing, or the folder holds no model or several.
    """
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        stems = sorted({match["stem"] if (match := PART_NAME.fullmatch(f.name)) else f.name for f in files})
        if len(stems) != 1:
            hint = f"name one of them: {', '.join(stems[:5])}"
            raise InputError(f"{path}: holds {len(stems)} GGUF models", hint)
        path = files[0]
    match = PART_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    files = [path.with_name(f"{match['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    if missing := [file.name for file in files if not file.exists()]:
        what = f"missing {', '.join(missing[:5])}: {len(missing)} of {count} parts"
        raise InputError(f"{path}: {what}", "download the missing files")
    return files or [path]


def read_parts(path: Path) -> list[Part]:
    """Returns the headers of all parts of the model at `path`, the one with the metadata first.

    Args:
        path: A file, any part of a split one, or a folder with one model.

    Raises:
        InputError: a file cannot be read, or the parts do not belong together.
    """
    parts = [read_part(file) for file in part_files(path)]
    numbers = [[p.metadata.get(f"split.{key}") for key in ("no", "count")] for p in parts]
    (number, count), file = numbers[0], parts[0].file
    if len(parts) == 1 and isinstance(number, int) and isinstance(count, int) and count > 1:
        name = f"NAME-{number + 1:05}-of-{count:05}.gguf"
        raise InputError(f"{file}: part {number + 1} of {count}", f"name it {name}, beside the other parts")
    for index, found in enumerate(numbers if len(parts) > 1 else []):
        if found != [index, len(parts)]:
            what = f"its header does not say that it is part {index + 1} of {len(parts)}"
            raise InputError(f"{parts[index].file}: {what}")
    held, total = sum(len(p.tensors) for p in parts), parts[0].metadata.get("split.tensors.count")
    if len(parts) > 1 and total not in (None, held):
        what = f"its {count} parts hold {held} of {total} tensors"
        raise InputError(f"{file}: {what}", "download them again")
    return parts
