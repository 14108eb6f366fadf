"""Encoders of IQ1_S and IQ1_M: 8 weights are one of 2048 points with levels 0..2, meaning -1..1, plus or minus 1/8."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from quantize.kernels.cpu.grids import codebook
from quantize.kernels.cpu.gridscan import level, nearest8
from quantize.kernels.cpu.gridsearch import SUPER, mean_square
from quantize.kernels.cpu.gridsplit import add_up, room, sort, split_one, split_two
from quantize.kernels.cpu.numeric import compiled, to_half

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ZERO, _ONE, _TWO, _EIGHTH, _TOP_CODE, _UNITS = (np.float32(v) for v in (0, 1, 2, 0.125, 7, 15))
_EPS_S, _EPS_M, _FUDGE_S, _FUDGE_M = (np.float32(v) for v in (1e-12, 1e-7, 1.125, 1.1125))


class _Tables(NamedTuple):
    """The codebook as the loops want it: -1, 0 and 1 instead of levels."""

    where: Any  # int32 [keys]
    first: Any  # int32 [lists + 1]
    levels: Any  # int8 [tiles * 64]
    names: Any  # uint16 [tiles * 8]
    points: Any  # float32 [points, 8]


class _Super(NamedTuple):
    """What one super-block becomes, and room for one block."""

    index: Any  # int64 [32]
    shifts: Any  # int64 [16]: as in gridsplit.Split, of each block
    scales: Any  # float32 [16]
    weight: Any  # float32 [256]: costs
    levels: Any  # int64 [32]
    rank: Any  # int32 [32]
    order: Any  # int64 [32]


@cache
def _tables() -> _Tables:
    book = codebook("iq1")
    return _Tables(book.where, book.first, book.levels - np.int8(1), book.names, book.values)


def encode_iq1_s(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract. Importance must be there."""
    _encode(x, importance, out, _tables(), False)


