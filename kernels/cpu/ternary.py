"""Encoders of the types of one to two bits without a search: Q1_0, Q2_0, TQ1_0, TQ2_0."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu import packing
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.simple import largest_bits, round_away

_ZERO, _ONE = np.float32(0), np.float32(1)
_SUPER = 256


def encode_q1_0(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q1_0: sign and mean size."""
    _encode_q1_0(x.reshape(-1), out.reshape(-1))


def encode_q2_0(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q2_0: -1, 0 or 1 times the largest size (the code for 2 is not used)."""
    flat = x.reshape(-1)
    _encode_q2_0(flat, flat.view(np.int32), out.reshape(-1), np.empty(64, np.uint8))


def encode_tq1_0(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to TQ1_0: -1, 0 or 1 times the largest size, five to a byte."""
    flat = x.reshape(-1)
    _encode_ternary(flat, flat.view(np.int32), out.reshape(-1), True, np.empty(_SUPER, np.uint8))


def encode_tq2_0(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to TQ2_0: -1, 0 or 1 times the largest size, four to a byte."""
    flat = x.reshape(-1)
    _encode_ternary(flat, flat.view(np.int32), out.reshape(-1), False, np.empty(_SUPER, np.uint8))


@compiled
def _encode_q1_0(x: Any, out: Any) -> None:
    for at in range(0, x.size, 128):
        total = _ZERO
        for i in range(128):
            total += abs(x[at + i])
        to = at // 128 * 18
        packing.put_half(total / np.float32(128), out, to)
        for byte in range(16):
            bits = np.int64(0)
            for i in range(8):
                bits |= np.int64(x[at + 8 * byte + i] >= _ZERO) << i
            out[to + 2 + byte] = bits


@compiled
def _inverse(d: Any) -> Any:
    """Returns 1 / d, or 0 where that is not finite."""
    inverse = _ONE / d if d > _ZERO else _ZERO
    return _ZERO if np.isinf(inverse) else inverse


@compiled
def _encode_q2_0(x: Any, bits: Any, out: Any, levels: Any) -> None:
    for at in range(0, x.size, 64):
        d = np.int32(largest_bits(bits, at, 64)).view(np.float32)
        inverse, to = _inverse(d), at // 64 * 18
        middle = np.int32(0 if d > _ZERO and inverse == _ZERO else 1)
        packing.put_half(d, out, to)
        block = x[at : at + 64]
        for i in range(64):
            levels[i] = np.int32(round_away(block[i] * inverse)) + middle
        for i in range(16):
            low = levels[4 * i] | (levels[4 * i + 1] << 2)
            out[to + 2 + i] = low | (levels[4 * i + 2] << 4) | (levels[4 * i + 3] << 6)


@compiled
def _encode_ternary(x: Any, bits: Any, out: Any, fives: bool, levels: Any) -> None:
    nbytes = 54 if fives else 66
    for at in range(0, x.size, _SUPER):
        d = np.int32(largest_bits(bits, at, _SUPER)).view(np.float32)
        inverse, to = _inverse(d), at // _SUPER * nbytes
        block = x[at : at + _SUPER]
        for i in range(_SUPER):
            levels[i] = np.int32(round_away(block[i] * inverse)) + np.int32(1)
        packing.put_half(d, out, to + nbytes - 2)
        if fives:
            _pack_digits(levels, 32, 5, out, to)
            _pack_digits(levels[160:], 16, 5, out, to + 32)
            _pack_digits(levels[240:], 4, 4, out, to + 48)
        else:
            packing.pack_pairs(levels, out, to)


@compiled
def _pack_digits(levels: Any, width: int, digits: int, out: Any, at: int) -> None:
    """Packs base-3 digits, `width` apart: as 256 / 243 of their value, so that a reader gets them by multiplying."""
    for i in range(width):
        value = np.int32(0)
        for n in range(digits):
            value = np.int32(3 * value + levels[n * width + i])
        if digits == 4:
            value = np.int32(3 * value)
        out[at + i] = np.int32(256 * value + 242) // np.int32(243)
