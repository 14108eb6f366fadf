"""The search for one block's codebook points and scale, for IQ2 and IQ3.

A block of 16 or 32 weights has one scale. Some scales are tried; for each, every 8 (or 4) weights take a codebook
point (grids.py), and the points are judged by the best scale that they could have and the error that it leaves. Then
points are chosen once more at the winner's scale. The tried scales of a block are the SIMD lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu.gridscan import LANES, points4, points8, sums, wrapped
from quantize.kernels.cpu.lanes import (
    WIDTH,
    bits,
    choose,
    count_up,
    equal,
    highest,
    less,
    load,
    lowest,
    maximum,
    minimum,
    root,
    splat,
    store,
    whole,
)
from quantize.kernels.cpu.loops import compiled

SUPER = 256  # weights that share a float16 scale

# When points are chosen again: for groups whose rounded point was off the codebook; for all if any was; always for all.
OFF_GRID, ANY_OFF_GRID, ALWAYS = 0, 1, 2

_ZERO, _ONE, _SUPER = np.float32(0), np.float32(1), np.float32(SUPER)
_TINY, _TENTH, _FAR = np.float32(1e-15), np.float32(0.1), np.float32(1e9)


@compiled
def mean_square(x: Any, factor: Any) -> Any:
    """Returns `factor` times the mean square of a super-block, float32."""
    total = _ZERO
    for i in range(SUPER):
        total += x[i] * x[i]
    return factor * total / _SUPER


@compiled
def costs(x: Any, n: int, importance: Any, square: Any, weight: Any) -> None:
    """Writes what errors of n weights cost: importance * sqrt(square + x**2)."""
    evened = splat(square)
    for i in range(0, n, WIDTH):
        value = load(x, i)
        store(weight, i, load(importance, i) * root(evened + value * value))


@compiled
def plain_costs(x: Any, n: int, square: Any, weight: Any) -> None:
    """Writes what errors of n weights cost without importance: square + x**2."""
    evened = splat(square)
    for i in range(0, n, WIDTH):
        value = load(x, i)
        store(weight, i, evened + value * value)


@compiled
def take_signs(x: Any, n: int, even: bool, r: Any, signs: Any) -> Any:
    """Splits a block into signs and sizes, and writes the roots of the costs; returns the largest size, float32.

    Args:
        x: float32 [n], the block.
        n: Its length, a multiple of 8.
        even: Whether each 8 weights may only have an even number of minus signs: then the cheapest weight of a
            group with an odd number changes its sign, and its size becomes negative.
        r: Room with `weight`; `size` and `root` are overwritten.
        signs: int64 [n / 8], is overwritten; bit i is the sign of weight i.
    """
    zero, most = splat(_ZERO), splat(np.float32(-np.inf))
    for i in range(0, n, WIDTH):
        value, cost = load(x, i), load(r.weight, i)
        negative = less(value, zero)
        size = choose(negative, zero - value, value)
        minus = bits(negative)
        if even and ((0x6996 >> (minus & 15)) ^ (0x6996 >> (minus >> 4))) & 1:
            price = cost * size * size
            cheapest = choose(equal(price, splat(lowest(price))), count_up(), splat(_FAR))
            first = splat(lowest(cheapest))
            minus ^= 1 << int(lowest(cheapest))
            size = choose(equal(first, count_up()), zero - size, size)
        signs[i // WIDTH] = minus
        store(r.size, i, size)
        store(r.root, i, root(cost))
        most = maximum(size, most)
    return highest(most)


@compiled
def _points(table: Any, r: Any, g: int, tried: int) -> None:
    """Picks points for the g-th group, one for each tried scale."""
    if table.dim == 8:
        points8(table, r, g, tried)
    else:
        points4(table, r, g, tried)


@compiled
def _choose_again(table: Any, r: Any, n: int, groups: int, scale: Any, once: int) -> Any:
    """Chooses the points of some groups (a mask) at a scale; returns the best scale for all points of the block.

    `once` is 1; as a constant it would have everything below compiled a second time.
    """
    dim = table.dim
    r.inverse[0], r.scale[0] = _ONE / scale, scale
    sx, s2 = _ZERO, _ZERO
    for g in range(n // dim):
        if (groups >> g) & 1:
            _points(table, r, g, once)
            point = int(r.picked[LANES * g])
            r.chosen[g] = point if point >= 0 else -1 - point
        for i in range(dim):
            q, cost = table.points[r.chosen[g] * dim + i], r.weight[g * dim + i]
            sx += cost * r.size[g * dim + i] * q
            s2 += cost * q * q
    return sx / s2 if s2 > 0 else scale


@compiled
def search(table: Any, r: Any, n: int, numerators: Any, tried: int, most: Any, start: Any, again: int) -> Any:
    """Finds the points of a block, left in `chosen`, and its scale.

    Args:
        table: The codebook.
        r: Room with the block's weight, root and size.
        n: Weights in the block.
        numerators: float32 [LANES], inverse scales to try, in units of 1 / most.
        tried: How many of them.
        most: float32.
        start: float32, the scale if no tried one is better than nothing.
        again: Which groups' points are chosen again at the end.

    Returns:
        The scale, float32. It can be negative.
    """
    for k in range(0, tried, WIDTH):
        inverse = load(numerators, k) / splat(most)
        store(r.inverse, k, inverse)
        store(r.scale, k, splat(_ONE) / inverse)
    groups = n // table.dim
    for g in range(groups):
        _points(table, r, g, tried)
    sums(r, n, tried)
    winner, best, scale = -1, _ZERO, start
    for k in range(tried):
        sx, s2 = r.sx[k], r.s2[k]
        if s2 > 0 and sx * sx > best * s2:
            scale = sx / s2
            best = scale * sx
            winner = k
    off = -1 if winner < 0 and again == ANY_OFF_GRID else 0
    for g in range(groups):
        point = int(table.where[0]) if winner < 0 else int(r.picked[LANES * g + winner])
        if point < 0:
            point = -1 - point
            off |= 1 << g
        r.chosen[g] = point
    if again == ALWAYS or (again == ANY_OFF_GRID and off != 0):
        off = -1
    if off != 0 and scale > 0:
        scale = _choose_again(table, r, n, off, scale, min(tried, 1))
    return scale


@compiled
def positive_scale(r: Any, n: int, top: int) -> Any:
    """Returns the scale, float32, at which levels 0..top fit the sizes of a block, which should not be negative.

    llama.cpp keeps a level in a byte, so that of a negative value, -1, is 255 wherever the byte is read again.
    """
    x, weight, limit, most = r.size, r.weight, np.float32(top), _ZERO
    for i in range(n):
        most = max(most, x[i])
    if most < _TINY:
        return _ZERO
    inverse = limit / most
    scale = _ONE / inverse
    least = _ZERO
    for i in range(n):
        rest = x[i] - scale * np.float32(int(wrapped(inverse * x[i])) & 255)
        least += weight[i] * rest * rest
    # Eight more inverse scales, limit - 0.4 to limit + 0.4 without the one above, as lanes.
    steps = count_up() - splat(np.float32(4))
    steps = choose(less(steps, splat(_ZERO)), steps, steps + splat(_ONE))
    tried = (splat(_TENTH) * steps + splat(limit)) / splat(most)
    unit, error = splat(_ONE) / tried, splat(_ZERO)
    for i in range(n):
        value = splat(x[i])
        rest = value - unit * minimum(whole(tried * value), splat(limit))
        error = error + splat(weight[i]) * rest * rest
    store(r.inverse, 0, tried)
    store(r.sx, 0, error)
    for k in range(WIDTH):
        if r.sx[k] < least:
            least, inverse = r.sx[k], r.inverse[k]
    return _polished(r, n, limit, inverse)


@compiled
def _polished(r: Any, n: int, limit: Any, inverse: Any) -> Any:
    """Returns the scale after changing one level at a time, in up to five rounds, where that helps."""
    x, weight, levels = r.size, r.weight, r.key
    sx, s2 = _ZERO, _ZERO
    for i in range(n):
        q = min(limit, wrapped(inverse * x[i]))
        levels[i] = int(q) & 255
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
                        levels[i] = int(new) & 255
                        sx, s2, changed = other_sx, other_s2, True
        if not changed:
            break
    return sx / s2 if s2 > 0 else _ZERO
