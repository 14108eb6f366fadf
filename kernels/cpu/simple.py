"""Encoders of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 weights with one scale and perhaps one offset.

Without importance a block is one pass over memory. Minima and maxima are taken of the bits as integers, since those of
floats may not be reordered; equal sizes are then told apart in llama.cpp's order. The length of a block comes as an
argument, since loops of a known length of 32 are unrolled before they could be vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu import packing
from quantize.kernels.cpu.lanes import bit_extremes
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import MAGIC
from quantize.kernels.cpu.offsets import scan_offset
from quantize.kernels.cpu.signed import scan_signed
from quantize.kernels.cpu.tiles import ONE, ZERO, level, mean_squares, parts, room_for_results, workspace

_BLOCK = 32
_HALF = np.float32(0.5)
_PLAN = np.array((-0.9, 0.05, 36), np.float32)  # see `scan_offset`
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
        _encode_weighted(x, importance, out, offset, bits)
        return
    flat = x.reshape(-1)
    plain = _encode_offset if offset else _encode_signed
    plain(flat, flat.view(np.int32), out.reshape(-1), bits, _BLOCK)


@compiled
def largest_bits(bits: Any, at: int, count: int) -> Any:
    """Returns the bits of the largest |x| of a block, given the bits of all x as int32."""
    most, block = np.int32(0), bits[at : at + count]
    for i in range(count):
        size = np.int32(block[i] & _REST)
        most = size if size > most else most
    return most


@compiled
def round_away(value: Any) -> Any:
    """Returns a float32 below 2**22 rounded to a whole number, halves away from zero."""
    size = abs(value)
    whole = (size + MAGIC) - MAGIC
    whole = whole + ONE if size - whole == _HALF else whole
    return -whole if value < ZERO else whole


@compiled
def _encode_signed(x: Any, bits: Any, out: Any, width: int, length: int) -> None:
    """Encodes to Q4_0 or Q5_0: the weight of largest size gets the lowest level."""
    nbytes, middle = 2 + 4 * width, np.float32((1 << width - 1) + 0.5)
    for at in range(0, x.size, length):
        block, to = x[at : at + length], at // length * nbytes
        d = _signed_largest(block, bits[at : at + length]) / -np.float32(1 << width - 1)
        inverse, shift = ONE / d if d != ZERO else ZERO, middle
        if np.isinf(inverse):  # the levels are 0 then
            inverse, shift = ZERO, ZERO
        packing.put_half(d, out, to)
        _put_levels(block, ZERO, inverse, shift, width, out[to + 2 : to + nbytes])


@compiled
def _signed_largest(x: Any, bits: Any) -> Any:
    """Returns the weight of largest size in a block, the first of several; +0 if all are zero."""
    above, below, _ = bit_extremes(bits)
    if above > below:
        return np.int32(above).view(np.float32)
    if below > above:
        return -np.int32(below).view(np.float32) + ZERO
    for i in range(x.size):
        if np.int32(bits[i] & _REST) == above:
            return x[i]
    return ZERO


@compiled
def _encode_offset(x: Any, bits: Any, out: Any, width: int, length: int) -> None:
    """Encodes to Q4_1 or Q5_1: the grid spans the block."""
    nbytes, top = 4 + 4 * width, np.float32((1 << width) - 1)
    for at in range(0, x.size, length):
        block, to = x[at : at + length], at // length * nbytes
        low, high = _extremes(block, bits[at : at + length])
        d = (high - low) / top
        inverse = ONE / d if d != ZERO else ZERO
        if np.isinf(inverse):
            inverse = ZERO
        packing.put_half(d, out, to)
        packing.put_half(low, out, to + 2)
        _put_levels(block, low, inverse, _HALF, width, out[to + 4 : to + nbytes])


@compiled
def _extremes(x: Any, bits: Any) -> Any:
    """Returns least and greatest weight of a block; a least of zero has the sign of the first zero."""
    above, below, least = bit_extremes(bits)
    # As integers, negative floats are below all others, and the further from zero the greater.
    high = np.int32(above if above >= 0 else least).view(np.float32) + ZERO
    low = -np.int32(below).view(np.float32) if below >= 0 else np.int32(least).view(np.float32)
    if low == ZERO:
        for i in range(x.size):
            if x[i] == ZERO:
                return x[i], high
    return low, high


@compiled
def _put_levels(x: Any, low: Any, inverse: Any, shift: Any, width: int, out: Any) -> None:
    """Stores the levels of (x - low) * inverse + shift, cut off below the point: fifth bits, if any, then nibbles."""
    half, top = x.size // 2, np.int32((1 << width) - 1)
    first, second = x[:half], x[half:]
    packed = out[out.size - half :]
    high = np.int64(0)
    if width == 5:
        for i in range(x.size):
            q = np.int32((x[i] - low) * inverse + shift)
            high |= np.int64(min(q, top) >> 4) << i
        for byte in range(4):
            out[byte] = high >> 8 * byte & 255
    for i in range(half):
        a, b = np.int32((first[i] - low) * inverse + shift), np.int32((second[i] - low) * inverse + shift)
        packed[i] = ((a if a < top else top) & 15) | ((b if b < top else top) << 4)


@compiled
def _encode_q8_0(x: Any, bits: Any, out: Any) -> None:
    for at in range(0, x.size, _BLOCK):
        d = np.int32(largest_bits(bits, at, _BLOCK)).view(np.float32) / np.float32(127)
        inverse = ONE / d if d != ZERO else ZERO
        if np.isinf(inverse):
            inverse = ZERO
        to = at // _BLOCK * 34
        packing.put_half(d, out, to)
        block, packed = x[at : at + _BLOCK], out[to + 2 : to + 34]
        for i in range(_BLOCK):
            packed[i] = np.int32(round_away(block[i] * inverse))


def _encode_weighted(x: Any, importance: Any, out: Any, offset: bool, width: int) -> None:
    """Encodes to any of the four, by weighted least squares; the variance in the weights is that of the whole row."""
    cols, space, levels = x.shape[1], workspace(), np.empty(_BLOCK, np.uint8)
    for part, to in parts(x, out):
        found, variance = room_for_results(part.size // _BLOCK), np.empty(part.size // cols, np.float32)
        mean_squares(part, cols, ONE, variance)
        if offset:
            scan_offset(part, importance, variance, cols, width, _PLAN, space, found)
        else:
            scan_signed(part, importance, variance, cols, _BLOCK, np.float32(1 << width - 1), space, found)
        _finish(part, found, to, offset, width, levels)


@compiled
def _finish(x: Any, found: Any, out: Any, offset: bool, width: int, levels: Any) -> None:
    """Stores scales, offsets and the levels that the search ended with."""
    scales, inverses, lows, bases, _ = found
    nbytes = (4 if offset else 2) + 4 * width
    top = np.float32((1 << width) - 1) if offset else np.float32(1 << width - 1)
    for b in range(x.size // _BLOCK):
        to, block = b * nbytes, x[b * _BLOCK : (b + 1) * _BLOCK]
        packing.put_half(scales[b], out, to)
        if offset:
            packing.put_half(lows[b], out, to + 2)
            for i in range(_BLOCK):
                levels[i] = np.int32(level(inverses[b] * (block[i] - bases[b]), ZERO, top))
        elif inverses[b] != ZERO:
            for i in range(_BLOCK):
                levels[i] = np.int32(level(inverses[b] * block[i], -top, top - ONE) + top)
        else:
            levels[:_BLOCK] = 0
        if width == 5:
            packing.pack_fifth_bits(levels, out, to + nbytes - 20)
        packing.pack_nibbles(levels, 16, out, to + nbytes - 16)
