"""The inner loops of the codebook searches.

SIMD lanes (lanes.py) are candidates of a list, or the tried scales of a block. Every lane's own sum keeps llama.cpp's
order. The odd number of a level is 2 * level + 1; searches measure in these, whatever the decoder's values are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu.lanes import (
    WIDTH,
    choose,
    count_up,
    equal,
    less,
    load,
    lowest,
    peek,
    poke,
    splat,
    spread,
    store,
    store_whole,
)
from quantize.kernels.cpu.lanes import level as levels_of
from quantize.kernels.cpu.numeric import MAGIC, compiled

LANES = 32  # room for the tried scales of a block

_ZERO, _HALF, _ONE, _EIGHT = (np.float32(v) for v in (0, 0.5, 1, 8))
_TOP3, _TOP8 = np.float32(2), np.float32(7)
_PLACES3 = tuple(np.float32(3**i) for i in range(8))
_PLACES8 = tuple(np.float32(8**i) for i in range(4))
_HUGE = np.float32(3.4028234663852886e38)
_FAR = np.float32(1e9)


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
def _position(best: Any, tile: Any) -> int:
    """Returns the position of the smallest error, the first of equals: each lane's smallest, and its tile."""
    position = splat(_EIGHT) * tile + count_up()
    return np.int64(lowest(choose(equal(best, splat(lowest(best))), position, splat(_FAR))))


@compiled
def _term(scale: Any, q: Any, x: Any, cost: Any) -> Any:
    """Returns what one weight adds to the errors of eight candidates."""
    rest = scale * q - x
    return cost * rest * rest


@compiled
def nearest8(levels: Any, first: int, last: int, x: Any, cost: Any, at: int, scale: Any, shift: Any) -> int:
    """Returns the position of the candidate that fits 8 weights best at a scale.

    Args:
        levels: int8, the candidates' numbers: a tile has those of the first weight for 8 candidates, then the next's.
        first: First tile of the list.
        last: End of its tiles.
        x: float32, what to fit.
        cost: float32, what an error of each costs.
        at: Where the 8 weights start in both.
        scale: float32.
        shift: float32, added to all numbers.
    """
    s, up = splat(scale), splat(shift)
    x0, x1, x2, x3 = spread(x, at), spread(x, at + 1), spread(x, at + 2), spread(x, at + 3)
    x4, x5, x6, x7 = spread(x, at + 4), spread(x, at + 5), spread(x, at + 6), spread(x, at + 7)
    w0, w1, w2, w3 = spread(cost, at), spread(cost, at + 1), spread(cost, at + 2), spread(cost, at + 3)
    w4, w5, w6, w7 = spread(cost, at + 4), spread(cost, at + 5), spread(cost, at + 6), spread(cost, at + 7)
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
    return _position(best, where)


