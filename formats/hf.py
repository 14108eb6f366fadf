"""Unquantized Hugging Face folders (safetensors)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import Checkpoint, Piece
from quantize.formats.folder import FolderCheckpoint, FolderFormat, is_folder
from quantize.schemes import Plain, QuantizedTensor, Scheme, Shape


class HFFormat(FolderFormat):
    """Reader and writer of plain folders."""

    name = "hf"
    summary = "plain safetensors folder: transformers, vLLM, SGLang, llama.cpp's converter, mlx-lm"
    one_group = False

    def sniff(self, path: Path) -> bool:
        """Returns whether `path` is a model folder; quantized kinds are asked before this one."""
        return is_folder(path)

    def open(self, path: Path) -> Checkpoint:
        """Returns the folder as a checkpoint; one that is quantized in an unknown way is refused by name."""
        checkpoint = FolderCheckpoint(path)
        if checkpoint.quantization and checkpoint.quantization.get("quant_method") != "mxfp4":
            kind = checkpoint.quantization.get("quant_method", "an unnamed method")
            raise InputError(
                f"{path}: already quantized with {kind}, which cannot be read yet", "use the model it was made from"
            )
        packed = next((name for name in checkpoint.tensors if name.endswith((".qweight", ".weight_packed"))), None)
        if packed is not None:
            raise InputError(
                f"{path}: '{packed}' is quantized, but config.json does not say how", "use the model it was made from"
            )
        return checkpoint

    def reject(self, scheme: Scheme) -> str | None:
        """Returns a reason for anything but plain dtypes."""
        return None if isinstance(scheme, Plain) else "a plain folder holds no quantized tensors"

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Returns the tensor itself."""
        assert isinstance(scheme, Plain)
        return [Piece(name, scheme.dtype, shape)]

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns None: everything fits."""
        return None

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the values."""
        return {name: coded.arrays["values"]}

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Returns an empty block: nothing is quantized."""
        return {}

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns no groups: nothing is quantized."""
        return []
