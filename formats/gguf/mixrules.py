"""What the rules of llama.cpp's named mixes look at, and the rules.

A rule sees a tensor's name and row length, facts of the model, and how many tensors of the same kind came before: the
tensors of a model are walked in the order of `walking_order`, which is part of the rules. Numbers and order are those
of llama-quantize 0.5; the tests compare every mix with that program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from quantize.kernels.cpu.ggml import BLOCKS
from quantize.schemes import Shape

EMBEDDINGS = frozenset({"token_embd.weight", "per_layer_token_embd.weight"})
HEAD = "output.weight"
FLOATS = frozenset({"f32", "f16", "bf16"})

# Mixes below three bits; the last two of them spend more on what is delicate.
_LOW = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
_LOW_RICH = frozenset({"IQ2_S", "IQ2_M"})

# Name parts of tensors that stay as they are, and why.
_PROTECTED: tuple[tuple[str, str], ...] = (
    ("_norm.weight", "normalization"),
    ("ffn_gate_inp.weight", "router"),
    ("ffn_gate_tid2eid.weight", "router's table"),
    ("altup", "tiny mixing matrix"),
    ("laurel", "tiny low-rank matrix"),
    ("per_layer_model_proj", "small projection of the per-layer embeddings"),
    ("ssm_conv1d", "convolution"),
    ("shortconv.conv.weight", "convolution"),
    ("indexer.k_proj.weight", "small indexer of sparse attention"),
    ("indexer.q_proj.weight", "small indexer of sparse attention"),
    *((f"time_mix_{part}.weight", "small matrix of the time mixing")
      for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2",
                   "decay_w1", "decay_w2", "lerp_fused")),
    ("attn_rel_b.weight", "position bias"),
    (".position_embd", "position embedding"),
    ("sam.pos_embd", "position embedding"),
    ("sam.neck.", "image encoder's neck"),
    ("sam.net_", "image encoder's neck"),
    (".rel_pos", "position embedding"),
    (".patch_embd", "patch embedding"),
    (".patch_merger", "patch merger"),
    ("a.rvq.codebook", "audio codebook"),
    ("mm.a.code_embd", "audio codebook"),
)  # fmt: skip
_PROTECTED_NAMES = {"position_embd.weight": "position embedding", "token_types.weight": "embedding of token types"}
# Further ones of single architectures.
_PROTECTED_OF = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
        "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight",
    )
}  # fmt: skip
_AT_LEAST_8_BITS = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}

# What llama.cpp calls a 70B model, whatever its size: architecture and layers.
_SEVENTY = frozenset({("llama", 80), ("llama-embed", 80), ("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)})

_LAYER = re.compile(r"blk\.(\d+)\.")


class Part(Enum):
    """What a tensor is, in plain words."""

    HEAD = "head"
    EMBEDDING = "embedding"
    VALUE = "attention value"
    KEY = "attention key"
    QUERY = "attention query"
    MIXED = "attention output"
    UP = "feed-forward up"
    GATE = "feed-forward gate"
    DOWN = "feed-forward down"
    OTHER = "other matrix"


# The first that a name contains says what it is. Fused query, key and value count as value.
_PARTS: tuple[tuple[str, Part], ...] = (
    ("attn_qkv.weight", Part.VALUE),
    ("attn_kv_b.weight", Part.VALUE),
    ("attn_v.weight", Part.VALUE),
    ("attn_k.weight", Part.KEY),
    ("attn_q.weight", Part.QUERY),
    ("attn_output.weight", Part.MIXED),
    ("ffn_up", Part.UP),
    ("ffn_gate", Part.GATE),
    ("ffn_down", Part.DOWN),
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules ask of a model.

    Attributes:
        architecture: GGUF's name of it (`general.architecture`).
        layers: `{architecture}.block_count`, extra prediction layers included.
        heads: Attention heads of the first layer.
        kv_heads: Key and value heads of the first layer; 0 where it has none.
        experts: `{architecture}.expert_count`, 0 for a dense model.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def sharing(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def seventy(self) -> bool:
        """Whether llama.cpp counts the model as its 70B."""
        if (self.architecture, self.layers) not in _SEVENTY:
            return False
        return not self.architecture.startswith("llama") or (self.heads != self.kv_heads and self.experts != 8)


def part_of(name: str) -> Part:
    """Returns what the tensor called `name` is."""
    if name == HEAD:
        return Part.HEAD
    if name in EMBEDDINGS:
        return Part.EMBEDDING
    return next((part for piece, part in _PARTS if piece in name), Part.OTHER)


def layer_of(name: str) -> int:
    """Returns the number of the layer that a tensor belongs to, -1 for one outside."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def walking_order(names: Iterable[str]) -> list[str]:
    """Returns names in the order in which the mixes count: by layer, those outside first, then by bytes."""
    return sorted(names, key=lambda name: (layer_of(name), name.encode()))


