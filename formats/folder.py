"""Hugging Face folders: config.json, safetensors shards, tokenizer and other side files.

Every format that lives in such a folder reads through `FolderCheckpoint`; it only says how its arrays form tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import Checkpoint, Header, Layout, Piece, TensorInfo
from quantize.formats.container import Extent, layout, read_header, read_rows
from quantize.schemes import Plain, QuantizedTensor, Scheme, Shape

INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# Weights in any form.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.npz", "*.onnx",
            "*.onnx_data", "*.ot", "*.tflite")  # fmt: skip
# Files that are written anew, and those that speak of weights which are not carried over.
_NOT_SIDE_FILES = (*_WEIGHTS, "*.safetensors.index.json", "*.bin.index.json", "config.json",
                   "quant_config.json", "quantize_config.json", "hf_quant_config.json", ".*")  # fmt: skip
# Weights that stand beside the model's own: adapters, and Mistral's original names.
_BESIDE = ("adapter_", "consolidated")
_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.safetensors")
# Buffers that old checkpoints stored and that every engine computes itself; a causal mask has four dimensions.
_BUFFERS = (".inv_freq", ".masked_bias", ".position_ids")
_MASKS = (".attn.bias", ".attention.bias")


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        InputError: the file is missing, unreadable, or no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds no JSON object")
    return value


def is_folder(path: Path) -> bool:
    """Returns whether `path` is a folder with a config and safetensors weights, or one that should be."""
    return path.is_dir() and (
        any((path / name).is_file() for name in ("config.json", _ADAPTER, INDEX)) or any(path.glob("*.safetensors"))
    )


def refuse_other_kinds(path: Path) -> None:
    """Says what a folder is that holds no model we can read.

    Raises:
        InputError: always, when `path` is a LoRA adapter, holds only pickled weights, or lacks config or weights.
    """
    own = [file for file in path.glob("*.safetensors") if not file.name.startswith(_BESIDE[0])]
    weights = bool(own) or (path / INDEX).is_file()
    config = (path / "config.json").is_file()
    if (path / _ADAPTER).is_file() and not (weights and config):
        base = read_json(path / _ADAPTER).get("base_model_name_or_path") or "BASE"
        raise InputError(
            f"{path}: a LoRA adapter, not a model", f"quantize its base: quantize run {base} --adapter {path}"
        )
    if not config:
        raise InputError(f"{path}: holds no config.json", "name a folder that save_pretrained wrote")
    if not weights:
        pickled = any(any(path.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth", "*.bin.index.json"))
        kind = "only pickled weights" if pickled else "no weights"
        raise InputError(f"{path}: holds {kind}", "safetensors files are needed")


def take_quantization(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Removes the quantization blocks from a config and returns the first that says something.

    Some multimodal models hold it in their text config; old AWQ checkpoints in a file of its own.
    """
    found: dict[str, Any] = {}
    for holder in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            block = holder.pop(key, None)
            if isinstance(block, dict) and block and not found:
                found = block
    if not found and (path / "quant_config.json").is_file():
        found = {"quant_method": "awq", **read_json(path / "quant_config.json")}
    return found


def read_extents(path: Path) -> dict[str, Extent]:
    """Returns every stored array of a folder: those of the index if there is one, else of all safetensors files.

    Raises:
        InputError: a shard is missing (named first, then the number of tensors lost), broken, or lacks a tensor; or
            two files hold the same tensor.
    """
    index = path / INDEX
    if not index.is_file():
        return _unindexed(path)
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict):
        raise InputError(f"{index}: has no weight_map")
    for file in table.values():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise InputError(f"{index}: names {file!r}, which is no file of this folder")
    wanted = sorted(set(table.values()))
    missing = [name for name in wanted if not (path / name).exists()]
    if missing:
        lost = sum(file in missing for file in table.values())
        raise InputError(
            f"{path}: missing {', '.join(missing)}, named by {INDEX}: {lost} of {len(table)} tensors",
            "download the missing files",
        )
    extents: dict[str, Extent] = {}
    for file in wanted:
        found = read_header(path / file)[0]
        extents.update((name, extent) for name, extent in found.items() if table.get(name, file) == file)
    for name, file in table.items():
        if name not in extents:
            raise InputError(f"{path / file}: lacks tensor '{name}' that {INDEX} promises")
    return extents


def _unindexed(path: Path) -> dict[str, Extent]:
    """Returns the arrays of all files of a folder without an index."""
    files = sorted(path.glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith(_BESIDE)] or files
    # A folder may also keep variants beside the weights; the plain name is then the model.
    whole = path / "model.safetensors"
    files = [whole] if whole in files else files
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if shards and len(shards) < int(shards[0][2]):
        raise InputError(f"{path}: holds {len(shards)} of {int(shards[0][2])} shards", "download the missing files")
    extents: dict[str, Extent] = {}
    for file in files:
        for name, extent in read_header(file)[0].items():
            if name in extents:
                raise InputError(
                    f"{file}: tensor '{name}' is in {extents[name].file.name} as well",
                    "leave only the files that belong together, or add their index",
                )
            extents[name] = extent
    return extents


