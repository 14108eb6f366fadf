"""What a compressed-tensors folder says of itself, and what is read of it; DeepSeek's `fp8` block as well.

`config_groups` gives settings to modules: each group has `targets`, which are whole module names, regular expressions
(`re:`, matched from the start of the name) or names of classes, in that order of precedence. `ignore` names modules in
the same three ways. All linears that no one ignores are taken for quantized by their class, `Linear`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.float_schemes import BLOCK, CHANNEL, FP8, MXFP4, NVFP4, Int8Channel
from quantize.schemes import AffineInt, Plain, Scheme

METHOD, DEEPSEEK = "compressed-tensors", "fp8"
PACKED, INTS, FLOATS, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NV, MX, MIXED = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"
_LINEAR = "Linear"
_PATTERN = "re:"
_HINT = "its config is broken: download it again"
# The head of every model that has one is a linear, tied or not, and stays as it is.
_HEAD = "lm_head"


# -- what is read ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of `config_groups`: whom it is for, the settings of their weights, whether inputs are rounded too."""

    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    activations: bool


_NOTHING = Group((), {}, activations=False)


@dataclass(frozen=True, slots=True)
class Declared:
    """The settings of all modules."""

    groups: tuple[Group, ...]

    def of(self, module: str) -> Group:
        """Returns the group of a module, or one that says nothing."""
        for fits in (_named, _matched, _classed):
            for group in self.groups:
                if any(fits(target, module) for target in group.targets):
                    return group
        return _NOTHING


def _named(target: str, module: str) -> bool:
    return target == module


def _matched(target: str, module: str) -> bool:
    return target.startswith(_PATTERN) and re.match(target.removeprefix(_PATTERN), module) is not None


def _classed(target: str, module: str) -> bool:
    return target == _LINEAR


def declared(path: Path, block: Mapping[str, Any]) -> Declared:
    """Returns what a quantization block says.

    Raises:
        InputError: it makes no sense.
    """
    if block.get("quant_method") == DEEPSEEK:
        size = block.get("weight_block_size")
        tiles = {"strategy": BLOCK, "block_structure": size} if size else {}
        return Declared((Group((_LINEAR,), tiles, activations=True),))
    found: list[Group] = []
    groups = block.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise InputError(f"{path}: 'config_groups' is no table", _HINT)
    for name, group in groups.items():
        if isinstance(group, list):  # a scheme by its name: the arrays say the rest
            found.append(Group(_targets(path, group), {}, "A16" not in str(name)))
            continue
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(group, dict) or not isinstance(weights or {}, dict):
            raise InputError(f"{path}: '{name}' of config_groups is no table", _HINT)
        rounded = group.get("input_activations") is not None
        found.append(Group(_targets(path, group.get("targets")), weights or {}, rounded))
    return Declared(tuple(found))


def _targets(path: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise InputError(f"{path}: 'targets' of config_groups is no list of names", _HINT)
    for target in value:
        try:
            re.compile(target.removeprefix(_PATTERN) if target.startswith(_PATTERN) else "")
        except re.error as error:
            raise InputError(f"{path}: 'targets' holds the pattern '{target}': {error}", _HINT) from error
    return tuple(value)


# -- what is written ---------------------------------------------------------------------------------------------


def layout(scheme: Scheme) -> str:
    """Returns compressed-tensors' name of the layout of a scheme's arrays."""
    if isinstance(scheme, FP8):
        return FLOATS if scheme.activations else NAIVE
    if isinstance(scheme, Int8Channel):
        return INTS
    return NV if isinstance(scheme, NVFP4) else MX if isinstance(scheme, MXFP4) else PACKED


def block(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Returns the config block of a file.

    Args:
        schemes: What each linear is on, by tensor name; at least one on a grid.
    """
    modules = {name.removesuffix(".weight"): scheme for name, scheme in schemes.items()}
    coded = {name: scheme for name, scheme in modules.items() if not isinstance(scheme, Plain)}
    kept = sorted({_HEAD, *modules} - coded.keys())
    ranked = [scheme for scheme, _ in Counter(coded.values()).most_common()]
    groups = {}
    for number, scheme in enumerate(ranked):
        # Names take precedence over the class, so the most common grid needs no names.
        targets = [name for name, own in coded.items() if own == scheme] if number else [_LINEAR]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _weights(scheme),
            "input_activations": _activations(scheme),
            "output_activations": None,
            "format": layout(scheme),
        }
    layouts = {layout(scheme) for scheme in ranked}
    return {
        "quant_method": METHOD,
        "format": layouts.pop() if len(layouts) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _arguments(kind: str, bits: int, strategy: str, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "dynamic": False, **more}


def _weights(scheme: Scheme) -> dict[str, Any]:
    """Returns what describes the weights of a group."""
    if isinstance(scheme, FP8):
        found = _arguments("float", 8, scheme.granularity)
        return found | ({"block_structure": [scheme.size] * 2} if scheme.granularity == BLOCK else {})
    if isinstance(scheme, NVFP4):
        return _arguments("float", 4, "tensor_group", group_size=scheme.block, scale_dtype="torch.float8_e4m3fn")
    if isinstance(scheme, MXFP4):
        return _arguments("float", 4, "group", group_size=scheme.block, scale_dtype="torch.uint8")
    assert isinstance(scheme, AffineInt)
    if scheme.group_size == -1:
        return _arguments("int", scheme.bits, CHANNEL, scheme.symmetric)
    return _arguments("int", scheme.bits, "group", scheme.symmetric, group_size=scheme.group_size)


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    """Returns what describes the inputs of a group, if they are rounded too; their scales are found at run time."""
    if isinstance(scheme, Int8Channel):
        return _arguments("int", 8, "token") | {"dynamic": True}
    if not isinstance(scheme, FP8) or not scheme.activations:
        return None
    if scheme.granularity == BLOCK:
        return _arguments("float", 8, "group", group_size=scheme.size) | {"dynamic": True}
    return _arguments("float", 8, "token") | {"dynamic": True}


def quantized_by(block: Mapping[str, Any], linears: Sequence[str]) -> set[str]:
    """Returns which linears (module names) engines take for quantized, by compressed-tensors' own rules."""
    targets = [target for group in block["config_groups"].values() for target in group["targets"]]
    ignored = [str(entry) for entry in block["ignore"]]

    def hit(entries: Sequence[str], module: str) -> bool:
        return any(fits(entry, module) for fits in (_named, _matched, _classed) for entry in entries)

    return {module for module in linears if hit(targets, module) and not hit(ignored, module)}
