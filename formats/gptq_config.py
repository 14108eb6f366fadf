"""What a GPTQ folder says of itself: one grid for all linears, and the modules that differ from it.

Engines learn of those that differ in two ways, and both are written. `dynamic` (GPTQModel, vLLM, SGLang) maps regular
expressions to settings: `-:REGEX` leaves the modules that match alone, `+:REGEX` gives them other settings; the first
match wins. `modules_in_block_to_quantize` (transformers by way of optimum, vLLM) lists what is quantized: transformers
matches the ends of names, vLLM any part of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.formats.folder import read_json, take_quantization
from quantize.formats.fused import fused_modules
from quantize.schemes import AffineInt, Plain, Scheme
from quantize.version import VERSION

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
# What other tools write under the same method, and what to do with it.
_OTHER_LAYOUTS = {
    "marlin": "repacked for one GPU kernel",
    "gptq_p": "GPTQModel's planes of bits",
    "bitblas": "repacked for one GPU kernel",
}
_SIDE_FILE = "quantize_config.json"
_HINT = "use the model it was made from"
# Modules of routed experts: engines ask for the settings of the stack that holds them.
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.[^.]+")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


# -- what is read ------------------------------------------------------------------------------------------------


def find_block(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Removes the quantization block from a config and returns it, or that of AutoGPTQ's file, or an empty one."""
    found = take_quantization(path, config)
    if not found and (path / _SIDE_FILE).is_file():
        found = {"quant_method": "gptq", **read_json(path / _SIDE_FILE)}
    return found


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of `dynamic`: the settings that it changes, or None where it leaves modules unquantized."""

    pattern: re.Pattern[str]
    changes: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Declared:
    """What a config says.

    Attributes:
        path: The folder, for messages.
        version: `gptq` or `gptq_v2`, or None where it does not say.
        settings: `bits`, `group_size`, `sym`, `desc_act` of all modules, as far as it says them.
        rules: The exceptions.
        borrowed: Whether the packer took 1 from whole words of zero points, so that fields may have borrowed.
    """

    path: Path
    version: str | None
    settings: Mapping[str, Any]
    rules: tuple[Rule, ...]
    borrowed: bool

    def of(self, module: str) -> Mapping[str, Any]:
        """Returns the settings of one module."""
        for rule in self.rules:
            if rule.changes is not None and rule.pattern.match(module):
                return {**self.settings, **rule.changes}
        return self.settings


def declared(path: Path, block: Mapping[str, Any]) -> Declared:
    """Returns what a quantization block says.

    Raises:
        InputError: it is of a layout that cannot be read, or makes no sense.
    """
    layouts = [block.get(key) for key in ("checkpoint_format", "format")]
    layout = next((str(value).lower() for value in layouts if value), None)
    layout = "marlin" if block.get("is_marlin_format") else layout
    method = str(block.get("quant_method")).lower()
    layout = method if method in _OTHER_LAYOUTS else layout
    if layout not in (None, V1, V2):
        what = _OTHER_LAYOUTS.get(str(layout), "no layout that can be read")
        raise InputError(f"{path}: GPTQ in layout '{layout}': {what}", _HINT)
    pack = str(block.get("pack_dtype") or "int32").removeprefix("torch.")
    if pack != "int32":
        raise InputError(f"{path}: GPTQ codes packed in {pack}", f"only int32 can be read: {_HINT}")
    settings = {key: block[key] for key in ("bits", "group_size", "sym", "desc_act") if block.get(key) is not None}
    meta = block.get("meta")
    makers = str(meta.get("quantizer") if isinstance(meta, dict) else "").lower()
    dynamic = block.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise InputError(f"{path}: 'dynamic' is no table of patterns", "its config is broken: download it again")
    return Declared(path, layout, settings, tuple(_rules(path, dynamic)), "gptqmodel" in makers)


def _rules(path: Path, dynamic: Mapping[str, Any]) -> Iterator[Rule]:
    for text, changes in dynamic.items():
        try:
            pattern = re.compile(text.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise InputError(
                f"{path}: 'dynamic' holds the pattern '{text}': {error}", "its config is broken: download it again"
            ) from error
        yield Rule(pattern, None if text.startswith("-:") else dict(changes or {}))


# -- what is written ---------------------------------------------------------------------------------------------


def split(schemes: Mapping[str, Scheme]) -> tuple[dict[str, AffineInt], list[str]]:
    """Returns the quantized modules with their grids, and the unquantized ones."""
    modules = {name.removesuffix(".weight"): scheme for name, scheme in schemes.items()}
    coded = {name: scheme for name, scheme in modules.items() if isinstance(scheme, AffineInt)}
    return coded, sorted(name for name, scheme in modules.items() if isinstance(scheme, Plain))


def needs_true_zeros(schemes: Iterable[Scheme]) -> bool:
    """Returns whether zero points may be 0, which version 1 cannot hold."""
    return any(isinstance(scheme, AffineInt) and not scheme.symmetric for scheme in schemes)


def block(schemes: Mapping[str, Scheme], version: str) -> dict[str, Any]:
    """Returns the config block of a file.

    Args:
        schemes: What each linear is on, by tensor name; at least one on a grid.
        version: `gptq` or `gptq_v2`.
    """
    coded, kept = split(schemes)
    common = _common(coded)
    made: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": common.bits,
        "group_size": common.group_size,
        "desc_act": False,
        "sym": common.symmetric,
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"quantize:{VERSION}"]},
    }
    rules = dynamic(coded, kept)
    if rules:
        made["dynamic"] = rules
    if kept:
        made["modules_in_block_to_quantize"] = [listed(coded, kept)]
    return made


def notices(schemes: Mapping[str, Scheme]) -> list[str]:
    """Returns what engines cannot do with such a file, one line each."""
    coded, _ = split(schemes)
    found: list[str] = []
    if not coded:
        return found
    grids = sorted({str(scheme) for scheme in coded.values()})
    if len(grids) > 1:
        found.append(f"transformers reads one grid for the whole file, not {', '.join(grids)}: GPTQModel and vLLM can")
    torn = [parts for parts in fused_modules(coded).values() if len({coded[part] for part in parts}) > 1]
    if torn:
        found.append(f"vLLM fuses {' and '.join(torn[0])} and wants them on one grid ({len(torn)} such groups)")
    if any(scheme.bits not in (4, 8) or not scheme.symmetric for scheme in coded.values()):
        found.append("newer vLLM loads this format with 4 and 8 bits and --sym only")
    elif any(scheme.group_size not in (-1, 32, 64, 128) for scheme in coded.values()):
        found.append("vLLM's fast kernels take groups of 32, 64, 128 and -1")
    return found


def _common(coded: Mapping[str, AffineInt]) -> AffineInt:
    return Counter(coded.values()).most_common(1)[0][0]


def dynamic(coded: Mapping[str, AffineInt], kept: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the rules for all modules that are not on the most common grid; the unquantized ones come first."""
    common = _common(coded)
    wanted: dict[str, AffineInt | None] = {**coded, **dict.fromkeys(kept)}
    wanted |= _stood_for(wanted)
    rules: dict[str, dict[str, Any]] = {}
    for pattern, scheme in sorted(_patterns(wanted), key=lambda rule: rule[1] is not None):
        if scheme is None:
            rules[f"-:{pattern}"] = {}
        elif scheme != common:
            rules[f"+:{pattern}"] = {
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "sym": scheme.symmetric,
            }
    return rules


