"""compressed-tensors folders: what llm-compressor writes and vLLM, SGLang and transformers read.

The arrays of linear `NAME` of r outputs and c inputs; weights are never transposed:

    fp8, int8-channel   weight [r, c] as it is, weight_scale [1], [r, 1] or one per tile
    integers            weight_packed int32 [r, words], weight_scale [r, groups], weight_shape int64 [2], and where
                        zero points are free weight_zero_point int32 [words, groups], packed down the rows
    nvfp4, mxfp4        weight_packed uint8 [r, c / 2], weight_scale [r, c / 16 or 32], weight_global_scale [1]

Integers are offset by the middle code and lie in one stream of bits, lowest first; the last word is filled up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.float_schemes import BLOCK, CHANNEL, FP8, MXFP4, NVFP4, TENSOR, Int8Channel, PackedInt
from quantize.formats import compressed_config
from quantize.formats.base import Checkpoint, Piece
from quantize.formats.bitstream import WORD
from quantize.formats.compressed_config import DEEPSEEK, METHOD
from quantize.formats.compressed_folder import CompressedCheckpoint, pack
from quantize.formats.folder import FolderFormat, is_folder, read_json, take_quantization
from quantize.formats.fused import fused_modules, fused_tensors
from quantize.schemes import AffineInt, Plain, QuantizedTensor, Scheme, Shape

# Fused beside q/k/v and gate/up: experts of some models, low-rank attention.
_PAIRS = (("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
# Widths that vLLM has kernels for.
_FAST_BITS = (4, 8)


class CompressedTensorsFormat(FolderFormat):
    """Reader and writer of compressed-tensors folders."""

    name = "compressed-tensors"
    summary = "FP8, INT8, packed 2 to 8 bits, NVFP4, MXFP4: vLLM, SGLang, transformers with compressed-tensors"
    one_group = False

    def sniff(self, path: Path) -> bool:
        """Returns whether the folder's config names compressed-tensors, or fp8."""
        if not is_folder(path) or not (path / "config.json").is_file():
            return False
        return take_quantization(path, read_json(path / "config.json")).get("quant_method") in (METHOD, DEEPSEEK)

    def open(self, path: Path) -> Checkpoint:
        """Returns the folder as a checkpoint."""
        return CompressedCheckpoint(path)

    def reject(self, scheme: Scheme) -> str | None:
        """Returns a reason for grids of other formats."""
        if isinstance(scheme, (Plain, FP8, NVFP4, MXFP4, AffineInt)):
            return None
        return "compressed-tensors holds integers, FP8, NVFP4 and MXFP4"

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns why a matrix cannot be packed, or None: every size can."""
        return None if name.endswith(".weight") else "its name does not end in .weight"

    def stand_in(self, scheme: Scheme, shape: Shape) -> Scheme | None:
        """Returns a scale per row for matrices that tiles do not fit."""
        if isinstance(scheme, FP8) and scheme.granularity == BLOCK and len(shape) == 2:
            return FP8(CHANNEL, wide=scheme.wide, activations=scheme.activations)
        return None

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Returns the arrays of a quantized linear, or the tensor itself."""
        if isinstance(scheme, Plain):
            return [Piece(name, scheme.dtype, shape)]
        rows, cols = shape
        half = (rows, cols // 2)
        if isinstance(scheme, FP8):
            tiles = (-(-rows // scheme.size), -(-cols // scheme.size))
            grid = {TENSOR: (1,), CHANNEL: (rows, 1), BLOCK: tiles}[scheme.granularity]
            scale = torch.float32 if scheme.wide else torch.bfloat16
            parts = {"weight": (torch.float8_e4m3fn, shape), "weight_scale": (scale, grid)}
        elif isinstance(scheme, NVFP4):
            parts = {
                "weight_packed": (torch.uint8, half),
                "weight_scale": (torch.float8_e4m3fn, (rows, cols // scheme.block)),
                "weight_global_scale": (torch.float32, (1,)),
            }
        elif isinstance(scheme, MXFP4):
            parts = {
                "weight_packed": (torch.uint8, half),
                "weight_scale": (torch.uint8, (rows, cols // scheme.block)),
            }
        else:
            assert isinstance(scheme, AffineInt)
            parts = _integer_parts(shape, scheme)
        module = name.removesuffix(".weight")
        return [Piece(f"{module}.{part}", dtype, size) for part, (dtype, size) in parts.items()]

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the arrays of a coded tensor.

        Raises:
            InputError: the columns of its groups lie apart, which the format has given up.
        """
        scheme, arrays = coded.scheme, coded.arrays
        if isinstance(scheme, Plain):
            return {name: arrays["values"]}
        if isinstance(scheme, FP8):
            parts = {"weight": arrays["values"], "weight_scale": _shared_rows(scheme, arrays["scales"])}
        elif isinstance(scheme, (NVFP4, MXFP4)):
            parts = {"weight_packed": arrays["codes"], "weight_scale": arrays["scales"]}
            if isinstance(scheme, NVFP4):
                parts["weight_global_scale"] = _one(arrays["globals"])
        else:
            assert isinstance(scheme, AffineInt)
            if "groups" in arrays:
                raise InputError(f"{name}: the columns of its groups lie apart (act-order)", "say --requantize")
            parts = _integers(coded, scheme)
        module = name.removesuffix(".weight")
        return {f"{module}.{part}": value for part, value in parts.items()}

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Returns the block that transformers, vLLM and SGLang read; unquantized linears as full module names."""
        return compressed_config.block(schemes)

    def notices(self, schemes: Mapping[str, Scheme]) -> list[str]:
        """Returns what engines cannot do with a file of such tensors, one line each."""
        coded = {n.removesuffix(".weight"): s for n, s in schemes.items() if not isinstance(s, Plain)}
        plain = [s.dtype for s in schemes.values() if isinstance(s, Plain) and s.dtype.is_floating_point]
        integers = [s for s in coded.values() if isinstance(s, AffineInt) and not isinstance(s, Int8Channel)]
        found: list[str] = []
        if any(s.bits not in _FAST_BITS for s in integers):
            found.append("vLLM loads packed integers of 4 and 8 bits only")
        if any(not s.symmetric for s in integers):
            found.append("newer transformers load zero points only with CompressedTensorsConfig(dequantize=True)")
        model = max(set(plain), key=plain.count, default=None)
        own = {_scale_dtype(s) for s in coded.values() if isinstance(s, (FP8, AffineInt))}
        if model == torch.float16 and torch.bfloat16 in own:
            found.append("transformers make scales float16 as the model is: --dtype bf16 keeps them as they are")
        elif model == torch.bfloat16 and own - {torch.bfloat16}:
            found.append("transformers make scales bfloat16 as the model is and lose some of their digits")
        torn = [parts for parts in fused_modules(coded).values() if len({coded[part] for part in parts}) > 1]
        if torn:
            found.append(f"vLLM fuses {' and '.join(torn[0])} and wants them on one grid ({len(torn)} such groups)")
        return found

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns vLLM's fused linears: those of one parent are on one grid, with one global scale, or all kept."""
        present = set(names)
        others = [
            (name, name.removesuffix(f"{first}.weight") + f"{second}.weight")
            for first, second in _PAIRS
            for name in names
            if name.endswith(f".{first}.weight")
        ]
        return [*fused_tensors(names), *(group for group in others if present.issuperset(group))]


def _scale_dtype(scheme: FP8 | AffineInt) -> torch.dtype:
    if isinstance(scheme, FP8):
        return torch.float32 if scheme.wide else torch.bfloat16
    return torch.bfloat16 if isinstance(scheme, PackedInt) else torch.float16


def _shared_rows(scheme: FP8, scales: Tensor) -> Tensor:
    """Returns the scales as files have them, of those that a coded tensor has in every row."""
    if scheme.granularity == TENSOR:
        return _one(scales)
    return scales[:: scheme.size].contiguous() if scheme.granularity == BLOCK else scales


def _one(values: Tensor) -> Tensor:
    """Returns the one value of all rows, `[1]`; rows that were coded apart, without a common peak, would differ."""
    assert torch.equal(values, values[:1].expand_as(values)), "rows of one tensor were coded apart"
    return values[0].clone()


def _integer_parts(shape: Shape, scheme: AffineInt) -> dict[str, tuple[torch.dtype, Shape]]:
    rows, cols = shape
    groups = cols // scheme.group(cols)
    scale = _scale_dtype(scheme), (rows, groups)
    if isinstance(scheme, Int8Channel):
        return {"weight": (torch.int8, shape), "weight_scale": scale}
    parts: dict[str, tuple[torch.dtype, Shape]] = {
        "weight_packed": (torch.int32, (rows, -(-cols * scheme.bits // WORD))),
        "weight_scale": scale,
    }
    if not scheme.symmetric:
        parts["weight_zero_point"] = torch.int32, (-(-rows * scheme.bits // WORD), groups)
    return parts | {"weight_shape": (torch.int64, (2,))}


def _integers(coded: QuantizedTensor, scheme: AffineInt) -> dict[str, Tensor]:
    codes, scales = coded.arrays["codes"], coded.arrays["scales"].to(_scale_dtype(scheme))
    if isinstance(scheme, Int8Channel):
        return {"weight": (codes.to(torch.int16) - 128).to(torch.int8), "weight_scale": scales}
    parts = {"weight_packed": pack(codes.T, scheme.bits).T.contiguous(), "weight_scale": scales}
    if not scheme.symmetric:
        parts["weight_zero_point"] = pack(coded.arrays["zeros"], scheme.bits)
    return parts | {"weight_shape": torch.tensor(coded.shape, dtype=torch.int64)}
