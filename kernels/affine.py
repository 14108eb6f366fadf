"""Affine integer grids in torch: extremes, grid, rounding and back.

All functions take groups along the last dimension and never change their inputs. Arithmetic is float32. The grid is
built from the scale *as it will be stored* (float16), so that codes are chosen against the values a reader sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The largest and the smallest positive float16: a stored scale must be neither inf nor 0.
_SCALE_MAX = 65504.0
_SCALE_MIN = 2.0**-24
# Below this, float16 values are multiples of _SCALE_MIN.
_SCALE_NORMAL = 2.0**-14


def extremes(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Returns the least and the greatest value of each group, both stretched to include 0.

    Args:
        weight: float32 `[rows, cols]`, `cols` a multiple of `group`.
        group: Columns per group.

    Returns:
        Two float32 tensors `[rows, cols // group]`. Zero is included because a group of one sign would otherwise
        need a zero point outside the code range.
    """
    low, high = weight.reshape(*weight.shape[:-1], -1, group).aminmax(dim=-1)
    return low.clamp_max_(0), high.clamp_min_(0)


def grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Returns scale and zero code of grids that span `low <= 0 <= high`.

    Returns:
        `(scales, zeros)`, both float32 of the shape of `low`; scales hold float16 values, zeros whole numbers in
        `0 .. 2**bits - 1`. A group of zeros gets scale 1.
    """
    top = 2**bits - 1
    middle = 2 ** (bits - 1)
    span = torch.maximum(high / (top - middle), low / -middle) if symmetric else high / top - low / top
    # Rounding so coarse would push the extremes of a group of tiny weights off its grid: such scales are rounded up.
    fine = torch.where(span < _SCALE_NORMAL, (span / _SCALE_MIN).ceil() * _SCALE_MIN, span)
    scales = fine.clamp(_SCALE_MIN, _SCALE_MAX).half().float()
    scales = torch.where((low == 0) & (high == 0), torch.ones_like(scales), scales)
    if symmetric:
        return scales, torch.full_like(scales, middle)
    # Where the grid cannot span the group, both its sides are cut in proportion.
    steps = torch.where(span > _SCALE_MAX, span.clamp_max(torch.finfo(span.dtype).max), scales)
    return scales, (-low / steps).round_().clamp_(0, top)


def round_to_codes(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Returns the nearest code of each weight, float32 whole numbers `[rows, cols]` in `0 .. 2**bits - 1`."""
    groups = weight.reshape(*scales.shape, weight.shape[-1] // scales.shape[-1])
    codes = (groups / scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, 2**bits - 1)
    return codes.reshape(weight.shape)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Returns `(codes - zeros) * scales` as float32 `[rows, cols]`; scales and zeros are `[rows, groups]`."""
    groups = codes.reshape(*scales.shape, codes.shape[-1] // scales.shape[-1])
    return (groups - zeros.float().unsqueeze(-1)).mul_(scales.float().unsqueeze(-1)).reshape(codes.shape)


def dequantize_scattered(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """Returns `(codes - zeros) * scales` where `groups`, int64 `[rows, cols]`, names the group of each column."""
    values = codes - zeros.float().gather(1, groups)
    return values.mul_(scales.float().gather(1, groups))


def round_trip(weight: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Returns what `weight` reads back as after coding on grids that span `low` to `high`; float32, same shape."""
    scales, zeros = grid(low, high, bits, symmetric)
    return dequantize(round_to_codes(weight, scales, zeros, bits), scales, zeros)