@compiled
def points8(
    where: Any, first: Any, levels: Any, names: Any, points: Any, x: Any, cost: Any, at: int,
    inverse: Any, scale: Any, tried: int, key: Any, picked: Any, q: Any,
) -> None:  # fmt: skip
    """Picks a point for 8 weights at each tried scale.

    Args:
        where: The codebook's, and so the next four; levels and points as odd numbers.
        first: See above.
        levels: See above.
        names: See above.
        points: See above, [points * 8].
        x: float32, weights without signs.
        cost: float32, square roots of the costs of errors.
        at: Where the weights start in both.
        inverse: float32 [LANES], inverse scales.
        scale: float32 [LANES].
        tried: How many.
        key: int32 [LANES], scratch.
        picked: int32, [at / 8 * LANES] on is overwritten with the points; -1 - point if the rounded weights are off
            the codebook.
        q: float32, [at * LANES] on is overwritten with the points' numbers, [8, LANES].
    """
    x0, x1, x2, x3 = spread(x, at), spread(x, at + 1), spread(x, at + 2), spread(x, at + 3)
    x4, x5, x6, x7 = spread(x, at + 4), spread(x, at + 5), spread(x, at + 6), spread(x, at + 7)
    w0, w1, w2, w3 = spread(cost, at), spread(cost, at + 1), spread(cost, at + 2), spread(cost, at + 3)
    w4, w5, w6, w7 = spread(cost, at + 4), spread(cost, at + 5), spread(cost, at + 6), spread(cost, at + 7)
    top = splat(_TOP3)
    for k in range(0, tried, WIDTH):
        s, total = load(inverse, k), splat(_ZERO)
        for i in range(8):
            total = total + splat(_PLACES3[i]) * levels_of(s * spread(x, at + i), top)
        store_whole(key, k, total)
    to = at // 8 * LANES
    for k in range(tried):
        point = np.int64(peek(where, peek(key, k)))
        poke(picked, to + k, point)
        if point < 0:
            begin, end = np.int64(peek(first, -1 - point)), np.int64(peek(first, -point))
            s, best, tiles = spread(scale, k), splat(_HUGE), splat(np.float32(begin))
            for tile in range(begin, end):
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
                best, tiles = choose(better, error, best), choose(better, splat(np.float32(tile)), tiles)
            point = np.int64(peek(names, _position(best, tiles)))
            poke(picked, to + k, -1 - point)
        for i in range(8):
            poke(q, (at + i) * LANES + k, peek(points, point * 8 + i))


@compiled
def points4(
    where: Any, first: Any, levels: Any, names: Any, points: Any, x: Any, cost: Any, at: int,
    inverse: Any, scale: Any, tried: int, key: Any, picked: Any, q: Any,
) -> None:  # fmt: skip
    """Picks a point for 4 weights at each tried scale; see `points8`."""
    x0, x1, x2, x3 = spread(x, at), spread(x, at + 1), spread(x, at + 2), spread(x, at + 3)
    w0, w1, w2, w3 = spread(cost, at), spread(cost, at + 1), spread(cost, at + 2), spread(cost, at + 3)
    top = splat(_TOP8)
    for k in range(0, tried, WIDTH):
        s, total = load(inverse, k), splat(_ZERO)
        for i in range(4):
            total = total + splat(_PLACES8[i]) * levels_of(s * spread(x, at + i), top)
        store_whole(key, k, total)
    to = at // 4 * LANES
    for k in range(tried):
        point = np.int64(peek(where, peek(key, k)))
        poke(picked, to + k, point)
        if point < 0:
            begin, end = np.int64(peek(first, -1 - point)), np.int64(peek(first, -point))
            s, best, tiles = spread(scale, k), splat(_HUGE), splat(np.float32(begin))
            for tile in range(begin, end):
                base = 32 * tile
                error = _term(s, load(levels, base), x0, w0)
                error = error + _term(s, load(levels, base + 8), x1, w1)
                error = error + _term(s, load(levels, base + 16), x2, w2)
                error = error + _term(s, load(levels, base + 24), x3, w3)
                better = less(error, best)
                best, tiles = choose(better, error, best), choose(better, splat(np.float32(tile)), tiles)
            point = np.int64(peek(names, _position(best, tiles)))
            poke(picked, to + k, -1 - point)
        for i in range(4):
            poke(q, (at + i) * LANES + k, peek(points, point * 4 + i))


@compiled
def sums(weight: Any, size: Any, n: int, q: Any, tried: int, sx: Any, s2: Any) -> None:
    """Writes sum(weight * size * q) and sum(weight * q * q) over n weights for each tried scale; q is [n * LANES]."""
    for k in range(0, tried, WIDTH):
        x, w = splat(_ZERO), splat(_ZERO)
        for i in range(n):
            cost, value = spread(weight, i), load(q, i * LANES + k)
            x = x + cost * spread(size, i) * value
            w = w + cost * value * value
        store(sx, k, x)
        store(s2, k, w)
