"""The searches for a block's scale and offset, on 64 blocks at once.

A tile holds 64 blocks, one per lane, transposed: value i of lane k stands at `64 * i + k`, so that the innermost loop
runs over lanes and becomes vector instructions while each lane adds its values in llama.cpp's order. Tiles are flat
float32 arrays, and everything else that belongs to a lane is a row of one array (`state`), at offsets that are known
when the loop is compiled: with more arrays the compiler would have to prove too many of them apart and would give up.
For the same reason loops over lanes index slices: there it sees that indices are not negative.

Four values are done in one pass over the lanes, which saves most of the traffic to the sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu.lean import lean, pick
from quantize.kernels.cpu.numeric import MAGIC

LANES = 64
LONGEST = 32  # values in a block at most
TILE = LANES * LONGEST

# Rows of `state`. First what an accepted candidate changes, then as many rows for what that will be.
SCALE = 0
INVERSE = 1 * LANES  # levels are those of (x - BASE) * INVERSE
_BEST = 2 * LANES
LOW = 3 * LANES  # the value that level 0 stands for
BASE = 4 * LANES
_NEXT = 5 * LANES
WEIGHT = 10 * LANES  # sum of the weights
_SUM_X = 11 * LANES
_HIGH = 12 * LANES
_FLOOR = 13 * LANES
_TRY = 14 * LANES  # the candidate's INVERSE
_TRY_SCALE = 15 * LANES
_TRY_LOW = 16 * LANES
_ERROR = 17 * LANES
_L = 18 * LANES
_LL = 19 * LANES
_XL = 20 * LANES
STATE = 21 * LANES

TINY = np.float32(1e-15)  # a block below it is zero
_ZERO, _ONE = np.float32(0), np.float32(1)
_TENTH = np.float32(0.1)
_ALMOST_HALF = np.float32(0.4999)


def workspace() -> tuple[Any, ...]:
    """Returns float32 arrays to work in: five tiles, a `state` with room for two, and a row for variances."""
    tiles = [np.zeros(TILE, np.float32) for _ in range(5)]
    return (*tiles, np.zeros(2 * STATE, np.float32), np.zeros(LANES, np.float32))


@lean
def nearest(value: Any) -> Any:
    """Returns a float32 rounded to a whole number, ties to even.

    Beyond 2**22 it gives what llama.cpp's rounding gives: the low bits, NaN and Inf included.
    """
    bits = np.float32(value + MAGIC).view(np.int32)
    return np.int32((bits & 0x7FFFFF) | 0x4B000000).view(np.float32) - MAGIC


@lean
def level(value: Any, low: Any, high: Any) -> Any:
    """Returns `nearest(value)` within `low` and `high`."""
    whole = nearest(value)
    whole = pick(whole > low, whole, low)
    return pick(whole < high, whole, high)


@lean
def _near_level(value: Any, low: Any, high: Any) -> Any:
    """Does what `level` does for values below 2**22."""
    whole = (value + MAGIC) - MAGIC
    whole = pick(whole > low, whole, low)
    return pick(whole < high, whole, high)


@lean
def load(source: Any, start: int, count: int, length: int, period: int, tile: Any) -> None:
    """Fills a tile with `count` blocks of `length` values from `source[start % period]` on; other lanes become 0.

    Args:
        source: float32, flat.
        start: Index of the first value, before wrapping.
        count: Blocks, at most 64.
        length: Values in a block.
        period: Values after which `source` starts again: its size, or the row length for importance.
        tile: float32 [64 * length] or longer; overwritten.
    """
    for lane in range(count):
        first = (start + lane * length) % period
        block = source[first : first + length]
        for i in range(length):
            tile[i * LANES + lane] = block[i]
    for lane in range(count, LANES):
        for i in range(length):
            tile[i * LANES + lane] = _ZERO


@lean
def weigh_square(x: Any, length: int, w: Any) -> None:
    """Weights x**2."""
    for i in range(length * LANES):
        w[i] = x[i] * x[i]


@lean
def weigh_size(x: Any, length: int, w: Any) -> None:
    """Weights |x|."""
    for i in range(length * LANES):
        w[i] = abs(x[i])


@lean
def weigh_spread(x: Any, length: int, w: Any, state: Any) -> None:
    """Weights |x| plus the root mean square of the block."""
    for k in range(LANES):
        state[k] = _ZERO
    for i in range(0, length * LANES, LANES):
        v = x[i : i + LANES]
        for k in range(LANES):
            state[k] += v[k] * v[k]
    for k in range(LANES):
        state[k] = np.sqrt(state[k] / np.float32(length))
    for i in range(0, length * LANES, LANES):
        v, weight = x[i : i + LANES], w[i : i + LANES]
        for k in range(LANES):
            weight[k] = state[k] + abs(v[k])


@lean
def weigh_importance(x: Any, length: int, w: Any, variance: Any) -> None:
    """Weights importance * sqrt(variance + x**2).

    Args:
        x: The tile.
        length: Values in a block.
        w: The importance of each value; overwritten with the weights.
        variance: float32 [64], one for each lane.
    """
    for i in range(0, length * LANES, LANES):
        v, weight = x[i : i + LANES], w[i : i + LANES]
        for k in range(LANES):
            weight[k] = weight[k] * np.sqrt(variance[k] + v[k] * v[k])


@lean
def sum_weights(w: Any, length: int, state: Any) -> None:
    """Sets WEIGHT to the sum of each lane's weights."""
    for k in range(LANES):
        state[WEIGHT + k] = _ZERO
    for i in range(0, length * LANES, LANES):
        weight = w[i : i + LANES]
        for k in range(LANES):
            state[WEIGHT + k] += weight[k]


