"""The search for one block's codebook points and scale, for IQ2 and IQ3.

A block of 16 or 32 weights has one scale. Some scales are tried; for each, every 8 (or 4) weights take a codebook
point (grids.py), and the points are judged by the best scale that they could have and the error that it leaves. Then
points are chosen once more at the winner's scale. The tried scales of a block are the SIMD lanes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quantize.kernels.cpu.grids import Codebook
from quantize.kernels.cpu.gridscan import LANES, points4, points8, sums, wrapped
from quantize.kernels.cpu.numeric import compiled

SUPER = 256  # weights that share a float16 scale

_ZERO, _ONE = np.float32(0), np.float32(1)
_TINY = np.float32(1e-15)

# When points are chosen again: for groups whose rounded point was off the codebook; for all if any was; always for all.
OFF_GRID, ANY_OFF_GRID, ALWAYS = 0, 1, 2


class Tables(NamedTuple):
    """A codebook as the loops want it: numbers instead of levels."""

    dim: int  # weights per point
    where: Any  # int32 [keys]
    first: Any  # int32 [lists + 1]
    levels: Any  # int8 [tiles * dim * 8], odd numbers
    names: Any  # uint16 [tiles * 8]
    points: Any  # float32 [points * dim], odd numbers


class Scratch(NamedTuple):
    """Room for one block, allocated once per call."""

    inverse: Any  # float32 [LANES]: tried inverse scales
    scale: Any  # float32 [LANES]: 1 / inverse
    key: Any  # int32 [LANES]
    picked: Any  # int32 [8 * LANES]: index of each group's point; -1 - index if the rounded point was off the codebook
    q: Any  # float32 [32 * LANES]: odd numbers
    sx: Any  # float32 [LANES]
    s2: Any  # float32 [LANES]
    chosen: Any  # int64 [8]: indices of the points that won


def tables(book: Codebook) -> Tables:
    """Returns a codebook as the loops want it."""
    levels = np.int8(2) * book.levels + np.int8(1)
    points = (2 * book.points.astype(np.float32) + 1).ravel()
    return Tables(book.points.shape[1], book.where, book.first, levels, book.names, points)


@compiled
def scratch() -> Scratch:
    """Returns room for one block."""
    return Scratch(
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.int32),
        np.empty(8 * LANES, np.int32),
        np.ones(32 * LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(8, np.int64),
    )


@compiled
def _points(table: Any, size: Any, root: Any, at: int, tried: int, room: Any) -> None:
    """Picks points for the weights from `at` on, one for each scale in `room`."""
    where, first, levels, names, points = table.where, table.first, table.levels, table.names, table.points
    inverse, scale, key, picked, q = room.inverse, room.scale, room.key, room.picked, room.q
    if table.dim == 8:
        points8(where, first, levels, names, points, size, root, at, inverse, scale, tried, key, picked, q)
    else:
        points4(where, first, levels, names, points, size, root, at, inverse, scale, tried, key, picked, q)


@compiled
def _choose_again(table: Any, weight: Any, size: Any, root: Any, n: int, groups: int, scale: Any, room: Any) -> Any:
    """Chooses the points of some groups (a mask) at a scale; returns the best scale for all points of the block."""
    dim = table.dim
    room.inverse[0], room.scale[0] = _ONE / scale, scale
    sx, s2 = _ZERO, _ZERO
    for g in range(n // dim):
        if (groups >> g) & 1:
            _points(table, size, root, g * dim, 1, room)
            point = np.int64(room.picked[g * LANES])
            room.chosen[g] = point if point >= 0 else -1 - point
        for i in range(dim):
            q, cost = table.points[room.chosen[g] * dim + i], weight[g * dim + i]
            sx += cost * size[g * dim + i] * q
            s2 += cost * q * q
    return sx / s2 if s2 > 0 else scale


@compiled
def search(
    table: Any, weight: Any, root: Any, size: Any, n: int, numerators: Any, tried: int, most: Any, start: Any,
    again: int, room: Any,
) -> Any:  # fmt: skip
    """Finds the points of a block, left in `room.chosen`, and its scale.

    Args:
        table: The codebook.
        weight: float32 [n], costs of errors.
        root: float32 [n], their square roots.
        size: float32 [n], weights without signs.
        n: Weights in the block.
        numerators: float32 [LANES], inverse scales to try, in units of 1 / most.
        tried: How many of them.
        most: float32.
        start: float32, the scale if no tried one is better than nothing.
        again: Which groups' points are chosen again at the end.
        room: Scratch.

    Returns:
        The scale, float32. It can be negative.
    """
    for k in range(LANES):
        room.inverse[k] = numerators[k] / most
        room.scale[k] = _ONE / room.inverse[k]
    for at in range(0, n, table.dim):
        _points(table, size, root, at, tried, room)
    sums(weight, size, n, room.q, tried, room.sx, room.s2)
    room.chosen[:] = table.where[0]
    off = -1 if again == ANY_OFF_GRID else 0
    best, scale = _ZERO, start
    for k in range(tried):
        sx, s2 = room.sx[k], room.s2[k]
        if s2 > 0 and sx * sx > best * s2:
            scale = sx / s2
            best = scale * sx
            off = 0
            for g in range(n // table.dim):
                point = np.int64(room.picked[g * LANES + k])
                if point < 0:
                    point = -1 - point
                    off |= 1 << g
                room.chosen[g] = point
    if again == ALWAYS or (again == ANY_OFF_GRID and off != 0):
        off = -1
    if off != 0 and scale > 0:
        scale = _choose_again(table, weight, size, root, n, off, scale, room)
    return scale


@compiled
def mean_square(x: Any, start: int, factor: Any) -> Any:
    """Returns `factor` times the mean square of a super-block, float32."""
    total = _ZERO
    for i in range(start, start + SUPER):
        total += x[i] * x[i]
    return factor * total / np.float32(SUPER)


@compiled
def take_signs(x: Any, start: int, n: int, even: bool, weight: Any, size: Any, signs: Any) -> None:
    """Splits a block into signs and sizes.

    Args:
        x: float32, the row.
        start: Where the block starts.
        n: Its length, a multiple of 8.
        even: Whether each 8 weights may only have an even number of minus signs: then the cheapest weight of a
            group with an odd number changes its sign, and its size becomes negative.
        weight: float32 [n], costs of errors.
        size: float32 [n], is overwritten.
        signs: int64 [n / 8], is overwritten; bit i is the sign of weight i.
    """
    for g in range(n // 8):
        bits, minus = 0, 0
        for i in range(8 * g, 8 * g + 8):
            value = x[start + i]
            negative = not value >= 0
            size[i] = -value if negative else value
            bits |= negative << (i % 8)
            minus += negative
        if even and minus % 2:
            cheapest, least = 8 * g, weight[8 * g] * size[8 * g] * size[8 * g]
            for i in range(8 * g + 1, 8 * g + 8):
                cost = weight[i] * size[i] * size[i]
                if cost < least:
                    cheapest, least = i, cost
            size[cheapest] = -size[cheapest]
            bits ^= 1 << (cheapest % 8)
        signs[g] = bits


@compiled
def positive_scale(x: Any, n: int, top: int, weight: Any) -> Any:
    """Returns the scale, float32, at which levels 0..top fit n <= 32 values that should not be negative.

    llama.cpp keeps a level in a byte, so that of a negative value, -1, is 255 wherever the byte is read again.
    """
    limit, most = np.float32(top), _ZERO
    for i in range(n):
        most = max(most, x[i])
    if most < _TINY:
        return _ZERO
    inverse = limit / most
    scale = _ONE / inverse
    least = _ZERO
    for i in range(n):
        rest = x[i] - scale * np.float32(np.int64(wrapped(inverse * x[i])) & 255)
        least += weight[i] * rest * rest
    for k in range(-4, 5):
        if k == 0:
            continue
        tried = (np.float32(0.1) * np.float32(k) + limit) / most
        scale = _ONE / tried
        error = _ZERO
        for i in range(n):
            rest = x[i] - scale * min(limit, wrapped(tried * x[i]))
            error += weight[i] * rest * rest
        if error < least:
            least, inverse = error, tried
    return _polished(x, n, limit, weight, inverse)


@compiled
def _polished(x: Any, n: int, limit: Any, weight: Any, inverse: Any) -> Any:
    """Returns the scale after changing one level at a time, in up to five rounds, where that helps."""
    levels = np.empty(32, np.int64)
    sx, s2 = _ZERO, _ZERO
    for i in range(n):
        q = min(limit, wrapped(inverse * x[i]))
        levels[i] = np.int64(q) & 255
        sx += weight[i] * x[i] * q
        s2 += weight[i] * q * q
    for _ in range(5):
        changed = False
        for i in range(n):
            q = np.float32(levels[i])
            other_sx, other_s2 = sx - weight[i] * x[i] * q, s2 - weight[i] * q * q
            if other_sx > 0 and other_s2 > 0:
                new = min(limit, wrapped(x[i] * other_s2 / other_sx))
                if new != q:
                    other_sx += weight[i] * x[i] * new
                    other_s2 += weight[i] * new * new
                    if other_sx * other_sx * s2 > sx * sx * other_s2:
                        levels[i] = np.int64(new) & 255
                        sx, s2, changed = other_sx, other_s2, True
        if not changed:
            break
    return sx / s2 if s2 > 0 else _ZERO
