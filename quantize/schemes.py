"""Schemes: on which grid one weight tensor lives, and the tensors coded on such a grid.

A scheme is a frozen value with no names and no I/O. `str(scheme)` is its spelling in recipes, plans and cards, and
`parse_scheme` reads it back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quantize.errors import UsageError
from quantize.kernels import affine, affine_search, levels
from quantize.kernels.cpu import ggml
from quantize.kernels.levels import Levels

Shape = tuple[int, ...]


@runtime_checkable
class Scheme(Protocol):
    """The grid of one weight tensor of logical shape `[..., in_features]`."""

    @property
    def block(self) -> int:
        """Weights along the input dimension that share one fitted scale; 1 where nothing is shared, -1 for a row."""

    @property
    def unit(self) -> int:
        """Weights along the input dimension that are coded together."""

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns the stored bits per weight of a tensor of `shape`, scales and zero points included."""

    def reject(self, shape: Shape) -> str | None:
        """Returns why a tensor of `shape` cannot lie on this grid, or None when it can."""

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns float `weight` rounded to points of a grid fitted to it; `weight` is not changed.

        Args:
            weight: `[..., in_features]`.
            importance: Mean square of each input column, float32 `[in_features]`, for grids that weigh errors by it.
        """

    def decode(self, coded: QuantizedTensor) -> Tensor:
        """Returns the float32 values of `coded`, which must be of this scheme."""


@runtime_checkable
class Levelled(Scheme, Protocol):
    """A grid whose every weight is `scale * point + offset`: what error feedback can round to, column by column."""

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Levels:
        """Returns grids fitted to one block of columns.

        Args:
            weight: float32 `[rows, block]`.
            importance: Cost of a squared error of each column, float32 `[block]`; None for equal costs.
        """

    def assemble(self, codes: Tensor, parts: Sequence[Levels]) -> QuantizedTensor:
        """Returns the coded tensor.

        Args:
            codes: uint8 `[rows, cols]`, indices into the points.
            parts: The grids of each block of columns, in order.
        """

    def neighbours(self, fitted: Levels) -> list[Levels]:
        """Returns other storable grids of one block, every sub-block a small step away."""

    def choose(self, tried: Sequence[Levels], which: Tensor) -> Levels:
        """Returns the grids in which each sub-block has those of `tried` that int64 `which` `[rows, subs]` says."""


@runtime_checkable
class Spanned(Scheme, Protocol):
    """A grid that spans each group from a lowest to a highest value, which may be moved: what can be clipped."""

    def group(self, cols: int) -> int:
        """Returns the number of inputs that share a scale in a row of `cols`."""

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what each group of float32 `weight` `[rows, cols]` spans, both float32 `[rows, groups]`."""

    def round_trip(self, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Returns what `weight` reads back as on grids that span `low` to `high`; float32, same shape."""

    def encode_within(self, weight: Tensor, low: Tensor, high: Tensor) -> QuantizedTensor:
        """Returns `weight` rounded on grids that span `low` to `high`; values outside saturate."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A tensor coded under a scheme.

    Attributes:
        scheme: The grid.
        shape: Logical shape `[out_features, in_features]`.
        arrays: The scheme's own arrays; `AffineInt` documents its three.
    """

    scheme: Scheme
    shape: Shape
    arrays: Mapping[str, Tensor]

    def dequantize(self) -> Tensor:
        """Returns the float32 values, shape `shape`: the one truth that writers, kernels and evaluator agree on."""
        return self.scheme.decode(self)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Returns a run of rows: the first dimension of every array is the tensor's own."""
        arrays = {key: array[start:stop] for key, array in self.arrays.items()}
        return QuantizedTensor(self.scheme, (min(stop, self.shape[0]) - start, *self.shape[1:]), arrays)


# The spelling in recipes; safetensors headers have the same in upper case.
DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8_e4m3": torch.float8_e4m3fn,
    "f8_e5m2": torch.float8_e5m2,
    "f8_e4m3fnuz": torch.float8_e4m3fnuz,
    "f8_e5m2fnuz": torch.float8_e5m2fnuz,
    "c64": torch.complex64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u64": torch.uint64,
    "u32": torch.uint32,
    "u16": torch.uint16,
    "u8": torch.uint8,
    "bool": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    DTYPES["f8_e8m0"] = torch.float8_e8m0fnu
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the recipe spelling of `dtype`, such as `bf16`."""
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class Plain:
    """No grid: values as they are in `dtype`."""

    dtype: torch.dtype

    block = 1
    unit = 1

    def __str__(self) -> str:
        return dtype_name(self.dtype)

    @property
    def holds_weights(self) -> bool:
        """Whether weights may be cast to it: to 8 bits only with a scale, which it has not."""
        return self.dtype.is_floating_point and self.dtype.itemsize > 1

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns the bits of one element."""
        return self.dtype.itemsize * 8.0

    def reject(self, shape: Shape) -> str | None:
        """Returns None: every shape can be stored plainly."""
        return None

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns `weight` cast to `dtype`, round to nearest even."""
        return QuantizedTensor(self, tuple(weight.shape), {"values": weight.to(self.dtype).contiguous()})

    def decode(self, coded: QuantizedTensor) -> Tensor:
        """Returns the values as float32."""
        return coded.arrays["values"].float()


# Factors on a scale that lead to the neighbouring grids.
_NEARBY = (0.98, 1.02, 0.95, 1.05)


@dataclass(frozen=True, slots=True)
class AffineInt:
    """Integer codes with one scale and one zero point per group of inputs: `w = (code - zero) * scale`.

    Arrays of a coded tensor of shape `[rows, cols]`, with `groups = cols // group`:
    `codes` uint8 `[rows, cols]` in `0 .. 2**bits - 1`; `scales` float16 `[rows, groups]`; `zeros` uint8
    `[rows, groups]`, the true zero code (the middle code everywhere when symmetric). In files of others the columns of
    a group may lie apart, or the last group be shorter; then there is a fourth, `groups`: int64 `[rows, cols]`, the
    group of each column, the same in every row (one row expanded).

    Attributes:
        bits: Code width, 2 to 8.
        group_size: Inputs that share a scale; -1 for a whole row.
        symmetric: Whether the zero point is fixed to the middle code.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = False

    unit = 1

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"{self.bits} bits is no integer scheme", "choose 2 to 8 bits")
        if self.group_size != -1 and self.group_size < 8:
            raise UsageError(f"group size {self.group_size} is too small", "choose 16, 32, 64, 128 or -1 (a row)")

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.bits}-{group}{'-sym' if self.symmetric else ''}"

    @property
    def block(self) -> int:
        """Inputs that share a scale, or -1 for a whole row."""
        return self.group_size

    def group(self, cols: int) -> int:
        """Returns the number of inputs that share a scale in a row of `cols`."""
        return cols if self.group_size == -1 else self.group_size

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns code bits plus a float16 scale and a zero of `bits` bits, spread over the group."""
        return self.bits + (16 + self.bits) / self.group(shape[-1])

    def reject(self, shape: Shape) -> str | None:
        """Returns a reason for tensors that are not matrices or whose width the group does not divide."""
        if len(shape) != 2:
            return f"{len(shape)}-dimensional, not a matrix"
        if shape[-1] == 0 or shape[-1] % self.group(shape[-1]):
            return f"its width {shape[-1]} is no multiple of the group size {self.group_size}"
        return None

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns `weight` `[rows, cols]` rounded on grids that just hold each group's extremes and zero."""
        low, high = affine.extremes(weight.float(), self.group(weight.shape[-1]))
        return self.encode_within(weight, low, high)

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the least and the greatest value of each group, both stretched to include 0."""
        return affine.extremes(weight, self.group(weight.shape[-1]))

    def round_trip(self, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Returns what `weight` reads back as on grids that span `low` to `high`."""
        return affine.round_trip(weight, low, high, self.bits, self.symmetric)

    def encode_within(self, weight: Tensor, low: Tensor, high: Tensor) -> QuantizedTensor:
        """Returns `weight` rounded on grids that span `low` to `high`; values outside saturate.

        Args:
            weight: Float `[rows, cols]`.
            low: float32 `[rows, groups]`, at most 0.
            high: float32 `[rows, groups]`, at least 0.
        """
        scales, zeros = affine.grid(low, high, self.bits, self.symmetric)
        codes = affine.round_to_codes(weight.float(), scales, zeros, self.bits)
        arrays = {
            "codes": codes.to(torch.uint8),
            "scales": scales.to(torch.float16),
            "zeros": zeros.to(torch.uint8),
        }
        return QuantizedTensor(self, tuple(weight.shape), arrays)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Levels:
        """Returns the grids of one group of columns `[rows, group]`: clipped where that lowers the weighted error."""
        weights = torch.ones_like(weight[0]) if importance is None else importance
        scales, zeros = affine_search.search(weight, weights, self.bits, self.symmetric)
        points = torch.arange(2**self.bits, dtype=torch.float32, device=weight.device)
        return self._levels(scales.to(torch.float16), zeros.to(torch.uint8), points)

    def assemble(self, codes: Tensor, parts: Sequence[Levels]) -> QuantizedTensor:
        """Returns the codes with the scales and zeros of their groups."""
        arrays = {key: torch.cat([part.state[key] for part in parts], 1) for key in ("scales", "zeros")}
        return QuantizedTensor(self, tuple(codes.shape), {"codes": codes, **arrays})

    def neighbours(self, fitted: Levels) -> list[Levels]:
        """Returns grids with a slightly smaller or larger scale and, where zeros are free, the next zero codes."""
        scales, zeros = fitted.state["scales"], fitted.state["zeros"].int()
        moves = [(factor, 0) for factor in _NEARBY]
        if not self.symmetric:
            moves += [(factor, step) for step in (-1, 1) for factor in (1.0, *_NEARBY[:2])]
        top = 2**self.bits - 1
        return [
            self._levels(
                _safe_half(scales.float() * f, scales), (zeros + step).clamp(0, top).to(torch.uint8), fitted.points
            )
            for f, step in moves
        ]

    def choose(self, tried: Sequence[Levels], which: Tensor) -> Levels:
        """Returns the grids that `which` says."""
        state = levels.chosen(tried, which)
        return self._levels(state["scales"], state["zeros"], tried[0].points)

    def _levels(self, scales: Tensor, zeros: Tensor, points: Tensor) -> Levels:
        values = scales.float()
        return Levels(values, -zeros.float() * values, points, {"scales": scales, "zeros": zeros})

    def decode(self, coded: QuantizedTensor) -> Tensor:
        """Returns `(codes - zeros) * scales`, float32 `[rows, cols]`."""
        codes, scales, zeros = (coded.arrays[key] for key in ("codes", "scales", "zeros"))
        groups = coded.arrays.get("groups")
        if groups is not None:
            return affine.dequantize_scattered(codes, scales, zeros, groups)
        return affine.dequantize(codes, scales, zeros)


