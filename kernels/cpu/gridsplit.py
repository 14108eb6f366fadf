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

from quantize.kernels.cpu.numeric import compiled, inlined

_PART = 8
_WIDTH = 40  # splits of 32 weights, 33, filled up

_ZERO, _LOST = np.float32(0), np.float32(-1)
_CLOSE, _SMALL, _LARGE = np.float32(0.9999), np.float32(1e-30), np.float32(1e30)
_WORST = np.float32(-3.4028234663852886e38)

_LOW_UP, _MIDDLE_UP, _HIGH_UP = np.float32(-0.875), np.float32(0.125), np.float32(1.125)
_LOW_DOWN, _MIDDLE_DOWN, _HIGH_DOWN = np.float32(-1.125), np.float32(-0.125), np.float32(0.875)

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
    """Running sums over a sorted block, [weights + 1] filled up to 40; for IQ1_M one row for each half.

    Rows of the halves count only the weights of that half. IQ1_S has the first row only.
    """

    x: Any  # float32 [2, 40]: cost * x
    w: Any  # float32 [2, 40]: cost
    scores: Any  # float32 [33 * 4 * 40], scratch: of each split and shift
    tops: Any  # float32 [33], scratch: the best score of each first place
    lanes: Any  # float32 [8], scratch


@compiled
def room() -> Sums:
    """Returns room for the sums of a block."""
    return Sums(
        np.zeros((2, _WIDTH), np.float32),
        np.zeros((2, _WIDTH), np.float32),
        np.empty(33 * 4 * _WIDTH, np.float32),
        np.empty(33, np.float32),
        np.empty(_PART, np.float32),
    )


@compiled
def sort(x: Any, start: int, n: int, rank: Any, order: Any) -> None:
    """Writes which of n weights comes when, the smallest first and equal ones in their order.

    `rank` is int32 [32], scratch. Counting smaller ones takes more comparisons than sorting, but eight at a time.
    """
    rank[:] = 0
    for j in range(n):
        value = x[start + j]
        for i in range(n):
            other = x[start + i]
            rank[i] += np.int32(value < other) + np.int32((value == other) & (j < i))
    for i in range(n):
        order[rank[i]] = i


