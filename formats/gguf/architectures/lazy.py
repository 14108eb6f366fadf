"""Tensors that are read piece by piece through the operations that lead from one naming to the other.

Each node is a tensor that knows its shape and its grid before anything is read, and reads any run of its first
dimension from no more of its source than that run needs. Moving rows keeps a grid: coded rows move as they are.
Touching columns or values does not: such a node is plain, float32 where its source was quantized.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantize.formats.base import Checkpoint
from quantize.schemes import GGMLBlock, Plain, QuantizedTensor, Scheme, Shape

Arrays = dict[str, Tensor]
# Rows that are read for nothing rather than begin another read.
_GAP = 64
# Elements that a transposition holds at a time.
_CHUNK = 1 << 24


class Lazy(ABC):
    """A tensor not yet read."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Logical shape, as torch has it."""

    @property
    @abstractmethod
    def scheme(self) -> Scheme:
        """The grid that it lies on; `Plain` when it has values of its own."""

    @property
    @abstractmethod
    def children(self) -> Sequence[Lazy]:
        """What it is made of, in order."""

    def columns_of(self, source: str) -> Columns | None:
        """Returns how its input columns are those of the stored tensor `source`, or None where they are not."""
        found = {child.columns_of(source) for child in self.children if source in child.sources}
        return found.pop() if len(found) == 1 else None

    @property
    def sources(self) -> tuple[str, ...]:
        """The stored tensors that it is made of, in order."""
        return tuple(dict.fromkeys(name for child in self.children for name in child.sources))

    @property
    def nbytes(self) -> int:
        """Bytes that its values or codes take."""
        return math.ceil(math.prod(self.shape) * self.scheme.bits_per_weight(self.shape) / 8)

    @property
    def same_columns(self) -> bool:
        """Whether its input columns are those of all its stored tensors."""
        return all(self.columns_of(source) is SAME for source in self.sources)

    @abstractmethod
    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Returns a run of the first dimension: the scheme's arrays when `coded`, else its values as `values`."""

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns values `start` to `stop` of the first dimension: in its own dtype when plain, else float32."""
        return self.fetch(start, self._stop(stop), False)["values"]

    def coded(self, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns a run of the first dimension on the tensor's own grid, or None when it is plain."""
        if isinstance(self.scheme, Plain):
            return None
        stop = self._stop(stop)
        return QuantizedTensor(self.scheme, (stop - start, *self.shape[1:]), self.fetch(start, stop, True))

    def _stop(self, stop: int | None) -> int:
        rows = self.shape[0] if self.shape else 1
        return rows if stop is None else min(stop, rows)


@dataclass(frozen=True, eq=False)
class Columns:
    """How a tensor's input columns are those of another.

    Attributes:
        turned: Whether one of them is the other on its side, so that models multiply by it from the right.
        order: Column k is column `order[k]` of the other, int64; None where all stay.
    """

    turned: bool = False
    order: Tensor | None = None


SAME, ON_SIDE = Columns(), Columns(True)


def _value_dtype(scheme: Scheme) -> torch.dtype:
    return scheme.dtype if isinstance(scheme, Plain) else torch.float32


def _common_scheme(parts: Sequence[Lazy]) -> Scheme:
    schemes = {part.scheme for part in parts}
    return schemes.pop() if len(schemes) == 1 else Plain(torch.float32)


class Source(Lazy):
    """A tensor that lies in a file under a name of its own."""

    name: str

    children = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Itself."""
        return (self.name,)

    def columns_of(self, source: str) -> Columns | None:
        """Returns that they are the same."""
        return SAME


@dataclass(frozen=True)
class Leaf(Source):
    """A tensor of a checkpoint as it is."""

    checkpoint: Checkpoint
    name: str

    @property
    def shape(self) -> Shape:
        """The shape in the checkpoint."""
        return self.checkpoint.tensors[self.name].shape

    @property
    def scheme(self) -> Scheme:
        """The grid in the checkpoint."""
        return self.checkpoint.tensors[self.name].scheme

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Reads from the checkpoint; a coded tensor is read whole, as checkpoints give it."""
        if not coded:
            return {"values": self.checkpoint.read(self.name, start, stop)}
        found = self.checkpoint.read_coded(self.name)
        assert found is not None
        return dict(found.rows(start, stop).arrays)