# ---------------------------------------------------------------------------------------------------------------------
# Scale and offset: x ~ scale * level + low, level 0 .. top, low <= 0.


@lean
def search_offset(
    x: Any, w: Any, levels: Any, length: int, top: Any, first: Any, step: Any, steps: int, absolute: bool, state: Any
) -> None:
    """Finds scale and offset of each lane by weighted least squares over a row of candidate scales.

    Args:
        x: Tile of values.
        w: Tile of weights.
        levels: Tile to work in.
        length: Values in a block, a multiple of 4.
        top: Highest level, float32.
        first: Candidate t rounds with top + first + step * t levels for the range.
        step: See `first`.
        steps: The last t.
        absolute: Whether the error is the sum of w * |e| instead of w * e**2.
        state: SCALE, LOW, INVERSE, BASE and WEIGHT are set.
    """
    _span(x, w, length, top, state)
    _set_levels(x, w, levels, length, top, state)
    _errors(x, w, levels, length, absolute, state)
    for k in range(LANES):
        state[_BEST + k] = state[_ERROR + k]
    for t in range(steps + 1):
        bins = (first + step * np.float32(t)) + top
        for k in range(LANES):
            state[_TRY + k] = bins / (state[_HIGH + k] - state[LOW + k])
        _set_levels(x, w, levels, length, top, state)
        _fit(state)
        _errors(x, w, levels, length, absolute, state)
        _accept_offset(state)
    for k in range(LANES):
        if state[_HIGH + k] <= state[_FLOOR + k]:
            state[SCALE + k] = state[INVERSE + k] = _ZERO
            state[LOW + k] = state[BASE + k] = state[_FLOOR + k]


@lean
def _span(x: Any, w: Any, length: int, top: Any, state: Any) -> None:
    for k in range(LANES):
        state[_FLOOR + k] = state[_HIGH + k] = x[k]
        state[WEIGHT + k] = w[k]
        state[_SUM_X + k] = w[k] * x[k]
    for i in range(LANES, length * LANES, LANES):
        values, weights = x[i : i + LANES], w[i : i + LANES]
        for k in range(LANES):
            v, low, high = values[k], state[_FLOOR + k], state[_HIGH + k]
            state[_FLOOR + k] = pick(v < low, v, low)
            state[_HIGH + k] = pick(v > high, v, high)
            state[WEIGHT + k] += weights[k]
            state[_SUM_X + k] += weights[k] * v
    for k in range(LANES):
        low = state[_FLOOR + k]
        low = pick(low > _ZERO, _ZERO, low)
        inverse = top / (state[_HIGH + k] - low)
        state[_FLOOR + k] = state[LOW + k] = state[BASE + k] = state[_TRY_LOW + k] = low
        state[_TRY + k] = state[INVERSE + k] = inverse
        state[SCALE + k] = state[_TRY_SCALE + k] = _ONE / inverse


