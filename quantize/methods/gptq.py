"""GPTQ: round column by column, and let later columns make up for the error of earlier ones.

Frantar et al. 2022, arXiv 2210.17323; `quantize.methods.feedback` has the arithmetic. It is a rounding and nothing
else: it serves every grid of levels, whatever file the grid belongs to.

A Hessian of few tokens says more of those tokens than of the model. It is drawn towards its diagonal before use,
`(1 - a) H + a diag(H)`: a = 0 is plain GPTQ, a = 1 is rounding by importance alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantize.errors import UsageError, unknown_name
from quantize.kernels.levels import GRIDS
from quantize.methods.base import Block, Prepared, Result, encode
from quantize.methods.descent import descend
from quantize.methods.feedback import Factor, blocks_by_need, factorize, feed_back, joined
from quantize.parallel import Pool
from quantize.schemes import GGMLBlock, Levelled, QuantizedTensor, Scheme
from quantize.statistics import Statistics
from quantize.structure import Input

# Rows of a chunk of work. Each column costs a few calls whatever the number of rows, so chunks are larger than
# those of methods that touch each weight once.
_ROWS = 512
_ORDERS = ("blocks", "columns", "none")


@dataclass(frozen=True, slots=True)
class Curvature:
    """The Hessian of an input as it is used: drawn to its diagonal and damped, float32 `[K, K]`; and its factor."""

    hessian: Tensor
    factor: Factor


@dataclass(frozen=True, slots=True)
class GPTQ:
    """Error feedback with the Hessian of each linear's input.

    Attributes:
        damping: Share of the mean diagonal added to the Hessian's diagonal; ten times more is tried where needed.
        shrinkage: How far the Hessian is drawn towards its diagonal, 0 to 1.
        act_order: Which columns come first. "blocks": the neediest block of columns, in it the neediest column;
            "columns": the neediest columns of all, on grids fitted before anything is rounded; "none": as they are.
            The file needs no index of groups in any case.
        descent: Rounds of coordinate descent over grids and codes after the feedback.
    """

    damping: float = 0.01
    shrinkage: float = 0.25
    act_order: Literal["blocks", "columns", "none"] = "columns"
    descent: int = 2

    name = "gptq"
    summary = "error feedback with the Hessian of the inputs, block after block; minutes"
    calibrates = True
    sequential = True
    transforms = False
    tokens_per_column = 4

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UsageError(f"--damping {self.damping} is no share above 0, up to 1", "try 0.01")
        if not 0 <= self.shrinkage <= 1:
            raise UsageError(f"--shrinkage {self.shrinkage} is no share of 0 to 1", "try 0.1")
        if self.descent < 0:
            raise UsageError(f"--descent {self.descent} is no number of rounds", "try 2")
        if self.act_order not in _ORDERS:
            raise unknown_name("act-order", self.act_order, _ORDERS)

    def reject(self, scheme: Scheme) -> str | None:
        """Returns a reason for grids without levels: codebooks of several weights."""
        if isinstance(scheme, GGMLBlock) and scheme.type not in GRIDS:
            return f"gptq rounds one weight at a time, {scheme} codes several together"
        return None if isinstance(scheme, Levelled) else f"gptq has no levels of {scheme}"

    def prepare(self, block: Block, pool: Pool) -> Prepared | None:
        """Returns None: weights are rounded as they are."""
        return None

    def quantize(self, block: Block, pool: Pool) -> Result:
        """Returns the consumers of the block's inputs with error feedback, and everything else to nearest."""
        coded: dict[str, QuantizedTensor] = {}
        notes: list[str] = []
        few: list[str] = []
        for item, names, curvature in self._curvatures(block, pool):
            if curvature is None:
                few += names
                continue
            damping = curvature.factor.damping
            if damping is None:
                notes.append(f"{item.name}: its Hessian cannot be factorized, rounded without feedback")
            elif damping > self.damping:
                notes.append(f"{item.name}: its Hessian took damping {damping:g}")
            coded |= self._rounded(block, names, curvature, pool)
        lost = [name for name in block.schemes if name not in coded]
        for name in lost:
            coded[name] = encode(block.schemes[name], block.weights[name], pool)
        if few:
            notes.append(f"{block.name}: saw fewer tokens than columns, rounded to nearest: {_some(few)}")
        if unseen := [name for name in lost if name not in few]:
            notes.append(f"{block.name}: saw no calibration token, rounded to nearest: {_some(unseen)}")
        return Result(coded, notes=tuple(dict.fromkeys(notes)))

    def _curvatures(self, block: Block, pool: Pool) -> Iterator[tuple[Input, list[str], Curvature | None]]:
        """Yields the inputs that have statistics, consumers of each, and the Hessian; None if it means little.

        An order of columns keeps blocks of one size whole, so consumers whose blocks differ have factors of their own.
        """
        parts: dict[tuple[Input, int], list[str]] = {}
        for item in block.inputs:
            for name in (name for name in item.consumers if name in block.schemes and item.name in block.statistics):
                size = block.schemes[name].block if self.act_order == "blocks" else 0
                parts.setdefault((item, size), []).append(name)

        def curvature(part: tuple[Input, int]) -> Curvature | None:
            statistics = block.statistics[part[0].name]
            if statistics.count < part[0].width:
                return None
            return self.curvature(statistics, block.schemes[parts[part][0]])

        for part, found in zip(parts, pool.map(curvature, parts), strict=True):
            yield part[0], parts[part], found

    def curvature(self, statistics: Statistics, scheme: Scheme) -> Curvature:
        """Returns the Hessian of an input as this method uses it for a grid."""
        hessian = statistics.hessian
        width = len(hessian)
        # with fewer tokens than that, up to half of what is left of it is taken off as well
        short = max(0.0, 1.0 - statistics.count / (self.tokens_per_column * width))
        share = self.shrinkage + (1.0 - self.shrinkage) * short / 2
        diagonal = hessian.diagonal().clone()
        hessian = hessian * (1.0 - share)
        hessian.diagonal().copy_(diagonal)
        order = torch.arange(width)
        if self.act_order != "none":
            order = blocks_by_need(diagonal, -1 if self.act_order == "columns" else scheme.block)
        factor = factorize(hessian, order, self.damping)
        hessian.diagonal().add_((factor.damping or 1.0) * float(diagonal.double().mean()))
        return Curvature(hessian, factor)

    def _rounded(
        self, block: Block, names: Sequence[str], curvature: Curvature, pool: Pool
    ) -> dict[str, QuantizedTensor]:
        """Returns the matrices of one input with error feedback; rows share nothing but the Hessian."""

        def chunk(part: tuple[str, tuple[int, int]]) -> QuantizedTensor:
            name, (start, stop) = part
            return self.feed_back(block.weights[name][start:stop], curvature, block.schemes[name])

        parts = [(name, span) for name in names for span in _chunks(len(block.weights[name]), pool)]
        made: dict[str, list[QuantizedTensor]] = {}
        for (name, _), part in zip(parts, pool.map(chunk, parts), strict=True):
            made.setdefault(name, []).append(part)
        return {name: joined(found, len(block.weights[name])) for name, found in made.items()}

    def feed_back(self, rows: Tensor, curvature: Curvature, scheme: Scheme) -> QuantizedTensor:
        """Returns float32 rows `[rows, K]` with error feedback and what mends the rest."""
        assert isinstance(scheme, Levelled)
        rounded = feed_back(rows, curvature.factor, scheme, fit_first=self.act_order == "columns")
        if self.descent and curvature.factor.damping is not None:
            rounded = descend(rows, curvature.hessian, scheme, rounded, self.descent)
        return scheme.assemble(rounded.codes, rounded.levels)


def _chunks(rows: int, pool: Pool) -> list[tuple[int, int]]:
    """Returns runs of rows of one size, about `_ROWS` each."""
    count = max(1, -(-rows // _ROWS))
    return pool.spans(rows, -(-rows // count))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
