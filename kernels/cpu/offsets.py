"""The search for scale and offset of 64 blocks at once: x ~ scale * level + low, level 0 .. top, low <= 0."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import pick
from quantize.kernels.cpu.tiles import (
    BASE,
    BEST,
    ERROR,
    FLOOR,
    HIGH,
    INVERSE,
    LANES,
    LOW,
    NEXT,
    ONE,
    SCALE,
    SUM_L,
    SUM_LL,
    SUM_X,
    SUM_XL,
    TRY,
    TRY_LOW,
    TRY_SCALE,
    WEIGHT,
    ZERO,
    keep,
    level,
    load,
    load_importance,
    weigh_size,
    weigh_spread,
)


@compiled
def scan_offset(
    x: Any, importance: Any, variance: Any, size: int, bits: int, plan: Any, space: Any, found: Any
) -> None:
    """Runs `search_offset` over all blocks of flat rows.

    Args:
        x: float32, flat.
        importance: float32 [cols], or empty.
        variance: float32, one for each `size` values.
        size: See `variance`.
        bits: Bits of a level; blocks of 2 bits have 16 values, others 32.
        plan: float32 [3]: first, step and number of the candidates.
        space: `workspace()`.
        found: `room_for_results()`; overwritten.
    """
    tile, weights, levels, _, _, state, spread = space
    length, top, weighted = 16 if bits == 2 else 32, np.float32((1 << bits) - 1), importance.size > 0
    for start in range(0, x.size, LANES * length):
        count = min(LANES, (x.size - start) // length)
        load(x, start, count, length, x.size, tile)
        if weighted:
            load_importance(importance, variance, size, start, count, length, tile, weights, spread)
        elif bits == 2:
            weigh_size(tile, length, weights)
        else:
            weigh_spread(tile, length, weights, state)
        absolute = bits == 2 and not weighted
        search_offset(tile, weights, levels, length, top, plan[0], plan[1], int(plan[2]), absolute, state)
        keep(state, start // length, count, found)


@compiled
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
        state[BEST + k] = state[ERROR + k]
    for t in range(steps + 1):
        bins = (first + step * np.float32(t)) + top
        for k in range(LANES):
            state[TRY + k] = bins / (state[HIGH + k] - state[LOW + k])
        _set_levels(x, w, levels, length, top, state)
        _fit(state)
        _errors(x, w, levels, length, absolute, state)
        _accept_offset(state)
    for k in range(LANES):
        if state[HIGH + k] <= state[FLOOR + k]:
            state[SCALE + k] = state[INVERSE + k] = ZERO
            state[LOW + k] = state[BASE + k] = state[FLOOR + k]


@compiled
def _span(x: Any, w: Any, length: int, top: Any, state: Any) -> None:
    for k in range(LANES):
        state[FLOOR + k] = state[HIGH + k] = x[k]
        state[WEIGHT + k] = w[k]
        state[SUM_X + k] = w[k] * x[k]
    for i in range(LANES, length * LANES, LANES):
        values, weights = x[i : i + LANES], w[i : i + LANES]
        for k in range(LANES):
            v, low, high = values[k], state[FLOOR + k], state[HIGH + k]
            state[FLOOR + k] = pick(v < low, v, low)
            state[HIGH + k] = pick(v > high, v, high)
            state[WEIGHT + k] += weights[k]
            state[SUM_X + k] += weights[k] * v
    for k in range(LANES):
        low = state[FLOOR + k]
        low = pick(low > ZERO, ZERO, low)
        inverse = top / (state[HIGH + k] - low)
        state[FLOOR + k] = state[LOW + k] = state[BASE + k] = state[TRY_LOW + k] = low
        state[TRY + k] = state[INVERSE + k] = inverse
        state[SCALE + k] = state[TRY_SCALE + k] = ONE / inverse


@compiled
def _set_levels(x: Any, w: Any, levels: Any, length: int, top: Any, state: Any) -> None:
    for k in range(LANES):
        state[SUM_L + k] = state[SUM_LL + k] = state[SUM_XL + k] = ZERO
    for i in range(0, length * LANES, 4 * LANES):
        values, weights, found = x[i : i + 4 * LANES], w[i : i + 4 * LANES], levels[i : i + 4 * LANES]
        for k in range(LANES):
            inverse, low = state[TRY + k], state[LOW + k]
            a, b, c = state[SUM_L + k], state[SUM_LL + k], state[SUM_XL + k]
            for j in range(0, 4 * LANES, LANES):
                v = values[j + k]
                q = level(inverse * (v - low), ZERO, top)
                found[j + k] = q
                wq = weights[j + k] * q
                a += wq
                b += wq * q
                c += wq * v
            state[SUM_L + k], state[SUM_LL + k], state[SUM_XL + k] = a, b, c


@compiled
def _fit(state: Any) -> None:
    for k in range(LANES):
        sw, sx, sl, sll, sxl = (
            state[WEIGHT + k],
            state[SUM_X + k],
            state[SUM_L + k],
            state[SUM_LL + k],
            state[SUM_XL + k],
        )
        d = sw * sll - sl * sl
        scale = (sw * sxl - sx * sl) / d
        low = (sll * sx - sl * sxl) / d
        above = low > ZERO
        state[TRY_SCALE + k] = pick(above, sxl / sll, scale)
        state[TRY_LOW + k] = pick(above, ZERO, low)
        state[SUM_L + k] = d


@compiled
def _errors(x: Any, w: Any, levels: Any, length: int, absolute: bool, state: Any) -> None:
    for k in range(LANES):
        state[ERROR + k] = ZERO
    for i in range(0, length * LANES, 4 * LANES):
        values, weights, found = x[i : i + 4 * LANES], w[i : i + 4 * LANES], levels[i : i + 4 * LANES]
        if absolute:
            for k in range(LANES):
                scale, low, error = state[TRY_SCALE + k], state[TRY_LOW + k], state[ERROR + k]
                for j in range(0, 4 * LANES, LANES):
                    e = scale * found[j + k] + low - values[j + k]
                    error += weights[j + k] * abs(e)
                state[ERROR + k] = error
        else:
            for k in range(LANES):
                scale, low, error = state[TRY_SCALE + k], state[TRY_LOW + k], state[ERROR + k]
                for j in range(0, 4 * LANES, LANES):
                    e = scale * found[j + k] + low - values[j + k]
                    error += weights[j + k] * (e * e)
                state[ERROR + k] = error


@compiled
def _accept_offset(state: Any) -> None:
    for k in range(LANES):
        better = (state[SUM_L + k] > ZERO) & (state[ERROR + k] < state[BEST + k])
        state[NEXT + SCALE + k] = pick(better, state[TRY_SCALE + k], state[SCALE + k])
        state[NEXT + INVERSE + k] = pick(better, state[TRY + k], state[INVERSE + k])
        state[NEXT + BEST + k] = pick(better, state[ERROR + k], state[BEST + k])
        state[NEXT + LOW + k] = pick(better, state[TRY_LOW + k], state[LOW + k])
        state[NEXT + BASE + k] = pick(better, state[LOW + k], state[BASE + k])  # that of this candidate's levels
    for k in range(5 * LANES):
        state[k] = state[NEXT + k]
