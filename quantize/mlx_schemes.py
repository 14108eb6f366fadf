"""The grids of MLX as schemes: affine groups with a bias, and its modes of small floats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.errors import UsageError
from quantize.kernels import levels, mlx
from quantize.kernels.levels import Levels
from quantize.schemes import DTYPES, QuantizedTensor, Scheme, Shape, dtype_name

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
_USUAL = torch.bfloat16
# Factors on a step, and parts of a step on the bias, that lead to neighbouring grids.
_FACTORS = (0.98, 1.02, 0.95, 1.05)
_SHIFTS = (-0.5, 0.5, -0.2, 0.2)


def build(match: re.Match[str]) -> Scheme:
    """Returns the scheme that a match of the family's pattern spells."""
    dtype = DTYPES[match["dtype"] or match["type"] or dtype_name(_USUAL)]
    if match["mode"]:
        return MLXFloat(match["mode"], dtype)
    return MLXAffine(int(match["bits"]), int(match["group"]), dtype)


def _spelt(text: str, dtype: torch.dtype) -> str:
    return text if dtype == _USUAL else f"{text}-{dtype_name(dtype)}"


def _refuse_width(shape: Shape, group: int) -> str | None:
    if len(shape) != 2:
        return f"{len(shape)}-dimensional, not a matrix"
    if shape[-1] == 0 or shape[-1] % group:
        return f"its width {shape[-1]} is no multiple of the group size {group}"
    return None


@dataclass(frozen=True, slots=True)
class MLXAffine:
    """Integer codes with a scale and a bias for each group of inputs: `w = scale * code + bias`.

    Arrays of a coded tensor of shape `[rows, cols]`, with `groups = cols / group_size`: `codes` uint8 `[rows, cols]`;
    `scales` and `biases` of `dtype`, `[rows, groups]`. Scales may be negative.

    Attributes:
        bits: Code width: 2, 3, 4, 5, 6 or 8.
        group_size: Inputs that share scale and bias: 32, 64 or 128.
        dtype: The model's floating type, which scales and biases have.
    """

    bits: int
    group_size: int = 64
    dtype: torch.dtype = _USUAL

    unit = 1

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"MLX has no grids of {self.bits} bits", "choose 2, 3, 4, 5, 6 or 8 bits")
        if self.group_size not in GROUPS:
            raise UsageError(f"MLX has no groups of {self.group_size}", "choose 32, 64 or 128")

    def __str__(self) -> str:
        return _spelt(f"mlx{self.bits}-g{self.group_size}", self.dtype)

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.group_size

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns code bits plus scale and bias, spread over the group."""
        return self.bits + 2 * 8 * self.dtype.itemsize / self.group_size

    def reject(self, shape: Shape) -> str | None:
        """Returns a reason for tensors that are not matrices or whose width the group does not divide."""
        return _refuse_width(shape, self.group_size)

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns `weight` `[rows, cols]` rounded as `mx.quantize` does, bit for bit; importance is not looked at."""
        codes, scales, biases = mlx.affine(weight.float(), self.bits, self.group_size)
        arrays = {"codes": codes, "scales": scales.to(self.dtype), "biases": biases.to(self.dtype)}
        return QuantizedTensor(self, tuple(weight.shape), arrays)

    def group(self, cols: int) -> int:
        """Returns the number of inputs that share a scale."""
        return self.group_size

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the least and the greatest value of each group."""
        low, high = weight.reshape(*weight.shape[:-1], -1, self.group_size).aminmax(dim=-1)
        return low, high

    def round_trip(self, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Returns what `weight` reads back as on grids that span `low` to `high`."""
        return self.decode(self.encode_within(weight, low, high))

    def encode_within(self, weight: Tensor, low: Tensor, high: Tensor) -> QuantizedTensor:
        """Returns `weight` rounded on grids that span `low` to `high`, codes chosen against what is stored."""
        scales, biases = (value.to(self.dtype) for value in mlx.span(low, high, self.bits))
        groups = weight.float().reshape(*low.shape, self.group_size)
        codes = mlx.nearest(groups, scales.float(), biases.float(), self.bits).flatten(-2)
        return QuantizedTensor(self, tuple(weight.shape), {"codes": codes, "scales": scales, "biases": biases})

    def decode(self, coded: QuantizedTensor) -> Tensor:
        """Returns `scale * code + bias`, float32 `[rows, cols]`."""
        return mlx.affine_values(*(coded.arrays[key] for key in ("codes", "scales", "biases")))

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Levels:
        """Returns searched grids of one group of columns `[rows, group]`, with less weighted error than `encode`'s."""
        costs = torch.ones_like(weight[0]) if importance is None else importance
        points = torch.arange(2**self.bits, dtype=torch.float32, device=weight.device)
        return self._levels(*mlx.search(weight, costs, self.bits, self.dtype), points)

    def assemble(self, codes: Tensor, parts: Sequence[Levels]) -> QuantizedTensor:
        """Returns the codes with the scales and biases of their groups."""
        arrays = {key: torch.cat([part.state[key] for part in parts], 1) for key in ("scales", "biases")}
        return QuantizedTensor(self, tuple(codes.shape), {"codes": codes, **arrays})

    def neighbours(self, fitted: Levels) -> list[Levels]:
        """Returns grids that are a little narrower or wider about their middle, or shifted by part of a step."""
        half = (2**self.bits - 1) / 2
        middle = fitted.offset + fitted.scale * half
        moves = [(fitted.scale * f, middle - fitted.scale * f * half) for f in _FACTORS]
        moves += [(fitted.scale, fitted.offset + fitted.scale * shift) for shift in _SHIFTS]
        return [self._stored(scale, offset, fitted) for scale, offset in moves]

    def choose(self, tried: Sequence[Levels], which: Tensor) -> Levels:
        """Returns the grids that `which` says."""
        state = levels.chosen(tried, which)
        return self._levels(state["scales"], state["biases"], tried[0].points)

    def _stored(self, scale: Tensor, offset: Tensor, old: Levels) -> Levels:
        """Returns float32 grids as a file has them; the old ones where the type cannot hold them."""
        scales, biases = scale.to(self.dtype), offset.to(self.dtype)
        good = scales.isfinite() & biases.isfinite() & (scales != 0)
        return self._levels(
            torch.where(good, scales, old.state["scales"]), torch.where(good, biases, old.state["biases"]), old.points
        )

    @staticmethod
    def _levels(scales: Tensor, biases: Tensor, points: Tensor) -> Levels:
        return Levels(scales.float(), biases.float(), points, {"scales": scales, "biases": biases})


