"""What every on-disk format gives: a reader (`Checkpoint`) and the layout of a writer (`Format`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from quantize.schemes import QuantizedTensor, Scheme, Shape

# What shows the input of a tensor's columns, if not the input of the stored tensor as models have it, `x @ W.T`: the
# input of `x @ W`; the output of a stored tensor.
TURNED, OUTPUT = "@turned", "@output"


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

    def read_coded(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns rows of a tensor on its own grid, or None when it is plain."""


class CheckpointView:
    """What a checkpoint seen through a map has as it is in the base; the tensors are the subclass's."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base

    @property
    def path(self) -> Path:
        """Where the base lies."""
        return self._base.path

    @property
    def format(self) -> str:
        """The base's format."""
        return self._base.format

    @property
    def config(self) -> dict[str, Any]:
        """The base's config."""
        return self._base.config

    @property
    def quantization(self) -> dict[str, Any]:
        """The base's quantization block."""
        return self._base.quantization

    @property
    def side_files(self) -> Mapping[str, Path]:
        """The base's side files."""
        return self._base.side_files


@dataclass(frozen=True, slots=True)
class Observed:
    """Where a text shows what the columns of a tensor are multiplied with.

    Attributes:
        names: Stored tensors, experts in order.
        mark: What of them: their inputs in `x @ W.T` when empty, else `TURNED` or `OUTPUT`.
        order: Column k is channel `order[k]` of what is observed, int64 `[columns]`, or `[matrices, columns]` where
            each matrix has its own; None where they are the same.
    """

    names: tuple[str, ...]
    mark: str = ""
    order: Tensor | None = None


class NamedView(Checkpoint, Protocol):
    """A model under the names of a format that has its own, as `Format.view` of such a format gives it."""

    def metadata(self) -> Mapping[str, Any]:
        """Returns what the format says of the model beside its tensors, in the format's own types."""

    def sources(self, name: str) -> tuple[str, ...]:
        """Returns the stored tensors that a tensor is made of, experts in order."""

    def same_columns(self, name: str) -> bool:
        """Returns whether a tensor's input columns are those of its sources, so that statistics carry over."""

    def observed(self, name: str) -> Observed | None:
        """Returns where a text shows what a tensor's columns are multiplied with, or None where it does not."""

    def required_float(self, name: str) -> bool:
        """Returns whether engines want a tensor in float32 whatever the source has it in."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One array of the output: a tensor as the container sees it.

    Attributes:
        name: Its name in the file.
        dtype: Element type of the array.
        shape: Shape of the array.
        scheme: The grid, where the container tells it.
        logical: Shape of the tensor, where that differs from the array's.
    """

    name: str
    dtype: torch.dtype
    shape: Shape
    scheme: Scheme | None = None
    logical: Shape = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """What the headers of the weight files say beside the arrays.

    Attributes:
        values: By key, in the format's own types.
        notices: What the format cannot say of this model, one line each.
    """

    values: Mapping[str, Any]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of one output file lies, known before any of its arrays exists.

    Attributes:
        header: The bytes from offset 0 on.
        where: Offset and number of bytes of each array, by name. What lies between them is zero.
        size: Bytes of the whole file.
        arrays: Names of the arrays that the file has, where some of them are put in several parts.
    """

    header: bytes
    where: Mapping[str, tuple[int, int]]
    size: int
    arrays: tuple[str, ...] = ()


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

    @property
    def ends(self) -> bool:
        """Whether embedding and head are quantized like the linears of the blocks."""

    @property
    def by_rows(self) -> bool:
        """Whether all arrays of a tensor have its rows one after the other, so that runs of rows can be put."""

    @property
    def single_file(self) -> bool:
        """Whether the output is one file, or its parts side by side, and no folder with config and tokenizer."""

    @property
    def config_copies(self) -> tuple[str, ...]:
        """Files beside config.json that repeat its `quantization_config` for older loaders."""

    def sniff(self, path: Path) -> bool:
        """Returns whether `path` holds this format, from names and headers alone."""

    def open(self, path: Path) -> Checkpoint:
        """Returns the checkpoint at `path`.

        Raises:
            InputError: it is broken or of a kind that cannot be read.
        """

    def view(self, checkpoint: Checkpoint, arch: str | None = None, assume_tied: bool = False) -> Checkpoint:
        """Returns the model under the names and in the order of this format.

        Args:
            checkpoint: The source.
            arch: What this format calls the model's architecture, where it cannot tell.
            assume_tied: Whether a missing head is the embedding.

        Raises:
            InputError: the format has no names for such a model.
        """

    def reject(self, scheme: Scheme) -> str | None:
        """Returns why no tensor on `scheme` can be written in this format, or None when it can."""

    def adapted(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """Returns a grid as this format has it in a model whose plain tensors are of `dtype`."""

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns why this tensor cannot be quantized in this format whatever the scheme, or None when it can."""

    def stand_in(self, scheme: Scheme, shape: Shape) -> Scheme | None:
        """Returns the grid that a tensor gets where its shape forbids `scheme`, or None to keep it unquantized."""

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Returns the arrays that tensor `name` of `shape` becomes, from the header alone."""

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the arrays announced by `pieces`, by name, for a coded tensor."""

    def file_names(self, out: str, count: int) -> list[str]:
        """Returns the names of `count` weight files of an output called `out`."""

    def header(self, view: Checkpoint, options: Mapping[str, Any]) -> Header:
        """Returns the metadata that goes into the header of the weight files.

        Raises:
            InputError: what engines need cannot be told from the model's files.
        """

    def layouts(self, files: Mapping[str, Sequence[Piece]], header: Mapping[str, Any]) -> Mapping[str, Layout]:
        """Returns the layout of each weight file, by its name, from the arrays that it holds."""

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Returns the `quantization_config` block for the linears in `schemes` (tensor name to scheme)."""

    def configured(self, config: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
        """Returns the text of config.json as values: the model's config with what engines want to read in it.

        Args:
            config: The model's own; not changed.
            block: What `quantization_config` gave; empty if nothing is quantized.
        """

    def settled(self, schemes: Mapping[str, Scheme]) -> Self:
        """Returns the format as it writes a file of just these tensors (all of them, name to scheme)."""

    def notices(self, schemes: Mapping[str, Scheme]) -> list[str]:
        """Returns what engines cannot do with a file of these tensors (all of them), one line each."""

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns the groups of tensors that an engine fuses and that must therefore share one scheme."""
