"""Integer grids with bfloat16 scales, as compressed-tensors files hold them; torch, arguments are never changed.

Codes are signed here, `-2**(bits-1)` to `2**(bits-1) - 1`. `kernels.fp8` tells of scales and of what the peers round.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from quantize.kernels import affine, fp8

# Factors on a group's peak that the search tries: steps of 2.5 %.
_FACTORS = tuple(1.05 - 0.025 * step for step in range(19))
# On each side of grids with a zero point.
_SIDES = (1.0, 0.92, 0.84, 0.76)


def integer_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, brain: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point of integer grids that span `low <= 0 <= high`, by the peers' formulas.

    The codes of a symmetric grid run from -2**(bits-1) to 2**(bits-1) - 1, and its scale puts the greatest magnitude
    in the middle between the two: half a step is cut off at the upper end.

    Returns:
        `(scales, zeros)`: bfloat16 and float32 whole numbers (0 where symmetric), of the shape of `low`.
    """
    steps, bottom = 2**bits - 1, -(2.0 ** (bits - 1))
    if symmetric:
        return fp8.scales(torch.maximum(high, -low), steps / 2), torch.zeros_like(low)
    span = fp8.as_peers(high - low, brain)
    exact = fp8.as_peers(span / steps, brain)
    found = fp8.scales(span, steps)
    offset = fp8.as_peers(
        bottom - fp8.as_peers(low / torch.where(exact == 0, torch.ones_like(exact), exact), brain), brain
    )
    zeros = offset.clamp(bottom, -bottom - 1).round_()
    return found, torch.where(span == 0, torch.zeros_like(zeros), zeros)


def round_integers(weight: Tensor, scale: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Returns the signed codes of `weight`, float32 whole numbers.

    Args:
        weight: float32 `[rows, cols]`.
        scale: `[rows, groups]`; `groups` divides `cols`.
        zeros: Signed zero points, float32 `[rows, groups]`.
        bits: Width of a code.
    """
    top = 2 ** (bits - 1)
    brain = fp8.are_brain(weight).unsqueeze(-1)
    groups = weight.reshape(*scale.shape, -1)
    quotient = fp8.as_peers(groups / scale.float().unsqueeze(-1), brain)
    codes = fp8.as_peers(quotient + zeros.unsqueeze(-1), brain).clamp_(-top, top - 1).round_()
    return codes.reshape(weight.shape)


def search(weight: Tensor, importance: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Returns the best grid that was tried for each row of float32 `weight` `[rows, group]`.

    Scales are positive, those of symmetric grids too: not every kernel of engines takes others.

    Returns:
        `(scales, zeros)`, bfloat16 and float32 whole numbers, both `[rows, 1]`.
    """
    low, high = affine.extremes(weight, weight.shape[-1])
    top = 2 ** (bits - 1)
    found, zeros = integer_grid(low, high, bits, symmetric, fp8.are_brain(weight))
    best: Tensor | None = None
    for scale, zero in [(found, zeros), *_candidates(low, high, bits, symmetric)]:
        step = scale.float()
        codes = (weight / step).round_().add_(zero).clamp_(-top, top - 1)
        error = (codes.sub_(zero).mul_(step).sub_(weight).square_() @ importance)[:, None]
        better = error < (error + 1 if best is None else best)
        best = error if best is None else torch.where(better, error, best)
        found, zeros = torch.where(better, scale, found), torch.where(better, zero, zeros)
    return found, zeros


def _candidates(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields grids on which the extremes are cut by several factors, or stretched a little."""
    if symmetric:
        peak = torch.maximum(high, -low)
        for factor in _FACTORS:
            yield fp8.scales(peak * factor, 2 ** (bits - 1) - 0.5), torch.zeros_like(peak)
        return
    for left, right in product(_SIDES, repeat=2):
        yield within(low * left, high * right, bits, symmetric=False)


def within(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point of grids that just hold `low <= 0 <= high`, in the types of `integer_grid`."""
    top = 2 ** (bits - 1)
    if symmetric:
        return fp8.scales(torch.maximum(high / (top - 1), low / -top), 1), torch.zeros_like(low)
    scale = fp8.scales(high / (2 * top - 1) - low / (2 * top - 1), 1)
    return scale, (-low / scale.float()).round_().clamp_(0, 2 * top - 1) - top
