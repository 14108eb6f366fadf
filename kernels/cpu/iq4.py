"""Encoders of IQ4_NL and IQ4_XS: blocks of 32 levels on an uneven table of 16 values.

Which of two neighbours is nearer is decided by halfway points: they are exact in float32, and so are the differences
that llama.cpp compares close to them, hence both decide alike. A value halfway belongs to the upper one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from quantize.kernels.cpu import packing, search
from quantize.kernels.cpu.lean import lean, pick
from quantize.kernels.cpu.search import LANES, SCALE, TILE, TINY, nearest

_BLOCK, _SUPER = 32, 256
_ZERO, _ONE, _TWO, _LOWEST = np.float32(0), np.float32(1), np.float32(2), np.float32(-127)
# Rows of the searches' `state` beside SCALE.
_BEST, _NEXT, _LARGEST, _TRY, _QX, _QQ = (row * LANES for row in (1, 2, 4, 5, 6, 7))

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def encode_iq4_nl(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to IQ4_NL."""
    _encode(x.reshape(-1), importance, out.reshape(-1), False, search.workspace(), np.empty(_BLOCK, np.uint8))


def encode_iq4_xs(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to IQ4_XS."""
    _encode(x.reshape(-1), importance, out.reshape(-1), True, search.workspace(), np.empty(_BLOCK, np.uint8))


@lean
def _value(v: Any) -> Any:
    """Returns the entry of `VALUES` nearest to a float32, as float32."""
    q = _LOWEST
    q = pick(v >= np.float32(-115.5), np.float32(-104), q)
    q = pick(v >= np.float32(-93.5), np.float32(-83), q)
    q = pick(v >= np.float32(-74), np.float32(-65), q)
    q = pick(v >= np.float32(-57), np.float32(-49), q)
    q = pick(v >= np.float32(-42), np.float32(-35), q)
    q = pick(v >= np.float32(-28.5), np.float32(-22), q)
    q = pick(v >= np.float32(-16), np.float32(-10), q)
    q = pick(v >= np.float32(-4.5), np.float32(1), q)
    q = pick(v >= np.float32(7), np.float32(13), q)
    q = pick(v >= np.float32(19), np.float32(25), q)
    q = pick(v >= np.float32(31.5), np.float32(38), q)
    q = pick(v >= np.float32(45.5), np.float32(53), q)
    q = pick(v >= np.float32(61), np.float32(69), q)
    q = pick(v >= np.float32(79), np.float32(89), q)
    return pick(v >= np.float32(101), np.float32(113), q)


_HALFWAY = tuple(np.float32((a + b) / 2) for a, b in pairwise(VALUES))


@lean
def _choose(x: Any, inverse: Any, levels: Any) -> None:
    """Sets the levels of 32 weights."""
    for i in range(_BLOCK):
        levels[i] = 0
    for half in _HALFWAY:
        for i in range(_BLOCK):
            levels[i] += x[i] * inverse >= half


@lean
def _encode(x: Any, importance: Any, out: Any, super_blocks: bool, space: Any, levels: Any) -> None:
    tile, weights, _, _, _, state, variance = space
    for start in range(0, x.size, TILE):
        count = min(LANES, (x.size - start) // _BLOCK)
        search.load(x, start, count, _BLOCK, x.size, tile)
        if importance.size > 0:
            search.load(importance, start, count, _BLOCK, importance.size, weights)
            _variances(x, start, count, _SUPER if super_blocks else _BLOCK, variance)
            search.weigh_importance(tile, _BLOCK, weights, variance)
        else:
            search.weigh_square(tile, _BLOCK, weights)
        _search(tile, weights, state)
        if super_blocks:
            for b in range(count // 8):
                part = x[start + b * _SUPER : start + (b + 1) * _SUPER]
                _finish_super(part, state[SCALE + 8 * b : SCALE + 8 * b + 8], levels, out, (start // _SUPER + b) * 136)
        else:
            for k in range(count):
                scale, at = state[SCALE + k], (start // _BLOCK + k) * 18
                packing.put_half(scale, out, at)
                inverse = _ONE / scale if scale != _ZERO else _ZERO
                _choose(x[start + k * _BLOCK : start + (k + 1) * _BLOCK], inverse, levels)
                packing.pack_nibbles(levels, 16, out, at + 2)


@lean
def _variances(x: Any, start: int, count: int, size: int, variance: Any) -> None:
    """Sets each lane's variance: twice the mean square of its super-block of `size` weights."""
    per = size // _BLOCK
    for b in range(count // per):
        total = _ZERO
        for v in x[start + b * size : start + (b + 1) * size]:
            total += v * v
        variance[b * per : (b + 1) * per] = total * (_TWO / np.float32(size))


@lean
def _search(x: Any, w: Any, state: Any) -> None:
    """Sets SCALE of each lane by weighted least squares over 16 candidates; 0 for a block of zeros."""
    search.find_largest(x, _BLOCK, state[_LARGEST : _LARGEST + LANES])
    for k in range(LANES):
        state[_TRY + k] = _ONE / (-state[_LARGEST + k] / _LOWEST)
    _sums(x, w, state)
    for k in range(LANES):
        qx, qq = state[_QX + k], state[_QQ + k]
        scale = pick(qq > _ZERO, qx / qq, _ZERO)
        state[SCALE + k], state[_BEST + k] = scale, scale * qx
    for t in range(-7, 8):
        for k in range(LANES):
            state[_TRY + k] = (np.float32(t) + _LOWEST) / state[_LARGEST + k]
        _sums(x, w, state)
        for k in range(LANES):
            qx, qq = state[_QX + k], state[_QQ + k]
            better = (qq > _ZERO) & (qx * qx > state[_BEST + k] * qq)
            scale = qx / qq
            state[_NEXT + SCALE + k] = pick(better, scale, state[SCALE + k])
            state[_NEXT + _BEST + k] = pick(better, scale * qx, state[_BEST + k])
        for k in range(2 * LANES):
            state[k] = state[_NEXT + k]
    for k in range(LANES):
        if abs(state[_LARGEST + k]) < TINY:
            state[SCALE + k] = _ZERO


@lean
def _sums(x: Any, w: Any, state: Any) -> None:
    for k in range(LANES):
        state[_QX + k] = state[_QQ + k] = _ZERO
    for i in range(0, TILE, 4 * LANES):
        for k in range(LANES):
            inverse, a, b = state[_TRY + k], state[_QX + k], state[_QQ + k]
            for j in range(0, 4 * LANES, LANES):
                v = x[i + j + k]
                q = _value(inverse * v)
                wq = w[i + j + k] * q
                a += wq * v
                b += wq * q
            state[_QX + k], state[_QQ + k] = a, b


@lean
def _finish_super(x: Any, scales: Any, levels: Any, out: Any, at: int) -> None:
    """Rounds the scales of 8 blocks to 6 bits, chooses the levels for them (not for the float16), and packs."""
    largest = _ZERO
    for j in range(8):
        largest = scales[j] if abs(scales[j]) > abs(largest) else largest
    d = -largest / np.float32(32)
    packing.put_half(d, out, at)
    inverse = _ONE / d if d != _ZERO else _ZERO
    high = 0
    for j in range(8):
        code = min(max(np.int64(nearest(inverse * scales[j])), -32), 31)
        scale = d * np.float32(code)
        _choose(x[_BLOCK * j : _BLOCK * (j + 1)], _ONE / scale if scale != _ZERO else _ZERO, levels)
        packing.pack_nibbles(levels, 16, out, at + 8 + 16 * j)
        code += 32
        high |= code >> 4 << 2 * j
        if j % 2 == 0:
            out[at + 4 + j // 2] = code & 15
        else:
            out[at + 4 + j // 2] |= (code & 15) << 4
    out[at + 2], out[at + 3] = high & 255, high >> 8
