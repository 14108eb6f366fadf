"""GGUF files: what llama.cpp, Ollama and LM Studio load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from quantize.errors import InputError, UsageError
from quantize.formats.base import Checkpoint, Header, Layout, Piece
from quantize.formats.folder import is_folder
from quantize.formats.gguf.checkpoint import GGUFCheckpoint
from quantize.formats.gguf.layout import Entry, layout
from quantize.formats.gguf.metadata import Value, text, u32
from quantize.formats.gguf.mixes import fit
from quantize.formats.gguf.mixrules import protection
from quantize.formats.gguf.split import part_names, split_metadata
from quantize.formats.gguf.stored import StoredView
from quantize.formats.gguf.view import GGUFView
from quantize.formats.gguf.vocabulary import tokenizer_metadata
from quantize.schemes import GGMLBlock, Plain, QuantizedTensor, Scheme, Shape, parse_scheme

__all__ = ["GGUFCheckpoint", "GGUFFormat"]

# The version of GGML's block types that all files of today hold.
_BLOCKS_VERSION = 2
_EMBEDDING = "token_embd.weight"


class GGUFFormat:
    """Reader and writer of GGUF files."""

    name = "gguf"
    summary = "GGUF: llama.cpp, Ollama, LM Studio"
    one_group = False
    single_file = True
    ends = False  # mixes say it for each tensor
    by_rows = True
    config_copies: tuple[str, ...] = ()

    def sniff(self, path: Path) -> bool:
        """Returns whether `path` is a file that is GGUF or called so, or a folder with such files only.

        A broken file of that name and a folder of several models are claimed too: `open` says what is wrong.
        """
        if path.is_dir():
            return not is_folder(path) and any(path.glob("*.gguf"))
        if path.suffix == ".gguf" or not path.is_file():
            return path.is_file()
        try:
            with path.open("rb") as stream:
                return stream.read(4) == b"GGUF"
        except OSError:
            return False

    def open(self, path: Path) -> Checkpoint:
        """Returns the model at `path` as a checkpoint."""
        return GGUFCheckpoint(path)

    def view(self, checkpoint: Checkpoint, arch: str | None = None, assume_tied: bool = False) -> Checkpoint:
        """Returns the model under GGUF's names; one that is GGUF already keeps its own names and metadata."""
        if isinstance(checkpoint, GGUFCheckpoint) and arch is None:
            return StoredView(checkpoint)
        return GGUFView(checkpoint, arch, assume_tied)

    def reject(self, scheme: Scheme) -> str | None:
        """Returns a reason for grids that GGML has not."""
        if isinstance(scheme, GGMLBlock) or (isinstance(scheme, Plain) and scheme.holds_weights):
            return None
        if isinstance(scheme, Plain) and str(scheme) in ("i8", "i16", "i32", "i64"):
            return None
        return "GGUF holds llama.cpp's own types only, such as q4_k"

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns why llama.cpp wants this tensor unquantized, or None."""
        return protection(name, shape, "")

    def adapted(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """Returns the grid itself."""
        return scheme

    def configured(self, config: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
        """Returns the config as it is: files have metadata instead."""
        return config

    def stand_in(self, scheme: Scheme, shape: Shape) -> Scheme | None:
        """Returns llama.cpp's choice for a type whose block does not divide the width."""
        return parse_scheme(fit(str(scheme), shape[-1])) if shape and isinstance(scheme, GGMLBlock) else None

    def settled(self, schemes: Mapping[str, Scheme]) -> Self:
        """Returns itself: every file is written alike."""
        return self

    def notices(self, schemes: Mapping[str, Scheme]) -> list[str]:
        """Returns nothing: engines read whatever it holds."""
        return []

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Returns the one array: blocks of uint8, or plain values."""
        if isinstance(scheme, Plain):
            return [Piece(name, scheme.dtype, shape, scheme, shape)]
        assert isinstance(scheme, GGMLBlock)
        import torch

        width = shape[-1] // scheme.block * scheme.block_bytes
        return [Piece(name, torch.uint8, (*shape[:-1], width), scheme, shape)]

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the array."""
        return {name: coded.arrays["values" if isinstance(coded.scheme, Plain) else "blocks"]}

    def file_names(self, out: str, count: int) -> list[str]:
        """Returns `out` itself, or the names of its parts.

        Raises:
            UsageError: `out` does not end as GGUF files do.
        """
        if not out.endswith(".gguf"):
            raise UsageError(f"{out}: a GGUF file is called NAME.gguf", f"say --out {out}.gguf")
        return part_names(out.removesuffix(".gguf"), count)

    def header(self, view: Checkpoint, options: Mapping[str, Any]) -> Header:
        """Returns the metadata: the model's, its tokenizer's, and what was done to it.

        Args:
            view: The model as `view` gives it.
            options: `file_type` number; `quantized`, whether any tensor is; `pre`, the user's name of how the
                tokenizer splits; `imatrix`, a file name, its text sources, the number of its entries (or None) and of
                its chunks.

        Raises:
            InputError: the tokenizer or the way that it splits text is not known.
        """
        assert isinstance(view, GGUFView | StoredView)
        found: dict[str, Value] = dict(view.metadata())
        notices: tuple[str, ...] = ()
        if isinstance(view, GGUFView):
            if _EMBEDDING not in view.tensors:
                raise InputError(f"{view.path}: has no {_EMBEDDING}")
            rows = view.tensors[_EMBEDDING].shape[0]
            tokenizer = tokenizer_metadata(view.side_files, view.config, rows, pre=options.get("pre"))
            found |= tokenizer.metadata
            notices = (*view.notices, *tokenizer.notices)
        elif options.get("pre"):
            found["tokenizer.ggml.pre"] = text(options["pre"])
        found["general.file_type"] = u32(options["file_type"])
        if options.get("quantized"):
            found["general.quantization_version"] = u32(_BLOCKS_VERSION)
        if options.get("imatrix"):
            file, sources, entries, chunks = options["imatrix"]
            found["quantize.imatrix.file"] = text(file)
            if sources:
                found["quantize.imatrix.dataset"] = text(sources[0])
            for key, count in (("entries", entries), ("chunks", chunks)):
                if count:
                    found[f"quantize.imatrix.{key}_count"] = u32(count)
        return Header(found, notices)

    def layouts(self, files: Mapping[str, Sequence[Piece]], header: Mapping[str, Any]) -> dict[str, Layout]:
        """Returns the layout of each part; the first has the metadata."""
        entries = [
            [Entry(p.name, p.logical, p.scheme) for p in part if p.scheme is not None] for part in files.values()
        ]
        metadata = split_metadata(header, [len(part) for part in entries])
        parts = zip(files, metadata, entries, strict=True)
        return {name: layout(keys, tensors) for name, keys, tensors in parts}

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Returns nothing: every tensor's type stands in the header."""
        return {}

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns no groups: every tensor of a GGUF file may have its own type."""
        return []
