"""Encoders of IQ1_S and IQ1_M: 8 weights are one of 2048 points with levels 0..2, meaning -1..1, plus or minus 1/8."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from quantize.kernels.cpu.grids import codebook
from quantize.kernels.cpu.gridscan import Tables, level, nearest8, raw_tables, tables
from quantize.kernels.cpu.gridsearch import SUPER, costs, mean_square, plain_costs
from quantize.kernels.cpu.gridsplit import add_up, raw_sums, room, sort, split_one, split_two
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import to_half
from quantize.kernels.cpu.raw import raw

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ZERO, _ONE, _TWO, _EIGHTH, _TOP_CODE, _UNITS = (np.float32(v) for v in (0, 1, 2, 0.125, 7, 15))
_EPS_S, _EPS_M, _FUDGE_S, _FUDGE_M = (np.float32(v) for v in (1e-12, 1e-7, 1.125, 1.1125))


class _Super(NamedTuple):
    """What one super-block becomes; arrays outside, pointers inside."""

    index: Any  # int64 [32]
    shifts: Any  # int64 [16]: as in gridsplit.Split, of each block
    scales: Any  # float32 [16]
    weight: Any  # float32 [256]: costs
    levels: Any  # int64 [32], of one block
    order: Any  # int64 [32], of one block


@cache
def _tables() -> Tables:
    return tables(codebook("iq1"), False)


def encode_iq1_s(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract. Importance must be there."""
    _run(x, importance, out, False)


