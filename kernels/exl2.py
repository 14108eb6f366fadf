"""EXL2 grids in torch: scales, values, and the search for scales.

A matrix `[rows, cols]` has its columns in packed order, cut into groups of columns. In group g weight c of row r is

    value = half(half(code[r, c] - middle) * scale[r, g])        middle = 2**(bits - 1)
    scale = half(m * m * half(maximum[g] / 256))                 m = step[r, g] + 1, from 1 to 16

so a group has one maximum for all rows, and each row a square law of 16 steps below it. `half` rounds to float16, to
nearest even, subnormals included: `maximum / 256` is one for most groups of large models, which is why grids are fitted
to scales as they read back. Products of two float16 values are exact in float32, so each rounds once.

Functions never change their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Bits and number of columns of each group, in packed order.
Groups = Sequence[tuple[int, int]]

WIDTHS = (2, 3, 4, 5, 6, 8)
STEPS = 16
_LARGEST_HALF = 65504.0
# The least maximum whose 256th part is no zero.
_LEAST = 2.0**-16
# Factors on the maximum that holds the largest weight: 0.70 to 1.20 coarsely, then around the best of them.
_COARSE = tuple(0.70 + i / 64 for i in range(33))
_FINE = tuple(i / 256 for i in (-3, -2, -1, 1, 2, 3))
# Steps that a row may move from the one that holds its own largest weight.
_MOVES = (-3, -2, -1, 1, 2)


def scales(steps: Tensor, maxima: Tensor) -> Tensor:
    """Returns the scales as engines compute them.

    Args:
        steps: uint8 `[rows, groups]`, 0 to 15.
        maxima: float16, one for each group: `[groups]` or `[rows, groups]`.

    Returns:
        float16 `[rows, groups]`.
    """
    unit = (maxima.float() / 256).half()
    root = steps.float() + 1
    return (root * root * unit.float()).half()


def dequantize(codes: Tensor, scales: Tensor, groups: Groups) -> Tensor:
    """Returns the values of codes in packed order, float32 `[rows, cols]`, each one that float16 holds.

    Args:
        codes: uint8 `[rows, cols]`.
        scales: float16 `[rows, groups]`.
        groups: Bits and columns of each.
    """
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    start = 0
    for index, (bits, columns) in enumerate(groups):
        part = slice(start, start + columns)
        values[:, part] = (codes[:, part].float() - (1 << bits - 1)) * scales[:, index : index + 1].float()
        start += columns
    return values.half().float()


def round_to_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns the nearest code of each weight of a group, uint8; the middle code where the scale is 0.

    Args:
        weight: float32 `[rows, columns]`.
        scale: float32 `[rows]`.
        bits: Width of a code.
    """
    return (_nearest(weight, scale, bits) + (1 << bits - 1)).to(torch.uint8)


def fit(weight: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the steps and the maximum that round one group with least error.

    The maximum is searched for all rows at once, then each row's step near the one that holds its largest weight.
    The error is the squared one where columns have an importance; without, a higher power guards large weights, of
    which nobody knows whether they matter.

    Args:
        weight: float32 `[rows, columns]`, finite.
        bits: Width of a code.
        importance: Cost of a squared error of each column, float32 `[columns]`.

    Returns:
        uint8 `[rows]`, and float16 without dimensions, positive and finite.
    """
    wanted = weight.abs().amax(1).add_(1e-12).div_((2**bits - 1) / 2)
    largest = wanted.max()
    steps = (STEPS * (wanted / largest).sqrt()).round_().clamp_(1, STEPS).sub_(1).to(torch.uint8)
    shape = (steps.float() + 1).div_(STEPS).square_() * largest
    costs = {factor: float(_row_costs(weight, shape * factor, bits, importance).sum()) for factor in _COARSE}
    best = min(costs, key=costs.__getitem__)
    for factor in (best + move for move in _FINE):
        costs[factor] = float(_row_costs(weight, shape * factor, bits, importance).sum())
    maximum = largest * min(costs, key=costs.__getitem__)
    maximum = maximum.clamp(_LEAST, _LARGEST_HALF / (1 << bits - 1)).half()
    return _mend_steps(weight, bits, importance, steps, maximum), maximum


def _mend_steps(weight: Tensor, bits: int, importance: Tensor | None, steps: Tensor, maximum: Tensor) -> Tensor:
    """Returns the best step of each row among those nearby; the old one where none is better."""
    tried = [steps, *((steps.int() + move).clamp(0, STEPS - 1).to(torch.uint8) for move in _MOVES)]
    costs = [_row_costs(weight, scales(each[:, None], maximum)[:, 0].float(), bits, importance) for each in tried]
    best = torch.stack(costs).min(0).indices
    return torch.stack(tried).gather(0, best[None])[0]


def _nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns the nearest whole number of scales that a code can say, float32 `[rows, columns]`."""
    usable = torch.where(scale == 0, torch.inf, scale)
    half = 1 << bits - 1
    return (weight / usable[:, None]).round_().clamp_(-half, half - 1)


def _row_costs(weight: Tensor, scale: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """Returns what rounding each row costs, float32 `[rows]`."""
    errors = _nearest(weight, scale, bits).mul_(scale[:, None]).sub_(weight)
    if importance is not None:
        return errors.square_() @ importance
    errors.abs_()
    return (errors.square() * errors * errors.sqrt()).sum(1)
