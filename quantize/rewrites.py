"""Checkpoints seen through a map: here, LoRA adapters merged on read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import Checkpoint, TensorInfo
from quantize.formats.container import Extent, read_header, read_rows
from quantize.schemes import Plain, QuantizedTensor

_PREFIX = "base_model.model."


class Adapter:
    """A LoRA adapter (Hu et al. 2021, arXiv 2106.09685): `W + scale * B A` for the matrices it names.

    Args:
        path: Folder with adapter_config.json and adapter_model.safetensors.
        scale: Factor on the adapter's own scaling.

    Raises:
        InputError: a file is missing or broken, or the adapter is of a kind that is not a sum.
    """

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        try:
            config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: no LoRA adapter: adapter_config.json cannot be read") from error
        kind = config.get("peft_type", "LORA")
        unsupported = [key for key in ("use_dora", "alpha_pattern", "rank_pattern") if config.get(key)]
        if kind != "LORA" or unsupported or config.get("bias", "none") != "none":
            what = ", ".join(unsupported) or (kind if kind != "LORA" else "trained biases")
            raise InputError(f"{path}: an adapter with {what} cannot be merged", "merge it with peft first")
        rank = config.get("r") or 0
        root = rank**0.5 if config.get("use_rslora") else rank
        self.path = path
        self.scale = scale * config.get("lora_alpha", rank) / root if root else 0.0
        self.transpose = bool(config.get("fan_in_fan_out"))
        self.pairs: dict[str, tuple[Extent, Extent]] = {}
        self.replaced: dict[str, Extent] = {}
        halves: dict[str, dict[str, Extent]] = {}
        for name, extent in read_header(path / "adapter_model.safetensors")[0].items():
            target = name.removeprefix(_PREFIX)
            for half in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
                if f".{half}" in target:
                    halves.setdefault(target.split(f".{half}")[0] + ".weight", {})[half] = extent
                    break
            else:
                self.replaced[target.replace(".modules_to_save", "")] = extent
        for target, found in halves.items():
            if set(found) != {"lora_A", "lora_B"}:
                raise InputError(f"{path}: '{target}' has {', '.join(sorted(found))} only", "merge it with peft first")
            self.pairs[target] = (found["lora_A"], found["lora_B"])

    def apply(self, name: str, value: Tensor, start: int, stop: int | None) -> Tensor:
        """Returns rows `start` to `stop` of a tensor with the adapter added, float32 where it changes them."""
        if name in self.replaced:
            return read_rows(self.replaced[name], start, stop)
        if name not in self.pairs:
            return value
        a, b = (read_rows(extent).float() for extent in self.pairs[name])
        delta = (b @ a).T[start:stop] if self.transpose else b[start:stop] @ a
        return value.float() + self.scale * delta


class MergedCheckpoint:
    """A checkpoint with adapters added to its tensors as they are read."""

    def __init__(self, base: Checkpoint, adapters: list[Adapter]) -> None:
        self._base = base
        self._adapters = adapters
        for adapter in adapters:
            lost = [n for n in (*adapter.pairs, *adapter.replaced) if n not in base.tensors]
            if lost:
                raise InputError(
                    f"{adapter.path}: changes '{lost[0]}', which {base.path} does not have",
                    "is it an adapter of this model?",
                )
            for name, (a, b) in adapter.pairs.items():
                shape = (b.shape[0], a.shape[-1])
                if (shape[::-1] if adapter.transpose else shape) != base.tensors[name].shape:
                    raise InputError(f"{adapter.path}: '{name}' has another shape in {base.path}")

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

    @property
    def dropped(self) -> Mapping[str, str]:
        """The base's dropped tensors."""
        return self._base.dropped

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The base's tensors; those that change are plain float tensors."""
        changed = {name for adapter in self._adapters for name in (*adapter.pairs, *adapter.replaced)}
        return {n: self._plain(i) if n in changed else i for n, i in self._base.tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows of a tensor, adapters added in float32 and rounded to the tensor's dtype."""
        value = self._base.read(name, start, stop)
        for adapter in self._adapters:
            value = adapter.apply(name, value, start, stop)
        scheme = self.tensors[name].scheme
        return value.to(scheme.dtype) if isinstance(scheme, Plain) else value

    def file(self, name: str) -> Path:
        """Returns the base's file."""
        return self._base.file(name)

    def read_coded(self, name: str) -> QuantizedTensor | None:
        """Returns the tensor on its own grid where no adapter changes it."""
        return self._base.read_coded(name) if self.tensors[name] is self._base.tensors[name] else None

    @staticmethod
    def _plain(info: TensorInfo) -> TensorInfo:
        # float32 keeps the sum exact; the output's dtype is the plan's decision
        scheme = info.scheme if isinstance(info.scheme, Plain) else Plain(torch.float32)
        return replace(info, scheme=scheme)


def merge_adapters(base: Checkpoint, adapters: tuple[str, ...]) -> Checkpoint:
    """Returns `base` with LoRA adapters merged on read.

    Args:
        base: The model.
        adapters: `DIR` or `DIR:SCALE`, added one after the other.

    Raises:
        InputError: an adapter is broken or belongs to another model.
    """
    loaded = []
    for text in adapters:
        folder, scale = text, 1.0
        head, colon, tail = text.rpartition(":")
        if colon and not Path(text).exists():
            try:
                folder, scale = head, float(tail)
            except ValueError:
                raise InputError(f"{text}: no such adapter folder", "write DIR or DIR:SCALE") from None
        loaded.append(Adapter(Path(folder).expanduser(), scale))
    return MergedCheckpoint(base, loaded)
