"""What MLX's config.json says of quantization, and of the model otherwise than transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantize.errors import InputError, UsageError
from quantize.kernels.mlx import MODES
from quantize.mlx_schemes import MLXAffine, MLXFloat
from quantize.schemes import Plain, Scheme

_AFFINE = "affine"
_FULL = "full_attention"
# Bits and group of each mode where a file leaves them out or says null.
_USUAL = {_AFFINE: (4, 64), **{name: (mode.bits, mode.group) for name, mode in MODES.items()}}


def block_of(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the quantization block of an MLX config; empty if it has none."""
    for key in ("quantization", "quantization_config"):
        block = config.get(key)
        if isinstance(block, dict) and "group_size" in block and "bits" in block and "quant_method" not in block:
            return block
    return {}


class Settings:
    """What a block says of each module.

    Args:
        path: The folder, for messages.
        block: The block.
    """

    def __init__(self, path: Path, block: Mapping[str, Any]) -> None:
        self._path = path
        self._block = block

    def of(self, module: str, scales: torch.dtype, dtype: torch.dtype) -> MLXAffine | MLXFloat:
        """Returns the grid of a module that has scales.

        Args:
            module: Its path.
            scales: Type of its scales.
            dtype: The model's floating type.

        Raises:
            InputError: the block says what no module can have.
        """
        said = self._block.get(module)
        own = said if isinstance(said, dict) else self._block
        mode = own.get("mode") or _AFFINE
        if mode not in _USUAL:
            raise InputError(f"{self._path / 'config.json'}: '{module}' has the unknown mode '{mode}'")
        bits, group = (own.get(key) or usual for key, usual in zip(("bits", "group_size"), _USUAL[mode], strict=True))
        floating = scales.is_floating_point and scales.itemsize > 1
        if floating != (mode == _AFFINE) or not (isinstance(bits, int) and isinstance(group, int)):
            raise InputError(
                f"{self._path}: the scales of '{module}' are {scales}, config.json says mode {mode}, {bits} bits, "
                f"groups of {group}",
                "the file or its config is broken: download both again",
            )
        if mode != _AFFINE:
            if (bits, group) != _USUAL[mode]:
                raise InputError(f"{self._path}: '{module}' has {bits} bits in groups of {group}, which {mode} has not")
            return MLXFloat(mode, dtype)
        try:
            return MLXAffine(bits, group, scales)
        except UsageError as error:
            raise InputError(f"{self._path}: '{module}': {error.message}") from error


def _values(scheme: MLXAffine | MLXFloat) -> dict[str, Any]:
    mode = scheme.mode if isinstance(scheme, MLXFloat) else _AFFINE
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": mode}


def block(modules: Mapping[str, Scheme]) -> dict[str, Any]:
    """Returns the block: the commonest grid, and under the path of each module what differs; False for plain ones."""
    coded = {name: _values(s) for name, s in modules.items() if isinstance(s, MLXAffine | MLXFloat)}
    counts = Counter((v["group_size"], v["bits"], v["mode"]) for v in coded.values())
    _, (group, bits, mode) = max((count, values) for values, count in counts.items())
    usual = {"group_size": group, "bits": bits, "mode": mode}
    others: dict[str, Any] = {name: values for name, values in coded.items() if values != usual}
    others |= {name: False for name, scheme in modules.items() if isinstance(scheme, Plain)}
    return {**usual, **{name: others[name] for name in modules if name in others}}


def configured(config: dict[str, Any], quantization: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json as mlx-lm and other readers of MLX want it.

    mlx-lm takes its own usual values, silently, for what transformers 5 keeps in `rope_parameters`; both spellings of
    the number of experts and of the type are in use.

    Args:
        config: The model's config, as transformers has it; not changed.
        quantization: The block; empty if nothing is quantized.
    """
    found = dict(config)
    if quantization:
        found |= {"quantization": quantization, "quantization_config": quantization}
    _add_rope(found)
    _add_pattern(found)
    for one, other in (("num_experts", "num_local_experts"), ("torch_dtype", "dtype")):
        value = found.get(one, found.get(other))
        if value is not None:
            found[one] = found[other] = value
    return found


def _add_rope(config: dict[str, Any]) -> None:
    """Puts what `rope_parameters` says where older configs have it."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    local = rope.get("sliding_attention")
    if isinstance(rope.get("full_attention"), dict):
        rope = rope["full_attention"]
        if isinstance(local, dict) and "rope_theta" in local:
            config.setdefault("rope_local_base_freq", local["rope_theta"])
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and not config.get("rope_scaling"):
        rest = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = {**rest, "type": kind, "rope_type": kind}


def _add_pattern(config: dict[str, Any]) -> None:
    """Says after how many layers of gemma3 one attends to everything, where the config lists the layers."""
    layers = config.get("layer_types")
    if config.get("model_type") == "gemma3_text" and isinstance(layers, list) and _FULL in layers:
        config.setdefault("sliding_window_pattern", layers.index(_FULL) + 1)


def notices(config: Mapping[str, Any]) -> list[str]:
    """Returns what mlx-lm does otherwise than transformers with a model of this config, one line each."""
    window, layers, kind = config.get("sliding_window"), config.get("layer_types"), config.get("model_type")
    if not window or not config.get("use_sliding_window", True):
        return []
    if kind == "gemma3_text":
        every = dict(config)
        _add_pattern(every)
        period = every.get("sliding_window_pattern")
        if not period or not isinstance(layers, list):
            return []
        theirs = [(number + 1) % period == 0 for number in range(len(layers))]
        if theirs == [layer == _FULL for layer in layers]:
            return []
        return [f"mlx-lm lets one layer in {period} attend to everything, this model others"]
    if kind in ("llama", "mistral") and layers:
        return []
    return [f"mlx-lm attends to everything here, the model to the last {window} tokens"]
