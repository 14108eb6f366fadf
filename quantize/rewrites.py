"""Checkpoints seen through a map: here, LoRA adapters merged on read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import Checkpoint, CheckpointView, TensorInfo
from quantize.formats.container import Extent, read_header, read_rows
from quantize.formats.folder import read_json
from quantize.schemes import Plain, QuantizedTensor, Shape

_PREFIX = "base_model.model."
# The name of an adapter may follow.
_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.\w+)?\.weight")
_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "alpha_pattern",
    "rank_pattern",
    "trainable_token_indices",
    "target_parameters",
)


class Adapter:
    """A LoRA adapter (Hu et al. 2021, arXiv 2106.09685): `W + scale * B A` for the matrices it names.

    Args:
        path: Folder with adapter_config.json and adapter_model.safetensors.
        scale: Factor on the adapter's own scaling.

    Raises:
        InputError: a file is missing or broken, or the adapter is of a kind that is not a sum.
    """

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        if not (path / "adapter_config.json").is_file():
            raise InputError(f"{path}: no LoRA adapter: it holds no adapter_config.json", "name the adapter's folder")
        config = read_json(path / "adapter_config.json")
        kind = config.get("peft_type", "LORA")
        unsupported = [key for key in _UNSUPPORTED if config.get(key)]
        if kind != "LORA" or unsupported or config.get("bias", "none") != "none":
            what = ", ".join(unsupported) or (kind if kind != "LORA" else "trained biases")
            raise InputError(f"{path}: an adapter with {what} cannot be merged", "merge it with peft first")
        rank, alpha = config.get("r"), config.get("lora_alpha", 8)
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise InputError(f"{path}: its adapter_config.json gives rank {rank} and lora_alpha {alpha}")
        self.path = path
        self.scale = scale * alpha / (rank**0.5 if config.get("use_rslora") else rank)
        self.transpose = bool(config.get("fan_in_fan_out"))
        self.pairs: dict[str, tuple[Extent, Extent]] = {}
        self.replaced: dict[str, Extent] = {}
        self._take(read_header(path / "adapter_model.safetensors")[0])

    def _take(self, stored: Mapping[str, Extent]) -> None:
        """Sorts what is stored into pairs `A`, `B` and whole tensors."""
        halves: dict[str, dict[str, Extent]] = {}
        for name, extent in stored.items():
            target = name.removeprefix(_PREFIX)
            if match := _HALF.fullmatch(target):
                halves.setdefault(f"{match['module']}.weight", {})[match["half"]] = extent
            elif "lora_" in target:
                raise InputError(f"{self.path}: '{name}' is no part of a plain LoRA", "merge it with peft first")
            else:
                self.replaced[_SAVED.sub("", target)] = extent
        for target, found in halves.items():
            if set(found) != {"A", "B"}:
                raise InputError(f"{self.path}: '{target}' has lora_{''.join(found)} only", "download it again")
            a, b = found["A"], found["B"]
            if not len(a.shape) == len(b.shape) == 2 or a.shape[0] != b.shape[1]:
                raise InputError(f"{self.path}: '{target}' has lora_A {list(a.shape)} and lora_B {list(b.shape)}")
            self.pairs[target] = (a, b)

    def shape(self, name: str) -> Shape:
        """Returns the shape that a tensor must have for what is done to it."""
        if name in self.replaced:
            return self.replaced[name].shape
        a, b = self.pairs[name]
        return (a.shape[1], b.shape[0]) if self.transpose else (b.shape[0], a.shape[1])

    def apply(self, name: str, value: Tensor, start: int, stop: int | None) -> Tensor:
        """Returns rows `start` to `stop` of a tensor with the adapter added, float32 where it changes them."""
        if name in self.replaced:
            return read_rows(self.replaced[name], start, stop)
        if name not in self.pairs:
            return value
        a, b = (read_rows(extent).float() for extent in self.pairs[name])
        delta = (b @ a).T[start:stop] if self.transpose else b[start:stop] @ a
        return value.float() + self.scale * delta


class MergedCheckpoint(CheckpointView):
    """A checkpoint with adapters added to its tensors as they are read."""

    def __init__(self, base: Checkpoint, adapters: list[Adapter]) -> None:
        super().__init__(base)
        self._adapters = adapters
        for adapter in adapters:
            for name in (*adapter.pairs, *adapter.replaced):
                if name not in base.tensors:
                    raise InputError(
                        f"{adapter.path}: changes '{name}', which {base.path} does not have",
                        "is it an adapter of this model?",
                    )
                wanted, found = adapter.shape(name), base.tensors[name].shape
                if wanted != found:
                    raise InputError(
                        f"{adapter.path}: '{name}' is for shape {list(wanted)}, in {base.path} it is {list(found)}",
                        "is it an adapter of this model?",
                    )

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

    def read_coded(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns rows of a tensor on its own grid where no adapter changes it."""
        return self._base.read_coded(name, start, stop) if self.tensors[name] is self._base.tensors[name] else None

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
    return MergedCheckpoint(base, [Adapter(*_folder_and_scale(text)) for text in adapters])


def _folder_and_scale(text: str) -> tuple[Path, float]:
    head, colon, tail = text.rpartition(":")
    whole = Path(text).expanduser()
    if whole.exists() or not colon:
        return whole, 1.0
    try:
        scale = float(tail)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise InputError(f"{text}: no such adapter folder, and '{tail}' is no scale", "write DIR or DIR:SCALE")
    return Path(head).expanduser(), scale
