"""Eight float32 numbers as one value inside compiled functions: explicit SIMD where loops do not become any.

LLVM turns a loop into SIMD code only if it can prove, or cheaply check, that nothing it writes overlaps what it
reads; the short loops of the codebook searches fail that. A value of this type is a vector from the start. LLVM maps
it to one register or several, whatever the processor has. Each lane does what a float32 would do, to the bit:
nothing is contracted or reordered.

    value = load(pointer, at)       eight numbers from pointer[at] (raw.py) on, float32 or int8
    value = splat(number)           the same number eight times
    a + b, a - b, a * b, a / b, minimum(a, b), maximum(a, b), root(a), whole(a), level(ratio, top)
    choose(less(a, b), this, other), bits(less(a, b))
    store(pointer, at, value), store_whole(pointer, at, value)
    lowest(value), highest(value)   the smallest and the largest lane

    bit_extremes(array)             greatest, greatest with flipped sign bits, and least of 32 int32

Only compiled functions can call these. Their code is in vectors.py, which is imported when such a function is compiled.
"""

from __future__ import annotations

from typing import Any

from quantize.kernels.cpu.loops import Elsewhere

WIDTH = 8


def _vectors(name: str) -> Any:
    return Elsewhere("quantize.kernels.cpu.vectors", name)


splat = _vectors("splat")
load = _vectors("load")
store = _vectors("store")
store_whole = _vectors("store_whole")
count_up = _vectors("count_up")
minimum = _vectors("minimum")
maximum = _vectors("maximum")
less = _vectors("less")
equal = _vectors("equal")
choose = _vectors("choose")
root = _vectors("root")
whole = _vectors("whole")
level = _vectors("level")
bits = _vectors("bits")
lowest = _vectors("lowest")
highest = _vectors("highest")
bit_extremes = _vectors("bit_extremes")