@lean
def _set_levels(x: Any, w: Any, levels: Any, length: int, top: Any, state: Any) -> None:
    for k in range(LANES):
        state[_L + k] = state[_LL + k] = state[_XL + k] = _ZERO
    for i in range(0, length * LANES, 4 * LANES):
        values, weights, found = x[i : i + 4 * LANES], w[i : i + 4 * LANES], levels[i : i + 4 * LANES]
        for k in range(LANES):
            inverse, low = state[_TRY + k], state[LOW + k]
            a, b, c = state[_L + k], state[_LL + k], state[_XL + k]
            for j in range(0, 4 * LANES, LANES):
                v = values[j + k]
                q = level(inverse * (v - low), _ZERO, top)
                found[j + k] = q
                wq = weights[j + k] * q
                a += wq
                b += wq * q
                c += wq * v
            state[_L + k], state[_LL + k], state[_XL + k] = a, b, c


@lean
def _fit(state: Any) -> None:
    for k in range(LANES):
        sw, sx, sl, sll, sxl = (state[WEIGHT + k], state[_SUM_X + k], state[_L + k], state[_LL + k], state[_XL + k])
        d = sw * sll - sl * sl
        scale = (sw * sxl - sx * sl) / d
        low = (sll * sx - sl * sxl) / d
        above = low > _ZERO
        state[_TRY_SCALE + k] = pick(above, sxl / sll, scale)
        state[_TRY_LOW + k] = pick(above, _ZERO, low)
        state[_L + k] = d


@lean
def _errors(x: Any, w: Any, levels: Any, length: int, absolute: bool, state: Any) -> None:
    for k in range(LANES):
        state[_ERROR + k] = _ZERO
    for i in range(0, length * LANES, 4 * LANES):
        values, weights, found = x[i : i + 4 * LANES], w[i : i + 4 * LANES], levels[i : i + 4 * LANES]
        if absolute:
            for k in range(LANES):
                scale, low, error = state[_TRY_SCALE + k], state[_TRY_LOW + k], state[_ERROR + k]
                for j in range(0, 4 * LANES, LANES):
                    e = scale * found[j + k] + low - values[j + k]
                    error += weights[j + k] * abs(e)
                state[_ERROR + k] = error
        else:
            for k in range(LANES):
                scale, low, error = state[_TRY_SCALE + k], state[_TRY_LOW + k], state[_ERROR + k]
                for j in range(0, 4 * LANES, LANES):
                    e = scale * found[j + k] + low - values[j + k]
                    error += weights[j + k] * (e * e)
                state[_ERROR + k] = error


@lean
def _accept_offset(state: Any) -> None:
    for k in range(LANES):
        better = (state[_L + k] > _ZERO) & (state[_ERROR + k] < state[_BEST + k])
        state[_NEXT + SCALE + k] = pick(better, state[_TRY_SCALE + k], state[SCALE + k])
        state[_NEXT + INVERSE + k] = pick(better, state[_TRY + k], state[INVERSE + k])
        state[_NEXT + _BEST + k] = pick(better, state[_ERROR + k], state[_BEST + k])
        state[_NEXT + LOW + k] = pick(better, state[_TRY_LOW + k], state[LOW + k])
        state[_NEXT + BASE + k] = pick(better, state[LOW + k], state[BASE + k])  # that of this candidate's levels
    for k in range(5 * LANES):
        state[k] = state[_NEXT + k]


# ---------------------------------------------------------------------------------------------------------------------
# Scale alone: x ~ scale * level, level -top .. top - 1.


