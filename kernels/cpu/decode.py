"""Decoders of the types without a codebook; each follows the layout of its block byte by byte.

The order of operations is that of the gguf package, which is llama.cpp's: scale times code first, then the level, then
the offset.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu.fp4 import power, small_float
from quantize.kernels.cpu.iq4 import VALUES
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.packing import get_half, get_scale_pairs, get_signed_scale

_SUPER = 256
_VALUES = np.array(VALUES, np.float32)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def decode_q1_0(blocks: Any, out: Any) -> None:
    """Decodes rows of Q1_0."""
    _decode_q1_0(blocks.reshape(-1), out.reshape(-1))


def decode_q2_0(blocks: Any, out: Any) -> None:
    """Decodes rows of Q2_0."""
    _decode_q2_0(blocks.reshape(-1), out.reshape(-1))


def decode_q4_0(blocks: Any, out: Any) -> None:
    """Decodes rows of Q4_0."""
    _decode_legacy(blocks.reshape(-1), out.reshape(-1), 4, False)


def decode_q4_1(blocks: Any, out: Any) -> None:
    """Decodes rows of Q4_1."""
    _decode_legacy(blocks.reshape(-1), out.reshape(-1), 4, True)


def decode_q5_0(blocks: Any, out: Any) -> None:
    """Decodes rows of Q5_0."""
    _decode_legacy(blocks.reshape(-1), out.reshape(-1), 5, False)


def decode_q5_1(blocks: Any, out: Any) -> None:
    """Decodes rows of Q5_1."""
    _decode_legacy(blocks.reshape(-1), out.reshape(-1), 5, True)


def decode_q8_0(blocks: Any, out: Any) -> None:
    """Decodes rows of Q8_0."""
    flat = blocks.reshape(-1)
    _decode_q8_0(flat, flat.view(np.int8), out.reshape(-1))


def decode_mxfp4(blocks: Any, out: Any) -> None:
    """Decodes rows of MXFP4."""
    _decode_mxfp4(blocks.reshape(-1), out.reshape(-1))


def decode_nvfp4(blocks: Any, out: Any) -> None:
    """Decodes rows of NVFP4, without the tensor's own scale."""
    _decode_nvfp4(blocks.reshape(-1), out.reshape(-1))


def decode_tq1_0(blocks: Any, out: Any) -> None:
    """Decodes rows of TQ1_0."""
    _decode_tq1_0(blocks.reshape(-1), out.reshape(-1))


def decode_tq2_0(blocks: Any, out: Any) -> None:
    """Decodes rows of TQ2_0."""
    _decode_tq2_0(blocks.reshape(-1), out.reshape(-1))


def decode_q2_k(blocks: Any, out: Any) -> None:
    """Decodes rows of Q2_K."""
    _decode_q2_k(blocks.reshape(-1), out.reshape(-1))


def decode_q3_k(blocks: Any, out: Any) -> None:
    """Decodes rows of Q3_K."""
    _decode_q3_k(blocks.reshape(-1), out.reshape(-1))


def decode_q4_k(blocks: Any, out: Any) -> None:
    """Decodes rows of Q4_K."""
    _decode_q45_k(blocks.reshape(-1), out.reshape(-1), 4, np.empty(8, np.uint8), np.empty(8, np.uint8))


def decode_q5_k(blocks: Any, out: Any) -> None:
    """Decodes rows of Q5_K."""
    _decode_q45_k(blocks.reshape(-1), out.reshape(-1), 5, np.empty(8, np.uint8), np.empty(8, np.uint8))


def decode_q6_k(blocks: Any, out: Any) -> None:
    """Decodes rows of Q6_K."""
    flat = blocks.reshape(-1)
    _decode_q6_k(flat, flat.view(np.int8), out.reshape(-1))


def decode_iq4_nl(blocks: Any, out: Any) -> None:
    """Decodes rows of IQ4_NL."""
    _decode_iq4_nl(blocks.reshape(-1), out.reshape(-1))


def decode_iq4_xs(blocks: Any, out: Any) -> None:
    """Decodes rows of IQ4_XS."""
    _decode_iq4_xs(blocks.reshape(-1), out.reshape(-1))


