"""Integer grids with bfloat16 scales, as compressed-tensors files hold them; torch, arguments are never changed.

Codes are signed here, `-2**(bits-1)` to `2**(bits-1) - 1`. `kernels.fp8` tells of scales and of what the peers round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.kernels import affine, affine_search, fp8

# Factors on a group's peak that the search tries: steps of 2.5 %.
_FACTORS = tuple(1.05 - 0.025 * step for step in range(19))


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

    Scales of symmetric grids are positive: not every kernel of engines takes others.

    Returns:
        `(scales, zeros)`, bfloat16 and float32 whole numbers, both `[rows, 1]`.
    """
    if not symmetric:
        wide, unsigned = affine_search.search(weight, importance, bits, symmetric=False)
        return wide.bfloat16(), unsigned - 2 ** (bits - 1)
    top = 2 ** (bits - 1)
    peak = weight.abs().amax(-1, keepdim=True)
    best, found = torch.full_like(peak, torch.inf), fp8.scales(peak, top - 0.5)
    for factor in _FACTORS:
        scale = fp8.scales(peak * factor, top - 0.5)
        step = scale.float()
        error = (weight / step).round_().clamp_(-top, top - 1).mul_(step).sub_(weight).square_() @ importance
        better = error[:, None] < best
        best = torch.where(better, error[:, None], best)
        found = torch.where(better, scale, found)
    return found, torch.zeros_like(peak)


def within(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point of grids that just hold `low <= 0 <= high`, as `integer_grid` does."""
    wide, _ = affine.grid(low, high, bits, symmetric)
    top = 2 ** (bits - 1)
    scale = wide.bfloat16()
    if symmetric:
        return scale, torch.zeros_like(low)
    return scale, (-low / scale.float()).round_().clamp_(0, 2 * top - 1) - top
