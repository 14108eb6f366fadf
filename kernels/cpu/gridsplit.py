"""The best split of a sorted block into low, middle and high weights, for IQ1_S and IQ1_M.

IQ1 has the values -1, 0 and 1, shifted by an eighth up or down, times a scale. For any scale the best levels rise
with the weights, so that a split of the sorted block at two places says it all; sums over each part come from running
sums. Every split and shift is judged by sx**2 / s2, with sx = sum(cost * x * value), s2 = sum(cost * value**2).

llama.cpp goes through them in order, keeping the best with its running rounding errors. Here SIMD code judges all,
and its walk is taken only over those within a ten-thousandth of the best: whatever it kept before is replaced by the
first of these that is clearly better, and none of the others could replace one later. Where numbers are so small or
large that float32 loses that precision, the walk goes over all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quantize.kernels.cpu.lanes import WIDTH, choose, count_up, highest, less, load, maximum, splat, store
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.raw import raw

_WIDTH = 40  # splits of 32 weights, 33, filled up

_ZERO, _ONE, _LOST = np.float32(0), np.float32(1), np.float32(-1)
_CLOSE, _SMALL, _LARGE = np.float32(0.9999), np.float32(1e-30), np.float32(1e30)
_WORST, _ANY = np.float32(-3.4028234663852886e38), np.float32(-np.inf)

# The values of the low, middle and high part, shifted up and down.
_UP, _DOWN = tuple(np.float32(v - 0.875) for v in range(3)), tuple(np.float32(v - 1.125) for v in range(3))

# How the squares of neighbouring values differ: low - middle and middle - high.
_UP1, _UP2, _DOWN1, _DOWN2 = np.float32(0.75), np.float32(-1.25), np.float32(1.25), np.float32(-0.75)


class Split(NamedTuple):
    """A split, its shift and its scale.

    Attributes:
        first: Where the middle part starts; -1 if no split is good.
        second: Where the high part starts.
        shift: IQ1_S: 0 up, 1 down. IQ1_M: 2 * that of the first half + that of the second.
        scale: float32.
    """

    first: int
    second: int
    shift: int
    scale: Any


class Sums(NamedTuple):
    """Running sums over a sorted block, [weights + 1] filled up to 40; arrays outside, pointers inside.

    IQ1_M has sums for each half of the block, where the other half's weights count nothing; IQ1_S has the first only.
    """

    x: Any  # float32 [40]: cost * x
    w: Any  # float32 [40]: cost
    second_x: Any  # float32 [40]
    second_w: Any  # float32 [40]
    scores: Any  # float32 [33 * 4 * 40], scratch: of each split and shift
    tops: Any  # float32 [40], scratch: the best score of each first place
    rank: Any  # float32 [32], scratch


def room() -> Sums:
    """Returns room for the sums of a block."""
    rows = np.zeros((4, _WIDTH), np.float32)
    scores, tops, rank = (np.zeros(size, np.float32) for size in (33 * 4 * _WIDTH, _WIDTH, 32))
    return Sums(rows[0], rows[1], rows[2], rows[3], scores, tops, rank)


@compiled
def raw_sums(s: Any) -> Any:
    """Returns pointers for arrays."""
    return Sums(raw(s.x), raw(s.w), raw(s.second_x), raw(s.second_w), raw(s.scores), raw(s.tops), raw(s.rank))


@compiled
def sort(x: Any, n: int, sums: Any, order: Any) -> None:
    """Writes which of n weights comes when, the smallest first and equal ones in their order.

    Counting smaller ones takes more comparisons than sorting, but eight at a time.
    """
    one, zero = splat(_ONE), splat(_ZERO)
    for i in range(0, n, WIDTH):
        value, place, rank = load(x, i), count_up() + splat(np.float32(i)), zero
        for j in range(n):
            other = splat(x[j])
            # Equal ones before this one count as smaller: those are not greater.
            smaller = choose(less(other, value), one, zero)
            not_greater = choose(less(value, other), zero, one)
            rank = rank + choose(less(splat(np.float32(j)), place), not_greater, smaller)
        store(sums.rank, i, rank)
    for i in range(n):
        order[int(sums.rank[i])] = i


@compiled
def add_up(x: Any, n: int, weight: Any, order: Any, halves: bool, sums: Any) -> None:
    """Fills the running sums."""
    half = n // 2 if halves else n
    sx, sw, second_x, second_w = _ZERO, _ZERO, _ZERO, _ZERO
    for j in range(n):
        i = order[j]
        cost = weight[i]
        # Chosen, not branched: which half comes next is a coin toss.
        first = i < half
        sx, second_x = sx + cost * x[i] if first else sx, second_x if first else second_x + cost * x[i]
        sw, second_w = sw + cost if first else sw, second_w if first else second_w + cost
        sums.x[j + 1], sums.w[j + 1] = sx, sw
        sums.second_x[j + 1], sums.second_w[j + 1] = second_x, second_w


@compiled
def _score(sx: Any, s2: Any) -> Any:
    return choose(less(splat(_ZERO), s2), sx * sx / s2, splat(_LOST))


@compiled
def _one_shift(x1: Any, x2: Any, x3: Any, w1: Any, w2: Any, w3: Any, low: Any, middle: Any, high: Any) -> Any:
    """Returns sx and s2 of a split: cost * x and cost of its three parts, and their values."""
    sx = x1 * low + x2 * middle + x3 * high
    s2 = w1 * low * low + w2 * middle * middle + w3 * high * high
    return sx, s2


@compiled
def _judge_one(n: int, sums: Any) -> Any:
    """Writes the scores of all splits with either shift, [n + 1, 2, 40]; returns the largest, float32."""
    end, best = splat(np.float32(n + 1)), splat(_LOST)
    tx, tw = splat(sums.x[n]), splat(sums.w[n])
    for i in range(n + 1):
        xi, wi, row = splat(sums.x[i]), splat(sums.w[i]), sums.scores + 2 * _WIDTH * i
        before, top = splat(np.float32(i - 1)), splat(_LOST)
        for j in range(i // WIDTH * WIDTH, n + 1, WIDTH):
            xj, wj, place = load(sums.x, j), load(sums.w, j), count_up() + splat(np.float32(j))
            x2, x3, w2, w3 = xj - xi, tx - xj, wj - wi, tw - wj
            sx, s2 = _one_shift(xi, x2, x3, wi, w2, w3, splat(_UP[0]), splat(_UP[1]), splat(_UP[2]))
            up = _score(sx, s2)
            sx, s2 = _one_shift(xi, x2, x3, wi, w2, w3, splat(_DOWN[0]), splat(_DOWN[1]), splat(_DOWN[2]))
            down = _score(sx, s2)
            store(row, j, up)
            store(row, _WIDTH + j, down)
            valid = choose(less(before, place), maximum(up, down), splat(_LOST))
            top = maximum(choose(less(place, end), valid, splat(_LOST)), top)
        sums.tops[i] = highest(top)
        best = maximum(top, best)
    return highest(best)


@compiled
def split_one(n: int, sums: Any) -> Any:
    """Returns the best split of a block with one shift."""
    best = _judge_one(n, sums)
    tx, tw = sums.x[n], sums.w[n]
    limit = best * _CLOSE if _SMALL < best * tw < _LARGE else _ANY
    score, first, second, shift, scale = _WORST, -1, -1, 0, _ZERO
    for i in range(n + 1):
        if sums.tops[i] < limit:
            continue
        xi, wi, row = sums.x[i], sums.w[i], sums.scores + 2 * _WIDTH * i
        for j in range(i, n + 1):
            for s in range(2):
                if row[_WIDTH * s + j] < limit:
                    continue
                low, middle, high = _UP if s == 0 else _DOWN
                xj, wj = sums.x[j], sums.w[j]
                sx, s2 = _one_shift(xi, xj - xi, tx - xj, wi, wj - wi, tw - wj, low, middle, high)
                if s2 > 0 and sx * sx > score * s2:
                    scale = sx / s2
                    score = scale * sx
                    first, second, shift = i, j, s
    return Split(first, second, shift, scale)


@compiled
def _judge_two(n: int, sums: Any) -> Any:
    """Writes the scores of all splits with four pairs of shifts, [n + 1, 4, 40]; returns the largest, float32."""
    end, best = splat(np.float32(n + 1)), splat(_LOST)
    high_up, high_down = splat(_UP[2]), splat(_DOWN[2])
    up1, up2, down1, down2 = splat(_UP1), splat(_UP2), splat(_DOWN1), splat(_DOWN2)
    tx, tw, ux, uw = splat(sums.x[n]), splat(sums.w[n]), splat(sums.second_x[n]), splat(sums.second_w[n])
    tx_up, tx_down, ux_up, ux_down = tx * high_up, tx * high_down, ux * high_up, ux * high_down
    tw_up, tw_down = tw * high_up * high_up, tw * high_down * high_down
    uw_up, uw_down = uw * high_up * high_up, uw * high_down * high_down
    for i in range(n + 1):
        xi, yi, row = splat(sums.x[i]), splat(sums.second_x[i]), sums.scores + 4 * _WIDTH * i
        wi, vi = splat(sums.w[i]), splat(sums.second_w[i])
        first_up, first_down, second_up, second_down = (
            tw_up + wi * up1, tw_down + wi * down1, uw_up + vi * up1, uw_down + vi * down1,
        )  # fmt: skip
        before, top = splat(np.float32(i - 1)), splat(_LOST)
        for j in range(i // WIDTH * WIDTH, n + 1, WIDTH):
            place = count_up() + splat(np.float32(j))
            x, y, w, v = xi + load(sums.x, j), yi + load(sums.second_x, j), load(sums.w, j), load(sums.second_w, j)
            wu, wd, vu, vd = first_up + w * up2, first_down + w * down2, second_up + v * up2, second_down + v * down2
            both_up = _score((tx_up - x) + (ux_up - y), wu + vu)
            up_down = _score((tx_up - x) + (ux_down - y), wu + vd)
            down_up = _score((tx_down - x) + (ux_up - y), wd + vu)
            both_down = _score((tx_down - x) + (ux_down - y), wd + vd)
            store(row, j, both_up)
            store(row, _WIDTH + j, up_down)
            store(row, 2 * _WIDTH + j, down_up)
            store(row, 3 * _WIDTH + j, both_down)
            valid = maximum(maximum(both_up, up_down), maximum(down_up, both_down))
            valid = choose(less(before, place), valid, splat(_LOST))
            top = maximum(choose(less(place, end), valid, splat(_LOST)), top)
        sums.tops[i] = highest(top)
        best = maximum(top, best)
    return highest(best)


@compiled
def _half(x: Any, w: Any, n: int, i: int, j: int, down: bool) -> Any:
    """Returns sx and s2 of one half of a block for a split."""
    both = x[i] + x[j]
    if down:
        return x[n] * _DOWN[2] - both, w[n] * _DOWN[2] * _DOWN[2] + w[i] * _DOWN1 + w[j] * _DOWN2
    return x[n] * _UP[2] - both, w[n] * _UP[2] * _UP[2] + w[i] * _UP1 + w[j] * _UP2


@compiled
def split_two(n: int, sums: Any) -> Any:
    """Returns the best split of a block whose halves have a shift each."""
    best = _judge_two(n, sums)
    limit = best * _CLOSE if _SMALL < best * (sums.w[n] + sums.second_w[n]) < _LARGE else _ANY
    score, first, second, shift, scale = _WORST, -1, -1, 0, _ZERO
    for i in range(n + 1):
        if sums.tops[i] < limit:
            continue
        row = sums.scores + 4 * _WIDTH * i
        for j in range(i, n + 1):
            for s in range(4):
                if row[_WIDTH * s + j] < limit:
                    continue
                sx, s2 = _half(sums.x, sums.w, n, i, j, s >= 2)
                second_sx, second_s2 = _half(sums.second_x, sums.second_w, n, i, j, s % 2 == 1)
                sx, s2 = sx + second_sx, s2 + second_s2
                if s2 > 0 and sx * sx > score * s2:
                    scale = sx / s2
                    score = scale * sx
                    first, second, shift = i, j, s
    return Split(first, second, shift, scale)