class FolderCheckpoint:
    """A folder of safetensors files whose arrays are the tensors themselves.

    Subclasses override `_assemble` when several arrays make one tensor.
    """

    format = "hf"

    def __init__(self, path: Path) -> None:
        refuse_other_kinds(path)
        self.path = path
        self.config = read_json(path / "config.json")
        self.quantization = take_quantization(path, self.config)
        text = self.config.get("text_config")
        if isinstance(text, dict) and text.get("tie_word_embeddings"):  # some say it only there
            self.config.setdefault("tie_word_embeddings", True)
        stored = read_extents(path)
        self.dropped = {
            name: "a buffer that engines compute"
            for name, extent in stored.items()
            if f".{name}".endswith(_BUFFERS) or (name.endswith(_MASKS) and len(extent.shape) == 4)
        }
        self.extents = {n: e for n, e in stored.items() if n not in self.dropped}
        if not self.extents:
            raise InputError(f"{path}: its safetensors files hold no tensors")

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All logical tensors, in file order."""
        return self._assemble()

    @cached_property
    def side_files(self) -> Mapping[str, Path]:
        """Files to carry over unchanged, by name relative to the folder, folders of the model included."""
        return {file.relative_to(self.path).as_posix(): file for file in _side_files(self.path)}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows `start` to `stop` of a plain tensor in its own dtype."""
        return read_rows(self.extents[name], start, stop)

    def file(self, name: str) -> Path:
        """Returns the shard of a plain tensor."""
        return self.extents[name].file

    def read_coded(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns None: nothing here is quantized."""
        return None

    def _assemble(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(name, extent.shape, Plain(extent.dtype), extent.nbytes)
            for name, extent in self.extents.items()
        }


def _side_files(root: Path) -> Iterator[Path]:
    """Yields what is neither weights nor config. Folders with weights are other models unless modules.json says so."""
    modules = _modules(root)
    for entry in sorted(root.iterdir()):
        if entry.is_file():
            if not any(entry.match(pattern) for pattern in _NOT_SIDE_FILES):
                yield entry
        elif entry.is_dir() and not entry.is_symlink():
            inside = [file for file in sorted(entry.rglob("*")) if file.is_file() and not _hidden(file, root)]
            foreign = any(file.match(pattern) for file in inside for pattern in _WEIGHTS)
            if entry.name in modules or not foreign:
                yield from inside


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(root).parts)


def _modules(root: Path) -> set[str]:
    """Returns the folders that sentence-transformers counts as parts of the model, dense layers with weights too."""
    file = root / "modules.json"
    if not file.is_file():
        return set()
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return {Path(row["path"]).parts[0] for row in table if row["path"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: no list of modules: {error}") from error


class PackedCheckpoint(FolderCheckpoint):
    """A folder in which the arrays `NAME` + each of `parts` form the quantized tensor `NAME.weight`.

    Subclasses say the parts, the one with the codes first, and how to make the tensor of them.
    """

    parts: tuple[str, ...] = ()

    @cached_property
    def _coded(self) -> dict[str, str]:
        """Tensor name to module name, for the quantized ones."""
        modules = [name.removesuffix(self.parts[0]) for name in self.extents if name.endswith(self.parts[0])]
        return {f"{module}.weight": module for module in modules}

    def _assemble(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for name, extent in self.extents.items():
            stem, dot, part = name.rpartition(".")
            if f"{stem}.weight" not in self._coded or dot + part not in self.parts:
                tensors[name] = TensorInfo(name, extent.shape, Plain(extent.dtype), extent.nbytes)
            elif dot + part == self.parts[0]:
                tensors[f"{stem}.weight"] = self._info(stem)
        return tensors

    def _info(self, module: str) -> TensorInfo:
        """Returns what the headers say of a module's tensor; InputError where its arrays do not agree."""
        raise NotImplementedError

    def _codes(self, name: str, start: int, stop: int | None) -> QuantizedTensor | None:
        """Returns rows of a quantized tensor, or None for a plain one."""
        raise NotImplementedError

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows of a tensor, dequantized to float32 where it is quantized."""
        coded = self._codes(name, start, stop)
        return super().read(name, start, stop) if coded is None else coded.dequantize()

    def read_coded(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns the codes of rows of a quantized tensor, or None for a plain one."""
        return self._codes(name, start, stop)

    def file(self, name: str) -> Path:
        """Returns the shard that holds the tensor, or its codes."""
        module = self._coded.get(name)
        return self.extents[name if module is None else module + self.parts[0]].file


class FolderFormat:
    """What all formats share that are folders of safetensors shards with the model's own names."""

    single_file = False
    ends = False
    by_rows = False
    config_copies: tuple[str, ...] = ()

    def view(self, checkpoint: Checkpoint, arch: str | None = None, assume_tied: bool = False) -> Checkpoint:
        """Returns the model itself: names and shapes stay."""
        return checkpoint

    def file_names(self, out: str, count: int) -> list[str]:
        """Returns transformers' names of the shards."""
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]

    def adapted(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        """Returns the grid itself."""
        return scheme

    def configured(self, config: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
        """Returns the config with the block where transformers looks for it."""
        return {**config, "quantization_config": block} if block else config

    def stand_in(self, scheme: Scheme, shape: Shape) -> Scheme | None:
        """Returns None: what does not fit is kept."""
        return None

    def settled(self, schemes: Mapping[str, Scheme]) -> Self:
        """Returns itself: every file is written alike."""
        return self

    def notices(self, schemes: Mapping[str, Scheme]) -> list[str]:
        """Returns nothing: engines read whatever it holds."""
        return []

    def header(self, view: Checkpoint, options: Mapping[str, Any]) -> Header:
        """Returns what transformers asks of a header."""
        return Header({"format": "pt"})

    def layouts(self, files: Mapping[str, Sequence[Piece]], header: Mapping[str, Any]) -> dict[str, Layout]:
        """Returns the layout of each shard."""
        return {name: layout(pieces, header) for name, pieces in files.items()}
