"""Qwen 1.5 and 2 with routed experts and a shared one."""

from quantize.formats.gguf.architectures.base import (
    DECODER,
    Architecture,
    attention,
    block,
    mlp,
    outer,
    routed,
)
from quantize.formats.gguf.architectures.operations import ROW
from quantize.formats.gguf.architectures.settings import EXPERT_FFN, EXPERTS_USED, Field, Settings, experts

#: The width of the expert that every token takes.
SHARED_FFN = Field("expert_shared_feed_forward_length", ("shared_expert_intermediate_size",))


def all_experts(settings: Settings) -> None:
    """Refuses blocks without experts among others with."""
    settings.require("decoder_sparse_step", 1)
    if settings.get("mlp_only_layers"):
        raise settings.refuse("config.json has 'mlp_only_layers'")


def _check(settings: Settings) -> None:
    all_experts(settings)
    settings.require("hidden_act", "silu")
    settings.require("norm_topk_prob", False)


QWEN2MOE = Architecture(
    "qwen2moe",
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *attention(True, biased_output=False),
        *block("ffn_norm", "post_attention_layernorm"),
        *block("ffn_gate_inp", "mlp.gate"),
        *routed("mlp.experts"),
        *block("ffn_gate_inp_shexp", "mlp.shared_expert_gate", ROW),
        *mlp("mlp.shared_expert", target="_shexp"),
    ),
    fields=(*DECODER, experts("num_experts"), EXPERTS_USED, EXPERT_FFN, SHARED_FFN),
    check=_check,
    back=lambda keys, shapes: {"norm_topk_prob": False},
    head_required=True,
)
