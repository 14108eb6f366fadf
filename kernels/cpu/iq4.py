"""Encoders of IQ4_NL and IQ4_XS: blocks of 32 levels on an uneven table of 16 values.

Which of two neighbours is nearer is decided by halfway points: they are exact in float32, and so are the differences
that llama.cpp compares close to them, hence both decide alike. A value halfway belongs to the upper one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from quantize.kernels.cpu import packing
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import pick
from quantize.kernels.cpu.tiles import (
    LANES,
    ONE,
    SCALE,
    TILE,
    TINY,
    ZERO,
    find_largest,
    load,
    load_importance,
    mean_squares,
    nearest,
    parts,
    weigh_square,
    workspace,
)

_BLOCK, _SUPER = 32, 256
_LOWEST = np.float32(-127)
# Rows of the searches' `state` beside SCALE.
_BEST, _NEXT, _LARGEST, _TRY, _QX, _QQ = (row * LANES for row in (1, 2, 4, 5, 6, 7))

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def encode_iq4_nl(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to IQ4_NL."""
    _encode(x, importance, out, _BLOCK)


def encode_iq4_xs(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to IQ4_XS."""
    _encode(x, importance, out, _SUPER)


@compiled
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


@compiled
def _choose(x: Any, inverse: Any, levels: Any) -> None:
    """Sets the levels of 32 weights."""
    for i in range(_BLOCK):
        levels[i] = 0
    for half in _HALFWAY:
        for i in range(_BLOCK):
            levels[i] += x[i] * inverse >= half


def _encode(x: Any, importance: Any, out: Any, size: int) -> None:
    space, levels = workspace(), np.empty(_BLOCK, np.uint8)
    for part, to in parts(x, out):
        scales, variance = np.empty(part.size // _BLOCK, np.float32), np.empty(part.size // size, np.float32)
        mean_squares(part, size, np.float32(2), variance)
        _scan(part, importance, variance, size, space, scales)
        if size == _SUPER:
            _finish_super(part, scales, to, levels)
        else:
            _finish(part, scales, to, levels)


@compiled
def _scan(x: Any, importance: Any, variance: Any, size: int, space: Any, scales: Any) -> None:
    """Sets the scale of each block; arguments as for `signed.scan_signed`."""
    tile, weights, _, _, _, state, spread = space
    for start in range(0, x.size, TILE):
        count = min(LANES, (x.size - start) // _BLOCK)
        load(x, start, count, _BLOCK, x.size, tile)
        if importance.size > 0:
            load_importance(importance, variance, size, start, count, _BLOCK, tile, weights, spread)
        else:
            weigh_square(tile, _BLOCK, weights)
        _search(tile, weights, state)
        for k in range(count):
            scales[start // _BLOCK + k] = state[SCALE + k]


@compiled
def _search(x: Any, w: Any, state: Any) -> None:
    """Sets SCALE of each lane by weighted least squares over 16 candidates; 0 for a block of zeros."""
    find_largest(x, _BLOCK, state[_LARGEST : _LARGEST + LANES])
    for k in range(LANES):
        state[_TRY + k] = ONE / (-state[_LARGEST + k] / _LOWEST)
    _sums(x, w, state)
    for k in range(LANES):
        qx, qq = state[_QX + k], state[_QQ + k]
        scale = pick(qq > ZERO, qx / qq, ZERO)
        state[SCALE + k], state[_BEST + k] = scale, scale * qx
    for t in range(-7, 8):
        for k in range(LANES):
            state[_TRY + k] = (np.float32(t) + _LOWEST) / state[_LARGEST + k]
        _sums(x, w, state)
        for k in range(LANES):
            qx, qq = state[_QX + k], state[_QQ + k]
            better = (qq > ZERO) & (qx * qx > state[_BEST + k] * qq)
            scale = qx / qq
            state[_NEXT + SCALE + k] = pick(better, scale, state[SCALE + k])
            state[_NEXT + _BEST + k] = pick(better, scale * qx, state[_BEST + k])
        for k in range(2 * LANES):
            state[k] = state[_NEXT + k]
    for k in range(LANES):
        if abs(state[_LARGEST + k]) < TINY:
            state[SCALE + k] = ZERO


@compiled
def _sums(x: Any, w: Any, state: Any) -> None:
    for k in range(LANES):
        state[_QX + k] = state[_QQ + k] = ZERO
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


@compiled
def _finish(x: Any, scales: Any, out: Any, levels: Any) -> None:
    """Stores scales and the levels for them (not for the float16)."""
    for b in range(x.size // _BLOCK):
        packing.put_half(scales[b], out, 18 * b)
        inverse = ONE / scales[b] if scales[b] != ZERO else ZERO
        _choose(x[b * _BLOCK : (b + 1) * _BLOCK], inverse, levels)
        packing.pack_nibbles(levels, 16, out, 18 * b + 2)


@compiled
def _finish_super(x: Any, scales: Any, out: Any, levels: Any) -> None:
    """Rounds the scales of 8 blocks to 6 bits, and stores them and the levels for them (not for the float16)."""
    for b in range(x.size // _SUPER):
        at, largest = 136 * b, ZERO
        for j in range(8 * b, 8 * b + 8):
            largest = scales[j] if abs(scales[j]) > abs(largest) else largest
        d = -largest / np.float32(32)
        packing.put_half(d, out, at)
        inverse = ONE / d if d != ZERO else ZERO
        high, low = 0, 0
        for j in range(8):
            code: Any = min(max(np.int64(nearest(inverse * scales[8 * b + j])), -32), 31)
            scale, first = d * np.float32(code), b * _SUPER + j * _BLOCK
            _choose(x[first : first + _BLOCK], ONE / scale if scale != ZERO else ZERO, levels)
            packing.pack_nibbles(levels, 16, out, at + 8 + 16 * j)
            high |= code + 32 >> 4 << 2 * j
            low |= (code & 15) << 4 * j
        out[at + 2], out[at + 3] = high & 255, high >> 8
        for j in range(4):
            out[at + 4 + j] = low >> 8 * j & 255
