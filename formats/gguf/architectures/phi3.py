"""Phi 3 and 4: query, key and value in one matrix, gate and up in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.formats.gguf.architectures.base import Architecture, block, outer
from quantize.formats.gguf.architectures.rope import original_context, read_rope
from quantize.formats.gguf.architectures.settings import CONTEXT, FFN, HEADS, HIDDEN, KV_HEADS, RMS, Keys, Settings
from quantize.formats.gguf.metadata import Value, u32
from quantize.schemes import Shape


def _more(settings: Settings) -> dict[str, Value]:
    # A window of 0 tells Phi 4 from the others.
    keys = {"attention.sliding_window": u32(settings.get("sliding_window", default=0))}
    return keys | {"rope.scaling.original_context_length": u32(original_context(settings, read_rope(settings)))}


def _back(keys: Keys, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    context = keys.whole("rope.scaling.original_context_length", keys.whole(CONTEXT.key))
    window = keys.whole("attention.sliding_window", 0)
    return {"original_max_position_embeddings": context, "sliding_window": window or None}


PHI3 = Architecture(
    "phi3",
    "phi3",
    "Phi3ForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *block("attn_qkv", "self_attn.qkv_proj"),
        *block("attn_output", "self_attn.o_proj"),
        *block("ffn_norm", "post_attention_layernorm"),
        *block("ffn_up", "mlp.gate_up_proj"),
        *block("ffn_down", "mlp.down_proj"),
    ),
    fields=(CONTEXT, HIDDEN, FFN, HEADS, KV_HEADS, RMS),
    more=_more,
    back=_back,
    check=lambda settings: settings.require("hidden_act", "silu"),
)