@dataclass(frozen=True, slots=True)
class GGMLBlock:
    """A block grid of GGML, as GGUF files hold it.

    A coded tensor of shape `[..., cols]` has one array, `blocks`: uint8 `[..., cols // block * block_bytes]`,
    the blocks of each row back to back as in the file.

    Attributes:
        type: GGML's name of the grid in lower case, such as `q4_1`, `q6_k`, `iq3_xxs`.
    """

    type: str

    def __post_init__(self) -> None:
        if self.type not in ggml.BLOCKS or ggml.BLOCKS[self.type].weights == 1:
            known = ", ".join(name for name, block in ggml.BLOCKS.items() if block.weights > 1)
            raise UsageError(f"'{self.type}' is no GGML type", f"choose from: {known}")

    def __str__(self) -> str:
        return self.type

    @property
    def block(self) -> int:
        """Weights of a block (32 to 256): they share a scale, super-blocks one scale of scales."""
        return ggml.BLOCKS[self.type].weights

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return ggml.BLOCKS[self.type].nbytes

    @property
    def unit(self) -> int:
        """Weights that one codebook entry stands for; 1 for grids without a codebook."""
        return {"iq1": 8, "iq2": 8, "iq3": 4}.get(self.type[:3], 1)

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns the bits of a block spread over its weights."""
        return self.block_bytes * 8 / self.block

    def reject(self, shape: Shape) -> str | None:
        """Returns a reason for tensors whose width is not a whole number of blocks."""
        if not shape or shape[-1] == 0 or shape[-1] % self.block:
            width = shape[-1] if shape else 0
            return f"its width {width} is no multiple of the block size {self.block} of {self.type}"
        return None

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns `weight` `[..., cols]` rounded as llama.cpp does, byte for byte.

        Raises:
            UsageError: the type needs importance and there is none.
        """
        if importance is None and self.type in ggml.NEEDS_IMPORTANCE:
            raise UsageError(f"{self.type} cannot be made without importance", "let it be gathered: --imatrix auto")
        rows = weight.float().reshape(-1, weight.shape[-1]).numpy()
        blocks = ggml.encode(self.type, rows, None if importance is None else importance.float().numpy())
        blocks = blocks.reshape(*weight.shape[:-1], -1)
        return QuantizedTensor(self, tuple(weight.shape), {"blocks": torch.from_numpy(blocks)})

    def decode(self, coded: QuantizedTensor) -> Tensor:
        """Returns the float32 values."""
        blocks = coded.arrays["blocks"]
        values = ggml.decode(self.type, blocks.reshape(-1, blocks.shape[-1]).numpy())
        return torch.from_numpy(values).reshape(coded.shape)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Levels:
        """Returns the grids that `encode` chooses for some columns, one block or more.

        Args:
            weight: float32 `[rows, n * block]` in the processor's memory.
            importance: Of these columns, float32 `[n * block]`.

        Raises:
            KeyError: the type has no levels, but a codebook.
        """
        return levels.split(self.type, self.encode(weight, importance).arrays["blocks"])

    def assemble(self, codes: Tensor, parts: Sequence[Levels]) -> QuantizedTensor:
        """Returns the coded tensor of chosen levels.

        Args:
            codes: Index into the points of each weight, uint8 `[rows, cols]`.
            parts: The grids of its columns, each part a whole number of blocks, in order.
        """
        blocks = levels.join(self.type, levels.concatenate(self.type, parts), codes)
        return QuantizedTensor(self, tuple(codes.shape), {"blocks": blocks})

    def neighbours(self, fitted: Levels) -> list[Levels]:
        """Returns grids whose sub-block scales and minimums are a step away, under the same super-scales."""
        return levels.neighbours(self.type, fitted)

    def choose(self, tried: Sequence[Levels], which: Tensor) -> Levels:
        """Returns the grids that `which` says."""
        return levels.choose(self.type, tried, which)


