"""How levels and scales lie in the bytes of a block; `out` is always flat uint8 and `at` the index to start from.

Levels are uint8, one for each weight of the block. Loops run over slices, whose indices the compiler sees not to be
negative: only then does it vectorise them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import from_half, to_half

_LARGEST_HALF = np.float32(65504)


@compiled
def put_half(value: Any, out: Any, at: int) -> Any:
    """Stores the nearest float16, little-endian, and returns its value.

    What is beyond float16 becomes its largest value instead of Inf, and NaN (of sums that went to Inf) becomes 0:
    llama.cpp refuses a file with either.
    """
    value = value if value == value else np.float32(0)
    value = min(max(value, -_LARGEST_HALF), _LARGEST_HALF)
    bits = np.int64(to_half(value))
    out[at], out[at + 1] = bits & 255, bits >> 8
    return from_half(np.uint16(bits))


@compiled
def get_half(blocks: Any, at: int) -> Any:
    """Returns the float16 at `at` as float32."""
    return from_half(np.uint16(np.int64(blocks[at]) | (np.int64(blocks[at + 1]) << 8)))


@compiled
def pack_nibbles(levels: Any, half: int, out: Any, at: int) -> None:
    """Packs 2 * half levels of 4 bits: byte i holds level i (low) and level half + i (high). More bits are cut off."""
    low, high, packed = levels[:half], levels[half : 2 * half], out[at : at + half]
    for i in range(half):
        packed[i] = (low[i] & 15) | (high[i] << 4)


@compiled
def pack_fifth_bits(levels: Any, out: Any, at: int) -> None:
    """Packs bit 4 of 32 levels: bit i of a little-endian uint32 belongs to level i."""
    bits = np.int64(0)
    for i in range(32):
        bits |= np.int64(levels[i] >> 4 & 1) << i
    for byte in range(4):
        out[at + byte] = bits >> 8 * byte & 255


@compiled
def pack_pairs(levels: Any, out: Any, at: int) -> None:
    """Packs the low 2 bits of 256 levels: bits 2t of byte 32g + r belong to level 128g + 32t + r."""
    packed = out[at : at + 64]
    for group in range(2):
        for r in range(32):
            i = 128 * group + r
            low = (levels[i] & 3) | ((levels[i + 32] & 3) << 2)
            packed[32 * group + r] = low | ((levels[i + 64] & 3) << 4) | (levels[i + 96] << 6)


@compiled
def pack_bit_planes(levels: Any, bit: int, out: Any, at: int) -> None:
    """Packs one bit of 256 levels: bit i // 32 of byte i % 32 belongs to level i."""
    packed = out[at : at + 32]
    for r in range(32):
        byte = (levels[r] >> bit) & 1
        for plane in range(1, 8):
            byte |= ((levels[32 * plane + r] >> bit) & 1) << plane
        packed[r] = byte


@compiled
def pack_sixes(levels: Any, out: Any, at: int) -> None:
    """Packs 256 levels of 6 bits as Q6_K has them: 128 bytes of low nibbles, then 64 of high pairs."""
    packed = out[at : at + 192]
    for group in range(2):
        for r in range(32):
            i = 128 * group + r
            a, b, c, d = levels[i], levels[i + 32], levels[i + 64], levels[i + 96]
            packed[64 * group + r] = (a & 15) | (c << 4)
            packed[64 * group + 32 + r] = (b & 15) | (d << 4)
            packed[128 + 32 * group + r] = (a >> 4) | (b >> 4 << 2) | (c >> 4 << 4) | (d >> 4 << 6)


@compiled
def pack_scale_pairs(codes: Any, offsets: Any, out: Any, at: int) -> None:
    """Packs 8 pairs of 6-bit numbers into 12 bytes, as Q4_K and Q5_K have them, and reads them back.

        byte j      EEcccccc    code of j, top of code j + 4
        byte j + 4  FFoooooo    offset of j, top of offset j + 4
        byte j + 8  ffffeeee    low nibbles of offset and code of j + 4         (j = 0 .. 3)

    A code above 63 spills into the bits beside it, as in llama.cpp; `codes` and `offsets` become what a reader sees.
    """
    for j in range(4):
        e, f = np.int64(codes[j + 4]), np.int64(offsets[j + 4])
        out[at + j] = codes[j] | (e >> 4 << 6)
        out[at + j + 4] = offsets[j] | (f >> 4 << 6)
        out[at + j + 8] = (e & 15) | (f << 4)
    get_scale_pairs(out, at, codes, offsets)


@compiled
def get_scale_pairs(blocks: Any, at: int, codes: Any, offsets: Any) -> None:
    """Undoes `pack_scale_pairs`."""
    for j in range(4):
        a, b, c = np.int64(blocks[at + j]), np.int64(blocks[at + j + 4]), np.int64(blocks[at + j + 8])
        codes[j], codes[j + 4] = a & 63, (c & 15) | (a >> 6 << 4)
        offsets[j], offsets[j + 4] = b & 63, (c >> 4) | (b >> 6 << 4)


@compiled
def pack_signed_scales(codes: Any, out: Any, at: int) -> None:
    """Packs 16 numbers of 6 bits into 12 bytes as Q3_K has them: low nibbles first, then pairs of high bits."""
    for j in range(8):
        out[at + j] = (codes[j] & 15) | (codes[j + 8] << 4)
    for j in range(4):
        a, b, c, d = codes[j], codes[j + 4], codes[j + 8], codes[j + 12]
        out[at + 8 + j] = (a >> 4) | (b >> 4 << 2) | (c >> 4 << 4) | (d >> 4 << 6)


@compiled
def get_signed_scale(blocks: Any, at: int, j: int) -> Any:
    """Returns number j of `pack_signed_scales`."""
    low = np.int64(blocks[at + j]) & 15 if j < 8 else np.int64(blocks[at + j - 8]) >> 4
    return low | ((np.int64(blocks[at + 8 + j % 4]) >> 2 * (j // 4) & 3) << 4)