@lean
def search_signed(x: Any, w: Any, wx: Any, length: int, top: Any, state: Any) -> None:
    """Finds each lane's scale by weighted least squares over 19 candidates.

    Args:
        x: Tile of values.
        w: Tile of weights.
        wx: Tile to work in.
        length: Values in a block, a multiple of 4.
        top: Levels on one side, float32.
        state: SCALE and INVERSE are set: levels are those of x * INVERSE; 0 for a block of zeros.
    """
    find_largest(x, length, state[_HIGH : _HIGH + LANES])
    for i in range(length * LANES):
        wx[i] = w[i] * x[i]
    for k in range(LANES):
        state[_TRY + k] = -top / state[_HIGH + k]
    _signed_sums(x, w, wx, length, top, state)
    for k in range(LANES):
        sxl, sll = state[_XL + k], state[_LL + k]
        scale = pick(sll != _ZERO, sxl / sll, _ZERO)
        state[SCALE + k], state[_BEST + k], state[INVERSE + k] = scale, scale * sxl, state[_TRY + k]
    for t in range(-9, 10):
        if t != 0:
            bins = -(top + _TENTH * np.float32(t))
            for k in range(LANES):
                state[_TRY + k] = bins / state[_HIGH + k]
            _signed_sums(x, w, wx, length, top, state)
            _accept_signed(state)
    for k in range(LANES):
        if abs(state[_HIGH + k]) < TINY:
            state[SCALE + k] = state[INVERSE + k] = _ZERO


@lean
def find_largest(x: Any, length: int, largest: Any) -> None:
    """Sets `largest` (float32 [64]) to each lane's value of largest size, the first of several."""
    for k in range(LANES):
        largest[k] = _ZERO
    for i in range(0, length * LANES, 4 * LANES):
        values = x[i : i + 4 * LANES]
        for k in range(LANES):
            m = largest[k]
            for j in range(0, 4 * LANES, LANES):
                m = pick(abs(values[j + k]) > abs(m), values[j + k], m)
            largest[k] = m


@lean
def _signed_sums(x: Any, w: Any, wx: Any, length: int, top: Any, state: Any) -> None:
    low, high = -top, top - _ONE
    for k in range(LANES):
        state[_LL + k] = state[_XL + k] = _ZERO
    for i in range(0, length * LANES, 4 * LANES):
        values, weights, products = x[i : i + 4 * LANES], w[i : i + 4 * LANES], wx[i : i + 4 * LANES]
        for k in range(LANES):
            inverse = state[_TRY + k]
            b, c = state[_LL + k], state[_XL + k]
            for j in range(0, 4 * LANES, LANES):
                q = _near_level(inverse * values[j + k], low, high)
                c += products[j + k] * q
                b += weights[j + k] * q * q
            state[_LL + k], state[_XL + k] = b, c


@lean
def _accept_signed(state: Any) -> None:
    for k in range(LANES):
        sxl, sll = state[_XL + k], state[_LL + k]
        better = (sll > _ZERO) & (sxl * sxl > state[_BEST + k] * sll)
        scale = sxl / sll
        state[_NEXT + SCALE + k] = pick(better, scale, state[SCALE + k])
        state[_NEXT + INVERSE + k] = pick(better, state[_TRY + k], state[INVERSE + k])
        state[_NEXT + _BEST + k] = pick(better, scale * sxl, state[_BEST + k])
    for k in range(3 * LANES):
        state[k] = state[_NEXT + k]


