"""A GGUF model under transformers' names, shapes and row order."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import TensorInfo
from quantize.formats.container import read_rows
from quantize.formats.gguf.config import ROPE_FACTORS, find_architecture, read_config
from quantize.formats.gguf.container import Stored, read_parts
from quantize.formats.gguf.tokenizer import save_tokenizer
from quantize.schemes import GGMLBlock, Plain, QuantizedTensor


class GGUFCheckpoint:
    """A GGUF model under transformers' names, shapes and row order."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = read_parts(path)
        self._first = parts[0]
        self.metadata: dict[str, Any] = self._first.metadata
        self._architecture = find_architecture(self._first)
        self._stored: dict[str, Stored] = {}
        self.dropped: dict[str, str] = {}
        factors = None
        for part in parts:
            for name, stored in part.tensors.items():
                if name == ROPE_FACTORS:
                    self.dropped[name], factors = "the config states what makes it", stored
                    continue
                renamed = self._architecture.rename(name)
                if renamed is None or renamed in self._stored:
                    kind = self.metadata["general.architecture"]
                    what = "is held by two parts" if renamed else f"is none of architecture '{kind}'"
                    raise InputError(f"{part.file}: tensor '{name}' {what}")
                self._stored[renamed] = stored
        self.config = read_config(self._first, self._stored, factors)
        self._check_names()

    def _check_names(self) -> None:
        """Refuses a file that lacks a tensor of its architecture, or has one too many."""
        expected = self._architecture.names(self.config)
        if missing := sorted(expected - self._stored.keys()):
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise InputError(f"{self.path}: lacks tensor '{missing[0]}'{others}")
        if surplus := sorted(self._stored.keys() - expected):
            layers = self.config["num_hidden_layers"]
            raise InputError(f"{self.path}: a model of {layers} layers has no tensor '{surplus[0]}'")
        for name in self._stored:
            self._heads(name)

    def _heads(self, name: str) -> int:
        """Returns the number of heads whose rows are stored in pairs, or 0 for tensors stored as they are."""
        leaf = name.split(".")[-2] if self._architecture.permuted else ""
        key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(leaf)
        if key is None:
            return 0
        heads: int = self.config[key]
        rows, head_dim = self._stored[name].shape[0], self.config["head_dim"]
        if rows != heads * head_dim or head_dim % 2:
            raise InputError(f"{self.path}: '{name}' has {rows} rows, not {heads} heads of {head_dim}")
        return heads

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All logical tensors, in file order."""
        return {n: TensorInfo(n, s.shape, s.scheme, s.extent.nbytes) for n, s in self._stored.items()}

    @property
    def quantization(self) -> dict[str, Any]:
        """The file type that the header names, when any tensor is quantized."""
        if not any(isinstance(stored.scheme, GGMLBlock) for stored in self._stored.values()):
            return {}
        from gguf import LlamaFileType

        number = self.metadata.get("general.file_type")
        names = [kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType if kind == number]
        return {"quant_method": "gguf", "file_type": names[0] if names else number}

    @cached_property
    def side_files(self) -> Mapping[str, Path]:
        """Tokenizer and generation config, built from the metadata in a temporary folder of this object."""
        folder = Path(tempfile.mkdtemp(prefix="quantize-gguf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        save_tokenizer(self._first, folder)
        (folder / "generation_config.json").write_text(json.dumps(self._generation(), indent=2) + "\n")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file for file in files}

    def _generation(self) -> dict[str, Any]:
        """Returns the ids that generation starts, pads and ends with; turns and messages may have theirs."""
        ends = [self.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eot", "eom")]
        ends = list(dict.fromkeys(end for end in (self.config["eos_token_id"], *ends) if end is not None))
        ids = {"bos_token_id": self.config["bos_token_id"], "pad_token_id": self.config["pad_token_id"]}
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
        return {key: value for key, value in ids.items() if value is not None}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows of a tensor: in its own dtype when plain, decoded to float32 when not."""
        stored = self._stored[name]
        rows = self._read_rows(name, start, stop)
        if isinstance(stored.scheme, Plain):
            return rows
        shape = (rows.shape[0], *stored.shape[1:])
        return QuantizedTensor(stored.scheme, shape, {"blocks": rows}).dequantize()

    def file(self, name: str) -> Path:
        """Returns the part that holds a tensor."""
        return self._stored[name].extent.file

    def read_coded(self, name: str) -> QuantizedTensor | None:
        """Returns the blocks of a quantized tensor, or None for a plain one."""
        stored = self._stored[name]
        if isinstance(stored.scheme, Plain):
            return None
        return QuantizedTensor(stored.scheme, stored.shape, {"blocks": self._read_rows(name, 0, None)})

    def _read_rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Returns rows as they are coded, in transformers' order.

        Within a head of size d, row `half * d/2 + i` is stored as row `2 * i + half`. Only the heads that the
        range touches are read, and blocks are moved before anything decodes them.
        """
        stored, heads = self._stored[name], self._heads(name)
        if not heads:
            return read_rows(stored.extent, start, stop)
        size = stored.shape[0] // heads
        stop = stored.shape[0] if stop is None else min(stop, stored.shape[0])
        wanted = torch.arange(start, stop)
        head, row = wanted // size, wanted % size
        first = start // size * size
        held = read_rows(stored.extent, first, -(-stop // size) * size)
        return held[head * size + row % (size // 2) * 2 + row // (size // 2) - first]
