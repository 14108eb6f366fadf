"""The inner loops of the codebook searches.

SIMD lanes (lanes.py) are candidates of a list, or the tried scales of a block. Every lane's own sum keeps llama.cpp's
order. The odd number of a level is 2 * level + 1; searches measure in these, whatever the decoder's values are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quantize.kernels.cpu.grids import Codebook
from quantize.kernels.cpu.lanes import (
    WIDTH,
    choose,
    count_up,
    equal,
    less,
    load,
    lowest,
    splat,
    store,
    store_whole,
)
from quantize.kernels.cpu.lanes import level as levels_of
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import MAGIC
from quantize.kernels.cpu.raw import raw

LANES = 32  # room for the tried scales of a block

_ZERO, _HALF, _ONE, _EIGHT = (np.float32(v) for v in (0, 0.5, 1, 8))
_TOP3, _TOP8 = np.float32(2), np.float32(7)
_PLACES3 = tuple(np.float32(3**i) for i in range(8))
_PLACES8 = tuple(np.float32(8**i) for i in range(4))
_HUGE, _FAR = np.float32(3.4028234663852886e38), np.float32(1e9)


class Tables(NamedTuple):
    """A codebook (grids.py) as the loops want it: numbers instead of levels; arrays outside, pointers inside."""

    dim: int  # weights per point
    where: Any  # int32 [keys]
    first: Any  # int32 [lists + 1]
    levels: Any  # int8 [tiles * dim * 8]
    names: Any  # uint16 [tiles * 8]
    points: Any  # float32 [points * dim]


class Room(NamedTuple):
    """What a search works on; arrays outside, pointers inside."""

    inverse: Any  # float32 [LANES]: inverse scales to try
    scale: Any  # float32 [LANES]: 1 / inverse
    key: Any  # int32 [LANES]
    picked: Any  # int32 [8 * LANES]: each group's point; -1 - point if the rounded weights are off the codebook
    q: Any  # float32 [32 * LANES]: numbers of the picked points
    sx: Any  # float32 [LANES]
    s2: Any  # float32 [LANES]
    weight: Any  # float32 [32]: costs of errors
    root: Any  # float32 [32]: their square roots
    size: Any  # float32 [32]: weights without signs
    chosen: Any  # int64 [8]: points that won


def tables(book: Codebook, odd: bool) -> Tables:
    """Returns a codebook with odd numbers, or with -1, 0 and 1."""
    levels, points = book.levels, book.points.ravel().astype(np.float32)
    levels, points = (2 * levels + np.int8(1), 2 * points + 1) if odd else (levels - np.int8(1), points - 1)
    return Tables(book.points.shape[1], book.where, book.first, levels.astype(np.int8), book.names, points)


def room() -> Room:
    """Returns room for a search."""
    lanes, block = np.ones((4, LANES), np.float32), np.ones((3, 32), np.float32)
    key, picked = np.zeros(LANES, np.int32), np.zeros(8 * LANES, np.int32)
    q = np.ones(32 * LANES, np.float32)
    chosen = np.zeros(8, np.int64)
    return Room(lanes[0], lanes[1], key, picked, q, lanes[2], lanes[3], block[0], block[1], block[2], chosen)


@compiled
def raw_tables(table: Any) -> Any:
    """Returns tables of pointers for tables of arrays."""
    first, levels, names, points = raw(table.first), raw(table.levels), raw(table.names), raw(table.points)
    return Tables(table.dim, raw(table.where), first, levels, names, points)


@compiled
def raw_room(r: Any) -> Any:
    """Returns a room of pointers for a room of arrays."""
    inverse, scale, key, picked, q = raw(r.inverse), raw(r.scale), raw(r.key), raw(r.picked), raw(r.q)
    weight, root, size, chosen = raw(r.weight), raw(r.root), raw(r.size), raw(r.chosen)
    return Room(inverse, scale, key, picked, q, raw(r.sx), raw(r.s2), weight, root, size, chosen)


@compiled
def wrapped(value: Any) -> Any:
    """Returns the nearest whole number, ties to even, as float32; beyond 2**22 what llama.cpp makes of it.

    Its rounding adds a constant and takes low bits. A weight that nothing depends on can be a million times the
    largest other one, and then those bits count.
    """
    bits = np.float32(value + MAGIC).view(np.uint32)
    return np.uint32((bits & np.uint32(0x7FFFFF)) | np.uint32(0x4B000000)).view(np.float32) - MAGIC


@compiled
def level(ratio: Any, top: Any) -> Any:
    """Returns the level 0..top whose odd number is nearest to a ratio, all float32."""
    return min(max(wrapped(_HALF * (ratio - _ONE)), _ZERO), top)


@compiled
def position(best: Any, tile: Any) -> int:
    """Returns the position of the smallest error, the first of equals: each lane's smallest, and its tile."""
    at = splat(_EIGHT) * tile + count_up()
    return int(lowest(choose(equal(best, splat(lowest(best))), at, splat(_FAR))))


@compiled
def _term(scale: Any, q: Any, x: Any, cost: Any) -> Any:
    """Returns what one weight adds to the errors of eight candidates."""
    rest = scale * q - x
    return cost * rest * rest