@lean
def settle_signed(x: Any, length: int, top: Any, state: Any) -> None:
    """Finds the scale of the lanes whose levels `refine_signed` would not change; most are such.

    Args:
        x: Tile of values.
        length: Values in a block.
        top: Levels on one side, float32.
        state: SCALE is set; WEIGHT becomes 0 for settled lanes and more for those that need `refine_signed`.
    """
    low, high = -top, top - _ONE
    find_largest(x, length, state[_HIGH : _HIGH + LANES])
    for k in range(LANES):
        state[_TRY + k] = -top / state[_HIGH + k]
        state[_LL + k] = state[_XL + k] = state[WEIGHT + k] = _ZERO
    for i in range(0, length * LANES, 4 * LANES):
        values = x[i : i + 4 * LANES]
        for k in range(LANES):
            sxl, sll = state[_XL + k], state[_LL + k]
            for j in range(0, 4 * LANES, LANES):
                v = values[j + k]
                q = _near_level(state[_TRY + k] * v, low, high)
                sxl += v * v * v * q
                sll += v * v * q * q
            state[_XL + k], state[_LL + k] = sxl, sll
    for i in range(0, length * LANES, 4 * LANES):
        values = x[i : i + 4 * LANES]
        for k in range(LANES):
            sxl, sll, moves = state[_XL + k], state[_LL + k], state[WEIGHT + k]
            for j in range(0, 4 * LANES, LANES):
                v = values[j + k]
                q = _near_level(state[_TRY + k] * v, low, high)
                a = sxl - v * v * v * q
                b = sll - v * v * q * q
                # The new level is that nearest to v * b / a: without a division, with a margin, and false for NaN.
                new = pick(v * b > low * a, v * b, low * a)
                new = pick(new < high * a, new, high * a)
                moves += pick((a <= _ZERO) | (abs(new - q * a) < _ALMOST_HALF * a), _ZERO, _ONE)
            state[WEIGHT + k] = moves
    for k in range(LANES):
        sll, zero = state[_LL + k], abs(state[_HIGH + k]) < TINY
        scale = pick(sll > _ZERO, state[_XL + k] / sll, _ZERO)
        state[SCALE + k] = pick(zero, _ZERO, scale)
        state[WEIGHT + k] = pick(zero, _ZERO, state[WEIGHT + k])


@lean
def refine_signed(x: Any, w: Any, wx: Any, levels: Any, length: int, top: Any, state: Any) -> None:
    """Finds each lane's scale by changing one level at a time, at most five times round, with weights x**2.

    Args:
        x: Tile of values.
        w: Tile to work in.
        wx: Tile to work in.
        levels: Tile that receives the levels, -top .. top - 1; a block of zeros gets -top.
        length: Values in a block.
        top: Levels on one side, float32.
        state: SCALE is set.
    """
    low, high = -top, top - _ONE
    find_largest(x, length, state[_HIGH : _HIGH + LANES])
    for i in range(length * LANES):
        w[i] = x[i] * x[i]
        wx[i] = w[i] * x[i]
    for k in range(LANES):
        state[_TRY + k] = -top / state[_HIGH + k]
        state[_LL + k] = state[_XL + k] = _ZERO
    for i in range(0, length * LANES, LANES):
        values, weights, products, found = x[i : i + LANES], w[i : i + LANES], wx[i : i + LANES], levels[i : i + LANES]
        for k in range(LANES):
            q = _near_level(state[_TRY + k] * values[k], low, high)
            found[k] = q
            state[_XL + k] += products[k] * q
            state[_LL + k] += weights[k] * q * q
    for _ in range(5):
        if not _sweep(x, w, wx, levels, length, low, high, state):
            break
    for k in range(LANES):
        sll = state[_LL + k]
        state[SCALE + k] = pick(sll > _ZERO, state[_XL + k] / sll, _ZERO)
        if abs(state[_HIGH + k]) < TINY:
            state[SCALE + k] = _ZERO
            for i in range(0, length * LANES, LANES):
                levels[i + k] = low


@lean
def _sweep(x: Any, w: Any, wx: Any, levels: Any, length: int, low: Any, high: Any, state: Any) -> bool:
    """Tries a better level for each value in turn; returns whether any lane changed."""
    for k in range(LANES):
        state[_ERROR + k] = _ZERO
    for i in range(0, length * LANES, 2 * LANES):
        values, weights, products, found = (
            x[i : i + 2 * LANES],
            w[i : i + 2 * LANES],
            wx[i : i + 2 * LANES],
            levels[i : i + 2 * LANES],
        )
        for k in range(LANES):
            sxl, sll, changes = state[_XL + k], state[_LL + k], state[_ERROR + k]
            for j in range(0, 2 * LANES, LANES):
                q = found[j + k]
                a = sxl - products[j + k] * q
                b = sll - weights[j + k] * q * q
                new = level(values[j + k] * b / a, low, high)
                c = a + products[j + k] * new
                d = b + weights[j + k] * new * new
                better = (a > _ZERO) & (new != q) & (d > _ZERO) & (c * c * sll > sxl * sxl * d)
                sxl, sll = pick(better, c, sxl), pick(better, d, sll)
                changes = pick(better, _ONE, changes)
                found[j + k] = q + pick(better, new - q, _ZERO)  # a plain `pick` would be slow: see there
            state[_XL + k], state[_LL + k], state[_ERROR + k] = sxl, sll, changes
    changed = _ZERO
    for k in range(LANES):
        changed += state[_ERROR + k]
    return changed > _ZERO


