"""The searches for the code of each scale in a super-block, one super-block at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.tiles import (
    ONE,
    TINY,
    ZERO,
    level,
    nearest,
)

_TENTH = np.float32(0.1)


@compiled
def search_scales(x: Any, w: Any, count: int, top: Any, codes: Any) -> Any:
    """Finds the weighted least squares scale of values that are not negative, x ~ scale * code, code 0 .. top.

    Args:
        x: float32 [count].
        w: float32 [count].
        count: Values.
        top: Highest code, float32.
        codes: uint8 [count]; overwritten. A negative code wraps, as in llama.cpp.

    Returns:
        The scale.
    """
    largest = ZERO
    for i in range(count):
        largest = max(largest, x[i])
        codes[i] = 0
    if largest < TINY:
        return ZERO
    inverse = top / largest
    best = _scales_error(x, w, count, inverse, top, True)
    for t in range(-4, 5):
        if t != 0:
            candidate = (_TENTH * np.float32(t) + top) / largest
            error = _scales_error(x, w, count, candidate, top, False)
            if error < best:
                best, inverse = error, candidate
    sxl, sll = ZERO, ZERO
    for i in range(count):
        q = min(top, nearest(inverse * x[i]))
        codes[i] = np.int32(q) & 255
        sxl += w[i] * x[i] * q
        sll += w[i] * q * q
    for _ in range(5):
        changed = False
        for i in range(count):
            old = np.float32(codes[i])
            a = sxl - w[i] * x[i] * old
            b = sll - w[i] * old * old
            if a > ZERO and b > ZERO:
                q = min(top, nearest(x[i] * b / a))
                if q != old:
                    a += w[i] * x[i] * q
                    b += w[i] * q * q
                    if a * a * sll > sxl * sxl * b:
                        codes[i] = np.int32(q) & 255
                        sxl, sll, changed = a, b, True
        if not changed:
            break
    return sxl / sll if sll > ZERO else ZERO


@compiled
def _scales_error(x: Any, w: Any, count: int, inverse: Any, top: Any, wraps: bool) -> Any:
    scale, error = ONE / inverse, ZERO
    for i in range(count):
        q = nearest(inverse * x[i])
        q = np.float32(np.int32(q) & 255) if wraps else min(top, q)
        e = x[i] - scale * q
        error += w[i] * e * e
    return error


@compiled
def search_signed_scales(x: Any, w: Any, count: int, top: Any, codes: Any) -> Any:
    """Does what `search_signed` does, for one block.

    Args:
        x: float32 [count].
        w: float32 [count].
        count: Values.
        top: Levels on one side, float32.
        codes: uint8 [count]; receives level + top, or 0 for a block of zeros.

    Returns:
        The scale.
    """
    largest = ZERO
    for i in range(count):
        codes[i] = 0
        largest = x[i] if abs(x[i]) > abs(largest) else largest
    if abs(largest) < TINY:
        return ZERO
    low, high = -top, top - ONE
    scale, best, chosen = ZERO, ZERO, ZERO
    for step in range(19):
        t = step - 10 if step < 10 else step - 9  # -10 stands for the first try, 0
        inverse = -top / largest if step == 0 else -(top + _TENTH * np.float32(t)) / largest
        sxl, sll = ZERO, ZERO
        for i in range(count):
            q = level(inverse * x[i], low, high)
            sxl += w[i] * x[i] * q
            sll += w[i] * q * q
        if step == 0:
            scale = sxl / sll if sll != ZERO else ZERO
            best, chosen = scale * sxl, inverse
        elif sll > ZERO and sxl * sxl > best * sll:
            scale = sxl / sll
            best, chosen = scale * sxl, inverse
    for i in range(count):
        codes[i] = np.int32(level(chosen * x[i], low, high) + top)
    return scale