def _safe_half(scale: Tensor, old: Tensor) -> Tensor:
    """Returns the nearest float16 scales; the old ones where that would be 0 or Inf."""
    new = scale.half()
    return torch.where(new.isfinite() & (new != 0), new, old)


def _affine(match: re.Match[str]) -> Scheme:
    group = -1 if match["group"] == "row" else int(match["group"].removeprefix("g"))
    return AffineInt(int(match["bits"]), group, match["sym"] is not None)


def _exl2(match: re.Match[str]) -> Scheme:
    from quantize.exl2_scheme import parse

    return parse(match[0])


def _compressed(match: re.Match[str]) -> Scheme:
    from quantize.float_schemes import parse  # it needs this module

    return parse(match)


def _mlx(match: re.Match[str]) -> Scheme:
    from quantize.mlx_schemes import build

    return build(match)


@dataclass(frozen=True, slots=True)
class Family:
    """A family of grids as recipes spell it.

    Attributes:
        pattern: Regular expression of the spelling.
        build: Makes the scheme of a match.
        examples: Some members.
        meaning: What they are, in one line.
    """

    pattern: str
    build: Callable[[re.Match[str]], Scheme]
    examples: tuple[str, ...]
    meaning: str


# A new family of grids takes a row here.
FAMILIES = (
    Family(
        r"int(?P<bits>\d+)-(?P<group>g\d+|row)(?P<sym>-sym)?",
        _affine,
        ("int4-g128", "int3-g64-sym", "int8-row"),
        "integers of 2 to 8 bits, one scale per group of inputs or row; -sym without zero points",
    ),
    Family(
        "|".join(DTYPES),
        lambda match: Plain(DTYPES[match[0]]),
        ("bf16", "f16", "f32"),
        "plain numbers of that type",
    ),
    Family(
        r"i?q\d_\w+|tq\d_0|(mx|nv)fp4",
        lambda match: GGMLBlock(match[0]),
        ("q4_k", "q8_0", "iq2_xs"),
        "llama.cpp's blocks",
    ),
    Family(
        r"exl2(-\db(\.\d{1,4})?(g\d+)?)+(-g\d+)?",
        _exl2,
        ("exl2-4b-g128", "exl2-5b.10-4b.90-g32", "exl2-8b.05g32-4b.95g128"),
        "EXL2's widths of 2 to 8 bits, each with the share of input channels that it gets, neediest first",
    ),
    Family(
        r"fp8-(?P<granularity>tensor|channel|block)(?P<size>(?<=block)\d+)?(?P<wide>-f32)?(?P<a16>-a16)?"
        r"|int8-channel|int(?P<width>\d+)-(?P<packed>g\d+|row)(?P<middle>-sym)?-bf16|(?:mx|nv)fp4-a16",
        _compressed,
        ("fp8-channel", "fp8-block", "int8-channel", "int4-g128-sym-bf16", "nvfp4-a16"),
        "compressed-tensors' grids; fp8 and int8-channel round inputs to 8 bits as well, unless -a16",
    ),
    Family(
        r"mlx(?P<bits>\d)-g(?P<group>\d+)(-(?P<dtype>bf16|f16|f32))?|mlx-(?P<mode>mxfp4|mxfp8|nvfp4)(-(?P<type>f16|f32))?",
        _mlx,
        ("mlx4-g64", "mlx3-g32", "mlx-mxfp4"),
        "MLX's grids: 2, 3, 4, 5, 6, 8 bits with a scale and a bias per group of 32, 64 or 128; small floats",
    ),
)


def parse_scheme(text: str) -> Scheme:
    """Returns the scheme spelt `text`; the inverse of `str(scheme)`.

    Raises:
        UsageError: `text` is no scheme.
    """
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, text.strip().lower()):
            return family.build(match)
    raise UsageError(f"'{text}' is no scheme", "write int4-g128, int4-g64-sym, int8-row, bf16, f16, f32 or keep")
