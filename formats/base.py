"""What every on-disk format gives: a reader (`Checkpoint`) and the layout of a writer (`Format`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantize.schemes import QuantizedTensor, Scheme, Shape


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one logical tensor.

    Attributes:
        name: Checkpoint name, such as `model.layers.0.mlp.up_proj.weight`.
        shape: Logical shape, `[out_features, in_features]` for a linear.
        scheme: The grid it lies on; `Plain` when it is not quantized.
        nbytes: Bytes on disk, all its parts together.
    """

    name: str
    shape: Shape
    scheme: Scheme
    nbytes: int


class Checkpoint(Protocol):
    """A source model. Opening one reads headers only; tensors are read by name when asked for."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def format(self) -> str:
        """The name of the format it was read from."""

    @property
    def config(self) -> dict[str, Any]:
        """The transformers config, without any quantization block."""

    @property
    def quantization(self) -> dict[str, Any]:
        """What its own metadata says of quantization; empty when nothing."""

    @property
    def side_files(self) -> Mapping[str, Path]:
        """Tokenizer and other files that are neither weights nor config, by their name in the folder."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All logical tensors, in file order."""

    @property
    def dropped(self) -> Mapping[str, str]:
        """Stored tensors that are left out on read, each with the rule that says so."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows `start` to `stop` of a tensor: in its own dtype when plain, dequantized to float32 when not.

        Raises:
            InputError: the file is truncated or unreadable.
        """

    def file(self, name: str) -> Path:
        """Returns the file that holds a tensor (the first of its parts), for messages."""

    def read_coded(self, name: str) -> QuantizedTensor | None:
        """Returns the tensor on its own grid, or None when it is plain."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One array of the output: a tensor as the container sees it."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Format(Protocol):
    """One on-disk format. A module of this package gives one; the package's table lists them."""

    @property
    def name(self) -> str:
        """What `--format` calls it."""

    @property
    def summary(self) -> str:
        """One line: which engines load it."""

    @property
    def one_group(self) -> bool:
        """Whether the whole file has one group size."""

    def sniff(self, path: Path) -> bool:
        """Returns whether `path` holds this format, from names and headers alone."""

    def open(self, path: Path) -> Checkpoint:
        """Returns the checkpoint at `path`.

        Raises:
            InputError: it is broken or of a kind that cannot be read.
        """

    def reject(self, scheme: Scheme) -> str | None:
        """Returns why no tensor on `scheme` can be written in this format, or None when it can."""

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns why this tensor cannot be quantized in this format whatever the scheme, or None when it can."""

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Returns the arrays that tensor `name` of `shape` becomes, from the header alone."""

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the arrays announced by `pieces`, by name, for a coded tensor."""

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Returns the `quantization_config` block for the linears in `schemes` (tensor name to scheme)."""

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns the groups of tensors that an engine fuses and that must therefore share one scheme."""
