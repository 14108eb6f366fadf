"""Llama 4, the language model: experts in every so-manieth block, stored on their side."""

from __future__ import annotations

from typing import Any

from quantize.formats.gguf.architectures.base import Architecture, Form, Rule, attention, block, mlp, outer, without
from quantize.formats.gguf.architectures.operations import GATE_UP, TRANSPOSE, chain
from quantize.formats.gguf.architectures.settings import (
    CONTEXT,
    EXPERTS_USED,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    KV_HEADS,
    RMS,
    Field,
    Keys,
    Settings,
    experts,
)
from quantize.formats.gguf.metadata import Value, u32

# What the loader takes for granted.
_CHUNK, _FULL_EVERY = 8192, 4


def routed(settings: Settings, block: int) -> bool:
    """In blocks with experts."""
    step = int(settings.get("interleave_moe_layer_step", default=1))
    return step > 0 and (block + 1) % step == 0


def _more(settings: Settings) -> dict[str, Value]:
    full = all(kind == "full_attention" for kind in settings.layer_types)
    return {"attention.sliding_window": u32(0)} if full else {}


def _back(keys: Keys, shapes: Any) -> dict[str, Any]:
    layers = keys.whole("block_count")
    if keys.raw("attention.sliding_window") == 0:
        return {"layer_types": ["full_attention"] * layers, "no_rope_layers": [1] * layers, "use_qk_norm": True}
    return {"use_qk_norm": keys.whole("expert_count") != 128}


def _check(settings: Settings) -> None:
    settings.require("hidden_act", "silu")
    settings.require("attention_bias", False)
    settings.require("use_qk_norm", settings.experts != 128)
    kinds, count = settings.layer_types, settings.layers
    if all(kind == "full_attention" for kind in kinds):
        return
    settings.require("attention_chunk_size", _CHUNK)
    usual = ["full_attention" if (n + 1) % _FULL_EVERY == 0 else "chunked_attention" for n in range(count)]
    turned = [int((n + 1) % _FULL_EVERY != 0) for n in range(count)]
    if kinds != usual or list(settings.get("no_rope_layers", default=turned) or turned) != turned:
        raise settings.refuse("config.json has other blocks than every fourth look at everything")


_EXPERTS = ".feed_forward.experts"

LLAMA4 = Architecture(
    "llama4",
    "llama4_text",
    "Llama4ForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *attention(),
        *block("ffn_norm", "post_attention_layernorm"),
        *mlp("feed_forward", where=without(routed)),
        *block("ffn_gate_inp", "feed_forward.router", where=routed),
        Rule(
            ("blk.{n}.ffn_gate_exps.weight", "blk.{n}.ffn_up_exps.weight"),
            (Form((f"{_EXPERTS}.gate_up_proj",), chain(TRANSPOSE, GATE_UP)),),
            routed,
        ),
        Rule(("blk.{n}.ffn_down_exps.weight",), (Form((f"{_EXPERTS}.down_proj",), TRANSPOSE),), routed),
        *mlp("feed_forward.shared_expert", where=routed, target="_shexp"),
    ),
    fields=(
        CONTEXT,
        HIDDEN,
        Field("feed_forward_length", ("intermediate_size_mlp",)),
        HEADS,
        KV_HEADS,
        HEAD_SIZE,
        RMS,
        experts("num_local_experts"),
        EXPERTS_USED,
        Field("expert_feed_forward_length", ("intermediate_size",)),
        Field("interleave_moe_layer_step", ("interleave_moe_layer_step",)),
    ),
    classes=("Llama4ForConditionalGeneration",),
    more=_more,
    back=_back,
    check=_check,
)
