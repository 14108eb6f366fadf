"""What all loops share: float32 arithmetic that gives llama.cpp's bits.

llama.cpp's encoders add strictly in order, in float32, without fused multiply-add. So do these: nothing here may
be compiled with `fastmath`, and speed comes from working on many blocks at once (one per SIMD lane), never from
adding in another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantize.kernels.cpu.loops import Elsewhere, compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

pick: Any = Elsewhere("quantize.kernels.cpu.vectors", "pick")

# 1.5 * 2**23: adding and subtracting it rounds a float32 below 2**22 to a whole number, ties to even.
MAGIC = np.float32(12582912.0)


def aligned(*sizes: int) -> list[NDArray[np.float32]]:
    """Returns float32 arrays of zeros that start on cache lines: a vector that lies across two is loaded twice.

    Args:
        sizes: Numbers in each.
    """
    line = 16
    starts = np.cumsum([0, *(-(-size // line) * line for size in sizes)])
    room = np.zeros(starts[-1] + line, np.float32)
    first = -room.ctypes.data // room.itemsize % line
    return [room[first + start : first + start + size] for start, size in zip(starts, sizes, strict=False)]


@compiled
def to_half(value: np.float32) -> np.uint16:
    """Returns the bits of the float16 nearest to a float32, ties to even."""
    bits = np.int64(np.float32(value).view(np.uint32))  # numba widens unsigned sums anyway
    sign, rest = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if rest > 0x7F800000:
        return np.uint16(sign | 0x7E00)
    if rest >= 0x477FF000:  # rounds to 65536 or more
        return np.uint16(sign | 0x7C00)
    if rest < 0x38800000:  # below the smallest normal float16: the unit is 2**-24
        scaled = np.uint32(rest).view(np.float32) * np.float32(16777216.0)
        return np.uint16(sign | np.int64((scaled + MAGIC) - MAGIC))
    rounded = rest + 0xFFF + ((rest >> 13) & 1)
    return np.uint16(sign | ((rounded - 0x38000000) >> 13))


@compiled
def from_half(bits: np.uint16) -> np.float32:
    """Returns the value of a float16 given as bits."""
    wide = np.int64(bits)
    sign, rest = (wide & 0x8000) << 16, wide & 0x7FFF
    if rest < 0x400:
        small = np.float32(rest) * np.float32(2.0**-24)
        return -small if sign else small
    if rest >= 0x7C00:
        return np.uint32(sign | 0x7F800000 | ((rest & 0x3FF) << 13)).view(np.float32)
    return np.uint32(sign | ((rest << 13) + 0x38000000)).view(np.float32)
