"""MLX's grids in torch: affine groups and the small floats of its mxfp4, mxfp8 and nvfp4 modes.

All functions take groups along the last dimension, compute in float32 and never change their inputs. `affine` and the
`encode` of each mode make what `mx.quantize` makes on a processor, bit for bit (MLX 0.32).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

# The least step of an affine grid.
_STEP_MIN = 1e-7
# Magnitudes of 4-bit floats (E2M1) by code, and the least value above which the next is nearer.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_SIGN = 8
_LARGEST_BYTE = {True: 254, False: 126}  # of E8M0 and E4M3 scales; beyond lies what is no number
_E4M3_MAX = 448.0
_E8M0_BIAS = 127
# Factors on the distances of a group's extremes from its middle. Finer ones took off less than 1 % more.
_FACTORS = (1.0, 0.93, 0.86, 0.79)
_NARROW_FACTORS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62)
_NARROW = 2


def _grouped(values: Tensor, group: int) -> Tensor:
    """Returns `[..., cols]` as `[..., cols / group, group]`."""
    return values.reshape(*values.shape[:-1], -1, group)


def affine(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes, scales and biases as `mx.quantize` makes them; `w = scale * code + bias`.

    The extreme of larger magnitude is code 0, and the scale is such that 0 is a whole number of steps away from it.

    Args:
        weight: float32 `[..., cols]`, `cols` a multiple of `group`.
        bits: Width of a code.
        group: Columns that share scale and bias.

    Returns:
        uint8 `[..., cols]`; scales and biases float32 `[..., cols / group]`, not yet rounded to the dtype that a file
        has. Codes are chosen against these. Scales may be negative.
    """
    groups = _grouped(weight, group)
    low, high = groups.aminmax(dim=-1)
    top = 2**bits - 1
    step = ((high - low) / top).clamp_min_(_STEP_MIN)
    below = low.abs() > high.abs()
    step = torch.where(below, step, -step)
    edge = torch.where(below, low, high)
    count = (edge / step).round_()
    zero = count == 0
    scales = torch.where(zero, step, edge / torch.where(zero, torch.ones_like(count), count))
    biases = torch.where(zero, torch.zeros_like(edge), edge)
    codes = nearest(groups, scales, biases, bits)
    return codes.flatten(-2), scales, biases


def span(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns float32 scales and biases of grids from `low` to `high`."""
    return ((high - low) / (2**bits - 1)).clamp_min_(_STEP_MIN), low


def nearest(groups: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Returns the nearest codes, uint8 `[..., n, group]`, of float32 groups on grids `[..., n]`."""
    usable = torch.where(scales == 0, torch.ones_like(scales), scales).unsqueeze(-1)
    codes = (groups - biases.unsqueeze(-1)).div_(usable).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8)


