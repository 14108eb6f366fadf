"""Rotary positions: every spelling of transformers as the keys and tensors of a GGUF file, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.gguf.architectures.settings import Keys, Settings
from quantize.formats.gguf.metadata import Value, f32, text, u32

#: Factors that llama.cpp divides the rotary frequencies by; config.json holds what makes them.
FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_KNOWN = "default, linear, yarn, llama3, longrope"


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary positions of a model.

    Attributes:
        kind: `default`, `linear`, `yarn`, `llama3`, `longrope`, or another that an architecture knows.
        theta: The base of the frequencies.
        sliding_theta: The base in blocks that look through a window, where it has one of its own.
        partial: The part of a head that turns, where it is said.
        parameters: All that is said of blocks with full attention.
    """

    kind: str
    theta: float
    sliding_theta: float | None
    partial: float | None
    parameters: Mapping[str, Any]


def read_rope(settings: Settings) -> Rope:
    """Returns the rotary positions that a config states, in the old keys or the new."""
    own = settings.own
    held = own.get("rope_parameters") or own.get("rope_scaling") or {}
    filled = settings.filled.get("rope_parameters") or {}
    full, sliding = _of(held, "full_attention"), held.get("sliding_attention") or {}
    assumed, beside = _of(filled, "full_attention"), filled.get("sliding_attention") or {}
    kind = str(
        full.get("rope_type") or full.get("type") or ("default" if held else assumed.get("rope_type", "default"))
    )
    kind = {"su": "longrope", "mrope": "default"}.get(kind.lower(), kind.lower())
    theta = _first(full.get("rope_theta"), own.get("rope_theta"), own.get("rotary_emb_base"), assumed.get("rope_theta"))
    local = _first(sliding.get("rope_theta"), own.get("rope_local_base_freq"), beside.get("rope_theta"))
    partial = _first(full.get("partial_rotary_factor"), own.get("partial_rotary_factor"), own.get("rotary_pct"))
    partial = _first(partial, assumed.get("partial_rotary_factor"))
    return Rope(kind, float(10000.0 if theta is None else theta), local, partial, full)


def _of(parameters: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = parameters.get(kind) or parameters
    return found


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def original_context(settings: Settings, rope: Rope) -> int:
    """Returns the context that the model was trained on before it was stretched."""
    said = rope.parameters.get("original_max_position_embeddings")
    return int(_first(said, settings.own.get("original_max_position_embeddings"))
               or settings.need("max_position_embeddings"))  # fmt: skip


def write_rope(settings: Settings, rope: Rope) -> dict[str, Value]:
    """Returns the metadata of rotary positions, without the architecture's name.

    Raises:
        InputError: they are scaled in a way that no GGUF file states.
    """
    keys = {"rope.freq_base": f32(rope.theta)}
    if rope.sliding_theta is not None:
        keys["rope.freq_base_swa"] = f32(rope.sliding_theta)
    if rope.kind in ("default", "llama3"):  # the latter in a tensor
        return keys
    if rope.kind not in ("linear", "yarn", "longrope"):
        raise InputError(
            f"{settings.file}: rope scaling '{rope.kind}' is none that a GGUF file states", f"known are {_KNOWN}"
        )
    keys["rope.scaling.type"] = text(rope.kind)
    if rope.kind == "longrope":
        keys["rope.scaling.original_context_length"] = u32(original_context(settings, rope))
        keys["rope.scaling.attn_factor"] = f32(_long_attention(settings, rope))
        return keys
    factor = rope.parameters.get("factor")
    if not isinstance(factor, int | float):
        raise InputError(f"{settings.file}: rope scaling '{rope.kind}' without a factor")
    keys["rope.scaling.factor"] = f32(factor)
    if rope.kind == "yarn":
        keys["rope.scaling.original_context_length"] = u32(original_context(settings, rope))
        for name in ("beta_fast", "beta_slow"):
            if rope.parameters.get(name) is not None:
                keys[f"rope.scaling.yarn_{name}"] = f32(rope.parameters[name])
        attention = _yarn_attention(rope.parameters, factor)
        if attention is not None:
            # llama.cpp multiplies by this what yarn's authors give, which the config replaces.
            keys["rope.scaling.attn_factor"] = f32(attention / _magnitude(factor))
    return keys


def _magnitude(factor: float, scale: float = 1.0) -> float:
    """Returns yarn's factor on queries and keys (Peng et al. 2023, arXiv 2309.00071)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention(parameters: Mapping[str, Any], factor: float) -> float | None:
    """Returns the factor on queries and keys that the config gives in place of yarn's own, or None."""
    said = _first(parameters.get("attention_factor"), parameters.get("attn_factor"))
    if said is not None:
        return float(said)
    part, whole = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if part and whole:
        return _magnitude(factor, part) / _magnitude(factor, whole)
    return None


def _long_attention(settings: Settings, rope: Rope) -> float:
    """Returns the factor on queries and keys of a model stretched by two lists of factors."""
    said = rope.parameters.get("attention_factor")
    if said is not None:
        return float(said)
    original = original_context(settings, rope)
    factor = settings.need("max_position_embeddings") / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rope_notices(rope: Rope) -> list[str]:
    """Returns what llama.cpp does otherwise than transformers with these rotary positions."""
    if rope.kind != "yarn":
        return []
    said, found = rope.parameters, list[str]()
    if said.get("truncate") is False:
        found.append("yarn: llama.cpp rounds the limits of its ramp, which the config says not to do")
    if (said.get("beta_fast") or 32, said.get("beta_slow") or 1) != (32, 1):
        found.append("yarn: llama.cpp takes 32 and 1 for beta_fast and beta_slow, whatever the file says")
    return found


def rope_tensors(settings: Settings, rope: Rope, rotated: int) -> dict[str, Tensor]:
    """Returns the float32 tensors that state rotary positions beside the metadata, of half `rotated` values each.

    Raises:
        InputError: the config's lists are of another length.
    """
    if rope.kind == "llama3":
        return {FACTORS: llama3_divisors(rope, rotated)}
    if rope.kind != "longrope":
        return {}
    found = {name: rope.parameters.get(key) for name, key in ((LONG, "long_factor"), (SHORT, "short_factor"))}
    for values in found.values():
        if not isinstance(values, list) or len(values) != rotated // 2:
            raise InputError(f"{settings.file}: rope scaling 'longrope' needs two lists of {rotated // 2} factors")
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in found.items()}


