"""MLX folders: what mlx-lm, LM Studio and mlx-swift load on Apple's processors.

A quantized linear or embedding `P` of shape `[out, in]` is `P.weight` uint32 `[out, in * bits / 32]`, `P.scales` and,
of affine grids, `P.biases`, `[out, in / group]`. Each row of codes is one stream of bits, lowest first:

    byte 0      byte 1      byte 2         3 bits: code i takes bits 3i to 3i+2
    22111000    54443332    77766655

Experts are stacked: `[experts, out, ...]` under `switch_mlp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from quantize.errors import InputError, UsageError
from quantize.formats import bitstream, mlx_config, mlx_names
from quantize.formats.base import Checkpoint, Header, Layout, Piece, TensorInfo
from quantize.formats.container import Extent, read_rows
from quantize.formats.folder import FolderCheckpoint, FolderFormat, is_folder, read_json
from quantize.mlx_schemes import GROUPS, MLXAffine, MLXFloat
from quantize.schemes import Plain, QuantizedTensor, Scheme, Shape

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MATRIX, _STACK = 2, 3


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns uint8 codes `[rows, cols]` as int32 words `[rows, cols * bits / 32]`; undone by `unpack`."""
    return bitstream.pack(codes.T, bits).T.contiguous()


def unpack(words: Tensor, bits: int) -> Tensor:
    """Returns the uint8 codes `[rows, cols]` of int32 words `[rows, cols * bits / 32]`."""
    return bitstream.unpack(words.T, bits).T.contiguous()


