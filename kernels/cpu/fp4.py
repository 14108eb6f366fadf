"""Encoders of MXFP4 and NVFP4: 4-bit floats (E2M1, stored as their doubles) with a power of two or an E4M3 scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from quantize.kernels.cpu import packing
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.simple import largest_bits

_ZERO, _ONE = np.float32(0), np.float32(1)
_SIZES = tuple(np.float32(v) for v in (0, 1, 2, 3, 4, 6, 8, 12))


def encode_mxfp4(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to MXFP4."""
    flat = x.reshape(-1)
    _encode_mxfp4(flat, flat.view(np.int32), out.reshape(-1), np.empty(32, np.uint8))


def encode_nvfp4(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to NVFP4."""
    flat = x.reshape(-1)
    _encode_nvfp4(flat, flat.view(np.int32), out.reshape(-1), np.empty(16, np.uint8))


@compiled
def power(code: Any) -> Any:
    """Returns half the scale that an E8M0 byte stands for."""
    return np.int32(0x200000 << code if code < 2 else (code - 1) << 23).view(np.float32)


@compiled
def small_float(code: Any) -> Any:
    """Returns half the scale that an E4M3 byte (no sign) stands for; 0 for NaN, as readers have it."""
    exponent, mantissa = code >> 3 & 15, np.float32(code & 7)
    if code == 0x7F:
        return _ZERO
    if exponent == 0:
        return mantissa * np.float32(2.0**-10)
    return (_ONE + mantissa / np.float32(8)) * np.int32((exponent - 8 + 127) << 23).view(np.float32)


@compiled
def _small_float_code(value: Any) -> Any:
    """Returns the E4M3 byte of a scale: to nearest with halves up, at most 448; small ones as whole multiples."""
    if not value > _ZERO:
        return 0
    bits = np.int64(np.float32(min(value, np.float32(448))).view(np.int32))
    exponent = (bits >> 23) - 120
    if exponent <= 0:
        return min(np.int64(value * np.float32(512) + np.float32(0.5)), 7)
    code = (exponent << 3) + ((bits >> 20) & 7) + ((bits >> 19) & 1)
    return 0x7E if code >= 120 else code  # from 256 on there is only 448


@compiled
def _choose(x: Any, at: int, count: int, d: Any, levels: Any) -> None:
    """Sets the codes of `count` weights: the nearest value, the smaller of two; a zero has no sign."""
    block = x[at : at + count]
    for i in range(count):
        v = block[i]
        size, code = abs(v), np.int32(0)
        best = size
        for k in range(1, 8):
            error = abs(_SIZES[k] * d - size)
            code = np.int32(k) if error < best else code
            best = error if error < best else best
        levels[i] = code | 8 if (v < _ZERO) & (code > 0) else code


@compiled
def _encode_mxfp4(x: Any, bits: Any, out: Any, levels: Any) -> None:
    for at in range(0, x.size, 32):
        largest = np.int32(largest_bits(bits, at, 32)).view(np.float32)
        code = 0
        if largest > _ZERO:
            # In float32 the logarithm just below a power of two can be that power's.
            code = math.floor(np.float32(math.log2(np.float64(largest)))) + 125 & 255
            code = 0 if code == 255 else code  # that would be NaN; only below 2**-125
        to = at // 32 * 17
        out[to] = code
        _choose(x, at, 32, power(code), levels)
        packing.pack_nibbles(levels, 16, out, to + 1)


@compiled
def _encode_nvfp4(x: Any, bits: Any, out: Any, levels: Any) -> None:
    for at in range(0, x.size, 16):
        code = _small_float_code(np.int32(largest_bits(bits, at, 16)).view(np.float32) / np.float32(6))
        to, part = at // 64 * 36, at % 64 // 16
        out[to + part] = code
        _choose(x, at, 16, small_float(code), levels)
        packing.pack_nibbles(levels, 8, out, to + 4 + 8 * part)
