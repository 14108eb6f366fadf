"""DeepSeek V2 and V3: keys and values from one narrow matrix, which llama.cpp wants in two parts per head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantize.formats.base import OUTPUT, Observed
from quantize.formats.gguf.architectures.base import (
    Architecture,
    Form,
    Rule,
    block,
    mlp,
    outer,
    routed,
    without,
)
from quantize.formats.gguf.architectures.lazy import Lazy, Reshaped, Rows, Transposed
from quantize.formats.gguf.architectures.operations import Operation
from quantize.formats.gguf.architectures.rope import Rope, parse_rope, write_rope
from quantize.formats.gguf.architectures.settings import (
    CONTEXT,
    EXPERT_FFN,
    EXPERTS_USED,
    FFN,
    HEADS,
    HIDDEN,
    RMS,
    Field,
    Keys,
    Settings,
    experts,
)
from quantize.formats.gguf.metadata import Value, f32, flag, u32

_LOG = "rope.scaling.yarn_log_multiplier"


def dense(settings: Settings, block: int) -> bool:
    """In the blocks before the first with experts."""
    return block < int(settings.get("first_k_dense_replace", default=0))


def _lowered(settings: Settings, block: int) -> bool:
    return settings.own.get("q_lora_rank", settings.filled.get("q_lora_rank")) is not None


def _parts(settings: Settings, count: int) -> tuple[Tensor, Tensor]:
    """Returns the rows of keys and those of values: each head has its keys' first."""
    key, value = int(settings.need("qk_nope_head_dim")), int(settings.need("v_head_dim"))
    if count != settings.heads * (key + value):
        raise ValueError(f"it has {count} rows, not {settings.heads} heads of {key + value}")
    by_head = torch.arange(count).reshape(settings.heads, key + value)
    return by_head[:, :key].flatten(), by_head[:, key:].flatten()


