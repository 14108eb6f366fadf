"""GLM 4.5 and 4.6 with experts; the blocks that predict further tokens follow the others."""

from __future__ import annotations

from quantize.formats.gguf.architectures.base import (
    DECODER,
    Architecture,
    Form,
    Rule,
    attention,
    block,
    extra,
    mlp,
    outer,
    routed,
    without,
)
from quantize.formats.gguf.architectures.deepseek2 import GROUPS, dense
from quantize.formats.gguf.architectures.settings import EXPERT_FFN, EXPERTS_USED, experts
from quantize.formats.gguf.metadata import u32

_SIGMOID = 2


def _norm(name: str) -> Rule:
    source = Form((f".self_attn.{name}_norm.weight",))
    return Rule((f"blk.{{n}}.attn_{name}_norm.weight",), (source,), group="use_qk_norm")


def _further(target: str, source: str, group: str = "") -> Rule:
    return Rule((f"blk.{{n}}.nextn.{target}.weight",), (Form((f".{source}.weight",)),), extra, group)


GLM4MOE = Architecture(
    "glm4moe",
    "glm4_moe",
    "Glm4MoeForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *attention("attention_bias", biased_output=False),
        _norm("q"),
        _norm("k"),
        *block("post_attention_norm", "post_attention_layernorm"),
        *mlp(where=dense),
        *block("ffn_gate_inp", "mlp.gate", where=without(dense)),
        Rule(("blk.{n}.exp_probs_b.bias",), (Form((".mlp.gate.e_score_correction_bias",)),), without(dense)),
        *routed("mlp.experts", where=without(dense)),
        *mlp("mlp.shared_experts", where=without(dense), target="_shexp"),
        _further("eh_proj", "eh_proj"),
        _further("enorm", "enorm"),
        _further("hnorm", "hnorm"),
        _further("embed_tokens", "embed_tokens", "the further embedding"),
        _further("shared_head_head", "shared_head.head", "the further head"),
        _further("shared_head_norm", "shared_head.norm", "the further norm"),
    ),
    fields=(*DECODER, experts("n_routed_experts"), EXPERTS_USED, EXPERT_FFN, *GROUPS),
    extra_layer="model.layers.{n}",
    rotated=lambda settings, rope: int(settings.head_dim * (0.5 if rope.partial is None else rope.partial)),
    more=lambda settings: {"expert_gating_func": u32(_SIGMOID)},
    back=lambda keys, shapes: {"num_nextn_predict_layers": keys.whole("nextn_predict_layers", 0)},
    check=lambda settings: settings.require("hidden_act", "silu"),
)
