"""Qwen 3.5, dense and with experts: three blocks of gated linear attention to one of attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantize.formats.gguf.architectures.base import (
    Architecture,
    Form,
    Rule,
    attention,
    block,
    head_norms,
    mlp,
    outer,
    routed,
    without,
)
from quantize.formats.gguf.architectures.operations import (
    MINUS_EXP,
    PLUS_ONE,
    ROW,
    SAME,
    SQUEEZE,
    Operation,
    chain,
    columns,
    rows,
)
from quantize.formats.gguf.architectures.qwen2moe import SHARED_FFN
from quantize.formats.gguf.architectures.rope import read_rope
from quantize.formats.gguf.architectures.settings import (
    CONTEXT,
    EXPERT_FFN,
    EXPERTS_USED,
    FFN,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    KV_HEADS,
    RMS,
    Keys,
    Settings,
    experts,
)
from quantize.formats.gguf.metadata import Value, flags, integers, u32


def linear(settings: Settings, block: int) -> bool:
    """In blocks of linear attention."""
    return block < settings.layers and settings.layer_types[block] == "linear_attention"


def by_turns(settings: Settings, count: int, width: int = 0) -> Tensor:
    """Returns the order in which llama.cpp repeats keys over values: the first value head of each key head first.

    Args:
        settings: The model's settings.
        count: Rows, all of value heads.
        width: Rows in front of them, which stay.
    """
    keys, values = int(settings.need("linear_num_key_heads")), int(settings.need("linear_num_value_heads"))
    heads = torch.arange(width, count).reshape(keys, values // keys, -1)
    return torch.cat([torch.arange(width), heads.transpose(0, 1).flatten()])


def _behind_keys(settings: Settings, count: int) -> Tensor:
    """Returns the order of rows of queries, keys and values."""
    keys = int(settings.need("linear_num_key_heads")) * int(settings.need("linear_key_head_dim"))
    return by_turns(settings, count, 2 * keys)


@dataclass(frozen=True, slots=True)
class Recurrent:
    """The shape of linear attention, and which blocks have it."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns the shape and a list of the blocks."""
        values, width = int(settings.need("linear_num_value_heads")), int(settings.need("linear_value_head_dim"))
        if width != settings.need("linear_key_head_dim"):
            raise settings.refuse("config.json gives keys and values of linear attention different widths")
        found = {
            "ssm.conv_kernel": settings.need("linear_conv_kernel_dim"),
            "ssm.state_size": settings.need("linear_key_head_dim"),
            "ssm.group_count": settings.need("linear_num_key_heads"),
            "ssm.time_step_rank": values,
            "ssm.inner_size": values * width,
            "full_attention_interval": settings.get("full_attention_interval", default=4),
        }
        listed = [linear(settings, block) for block in range(settings.blocks)]
        return {key: u32(value) for key, value in found.items()} | {"attention.recurrent_layers": flags(listed)}

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns the shape and what each block is."""
        layers = keys.whole("block_count") - keys.whole("nextn_predict_layers", 0)
        every = keys.whole("full_attention_interval", 4)
        if keys.raw("attention.recurrent_layers") is None:
            listed = [(block + 1) % every != 0 for block in range(layers)]
        else:
            listed = keys.list("attention.recurrent_layers", keys.whole("block_count"))[:layers]
        values = keys.whole("ssm.time_step_rank")
        return {
            "layer_types": ["linear_attention" if recurs else "full_attention" for recurs in listed],
            "linear_conv_kernel_dim": keys.whole("ssm.conv_kernel"),
            "linear_key_head_dim": keys.whole("ssm.state_size"),
            "linear_num_key_heads": keys.whole("ssm.group_count"),
            "linear_num_value_heads": values,
            "linear_value_head_dim": keys.whole("ssm.inner_size") // max(values, 1),
        }


def _one(target: str, source: str, operation: Operation = SAME) -> Rule:
    return Rule((f"blk.{{n}}.{target}",), (Form((f".linear_attn.{source}",), operation),), linear)


#: What linear attention keeps beside its projections, heads in the checkpoint's order.
def recurrent_pieces(order: Operation, kernel: Operation) -> tuple[Rule, ...]:
    """Returns the rules of what linear attention has beside its projections.

    Args:
        order: The order of value heads.
        kernel: The order of the convolution's channels.
    """
    return (
        _one("ssm_conv1d.weight", "conv1d.weight", chain(SQUEEZE, kernel)),
        _one("ssm_dt.bias", "dt_bias", order),
        _one("ssm_a", "A_log", chain(order, MINUS_EXP)),
        _one("ssm_norm.weight", "norm.weight"),
    )


def _first_extra(settings: Settings, block: int) -> bool:
    return block == settings.layers


def further_token(operation: Operation = SAME) -> tuple[Rule, ...]:
    """Returns the rules of what joins a block to the model that predicts a further token."""

    def rule(target: str, source: str, made: Operation) -> Rule:
        return Rule((f"blk.{{n}}.nextn.{target}.weight",), (Form((f"mtp.{source}.weight",), made),), _first_extra)

    return (
        rule("eh_proj", "fc", SAME),
        rule("enorm", "pre_fc_norm_embedding", operation),
        rule("hnorm", "pre_fc_norm_hidden", operation),
        rule("shared_head_norm", "norm", operation),
    )


def rotated(settings: Settings, rope: Any) -> int:
    """Returns the part of a head that turns: a quarter where nothing is said."""
    return int(settings.head_dim * (0.25 if rope.partial is None else rope.partial))


def _more(settings: Settings) -> dict[str, Value]:
    # Positions of text are the same in every section; those of an image are not.
    said = read_rope(settings).parameters.get("mrope_section") or [11, 11, 10]
    return {"rope.dimension_sections": integers([*said, 0, 0, 0, 0][:4])}


def _check(settings: Settings) -> None:
    settings.require("hidden_act", "silu")
    settings.require("attention_bias", False)
    settings.require("attn_output_gate", True)


_HEADS = rows(by_turns)
_TRUNK = (
    *outer("model.embed_tokens", "model.norm", operation=PLUS_ONE),
    *block("attn_norm", "input_layernorm", PLUS_ONE),
    *block("post_attention_norm", "post_attention_layernorm", PLUS_ONE),
    *attention(where=without(linear)),
    *head_norms(PLUS_ONE, without(linear)),
    *block("attn_qkv", "linear_attn.in_proj_qkv", rows(_behind_keys), linear),
    *block("attn_gate", "linear_attn.in_proj_z", _HEADS, linear),
    *block("ssm_beta", "linear_attn.in_proj_b", _HEADS, linear),
    *block("ssm_alpha", "linear_attn.in_proj_a", _HEADS, linear),
    *recurrent_pieces(_HEADS, rows(_behind_keys)),
    *block("ssm_out", "linear_attn.out_proj", columns(by_turns), linear),
    *further_token(PLUS_ONE),
)
#: The settings that the family shares.
FIELDS = (CONTEXT, HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, RMS, Recurrent())

QWEN35 = Architecture(
    "qwen35",
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    rules=(*_TRUNK, *mlp()),
    fields=(*FIELDS, FFN),
    extra_layer="mtp.layers.{m}",
    classes=("Qwen3_5ForConditionalGeneration",),
    rotated=rotated,
    more=_more,
    check=_check,
)
#: Routed experts and a shared one.
EXPERTS = (
    *block("ffn_gate_inp", "mlp.gate"),
    *routed("mlp.experts"),
    *block("ffn_gate_inp_shexp", "mlp.shared_expert_gate", ROW),
    *mlp("mlp.shared_expert", target="_shexp"),
)
EXPERT_FIELDS = (experts("num_experts"), EXPERTS_USED, EXPERT_FFN, SHARED_FFN)
QWEN35MOE = replace(
    QWEN35,
    name="qwen35moe",
    model_type="qwen3_5_moe_text",
    model_class="Qwen3_5MoeForCausalLM",
    rules=(*_TRUNK, *EXPERTS),
    fields=(*FIELDS, replace(FFN, optional=True), *EXPERT_FIELDS),
    classes=("Qwen3_5MoeForConditionalGeneration",),
)