def _split(settings: Settings, tensors: Sequence[Lazy]) -> Sequence[Lazy]:
    (both,) = tensors
    rank = both.shape[-1]
    keys, values = (Rows((both,), index) for index in _parts(settings, both.shape[0]))
    keys_by_head = Reshaped(keys, (settings.heads, keys.shape[0] // settings.heads, rank))
    return [Transposed(keys_by_head), Reshaped(values, (settings.heads, values.shape[0] // settings.heads, rank))]


def _join(settings: Settings, tensors: Sequence[Lazy]) -> Sequence[Lazy]:
    keys, values = Transposed(tensors[0]), tensors[1]
    flat = tuple(Reshaped(tensor, (tensor.shape[0] * tensor.shape[1], tensor.shape[2])) for tensor in (keys, values))
    order = torch.cat(_parts(settings, sum(tensor.shape[0] for tensor in flat)))
    index = torch.empty_like(order)
    index[order] = torch.arange(len(order))
    return [Rows(flat, index)]


@dataclass(frozen=True, slots=True)
class _Latent:
    """The widths of latent attention. llama.cpp counts it as one head of the latent width."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns the widths, latent and of the heads made of it."""
        rank, turned = int(settings.need("kv_lora_rank")), int(settings.need("qk_rope_head_dim"))
        found = {"attention.kv_lora_rank": rank, "attention.head_count_kv": 1}
        if _lowered(settings, 0):
            found["attention.q_lora_rank"] = int(settings.need("q_lora_rank"))
        found |= {"attention.key_length": rank + turned, "attention.value_length": rank}
        found["attention.key_length_mla"] = int(settings.need("qk_nope_head_dim")) + turned
        found["attention.value_length_mla"] = int(settings.need("v_head_dim"))
        return {key: u32(value) for key, value in found.items()}

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns the widths."""
        turned = keys.whole("rope.dimension_count")
        return {
            "kv_lora_rank": keys.whole("attention.kv_lora_rank"),
            "q_lora_rank": keys.whole("attention.q_lora_rank", 0) or None,
            "qk_rope_head_dim": turned,
            "qk_nope_head_dim": keys.whole("attention.key_length_mla") - turned,
            "v_head_dim": keys.whole("attention.value_length_mla"),
            "num_key_value_heads": keys.whole(HEADS.key),
            "head_dim": turned,
        }


def _rope(settings: Settings, rope: Rope) -> dict[str, Value]:
    """llama.cpp takes yarn's factors of attention from one key here, which stands for both of the config's."""
    both = {name: rope.parameters.get(name) for name in ("mscale", "mscale_all_dim")}
    rest = {key: value for key, value in rope.parameters.items() if key not in both}
    found = write_rope(settings, replace(rope, parameters=rest))
    if rope.kind == "yarn" and both["mscale_all_dim"]:
        if both["mscale"] not in (None, both["mscale_all_dim"]) and both["mscale_all_dim"] != 1:
            raise settings.refuse("config.json has a 'mscale' that is not its 'mscale_all_dim'")
        found[_LOG] = f32(0.1 * both["mscale_all_dim"])
    return found


def _parse_rope(keys: Keys, rotated: int, context: int, tensors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    metadata = {key: value for key, value in keys.metadata.items() if key != f"{keys.prefix}.{_LOG}"}
    found = parse_rope(replace(keys, metadata=metadata), rotated, context, tensors)
    if keys.raw(_LOG) is not None:
        whole = round(keys.number(_LOG) / 0.1, 6)
        for key in ("rope_parameters", "rope_scaling"):
            found[key] |= {"mscale": whole, "mscale_all_dim": whole}
    return found


def _fed(settings: Settings, name: str) -> Observed | None:
    """llama.cpp multiplies the first channels of each head of the query by the keys' matrix on its side."""
    if not name.endswith(".attn_k_b.weight"):
        return None
    key, turned = int(settings.need("qk_nope_head_dim")), int(settings.need("qk_rope_head_dim"))
    channels = torch.arange(settings.heads * (key + turned)).reshape(settings.heads, key + turned)
    source = "q_b_proj" if _lowered(settings, 0) else "q_proj"
    return Observed((f".self_attn.{source}.weight",), OUTPUT, channels[:, :key])


def _check(settings: Settings) -> None:
    settings.require("hidden_act", "silu")
    settings.require("moe_layer_freq", 1)
    settings.require("attention_bias", False)


#: What models with experts chosen by groups say of the choice.
GROUPS = (
    Field("expert_group_count", ("n_group",), optional=True),
    Field("expert_group_used_count", ("topk_group",), optional=True),
    Field("expert_shared_count", ("n_shared_experts",), default=0),
    Field("expert_weights_scale", ("routed_scaling_factor",), f32, default=1.0, optional=True),
    Field("expert_weights_norm", ("norm_topk_prob",), flag, default=0, optional=True),
    Field("leading_dense_block_count", ("first_k_dense_replace",), default=0, optional=True),
)
_SHARED = (
    *outer("model.embed_tokens", "model.norm"),
    *block("attn_norm", "input_layernorm"),
    *block("attn_q", "self_attn.q_proj", where=without(_lowered)),
    *block("attn_q_a", "self_attn.q_a_proj", where=_lowered),
    *block("attn_q_a_norm", "self_attn.q_a_layernorm", where=_lowered),
    *block("attn_q_b", "self_attn.q_b_proj", where=_lowered),
    *block("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    *block("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    Rule(
        ("blk.{n}.attn_k_b.weight", "blk.{n}.attn_v_b.weight"),
        (Form((".self_attn.kv_b_proj.weight",), Operation(_split, _join)),),
    ),
    *block("attn_output", "self_attn.o_proj"),
    *block("ffn_norm", "post_attention_layernorm"),
    *mlp(where=dense),
    *block("ffn_gate_inp", "mlp.gate", where=without(dense)),
    *routed("mlp.experts", where=without(dense)),
    *mlp("mlp.shared_experts", where=without(dense), target="_shexp"),
)
_FIELDS = (CONTEXT, HIDDEN, FFN, HEADS, RMS, _Latent(), experts("n_routed_experts"), EXPERTS_USED, EXPERT_FFN, *GROUPS)
_SOFTMAX, _SIGMOID = 1, 2

DEEPSEEK2 = Architecture(
    "deepseek2",
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    rules=_SHARED,
    fields=_FIELDS,
    rotated=lambda settings, rope: int(settings.need("qk_rope_head_dim")),
    rope=_rope,
    parse_rope=_parse_rope,
    more=lambda settings: {"expert_gating_func": u32(_SOFTMAX)},
    back=lambda keys, shapes: {"topk_method": "greedy"},
    check=_check,
    claims=lambda keys: keys.whole("expert_gating_func", _SOFTMAX) == _SOFTMAX,
    fed=_fed,
)
DEEPSEEK3 = replace(
    DEEPSEEK2,
    model_type="deepseek_v3",
    model_class="DeepseekV3ForCausalLM",
    rules=(
        *_SHARED,
        Rule(("blk.{n}.exp_probs_b.bias",), (Form((".mlp.gate.e_score_correction_bias",)),), without(dense)),
    ),
    more=lambda settings: {"expert_gating_func": u32(_SIGMOID)},
    back=lambda keys, shapes: {},
    claims=lambda keys: keys.whole("expert_gating_func", _SOFTMAX) == _SIGMOID,
)
