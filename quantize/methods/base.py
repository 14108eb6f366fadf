"""What a method is: it sees the weights of one block and their statistics, never modules or activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quantize.parallel import Pool
from quantize.schemes import QuantizedTensor, Scheme
from quantize.statistics import Statistics
from quantize.structure import Input

# Rows in a chunk of work: with a few thousand columns a chunk stays in the cache.
ROWS = 256


@dataclass(frozen=True, slots=True)
class Block:
    """One block's weights and what is known of them.

    Attributes:
        name: Module path, for messages.
        weights: Stored tensors by stored name, float32 where floating; not to be changed.
        dtypes: The dtype in which each of them is stored, and will be if it stays unquantized.
        schemes: The grid of each tensor that is to be quantized.
        inputs: Its inputs, with consumers and folds. Empty for methods that need no statistics.
        statistics: By input name; an input that saw no token is missing.
    """

    name: str
    weights: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    schemes: Mapping[str, Scheme]
    inputs: Sequence[Input] = ()
    statistics: Mapping[str, Statistics] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What a method made of one block.

    Attributes:
        coded: The quantized tensors, one for each of `Block.schemes`.
        targets: What was rounded, where that is not the stored weight: folded weights by stored name.
        changed: Unquantized stored tensors with new float32 values (folded norms and biases).
        notes: Local fallbacks, one line each; they go to the report, and `--strict` refuses them.
    """

    coded: Mapping[str, QuantizedTensor]
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A block whose weights a method has changed so that they round better, with the same output.

    Attributes:
        changed: Stored tensors with new float32 values.
        statistics: The block's statistics as the changed weights see their inputs.
        notes: As in `Result`.
    """

    changed: Mapping[str, Tensor]
    statistics: Mapping[str, Statistics]
    notes: tuple[str, ...] = ()


def encode(scheme: Scheme, weight: Tensor, pool: Pool) -> QuantizedTensor:
    """Returns `weight` rounded to nearest, a run of rows at a time on the pool; rows share no grid."""
    if weight.dim() != 2:
        return scheme.encode(weight)
    parts = list(pool.map(lambda span: scheme.encode(weight[span[0] : span[1]]), pool.spans(len(weight), ROWS)))
    arrays = {key: torch.cat([part.arrays[key] for part in parts]) for key in parts[0].arrays}
    return QuantizedTensor(scheme, tuple(weight.shape), arrays)


class Method(Protocol):
    """One way to choose grid points. A module of this package gives one; the package's table lists them."""

    @property
    def name(self) -> str:
        """What `--method` calls it."""

    @property
    def summary(self) -> str:
        """One line for `quantize list`."""

    @property
    def calibrates(self) -> bool:
        """Whether it needs `Statistics`."""

    @property
    def sequential(self) -> bool:
        """Whether inputs are gathered from what is quantized already: earlier blocks, earlier linears of the block."""

    def reject(self, scheme: Scheme) -> str | None:
        """Returns why it cannot choose points of `scheme`, or None when it can."""

    @property
    def transforms(self) -> bool:
        """Whether `prepare` changes weights."""

    @property
    def tokens_per_column(self) -> int:
        """Tokens of calibration text for each input column below which the method makes do with less; 0 for none."""

    def prepare(self, block: Block, pool: Pool) -> Prepared | None:
        """Returns what is done to a block's weights before any is rounded, or None for nothing."""

    def quantize(self, block: Block, pool: Pool) -> Result:
        """Returns the block's tensors on their grids; `block` is not changed."""
