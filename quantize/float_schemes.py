"""Schemes of the compressed-tensors family: scaled 8-bit and 4-bit floats, and integers with bfloat16 scales."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from quantize.errors import UsageError
from quantize.kernels import affine, fp4, fp8, levels, packed_ints
from quantize.kernels.levels import Levels
from quantize.schemes import AffineInt, QuantizedTensor, Scheme, Shape

TENSOR, CHANNEL, BLOCK = "tensor", "channel", "block"
_SCALE_BITS = 16
_NEARBY = (0.98, 1.02, 0.95, 1.05)


def _no_matrix(shape: Shape) -> str | None:
    if len(shape) != 2:
        return f"{len(shape)}-dimensional, not a matrix"
    return None if shape[0] and shape[1] else "empty"


def _peak(weight: Tensor, known: float | None) -> Tensor:
    return weight.abs().amax() if known is None else torch.tensor(known, device=weight.device)


@dataclass(frozen=True, slots=True)
class FP8:
    """8-bit floats E4M3 with one scale per tensor, row or square tile: `w = value * scale`.

    Arrays of a coded tensor `[rows, cols]`: `values` float8_e4m3fn `[rows, cols]`; `scales` bfloat16, or float32 where
    `wide`, `[rows, 1]`, and of tiles `[rows, ceil(cols / size)]`: every row has its own, be they equal.

    Attributes:
        granularity: `tensor`, `channel` (a row) or `block` (a tile).
        size: Rows and columns of a tile.
        wide: Whether scales are float32, as in files of others.
        activations: Whether inputs are rounded to 8 bits as well, at run time; else they stay as they are.
        peak: Greatest magnitude of the whole tensor, for a scale per tensor, where only some rows are at hand.
    """

    granularity: str = CHANNEL
    size: int = 128
    wide: bool = False
    activations: bool = True
    peak: float | None = field(default=None, compare=False)

    unit = 1
    joint = False

    def __post_init__(self) -> None:
        if self.granularity not in (TENSOR, CHANNEL, BLOCK) or self.size < 1:
            raise UsageError(f"fp8 has no scale per {self.granularity}", f"choose {TENSOR}, {CHANNEL} or {BLOCK}")

    def __str__(self) -> str:
        size = str(self.size) if self.granularity == BLOCK and self.size != 128 else ""
        return f"fp8-{self.granularity}{size}{'-f32' * self.wide}{'' if self.activations else '-a16'}"

    @property
    def block(self) -> int:
        """Columns of a tile, or -1: a row or more."""
        return self.size if self.granularity == BLOCK else -1

    @property
    def shared(self) -> bool:
        """Whether all rows of a tensor share something, so that `peak` must be known to code some of them."""
        return self.granularity == TENSOR

    def sharing(self, peak: float) -> Self:
        """Returns the same grid for tensors whose greatest magnitude is `peak`."""
        return replace(self, peak=peak)

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns 8 and the scale's bits, spread."""
        tiles = -(-shape[-1] // self.size) * -(-shape[0] // self.size)
        count = {TENSOR: 1, CHANNEL: shape[0], BLOCK: tiles}[self.granularity]
        return 8 + count * (2 * _SCALE_BITS if self.wide else _SCALE_BITS) / (shape[0] * shape[-1])

    def reject(self, shape: Shape) -> str | None:
        """Returns a reason for what is no matrix, or has tiles that inputs cannot be cut into."""
        if self.granularity == BLOCK and len(shape) == 2 and shape[-1] % self.size:
            return f"its width {shape[-1]} is no multiple of the tile size {self.size}"
        return _no_matrix(shape)

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns `weight` `[rows, cols]` with its peaks on the greatest code.

        The rows start where a tile does. `importance` is not used: the error of a float follows its own size.
        """
        weight = weight.float()
        if self.granularity == TENSOR:
            grid = fp8.scales(_peak(weight, self.peak), fp8.LARGEST).repeat(len(weight), 1)
        elif self.granularity == CHANNEL:
            grid = fp8.scales(weight.abs().amax(-1, keepdim=True), fp8.LARGEST)
        else:
            tiles = fp8.scales(fp8.block_peaks(weight, self.size), fp8.LARGEST)
            grid = tiles.repeat_interleave(self.size, 0)[: len(weight)]
        grid = (grid.float() if self.wide else grid).contiguous()
        arrays = {"values": fp8.encode(weight, self._spread(grid, weight.shape[1])), "scales": grid}
        return QuantizedTensor(self, tuple(weight.shape), arrays)

    def decode(self, coded: QuantizedTensor) -> Tensor:
        """Returns `values * scales`, float32."""
        return coded.arrays["values"].float() * self._spread(coded.arrays["scales"], coded.shape[1]).float()

    def _spread(self, grid: Tensor, cols: int) -> Tensor:
        return grid.repeat_interleave(self.size, 1)[:, :cols] if self.granularity == BLOCK else grid


@dataclass(frozen=True, slots=True)
class PackedInt(AffineInt):
    """Affine integers whose scales are bfloat16, as compressed-tensors files of bfloat16 models have them.

    Arrays as those of `AffineInt`, but `scales` bfloat16. Nearest rounding gives the codes of llm-compressor.
    """

    def __str__(self) -> str:
        return f"{AffineInt.__str__(self)}-bf16"

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns code bits plus scale and, where it is not the middle, zero point, spread over the group."""
        return self.bits + (_SCALE_BITS + (0 if self.symmetric else self.bits)) / self.group(shape[-1])

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns `weight` `[rows, cols]` rounded as llm-compressor does without data."""
        weight = weight.float()
        low, high = affine.extremes(weight, self.group(weight.shape[-1]))
        brain = fp8.are_brain(weight)
        return self._coded(weight, *packed_ints.integer_grid(low, high, self.bits, self.symmetric, brain))

    def encode_within(self, weight: Tensor, low: Tensor, high: Tensor) -> QuantizedTensor:
        """Returns `weight` rounded on grids that span `low` to `high`, as `AffineInt.encode_within` does."""
        return self._coded(weight.float(), *packed_ints.within(low, high, self.bits, self.symmetric))

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Levels:
        """Returns the grids of one group of columns `[rows, group]`: clipped where that lowers the weighted error."""
        weights = torch.ones_like(weight[0]) if importance is None else importance
        scales, zeros = packed_ints.search(weight, weights, self.bits, self.symmetric)
        points = torch.arange(2**self.bits, dtype=torch.float32, device=weight.device)
        return self._levels(scales, self._unsigned(zeros), points)

    def neighbours(self, fitted: Levels) -> list[Levels]:
        """Returns grids with a slightly smaller or larger scale and, where zeros are free, the next zero codes."""
        scales, zeros = fitted.state["scales"], fitted.state["zeros"].int()
        moves = [(factor, 0) for factor in _NEARBY]
        if not self.symmetric:
            moves += [(factor, step) for step in (-1, 1) for factor in (1.0, *_NEARBY[:2])]
        top = 2**self.bits - 1
        found = []
        for factor, step in moves:
            moved = (scales.float() * factor).bfloat16()
            moved = torch.where(moved.isfinite() & (moved != 0), moved, scales)
            found.append(self._levels(moved, (zeros + step).clamp(0, top).to(torch.uint8), fitted.points))
        return found

    def _unsigned(self, values: Tensor) -> Tensor:
        middle: float = 2.0 ** (self.bits - 1)
        return (values + middle).to(torch.uint8)

    def _coded(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedTensor:
        codes = packed_ints.round_integers(weight, scales, zeros, self.bits)
        arrays = {"codes": self._unsigned(codes), "scales": scales, "zeros": self._unsigned(zeros)}
        return QuantizedTensor(self, tuple(weight.shape), arrays)


@dataclass(frozen=True, slots=True)
class Int8Channel(PackedInt):
    """8-bit integers with one scale per row, for 8-bit inputs that are rounded at run time (W8A8)."""

    bits: int = 8
    group_size: int = -1
    symmetric: bool = True

    def __str__(self) -> str:
        return "int8-channel"


@dataclass(frozen=True, slots=True)
class NVFP4:
    """4-bit floats E2M1 in blocks of 16 with E4M3 scales under one global scale: `w = value * scale / global`.

    Arrays of a coded tensor `[rows, cols]`: `codes` uint8 `[rows, cols / 2]`, the even column low; `scales`
    float8_e4m3fn `[rows, cols / 16]`; `globals` float32 `[rows, 1]`, equal in all rows. Inputs stay as they are.

    Attributes:
        peak: Greatest magnitude of all tensors that share the global scale; None for that of the tensor.
    """

    peak: float | None = field(default=None, compare=False)

    unit = 1
    block = fp4.NV_BLOCK
    shared = True
    joint = True  # vLLM keeps one global scale of those that it fuses

    def __str__(self) -> str:
        return "nvfp4-a16"

    def sharing(self, peak: float) -> Self:
        """Returns the same grid for tensors whose greatest magnitude is `peak`."""
        return replace(self, peak=peak)

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns 4.5 and the global scale's bits, spread."""
        return 4 + 8 / fp4.NV_BLOCK + 32 / (shape[0] * shape[-1])

    def reject(self, shape: Shape) -> str | None:
        """Returns a reason for what is no matrix, or no whole number of blocks wide."""
        return _no_matrix(shape) or _no_blocks(shape, fp4.NV_BLOCK)

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns `weight` with the peak of each block on the greatest code."""
        weight = weight.float()
        shared = fp4.global_scale(_peak(weight, self.peak))
        codes, scales = fp4.nv_encode(weight, shared)
        arrays = {"codes": fp4.pack(codes), "scales": scales, "globals": shared.repeat(len(weight), 1)}
        return QuantizedTensor(self, tuple(weight.shape), arrays)

    def decode(self, coded: QuantizedTensor) -> Tensor:
        """Returns the float32 values."""
        codes, scales, shared = (coded.arrays[key] for key in ("codes", "scales", "globals"))
        return fp4.decode(fp4.unpack(codes), scales.float() / shared)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Levels:
        """Returns grids of one block of columns `[rows, 16]` under the global scale of `peak`.

        Raises:
            ValueError: the peak is not known; one block does not tell it.
        """
        if self.peak is None:
            raise ValueError("nvfp4 is fitted block by block only where its peak is known")
        weights = torch.ones_like(weight[0]) if importance is None else importance
        return self._levels(fp4.nv_search(weight, weights, self._shared(weight.device)))

    def assemble(self, codes: Tensor, parts: Sequence[Levels]) -> QuantizedTensor:
        """Returns the coded tensor of chosen points."""
        arrays = _assembled(codes, parts)
        shared = self._shared(codes.device).repeat(len(codes), 1)
        arrays |= {"scales": arrays["scales"].view(torch.float8_e4m3fn), "globals": shared}
        return QuantizedTensor(self, tuple(codes.shape), arrays)

    def neighbours(self, fitted: Levels) -> list[Levels]:
        """Returns grids whose scales are the next two storable ones on either side."""
        stored = fitted.state["scales"].int()
        return [self._levels((stored + step).clamp(1, 126).to(torch.uint8)) for step in (-1, 1, -2, 2)]

    def choose(self, tried: Sequence[Levels], which: Tensor) -> Levels:
        """Returns the grids that `which` says."""
        return self._levels(levels.chosen(tried, which)["scales"])

    def _shared(self, device: torch.device) -> Tensor:
        return fp4.global_scale(torch.tensor(self.peak, device=device))

    def _levels(self, stored: Tensor) -> Levels:
        scale = stored.view(torch.float8_e4m3fn).float() / self._shared(stored.device)
        return _fp4_levels(scale, stored)


@dataclass(frozen=True, slots=True)
class MXFP4:
    """4-bit floats E2M1 in blocks of 32 with powers of two as scales (E8M0). Inputs stay as they are.

    Arrays of a coded tensor `[rows, cols]`: `codes` uint8 `[rows, cols / 2]`, the even column low; `scales` uint8
    `[rows, cols / 32]`, of the value `2 ** (byte - 127)`.
    """

    unit = 1
    block = fp4.MX_BLOCK

    def __str__(self) -> str:
        return "mxfp4-a16"

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns 4.25."""
        return 4 + 8 / fp4.MX_BLOCK

    def reject(self, shape: Shape) -> str | None:
        """Returns a reason for what is no matrix, or no whole number of blocks wide."""
        return _no_matrix(shape) or _no_blocks(shape, fp4.MX_BLOCK)

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns `weight` with the exponent of each block that its peak asks for."""
        codes, scales = fp4.mx_encode(weight.float())
        return QuantizedTensor(self, tuple(weight.shape), {"codes": fp4.pack(codes), "scales": scales})

    def decode(self, coded: QuantizedTensor) -> Tensor:
        """Returns the float32 values."""
        return fp4.decode(fp4.unpack(coded.arrays["codes"]), fp4.powers(coded.arrays["scales"]))

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Levels:
        """Returns grids of one block of columns `[rows, 32]`, with the best exponent of three."""
        weights = torch.ones_like(weight[0]) if importance is None else importance
        return self._levels(fp4.mx_search(weight, weights))

    def assemble(self, codes: Tensor, parts: Sequence[Levels]) -> QuantizedTensor:
        """Returns the coded tensor of chosen points."""
        return QuantizedTensor(self, tuple(codes.shape), _assembled(codes, parts))

    def neighbours(self, fitted: Levels) -> list[Levels]:
        """Returns grids with the next smaller and larger exponent."""
        stored = fitted.state["scales"].int()
        return [self._levels((stored + step).clamp(0, 254).to(torch.uint8)) for step in (-1, 1)]

    def choose(self, tried: Sequence[Levels], which: Tensor) -> Levels:
        """Returns the grids that `which` says."""
        return self._levels(levels.chosen(tried, which)["scales"])

    def _levels(self, stored: Tensor) -> Levels:
        return _fp4_levels(fp4.powers(stored), stored)


def _fp4_levels(scale: Tensor, stored: Tensor) -> Levels:
    return Levels(scale, torch.zeros_like(scale), fp4.POINTS.to(scale.device), {"scales": stored})


def _assembled(points: Tensor, parts: Sequence[Levels]) -> dict[str, Tensor]:
    """Returns codes two to a byte, of indices into the points, and the stored scales side by side."""
    codes = fp4.POINT_CODES.to(points.device)[points.int()]
    return {"codes": fp4.pack(codes), "scales": torch.cat([part.state["scales"] for part in parts], 1)}


def _no_blocks(shape: Shape, block: int) -> str | None:
    return f"its width {shape[-1]} is no multiple of the block size {block}" if shape[-1] % block else None


def parse(match: re.Match[str]) -> Scheme:
    """Returns the scheme of a spelling that the families of `quantize.schemes` have recognised."""
    text = match[0]
    if text == "int8-channel":
        return Int8Channel()
    if text.startswith("int"):
        group = -1 if match["packed"] == "row" else int(match["packed"].removeprefix("g"))
        return PackedInt(int(match["width"]), group, match["middle"] is not None)
    if text.endswith("fp4-a16"):
        return NVFP4() if text.startswith("nv") else MXFP4()
    size = int(match["size"] or 128)
    return FP8(match["granularity"], size, match["wide"] is not None, match["a16"] is None)


def members() -> Sequence[Scheme]:
    """Returns some grids of each family."""
    packed = [PackedInt(bits, 128, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
    return [FP8(CHANNEL), FP8(BLOCK), FP8(TENSOR), FP8(CHANNEL, activations=False), Int8Channel(), *packed,
            NVFP4(), MXFP4()]  # fmt: skip
