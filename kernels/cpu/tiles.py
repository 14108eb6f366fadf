"""The searches for a block's scale and offset, on 64 blocks at once.

A tile holds 64 blocks, one per lane, transposed: value i of lane k stands at `64 * i + k`, so that the innermost loop
runs over lanes and becomes vector instructions while each lane adds its values in llama.cpp's order. Tiles are flat
float32 arrays, and everything else that belongs to a lane is a row of one array (`state`), at offsets that are known
when the loop is compiled: with more arrays the compiler would have to prove too many of them apart and would give up.
For the same reason loops over lanes index slices: there it sees that indices are not negative.

Four values are done in one pass over the lanes, which saves most of the traffic to the sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import MAGIC, aligned, pick

LANES = 64
LONGEST = 32  # values in a block at most
TILE = LANES * LONGEST

# Rows of `state`. First what an accepted candidate changes, then as many rows for what that will be.
SCALE = 0
INVERSE = 1 * LANES  # levels are those of (x - BASE) * INVERSE
BEST = 2 * LANES
LOW = 3 * LANES  # the value that level 0 stands for
BASE = 4 * LANES
NEXT = 5 * LANES
WEIGHT = 10 * LANES  # sum of the weights
SUM_X = 11 * LANES
HIGH = 12 * LANES
FLOOR = 13 * LANES
TRY = 14 * LANES  # the candidate's INVERSE
TRY_SCALE = 15 * LANES
TRY_LOW = 16 * LANES
ERROR = 17 * LANES
SUM_L = 18 * LANES
SUM_LL = 19 * LANES
SUM_XL = 20 * LANES
STATE = 21 * LANES

TINY = np.float32(1e-15)  # a block below it is zero
ZERO, ONE = np.float32(0), np.float32(1)


def workspace() -> tuple[Any, ...]:
    """Returns float32 arrays to work in: five tiles, a `state` with room for two, and a row for variances."""
    return tuple(aligned(*[TILE] * 5, 2 * STATE, LANES))


@compiled
def nearest(value: Any) -> Any:
    """Returns a float32 rounded to a whole number, ties to even.

    Beyond 2**22 it gives what llama.cpp's rounding gives: the low bits, NaN and Inf included.
    """
    bits = np.float32(value + MAGIC).view(np.int32)
    return np.int32((bits & 0x7FFFFF) | 0x4B000000).view(np.float32) - MAGIC


@compiled
def level(value: Any, low: Any, high: Any) -> Any:
    """Returns `nearest(value)` within `low` and `high`."""
    whole = nearest(value)
    whole = pick(whole > low, whole, low)
    return pick(whole < high, whole, high)


@compiled
def near_level(value: Any, low: Any, high: Any) -> Any:
    """Does what `level` does for values below 2**22."""
    whole = (value + MAGIC) - MAGIC
    whole = pick(whole > low, whole, low)
    return pick(whole < high, whole, high)


@compiled
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
            tile[i * LANES + lane] = ZERO


@compiled
def weigh_square(x: Any, length: int, w: Any) -> None:
    """Weights x**2."""
    for i in range(length * LANES):
        w[i] = x[i] * x[i]


@compiled
def weigh_size(x: Any, length: int, w: Any) -> None:
    """Weights |x|."""
    for i in range(length * LANES):
        w[i] = abs(x[i])


@compiled
def weigh_spread(x: Any, length: int, w: Any, state: Any) -> None:
    """Weights |x| plus the root mean square of the block."""
    for k in range(LANES):
        state[k] = ZERO
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


@compiled
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


@compiled
def sum_weights(w: Any, length: int, state: Any) -> None:
    """Sets WEIGHT to the sum of each lane's weights."""
    for k in range(LANES):
        state[WEIGHT + k] = ZERO
    for i in range(0, length * LANES, LANES):
        weight = w[i : i + LANES]
        for k in range(LANES):
            state[WEIGHT + k] += weight[k]


@compiled
def find_largest(x: Any, length: int, largest: Any) -> None:
    """Sets `largest` (float32 [64]) to each lane's value of largest size, the first of several."""
    for k in range(LANES):
        largest[k] = ZERO
    for i in range(0, length * LANES, 4 * LANES):
        values = x[i : i + 4 * LANES]
        for k in range(LANES):
            m = largest[k]
            for j in range(0, 4 * LANES, LANES):
                m = pick(abs(values[j + k]) > abs(m), values[j + k], m)
            largest[k] = m


@compiled
def mean_squares(x: Any, size: int, factor: Any, out: Any) -> None:
    """Sets `out[i]` to factor * mean of x**2 over the i-th `size` values, added in order."""
    for i in range(x.size // size):
        total = ZERO
        for v in x[i * size : (i + 1) * size]:
            total += v * v
        out[i] = factor * total / np.float32(size)


@compiled
def load_importance(
    importance: Any, variance: Any, size: int, start: int, count: int, length: int, tile: Any, w: Any, spread: Any
) -> None:
    """Fills the tile of weights with importance * sqrt(variance + x**2), or with importance if there is no variance.

    Args:
        importance: float32 [cols].
        variance: float32, one for each `size` values of the whole input, or empty.
        size: See `variance`.
        start: Index of the tile's first value.
        count: Blocks in the tile.
        length: Values in a block.
        tile: The tile of values.
        w: The tile of weights; overwritten.
        spread: float32 [64] to work in.
    """
    load(importance, start, count, length, importance.size, w)
    if variance.size > 0:
        for k in range(count):
            spread[k] = variance[(start + k * length) // size]
        weigh_importance(tile, length, w, spread)


@compiled
def keep(state: Any, first: int, count: int, found: Any) -> None:
    """Copies the results of `count` lanes to arrays of all blocks, from block `first` on.

    Args:
        state: See above.
        first: Index of the tile's first block.
        count: Lanes in use.
        found: float32 arrays, one number for each block: scales, inverses, lows, bases, sums of weights.
    """
    scales, inverses, lows, bases, sums = found
    for k in range(count):
        scales[first + k], inverses[first + k], sums[first + k] = (
            state[SCALE + k],
            state[INVERSE + k],
            state[WEIGHT + k],
        )
        lows[first + k], bases[first + k] = state[LOW + k], state[BASE + k]


def parts(x: Any, out: Any) -> Iterator[tuple[Any, Any]]:
    """Yields flat pieces of rows of weights and bytes, of about 2**18 weights, so that results take little memory."""
    step = max(1, (1 << 18) // max(1, x.shape[1]))
    for row in range(0, len(x), step):
        yield x[row : row + step].reshape(-1), out[row : row + step].reshape(-1)


def room_for_results(blocks: int) -> tuple[Any, ...]:
    """Returns arrays for `keep`."""
    return tuple(np.zeros(blocks, np.float32) for _ in range(5))