def affine_values(codes: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
    """Returns `scale * code + bias`, float32 `[..., cols]`."""
    groups = _grouped(codes, codes.shape[-1] // scales.shape[-1]).float()
    return groups.mul_(scales.float().unsqueeze(-1)).add_(biases.float().unsqueeze(-1)).flatten(-2)


def search(weight: Tensor, importance: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns scale and bias of the best grid that was tried for each row, both `[rows, 1]` of `dtype`.

    Each candidate spans part of what lies between the row's extremes; then scale and bias are fitted to its codes by
    weighted least squares, which is tried too. All are judged as rounded to `dtype`.

    Args:
        weight: float32 `[rows, group]`.
        importance: Cost of a squared error of each column, float32 `[group]`, not negative.
        bits: Code width.
        dtype: What a file has scales and biases in.
    """
    _, plain, bias = affine(weight, bits, weight.shape[-1])
    best = _Best(weight, importance, bits, dtype)
    best.offer(plain, bias)
    low, high = (end.unsqueeze(-1) for end in weight.aminmax(dim=-1))
    middle = (low + high) / 2
    for a, b in product(_NARROW_FACTORS if bits <= _NARROW else _FACTORS, repeat=2):
        start, stop = middle + (low - middle) * a, middle + (high - middle) * b
        best.offer(*span(start, stop, bits))
    for _ in range(2):
        best.offer(*best.least_squares())
    return best.scales, best.biases


class _Best:
    """The best of some grids of rows `[rows, group]`."""

    def __init__(self, weight: Tensor, importance: Tensor, bits: int, dtype: torch.dtype) -> None:
        self._weight, self._bits = weight, bits
        total = importance.sum()
        self._costs = importance / total if float(total) > 0 else torch.full_like(importance, 1 / len(importance))
        self._error = torch.full((len(weight), 1), torch.inf, device=weight.device)
        self.scales = torch.zeros(len(weight), 1, dtype=dtype, device=weight.device)
        self.biases = torch.zeros_like(self.scales)

    def offer(self, scales: Tensor, biases: Tensor) -> None:
        """Takes float32 grids `[rows, 1]` for the rows in which they are better once they are rounded."""
        scales, biases = scales.to(self.scales.dtype), biases.to(self.scales.dtype)
        codes = nearest(self._weight.unsqueeze(-2), scales.float(), biases.float(), self._bits).squeeze(-2)
        lost = affine_values(codes, scales, biases).sub_(self._weight).square_()
        error = (lost @ self._costs).unsqueeze(-1)
        better = error < self._error  # never so for one that is not finite
        self._error = torch.where(better, error, self._error)
        self.scales = torch.where(better, scales, self.scales)
        self.biases = torch.where(better, biases, self.biases)

    def least_squares(self) -> tuple[Tensor, Tensor]:
        """Returns the grids that fit the codes of the best ones: float32 `[rows, 1]`."""
        scales, biases = self.scales.float(), self.biases.float()
        codes = nearest(self._weight.unsqueeze(-2), scales, biases, self._bits).squeeze(-2).float()
        mean, target = ((each @ self._costs).unsqueeze(-1) for each in (codes, self._weight))
        spread = ((codes - mean).square() @ self._costs).unsqueeze(-1)
        slope = ((codes - mean) * (self._weight - target)) @ self._costs
        fitted = torch.where(spread > 0, slope.unsqueeze(-1) / spread, scales)
        return fitted, torch.where(spread > 0, target - fitted * mean, biases)


@dataclass(frozen=True, slots=True)
class Mode:
    """One of MLX's modes of small floats.

    Attributes:
        bits: Width of a code: 4 for E2M1, 8 for E4M3.
        group: Weights that share a scale byte.
        power: Whether the byte is a power of two (E8M0), not a small float (E4M3).
    """

    bits: int
    group: int
    power: bool

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """The values of codes without a sign bit, in order from 0."""
        return _FP4 if self.bits == 4 else _fp8()

    @property
    def largest(self) -> float:
        """The largest code's value."""
        return self.magnitudes[-1]

    @property
    def points(self) -> tuple[float, ...]:
        """Values of all codes in order, 0 once; `codes_of_points` has the codes."""
        return (*(-value for value in reversed(self.magnitudes[1:])), *self.magnitudes)


@cache
def _fp8() -> tuple[float, ...]:
    return tuple(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())


MODES = {"mxfp4": Mode(4, 32, power=True), "mxfp8": Mode(8, 32, power=True), "nvfp4": Mode(4, 16, power=False)}


def float_encode(weight: Tensor, name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns codes and scale bytes of a mode as `mx.quantize(mode=...)` makes them.

    One thing differs: where MLX's byte wraps around, for groups below about 1e-37, it stops at the least scale.

    Args:
        weight: float32 `[..., cols]`.
        name: Of a mode.
        dtype: What the weights were stored in: MLX divides in it.

    Returns:
        uint8 `[..., cols]` and uint8 `[..., cols / group]`.
    """
    mode = MODES[name]
    groups = _grouped(weight, mode.group)
    most = groups.abs().amax(-1)
    least = (most / mode.largest).to(dtype).float()
    if mode.power:
        mantissa, exponents = least.frexp()  # of a mantissa from 0.5 on: the logarithm rounded up, but for 0.5
        exponents = exponents - (mantissa == 0.5).to(torch.int32) + _E8M0_BIAS
        scales = torch.where(most == 0, _E8M0_BIAS, exponents).clamp_(0, _LARGEST_BYTE[True]).to(torch.uint8)
    else:
        scales = least.clamp_max_(_E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return _codes(groups, scale_values(scales, name).unsqueeze(-1), mode).flatten(-2), scales


def scale_values(scales: Tensor, name: str) -> Tensor:
    """Returns the float32 values of scale bytes."""
    if MODES[name].power:
        bits = scales.int() << 23  # the exponent of a float32; byte 0 is the subnormal 2^-127
        return torch.where(scales == 0, 1 << 22, bits).to(torch.int32).view(torch.float32)
    return scales.view(torch.float8_e4m3fn).float()


def moved(scales: Tensor, step: int, name: str) -> Tensor:
    """Returns scale bytes some steps away, as far as there are any."""
    return (scales.int() + step).clamp_(0, _LARGEST_BYTE[MODES[name].power]).to(torch.uint8)


def _codes(groups: Tensor, scales: Tensor, mode: Mode) -> Tensor:
    level = groups / torch.where(scales == 0, torch.ones_like(scales), scales)
    level = torch.where(scales == 0, torch.zeros_like(level), level)
    if mode.bits == 8:
        return level.clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    middles = torch.tensor(_FP4_MIDDLES, device=level.device)
    codes = torch.bucketize(level.abs(), middles)  # of two that are equally near, the smaller
    return torch.where((level < 0) & (codes > 0), codes + _SIGN, codes).to(torch.uint8)


def float_values(codes: Tensor, scales: Tensor, name: str) -> Tensor:
    """Returns the float32 values of codes `[..., cols]` with scale bytes `[..., cols / group]`."""
    mode = MODES[name]
    if mode.bits == 8:
        values = codes.view(torch.float8_e4m3fn).float()
    else:
        values = torch.tensor((*_FP4, *(-value for value in _FP4)), device=codes.device)[codes.int()]
    groups = _grouped(values, values.shape[-1] // scales.shape[-1])
    return (groups * scale_values(scales, name).unsqueeze(-1)).flatten(-2)


def codes_of_points(indices: Tensor, name: str) -> Tensor:
    """Returns the codes, uint8, of indices into a mode's `points`."""
    signs, count = 2 ** (MODES[name].bits - 1), len(MODES[name].magnitudes)
    table = [*(signs + code for code in range(count - 1, 0, -1)), *range(count)]
    return torch.tensor(table, dtype=torch.uint8, device=indices.device)[indices.int()]


def search_scales(weight: Tensor, importance: Tensor, name: str) -> Tensor:
    """Returns the scale byte, uint8 `[rows, 1]`, with the least weighted error of each row near the plain one.

    Args:
        weight: float32 `[rows, group]`.
        importance: Cost of a squared error of each column, float32 `[group]`.
        name: Of a mode.
    """
    mode = MODES[name]
    _, plain = float_encode(weight, name)
    # a power of two has one sensible neighbour, a small float is searched over most of an octave
    moves = (0, -1) if mode.power else (0, 1, 2, -1, -2, -3, -4, -5, -6)
    best, found = None, plain
    for move in moves:
        scales = moved(plain, move, name)
        codes = _codes(weight.unsqueeze(-2), scale_values(scales, name).unsqueeze(-1), mode).squeeze(-2)
        error = (float_values(codes, scales, name) - weight).square_() @ importance
        if best is None:
            best = error
            continue
        better = error < best
        best = torch.where(better, error, best)
        found = torch.where(better.unsqueeze(-1), scales, found)
    return found
