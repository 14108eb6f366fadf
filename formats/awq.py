"""AWQ checkpoints, GEMM version: what AutoAWQ wrote and transformers (GPTQModel), vLLM and SGLang read.

Per linear of K inputs and N outputs: `qweight` int32 `[K, N/8]`, `qzeros` int32 `[K/group, N/8]` (true zero points)
and `scales` float16 `[K/group, N]`. The matrix is stored input-major. Eight 4-bit codes share a word; nibble i
(bits 4i to 4i+3) holds column `8c + ORDER[i]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import Checkpoint, Piece, TensorInfo
from quantize.formats.container import Extent, read_rows
from quantize.formats.folder import FolderFormat, PackedCheckpoint, is_folder, read_json, take_quantization
from quantize.formats.fused import fused_tensors
from quantize.schemes import AffineInt, Plain, QuantizedTensor, Scheme, Shape

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(ORDER.index(j) for j in range(8))
_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
_PARTS = (".qweight", ".qzeros", ".scales")


def pack(codes: Tensor) -> Tensor:
    """Returns 4-bit codes `[rows, cols]` (values 0 to 15) as int32 words `[rows, cols / 8]`; undone by `unpack`."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for nibble, column in enumerate(ORDER):
        words |= codes[:, column::8].to(torch.int32) << 4 * nibble  # bit 31 is the sign: it wraps as it should
    return words


def unpack(words: Tensor) -> Tensor:
    """Returns the uint8 codes `[rows, cols]` of int32 words `[rows, cols / 8]`."""
    nibbles = (words.unsqueeze(-1) >> _SHIFTS) & 0xF  # the shift is arithmetic: the mask drops the sign
    return nibbles[..., list(_INVERSE)].to(torch.uint8).flatten(-2)


class AWQCheckpoint(PackedCheckpoint):
    """An AWQ folder; `NAME.qweight`, `NAME.qzeros` and `NAME.scales` form tensor `NAME.weight`."""

    format = "awq"
    parts = _PARTS

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        block = self.quantization
        version = str(block.get("version") or block.get("format") or "gemm").lower()
        bits = block.get("bits", block.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise InputError(f"{path}: AWQ version '{version}' with {bits} bits", "only 4-bit GEMM can be read")
        self._group: object = block.get("group_size", block.get("q_group_size"))

    def _info(self, module: str) -> TensorInfo:
        try:
            words, zeros, scales = (self.extents[module + part] for part in _PARTS)
        except KeyError as error:
            raise InputError(f"{self.path}: lacks tensor '{error.args[0]}'") from None
        if not len(words.shape) == len(zeros.shape) == len(scales.shape) == 2 or not scales.dtype.is_floating_point:
            raise self._disagreement(words, module)
        rows, (groups, cols) = words.shape[0], scales.shape
        right = words.shape == (rows, cols // 8) and zeros.shape == (groups, cols // 8) and cols % 8 == 0
        if (
            not right
            or not groups
            or rows % groups
            or rows // groups < 8
            or (words.dtype, zeros.dtype) != (torch.int32, torch.int32)
        ):
            raise self._disagreement(words, module)
        group = -1 if self._group == -1 and groups == 1 else rows // groups
        if self._group not in (None, group):
            raise InputError(
                f"{words.file}: '{module}' has groups of {group}, config.json says {self._group}",
                "the file or its config is broken: download both again",
            )
        nbytes = words.nbytes + zeros.nbytes + scales.nbytes
        return TensorInfo(f"{module}.weight", (cols, rows), AffineInt(4, group), nbytes)

    @staticmethod
    def _disagreement(words: Extent, module: str) -> InputError:
        return InputError(f"{words.file}: the shapes or types of '{module}.qweight', qzeros and scales do not agree")

    def _codes(self, name: str, start: int, stop: int | None) -> QuantizedTensor | None:
        """Returns rows of a quantized tensor. They lie across the file, so all is read, but only they are unpacked."""
        module = self._coded.get(name)
        if module is None:
            return None
        info = self.tensors[name]
        stop = info.shape[0] if stop is None else min(stop, info.shape[0])
        words, zeros, scales = (read_rows(self.extents[module + part]) for part in _PARTS)
        first, rows = start // 8, slice(start % 8, start % 8 + stop - start)
        arrays = {
            "codes": unpack(words[:, first : -(-stop // 8)])[:, rows].T.contiguous(),
            "scales": scales[:, start:stop].T.contiguous(),
            "zeros": unpack(zeros[:, first : -(-stop // 8)])[:, rows].T.contiguous(),
        }
        return QuantizedTensor(info.scheme, (stop - start, info.shape[1]), arrays)


class AWQFormat(FolderFormat):
    """Reader and writer of AWQ GEMM folders."""

    name = "awq"
    summary = "AWQ GEMM, 4-bit: vLLM, SGLang, transformers with GPTQModel"
    one_group = True

    def sniff(self, path: Path) -> bool:
        """Returns whether the folder's config names AWQ."""
        if not is_folder(path) or not (path / "config.json").is_file():
            return False
        return take_quantization(path, read_json(path / "config.json")).get("quant_method") == "awq"

    def open(self, path: Path) -> Checkpoint:
        """Returns the folder as a checkpoint."""
        return AWQCheckpoint(path)

    def reject(self, scheme: Scheme) -> str | None:
        """Returns a reason for grids other than 4-bit affine ones."""
        if isinstance(scheme, Plain):
            return None
        if type(scheme) is not AffineInt or scheme.bits != 4:
            return "AWQ holds 4-bit integers only"
        if scheme.group_size not in (-1, 16, 32, 64, 128):
            return "AWQ readers take group sizes 16, 32, 64, 128 and -1"
        return None

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Returns qweight, qzeros and scales of a quantized linear, or the tensor itself."""
        if isinstance(scheme, Plain):
            return [Piece(name, scheme.dtype, shape)]
        assert isinstance(scheme, AffineInt)
        (rows, cols), module = shape, name.removesuffix(".weight")
        groups = cols // scheme.group(cols)
        return [
            Piece(f"{module}.qweight", torch.int32, (cols, rows // 8)),
            Piece(f"{module}.qzeros", torch.int32, (groups, rows // 8)),
            Piece(f"{module}.scales", torch.float16, (groups, rows)),
        ]

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns why a matrix cannot be packed, or None: eight outputs share a word."""
        if not name.endswith(".weight"):
            return "its name does not end in .weight"
        return None if shape[0] % 8 == 0 else f"its height {shape[0]} is no multiple of 8"

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the packed arrays, input-major."""
        if isinstance(coded.scheme, Plain):
            return {name: coded.arrays["values"]}
        module = name.removesuffix(".weight")
        return {
            f"{module}.qweight": pack(coded.arrays["codes"].T),
            f"{module}.qzeros": pack(coded.arrays["zeros"].T),
            f"{module}.scales": coded.arrays["scales"].T.to(torch.float16).contiguous(),
        }

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Returns the block that transformers, vLLM and SGLang read; unquantized linears as full module names."""
        groups = {s.group_size for s in schemes.values() if isinstance(s, AffineInt)}
        assert len(groups) == 1, groups  # the plan gives one group size to the whole file
        kept = sorted(n.removesuffix(".weight") for n, s in schemes.items() if isinstance(s, Plain))
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": groups.pop(),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": kept or None,
        }

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns vLLM's fused linears: q/k/v and gate/up of one parent must be all quantized or all not."""
        return fused_tensors(names)