def protection(name: str, shape: Shape, architecture: str) -> str | None:
    """Returns why a tensor is never quantized, or None if it may be.

    Tensors of more than three dimensions are kept too; llama-quantize does not see the fourth.
    """
    sized = [length for i, length in enumerate(shape) if any(size > 1 for size in shape[: i + 1])]
    if len(sized) < 2:
        return "a vector"
    if len(sized) > 3:
        return f"{len(sized)} dimensions"
    if not name.endswith("weight"):
        return "no weight matrix by its name"
    if name in _PROTECTED_NAMES:
        return _PROTECTED_NAMES[name]
    if any(piece in name for piece in _PROTECTED_OF.get(architecture, ())):
        return f"small or delicate in {architecture}"
    return next((reason for piece, reason in _PROTECTED if piece in name), None)


def _more(index: int, count: int) -> bool:
    """Returns whether a layer is in the first or last eighth, or each third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


class Walk:
    """The rules of one mix on their way through one model; `next` is called once for each tensor, in order.

    Args:
        mix: Name of the mix.
        base: Its main type.
        facts: The model.
        importance: Whether importance data is given.
        values: How many tensors of the model are `Part.VALUE`.
        tied: Whether the embedding is the head.
    """

    def __init__(self, mix: str, base: str, facts: Facts, importance: bool, values: int, tied: bool) -> None:
        self._mix, self._base, self._facts = mix, base, facts
        self._importance, self._values, self._tied = importance, values, tied
        self._seen = dict.fromkeys(Part, 0)
        self._falcon = facts.architecture == "falcon"

    def next(self, name: str, shape: Shape, output: str | None = None) -> tuple[str, str]:
        """Returns type and reason for the next tensor that may be quantized; the type may not fit its row.

        Args:
            name: The tensor.
            shape: Its shape in torch's order.
            output: The type that was asked for the head.
        """
        part, mix, base = part_of(name), self._mix, self._base
        if any(piece in name for piece in _AT_LEAST_8_BITS.get(self._facts.architecture, ())):
            return "q8_0", f"at least 8 bits in {self._facts.architecture}"
        if part is Part.HEAD or (part is Part.EMBEDDING and self._tied):
            what = "head" if part is Part.HEAD else "embedding that is the head too"
            return (output, f"{what}: as asked") if output else (self._head(shape[-1]), f"{mix}: {what}")
        if mix == "MXFP4_MOE":
            experts = self._stacked(shape, part)
            return ("mxfp4", "MXFP4_MOE: experts") if experts else ("q8_0", "MXFP4_MOE: all but experts")
        if part is Part.EMBEDDING:
            return self._embedding(), f"{mix}: embedding"
        chosen, where = (self._low if mix in _LOW else self._usual)(part, name)
        if chosen is None:
            return base, f"{mix}: its main type"
        return chosen, f"{mix}: {part.value}{', ' if where else ''}{where}"

    def _stacked(self, shape: Shape, part: Part) -> bool:
        deep = len(shape) > 2 and shape[-3] > 1
        return deep and (self._facts.architecture != "bailingmoe3" or part in (Part.UP, Part.GATE, Part.DOWN))

    def _head(self, width: int) -> str:
        if self._mix == "MXFP4_MOE" or self._falcon or width % BLOCKS[self._base].weights:
            return "q8_0"
        if self._mix in _LOW or self._mix == "IQ3_XXS":
            return "q5_k"
        return "q8_0" if self._base == "q8_0" else "q6_k"

    def _embedding(self) -> str:
        if self._mix in _LOW_RICH or self._mix == "IQ3_XXS":
            return "iq3_s"
        if self._mix in _LOW:
            return "q2_k"
        return "q4_k" if self._mix in ("TQ1_0", "TQ2_0", "Q2_0") else self._base

    def _count(self, part: Part) -> int:
        """Returns how many of a part came before, and counts this one."""
        self._seen[part] += 1
        return self._seen[part] - 1

    def _layer(self, part: Part, name: str) -> int:
        """Returns the layer as the rules count it: with experts by name, else by how many came before.

        llama-quantize ends with an error where a model with experts has such a tensor outside the layers.
        """
        seen, layer = self._count(part), layer_of(name)
        return layer if self._facts.experts > 1 and layer >= 0 else seen

    def _low(self, part: Part, name: str) -> tuple[str | None, str]:
        """The mixes below three bits."""
        facts, rich = self._facts, self._mix in _LOW_RICH
        delicate = "iq3_s" if rich else "q2_k"
        if part is Part.VALUE:
            many = facts.sharing >= 4 or facts.experts >= 4
            return ("q4_k", "few of them") if many else (delicate, "")
        if part is Part.KEY and facts.experts == 8:
            return "q4_k", "8 experts"
        if part is Part.DOWN and self._count(part) < facts.layers // 8:  # counts tensors, even where they are experts
            return delicate, "first eighth"
        if part is Part.MIXED:
            if facts.experts == 8:
                return "q5_k", "8 experts"
            if rich or self._mix in ("IQ1_S", "IQ1_M"):
                return "iq3_s" if rich else "iq2_xxs", ""
        return None, ""

    def _usual(self, part: Part, name: str) -> tuple[str | None, str]:
        """The mixes of three bits and more."""
        if part is Part.VALUE:
            return self._value()
        if part in (Part.KEY, Part.QUERY):
            if part is Part.KEY and self._facts.experts == 8:
                return "q8_0", "8 experts"
            return {"IQ3_XS": "iq3_xxs", "IQ3_XXS": "iq2_s"}.get(self._mix), ""
        if part is Part.DOWN:
            return self._down(self._layer(part, name))
        if part is Part.MIXED:
            return self._mixed()
        if part in (Part.GATE, Part.UP):
            layer, count = self._layer(part, name), self._facts.layers
            if self._mix == "IQ3_XS" and count // 8 <= layer < 7 * count // 8:
                return "iq3_xxs", "between first and last eighth"
        return None, ""

    def _value(self) -> tuple[str | None, str]:
        seen, many = self._count(Part.VALUE), self._facts.sharing >= 4
        chosen, where = None, "few of them" if many else ""
        match self._mix:
            case "Q2_K":
                chosen = "q4_k" if many else "q3_k"
            case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if many:
                chosen = "q4_k"
            case "IQ4_NL" | "IQ4_XS" if many:
                chosen = "q5_k"
            case "IQ3_XXS":
                chosen = "q4_k" if many else "iq3_xxs" if self._importance else "iq3_s"
            case "IQ3_M":
                chosen, where = "q4_k", ""
            case "Q3_K_L":
                chosen, where = "q5_k", ""
            case "Q3_K_M":
                chosen, where = ("q5_k", "first two") if seen < 2 else ("q4_k", "")
            case "Q4_K_S" if seen < 4:
                chosen, where = "q5_k", "first four"
            case "Q4_K_M" | "Q5_K_M" if _more(seen, self._values):
                chosen, where = "q6_k", _MORE
        if self._facts.seventy and (chosen or self._base) in ("q3_k", "q4_k"):
            chosen, where = "q5_k", "few of them in a 70B model"
        if self._facts.experts == 8:
            chosen, where = "q8_0", "8 experts"
        return chosen, where

    def _down(self, layer: int) -> tuple[str | None, str]:
        count, falcon = self._facts.layers, self._falcon
        first, more = layer < count // 8, _more(layer, count)
        match self._mix:
            case "Q2_K":
                return "q3_k", ""
            case "Q2_K_S" if first:
                return "q4_k", "first eighth"
            case "IQ3_XXS" if not self._importance:
                return ("q4_k", "first eighth") if first else ("q3_k", "no importance")
            case "IQ3_M" if first or (self._facts.experts == 8 and more):
                return "q4_k", "first eighth" if first else _MORE
            case "Q3_K_L":
                return "q4_k" if falcon else "q5_k", ""
            case "Q3_K_M":
                if layer < count // 16:
                    return "q5_k", "first sixteenth"
                return ("q4_k", "") if more or not falcon else (None, "")
            case "Q4_K_M" if falcon:
                if layer < count // 16:
                    return "q6_k", "first sixteenth"
                return ("q5_k", _MORE) if more else (None, "")
            case "Q4_K_M" | "Q5_K_M" if more:
                return "q6_k", _MORE
            case "Q4_K_S" if first and not falcon:
                return "q5_k", "first eighth"
            case "IQ4_NL" | "IQ4_XS" if first and not self._importance:
                return "q5_k", "first eighth"
            case "Q4_0" | "Q5_0" if first and self._importance:
                return f"{self._base[:-1]}1", "first eighth"
        return None, ""

    def _mixed(self) -> tuple[str | None, str]:
        if self._falcon:
            return ("q4_k" if self._mix == "Q3_K_L" else None), ""
        if self._facts.experts == 8:
            return ("q5_k" if self._mix in _MIXED_WITH_8_EXPERTS else None), "8 experts"
        return _MIXED.get(self._mix), ""


_MORE = "first and last eighth and each third between"
_MIXED = {"Q2_K": "q3_k", "IQ3_XXS": "iq3_s", "Q3_K_M": "q4_k", "Q3_K_L": "q5_k", "IQ3_M": "q4_k"}
_MIXED_WITH_8_EXPERTS = frozenset(
    {"Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS"}
)
