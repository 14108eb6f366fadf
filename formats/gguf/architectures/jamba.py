"""Jamba: state-space blocks with one of attention among them, and experts in some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantize.formats.gguf.architectures.base import Architecture, attention, block, mlp, outer, routed, without
from quantize.formats.gguf.architectures.mamba import state_space
from quantize.formats.gguf.architectures.settings import (
    CONTEXT,
    EXPERTS_USED,
    FFN,
    HEADS,
    HIDDEN,
    RMS,
    Keys,
    Settings,
    experts,
)
from quantize.formats.gguf.metadata import Value, integers, u32


def attends(settings: Settings, block: int) -> bool:
    """In blocks of attention."""
    return block % int(settings.need("attn_layer_period")) == int(settings.need("attn_layer_offset"))


def has_experts(settings: Settings, block: int) -> bool:
    """In blocks with experts."""
    every, first = int(settings.need("expert_layer_period")), int(settings.need("expert_layer_offset"))
    return settings.experts > 1 and block % every == first


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes of the state, and which blocks attend: those with heads of keys and values."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns them."""
        hidden, expand = settings.hidden, int(settings.need("mamba_expand"))
        if expand != 2:
            raise settings.refuse(f"config.json has 'mamba_expand' {expand}")
        rank = settings.get("mamba_dt_rank")
        found = {
            "ssm.conv_kernel": settings.need("mamba_d_conv"),
            "ssm.inner_size": expand * hidden,
            "ssm.state_size": settings.need("mamba_d_state"),
            "ssm.time_step_rank": -(-hidden // 16) if rank in (None, "auto") else rank,
        }
        heads = [settings.kv_heads if attends(settings, block) else 0 for block in range(settings.layers)]
        return {key: u32(value) for key, value in found.items()} | {"attention.head_count_kv": integers(heads)}

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns them."""
        heads = keys.list("attention.head_count_kv", keys.whole("block_count"))
        where = [block for block, count in enumerate(heads) if count]
        first = where[0] if where else len(heads)
        return {
            "num_key_value_heads": max(heads),
            "attn_layer_offset": first,
            "attn_layer_period": where[1] - first if len(where) > 1 else len(heads) + 1,
            "mamba_expand": keys.whole("ssm.inner_size") // max(keys.whole(HIDDEN.key), 1),
            "mamba_d_conv": keys.whole("ssm.conv_kernel"),
            "mamba_d_state": keys.whole("ssm.state_size"),
            "mamba_dt_rank": keys.whole("ssm.time_step_rank"),
        }


def _back(keys: Keys, shapes: Any) -> dict[str, Any]:
    layers = keys.whole("block_count")
    where = [n for n in range(layers) if f"blk.{n}.ffn_gate_inp.weight" in shapes]
    first = where[0] if where else layers
    return {
        "expert_layer_offset": first,
        "expert_layer_period": where[1] - first if len(where) > 1 else layers + 1,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "hidden_act": "silu",
    }


def _check(settings: Settings) -> None:
    settings.require("mamba_conv_bias", True)
    settings.require("mamba_proj_bias", False)
    settings.require("hidden_act", "silu")


_STATE = without(attends)

JAMBA = Architecture(
    "jamba",
    "jamba",
    "JambaForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.final_layernorm"),
        *block("attn_norm", "input_layernorm"),
        *state_space("mamba", _STATE),
        *block("ssm_dt_norm", "mamba.dt_layernorm", where=_STATE),
        *block("ssm_b_norm", "mamba.b_layernorm", where=_STATE),
        *block("ssm_c_norm", "mamba.c_layernorm", where=_STATE),
        *attention(where=attends),
        *block("ffn_norm", "pre_ff_layernorm"),
        *mlp("feed_forward", where=without(has_experts)),
        *block("ffn_gate_inp", "feed_forward.router", where=has_experts),
        *routed("feed_forward.experts", where=has_experts),
    ),
    fields=(CONTEXT, HIDDEN, FFN, HEADS, _Sizes(), RMS, experts("num_experts"), EXPERTS_USED),
    rotated=None,
    check=_check,
    back=_back,
)
