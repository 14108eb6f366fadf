"""The layout of a GGUF file: its header, and where every tensor goes, before any of them exists.

What is written is version 3, little-endian. llama.cpp refuses gaps between tensors and other orders than the header's.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantize.errors import InputError
from quantize.formats.base import Layout
from quantize.formats.gguf.metadata import Value, alignment_of
from quantize.kernels.cpu.ggml import BLOCKS
from quantize.schemes import Scheme, Shape

_VERSION = 3
# llama.cpp keeps names in 64 bytes with a NUL at the end; the format limits keys.
_LONGEST_NAME, _LONGEST_KEY = 63, 65535
_MOST_DIMS = 4
_MOST_WEIGHTS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: Its name in the file.
        shape: Logical shape in torch's order, `[out_features, in_features]` for a linear.
        scheme: A plain dtype or a block grid that GGML has.
    """

    name: str
    shape: Shape
    scheme: Scheme

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding.

        Raises:
            InputError: GGML has no such type, or the shape does not go with it.
        """
        block = BLOCKS.get(str(self.scheme))
        if block is None:
            raise InputError(f"tensor '{self.name}': GGUF files hold no {self.scheme}")
        count, width = math.prod(self.shape), self.shape[-1] if self.shape else 1
        if not 0 < count <= _MOST_WEIGHTS or len(self.shape) > _MOST_DIMS:
            raise InputError(f"tensor '{self.name}': GGUF files hold no tensor of shape {list(self.shape)}")
        if width % block.weights:
            what = f"its width {width} is no multiple of the block size {block.weights} of {self.scheme}"
            raise InputError(f"tensor '{self.name}': {what}")
        return count // block.weights * block.nbytes


def layout(metadata: Mapping[str, Value], tensors: Sequence[Entry], *, all_dims: bool = False) -> Layout:
    """Returns the layout of a file: metadata and tensors in the order given, data aligned and without gaps.

    The bytes between tensors and after the last, up to the next multiple of the alignment, are zeros that belong to
    the file.

    Args:
        metadata: Typed values; `general.alignment` among them is honoured. Empty texts and arrays are written.
        tensors: What the file holds; none makes a file of metadata alone.
        all_dims: Whether leading dimensions of 1 are kept. llama.cpp's own programs leave them out (a `[1, n]` tensor
            becomes `[n]`), which reads the same there; a copy keeps what it found.

    Raises:
        InputError: a key or name that the format cannot hold, a name twice, a value that does not fit its type, a
            type or shape that GGUF has not.
    """
    alignment = alignment_of(metadata)
    pairs = [part for key, value in metadata.items() for part in _pair(key, value)]
    infos: list[bytes] = []
    relative: dict[str, tuple[int, int]] = {}
    end = 0
    for entry in tensors:
        if entry.name in relative:
            raise InputError(f"tensor '{entry.name}' would be there twice")
        relative[entry.name] = end, entry.nbytes
        infos.append(_info(entry, end, all_dims))
        end += padded(entry.nbytes, alignment)
    header = struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(metadata)) + b"".join((*pairs, *infos))
    start = padded(len(header), alignment)
    where = {name: (start + offset, nbytes) for name, (offset, nbytes) in relative.items()}
    return Layout(header.ljust(start, b"\0"), where, start + end)


def padded(size: int, alignment: int) -> int:
    """Returns the next multiple of `alignment` from `size` on."""
    return -(-size // alignment) * alignment


def _pair(key: str, value: Value) -> tuple[bytes, bytes]:
    try:
        return _name("key", key, _LONGEST_KEY), value.encode()
    except ValueError as error:
        raise InputError(f"metadata key '{key}': {error}") from None


def _info(entry: Entry, offset: int, all_dims: bool) -> bytes:
    """Returns a tensor's entry in the header."""
    dims = list(entry.shape[::-1]) or [1]
    while not all_dims and len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    name = _name("tensor name", entry.name, _LONGEST_NAME)
    return name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, BLOCKS[str(entry.scheme)].id, offset)


def _name(what: str, name: str, longest: int) -> bytes:
    """Returns a name as the header has it."""
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raise InputError(f"the {what} {name!r} is not Unicode") from None
    if not raw or b"\0" in raw or len(raw) > longest:
        what = f"the {what} '{name:.80}' has {len(raw)} bytes" if b"\0" not in raw else f"the {what} {name!r} has a NUL"
        raise InputError(what, f"1 to {longest} bytes are possible")
    return struct.pack("<Q", len(raw)) + raw
