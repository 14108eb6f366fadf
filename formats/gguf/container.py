"""The GGUF container: what a file's header says, and where its tensors lie.

One file, or the parts `NAME-00001-of-0000N.gguf` of one model. A part is: the magic `GGUF`, u32 version, u64
counts of tensors and of metadata pairs; the pairs; per tensor its name, dimensions (fastest first, unlike
torch's), GGML type and offset; then the data, aligned. Everything is little-endian.

The header is walked here and not by the gguf package's reader, which makes array objects of every token and
merge (4 seconds and 180 MB for 49k tokens) and names no tensor in errors.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantize.errors import InputError
from quantize.formats.container import Extent
from quantize.schemes import GGMLBlock, Plain, Scheme, Shape


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a part: logical shape in torch's order, grid, and bytes.

    `extent` is of the dtype when plain; of uint8 `[rows, bytes of a row]` when quantized.
    """

    shape: Shape
    scheme: Scheme
    extent: Extent


@dataclass(frozen=True, slots=True)
class Part:
    """The header of one file. Arrays of more than 256 values are left at their type and length."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64,
          24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_ARRAY = 256
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class _Header:
    """Walks a header. Lengths in it come from the file, so each step is checked against the file's size."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.position = file, data, 0

    def skip(self, count: int) -> int:
        """Passes over `count` bytes and returns where they start."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise InputError(f"{self.file}: truncated inside its header", "download it again")
        return start

    def take(self, code: str) -> Any:
        """Returns the next numbers, as `struct` spells them: one bare, several in a tuple."""
        code = f"<{code}"
        values = struct.unpack_from(code, self.data, self.skip(struct.calcsize(code)))
        return values[0] if len(values) == 1 else values

    def text(self) -> str:
        """Returns the next string."""
        start = self.skip(self.take("Q"))
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.file}: its header holds a string that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """Returns the next metadata value of type `kind`."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise InputError(f"{self.file}: its header holds a value of the unknown type {kind}")
        number = self.take(_SCALARS[kind])
        # The shortest decimal of a float32: 1e-05 as the config had it, not 9.999999747378752e-06.
        return float(str(np.float32(number))) if _SCALARS[kind] == "f" else number

    def array(self) -> Any:
        """Returns a short array as a list, of a long one its type and length."""
        kind, count = self.take("IQ")
        if kind != _STRING and kind not in _SCALARS:
            raise InputError(f"{self.file}: its header holds an array of the unknown type {kind}")
        if count <= _LONGEST_ARRAY:
            return [self.value(kind) for _ in range(count)]
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.take("Q"))
            return {"type": "string", "length": count}
        self.skip(count * struct.calcsize(_SCALARS[kind]))
        return {"type": np.dtype(_SCALARS[kind]).name, "length": count}


def read_part(file: Path) -> Part:
    """Returns the header of one GGUF file; no tensor data is read.

    Raises:
        InputError: the file is missing, no GGUF file, of an unreadable version, truncated, or several joined.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if start.startswith(b"version"):
                raise InputError(f"{file}: a git-lfs pointer, not the model", "fetch it with 'git lfs pull'")
            if len(start) < 8 and b"GGUF".startswith(start[:4]):
                raise InputError(f"{file}: truncated: {len(start)} bytes", "download it again")
            if start[:4] != b"GGUF":
                raise InputError(f"{file}: no GGUF file: it starts with {start[:4]!r}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_header(_Header(file, data))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error


def _read_header(header: _Header) -> Part:
    file = header.file
    _, version, tensor_count, pair_count = header.take("IIQQ")
    if version not in (2, 3):
        what = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise InputError(f"{file}: a GGUF file {what}", "little-endian ones of version 2 and 3 can be read")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = header.text()
        if key in metadata:
            raise InputError(f"{file}: its header holds the key '{key}' twice")
        metadata[key] = header.value(header.take("I"))
    entries: dict[str, tuple[Shape, int, int]] = {}
    for _ in range(tensor_count):
        name, dims = header.text(), header.take("I")
        if name in entries or not 1 <= dims <= 4:
            raise InputError(f"{file}: tensor '{name}' is listed twice, or has {dims} dimensions")
        shape = tuple(header.take("Q") for _ in range(dims))[::-1]
        kind, offset = header.take("IQ")
        entries[name] = (shape, kind, offset)

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{file}: general.alignment is {alignment}, no power of two")
    begin, size, end = -(-header.position // alignment) * alignment, len(header.data), header.position
    tensors: dict[str, Stored] = {}
    for name, (shape, kind, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        tensors[name] = stored = _stored(file, name, shape, kind, begin + offset)
        end = max(end, begin + offset + stored.extent.nbytes)
        if end > size:
            what = f"truncated: tensor '{name}' ends at byte {end} of {size}"
            raise InputError(f"{file}: {what}", "download it again")
    padded = -(-end // alignment) * alignment
    if b"GGUF" in (header.data[end : end + 4], header.data[padded : padded + 4]):
        raise InputError(
            f"{file}: parts joined byte-wise: a second GGUF header starts at byte {end}",
            "keep the parts as they are and name the first, or join them with llama-gguf-split --merge",
        )
    return Part(file, metadata, tensors)


def _stored(file: Path, name: str, shape: Shape, kind: int, offset: int) -> Stored:
    """Returns one checked tensor entry; its range in the file is checked by the caller."""
    from gguf import GGMLQuantizationType

    count = math.prod(shape)
    if count == 0:
        raise InputError(f"{file}: tensor '{name}' is empty: {list(shape)}")
    if kind in _PLAIN:
        dtype = _PLAIN[kind]
        return Stored(shape, Plain(dtype), Extent(file, dtype, shape, offset, count * dtype.itemsize))
    try:
        scheme = GGMLBlock(GGMLQuantizationType(kind).name.lower())
    except ValueError:
        raise InputError(
            f"{file}: tensor '{name}' has the unknown GGML type {kind}", "pip install -U gguf may know it"
        ) from None
    if reason := scheme.reject(shape):
        raise InputError(f"{file}: tensor '{name}': {reason}")
    width = shape[-1] // scheme.block * scheme.block_bytes
    extent = Extent(file, torch.uint8, (*shape[:-1], width), offset, count // shape[-1] * width)
    return Stored(shape, scheme, extent)


def part_files(path: Path) -> list[Path]:
    """Returns the files of the model at `path`: a file, any part of a split one, or a folder with one model.

    Raises:
        InputError: a part is missing, or the folder holds no model or several.
    """
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        stems = sorted({match["stem"] if (match := _PART_NAME.fullmatch(f.name)) else f.name for f in files})
        if len(stems) != 1:
            hint = f"name one of them: {', '.join(stems[:5])}"
            raise InputError(f"{path}: holds {len(stems)} GGUF models", hint)
        path = files[0]
    match = _PART_NAME.fullmatch(path.name)
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
