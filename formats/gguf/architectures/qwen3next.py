"""Qwen 3 Next: Qwen 3.5's forerunner, its projections of linear attention in one matrix."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantize.formats.gguf.architectures.base import (
    Architecture,
    Form,
    Rule,
    attention,
    block,
    head_norms,
    outer,
    without,
)
from quantize.formats.gguf.architectures.operations import PLUS_ONE, SAME, split_rows
from quantize.formats.gguf.architectures.qwen2moe import all_experts
from quantize.formats.gguf.architectures.qwen35 import (
    EXPERT_FIELDS,
    EXPERTS,
    FIELDS,
    QWEN35,
    further_token,
    linear,
    recurrent_pieces,
)
from quantize.formats.gguf.architectures.settings import FFN, Settings


def _apart(settings: Settings, count: int) -> tuple[Tensor, Tensor]:
    """Returns the rows of query, key and value, and those of the gate; each key head has its part of all four."""
    heads, key = int(settings.need("linear_num_key_heads")), int(settings.need("linear_key_head_dim"))
    value = int(settings.need("linear_num_value_heads")) // heads * int(settings.need("linear_value_head_dim"))
    if count != heads * 2 * (key + value):
        raise ValueError(f"it has {count} rows, not {heads} heads of {2 * (key + value)}")
    by_head = torch.arange(count).reshape(heads, -1)
    q, k, v, z = torch.tensor_split(by_head, [key, 2 * key, 2 * key + value], dim=1)
    return torch.cat([q.flatten(), k.flatten(), v.flatten()]), z.flatten()


def _check(settings: Settings) -> None:
    all_experts(settings)
    settings.require("hidden_act", "silu")
    settings.require("norm_topk_prob", True)


QWEN3NEXT: Architecture = replace(
    QWEN35,
    name="qwen3next",
    model_type="qwen3_next",
    model_class="Qwen3NextForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm", operation=PLUS_ONE),
        *block("attn_norm", "input_layernorm", PLUS_ONE),
        *block("post_attention_norm", "post_attention_layernorm", PLUS_ONE),
        *attention(where=without(linear)),
        *head_norms(PLUS_ONE, without(linear)),
        Rule(
            ("blk.{n}.attn_qkv.weight", "blk.{n}.attn_gate.weight"),
            (Form((".linear_attn.in_proj_qkvz.weight",), split_rows(_apart)),),
            linear,
        ),
        *block("ssm_ba", "linear_attn.in_proj_ba", where=linear),
        *recurrent_pieces(SAME, SAME),
        *block("ssm_out", "linear_attn.out_proj", where=linear),
        *further_token(PLUS_ONE),
        *EXPERTS,
    ),
    fields=(*FIELDS, FFN, *EXPERT_FIELDS),
    classes=(),
    more=lambda settings: {},
    check=_check,
    back=lambda keys, shapes: {"norm_topk_prob": True},
)