class MLXCheckpoint(FolderCheckpoint):
    """An MLX folder, under transformers' names: stacks of experts are read as single ones."""

    format = "mlx"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.quantization = mlx_config.block_of(path, read_json(path / "config.json"))
        self.config.pop("quantization", None)
        self._settings = mlx_config.Settings(path, self.quantization)

    @cached_property
    def _places(self) -> Mapping[str, tuple[str, int | None]]:
        """The array `NAME.weight` that a tensor lies in, and its place in a stack."""
        places: dict[str, tuple[str, int | None]] = {}
        for name, extent in self.extents.items():
            if name.endswith(".weight") and len(extent.shape) == _STACK:
                for index in range(extent.shape[0]):
                    places[mlx_names.expert(name, index) or self._unknown_stack(name)] = name, index
            elif not self._is_part(name):
                places[name] = name, None
        return places

    def _is_part(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf in ("scales", "biases") and f"{module}.weight" in self.extents

    def _unknown_stack(self, name: str) -> str:
        raise InputError(f"{self.extents[name].file}: '{name}' is a stack of no experts that can be read")

    def _assemble(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for name, (stored, index) in self._places.items():
            module, extent = stored.removesuffix(".weight"), self.extents[stored]
            shape, scheme, nbytes = extent.shape, self._scheme(module), extent.nbytes
            if index is not None:
                shape, nbytes = shape[1:], nbytes // extent.shape[0]
            if scheme is None:
                tensors[name] = TensorInfo(name, shape, Plain(extent.dtype), nbytes)
                continue
            shape = (*shape[:-1], shape[-1] * bitstream.WORD // scheme.bits)
            parts = sum(self.extents[part].nbytes for part in self._parts(module, scheme))
            tensors[name] = TensorInfo(name, shape, scheme, parts // (1 if index is None else extent.shape[0]))
        return tensors

    @staticmethod
    def _parts(module: str, scheme: Scheme) -> list[str]:
        leaves = ("weight", "scales", "biases") if isinstance(scheme, MLXAffine) else ("weight", "scales")
        return [f"{module}.{leaf}" for leaf in leaves]

    def _scheme(self, module: str) -> MLXAffine | MLXFloat | None:
        """Returns the grid of a module, checked against the shapes of its arrays; None for a plain one."""
        scales = self.extents.get(f"{module}.scales")
        if scales is None:
            return None
        words = self.extents[f"{module}.weight"]
        scheme = self._settings.of(module, scales.dtype, self._dtype)
        for part in self._parts(module, scheme):
            if part not in self.extents:
                raise InputError(f"{words.file}: lacks tensor '{part}'", "download it again")
        agree = words.dtype in (torch.uint32, torch.int32) and words.shape[:-1] == scales.shape[:-1]
        if isinstance(scheme, MLXAffine):
            agree &= self.extents[f"{module}.biases"].shape == scales.shape
        if not agree or len(words.shape) < _MATRIX:
            raise InputError(f"{words.file}: the shapes or types of '{module}.weight', scales and biases do not agree")
        if words.shape[-1] * bitstream.WORD != scales.shape[-1] * scheme.group_size * scheme.bits:
            raise InputError(
                f"{words.file}: '{module}' has {words.shape[-1]} words and {scales.shape[-1]} groups in a row, its "
                f"config says {scheme.bits} bits in groups of {scheme.group_size}",
                "the file or its config is broken: download both again",
            )
        return scheme

    @property
    def _dtype(self) -> torch.dtype:
        """The model's floating type."""
        said = str(self.config.get("torch_dtype") or self.config.get("dtype") or "")
        return {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}.get(said, torch.bfloat16)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows of a tensor, dequantized to float32 where it is quantized."""
        coded = self.read_coded(name, start, stop)
        if coded is not None:
            return coded.dequantize()
        stored, index = self._places[name]
        return read_rows(_slice(self.extents[stored], index), start, stop)

    def read_coded(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns the codes of rows of a quantized tensor, or None for a plain one."""
        info = self.tensors[name]
        if isinstance(info.scheme, Plain):
            return None
        assert isinstance(info.scheme, MLXAffine | MLXFloat)
        stored, index = self._places[name]
        found = {
            part.rpartition(".")[2]: read_rows(_slice(self.extents[part], index), start, stop)
            for part in self._parts(stored.removesuffix(".weight"), info.scheme)
        }
        codes = unpack(found.pop("weight").view(torch.int32), info.scheme.bits)
        return QuantizedTensor(info.scheme, tuple(codes.shape), {"codes": codes, **found})

    def file(self, name: str) -> Path:
        """Returns the shard that holds the tensor, or its codes."""
        return self.extents[self._places[name][0]].file


def _slice(extent: Extent, index: int | None) -> Extent:
    """Returns one matrix of a stack, or the array itself."""
    if index is None:
        return extent
    nbytes = extent.nbytes // extent.shape[0]
    return Extent(extent.file, extent.dtype, extent.shape[1:], extent.offset + index * nbytes, nbytes)


class MLXFormat(FolderFormat):
    """Reader and writer of MLX folders."""

    name = "mlx"
    summary = "MLX, 2 to 8 bits and small floats: mlx-lm, LM Studio, mlx-swift"
    one_group = False
    ends = True
    by_rows = True

    def sniff(self, path: Path) -> bool:
        """Returns whether the folder's config has a quantization block as MLX writes it."""
        if not is_folder(path) or not (path / "config.json").is_file():
            return False
        return bool(mlx_config.block_of(path, read_json(path / "config.json")))

    def open(self, path: Path) -> Checkpoint:
        """Returns the folder as a checkpoint."""
        return MLXCheckpoint(path)

    def view(self, checkpoint: Checkpoint, arch: str | None = None, assume_tied: bool = False) -> Checkpoint:
        """Returns the model itself.

        Raises:
            InputError: it is none of the architectures whose names MLX shares with transformers.
        """
        mlx_names.require_known(checkpoint.path, checkpoint.config)
        return checkpoint

    def reject(self, scheme: Scheme) -> str | None:
        """Returns a reason for grids that are not MLX's."""
        return None if isinstance(scheme, Plain | MLXAffine | MLXFloat) else "MLX holds grids of its own only: mlx4-g64"

    def adapted(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """Returns the grid with scales in the model's type, unless it names another than bfloat16 itself."""
        if isinstance(scheme, MLXAffine) and scheme.dtype == torch.bfloat16 and dtype in _FLOATS:
            return MLXAffine(scheme.bits, scheme.group_size, dtype)
        if isinstance(scheme, MLXFloat) and scheme.dtype == torch.bfloat16 and dtype in _FLOATS:
            return MLXFloat(scheme.mode, dtype)
        return scheme

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns why a tensor cannot be packed, or None."""
        return None if name.endswith(".weight") else "its name does not end in .weight"

    def stand_in(self, scheme: Scheme, shape: Shape) -> Scheme | None:
        """Returns the grid with the largest smaller group that divides the width, or None."""
        if not isinstance(scheme, MLXAffine) or len(shape) != _MATRIX:
            return None
        fitting = [group for group in GROUPS if group < scheme.group_size and shape[-1] % group == 0]
        return MLXAffine(scheme.bits, max(fitting), scheme.dtype) if fitting and shape[-1] else None

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Returns weight, scales and biases of a quantized matrix, or the tensor itself; of an expert, its slices."""
        if isinstance(scheme, Plain):
            return [Piece(mlx_names.place(name), scheme.dtype, shape)]
        assert isinstance(scheme, MLXAffine | MLXFloat)
        rows, cols = shape
        groups = cols // scheme.group_size
        found = [Piece(mlx_names.place(name), torch.uint32, (rows, cols * scheme.bits // bitstream.WORD))]
        affine = isinstance(scheme, MLXAffine)
        leaves = ("scales", "biases") if affine else ("scales",)
        dtype = scheme.dtype if affine else torch.uint8
        return found + [Piece(mlx_names.place(name, leaf), dtype, (rows, groups)) for leaf in leaves]

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the packed arrays."""
        if isinstance(coded.scheme, Plain):
            return {mlx_names.place(name): coded.arrays["values"]}
        assert isinstance(coded.scheme, MLXAffine | MLXFloat)
        words = pack(coded.arrays["codes"], coded.scheme.bits).view(torch.uint32)
        rest = {mlx_names.place(name, leaf): value for leaf, value in coded.arrays.items() if leaf != "codes"}
        return {mlx_names.place(name): words, **rest}

    def settled(self, schemes: Mapping[str, Scheme]) -> Self:
        """Returns itself.

        Raises:
            UsageError: experts that are to be stacked have different grids.
        """
        grids: dict[str, tuple[str, Scheme]] = {}
        for name, scheme in schemes.items():
            stack = mlx_names.module(name)
            first, grid = grids.setdefault(stack, (name, scheme))
            if grid != scheme:
                raise UsageError(
                    f"{name} cannot be {scheme}: MLX stacks it with {first}, which is {grid}",
                    "give all experts of a projection one scheme",
                )
        return self

    def header(self, view: Checkpoint, options: Mapping[str, Any]) -> Header:
        """Returns what mlx-lm writes into headers, and says what it does otherwise than transformers."""
        return Header({"format": "mlx"}, tuple(mlx_config.notices(view.config)))

    def layouts(self, files: Mapping[str, Sequence[Piece]], header: Mapping[str, Any]) -> dict[str, Layout]:
        """Returns the layout of each shard; a stack of experts lies whole in the file of its first."""
        return mlx_names.stacked_layouts(files, header)

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Returns the block that mlx-lm reads: the usual grid, and every module that has another or none."""
        return mlx_config.block({mlx_names.module(name): scheme for name, scheme in schemes.items()})

    def configured(self, config: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
        """Returns config.json with the block and what mlx-lm looks for where transformers has it elsewhere."""
        return mlx_config.configured(config, block)

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns no groups: nothing is fused."""
        return []