@dataclass(frozen=True, slots=True)
class MLXFloat:
    """4-bit or 8-bit floats with one scale byte for each group: MLX's mxfp4, mxfp8 and nvfp4.

    Arrays of a coded tensor of shape `[rows, cols]`: `codes` uint8 `[rows, cols]`, E2M1 (0 to 15) or E4M3; `scales`
    uint8 `[rows, groups]`, E8M0 or, of nvfp4, E4M3.

    Attributes:
        mode: MLX's name.
        dtype: The model's floating type: MLX finds scales in it.
    """

    mode: str
    dtype: torch.dtype = _USUAL

    unit = 1

    def __post_init__(self) -> None:
        if self.mode not in mlx.MODES:
            raise UsageError(f"MLX has no mode '{self.mode}'", f"choose from: {', '.join(mlx.MODES)}")

    def __str__(self) -> str:
        return _spelt(f"mlx-{self.mode}", self.dtype)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return mlx.MODES[self.mode].bits

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return mlx.MODES[self.mode].group

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.group_size

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns code bits plus the scale byte, spread over the group."""
        return self.bits + 8 / self.group_size

    def reject(self, shape: Shape) -> str | None:
        """Returns a reason for tensors that are not matrices or whose width the group does not divide."""
        return _refuse_width(shape, self.group_size)

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns `weight` `[rows, cols]` rounded as `mx.quantize` does, bit for bit; importance is not looked at."""
        codes, scales = mlx.float_encode(weight.float(), self.mode, self.dtype)
        return QuantizedTensor(self, tuple(weight.shape), {"codes": codes, "scales": scales})

    def decode(self, coded: QuantizedTensor) -> Tensor:
        """Returns `scale * code`, float32 `[rows, cols]`."""
        return mlx.float_values(coded.arrays["codes"], coded.arrays["scales"], self.mode)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Levels:
        """Returns the scales of one group of columns `[rows, group]` with the least weighted error."""
        costs = torch.ones_like(weight[0]) if importance is None else importance
        return self._levels(mlx.search_scales(weight, costs, self.mode))

    def assemble(self, codes: Tensor, parts: Sequence[Levels]) -> QuantizedTensor:
        """Returns the codes that indices into the points mean, with the scales of their groups."""
        arrays = {
            "codes": mlx.codes_of_points(codes, self.mode),
            "scales": torch.cat([part.state["scales"] for part in parts], 1),
        }
        return QuantizedTensor(self, tuple(codes.shape), arrays)

    def neighbours(self, fitted: Levels) -> list[Levels]:
        """Returns grids with the next scale bytes."""
        steps = (-1, 1) if mlx.MODES[self.mode].power else (-1, 1, -2, 2)
        return [self._levels(mlx.moved(fitted.state["scales"], step, self.mode)) for step in steps]

    def choose(self, tried: Sequence[Levels], which: Tensor) -> Levels:
        """Returns the grids that `which` says."""
        return self._levels(levels.chosen(tried, which)["scales"])

    def _levels(self, scales: Tensor) -> Levels:
        values = mlx.scale_values(scales, self.mode)
        points = torch.tensor(mlx.MODES[self.mode].points, device=scales.device)
        return Levels(values, torch.zeros_like(values), points, {"scales": scales})


def members() -> list[Scheme]:
    """Returns the usual member of each width, and the modes of small floats."""
    return [*(MLXAffine(bits) for bits in BITS), *(MLXFloat(mode) for mode in mlx.MODES)]
