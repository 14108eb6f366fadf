"""The inner loops of the codebook searches, written so that the compiler turns each into SIMD code.

Lanes are candidates of a list, or the tried scales of a block. Every lane's own sum keeps llama.cpp's order.

The odd number of a level is 2 * level + 1; searches measure in these, whatever the decoder's values are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu.grids import TILE
from quantize.kernels.cpu.numeric import MAGIC, compiled, inlined

LANES = 32  # room for the tried scales of a block
_PART = 16  # lanes in one loop: a constant, and small enough to waste little when a block tries 13 or 19 scales

_ZERO, _HALF, _ONE, _THREE, _EIGHT = (np.float32(v) for v in (0, 0.5, 1, 3, 8))
_TOP3, _TOP8 = np.float32(2), np.float32(7)
_NINE, _CUBE, _SQUARE8 = np.float32(9), np.float32(27), np.float32(64)
_FOURTH, _CUBE8 = np.float32(81), np.float32(512)


@inlined
def wrapped(value: Any) -> Any:
    """Returns the nearest whole number, ties to even, as float32; beyond 2**22 what llama.cpp makes of it.

    Its rounding adds a constant and takes low bits. A weight that nothing depends on can be a million times the
    largest other one, and then those bits count.
    """
    bits = np.float32(value + MAGIC).view(np.uint32)
    return np.uint32((bits & np.uint32(0x7FFFFF)) | np.uint32(0x4B000000)).view(np.float32) - MAGIC


@inlined
def level(ratio: Any, top: Any) -> Any:
    """Returns the level 0..top whose odd number is nearest to a ratio, all float32."""
    return min(max(wrapped(_HALF * (ratio - _ONE)), _ZERO), top)


@inlined
def _pack(error: Any, position: Any) -> Any:
    """Returns a number that sorts by error, then by position: the bits of errors sort as errors, none is negative."""
    return (np.int64(np.float32(error).view(np.uint32)) << 32) | position


@compiled
def _first_least(least: Any) -> int:
    """Returns the position in the smallest packed number."""
    best = least[0]
    for j in range(1, TILE):
        best = min(best, least[j])
    return best & 0xFFFFFFFF


@compiled
def nearest8(levels: Any, first: int, last: int, size: Any, root: Any, at: int, scale: Any, least: Any) -> int:
    """Returns the position of the candidate that fits 8 weights best at a scale.

    Args:
        levels: The codebook's candidates, as float32 odd numbers.
        first: First tile of the list.
        last: End of its tiles.
        size: float32, weights without signs.
        root: float32, square roots of the costs of errors.
        at: Where the weights start in both.
        scale: float32.
        least: int64 [8], scratch.
    """
    x0, x1, x2, x3 = size[at], size[at + 1], size[at + 2], size[at + 3]
    x4, x5, x6, x7 = size[at + 4], size[at + 5], size[at + 6], size[at + 7]
    w0, w1, w2, w3 = root[at], root[at + 1], root[at + 2], root[at + 3]
    w4, w5, w6, w7 = root[at + 4], root[at + 5], root[at + 6], root[at + 7]
    least[:] = np.int64(0x7FFFFFFFFFFFFFFF)
    for tile in range(first, last):
        base = tile * 8 * TILE
        for j in range(TILE):
            e0 = scale * levels[base + j] - x0
            e1 = scale * levels[base + 8 + j] - x1
            e2 = scale * levels[base + 16 + j] - x2
            e3 = scale * levels[base + 24 + j] - x3
            e4 = scale * levels[base + 32 + j] - x4
            e5 = scale * levels[base + 40 + j] - x5
            e6 = scale * levels[base + 48 + j] - x6
            e7 = scale * levels[base + 56 + j] - x7
            error = w0 * e0 * e0 + w1 * e1 * e1 + w2 * e2 * e2 + w3 * e3 * e3
            error = error + w4 * e4 * e4 + w5 * e5 * e5 + w6 * e6 * e6 + w7 * e7 * e7
            least[j] = min(least[j], _pack(error, tile * TILE + j))
    return _first_least(least)


@compiled
def nearest4(levels: Any, first: int, last: int, size: Any, root: Any, at: int, scale: Any, least: Any) -> int:
    """Returns the position of the candidate that fits 4 weights best at a scale; see `nearest8`."""
    x0, x1, x2, x3 = size[at], size[at + 1], size[at + 2], size[at + 3]
    w0, w1, w2, w3 = root[at], root[at + 1], root[at + 2], root[at + 3]
    least[:] = np.int64(0x7FFFFFFFFFFFFFFF)
    for tile in range(first, last):
        base = tile * 4 * TILE
        for j in range(TILE):
            e0 = scale * levels[base + j] - x0
            e1 = scale * levels[base + 8 + j] - x1
            e2 = scale * levels[base + 16 + j] - x2
            e3 = scale * levels[base + 24 + j] - x3
            error = w0 * e0 * e0 + w1 * e1 * e1 + w2 * e2 * e2 + w3 * e3 * e3
            least[j] = min(least[j], _pack(error, tile * TILE + j))
    return _first_least(least)


@compiled
def keys8(size: Any, at: int, inverse: Any, key: Any) -> None:
    """Writes the keys (grids.py) of 8 weights with 3 levels, for each tried inverse scale."""
    x0, x1, x2, x3 = size[at], size[at + 1], size[at + 2], size[at + 3]
    x4, x5, x6, x7 = size[at + 4], size[at + 5], size[at + 6], size[at + 7]
    for part in range(0, LANES, _PART):
        for k in range(part, part + _PART):
            inv = inverse[k]
            low = level(inv * x0, _TOP3) + _THREE * level(inv * x1, _TOP3)
            low += _NINE * level(inv * x2, _TOP3) + _CUBE * level(inv * x3, _TOP3)
            high = level(inv * x4, _TOP3) + _THREE * level(inv * x5, _TOP3)
            high += _NINE * level(inv * x6, _TOP3) + _CUBE * level(inv * x7, _TOP3)
            key[k] = np.int32(low + _FOURTH * high)


@compiled
def keys4(size: Any, at: int, inverse: Any, key: Any) -> None:
    """Writes the keys (grids.py) of 4 weights with 8 levels, for each tried inverse scale."""
    x0, x1, x2, x3 = size[at], size[at + 1], size[at + 2], size[at + 3]
    for part in range(0, LANES, _PART):
        for k in range(part, part + _PART):
            inv = inverse[k]
            low = level(inv * x0, _TOP8) + _EIGHT * level(inv * x1, _TOP8)
            key[k] = np.int32(low + _SQUARE8 * level(inv * x2, _TOP8) + _CUBE8 * level(inv * x3, _TOP8))


@compiled
def sums(weight: Any, size: Any, n: int, q: Any, sx: Any, s2: Any) -> None:
    """Writes sum(weight * size * q) and sum(weight * q * q) over n weights for each tried scale; q is [n * LANES]."""
    sx[:] = 0
    s2[:] = 0
    for i in range(0, n, 4):
        a0, a1, a2, a3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        b0, b1, b2, b3 = a0 * size[i], a1 * size[i + 1], a2 * size[i + 2], a3 * size[i + 3]
        at = i * LANES
        for part in range(0, LANES, _PART):
            for k in range(part, part + _PART):
                q0, q1 = q[at + k], q[at + LANES + k]
                q2, q3 = q[at + 2 * LANES + k], q[at + 3 * LANES + k]
                sx[k] = sx[k] + b0 * q0 + b1 * q1 + b2 * q2 + b3 * q3
                s2[k] = s2[k] + a0 * q0 * q0 + a1 * q1 * q1 + a2 * q2 * q2 + a3 * q3 * q3


@compiled
def nearest_shifted(
    levels: Any, first: int, last: int, x: Any, weight: Any, at: int, scale: Any, shift: Any, least: Any
) -> int:  # fmt: skip
    """Returns the position of the candidate that fits 8 weights best at a scale, for IQ1.

    Args:
        levels: int8, the codebook's candidates: levels minus 1. They stay small: lists are long here.
        first: First tile of the list.
        last: End of its tiles.
        x: float32, weights.
        weight: float32, costs of errors.
        at: Where the weights start in both.
        scale: float32.
        shift: float32, what is added to a level.
        least: int64 [8], scratch.
    """
    x0, x1, x2, x3, x4, x5, x6, x7 = x[at], x[at + 1], x[at + 2], x[at + 3], x[at + 4], x[at + 5], x[at + 6], x[at + 7]
    w0, w1, w2, w3 = weight[at], weight[at + 1], weight[at + 2], weight[at + 3]
    w4, w5, w6, w7 = weight[at + 4], weight[at + 5], weight[at + 6], weight[at + 7]
    least[:] = np.int64(0x7FFFFFFFFFFFFFFF)
    for tile in range(first, last):
        base = tile * 8 * TILE
        for j in range(TILE):
            e0 = scale * (np.float32(levels[base + j]) + shift) - x0
            e1 = scale * (np.float32(levels[base + 8 + j]) + shift) - x1
            e2 = scale * (np.float32(levels[base + 16 + j]) + shift) - x2
            e3 = scale * (np.float32(levels[base + 24 + j]) + shift) - x3
            e4 = scale * (np.float32(levels[base + 32 + j]) + shift) - x4
            e5 = scale * (np.float32(levels[base + 40 + j]) + shift) - x5
            e6 = scale * (np.float32(levels[base + 48 + j]) + shift) - x6
            e7 = scale * (np.float32(levels[base + 56 + j]) + shift) - x7
            error = w0 * e0 * e0 + w1 * e1 * e1 + w2 * e2 * e2 + w3 * e3 * e3
            error = error + w4 * e4 * e4 + w5 * e5 * e5 + w6 * e6 * e6 + w7 * e7 * e7
            least[j] = min(least[j], _pack(error, tile * TILE + j))
    return _first_least(least)
