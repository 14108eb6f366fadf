"""The searches written once more, plainly in numpy, one line of the algorithm after the other."""

from __future__ import annotations

from typing import Any

import ggml_cases
import numpy as np
import pytest

from quantize.kernels.cpu import ggml
from quantize.kernels.cpu.iq4 import VALUES

COLS = 512
F = np.float32
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def added(terms: Any) -> Any:
    """Sums of rows, term after term in float32, as C adds them; numpy's own sum takes pairs."""
    total = np.zeros(len(terms), F)
    for column in terms.T:
        total = total + column
    return total


def largest(x: Any) -> Any:
    return x[np.arange(len(x)), np.abs(x).argmax(1)]


def signed(x: Any, w: Any, top: int) -> tuple[Any, Any]:
    """Scale and levels 0 .. 2 * top - 1 of each row."""
    peak, wx = largest(x), w * x
    scale, best, chosen = (np.zeros(len(x), F) for _ in range(3))
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(F(top) + F(0.1) * F(step)) / peak
        level = np.clip(np.rint(inverse[:, None] * x), -top, top - 1)
        sxl, sll = added(wx * level), added(w * level * level)
        better = (sll > 0) & (sxl * sxl > best * sll) if step else np.full(len(x), True)
        found = np.where(sll != 0, sxl / sll, 0)
        scale, best = np.where(better, found, scale), np.where(better, found * sxl, best)
        chosen = np.where(better, inverse, chosen)
    return scale, np.clip(np.rint(chosen[:, None] * x), -top, top - 1) + top


def offset(x: Any, w: Any, top: int, first: float, step: float, steps: int) -> tuple[Any, Any, Any]:
    """Scale, value of level 0, and levels 0 .. top of each row."""
    low, high, sw, swx = np.minimum(x.min(1), 0), x.max(1), added(w), added(w * x)
    scale, best, levels = np.zeros(len(x), F), np.zeros(len(x), F), np.zeros_like(x)
    for t in range(-1, steps + 1):
        inverse = ((F(first) + F(step) * F(t)) + F(top) if t >= 0 else F(top)) / (high - low)
        level = np.clip(np.rint(inverse[:, None] * (x - low[:, None])), 0, top)
        sl, sll, slx = added(w * level), added(w * level * level), added(w * level * x)
        d = sw * sll - sl * sl
        s, o = (sw * slx - swx * sl) / d, (sll * swx - sl * slx) / d
        s, o = np.where(o > 0, slx / sll, s), np.where(o > 0, F(0), o)
        if t < 0:
            s, o = F(1) / inverse, low
        e = s[:, None] * level + o[:, None] - x
        error = added(w * (e * e))
        better = (d > 0) & (error < best) if t >= 0 else np.full(len(x), True)
        scale, low, best = np.where(better, s, scale), np.where(better, o, low), np.where(better, error, best)
        levels = np.where(better[:, None], level, levels)
    return scale, low, levels


def uneven(x: Any, w: Any) -> tuple[Any, Any]:
    """Scale and indices into IQ4's table of each row; nearest by distance, the upper one of two."""
    table = np.array(VALUES, F)

    def index(v: Any) -> Any:
        return 15 - np.abs(v[..., None] - table[::-1]).argmin(-1)

    peak, scale, best = largest(x), np.zeros(len(x), F), np.zeros(len(x), F)
    for t in (None, *range(-7, 8)):
        inverse = F(1) / (-peak / F(-127)) if t is None else (F(t) + F(-127)) / peak
        q = table[index(inverse[:, None] * x)]
        sqx, sqq = added(w * q * x), added(w * q * q)
        better = sqx * sqx > best * sqq if t is not None else np.full(len(x), True)
        scale, best = np.where(better, sqx / sqq, scale), np.where(better, sqx / sqq * sqx, best)
    return scale, index(F(1) / scale[:, None] * x)


def nibbles(levels: Any) -> Any:
    codes = levels.astype(np.uint8)
    return codes[:, :16] | codes[:, 16:] << 4


def halves(values: Any) -> Any:
    return values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def case(seed: int, row: bool, factor: float = 1) -> tuple[Any, Any, Any, Any]:
    """Returns weights and importance, and both as blocks of 32: values and weights of the search."""
    x, importance = ggml_cases.heavy_tailed(6, COLS, seed), ggml_cases.importance(COLS, seed)
    blocks = x.reshape(-1, 32)
    mean = added(np.square(x)) / F(COLS) if row else added(np.square(blocks)) * F(factor / 32)
    spread = mean.repeat(COLS // 32 if row else 1)[:, None] + np.square(blocks)
    return x, importance, blocks, np.tile(importance, 6).reshape(-1, 32) * np.sqrt(spread)


@pytest.mark.parametrize("seed", range(3))
def test_scale_alone(seed: int) -> None:
    x, importance, blocks, w = case(seed, row=True)
    scale, levels = signed(blocks, w, 8)
    expected = np.hstack([halves(scale), nibbles(levels)])
    np.testing.assert_array_equal(ggml.encode("q4_0", x, importance).reshape(-1, 18), expected)


@pytest.mark.parametrize("seed", range(3))
def test_scale_and_offset(seed: int) -> None:
    x, importance, blocks, w = case(seed, row=True)
    scale, low, levels = offset(blocks, w, 15, -0.9, 0.05, 36)
    expected = np.hstack([halves(scale), halves(low), nibbles(levels)])
    np.testing.assert_array_equal(ggml.encode("q4_1", x, importance).reshape(-1, 20), expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_uneven_table(seed: int, weighted: bool) -> None:
    x, importance, blocks, w = case(seed, row=False, factor=2)
    scale, levels = uneven(blocks, w if weighted else np.square(blocks))
    expected = np.hstack([halves(scale), nibbles(levels)])
    ours = ggml.encode("iq4_nl", x, importance if weighted else None)
    np.testing.assert_array_equal(ours.reshape(-1, 18), expected)
