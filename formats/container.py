"""The safetensors container, read and written a byte range at a time.

The safetensors package maps a whole shard writable (which counts against a data limit) and writes only complete
dictionaries; headers are its public format, so they are handled here: 8 bytes of little-endian header length, a JSON
object `name -> {dtype, shape, data_offsets}`, then the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize import schemes
from quantize.errors import InputError
from quantize.formats.base import Layout, Piece
from quantize.schemes import Shape

DTYPES: dict[str, torch.dtype] = {name.upper(): dtype for name, dtype in schemes.DTYPES.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The limit of the safetensors package; a larger length means the file is no safetensors file.
_MAX_HEADER = 100_000_000
_MAX_SIZE = 2**63  # of a dimension, and of the product of all: torch counts in int64


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one array lies: `nbytes` bytes from `offset` of `file`, holding `shape` of `dtype`, row-major."""

    file: Path
    dtype: torch.dtype
    shape: Shape
    offset: int
    nbytes: int


def read_header(file: Path) -> tuple[dict[str, Extent], dict[str, str]]:
    """Returns the arrays of a safetensors file in file order, and its metadata.

    Raises:
        InputError: the file is missing, a git-lfs pointer, truncated, or its header contradicts itself.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(b"version"):
                raise InputError(f"{file}: a git-lfs pointer, not the weights", "fetch them with 'git lfs pull'")
            if len(start) < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise InputError(f"{file}: truncated, or no safetensors file", "download it again")
            table = json.loads(stream.read(length))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: its header is not valid JSON", "download it again") from error
    if not isinstance(table, dict):
        raise InputError(f"{file}: its header is no table of tensors")
    metadata = table.pop("__metadata__", {})
    extents = {name: _extent(file, name, entry, 8 + length, size) for name, entry in table.items()}
    ordered = dict(sorted(extents.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _require_whole(file, ordered, 8 + length, size)
    return ordered, metadata if isinstance(metadata, dict) else {}


def _extent(file: Path, name: str, entry: Any, data: int, size: int) -> Extent:
    """Returns one checked header entry; every number in it ends up in a read, so none is trusted."""
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        dtype = DTYPES.get(code)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{file}: tensor '{name}' has a malformed header entry") from None
    if dtype is None:
        raise InputError(f"{file}: tensor '{name}' has the unknown type {code!r}")
    if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in (*shape, begin, end)):
        raise InputError(f"{file}: tensor '{name}' has a malformed header entry")
    if math.prod(n for n in shape if n) >= _MAX_SIZE or end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{file}: tensor '{name}' claims {end - begin} bytes for shape {list(shape)} of {code}")
    if data + end > size:
        raise InputError(f"{file}: truncated: tensor '{name}' ends at byte {data + end} of {size}", "download it again")
    return Extent(file, dtype, shape, data + begin, end - begin)


def _require_whole(file: Path, extents: Mapping[str, Extent], data: int, size: int) -> None:
    """Refuses arrays that overlap and bytes that belong to none, as the safetensors package does."""
    end = data
    for name, extent in extents.items():
        if extent.offset != end:
            what = "overlaps another" if extent.offset < end else "leaves a gap before it"
            raise InputError(f"{file}: tensor '{name}' {what}", "download it again")
        end += extent.nbytes
    if end != size:
        raise InputError(f"{file}: {size - end} bytes after the last tensor", "download it again")


def read_rows(extent: Extent, start: int = 0, stop: int | None = None) -> Tensor:
    """Returns rows `start` to `stop` of an array as a tensor that owns its memory.

    Raises:
        InputError: the file cannot be read, or ends early.
    """
    if not extent.shape or not extent.nbytes:
        start, stop, shape = 0, None, extent.shape
        begin, count = extent.offset, extent.nbytes
    else:
        rows = extent.shape[0]
        stop = rows if stop is None else min(stop, rows)
        row = extent.nbytes // rows
        shape = (stop - start, *extent.shape[1:])
        begin, count = extent.offset + start * row, (stop - start) * row
    buffer = torch.empty(count, dtype=torch.uint8)
    view = buffer_bytes(buffer)
    try:
        with extent.file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            done = 0
            while done < count:
                got = stream.readinto(view[done:])
                if not got:
                    raise InputError(f"{extent.file}: ends early at byte {begin + done}", "download it again")
                done += got
    except OSError as error:
        raise InputError(f"{extent.file}: {error.strerror or error}") from error
    return buffer.view(extent.dtype).reshape(shape)


def layout(pieces: Iterable[Piece], metadata: Mapping[str, str]) -> Layout:
    """Returns the layout of a file that holds `pieces`.

    They lie in order, unless one would not be aligned to its elements: then those with large elements come first.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    relative: dict[str, tuple[int, int]] = {}
    end = 0
    for piece in _aligned(list(pieces)):
        relative[piece.name] = end, piece.nbytes
        table[piece.name] = {
            "dtype": _NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [end, end + piece.nbytes],
        }
        end += piece.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned to 8 bytes
    start = 8 + len(text)
    where = {name: (start + offset, nbytes) for name, (offset, nbytes) in relative.items()}
    return Layout(len(text).to_bytes(8, "little") + text, where, start + end)


def _aligned(pieces: list[Piece]) -> list[Piece]:
    """Returns the pieces as they are, or largest elements first where an odd size would misalign one."""
    end = 0
    for piece in pieces:
        if end % piece.dtype.itemsize:
            return sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
        end += piece.nbytes
    return pieces


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the row-major bytes of a tensor, without a copy when it is contiguous."""
    return buffer_bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8))


def buffer_bytes(buffer: Tensor) -> memoryview:
    """Returns a writable view of the memory of a one-dimensional uint8 tensor."""
    array: Any = buffer.numpy()  # numpy's stubs do not say that arrays are buffers
    return memoryview(array)


def write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Writes all of `data` at `offset` of an open file.

    Raises:
        OSError: as the system reports it (no space, and the like).
    """
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
