"""Walking the header of a GGUF file.

A header is: the magic `GGUF`, u32 version, u64 counts of tensors and of metadata pairs; the pairs (key, u32 type,
value; an array has its element type and u64 count first); per tensor its name, u32 number of dimensions, the
dimensions (fastest first, unlike torch's), u32 GGML type and u64 offset. A text is its u64 length and UTF-8 bytes.
All numbers are little-endian, or all are big-endian: then the version has its low 16 bits clear.

It is walked here and not by the gguf package's reader, which makes array objects of every token and merge
(4 seconds and 180 MB for 49k tokens) and names no tensor in errors.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantize.errors import InputError
from quantize.formats.gguf.metadata import LETTERS, Kind, Value
from quantize.schemes import Shape

_KINDS = {int(kind): kind for kind in Kind}
# Up to here float32 arrays are read as the shortest decimals, which takes a microsecond each.
SHORT = 256


@dataclass(frozen=True, slots=True)
class Field:
    """Where a metadata value lies.

    Attributes:
        kind: Its type; of an array that of its elements.
        array: Whether it is an array.
        count: Elements of an array, else 1.
        offset: Absolute offset of the first element.
    """

    kind: Kind
    array: bool
    count: int
    offset: int


class Header:
    """Walks a header. Lengths in it come from the file, so each step is checked against the file's size.

    Attributes:
        position: Absolute offset of what is read next.
        order: Byte order of all numbers as `struct` spells it, `<` or `>`.
    """

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.position, self.order = file, data, 0, "<"

    def skip(self, count: int) -> int:
        """Passes over `count` bytes and returns where they start."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise InputError(f"{self.file}: truncated inside its header", "download it again")
        return start

    def take(self, code: str) -> Any:
        """Returns the next numbers, as `struct` spells them: one bare, several in a tuple."""
        code = f"{self.order}{code}"
        values = struct.unpack_from(code, self.data, self.skip(struct.calcsize(code)))
        return values[0] if len(values) == 1 else values

    def text(self) -> str:
        """Returns the next string."""
        start = self.skip(self.take("Q"))
        return self._decode(self.data[start : self.position])

    def start(self) -> tuple[int, int]:
        """Reads the first fields and sets the byte order; returns the counts of tensors and of metadata pairs.

        Raises:
            InputError: the version cannot be read.
        """
        version = self.take("4xI")
        if version & 0xFFFF == 0:
            self.order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise InputError(f"{self.file}: a GGUF file of version {version}", "those of version 2 and 3 can be read")
        tensors, pairs = self.take("QQ")
        return tensors, pairs

    def fields(self, count: int) -> dict[str, Field]:
        """Passes over `count` metadata pairs and returns where each value lies.

        Raises:
            InputError: a key is empty or there twice, or a value of an unknown type.
        """
        fields: dict[str, Field] = {}
        for _ in range(count):
            key = self.text()
            if not key or key in fields:
                raise InputError(f"{self.file}: its header holds the key '{key}' {'twice' if key else ''}".rstrip())
            fields[key] = self._field(key)
        return fields

    def entries(self, count: int) -> dict[str, tuple[Shape, int, int]]:
        """Passes over `count` tensor entries; returns shape (torch's order), GGML type and relative offset by name.

        Raises:
            InputError: a tensor is listed twice or has no or more than four dimensions.
        """
        entries: dict[str, tuple[Shape, int, int]] = {}
        for _ in range(count):
            name, dims = self.text(), self.take("I")
            if name in entries or not 1 <= dims <= 4:
                raise InputError(f"{self.file}: tensor '{name}' is listed twice, or has {dims} dimensions")
            shape = tuple(self.take("Q") for _ in range(dims))[::-1]
            kind, offset = self.take("IQ")
            entries[name] = (shape, kind, offset)
        return entries

    def value(self, field: Field) -> Any:
        """Returns the data of a value: bare, or the list of an array's elements.

        A float32 becomes the shortest decimal that stands for it (1e-05 as the config had it, not
        9.999999747378752e-06), but in arrays of more than `SHORT`.
        """
        if field.kind is Kind.TEXT:
            values: list[Any] = self._texts(field)
        else:
            dtype = np.dtype(LETTERS[field.kind]).newbyteorder(self.order)  # type: ignore[arg-type]
            raw = self.data[field.offset : field.offset + field.count * dtype.itemsize]
            numbers = np.frombuffer(raw, dtype)
            if field.kind is Kind.F32 and field.count <= SHORT:
                values = [float(str(number)) for number in numbers]
            else:
                values = numbers.tolist()
        return values if field.array else values[0]

    def _field(self, key: str) -> Field:
        """Passes over one value, its type first."""
        number, count, array = self.take("I"), 1, False
        if number == Kind.ARRAY:
            array, (number, count) = True, self.take("IQ")
        kind = _KINDS.get(number, Kind.ARRAY)
        if kind is Kind.ARRAY:
            what = "is an array of arrays" if number == kind else f"has a value of the unknown type {number}"
            raise InputError(f"{self.file}: its key '{key}' {what}")
        start = self.position
        self.skip(self._texts_size(count) if kind is Kind.TEXT else count * struct.calcsize(LETTERS[kind]))
        return Field(kind, array, count, start)

    def _texts_size(self, count: int) -> int:
        """Returns the bytes that the next `count` strings take."""
        length, data, position = struct.Struct(f"{self.order}Q").unpack_from, self.data, self.position
        try:
            for _ in range(count):
                position += 8 + length(data, position)[0]
        except (struct.error, OverflowError):
            position = len(data) + 1  # beyond the end, which `skip` reports
        return position - self.position

    def _texts(self, field: Field) -> list[str]:
        """Returns the strings of a field."""
        length, data, position = struct.Struct(f"{self.order}Q").unpack_from, self.data, field.offset
        texts = []
        for _ in range(field.count):
            begin = position + 8
            position = begin + length(data, position)[0]
            texts.append(self._decode(data[begin:position]))
        return texts

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.file}: its header holds a string that is not UTF-8: {raw[:60]!r}") from None


def read_values(file: Path) -> dict[str, Value]:
    """Returns the metadata of one GGUF file with its types, arrays whole: what a copy of the metadata takes.

    Raises:
        InputError: the file is missing, no GGUF file, of an unreadable version, or its metadata is broken.
    """
    with open_header(file) as header:
        _, pairs = header.start()
        fields = header.fields(pairs)
        return {key: Value(field.kind, header.value(field), field.array) for key, field in fields.items()}


def journal_path(file: Path) -> Path:
    """Returns where the old and the new header of a file lie while its header is edited in place."""
    return file.with_name(f".{file.name}.edit")


@contextmanager
def open_header(file: Path) -> Iterator[Header]:
    """A context with the header of one GGUF file, at its first byte.

    Raises:
        InputError: the file is missing, truncated or no GGUF file, or an edit of it was interrupted.
    """
    if (journal := journal_path(file)).exists():
        hint = f"repeat the edit; if it is another file now, remove {journal.name}"
        raise InputError(f"{file}: an edit of its header was interrupted", hint)
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
                yield Header(file, data)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
