"""Searching the scale of affine integer grids: extremes that are clipped cost less than a step that is too wide.

Every group tries the same factors on its extremes and keeps what has the least weighted squared error. Symmetric grids
have one code more below the middle than above it, so a scale of either sign is tried: a negative one puts that code on
the positive side (the idea of llama.cpp's q4_0 and of AutoRound's full-range grids; readers just multiply).
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from quantize.kernels import affine

# Factors on a group's lower and upper extreme. Finer steps and smaller factors took off less than 1 % more.
_ONE_SIDE = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
_BOTH_SIDES = (1.0, 0.92, 0.84, 0.76)
_NARROW = 2


def search(weight: Tensor, importance: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Returns scale and zero code of the best grid that was tried for each row.

    Args:
        weight: float32 `[rows, group]`.
        importance: Cost of a squared error of each column, float32 `[group]`, not negative.
        bits: Code width.
        symmetric: Whether the zero code is the middle one.

    Returns:
        `(scales, zeros)`, both float32 `[rows, 1]`; scales hold float16 values and may be negative where symmetric.
    """
    low, high = affine.extremes(weight, weight.shape[-1])
    candidates = _symmetric(low, high, bits) if symmetric else _asymmetric(low, high, bits)
    best = scales = zeros = None
    for scale, zero in candidates:
        codes = (weight / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
        error = codes.sub_(zero).mul_(scale).sub_(weight).square_() @ importance
        if best is None or scales is None or zeros is None:
            best, scales, zeros = error, scale.clone(), zero.clone()
            continue
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better[:, None], scale, scales)
        zeros = torch.where(better[:, None], zero, zeros)
    assert scales is not None
    assert zeros is not None
    return scales, zeros


def _asymmetric(low: Tensor, high: Tensor, bits: int) -> list[tuple[Tensor, Tensor]]:
    factors = _ONE_SIDE if bits <= _NARROW else _BOTH_SIDES
    return [affine.grid(low * a, high * b, bits, symmetric=False) for a, b in product(factors, repeat=2)]


def _symmetric(low: Tensor, high: Tensor, bits: int) -> list[tuple[Tensor, Tensor]]:
    """Returns grids on which the larger extreme is the outermost code of the longer side, times each factor."""
    middle = 2 ** (bits - 1)
    plain, zeros = affine.grid(low, high, bits, symmetric=True)
    size = torch.maximum(high, -low)
    found = [(plain, zeros)]
    for factor in _ONE_SIDE:
        scale, _ = affine.grid(-size * factor, torch.zeros_like(size), bits, symmetric=True)
        found += [(torch.where(high > -low, -scale, scale), zeros), (scale * (middle / (middle - 0.5)), zeros)]
    return [(scale.half().float(), zero) for scale, zero in found]
