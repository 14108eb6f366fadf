"""Encoders of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 weights with one scale and perhaps one offset.

Without importance a block is one pass over memory. Minima and maxima are taken of the bits as integers, since the
compiler may not reorder those of floats; equal sizes are then told apart in llama.cpp's order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu import packing, search
from quantize.kernels.cpu.numeric import MAGIC, compiled
from quantize.kernels.cpu.search import BASE, INVERSE, LANES, LOW, SCALE, STATE, TILE, level

_BLOCK = 32
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_SIGN = np.int32(-0x80000000)
_REST = np.int32(0x7FFFFFFF)


def encode_q4_0(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q4_0."""
    _encode(x, importance, out, False, 4)


def encode_q4_1(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q4_1."""
    _encode(x, importance, out, True, 4)


def encode_q5_0(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q5_0."""
    _encode(x, importance, out, False, 5)


def encode_q5_1(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q5_1."""
    _encode(x, importance, out, True, 5)


def encode_q8_0(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q8_0."""
    flat = x.reshape(-1)
    _encode_q8_0(flat, flat.view(np.int32), out.reshape(-1))


def _encode(x: Any, importance: Any, out: Any, offset: bool, bits: int) -> None:
    if importance.size:
        _encode_weighted(x, importance, out.reshape(-1), offset, bits)
        return
    flat = x.reshape(-1)
    plain = _encode_offset if offset else _encode_signed
    plain(flat, flat.view(np.int32), out.reshape(-1), bits)


@compiled
def largest_bits(bits: Any, at: int, count: int) -> Any:
    """Returns the bits of the largest |x| of a block, given the bits of all x as int32."""
    most = np.int32(0)
    for i in range(count):
        size = np.int32(bits[at + i] & _REST)
        most = size if size > most else most
    return most


@compiled
def round_away(value: Any) -> Any:
    """Returns a float32 below 2**22 rounded to a whole number, halves away from zero."""
    size = abs(value)
    whole = (size + MAGIC) - MAGIC
    whole = whole + _ONE if size - whole == _HALF else whole
    return -whole if value < _ZERO else whole


@compiled
def _encode_signed(x: Any, bits: Any, out: Any, width: int) -> None:
    """Encodes to Q4_0 or Q5_0: the weight of largest size gets the lowest level."""
    nbytes, levels = 2 + 4 * width, np.empty(_BLOCK, np.uint8)
    middle, top = np.float32((1 << width - 1) + 0.5), np.int32((1 << width) - 1)
    for at in range(0, x.size, _BLOCK):
        d = _signed_largest(x, bits, at) / -np.float32(1 << width - 1)
        inverse, shift = _ONE / d if d != _ZERO else _ZERO, middle
        if np.isinf(inverse):  # the levels are 0 then
            inverse, shift = _ZERO, _ZERO
        for i in range(_BLOCK):
            q = np.int32(x[at + i] * inverse + shift)
            levels[i] = q if q < top else top
        to = at // _BLOCK * nbytes
        packing.put_half(d, out, to)
        if width == 5:
            packing.pack_fifth_bits(levels, out, to + 2)
        packing.pack_nibbles(levels, 16, out, to + nbytes - 16)


@compiled
def _signed_largest(x: Any, bits: Any, at: int) -> Any:
    """Returns the weight of largest size in a block, the first of several; +0 if all are zero."""
    above, below = _SIGN, _SIGN
    for i in range(_BLOCK):
        value = bits[at + i]
        above = value if value > above else above
        value = np.int32(value ^ _SIGN)
        below = value if value > below else below
    if above > below:
        return np.int32(above).view(np.float32)
    if below > above:
        return -np.int32(below).view(np.float32) + _ZERO
    for i in range(_BLOCK):
        if np.int32(bits[at + i] & _REST) == above:
            return x[at + i]
    return _ZERO


@compiled
def _encode_offset(x: Any, bits: Any, out: Any, width: int) -> None:
    """Encodes to Q4_1 or Q5_1: the grid spans the block."""
    nbytes, levels = 4 + 4 * width, np.empty(_BLOCK, np.uint8)
    top = np.int32((1 << width) - 1)
    for at in range(0, x.size, _BLOCK):
        low, high = _extremes(x, bits, at)
        d = (high - low) / np.float32(top)
        inverse = _ONE / d if d != _ZERO else _ZERO
        if np.isinf(inverse):
            inverse = _ZERO
        for i in range(_BLOCK):
            q = np.int32((x[at + i] - low) * inverse + _HALF)
            levels[i] = q if q < top else top
        to = at // _BLOCK * nbytes
        packing.put_half(d, out, to)
        packing.put_half(low, out, to + 2)
        if width == 5:
            packing.pack_fifth_bits(levels, out, to + 4)
        packing.pack_nibbles(levels, 16, out, to + nbytes - 16)


@compiled
def _extremes(x: Any, bits: Any, at: int) -> Any:
    """Returns least and greatest weight of a block; a least of zero has the sign of the first zero."""
    least, most = _REST, _SIGN
    for i in range(_BLOCK):
        value = bits[at + i]
        value = np.int32(value ^ np.int32(np.int32(value >> 31) & _REST))  # in the order of the floats
        least = value if value < least else least
        most = value if value > most else most
    low = np.int32(least ^ np.int32(np.int32(least >> 31) & _REST)).view(np.float32)
    high = np.int32(most ^ np.int32(np.int32(most >> 31) & _REST)).view(np.float32) + _ZERO
    if low == _ZERO:
        for i in range(_BLOCK):
            if x[at + i] == _ZERO:
                return x[at + i], high
    return low, high


@compiled
def _encode_q8_0(x: Any, bits: Any, out: Any) -> None:
    for at in range(0, x.size, _BLOCK):
        d = np.int32(largest_bits(bits, at, _BLOCK)).view(np.float32) / np.float32(127)
        inverse = _ONE / d if d != _ZERO else _ZERO
        if np.isinf(inverse):
            inverse = _ZERO
        to = at // _BLOCK * 34
        packing.put_half(d, out, to)
        for i in range(_BLOCK):
            out[to + 2 + i] = np.int32(round_away(x[at + i] * inverse))


@compiled
def _encode_weighted(x: Any, importance: Any, out: Any, offset: bool, width: int) -> None:
    """Encodes to any of the four, by weighted least squares; the variance in the weights is that of the whole row."""
    rows, cols = x.shape
    flat, spread = x.reshape(-1), np.empty(rows, np.float32)
    for row in range(rows):
        total = _ZERO
        for v in x[row]:
            total += v * v
        spread[row] = total / np.float32(cols)
    tile, weights, work = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    state, variance, levels = np.empty(STATE, np.float32), np.zeros(LANES, np.float32), np.empty(_BLOCK, np.uint8)
    nbytes = (4 if offset else 2) + 4 * width
    top = np.float32((1 << width) - 1) if offset else np.float32(1 << width - 1)
    for start in range(0, flat.size, TILE):
        count = min(LANES, (flat.size - start) // _BLOCK)
        search.load(flat, start, count, _BLOCK, flat.size, tile)
        search.load(importance, start, count, _BLOCK, cols, weights)
        for k in range(count):
            variance[k] = spread[(start + k * _BLOCK) // cols]
        search.weigh_importance(tile, _BLOCK, weights, variance)
        if offset:
            first, step = np.float32(-0.9), np.float32(0.05)
            search.search_offset(tile, weights, work, _BLOCK, top, first, step, 36, False, state)
        else:
            search.search_signed(tile, weights, work, _BLOCK, top, state)
        for k in range(count):
            to, part = (start // _BLOCK + k) * nbytes, flat[start + k * _BLOCK : start + (k + 1) * _BLOCK]
            packing.put_half(state[SCALE + k], out, to)
            if offset:
                packing.put_half(state[LOW + k], out, to + 2)
            _levels(part, state[INVERSE + k], state[BASE + k], top, offset, levels)
            if width == 5:
                packing.pack_fifth_bits(levels, out, to + nbytes - 20)
            packing.pack_nibbles(levels, 16, out, to + nbytes - 16)


@compiled
def _levels(x: Any, inverse: Any, base: Any, top: Any, offset: bool, levels: Any) -> None:
    if offset:
        for i in range(_BLOCK):
            levels[i] = np.int32(level(inverse * (x[i] - base), _ZERO, top))
    elif inverse != _ZERO:
        for i in range(_BLOCK):
            levels[i] = np.int32(level(inverse * x[i], -top, top - _ONE) + top)
    else:
        for i in range(_BLOCK):
            levels[i] = 0