@compiled
def add_up(x: Any, start: int, n: int, weight: Any, order: Any, halves: bool, sums: Any) -> None:
    """Fills the running sums."""
    for half in range(2 if halves else 1):
        sx, sw = _ZERO, _ZERO
        for j in range(n):
            i = order[j]
            if not halves or (i >= n // 2) == (half == 1):
                sx += weight[i] * x[start + i]
                sw += weight[i]
            sums.x[half, j + 1], sums.w[half, j + 1] = sx, sw


@inlined
def _score(sx: Any, s2: Any) -> Any:
    return sx * sx / s2 if s2 > _ZERO else _LOST


@inlined
def _one_shift(x1: Any, x2: Any, x3: Any, w1: Any, w2: Any, w3: Any, low: Any, middle: Any, high: Any) -> Any:
    """Returns sx and s2 of a split: cost * x and cost of its three parts, and their values."""
    sx = x1 * low + x2 * middle + x3 * high
    s2 = w1 * low * low + w2 * middle * middle + w3 * high * high
    return sx, s2


@inlined
def _half_shifts(tx: Any, tw: Any, x1: Any, x2: Any, w1: Any, w2: Any) -> Any:
    """Returns sx up, sx down, s2 up, s2 down of one half, from its totals and running sums at the two places."""
    both = x1 + x2
    up = tw * _HIGH_UP * _HIGH_UP + w1 * _UP1 + w2 * _UP2
    down = tw * _HIGH_DOWN * _HIGH_DOWN + w1 * _DOWN1 + w2 * _DOWN2
    return tx * _HIGH_UP - both, tx * _HIGH_DOWN - both, up, down


@compiled
def _highest(values: Any, n: int) -> Any:
    """Returns the largest of the first n numbers, float32."""
    best = values[0]
    for i in range(1, n):
        best = max(best, values[i])
    return best


@compiled
def _judge_one(n: int, sums: Any) -> Any:
    """Writes the scores of all splits with either shift, [n + 1, 2, 40]; returns the largest, float32."""
    x, w, scores, lanes = sums.x, sums.w, sums.scores, sums.lanes
    tx, tw = x[0, n], w[0, n]
    for i in range(n + 1):
        xi, wi = x[0, i], w[0, i]
        at = 2 * _WIDTH * i
        lanes[:] = _LOST
        for part in range(i // _PART * _PART, n + 1, _PART):
            for j in range(part, part + _PART):
                x2, x3, w2, w3 = x[0, j] - xi, tx - x[0, j], w[0, j] - wi, tw - w[0, j]
                sx, s2 = _one_shift(xi, x2, x3, wi, w2, w3, _LOW_UP, _MIDDLE_UP, _HIGH_UP)
                up = _score(sx, s2)
                sx, s2 = _one_shift(xi, x2, x3, wi, w2, w3, _LOW_DOWN, _MIDDLE_DOWN, _HIGH_DOWN)
                down = _score(sx, s2)
                scores[at + j], scores[at + _WIDTH + j] = up, down
                lanes[j - part] = max(lanes[j - part], max(up, down) if i <= j <= n else _LOST)
        sums.tops[i] = _highest(lanes, _PART)
    return _highest(sums.tops, n + 1)


@compiled
def split_one(n: int, sums: Any) -> Any:
    """Returns the best split of a block with one shift."""
    best = _judge_one(n, sums)
    size = best * sums.w[0, n]
    limit = best * _CLOSE if _SMALL < size < _LARGE else -np.float32(np.inf)
    tx, tw = sums.x[0, n], sums.w[0, n]
    score, found = _WORST, Split(-1, -1, 0, _ZERO)
    for i in range(n + 1):
        if sums.tops[i] < limit:
            continue
        xi, wi = sums.x[0, i], sums.w[0, i]
        for j in range(i, n + 1):
            for shift in range(2):
                if sums.scores[(2 * i + shift) * _WIDTH + j] < limit:
                    continue
                xj, wj = sums.x[0, j], sums.w[0, j]
                if shift == 0:
                    sx, s2 = _one_shift(xi, xj - xi, tx - xj, wi, wj - wi, tw - wj, _LOW_UP, _MIDDLE_UP, _HIGH_UP)
                else:
                    sx, s2 = _one_shift(
                        xi, xj - xi, tx - xj, wi, wj - wi, tw - wj, _LOW_DOWN, _MIDDLE_DOWN, _HIGH_DOWN
                    )  # fmt: skip
                if s2 > 0 and sx * sx > score * s2:
                    scale = sx / s2
                    score = scale * sx
                    found = Split(i, j, shift, scale)
    return found


@compiled
def _judge_two(n: int, sums: Any) -> Any:
    """Writes the scores of all splits with four pairs of shifts, [n + 1, 4, 40]; returns the largest, float32."""
    x, w, scores, lanes = sums.x, sums.w, sums.scores, sums.lanes
    tx, tw, ux, uw = x[0, n], w[0, n], x[1, n], w[1, n]
    for i in range(n + 1):
        xi, wi, yi, vi = x[0, i], w[0, i], x[1, i], w[1, i]
        at = 4 * _WIDTH * i
        lanes[:] = _LOST
        for part in range(i // _PART * _PART, n + 1, _PART):
            for j in range(part, part + _PART):
                up, down, up2, down2 = _half_shifts(tx, tw, xi, x[0, j], wi, w[0, j])
                second_up, second_down, second_up2, second_down2 = _half_shifts(ux, uw, yi, x[1, j], vi, w[1, j])
                both_up = _score(up + second_up, up2 + second_up2)
                up_down = _score(up + second_down, up2 + second_down2)
                down_up = _score(down + second_up, down2 + second_up2)
                both_down = _score(down + second_down, down2 + second_down2)
                scores[at + j], scores[at + _WIDTH + j] = both_up, up_down
                scores[at + 2 * _WIDTH + j], scores[at + 3 * _WIDTH + j] = down_up, both_down
                best = max(max(both_up, up_down), max(down_up, both_down))
                lanes[j - part] = max(lanes[j - part], best if i <= j <= n else _LOST)
        sums.tops[i] = _highest(lanes, _PART)
    return _highest(sums.tops, n + 1)


@compiled
def split_two(n: int, sums: Any) -> Any:
    """Returns the best split of a block whose halves have a shift each."""
    x, w = sums.x, sums.w
    best = _judge_two(n, sums)
    size = best * (w[0, n] + w[1, n])
    limit = best * _CLOSE if _SMALL < size < _LARGE else -np.float32(np.inf)
    score, found = _WORST, Split(-1, -1, 0, _ZERO)
    for i in range(n + 1):
        if sums.tops[i] < limit:
            continue
        for j in range(i, n + 1):
            for shift in range(4):
                if sums.scores[(4 * i + shift) * _WIDTH + j] < limit:
                    continue
                up, down, up2, down2 = _half_shifts(x[0, n], w[0, n], x[0, i], x[0, j], w[0, i], w[0, j])
                sx, s2 = (up, up2) if shift < 2 else (down, down2)
                up, down, up2, down2 = _half_shifts(x[1, n], w[1, n], x[1, i], x[1, j], w[1, i], w[1, j])
                if shift % 2 == 0:
                    sx, s2 = sx + up, s2 + up2
                else:
                    sx, s2 = sx + down, s2 + down2
                if s2 > 0 and sx * sx > score * s2:
                    scale = sx / s2
                    score = scale * sx
                    found = Split(i, j, shift, scale)
    return found
