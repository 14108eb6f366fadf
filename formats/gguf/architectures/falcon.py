"""Falcon 7B, 40B and 180B: query, key and value in one matrix, group by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.formats.gguf.architectures.base import Architecture, Form, Rule, bias, block, outer, without
from quantize.formats.gguf.architectures.operations import rows
from quantize.formats.gguf.architectures.settings import CONTEXT, HEADS, HIDDEN, LAYER_NORM, Keys, Settings
from quantize.formats.gguf.metadata import Value, text, u32


def new(settings: Settings, block: int) -> bool:
    """In the models with groups of heads."""
    return bool(settings.get("new_decoder_architecture"))


def _two_norms(settings: Settings, block: int) -> bool:
    return new(settings, block) and settings.get("num_ln_in_parallel_attn", default=2) == 2


def groups(settings: Settings) -> int:
    """Returns the number of key and value heads."""
    if settings.get("multi_query") and not new(settings, 0):
        return 1
    return int(settings.get("num_kv_heads", "n_head_kv", default=settings.heads))


def _regrouped(settings: Settings, count: int) -> Tensor:
    """Returns the source rows of all queries, all keys, all values; a group has its queries, its key, its value."""
    kv, size = groups(settings), settings.hidden // settings.heads
    if count != (settings.heads + 2 * kv) * size:
        raise ValueError(f"it has {count} rows, not {settings.heads} and twice {kv} heads of {size}")
    by_group = torch.arange(count).reshape(kv, -1, size)
    return torch.cat([by_group[:, :-2].flatten(), by_group[:, -2].flatten(), by_group[:, -1].flatten()])


@dataclass(frozen=True, slots=True)
class _Groups:
    """The heads that keys and values have, and the width of the MLP."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns both, and that rows are regrouped."""
        width = settings.get("ffn_hidden_size", default=4 * settings.hidden)
        return {
            "attention.head_count_kv": u32(groups(settings)),
            "feed_forward_length": u32(width),
            "tensor_data_layout": text("jploski"),
        }

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns both."""
        kv = keys.whole("attention.head_count_kv", 1)
        return {"num_kv_heads": kv, "multi_query": kv == 1, "ffn_hidden_size": keys.whole("feed_forward_length")}


def _check(settings: Settings) -> None:
    settings.require("alibi", False)
    settings.require("bias", False)
    settings.require("parallel_attn", True)
    settings.require("activation", "gelu")


def _back(keys: Keys, shapes: Any) -> dict[str, Any]:
    two = "blk.0.attn_norm_2.weight" in shapes
    grouped = two or keys.whole("attention.head_count_kv", 1) > 1
    said: dict[str, Any] = {"new_decoder_architecture": grouped, "parallel_attn": True, "bias": False, "alibi": False}
    return (
        said
        | {"layer_norm_epsilon": keys.number(LAYER_NORM.key)}
        | ({"num_ln_in_parallel_attn": 2 if two else 1} if grouped else {})
    )


def _norm(leaf: str) -> tuple[Rule, ...]:
    return (
        Rule((f"blk.{{n}}.attn_norm.{leaf}",), (Form((f".input_layernorm.{leaf}",)),), without(_two_norms)),
        Rule((f"blk.{{n}}.attn_norm.{leaf}",), (Form((f".ln_mlp.{leaf}",)),), _two_norms),
        Rule((f"blk.{{n}}.attn_norm_2.{leaf}",), (Form((f".ln_attn.{leaf}",)),), _two_norms),
    )


FALCON = Architecture(
    "falcon",
    "falcon",
    "FalconForCausalLM",
    rules=(
        *outer("transformer.word_embeddings", "transformer.ln_f"),
        bias("output_norm", "transformer.ln_f"),
        *_norm("weight"),
        *_norm("bias"),
        *block("attn_qkv", "self_attention.query_key_value", rows(_regrouped)),
        *block("attn_output", "self_attention.dense"),
        *block("ffn_up", "mlp.dense_h_to_4h"),
        *block("ffn_down", "mlp.dense_4h_to_h"),
    ),
    fields=(CONTEXT, HIDDEN, HEADS, _Groups(), LAYER_NORM),
    layer="transformer.h.{n}",
    classes=("RWForCausalLM",),
    prefix="transformer.",
    rotated=lambda settings, rope: settings.hidden // settings.heads,
    check=_check,
    back=_back,
)
