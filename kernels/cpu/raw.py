"""Bare pointers inside compiled functions: arrays without shape, bounds or reference count.

An array costs its functions seven arguments, two atomic operations for each function that holds it, and three
instructions per index for negative ones. That is most of the time where functions work on a few numbers. So the
outermost function takes arrays and hands on pointers:

    pointer = raw(array)                    to the first element of a C-contiguous array
    pointer[i], pointer[i] = value          element i; nothing is checked, i must not be negative
    pointer + i                             pointer to element i

The array must outlive the pointer: only arguments of the outermost function are sure to. Only compiled functions can
use these. The code is in pointers.py, which is imported when such a function is compiled.
"""

from __future__ import annotations

from typing import Any

from quantize.kernels.cpu.loops import Elsewhere

raw: Any = Elsewhere("quantize.kernels.cpu.pointers", "raw")
