"""The operations that declarations are made of, each with its inverse.

An operation turns the tensors of a transformers checkpoint into those of a GGUF file (`forward`) and back
(`backward`). Both get the model's settings and lazy tensors, and read nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantize.formats.gguf.architectures.lazy import (
    InnerRows,
    Item,
    Lazy,
    Mapped,
    MicroScaled,
    Reordered,
    Reshaped,
    Rows,
    Stacked,
    Transposed,
)

if TYPE_CHECKING:
    from quantize.formats.gguf.architectures.settings import Settings

Turn = Callable[["Settings", Sequence[Lazy]], Sequence[Lazy]]


@dataclass(frozen=True, slots=True)
class Operation:
    """A map between the two namings and its inverse.

    Attributes:
        forward: transformers' tensors to GGUF's.
        backward: GGUF's tensors to transformers'.
    """

    forward: Turn
    backward: Turn


def chain(first: Operation, second: Operation) -> Operation:
    """Returns `first`, then `second`."""
    return Operation(
        lambda s, t: second.forward(s, first.forward(s, t)),
        lambda s, t: first.backward(s, second.backward(s, t)),
    )


def rows(index: Callable[[Settings, int], Tensor]) -> Operation:
    """Returns a permutation of rows; `index` gives the source row of each row, from settings and their number."""
    return Operation(
        lambda s, t: [Rows((t[0],), index(s, t[0].shape[0]))],
        lambda s, t: [Rows((t[0],), _inverse(index(s, t[0].shape[0])))],
    )


def columns(index: Callable[[Settings, int], Tensor]) -> Operation:
    """Returns a permutation of columns; `index` gives the source column of each."""
    return Operation(
        lambda s, t: [Reordered(t[0], index(s, t[0].shape[-1]))],
        lambda s, t: [Reordered(t[0], _inverse(index(s, t[0].shape[-1])))],
    )


def split_rows(indices: Callable[[Settings, int], Sequence[Tensor]]) -> Operation:
    """Returns a split of one tensor into several by rows; `indices` gives the source rows of each.

    Every row goes to one of them.
    """

    def backward(settings: Settings, tensors: Sequence[Lazy]) -> Sequence[Lazy]:
        count = sum(tensor.shape[0] for tensor in tensors)
        return [Rows(tuple(tensors), _inverse(torch.cat(list(indices(settings, count)))))]

    return Operation(lambda s, t: [Rows((t[0],), index) for index in indices(s, t[0].shape[0])], backward)


def split_inner(indices: Callable[[int], Sequence[Tensor]]) -> Operation:
    """Returns a split of a stack of matrices into several by the matrices' rows."""

    def backward(settings: Settings, tensors: Sequence[Lazy]) -> Sequence[Lazy]:
        count = sum(tensor.shape[1] for tensor in tensors)
        return [InnerRows(tuple(tensors), _inverse(torch.cat(list(indices(count)))))]

    return Operation(lambda s, t: [InnerRows((t[0],), index) for index in indices(t[0].shape[1])], backward)


def _inverse(index: Tensor) -> Tensor:
    out = torch.empty_like(index)
    out[index] = torch.arange(len(index))
    return out


def halves(count: int) -> list[Tensor]:
    """Returns the first and the second half of `count` rows."""
    return list(torch.arange(count).chunk(2))


def turns(count: int) -> list[Tensor]:
    """Returns the even and the odd of `count` rows."""
    return [torch.arange(0, count, 2), torch.arange(1, count, 2)]


def _mapped(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Operation:
    return Operation(lambda s, t: [Mapped(t[0], forward)], lambda s, t: [Mapped(t[0], backward)])


ShapeOf = Callable[["Settings", Lazy], tuple[int, ...]]


def reshape(forward: ShapeOf, backward: ShapeOf) -> Operation:
    """Returns a change of shape, from settings and the tensor."""
    return Operation(
        lambda s, t: [Reshaped(t[0], forward(s, t[0]))],
        lambda s, t: [Reshaped(t[0], backward(s, t[0]))],
    )


#: The tensor as it is.
SAME = Operation(lambda s, t: t, lambda s, t: t)
#: The matrix on its side, as GPT-2's `Conv1D` and some expert stacks store it.
TRANSPOSE = Operation(lambda s, t: [Transposed(t[0])], lambda s, t: [Transposed(t[0])])
#: A norm that multiplies by `1 + weight`.
PLUS_ONE = _mapped(lambda x: x + 1, lambda x: x - 1)
#: The decay of a state-space model, stored as its logarithm.
MINUS_EXP = _mapped(lambda x: -torch.exp(x), lambda x: torch.log(-x))
#: One matrix per expert, stacked.
STACK = Operation(
    lambda s, t: [Stacked(tuple(t))],
    lambda s, t: [Item(t[0], expert) for expert in range(t[0].shape[0])],
)
#: Codes and scales of a micro-scaled tensor.
MICRO_SCALED = Operation(lambda s, t: [MicroScaled(t[0], t[1])], lambda s, t: t)
#: The kernel of a depthwise convolution, `[channels, 1, width]`, without the middle.
SQUEEZE = reshape(
    lambda s, t: (t.shape[0], t.shape[-1]),
    lambda s, t: (t.shape[0], 1, t.shape[-1]),
)
#: A scalar or a vector of one value as a vector.
ONE = reshape(lambda s, t: (1,), lambda s, t: (1,))
#: A matrix of one row; files leave out leading dimensions of 1.
ROW = reshape(lambda s, t: (1, t.shape[-1]), lambda s, t: (1, t.shape[-1]))
#: A stack whose matrices hold gate over up.
GATE_UP = split_inner(halves)


def _in_pairs(settings: Settings, heads: int, count: int) -> Tensor:
    """Returns the source rows of each row: the two halves of a head by turns."""
    if count != heads * settings.head_dim or settings.head_dim % 2:
        raise ValueError(f"it has {count} rows, not {heads} heads of {settings.head_dim}")
    return torch.arange(count).reshape(heads, 2, -1).transpose(1, 2).flatten()


#: Rows of the query in rotary pairs, where transformers has the two halves of each head apart.
QUERY = rows(lambda s, count: _in_pairs(s, s.heads, count))
#: The same of the key, which may have fewer heads.
KEY = rows(lambda s, count: _in_pairs(s, s.kv_heads, count))