@compiled
def _decode_q1_0(blocks: Any, out: Any) -> None:
    for b in range(out.size // 128):
        at, to = 18 * b, 128 * b
        d = get_half(blocks, at)
        for byte in range(16):
            bits = blocks[at + 2 + byte]
            for i in range(8):
                out[to + 8 * byte + i] = d if bits >> i & 1 else -d


@compiled
def _decode_q2_0(blocks: Any, out: Any) -> None:
    for b in range(out.size // 64):
        at, to = 18 * b, 64 * b
        d = get_half(blocks, at)
        for byte in range(16):
            bits = np.int32(blocks[at + 2 + byte])
            for i in range(4):
                out[to + 4 * byte + i] = d * np.float32((bits >> 2 * i & 3) - 1)


@compiled
def _decode_legacy(blocks: Any, out: Any, width: int, offset: bool) -> None:
    """Decodes Q4_0, Q4_1, Q5_0 or Q5_1."""
    nbytes = (4 if offset else 2) + 4 * width
    middle = 0 if offset else 1 << width - 1
    for b in range(out.size // 32):
        at, to = nbytes * b, 32 * b
        d = get_half(blocks, at)
        low = get_half(blocks, at + 2) if offset else np.float32(0)
        high = np.int64(0)
        if width == 5:
            for part in range(4):
                high |= np.int64(blocks[at + nbytes - 20 + part]) << 8 * part
        for i in range(16):
            byte = np.int32(blocks[at + nbytes - 16 + i])
            a = (byte & 15) | np.int32(high >> i & 1) << 4
            c = (byte >> 4) | np.int32(high >> i + 16 & 1) << 4
            if offset:
                out[to + i], out[to + 16 + i] = d * np.float32(a) + low, d * np.float32(c) + low
            else:
                out[to + i], out[to + 16 + i] = d * np.float32(a - middle), d * np.float32(c - middle)


@compiled
def _decode_q8_0(blocks: Any, signed: Any, out: Any) -> None:
    for b in range(out.size // 32):
        at, to = 34 * b, 32 * b
        d = get_half(blocks, at)
        for i in range(32):
            out[to + i] = d * np.float32(signed[at + 2 + i])


@compiled
def _decode_mxfp4(blocks: Any, out: Any) -> None:
    for b in range(out.size // 32):
        at, to = 17 * b, 32 * b
        d = power(np.int64(blocks[at]))
        for i in range(16):
            byte = blocks[at + 1 + i]
            out[to + i], out[to + 16 + i] = d * _FP4[byte & 15], d * _FP4[byte >> 4]


@compiled
def _decode_nvfp4(blocks: Any, out: Any) -> None:
    for b in range(out.size // 64):
        at = 36 * b
        for part in range(4):
            d, to = small_float(np.int64(blocks[at + part])), 64 * b + 16 * part
            for i in range(8):
                byte = blocks[at + 4 + 8 * part + i]
                out[to + i], out[to + 8 + i] = d * _FP4[byte & 15], d * _FP4[byte >> 4]


@compiled
def _decode_tq1_0(blocks: Any, out: Any) -> None:
    for b in range(out.size // _SUPER):
        at, to = 54 * b, _SUPER * b
        d = get_half(blocks, at + 52)
        _digits(blocks, at, 32, 5, d, out, to)
        _digits(blocks, at + 32, 16, 5, d, out, to + 160)
        _digits(blocks, at + 48, 4, 4, d, out, to + 240)


@compiled
def _digits(blocks: Any, at: int, width: int, digits: int, d: Any, out: Any, to: int) -> None:
    power_of_3 = 1
    for n in range(digits):
        for i in range(width):
            digit = (np.int32(blocks[at + i]) * power_of_3 & 255) * 3 >> 8
            out[to + n * width + i] = d * np.float32(digit - 1)
        power_of_3 *= 3


@compiled
def _decode_tq2_0(blocks: Any, out: Any) -> None:
    for b in range(out.size // _SUPER):
        at = 66 * b
        d = get_half(blocks, at + 64)
        for j in range(8):
            to, shift = _SUPER * b + 32 * j, 2 * (j % 4)
            for r in range(32):
                q = np.int32(blocks[at + 32 * (j // 4) + r] >> shift & 3)
                out[to + r] = d * np.float32(q - 1)


@compiled
def _decode_q2_k(blocks: Any, out: Any) -> None:
    for b in range(out.size // _SUPER):
        at = 84 * b
        d, dmin = get_half(blocks, at + 80), get_half(blocks, at + 82)
        for j in range(16):
            scale = d * np.float32(blocks[at + j] & 15)
            low = dmin * np.float32(blocks[at + j] >> 4)
            to, first, shift = _SUPER * b + 16 * j, at + 16 + 32 * (j // 8) + 16 * (j % 2), 2 * (j // 2 % 4)
            for r in range(16):
                out[to + r] = scale * np.float32(np.int32(blocks[first + r] >> shift & 3)) - low


@compiled
def _decode_q3_k(blocks: Any, out: Any) -> None:
    for b in range(out.size // _SUPER):
        at = 110 * b
        d = get_half(blocks, at + 108)
        for j in range(16):
            scale = d * np.float32(get_signed_scale(blocks, at + 96, j) - 32)
            part = 16 * (j % 2)
            to, first, shift = _SUPER * b + 16 * j, at + 32 + 32 * (j // 8) + part, 2 * (j // 2 % 4)
            for r in range(16):
                top = np.int32(blocks[at + part + r] >> j // 2 & 1)
                out[to + r] = scale * np.float32(np.int32(blocks[first + r] >> shift & 3) + 4 * top - 4)


@compiled
def _decode_q45_k(blocks: Any, out: Any, width: int, codes: Any, offsets: Any) -> None:
    """Decodes Q4_K or Q5_K."""
    nbytes = 16 + 32 * width
    for b in range(out.size // _SUPER):
        at = nbytes * b
        d, dmin = get_half(blocks, at), get_half(blocks, at + 2)
        get_scale_pairs(blocks, at + 4, codes, offsets)
        for j in range(8):
            scale, low = d * np.float32(codes[j]), dmin * np.float32(offsets[j])
            to, first, shift = _SUPER * b + 32 * j, at + nbytes - 128 + 32 * (j // 2), 4 * (j % 2)
            if width == 5:
                for r in range(32):
                    q = np.int32(blocks[first + r] >> shift & 15) + np.int32((blocks[at + 16 + r] >> j & 1) << 4)
                    out[to + r] = scale * np.float32(q) - low
            else:
                for r in range(32):
                    out[to + r] = scale * np.float32(np.int32(blocks[first + r] >> shift & 15)) - low


@compiled
def _decode_q6_k(blocks: Any, signed: Any, out: Any) -> None:
    for b in range(out.size // _SUPER):
        at = 210 * b
        d = get_half(blocks, at + 208)
        for j in range(16):
            scale = d * np.float32(signed[at + 192 + j])
            part, t = 16 * (j % 2), j // 2 % 4
            to, first = _SUPER * b + 16 * j, at + 64 * (j // 8) + 32 * (t % 2) + part
            top, low, high = at + 128 + 32 * (j // 8) + part, 4 * (t // 2), 2 * t
            for r in range(16):
                q = np.int32(blocks[first + r] >> low & 15) + np.int32((blocks[top + r] >> high & 3) << 4)
                out[to + r] = scale * np.float32(q - 32)


@compiled
def _decode_iq4_nl(blocks: Any, out: Any) -> None:
    for b in range(out.size // 32):
        at, to = 18 * b, 32 * b
        d = get_half(blocks, at)
        for i in range(16):
            byte = blocks[at + 2 + i]
            out[to + i], out[to + 16 + i] = d * _VALUES[byte & 15], d * _VALUES[byte >> 4]


@compiled
def _decode_iq4_xs(blocks: Any, out: Any) -> None:
    for b in range(out.size // _SUPER):
        at = 136 * b
        d = get_half(blocks, at)
        high = np.int64(blocks[at + 2]) | np.int64(blocks[at + 3]) << 8
        for j in range(8):
            code = (np.int64(blocks[at + 4 + j // 2]) >> 4 * (j % 2) & 15) | (high >> 2 * j & 3) << 4
            scale, to = d * np.float32(code - 32), _SUPER * b + 32 * j
            for i in range(16):
                byte = blocks[at + 8 + 16 * j + i]
                out[to + i], out[to + 16 + i] = scale * _VALUES[byte & 15], scale * _VALUES[byte >> 4]
