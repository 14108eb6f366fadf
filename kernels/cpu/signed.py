"""The search for the scale of 64 blocks at once: x ~ scale * level, level -top .. top - 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import pick
from quantize.kernels.cpu.tiles import (
    BEST,
    ERROR,
    HIGH,
    INVERSE,
    LANES,
    NEXT,
    ONE,
    SCALE,
    STATE,
    SUM_LL,
    SUM_XL,
    TINY,
    TRY,
    WEIGHT,
    ZERO,
    find_largest,
    keep,
    level,
    load,
    load_importance,
    near_level,
    sum_weights,
    weigh_square,
)

_TENTH = np.float32(0.1)
_ALMOST_HALF = np.float32(0.4999)


@compiled
def scan_signed(
    x: Any, importance: Any, variance: Any, size: int, length: int, top: Any, space: Any, found: Any
) -> None:
    """Runs `search_signed` over all blocks of flat rows, with weights x**2 where there is no importance.

    Args:
        x: float32, flat.
        importance: float32 [cols], or empty.
        variance: float32, one for each `size` values; empty if importance itself is the weight.
        size: See `variance`.
        length: Values in a block.
        top: Levels on one side, float32.
        space: `workspace()`.
        found: `room_for_results()`; overwritten, lows and bases without meaning.
    """
    tile, weights, work, _, _, state, spread = space
    for start in range(0, x.size, LANES * length):
        count = min(LANES, (x.size - start) // length)
        load(x, start, count, length, x.size, tile)
        if importance.size > 0:
            load_importance(importance, variance, size, start, count, length, tile, weights, spread)
        else:
            weigh_square(tile, length, weights)
        sum_weights(weights, length, state)
        search_signed(tile, weights, work, length, top, state)
        keep(state, start // length, count, found)


@compiled
def scan_refined(x: Any, pending: Any, space: Any, scales: Any) -> None:
    """Sets the scales of all blocks of 16 as `refine_signed` finds them, with 4 levels on one side.

    Blocks that are not settled at once wait until they fill a tile.

    Args:
        x: float32, flat.
        pending: int64 [64] to work in: which blocks wait.
        space: `workspace()`.
        scales: float32, one for each block; overwritten.
    """
    tile, weights, work, levels, waiting, state, _ = space
    blocks, queued = x.size // 16, 0
    for start in range(0, blocks, LANES):
        count = min(LANES, blocks - start)
        load(x, 16 * start, count, 16, x.size, tile)
        settle_signed(tile, 16, np.float32(4), state[:STATE])
        for k in range(LANES):
            if k < count:
                scales[start + k] = state[SCALE + k]
                if state[WEIGHT + k] > ZERO:
                    pending[queued] = start + k
                    queued += 1
            last = k == LANES - 1 and start + LANES >= blocks
            if queued == LANES or (last and queued > 0):
                _gather(x, pending, queued, waiting)
                other = state[STATE:]  # the first half is still needed
                refine_signed(waiting, weights, work, levels, 16, np.float32(4), other)
                for i in range(queued):
                    scales[pending[i]] = other[SCALE + i]
                queued = 0


@compiled
def _gather(x: Any, pending: Any, count: int, tile: Any) -> None:
    for k in range(LANES):
        first = 16 * pending[min(k, count - 1)]
        values = x[first : first + 16]
        for i in range(16):
            tile[i * LANES + k] = values[i]


@compiled
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
    find_largest(x, length, state[HIGH : HIGH + LANES])
    for i in range(length * LANES):
        wx[i] = w[i] * x[i]
    for k in range(LANES):
        state[TRY + k] = -top / state[HIGH + k]
    _signed_sums(x, w, wx, length, top, state)
    for k in range(LANES):
        sxl, sll = state[SUM_XL + k], state[SUM_LL + k]
        scale = pick(sll != ZERO, sxl / sll, ZERO)
        state[SCALE + k], state[BEST + k], state[INVERSE + k] = scale, scale * sxl, state[TRY + k]
    for t in range(-9, 10):
        if t != 0:
            bins = -(top + _TENTH * np.float32(t))
            for k in range(LANES):
                state[TRY + k] = bins / state[HIGH + k]
            _signed_sums(x, w, wx, length, top, state)
            _accept_signed(state)
    for k in range(LANES):
        if abs(state[HIGH + k]) < TINY:
            state[SCALE + k] = state[INVERSE + k] = ZERO


@compiled
def _signed_sums(x: Any, w: Any, wx: Any, length: int, top: Any, state: Any) -> None:
    low, high = -top, top - ONE
    for k in range(LANES):
        state[SUM_LL + k] = state[SUM_XL + k] = ZERO
    for i in range(0, length * LANES, 4 * LANES):
        values, weights, products = x[i : i + 4 * LANES], w[i : i + 4 * LANES], wx[i : i + 4 * LANES]
        for k in range(LANES):
            inverse = state[TRY + k]
            b, c = state[SUM_LL + k], state[SUM_XL + k]
            for j in range(0, 4 * LANES, LANES):
                q = near_level(inverse * values[j + k], low, high)
                c += products[j + k] * q
                b += weights[j + k] * q * q
            state[SUM_LL + k], state[SUM_XL + k] = b, c


@compiled
def _accept_signed(state: Any) -> None:
    for k in range(LANES):
        sxl, sll = state[SUM_XL + k], state[SUM_LL + k]
        better = (sll > ZERO) & (sxl * sxl > state[BEST + k] * sll)
        scale = sxl / sll
        state[NEXT + SCALE + k] = pick(better, scale, state[SCALE + k])
        state[NEXT + INVERSE + k] = pick(better, state[TRY + k], state[INVERSE + k])
        state[NEXT + BEST + k] = pick(better, scale * sxl, state[BEST + k])
    for k in range(3 * LANES):
        state[k] = state[NEXT + k]


@compiled
def settle_signed(x: Any, length: int, top: Any, state: Any) -> None:
    """Finds the scale of the lanes whose levels `refine_signed` would not change; most are such.

    Args:
        x: Tile of values.
        length: Values in a block.
        top: Levels on one side, float32.
        state: SCALE is set; WEIGHT becomes 0 for settled lanes and more for those that need `refine_signed`.
    """
    low, high = -top, top - ONE
    find_largest(x, length, state[HIGH : HIGH + LANES])
    for k in range(LANES):
        state[TRY + k] = -top / state[HIGH + k]
        state[SUM_LL + k] = state[SUM_XL + k] = state[WEIGHT + k] = ZERO
    for i in range(0, length * LANES, 4 * LANES):
        values = x[i : i + 4 * LANES]
        for k in range(LANES):
            sxl, sll = state[SUM_XL + k], state[SUM_LL + k]
            for j in range(0, 4 * LANES, LANES):
                v = values[j + k]
                q = near_level(state[TRY + k] * v, low, high)
                sxl += v * v * v * q
                sll += v * v * q * q
            state[SUM_XL + k], state[SUM_LL + k] = sxl, sll
    for i in range(0, length * LANES, 4 * LANES):
        values = x[i : i + 4 * LANES]
        for k in range(LANES):
            sxl, sll, moves = state[SUM_XL + k], state[SUM_LL + k], state[WEIGHT + k]
            for j in range(0, 4 * LANES, LANES):
                v = values[j + k]
                q = near_level(state[TRY + k] * v, low, high)
                a = sxl - v * v * v * q
                b = sll - v * v * q * q
                # The new level is that nearest to v * b / a: without a division, with a margin, and false for NaN.
                new = pick(v * b > low * a, v * b, low * a)
                new = pick(new < high * a, new, high * a)
                moves += pick((a <= ZERO) | (abs(new - q * a) < _ALMOST_HALF * a), ZERO, ONE)
            state[WEIGHT + k] = moves
    for k in range(LANES):
        sll, zero = state[SUM_LL + k], abs(state[HIGH + k]) < TINY
        scale = pick(sll > ZERO, state[SUM_XL + k] / sll, ZERO)
        state[SCALE + k] = pick(zero, ZERO, scale)
        state[WEIGHT + k] = pick(zero, ZERO, state[WEIGHT + k])


@compiled
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
    low, high = -top, top - ONE
    find_largest(x, length, state[HIGH : HIGH + LANES])
    for i in range(length * LANES):
        w[i] = x[i] * x[i]
        wx[i] = w[i] * x[i]
    for k in range(LANES):
        state[TRY + k] = -top / state[HIGH + k]
        state[SUM_LL + k] = state[SUM_XL + k] = ZERO
    for i in range(0, length * LANES, LANES):
        values, weights, products, found = x[i : i + LANES], w[i : i + LANES], wx[i : i + LANES], levels[i : i + LANES]
        for k in range(LANES):
            q = near_level(state[TRY + k] * values[k], low, high)
            found[k] = q
            state[SUM_XL + k] += products[k] * q
            state[SUM_LL + k] += weights[k] * q * q
    for _ in range(5):
        if not _sweep(x, w, wx, levels, length, low, high, state):
            break
    for k in range(LANES):
        sll = state[SUM_LL + k]
        state[SCALE + k] = pick(sll > ZERO, state[SUM_XL + k] / sll, ZERO)
        if abs(state[HIGH + k]) < TINY:
            state[SCALE + k] = ZERO
            for i in range(0, length * LANES, LANES):
                levels[i + k] = low


@compiled
def _sweep(x: Any, w: Any, wx: Any, levels: Any, length: int, low: Any, high: Any, state: Any) -> Any:
    """Tries a better level for each value in turn; returns whether any lane changed."""
    for k in range(LANES):
        state[ERROR + k] = ZERO
    for i in range(0, length * LANES, 2 * LANES):
        values, weights, products, found = (
            x[i : i + 2 * LANES],
            w[i : i + 2 * LANES],
            wx[i : i + 2 * LANES],
            levels[i : i + 2 * LANES],
        )
        for k in range(LANES):
            sxl, sll, changes = state[SUM_XL + k], state[SUM_LL + k], state[ERROR + k]
            for j in range(0, 2 * LANES, LANES):
                q = found[j + k]
                a = sxl - products[j + k] * q
                b = sll - weights[j + k] * q * q
                new = level(values[j + k] * b / a, low, high)
                c = a + products[j + k] * new
                d = b + weights[j + k] * new * new
                better = (a > ZERO) & (new != q) & (d > ZERO) & (c * c * sll > sxl * sxl * d)
                sxl, sll = pick(better, c, sxl), pick(better, d, sll)
                changes = pick(better, ONE, changes)
                found[j + k] = q + pick(better, new - q, ZERO)  # a plain `pick` would be slow: see there
            state[SUM_XL + k], state[SUM_LL + k], state[ERROR + k] = sxl, sll, changes
    changed = ZERO
    for k in range(LANES):
        changed += state[ERROR + k]
    return changed > ZERO