def llama3_divisors(rope: Rope, rotated: int) -> Tensor:
    """Returns what Llama 3.1 divides each frequency by: slow ones by the factor, fast ones by 1, smooth between."""
    said = rope.parameters
    factor, original = said.get("factor", 8.0), said.get("original_max_position_embeddings", 8192)
    low, high = said.get("low_freq_factor", 1.0), said.get("high_freq_factor", 4.0)
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated))
    lengths = 2 * math.pi / frequencies
    smooth = (original / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    slow = torch.where(lengths > original / low, torch.full_like(lengths, factor), between)
    return torch.where(lengths < original / high, torch.ones_like(lengths), slow)


def parse_rope(keys: Keys, rotated: int, context: int, tensors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Returns the rotary settings of a GGUF file, under transformers 5's one key and the two that older readers know.

    Args:
        keys: Its metadata.
        rotated: How much of a head turns.
        context: The longest context.
        tensors: Its tensors of factors, by name.

    Raises:
        InputError: it scales in a way that no config.json states.
    """
    theta, start = keys.number("rope.freq_base", 10000.0), f"{keys.prefix}.rope.scaling."
    scaling = {k.removeprefix(start): v for k, v in keys.metadata.items() if k.startswith(start)}
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    kind = scaling.get("type", "none" if factor in (0, 1) else "linear")
    attention = scaling.get("attn_factor", 1)
    # What only GGUF can state must be neutral; `finetuned` tells of the past and changes nothing.
    neutral = {"yarn_ext_factor": (1, -1), "yarn_attn_factor": (1,)}
    known = {
        "type",
        "factor",
        "finetuned",
        "original_context_length",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "attn_factor",
    }
    odd = sorted(k for k, v in scaling.items() if k not in known and v not in neutral.get(k, ()))
    odd += ["attn_factor"] if attention != 1 and kind not in ("yarn", "longrope") else []
    if kind not in ("none", "linear", "yarn", "longrope") or odd:
        what = f"rope scaling '{kind}'" + (f" with {', '.join(odd)}" if odd else "")
        raise InputError(f"{keys.file}: {what} cannot be read")
    found: dict[str, Any] = {}
    if kind == "yarn":
        found = {"rope_type": "yarn", "factor": factor}
        found["original_max_position_embeddings"] = scaling.get("original_context_length", context)
        found |= {k: scaling[f"yarn_{k}"] for k in ("beta_fast", "beta_slow") if f"yarn_{k}" in scaling}
        if attention != 1:
            found["attention_factor"] = round(attention * _magnitude(factor), 6)
    elif kind == "linear" and factor not in (0, 1):
        found = {"rope_type": "linear", "factor": factor}
    elif kind == "longrope":
        if not (LONG in tensors and SHORT in tensors):
            raise InputError(f"{keys.file}: rope scaling 'longrope' without '{LONG}' and '{SHORT}'")
        found = {"rope_type": "longrope", "long_factor": list(tensors[LONG]), "short_factor": list(tensors[SHORT])}
        found["original_max_position_embeddings"] = scaling.get("original_context_length", context)
        found["attention_factor"] = attention
    values = tensors.get(FACTORS, [])
    if any(value != 1 for value in values):
        llama3 = llama3_rope(values, theta, rotated)
        if llama3 is None or found:
            what = f"'{FACTORS}' scales the rotary frequencies in a way that no config.json states"
            raise InputError(f"{keys.file}: {what}", "use the model it was made from")
        found = llama3
    older = {"rope_theta": theta} | ({"rope_scaling": found} if found else {})
    said: dict[str, Any] = {"rope_type": "default", "rope_theta": theta} | found
    if keys.raw("rope.freq_base_swa") is not None:
        local = keys.number("rope.freq_base_swa")
        said = {"full_attention": said, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
        older |= {"rope_local_base_freq": local}
    return {"rope_parameters": said} | older


def llama3_rope(factors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any] | None:
    """Returns the 'llama3' parameters that make exactly these divisors of the rotary frequencies, or None.

    Only the ratios of the two limits and the original context show in the divisors, so the limits are taken
    as the 1 and 4 of all published models. Then the last divisor is the factor, each one between gives the
    context, and the whole list, computed anew, must agree to float32's precision.
    """
    low, high, factor = 1.0, 4.0, factors[-1]
    # How often each frequency turns per position.
    turns = [theta ** (-2 * i / head_dim) / (2 * math.pi) for i in range(len(factors))]
    if len(factors) != head_dim // 2 or factor <= 1:
        return None

    def divisor(turn: float, context: int) -> float:
        smooth = min(max((context * turn - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - smooth) / factor + smooth)

    contexts = {8192}
    for value, turn in zip(factors, turns, strict=True):
        if 1 < value < factor:
            smooth = (1 / value - 1 / factor) / (1 - 1 / factor)
            contexts.add(round((smooth * (high - low) + low) / turn))
    for context in sorted(contexts):
        made = [divisor(turn, context) for turn in turns]
        if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(made, factors, strict=True)):
            found = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
            }
            return found | {"original_max_position_embeddings": context}
    return None