@dataclass(frozen=True)
class Constant(Lazy):
    """Values that are computed and stored nowhere."""

    values: Tensor

    children = ()
    sources = ()

    @property
    def shape(self) -> Shape:
        """The values' shape."""
        return tuple(self.values.shape)

    @property
    def scheme(self) -> Scheme:
        """The values' dtype."""
        return Plain(self.values.dtype)

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Returns the values."""
        return {"values": self.values[start:stop]}


@dataclass(frozen=True)
class _Unary(Lazy):
    """A node with one child."""

    child: Lazy

    @property
    def children(self) -> Sequence[Lazy]:
        """The one child."""
        return (self.child,)

    @property
    def shape(self) -> Shape:
        """The child's shape."""
        return self.child.shape

    @property
    def scheme(self) -> Scheme:
        """The child's grid."""
        return self.child.scheme


class _Moved(_Unary):
    """A node that changes columns, so that no grid outlives it."""

    @property
    def scheme(self) -> Scheme:
        """The dtype of the child's values."""
        return Plain(_value_dtype(self.child.scheme))


@dataclass(frozen=True)
class Rows(Lazy):
    """Rows drawn from several tensors: row `i` is row `index[i]` of all of them below one another.

    `index` is int64, of any length: a permutation, a half, every second row.
    """

    parts: tuple[Lazy, ...]
    index: Tensor

    @property
    def children(self) -> Sequence[Lazy]:
        """The tensors that rows are drawn from."""
        return self.parts

    @property
    def shape(self) -> Shape:
        """As many rows as the index is long."""
        return (len(self.index), *self.parts[0].shape[1:])

    @cached_property
    def scheme(self) -> Scheme:
        """The grid of the parts, or float32 when they differ."""
        return _common_scheme(self.parts)

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Reads the runs of rows that the range needs, each once; decodes what is wanted and no more."""
        if not coded and isinstance(self.scheme, GGMLBlock):
            shape = (stop - start, *self.shape[1:])
            return {"values": QuantizedTensor(self.scheme, shape, self.fetch(start, stop, True)).dequantize()}
        wanted, out, base = self.index[start:stop], dict[str, Tensor](), 0
        for part in self.parts:
            rows = part.shape[0]
            mine = (wanted >= base) & (wanted < base + rows)
            for low, high in _runs(wanted[mine] - base):
                here = mine & (wanted >= base + low) & (wanted < base + high)
                for key, values in part.fetch(low, high, coded).items():
                    values = values if coded else values.to(_value_dtype(self.scheme))
                    target = out.setdefault(key, values.new_empty((len(wanted), *values.shape[1:])))
                    target[here] = values[wanted[here] - base - low]
            base += rows
        return out or self.parts[0].fetch(0, 0, coded)


def _runs(rows: Tensor) -> list[tuple[int, int]]:
    """Returns the ranges of rows to read, for rows in any order."""
    if not len(rows):
        return []
    ordered = torch.unique(rows)
    cuts = (ordered.diff() > _GAP).nonzero().flatten() + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in torch.tensor_split(ordered, cuts)]


@dataclass(frozen=True)
class Stacked(Lazy):
    """Tensors of one shape on a new first dimension."""

    parts: tuple[Lazy, ...]

    @property
    def children(self) -> Sequence[Lazy]:
        """The tensors."""
        return self.parts

    @property
    def shape(self) -> Shape:
        """The number of tensors, then their shape."""
        return (len(self.parts), *self.parts[0].shape)

    @cached_property
    def scheme(self) -> Scheme:
        """The grid of the parts, or float32 when they differ."""
        return _common_scheme(self.parts)

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Reads the tensors of the range."""
        found = [part.fetch(0, part.shape[0], coded) for part in self.parts[start:stop]]
        dtype = None if coded else _value_dtype(self.scheme)
        return {key: torch.stack([arrays[key].to(dtype) for arrays in found]) for key in found[0]}


@dataclass(frozen=True)
class Item(_Unary):
    """One entry of the first dimension."""

    number: int

    @property
    def shape(self) -> Shape:
        """The shape without the first dimension."""
        return self.child.shape[1:]

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Reads the entry."""
        arrays = self.child.fetch(self.number, self.number + 1, coded)
        return {key: values[0, start:stop] for key, values in arrays.items()}


@dataclass(frozen=True)
class InnerRows(Lazy):
    """Rows of the second dimension drawn from several stacks, by entry: `Rows` for every entry of the first."""

    parts: tuple[Lazy, ...]
    index: Tensor

    @property
    def children(self) -> Sequence[Lazy]:
        """The stacks that rows are drawn from."""
        return self.parts

    @property
    def shape(self) -> Shape:
        """As many rows as the index is long."""
        first, _, *rest = self.parts[0].shape
        return (first, len(self.index), *rest)

    @property
    def scheme(self) -> Scheme:
        """The grid of the parts, or float32 when they differ."""
        return _common_scheme(self.parts)

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Reads the entries of the range."""
        found = [part.fetch(start, stop, coded) for part in self.parts]
        dtype = None if coded else _value_dtype(self.scheme)
        joined = {key: torch.cat([arrays[key].to(dtype) for arrays in found], 1) for key in found[0]}
        return {key: values[:, self.index] for key, values in joined.items()}


