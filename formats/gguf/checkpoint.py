"""A GGUF model under transformers' names, shapes and row order."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import TensorInfo
from quantize.formats.gguf.architectures.assemble import backward
from quantize.formats.gguf.architectures.lazy import Arrays, Columns, Lazy, Source
from quantize.formats.gguf.architectures.settings import Settings
from quantize.formats.gguf.config import COMPUTED, read_config, read_keys
from quantize.formats.gguf.container import Stored, read_parts
from quantize.formats.gguf.tokenizer import save_tokenizer
from quantize.schemes import GGMLBlock, Plain, QuantizedTensor, Scheme, Shape


@dataclass(frozen=True)
class _Held(Source):
    """A tensor as it lies in the file."""

    name: str
    stored: Stored

    @property
    def shape(self) -> Shape:
        """The shape that the header says."""
        return self.stored.shape

    @property
    def scheme(self) -> Scheme:
        """The type that the header says."""
        return self.stored.scheme

    def fetch(self, start: int, stop: int, coded: bool) -> Arrays:
        """Reads rows as they are coded; decodes them when values are wanted."""
        rows = self.stored.read(start, stop)
        if coded:
            return {"blocks": rows}
        if isinstance(self.scheme, Plain):
            return {"values": rows}
        shape = (rows.shape[0], *self.shape[1:])
        return {"values": QuantizedTensor(self.scheme, shape, {"blocks": rows}).dequantize()}


class GGUFCheckpoint:
    """A GGUF model under transformers' names, shapes and row order."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = read_parts(path)
        self._first = parts[0]
        self.metadata: dict[str, Any] = self._first.metadata
        architecture, keys = read_keys(self._first)
        self._stored: dict[str, Stored] = {}
        for part in parts:
            if twice := self._stored.keys() & part.tensors.keys():
                raise InputError(f"{part.file}: tensor '{min(twice)}' is held by two parts")
            self._stored |= part.tensors
        self.dropped = {name: "the config states what makes it" for name in COMPUTED if name in self._stored}
        self.config = read_config(architecture, keys, self._stored)
        held: dict[str, Lazy] = {n: _Held(n, s) for n, s in self._stored.items() if n not in self.dropped}
        self.architecture = architecture
        self.settings = Settings(self.config, self._first.file, keys.whole("nextn_predict_layers", 0), keys)
        self._made = backward(architecture, self.settings, held)

    @property
    def stored(self) -> Mapping[str, Stored]:
        """The tensors as they lie in the file, under its names and in its order."""
        return self._stored

    @property
    def first_file(self) -> Path:
        """The file that holds the metadata."""
        return self._first.file

    def names_of(self, stored: str) -> tuple[str, ...]:
        """Returns the names of the tensors that a tensor of the file is part of."""
        return self._made_of.get(stored, ())

    def columns_of(self, stored: str) -> Columns | None:
        """Returns how the input columns of all tensors that a tensor of the file is part of are its own."""
        found = {self._made[name].columns_of(stored) for name in self.names_of(stored)}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def _made_of(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for name, tensor in self._made.items():
            for source in tensor.sources:
                found[source] = (*found.get(source, ()), name)
        return found

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All logical tensors, in file order."""
        return {name: TensorInfo(name, t.shape, t.scheme, t.nbytes) for name, t in self._made.items()}

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
        return self._made[name].read(start, stop)

    def file(self, name: str) -> Path:
        """Returns the part that holds a tensor, or the first of what it is made of."""
        return self._stored[self._made[name].sources[0]].extent.file

    def read_coded(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns the blocks of rows of a quantized tensor, or None for a plain one."""
        return self._made[name].coded(start, stop)
