"""The inner loop of coordinate descent over grids: which of some grids suits a sub-block best, with new codes on it.

`quantize.methods.descent` has the arithmetic in torch, for any device and any points; this is the same for evenly
spaced points on a processor, 32 rows at a time as lanes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import MAGIC, aligned

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LANES = 32
_ZERO, _ONE = np.float32(0), np.float32(1)


def search(
    inner: NDArray[np.float32],
    values: NDArray[np.float32],
    gradient: NDArray[np.float32],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    first: float,
    last: int,
    codes: NDArray[np.uint8],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns the best of some grids for each row of a sub-block, and by how much its values change.

    Args:
        inner: H of the sub-block's columns, float32 `[sub, sub]`, symmetric.
        values: What its weights are now, float32 `[sub, rows]`.
        gradient: H (Q - W)^T there, float32 `[sub, rows]`.
        scale: Of the grids, float32 `[tries, rows]`; the first is the one that the rows have.
        offset: Likewise.
        first: The first point; the others follow at a distance of 1.
        last: The largest code.
        codes: uint8 `[sub, rows]`; where the error falls they become those on the best grid.

    Returns:
        `(best, moves)`: int64 `[rows]`, 0 where nothing lowers the error; float32 `[sub, rows]`.
    """
    sub, rows = values.shape
    best, moves = np.zeros(rows, np.int64), np.zeros((sub, rows), np.float32)
    room = aligned(*[sub * _LANES] * 4, *[_LANES] * 7)
    blocks = tuple(part.reshape(sub, _LANES) for part in room[:4])
    _search(inner, values, gradient, scale, offset, np.float32(first), np.float32(last), codes, best, moves,
            blocks, tuple(room[4:]), _LANES)  # fmt: skip
    return best, moves


@compiled
def _search(
    inner: Any, values: Any, gradient: Any, scale: Any, offset: Any, first: Any, last: Any,
    codes: Any, best: Any, moves: Any, blocks: Any, lanes: Any, width: int,
) -> None:  # fmt: skip
    """Does it; `blocks` are four arrays `[sub, width]` and `lanes` seven of `[width]` to work in."""
    now, now_codes, kept, kept_codes = blocks
    slope, rise, lowest, step, inverse, shift, falls = lanes
    sub, rows = values.shape
    for start in range(0, rows, width):
        count = min(width, rows - start)
        for lane in range(width):
            lowest[lane] = _ZERO
            step[lane] = _ZERO
            shift[lane] = _ZERO
        for attempt in range(scale.shape[0]):
            for lane in range(count):
                step[lane] = scale[attempt, start + lane]
                shift[lane] = offset[attempt, start + lane]
            for lane in range(width):
                inverse[lane] = _ONE / step[lane] if step[lane] != _ZERO else _ZERO
                rise[lane] = _ZERO
            for i in range(sub):
                _column(inner, values, gradient, i, start, count, now, now_codes, slope, rise, step, inverse, shift,
                        first, last, width)  # fmt: skip
            for lane in range(width):
                falls[lane] = _ONE if rise[lane] < lowest[lane] else _ZERO
                lowest[lane] = rise[lane] if rise[lane] < lowest[lane] else lowest[lane]
            for lane in range(count):
                if falls[lane] != _ZERO:
                    best[start + lane] = attempt
            for i in range(sub):
                move, code, new_move, new_code = kept[i], kept_codes[i], now[i], now_codes[i]
                for lane in range(width):
                    move[lane] = new_move[lane] if falls[lane] != _ZERO else move[lane]
                    code[lane] = new_code[lane] if falls[lane] != _ZERO else code[lane]
        for i in range(sub):
            for lane in range(count):
                if lowest[lane] < _ZERO:
                    codes[i, start + lane] = np.uint8(kept_codes[i, lane])
                    moves[i, start + lane] = kept[i, lane]


@compiled
def _column(
    inner: Any, values: Any, gradient: Any, i: int, start: int, count: int, now: Any, now_codes: Any,
    slope: Any, rise: Any, step: Any, inverse: Any, shift: Any, first: Any, last: Any, width: int,
) -> None:  # fmt: skip
    """Rounds one column of a sub-block, given how those before it move."""
    move, code, weights = now[i], now_codes[i], inner[i]
    for lane in range(count):
        slope[lane] = gradient[i, start + lane]
        move[lane] = values[i, start + lane]
    for j in range(i):
        share, earlier = weights[j], now[j]
        for lane in range(width):
            slope[lane] += share * earlier[lane]
    curve = weights[i]
    down = _ONE / curve
    for lane in range(width):
        old = move[lane]
        level = (old - slope[lane] * down - shift[lane]) * inverse[lane] - first
        level = level if level > _ZERO else _ZERO
        level = level if level < last else last
        level = (level + MAGIC) - MAGIC
        change = (level + first) * step[lane] + shift[lane] - old
        code[lane] = level
        move[lane] = change
        rise[lane] += change * (slope[lane] + slope[lane] + curve * change)
