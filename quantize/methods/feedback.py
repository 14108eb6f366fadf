"""Rounding with error feedback: what one column's rounding breaks, the columns after it mend.

Frantar et al. 2022 (GPTQ, arXiv 2210.17323), in the form of LDLQ (Chee et al. 2023, arXiv 2307.13304), which is the
same rounding. With H = M D M^T, M unit upper triangular and D diagonal, the squared error of a linear's output under
a weight error e (one row) is

    e H e^T = sum_j D_j (e_j + sum_{i<j} e_i M_ij)^2

so each column in turn is rounded towards `w_j - sum_{i<j} e_i M_ij`. Only the errors made so far enter: nothing is
updated ahead, no inverse of H is needed, and the grids of a block of columns are fitted to its targets at the moment
when the block's turn comes, whatever the size of the block.

All of it is torch and runs where its arguments are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.kernels.levels import Levels
from quantize.methods.descent import Rounded
from quantize.schemes import Levelled, QuantizedTensor

# Columns that are rounded one by one before their errors are handed on by a matrix product.
_RUN = 32
# Damping beyond which feedback is given up; each attempt takes ten times the last.
_LARGEST_DAMPING = 100.0
# Columns whose errors are handed on together where grids do not say so.
_STEP = 128


@dataclass(frozen=True, slots=True)
class Factor:
    """The Hessian as error feedback needs it; positions are those of `order`.

    Attributes:
        order: The column at each position, int64 `[K]`.
        feed: M without its diagonal's ones mattering: float32 `[K, K]`, upper triangular.
        cost: D: what a squared error at each position costs when all later columns make up for it; float32 `[K]`.
        damping: The damping that it took, as a share of the mean diagonal; None where none was enough and `feed` is 0.
    """

    order: Tensor
    feed: Tensor
    cost: Tensor
    damping: float | None


def factorize(hessian: Tensor, order: Tensor, damping: float) -> Factor:
    """Returns the factor of a Hessian with its columns in another order.

    Args:
        hessian: Mean of x x^T, float32 `[K, K]`; not changed.
        order: int64 `[K]`.
        damping: Share of the mean diagonal that is added to the diagonal. Ten times more is tried where the matrix
            is not positive definite.
    """
    back = order.flip(0)
    diagonal = hessian.diagonal()
    mean = float(diagonal.double().mean())
    if 0 < mean < math.inf and damping > 0:
        share = damping
        while share <= _LARGEST_DAMPING:
            matrix = hessian[back[:, None], back]
            matrix.diagonal().add_(share * mean)
            lower, failed = torch.linalg.cholesky_ex(matrix)
            del matrix
            if not int(failed):
                upper = lower.flip(0, 1)
                del lower
                root = upper.diagonal().clone()
                return Factor(order, upper.div_(root), root.square(), share)
            share *= 10
    return Factor(order, torch.zeros_like(hessian), torch.ones_like(diagonal), None)


def blocks_by_need(need: Tensor, block: int) -> Tensor:
    """Returns an order that keeps blocks of columns whole: the neediest block first, in it the neediest column.

    Errors of early columns can be made up for by more others. Groups stay contiguous, so a file needs no index of
    the group of each column.

    Args:
        need: Mean square of each column, `[K]`.
        block: Columns that share a fit, or -1 for all.
    """
    if block in (-1, len(need)):
        return torch.sort(need, descending=True, stable=True).indices
    blocks = need.reshape(-1, block)
    inside = torch.sort(blocks, dim=1, descending=True, stable=True).indices
    outside = torch.sort(blocks.amax(1), descending=True, stable=True).indices
    return (inside + torch.arange(len(blocks), device=need.device)[:, None] * block)[outside].flatten()


def feed_back(weight: Tensor, factor: Factor, scheme: Levelled, *, fit_first: bool = False) -> Rounded:
    """Returns rows rounded with error feedback.

    Args:
        weight: float32 `[rows, K]`; not changed.
        factor: Of the rows' Hessian.
        scheme: The grid.
        fit_first: Whether all grids are fitted to the weights before anything is rounded, so that columns may come in
            any order. Else each block's are fitted to its targets when its turn comes, and the order keeps the
            scheme's blocks whole.
    """
    rows, width = weight.shape
    block = width if scheme.block == -1 else scheme.block
    # an error in a column costs what later columns cannot make up for: that weighs fits, not the mean square
    importance = torch.empty_like(factor.cost)
    importance[factor.order] = factor.cost
    columns = weight.T[factor.order].contiguous()
    errors = torch.empty_like(columns)
    codes = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)

    def fit(first: int, natural: Tensor) -> Levels:
        return scheme.fit(natural.contiguous(), importance[first : first + block])

    fitted = {
        first: fit(first, weight[:, first : first + block]) for first in range(0, width if fit_first else 0, block)
    }
    step = min(block, _STEP) if fit_first else block
    for start in range(0, width, step):
        stop = min(start + step, width)
        here = factor.order[start:stop]
        target = columns[start:stop] - factor.feed[:start, start:stop].T @ errors[:start]
        if not fit_first:
            first = int(here.min())
            natural = torch.empty_like(target)
            natural[here - first] = target
            fitted[first] = fit(first, natural.T)
        grid = _grid(fitted, here, block)
        found = _round_block(target, columns[start:stop], errors[start:stop], factor.feed[start:stop, start:stop], grid)
        codes[:, here] = found.T
    return Rounded(codes, [fitted[first] for first in sorted(fitted)])


@dataclass(frozen=True, slots=True)
class _Grid:
    """The grids of a block, per column: scale and offset float32 `[columns, rows]`, points `[n]`."""

    scale: Tensor
    offset: Tensor
    points: Tensor


def _grid(fitted: Mapping[int, Levels], columns: Tensor, block: int) -> _Grid:
    """Returns the grids of some columns, from those of the blocks by first column."""
    points = next(iter(fitted.values())).points
    rows = len(next(iter(fitted.values())).scale)
    scale = torch.empty(len(columns), rows, device=columns.device)
    grid = _Grid(scale, torch.empty_like(scale), points)
    firsts = columns // block * block
    for first in sorted(set(firsts.tolist())):
        levels, mine = fitted[first], firsts == first
        sub = (columns[mine] - first) // (block // levels.scale.shape[1])
        grid.scale[mine] = levels.scale.T[sub]
        grid.offset[mine] = levels.offset.T[sub]
    return grid


def _round_block(target: Tensor, weight: Tensor, errors: Tensor, feed: Tensor, grid: _Grid) -> Tensor:
    """Returns the codes of a block, uint8 `[columns, rows]`, and fills its `errors`; `target` is used up."""
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    usable = torch.where(grid.scale == 0, torch.ones_like(grid.scale), grid.scale)
    uniform = _is_uniform(grid.points)
    first, count = grid.points[0], len(grid.points)
    middles = (grid.points[1:] + grid.points[:-1]) / 2
    for start in range(0, len(target), _RUN):
        stop = min(start + _RUN, len(target))
        if start:
            target[start:stop].sub_(feed[:start, start:stop].T @ errors[:start])
        for i in range(start, stop):
            level = (target[i] - grid.offset[i]).div_(usable[i])
            if uniform:
                code = level.sub_(first).round_().clamp_(0, count - 1)
                value = code + first
            else:
                code = torch.bucketize(level, middles)
                value = grid.points[code]
            codes[i] = code
            error = value.mul_(grid.scale[i]).add_(grid.offset[i]).sub_(weight[i])
            errors[i] = error
            if i + 1 < stop:
                target[i + 1 : stop].addr_(feed[i, i + 1 : stop], error, alpha=-1)
    return codes


def _is_uniform(points: Tensor) -> bool:
    return bool((points.diff() == 1).all())


def loss(errors: Tensor, hessian: Tensor) -> Tensor:
    """Returns e H e^T of each row of `errors` `[rows, K]`; float32 `[rows]`."""
    return (errors @ hessian).mul_(errors).sum(-1)


def joined(parts: Sequence[QuantizedTensor], rows: int) -> QuantizedTensor:
    """Returns runs of rows below one another."""
    arrays = {key: torch.cat([part.arrays[key] for part in parts]) for key in parts[0].arrays}
    return QuantizedTensor(parts[0].scheme, (rows, *parts[0].shape[1:]), arrays)
