"""Decoders of the grid types; grid23.py and grid1.py draw the layouts where they write them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize.kernels.cpu.grids import codebook
from quantize.kernels.cpu.lanes import load, splat, store
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import from_half
from quantize.kernels.cpu.raw import raw

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SUPER = 256
_HALF, _ONE, _TWO, _QUARTER, _EIGHTH = (np.float32(v) for v in (0.5, 1, 2, 0.25, 0.125))


@cache
def _values(name: str) -> NDArray[np.float32]:
    """Returns what each point of a codebook stands for, [points, weights]."""
    return codebook(name).values


@cache
def _signs() -> NDArray[np.float32]:
    """Returns 1 and -1 for each byte of sign bits, [256 * 8]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (1 - 2 * bits.astype(np.float32)).ravel()


def decode_iq2_xxs(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decodes rows; ggml.py has the contract."""
    _decode_iq2_xxs(blocks, out, _values("iq2_xxs"), _signs())


def decode_iq2_xs(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decodes rows; ggml.py has the contract."""
    _decode_iq2_xs(blocks, out, _values("iq2_xs"), _signs())


def decode_iq2_s(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decodes rows; ggml.py has the contract."""
    _decode_iq2_s(blocks, out, _values("iq2_s"), _signs())


def decode_iq3_xxs(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decodes rows; ggml.py has the contract."""
    _decode_iq3_xxs(blocks, out, _values("iq3_xxs"), _signs())


def decode_iq3_s(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decodes rows; ggml.py has the contract."""
    _decode_iq3_s(blocks, out, _values("iq3_s"), _signs())


def decode_iq1_s(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decodes rows; ggml.py has the contract."""
    _decode_iq1_s(blocks, out, _values("iq1"))


def decode_iq1_m(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decodes rows; ggml.py has the contract."""
    _decode_iq1_m(blocks, out, _values("iq1"))


@compiled
def _half_at(block: Any, at: int) -> Any:
    """Returns the float16 at a byte, as float32."""
    return from_half(np.uint16(int(block[at]) | int(block[at + 1]) << 8))


@compiled
def _word_at(block: Any, at: int) -> int:
    """Returns the 32-bit number at a byte, the lowest byte first."""
    word = 0
    for i in range(4):
        word |= int(block[at + i]) << (8 * i)
    return word


@compiled
def _odd_sign(bits: int) -> int:
    """Returns 8 sign bits from 7: the last one makes the number of minus signs even."""
    parity = bits ^ (bits >> 4)
    parity ^= parity >> 2
    parity ^= parity >> 1
    return bits | (parity & 1) << 7


@compiled
def _put8(out: Any, scale: Any, point: Any, signs: Any) -> None:
    """Writes the 8 weights of a point with their signs."""
    store(out, 0, splat(scale) * load(point, 0) * load(signs, 0))


@compiled
def _put4(out: Any, scale: Any, point: Any, signs: Any) -> None:
    """Writes the 4 weights of a point with their signs."""
    for i in range(4):
        out[i] = scale * point[i] * signs[i]


@compiled
def _nibble(block: Any, at: int, n: int) -> Any:
    """Returns the n-th half byte from a byte on, the low half first, as float32."""
    return np.float32((int(block[at + n // 2]) >> (4 * (n % 2))) & 15)


@compiled
def _decode_iq2_xxs(blocks: Any, out: Any, values: Any, signs: Any) -> None:
    points, table = raw(values), raw(signs)
    for r in range(out.shape[0]):
        for s in range(out.shape[1] // _SUPER):
            block = raw(blocks) + r * blocks.shape[1] + 66 * s
            to = raw(out) + r * out.shape[1] + _SUPER * s
            unit = _half_at(block, 0)
            for b in range(8):
                word = _word_at(block, 6 + 8 * b)
                scale = unit * (_HALF + np.float32(word >> 28)) * _QUARTER
                for g in range(4):
                    at, bits = int(block[2 + 8 * b + g]), _odd_sign((word >> (7 * g)) & 127)
                    _put8(to + 32 * b + 8 * g, scale, points + 8 * at, table + 8 * bits)


@compiled
def _decode_iq2_xs(blocks: Any, out: Any, values: Any, signs: Any) -> None:
    points, table = raw(values), raw(signs)
    for r in range(out.shape[0]):
        for s in range(out.shape[1] // _SUPER):
            block = raw(blocks) + r * blocks.shape[1] + 74 * s
            to = raw(out) + r * out.shape[1] + _SUPER * s
            unit = _half_at(block, 0)
            for g in range(32):
                scale = unit * (_HALF + _nibble(block, 66, g // 2)) * _QUARTER
                word = int(block[2 + 2 * g]) | int(block[3 + 2 * g]) << 8
                _put8(to + 8 * g, scale, points + 8 * (word & 511), table + 8 * _odd_sign(word >> 9))


@compiled
def _decode_iq2_s(blocks: Any, out: Any, values: Any, signs: Any) -> None:
    points, table = raw(values), raw(signs)
    for r in range(out.shape[0]):
        for s in range(out.shape[1] // _SUPER):
            block = raw(blocks) + r * blocks.shape[1] + 82 * s
            to = raw(out) + r * out.shape[1] + _SUPER * s
            unit = _half_at(block, 0)
            for g in range(32):
                scale = unit * (_HALF + _nibble(block, 74, g // 2)) * _QUARTER
                high = (int(block[66 + g // 4]) >> (2 * (g % 4))) & 3
                at = int(block[2 + g]) | high << 8
                _put8(to + 8 * g, scale, points + 8 * at, table + 8 * int(block[34 + g]))


@compiled
def _decode_iq3_xxs(blocks: Any, out: Any, values: Any, signs: Any) -> None:
    points, table = raw(values), raw(signs)
    for r in range(out.shape[0]):
        for s in range(out.shape[1] // _SUPER):
            block = raw(blocks) + r * blocks.shape[1] + 98 * s
            to = raw(out) + r * out.shape[1] + _SUPER * s
            unit = _half_at(block, 0)
            for b in range(8):
                word = _word_at(block, 66 + 4 * b)
                scale = unit * (_HALF + np.float32(word >> 28)) * _HALF
                for g in range(8):
                    bits = 8 * _odd_sign((word >> (7 * (g // 2))) & 127) + 4 * (g % 2)
                    at = int(block[2 + 8 * b + g])
                    _put4(to + 32 * b + 4 * g, scale, points + 4 * at, table + bits)


@compiled
def _decode_iq3_s(blocks: Any, out: Any, values: Any, signs: Any) -> None:
    points, table = raw(values), raw(signs)
    for r in range(out.shape[0]):
        for s in range(out.shape[1] // _SUPER):
            block = raw(blocks) + r * blocks.shape[1] + 110 * s
            to = raw(out) + r * out.shape[1] + _SUPER * s
            unit = _half_at(block, 0)
            for g in range(64):
                scale = unit * (_ONE + _TWO * _nibble(block, 106, g // 8))
                at = int(block[2 + g]) | ((int(block[66 + g // 8]) >> (g % 8)) & 1) << 8
                bits = 8 * int(block[74 + g // 2]) + 4 * (g % 2)
                _put4(to + 4 * g, scale, points + 4 * at, table + bits)


@compiled
def _put_shifted(out: Any, at: int, scale: Any, values: Any, point: int, shift: Any) -> None:
    """Writes the weights of one IQ1 point."""
    for i in range(8):
        out[at + i] = scale * (values[point, i] + shift)


@compiled
def _decode_iq1_s(blocks: Any, out: Any, values: Any) -> None:
    for r in range(out.shape[0]):
        for s in range(out.shape[1] // _SUPER):
            block = blocks[r, 50 * s : 50 * (s + 1)]
            unit = _half_at(block, 0)
            for b in range(8):
                word = int(block[34 + 2 * b]) | int(block[35 + 2 * b]) << 8
                scale = unit * (_ONE + _TWO * np.float32((word >> 12) & 7))
                shift = -_EIGHTH if word >> 15 else _EIGHTH
                for g in range(4):
                    point = int(block[2 + 4 * b + g]) | ((word >> (3 * g)) & 7) << 8
                    _put_shifted(out[r], _SUPER * s + 32 * b + 8 * g, scale, values, point, shift)


@compiled
def _decode_iq1_m(blocks: Any, out: Any, values: Any) -> None:
    for r in range(out.shape[0]):
        for s in range(out.shape[1] // _SUPER):
            block = blocks[r, 56 * s : 56 * (s + 1)]
            bits = 0
            for i in range(4):
                bits |= (int(block[49 + 2 * i]) >> 4) << (4 * i)
            unit = from_half(np.uint16(bits))
            for g in range(32):
                b = g // 2
                word = int(block[48 + 2 * (b // 4)]) | int(block[49 + 2 * (b // 4)]) << 8
                scale = unit * (_ONE + _TWO * np.float32((word >> (3 * (b % 4))) & 7))
                high = int(block[32 + b]) >> (4 * (g % 2))
                shift = -_EIGHTH if high & 8 else _EIGHTH
                point = int(block[2 * b + g % 2]) | (high & 7) << 8
                _put_shifted(out[r], _SUPER * s + 8 * g, scale, values, point, shift)