# ---------------------------------------------------------------------------------------------------------------------
# The scales of a super-block, one at a time.


@lean
def search_scales(x: Any, w: Any, count: int, top: Any, codes: Any) -> Any:
    """Finds the weighted least squares scale of values that are not negative, x ~ scale * code, code 0 .. top.

    Args:
        x: float32 [count].
        w: float32 [count].
        count: Values.
        top: Highest code, float32.
        codes: uint8 [count]; overwritten. A negative code wraps, as in llama.cpp.

    Returns:
        The scale.
    """
    largest = _ZERO
    for i in range(count):
        largest = max(largest, x[i])
        codes[i] = 0
    if largest < TINY:
        return _ZERO
    inverse = top / largest
    best = _scales_error(x, w, count, inverse, top, True)
    for t in range(-4, 5):
        if t != 0:
            candidate = (_TENTH * np.float32(t) + top) / largest
            error = _scales_error(x, w, count, candidate, top, False)
            if error < best:
                best, inverse = error, candidate
    sxl, sll = _ZERO, _ZERO
    for i in range(count):
        q = min(top, nearest(inverse * x[i]))
        codes[i] = np.int32(q) & 255
        sxl += w[i] * x[i] * q
        sll += w[i] * q * q
    for _ in range(5):
        changed = False
        for i in range(count):
            old = np.float32(codes[i])
            a = sxl - w[i] * x[i] * old
            b = sll - w[i] * old * old
            if a > _ZERO and b > _ZERO:
                q = min(top, nearest(x[i] * b / a))
                if q != old:
                    a += w[i] * x[i] * q
                    b += w[i] * q * q
                    if a * a * sll > sxl * sxl * b:
                        codes[i] = np.int32(q) & 255
                        sxl, sll, changed = a, b, True
        if not changed:
            break
    return sxl / sll if sll > _ZERO else _ZERO


@lean
def _scales_error(x: Any, w: Any, count: int, inverse: Any, top: Any, wraps: bool) -> Any:
    scale, error = _ONE / inverse, _ZERO
    for i in range(count):
        q = nearest(inverse * x[i])
        q = np.float32(np.int32(q) & 255) if wraps else min(top, q)
        e = x[i] - scale * q
        error += w[i] * e * e
    return error


@lean
def search_signed_scales(x: Any, w: Any, count: int, top: Any, codes: Any) -> Any:
    """Does what `search_signed` does, for one block.

    Args:
        x: float32 [count].
        w: float32 [count].
        count: Values.
        top: Levels on one side, float32.
        codes: uint8 [count]; receives level + top, or 0 for a block of zeros.

    Returns:
        The scale.
    """
    largest = _ZERO
    for i in range(count):
        codes[i] = 0
        largest = x[i] if abs(x[i]) > abs(largest) else largest
    if abs(largest) < TINY:
        return _ZERO
    low, high = -top, top - _ONE
    scale, best, chosen = _ZERO, _ZERO, _ZERO
    for step in range(19):
        t = step - 10 if step < 10 else step - 9  # -10 stands for the first try, 0
        inverse = -top / largest if step == 0 else -(top + _TENTH * np.float32(t)) / largest
        sxl, sll = _ZERO, _ZERO
        for i in range(count):
            q = level(inverse * x[i], low, high)
            sxl += w[i] * x[i] * q
            sll += w[i] * q * q
        if step == 0:
            scale = sxl / sll if sll != _ZERO else _ZERO
            best, chosen = scale * sxl, inverse
        elif sll > _ZERO and sxl * sxl > best * sll:
            scale = sxl / sll
            best, chosen = scale * sxl, inverse
    for i in range(count):
        codes[i] = np.int32(level(chosen * x[i], low, high) + top)
    return scale