@compiled
def nearest8(table: Any, missing: int, x: Any, cost: Any, scale: Any, shift: Any) -> int:
    """Returns the point that fits 8 weights best at a scale.

    Args:
        table: The codebook.
        missing: -1 - the number of the list of candidates.
        x: float32 [8], what to fit.
        cost: float32 [8], what an error of each costs.
        scale: float32.
        shift: float32, added to all numbers.
    """
    first, last = int(table.first[-1 - missing]), int(table.first[-missing])
    levels, s, up = table.levels, splat(scale), splat(shift)
    x0, x1, x2, x3, x4, x5, x6, x7 = _spread8(x)
    w0, w1, w2, w3, w4, w5, w6, w7 = _spread8(cost)
    best, where = splat(_HUGE), splat(np.float32(first))
    for tile in range(first, last):
        base = 64 * tile
        error = _term(s, load(levels, base) + up, x0, w0)
        error = error + _term(s, load(levels, base + 8) + up, x1, w1)
        error = error + _term(s, load(levels, base + 16) + up, x2, w2)
        error = error + _term(s, load(levels, base + 24) + up, x3, w3)
        error = error + _term(s, load(levels, base + 32) + up, x4, w4)
        error = error + _term(s, load(levels, base + 40) + up, x5, w5)
        error = error + _term(s, load(levels, base + 48) + up, x6, w6)
        error = error + _term(s, load(levels, base + 56) + up, x7, w7)
        better = less(error, best)
        best, where = choose(better, error, best), choose(better, splat(np.float32(tile)), where)
    return int(table.names[position(best, where)])


@compiled
def _spread8(x: Any) -> Any:
    """Returns 8 numbers, each in all lanes."""
    low = splat(x[0]), splat(x[1]), splat(x[2]), splat(x[3])
    return *low, splat(x[4]), splat(x[5]), splat(x[6]), splat(x[7])


@compiled
def points8(table: Any, r: Any, g: int, tried: int) -> None:
    """Picks a point for the g-th 8 weights at each tried scale, and writes `picked` and `q`."""
    levels, names, points = table.levels, table.names, table.points
    size, picked, q = r.size + 8 * g, r.picked + LANES * g, r.q + 8 * LANES * g
    top = splat(_TOP3)
    for k in range(0, tried, WIDTH):
        s, total = load(r.inverse, k), splat(_ZERO)
        for i in range(8):
            total = total + splat(_PLACES3[i]) * levels_of(s * splat(size[i]), top)
        store_whole(r.key, k, total)
    x0, x1, x2, x3, x4, x5, x6, x7 = _spread8(size)
    w0, w1, w2, w3, w4, w5, w6, w7 = _spread8(r.root + 8 * g)
    for k in range(tried):
        point = int(table.where[r.key[k]])
        picked[k] = point
        if point < 0:
            first, last = int(table.first[-1 - point]), int(table.first[-point])
            s, best, where = splat(r.scale[k]), splat(_HUGE), splat(np.float32(first))
            for tile in range(first, last):
                base = 64 * tile
                error = _term(s, load(levels, base), x0, w0)
                error = error + _term(s, load(levels, base + 8), x1, w1)
                error = error + _term(s, load(levels, base + 16), x2, w2)
                error = error + _term(s, load(levels, base + 24), x3, w3)
                error = error + _term(s, load(levels, base + 32), x4, w4)
                error = error + _term(s, load(levels, base + 40), x5, w5)
                error = error + _term(s, load(levels, base + 48), x6, w6)
                error = error + _term(s, load(levels, base + 56), x7, w7)
                better = less(error, best)
                best, where = choose(better, error, best), choose(better, splat(np.float32(tile)), where)
            point = int(names[position(best, where)])
            picked[k] = -1 - point
        for i in range(8):
            q[LANES * i + k] = points[8 * point + i]


@compiled
def points4(table: Any, r: Any, g: int, tried: int) -> None:
    """Picks a point for the g-th 4 weights at each tried scale, and writes `picked` and `q`."""
    levels, names, points = table.levels, table.names, table.points
    size, cost = r.size + 4 * g, r.root + 4 * g
    picked, q = r.picked + LANES * g, r.q + 4 * LANES * g
    top = splat(_TOP8)
    for k in range(0, tried, WIDTH):
        s, total = load(r.inverse, k), splat(_ZERO)
        for i in range(4):
            total = total + splat(_PLACES8[i]) * levels_of(s * splat(size[i]), top)
        store_whole(r.key, k, total)
    x0, x1, x2, x3 = splat(size[0]), splat(size[1]), splat(size[2]), splat(size[3])
    w0, w1, w2, w3 = splat(cost[0]), splat(cost[1]), splat(cost[2]), splat(cost[3])
    for k in range(tried):
        point = int(table.where[r.key[k]])
        picked[k] = point
        if point < 0:
            first, last = int(table.first[-1 - point]), int(table.first[-point])
            s, best, where = splat(r.scale[k]), splat(_HUGE), splat(np.float32(first))
            for tile in range(first, last):
                base = 32 * tile
                error = _term(s, load(levels, base), x0, w0)
                error = error + _term(s, load(levels, base + 8), x1, w1)
                error = error + _term(s, load(levels, base + 16), x2, w2)
                error = error + _term(s, load(levels, base + 24), x3, w3)
                better = less(error, best)
                best, where = choose(better, error, best), choose(better, splat(np.float32(tile)), where)
            point = int(names[position(best, where)])
            picked[k] = -1 - point
        for i in range(4):
            q[LANES * i + k] = points[4 * point + i]


@compiled
def sums(r: Any, n: int, tried: int) -> None:
    """Writes sum(weight * size * q) and sum(weight * q * q) over n weights for each tried scale."""
    for k in range(0, tried, WIDTH):
        x, w = splat(_ZERO), splat(_ZERO)
        for i in range(n):
            cost, q = splat(r.weight[i]), load(r.q, LANES * i + k)
            x = x + cost * splat(r.size[i]) * q
            w = w + cost * q * q
        store(r.sx, k, x)
        store(r.s2, k, w)