@dataclass(frozen=True)
class Reshaped(_Unary):
    """The same values under another shape; a grid outlives it where the last dimension stays."""

    to: Shape

    @property
    def shape(self) -> Shape:
        """The new shape."""
        return self.to

    @property
    def scheme(self) -> Scheme:
        """The child's grid where rows stay whole."""
        scheme = self.child.scheme
        return scheme if self._keeps_rows else Plain(_value_dtype(scheme))

    def columns_of(self, source: str) -> Columns | None:
        """Returns the child's where rows stay whole."""
        return self.child.columns_of(source) if self._keeps_rows else None

    @property
    def _keeps_rows(self) -> bool:
        return self.to[-1] == self.child.shape[-1]

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Reads the child's rows that hold the range."""
        old, new = math.prod(self.child.shape[1:]), math.prod(self.to[1:])
        low, high = start * new // old, -(-stop * new // old)
        out: Arrays = {}
        for key, values in self.child.fetch(low, high, coded).items():
            last = (values.shape[-1],) if coded else self.to[-1:]
            inner = (*self.to[1:-1], *last) if len(self.to) > 1 else ()
            flat = values.reshape(-1)
            row = math.prod(inner)
            skip = (start * new - low * old) * row // new
            out[key] = flat[skip : skip + (stop - start) * row].reshape(stop - start, *inner)
        return out


class Transposed(_Moved):
    """The last two dimensions exchanged."""

    @property
    def shape(self) -> Shape:
        """The child's shape, its last two dimensions exchanged."""
        *first, rows, columns = self.child.shape
        return (*first, columns, rows)

    def columns_of(self, source: str) -> Columns | None:
        """Returns that they are the source's rows, where those are the child's columns."""
        return ON_SIDE if self.child.columns_of(source) is SAME else None

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Reads entries of a stack; of a matrix all rows, some at a time, and keeps the columns wanted."""
        if len(self.shape) > 2:
            return {"values": self.child.read(start, stop).transpose(-1, -2).contiguous()}
        rows, columns = self.child.shape
        out = torch.empty((stop - start, rows), dtype=_value_dtype(self.child.scheme))
        step = max(1, _CHUNK // columns)
        for low in range(0, rows, step):
            out[:, low : low + step] = self.child.read(low, low + step)[:, start:stop].T
        return {"values": out}


@dataclass(frozen=True)
class Reordered(_Moved):
    """The last dimension in another order."""

    index: Tensor

    def columns_of(self, source: str) -> Columns | None:
        """Returns the order, where the child's columns are the source's."""
        return Columns(order=self.index) if self.child.columns_of(source) is SAME else None

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Reads the rows of the range."""
        return {"values": self.child.read(start, stop)[..., self.index]}


@dataclass(frozen=True)
class Mapped(_Unary):
    """A function of every value, in float32."""

    function: Callable[[Tensor], Tensor]

    @property
    def scheme(self) -> Scheme:
        """float32: the function's values need not fit the source's dtype."""
        return Plain(torch.float32)

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Reads the rows of the range."""
        return {"values": self.function(self.child.read(start, stop).float())}


@dataclass(frozen=True)
class MicroScaled(Lazy):
    """MXFP4 codes and scales as transformers stores them, as GGML's blocks of the same values.

    Attributes:
        codes: uint8 `[..., blocks, 16]`; byte `j` of a block holds value `2 j` in its low half, `2 j + 1` in its high.
        scales: uint8 `[..., blocks]`, the exponents.
    """

    codes: Lazy
    scales: Lazy

    @property
    def children(self) -> Sequence[Lazy]:
        """Codes and scales."""
        return (self.codes, self.scales)

    @property
    def shape(self) -> Shape:
        """32 values a block."""
        *first, blocks, _ = self.codes.shape
        return (*first, blocks * 32)

    @property
    def scheme(self) -> Scheme:
        """GGML's blocks."""
        return GGMLBlock("mxfp4")

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Moves halves of bytes: in GGML byte `j` holds value `j` in its low half and `j + 16` in its high."""
        codes, scales = self.codes.read(start, stop), self.scales.read(start, stop)
        values = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        moved = values[..., :16] | values[..., 16:] << 4
        blocks = torch.cat((scales[..., None], moved), -1).flatten(-2)
        if coded:
            return {"blocks": blocks}
        shape = (*blocks.shape[:-1], self.shape[-1])
        return {"values": QuantizedTensor(self.scheme, shape, {"blocks": blocks}).dequantize()}