def _stood_for(wanted: Mapping[str, AffineInt | None]) -> dict[str, AffineInt | None]:
    """Returns the modules that engines ask about in place of ours, fused linears and expert stacks, where all agree."""
    groups = {name: list(parts) for name, parts in fused_modules(wanted).items()}
    for name in wanted:
        if match := _EXPERT.fullmatch(name):
            groups.setdefault(match[1], []).append(name)
    return {name: wanted[parts[0]] for name, parts in groups.items() if len({wanted[part] for part in parts}) == 1}


def _patterns(wanted: Mapping[str, AffineInt | None]) -> list[tuple[str, AffineInt | None]]:
    """Returns anchored patterns for all modules: one for all layers where they agree, else one for each."""
    alike: dict[str, set[AffineInt | None]] = {}
    for name, scheme in wanted.items():
        alike.setdefault(_numberless(name), set()).add(scheme)
    found: dict[str, AffineInt | None] = {}
    for name, scheme in wanted.items():
        shared = _numberless(name)
        found[f"^{shared if len(alike[shared]) == 1 else re.escape(name)}$"] = scheme
    return list(found.items())


def _numberless(name: str) -> str:
    return _NUMBER.sub(r"\\d+", re.escape(name).replace(r"\.", ".")).replace(".", r"\.")


def listed(coded: Iterable[str], kept: Sequence[str]) -> list[str]:
    """Returns the shortest ends of the quantized modules' names that occur in no unquantized one's."""
    found: dict[str, None] = {}
    for name in coded:
        parts = name.split(".")
        first = 1 if len(parts) < 2 or parts[-2].isdigit() else 2  # all experts of a stack at once
        ends = (".".join(parts[-count:]) for count in range(first, len(parts)))
        found[next((end for end in ends if not any(end in other for other in kept)), name)] = None
    return list(found)
