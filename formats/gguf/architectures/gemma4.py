"""Gemma 4, the language model: heads of two widths, keys and values shared by the last blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.formats.gguf.architectures.base import Architecture, Form, Rule, block, mlp, outer, weight
from quantize.formats.gguf.architectures.gemma2 import four_norms
from quantize.formats.gguf.architectures.operations import ONE
from quantize.formats.gguf.architectures.rope import FACTORS, read_rope
from quantize.formats.gguf.architectures.settings import (
    CONTEXT,
    EXPERTS_USED,
    HEADS,
    HIDDEN,
    RMS,
    Field,
    Keys,
    Settings,
    per_block,
)
from quantize.formats.gguf.metadata import Value, f32, flags, u32

# What llama.cpp divides the frequencies of dimensions by that do not turn.
_STILL = 1e30


def sliding(settings: Settings, block: int) -> bool:
    """In blocks that look through a window."""
    return settings.layer_types[block] == "sliding_attention"


def _first_shared(settings: Settings) -> int:
    return settings.layers - int(settings.get("num_kv_shared_layers", default=0))


def _own_keys(settings: Settings, block: int) -> bool:
    return block < _first_shared(settings)


def _own_values(settings: Settings, block: int) -> bool:
    """Full attention may take its keys for values."""
    return _own_keys(settings, block) and not (settings.get("attention_k_eq_v") and not sliding(settings, block))


def _fed(settings: Settings, block: int) -> bool:
    """Where blocks get an input of their own."""
    return bool(settings.get("hidden_size_per_layer_input"))


def _routed(settings: Settings, block: int) -> bool:
    return bool(settings.get("enable_moe_block"))


def _wide(settings: Settings, name: str, whole: str) -> int:
    """Returns a size of full attention, which newer configs say block by block."""
    said = settings.own.get(whole)
    if said is None:
        said = next(
            (
                found[name]
                for block, kind in enumerate(settings.layer_types)
                if kind == "full_attention"
                and isinstance(found := (settings.get("per_layer_config", default={}) or {}).get(str(block)), dict)
                and name in found
            ),
            None,
        )
    said = settings.get(whole) if said is None else said
    return int(settings.need(name) if said is None else said)


@dataclass(frozen=True, slots=True)
class _Shapes:
    """The widths and numbers that differ between blocks."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns them, per block where they differ."""
        size, wide = int(settings.need("head_dim")), _wide(settings, "head_dim", "global_head_dim")
        turned = [sliding(settings, block) for block in range(settings.layers)]
        narrow_heads = settings.kv_heads
        wide_heads = _wide(settings, "num_key_value_heads", "num_global_key_value_heads")
        wide_heads = wide_heads if settings.get("attention_k_eq_v") else narrow_heads
        ffn, shared = int(settings.need("intermediate_size")), _first_shared(settings)
        double = bool(settings.get("use_double_wide_mlp"))
        widths = [ffn * (2 if double and block >= shared else 1) for block in range(settings.layers)]
        found = {
            "attention.key_length": u32(wide),
            "attention.value_length": u32(wide),
            "attention.key_length_swa": u32(size),
            "attention.value_length_swa": u32(size),
            "attention.head_count_kv": per_block([narrow_heads if looks else wide_heads for looks in turned]),
            "feed_forward_length": per_block(widths),
            "attention.shared_kv_layers": u32(settings.layers - shared),
            "attention.sliding_window": u32(settings.need("sliding_window")),
            "attention.sliding_window_pattern": flags(turned),
            "embedding_length_per_layer_input": u32(settings.get("hidden_size_per_layer_input", default=0)),
            "rope.dimension_count_swa": u32(size),
        }
        if _routed(settings, 0):
            found["expert_count"] = u32(settings.experts)
            found["expert_feed_forward_length"] = u32(settings.need("moe_intermediate_size"))
        return found

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns them."""
        layers = keys.whole("block_count")
        turned = keys.list("attention.sliding_window_pattern", layers)
        heads, widths = keys.list("attention.head_count_kv", layers), keys.list("feed_forward_length", layers)
        narrow = [count for count, looks in zip(heads, turned, strict=True) if looks] or heads
        wide = [count for count, looks in zip(heads, turned, strict=True) if not looks] or heads
        found = {
            "head_dim": keys.whole("attention.key_length_swa"),
            "global_head_dim": keys.whole("attention.key_length"),
            "num_key_value_heads": narrow[0],
            "num_global_key_value_heads": wide[0] if wide[0] != narrow[0] else None,
            "intermediate_size": widths[0],
            "use_double_wide_mlp": widths[-1] != widths[0],
            "num_kv_shared_layers": keys.whole("attention.shared_kv_layers", 0),
            "sliding_window": keys.whole("attention.sliding_window"),
            "layer_types": ["sliding_attention" if looks else "full_attention" for looks in turned],
            "hidden_size_per_layer_input": keys.whole("embedding_length_per_layer_input", 0),
            "hidden_activation": "gelu_pytorch_tanh",
        }
        if keys.raw("expert_count"):
            found |= {"enable_moe_block": True, "num_experts": keys.whole("expert_count")}
            found |= {"moe_intermediate_size": keys.whole("expert_feed_forward_length")}
        return found


def _tensors(settings: Settings) -> dict[str, Tensor]:
    """Returns the divisors of full attention's frequencies: the first ones turn, the rest stand still."""
    rope, wide = read_rope(settings), _wide(settings, "head_dim", "global_head_dim")
    turning = int(wide * (0.25 if rope.partial is None else rope.partial) / 2)
    values = torch.full((wide // 2,), _STILL)
    values[:turning] = 1
    return {FACTORS: values}


def _rope(settings: Settings, rope: Any) -> dict[str, Value]:
    if rope.kind not in ("proportional", "default"):
        raise settings.refuse(f"config.json scales rotary positions by '{rope.kind}'")
    local = {} if rope.sliding_theta is None else {"rope.freq_base_swa": f32(rope.sliding_theta)}
    return {"rope.freq_base": f32(rope.theta), **local}


def _parse_rope(keys: Keys, rotated: int, context: int, tensors: Any) -> dict[str, Any]:
    values = tensors.get(FACTORS, [1.0])
    full = {"rope_type": "proportional", "rope_theta": keys.number("rope.freq_base")}
    full["partial_rotary_factor"] = sum(value == 1 for value in values) / len(values)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def _back(keys: Keys, shapes: Any) -> dict[str, Any]:
    layers, shared = keys.whole("block_count"), keys.whole("attention.shared_kv_layers", 0)
    lent = any(f"blk.{n}.attn_v.weight" not in shapes for n in range(layers - shared))
    table = shapes.get("per_layer_token_embd.weight")
    return {"attention_k_eq_v": lent} | ({"vocab_size_per_layer_input": table[0]} if table else {})


def _check(settings: Settings) -> None:
    settings.require("hidden_activation", "gelu_pytorch_tanh")
    settings.require("attention_bias", False)
    settings.require("use_bidirectional_attention", False, "vision")


def _table(target: str, source: str) -> Rule:
    return weight(target, source, where=_fed)


def _plain(target: str, source: str) -> Rule:
    """Returns the rule of a tensor of experts, whose names lack the word weight."""
    return Rule((f"blk.{{n}}.{target}",), (Form((f".{source}",)),), _routed)


GEMMA4 = Architecture(
    "gemma4",
    "gemma4_text",
    "Gemma4ForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        _table("per_layer_token_embd", "model.embed_tokens_per_layer"),
        _table("per_layer_model_proj", "model.per_layer_model_projection"),
        _table("per_layer_proj_norm", "model.per_layer_projection_norm"),
        *four_norms(),
        *block("attn_q", "self_attn.q_proj"),
        *block("attn_k", "self_attn.k_proj", where=_own_keys),
        *block("attn_v", "self_attn.v_proj", where=_own_values),
        *block("attn_output", "self_attn.o_proj"),
        *block("attn_q_norm", "self_attn.q_norm"),
        *block("attn_k_norm", "self_attn.k_norm", where=_own_keys),
        Rule(("blk.{n}.layer_output_scale.weight",), (Form((".layer_scalar",), ONE),)),
        *mlp(),
        *block("inp_gate", "per_layer_input_gate", where=_fed),
        *block("proj", "per_layer_projection", where=_fed),
        *block("post_norm", "post_per_layer_input_norm", where=_fed),
        *block("ffn_gate_inp", "router.proj", where=_routed),
        _plain("ffn_gate_inp.scale", "router.scale"),
        _plain("ffn_gate_up_exps.weight", "experts.gate_up_proj"),
        _plain("ffn_down_exps.weight", "experts.down_proj"),
        _plain("ffn_down_exps.scale", "router.per_expert_scale"),
        *block("pre_ffw_norm_2", "pre_feedforward_layernorm_2", where=_routed),
        *block("post_ffw_norm_1", "post_feedforward_layernorm_1", where=_routed),
        *block("post_ffw_norm_2", "post_feedforward_layernorm_2", where=_routed),
    ),
    fields=(
        CONTEXT,
        HIDDEN,
        HEADS,
        RMS,
        _Shapes(),
        Field("final_logit_softcapping", ("final_logit_softcapping",), f32, optional=True),
        Field("expert_used_count", ("top_k_experts", *EXPERTS_USED.names), optional=True),
    ),
    classes=("Gemma4ForConditionalGeneration",),
    rotated=lambda settings, rope: _wide(settings, "head_dim", "global_head_dim"),
    rope=_rope,
    parse_rope=_parse_rope,
    tensors=_tensors,
    drops={r"\.self_attn\.[kv]_(proj|norm)\.": "the block takes the keys and values of an earlier one"},
    back=_back,
    check=_check,
)
