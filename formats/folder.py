"""Hugging Face folders: config.json, safetensors shards, tokenizer and other side files.

Every format that lives in such a folder reads through `FolderCheckpoint`; it only says how its arrays form tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import TensorInfo
from quantize.formats.container import Extent, read_header, read_rows
from quantize.schemes import Plain, QuantizedTensor

INDEX = "model.safetensors.index.json"
# Files that the weights replace or that speak of weights we do not carry over.
_NOT_SIDE_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt",
                   "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "config.json", ".*")  # fmt: skip
_SIDE_FOLDERS = ("additional_chat_templates",)
# Buffers that old checkpoints stored and that every engine computes itself.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attn.masked_bias")


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        InputError: the file is missing, unreadable, or no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds no JSON object")
    return value


def is_folder(path: Path) -> bool:
    """Returns whether `path` is a folder with a config and safetensors weights, or one that should be."""
    return path.is_dir() and (
        (path / "config.json").is_file() or any(path.glob("*.safetensors")) or (path / INDEX).is_file()
    )


def refuse_other_kinds(path: Path) -> None:
    """Says what a folder is that holds no model we can read.

    Raises:
        InputError: always, when `path` is a LoRA adapter, holds only pickled weights, or lacks config or weights.
    """
    weights = any(path.glob("*.safetensors")) or (path / INDEX).is_file()
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path") or "BASE"
        raise InputError(
            f"{path}: a LoRA adapter, not a model", f"quantize its base: quantize run {base} --adapter {path}"
        )
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: holds no config.json", "name a folder that save_pretrained wrote")
    if not weights:
        kind = "only pickled weights" if any(path.glob("*.bin")) or any(path.glob("*.pt*")) else "no weights"
        raise InputError(f"{path}: holds {kind}", "safetensors files are needed")


def read_extents(path: Path) -> dict[str, Extent]:
    """Returns every stored array of a folder: those of the index if there is one, else of all safetensors files.

    Raises:
        InputError: a shard is missing (named first, then the number of tensors lost), broken, or lacks a tensor.
    """
    files = sorted(path.glob("*.safetensors"))
    index = path / INDEX
    if not index.is_file():
        # A folder may also keep the unsharded original beside the shards; the plain name is then the model.
        whole = path / "model.safetensors"
        files = [whole] if whole in files else files
        return {name: extent for file in files for name, extent in read_header(file)[0].items()}
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict):
        raise InputError(f"{index}: has no weight_map")
    wanted = sorted(set(table.values()))
    missing = [name for name in wanted if not (path / name).exists()]
    if missing:
        lost = sum(file in missing for file in table.values())
        raise InputError(
            f"{path}: missing {', '.join(missing)}, named by {INDEX}: {lost} of {len(table)} tensors",
            "download the missing files",
        )
    extents: dict[str, Extent] = {}
    for name in wanted:
        extents.update(read_header(path / name)[0])
    for name, file in table.items():
        if name not in extents:
            raise InputError(f"{path / file}: lacks tensor '{name}' that {INDEX} promises")
    return extents


def tie_flag(config: Mapping[str, Any]) -> bool:
    """Returns whether the head shares the embedding's matrix; a nested text config speaks for itself.

    transformers ties by default where a config is silent in neither place only for some models; the class default
    is applied by whoever builds the model, so silence here means True, as in the base class.
    """
    for holder in (config.get("text_config") or {}, config):
        if "tie_word_embeddings" in holder:
            return bool(holder["tie_word_embeddings"])
    return True


class FolderCheckpoint:
    """A folder of safetensors files whose arrays are the tensors themselves.

    Subclasses override `_assemble` when several arrays make one tensor.
    """

    format = "hf"

    def __init__(self, path: Path) -> None:
        refuse_other_kinds(path)
        self.path = path
        self.config = read_json(path / "config.json")
        self.quantization: dict[str, Any] = self.config.pop("quantization_config", None) or {}
        stored = read_extents(path)
        self.dropped = {n: "a buffer that engines compute" for n in stored if n.endswith(_BUFFERS)}
        self.extents = {n: e for n, e in stored.items() if n not in self.dropped}
        if not self.extents:
            raise InputError(f"{path}: its safetensors files hold no tensors")

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All logical tensors, in file order."""
        return self._assemble()

    @cached_property
    def side_files(self) -> Mapping[str, Path]:
        """Files to carry over unchanged, by name relative to the folder."""
        found: dict[str, Path] = {}
        for file in sorted(self.path.iterdir()):
            if file.is_file() and not any(file.match(pattern) for pattern in _NOT_SIDE_FILES):
                found[file.name] = file
        for folder in _SIDE_FOLDERS:
            for file in sorted((self.path / folder).glob("*")):
                found[f"{folder}/{file.name}"] = file
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows `start` to `stop` of a plain tensor in its own dtype."""
        return read_rows(self.extents[name], start, stop)

    def file(self, name: str) -> Path:
        """Returns the shard of a plain tensor."""
        return self.extents[name].file

    def read_coded(self, name: str) -> QuantizedTensor | None:
        """Returns None: nothing here is quantized."""
        return None

    def _assemble(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(name, extent.shape, Plain(extent.dtype), extent.nbytes)
            for name, extent in self.extents.items()
        }