def encode_iq1_m(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract."""
    _encode(x, importance, out, _tables(), True)


@compiled
def _encode(x: Any, importance: Any, out: Any, table: Any, halves: bool) -> None:
    """Encodes rows of super-blocks, to IQ1_M if each half of a block has its own shift."""
    sums = room()
    done = _Super(
        np.empty(32, np.int64), np.empty(16, np.int64), np.empty(16, np.float32), np.empty(SUPER, np.float32),
        np.empty(32, np.int64), np.empty(32, np.int32), np.zeros(32, np.int64),
    )  # fmt: skip
    nbytes = 56 if halves else 50
    for r in range(x.shape[0]):
        for s in range(x.shape[1] // SUPER):
            row, start = x[r], s * SUPER
            _costs(row, start, importance, done.weight)
            most = _blocks(row, start, table, halves, sums, done)
            block = out[r, s * nbytes : (s + 1) * nbytes]
            block[:] = 0
            if halves:
                _write_m(row, start, most, table, done, block)
            else:
                _write_s(most, done, block)


@compiled
def _costs(x: Any, start: int, importance: Any, weight: Any) -> None:
    """Writes what errors of a super-block's weights cost."""
    square = mean_square(x, start, _TWO)
    for i in range(SUPER):
        value = x[start + i]
        if importance.size:
            weight[i] = importance[start + i] * np.sqrt(square + value * value)
        else:
            weight[i] = value * value


@compiled
def _blocks(x: Any, start: int, table: Any, halves: bool, sums: Any, done: Any) -> Any:
    """Fills `done` with points, shifts and scales of one super-block; returns its largest scale, float32."""
    n = 16 if halves else 32
    eps = _EPS_M if halves else _EPS_S
    done.index[:] = 0
    done.shifts[:] = 0
    most_scale = _ZERO
    for b in range(SUPER // n):
        at = start + n * b
        weight = done.weight[n * b : n * (b + 1)]
        done.scales[b] = 0
        most = _ZERO
        for i in range(n):
            most = max(most, abs(x[at + i]))
        if most < eps:
            continue
        sort(x, at, n, done.rank, done.order)
        add_up(x, at, n, weight, done.order, halves, sums)
        split = split_two(n, sums) if halves else split_one(n, sums)
        if split.first < 0:
            continue
        scale, shift = split.scale, split.shift
        for j in range(n):
            done.levels[done.order[j]] = (j >= split.first) + (j >= split.second)
        if scale < 0:
            scale = -scale
            shift = (3 if halves else 1) - shift
            for j in range(n):
                done.levels[j] = 2 - done.levels[j]
        scale = _choose(x, at, n, weight, table, halves, scale, shift, done, n // 8 * b)
        done.shifts[b] = shift
        done.scales[b] = scale
        most_scale = max(most_scale, scale)
    return most_scale


@compiled
def _shift(halves: bool, shift: int, g: int) -> Any:
    """Returns what is added to the levels of a block's g-th point, float32."""
    down = (shift >> (1 - g)) & 1 if halves else shift
    return -_EIGHTH if down else _EIGHTH


@compiled
def _choose(
    x: Any, at: int, n: int, weight: Any, table: Any, halves: bool, scale: Any, shift: int, done: Any, to: int
) -> Any:  # fmt: skip
    """Writes the points of a block to `done.index` from `to` on; returns its scale, float32."""
    moved = False
    values = x[at : at + n]
    for g in range(n // 8):
        key = np.int64(0)
        for i in range(7, -1, -1):
            key = key * 3 + done.levels[8 * g + i]
        point = np.int64(table.where[key])
        if point < 0:
            moved = True
            first, last = table.first[-1 - point], table.first[-point]
            up = _shift(halves, shift, g)
            position = nearest8(table.levels, first, last, values, weight, 8 * g, scale, up)
            point = np.int64(table.names[position])
        done.index[to + g] = point
    if moved:
        sx, s2 = _ZERO, _ZERO
        for g in range(n // 8):
            up = _shift(halves, shift, g)
            for i in range(8):
                q = table.points[done.index[to + g], i] + up
                sx += weight[8 * g + i] * q * values[8 * g + i]
                s2 += weight[8 * g + i] * q * q
        if sx > 0 and s2 > 0:
            return sx / s2
    return scale


@compiled
def _write_s(most: Any, done: Any, block: Any) -> None:
    """0: scale; 2..33: low bytes of indices; 34..49: per 32 weights four times 3 high bits, 3 of scale, 1 of shift."""
    unit = most / _UNITS
    if most > 0:
        half = to_half(unit * _FUDGE_S)
        block[0], block[1] = half & 255, half >> 8
    for b in range(8):
        word = np.int64(0)
        for g in range(4):
            block[2 + 4 * b + g] = done.index[4 * b + g] & 255
            word |= done.index[4 * b + g] >> 8 << 3 * g
        if most > 0:
            word |= np.int64(level(_ONE / unit * done.scales[b], _TOP_CODE)) << 12 | done.shifts[b] << 15
        block[34 + 2 * b], block[35 + 2 * b] = word & 255, word >> 8


@compiled
def _write_m(x: Any, start: int, most: Any, table: Any, done: Any, block: Any) -> None:
    """0..31: low bytes of indices; 32..47: per point 3 high bits and 1 of shift; 48..55: four words.

    Each word has four 3-bit scales, and on top four bits of the float16 that multiplies them all. That one is fitted
    once more, to the points and rounded scales.
    """
    for g in range(32):
        block[g] = done.index[g] & 255
        block[32 + g // 2] |= done.index[g] >> 8 << 4 * (g % 2)
    if not most > 0:
        return
    unit = most / _UNITS
    inverse = _ONE / unit
    sx, s2 = _ZERO, _ZERO
    for b in range(16):
        code = np.int64(level(inverse * done.scales[b], _TOP_CODE))
        word = code << 3 * (b % 4)
        at = 48 + 2 * (b // 4)
        block[at] |= word & 255
        block[at + 1] |= word >> 8
        block[32 + b] |= (done.shifts[b] >> 1) << 3 | (done.shifts[b] & 1) << 7
        for i in range(16):
            up = _shift(True, done.shifts[b], i // 8)
            q = (table.points[done.index[2 * b + i // 8], i % 8] + up) * np.float32(2 * code + 1)
            cost = done.weight[16 * b + i] * q
            sx += cost * x[start + 16 * b + i]
            s2 += cost * q
    if s2 > 0:
        unit = sx / s2
    half = np.int64(to_half(unit * _FUDGE_M))
    for i in range(4):
        block[49 + 2 * i] |= (half >> (4 * i) & 15) << 4