def encode_iq1_m(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract."""
    _run(x, importance, out, True)


def _run(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8], halves: bool) -> None:
    """Encodes rows with room of its own."""
    numbers, counts = np.zeros((2, 16), np.int64), np.zeros((3, 32), np.int64)
    scales, weight = np.zeros(16, np.float32), np.zeros(SUPER, np.float32)
    done = _Super(counts[0], numbers[0], scales, weight, counts[1], counts[2])
    _encode(x, importance, out, _tables(), halves, done, room())


@compiled
def _encode(x: Any, importance: Any, out: Any, table: Any, halves: bool, done: Any, room: Any) -> None:
    """Encodes rows of super-blocks, to IQ1_M if each half of a block has its own shift."""
    tables, sums, weight = raw_tables(table), raw_sums(room), raw(done.weight)
    d = _Super(raw(done.index), raw(done.shifts), raw(done.scales), weight, raw(done.levels), raw(done.order))
    n, nbytes = (16, 56) if halves else (32, 50)
    for row in range(x.shape[0]):
        for s in range(x.shape[1] // SUPER):
            values = raw(x) + row * x.shape[1] + SUPER * s
            square = mean_square(values, _TWO)
            if importance.size:
                costs(values, SUPER, raw(importance) + SUPER * s, square, weight)
            else:
                plain_costs(values, SUPER, _ZERO, weight)
            most = _ZERO
            for b in range(SUPER // n):
                most = max(most, _block(values + n * b, b, n, tables, halves, sums, d))
            block = raw(out) + row * out.shape[1] + nbytes * s
            if halves:
                _write_m(values, most, tables, d, block)
            else:
                _write_s(most, d, block)


@compiled
def _block(x: Any, b: int, n: int, table: Any, halves: bool, sums: Any, done: Any) -> Any:
    """Finds points, shift and scale of the b-th block of n weights; returns the scale, float32."""
    index, weight = done.index + n // 8 * b, done.weight + n * b
    done.scales[b], done.shifts[b] = _ZERO, 0
    for g in range(n // 8):
        index[g] = 0
    most = _ZERO
    for i in range(n):
        most = max(most, abs(x[i]))
    if most < (_EPS_M if halves else _EPS_S):
        return _ZERO
    sort(x, n, sums, done.order)
    add_up(x, n, weight, done.order, halves, sums)
    split = split_two(n, sums) if halves else split_one(n, sums)
    if split.first < 0:
        return _ZERO
    scale, shift = split.scale, split.shift
    for j in range(n):
        found = (j >= split.first) + (j >= split.second)
        done.levels[done.order[j]] = 2 - found if scale < 0 else found
    if scale < 0:
        scale = -scale
        shift = (3 if halves else 1) - shift
    done.shifts[b] = shift
    done.scales[b] = _choose(x, n, weight, table, halves, scale, shift, done.levels, index)
    return done.scales[b]


@compiled
def _shift(halves: bool, shift: int, g: int) -> Any:
    """Returns what is added to the levels of a block's g-th point, float32."""
    down = (shift >> (1 - g)) & 1 if halves else shift
    return -_EIGHTH if down else _EIGHTH


@compiled
def _choose(
    x: Any, n: int, weight: Any, table: Any, halves: bool, scale: Any, shift: int, levels: Any, index: Any
) -> Any:  # fmt: skip
    """Writes the points of a block; returns its scale, float32."""
    moved = False
    for g in range(n // 8):
        key = 0
        for i in range(7, -1, -1):
            key = key * 3 + levels[8 * g + i]
        point = int(table.where[key])
        if point < 0:
            moved = True
            point = nearest8(table, point, x + 8 * g, weight + 8 * g, scale, _shift(halves, shift, g))
        index[g] = point
    if moved:
        sx, s2 = _ZERO, _ZERO
        for g in range(n // 8):
            up = _shift(halves, shift, g)
            for i in range(8):
                q = table.points[8 * index[g] + i] + up
                sx += weight[8 * g + i] * q * x[8 * g + i]
                s2 += weight[8 * g + i] * q * q
        if sx > 0 and s2 > 0:
            return sx / s2
    return scale


@compiled
def _write_s(most: Any, done: Any, block: Any) -> None:
    """0: scale; 2..33: low bytes of indices; 34..49: per 32 weights four times 3 high bits, 3 of scale, 1 of shift."""
    unit = most / _UNITS
    half = int(to_half(unit * _FUDGE_S)) if most > 0 else 0
    block[0], block[1] = half & 255, half >> 8
    for b in range(8):
        word = 0
        for g in range(4):
            block[2 + 4 * b + g] = done.index[4 * b + g] & 255
            word |= done.index[4 * b + g] >> 8 << 3 * g
        if most > 0:
            word |= int(level(_ONE / unit * done.scales[b], _TOP_CODE)) << 12 | done.shifts[b] << 15
        block[34 + 2 * b], block[35 + 2 * b] = word & 255, word >> 8


@compiled
def _write_m(x: Any, most: Any, table: Any, done: Any, block: Any) -> None:
    """0..31: low bytes of indices; 32..47: per point 3 high bits and 1 of shift; 48..55: four words.

    Each word has four 3-bit scales, and on top four bits of the float16 that multiplies them all. That one is fitted
    once more, to the points and rounded scales.
    """
    for g in range(32):
        block[g] = done.index[g] & 255
    for b in range(16):
        block[32 + b] = done.index[2 * b] >> 8 | done.index[2 * b + 1] >> 8 << 4
    for i in range(48, 56):
        block[i] = 0
    if not most > 0:
        return
    unit = most / _UNITS
    inverse = _ONE / unit
    sx, s2 = _ZERO, _ZERO
    for b in range(16):
        code = int(level(inverse * done.scales[b], _TOP_CODE))
        word = code << 3 * (b % 4)
        at = 48 + 2 * (b // 4)
        block[at] |= word & 255
        block[at + 1] |= word >> 8
        block[32 + b] |= (done.shifts[b] >> 1) << 3 | (done.shifts[b] & 1) << 7
        for i in range(16):
            up = _shift(True, done.shifts[b], i // 8)
            q = (table.points[8 * done.index[2 * b + i // 8] + i % 8] + up) * np.float32(2 * code + 1)
            cost = done.weight[16 * b + i] * q
            sx += cost * x[16 * b + i]
            s2 += cost * q
    if s2 > 0:
        unit = sx / s2
    half = int(to_half(unit * _FUDGE_M))
    for i in range(4):
        block[49 + 2 * i] |= (half >> (4 * i) & 15) << 4
