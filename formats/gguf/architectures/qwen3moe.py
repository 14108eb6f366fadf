"""Qwen 3 with routed experts."""

from quantize.formats.gguf.architectures.base import DECODER, Architecture, attention, block, head_norms, outer, routed
from quantize.formats.gguf.architectures.qwen2moe import all_experts
from quantize.formats.gguf.architectures.settings import EXPERT_FFN, EXPERTS_USED, Settings, experts


def _check(settings: Settings) -> None:
    all_experts(settings)
    settings.require("hidden_act", "silu")
    settings.require("norm_topk_prob", True)


QWEN3MOE = Architecture(
    "qwen3moe",
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *attention("attention_bias"),
        *head_norms(),
        *block("ffn_norm", "post_attention_layernorm"),
        *block("ffn_gate_inp", "mlp.gate"),
        *routed("mlp.experts"),
    ),
    fields=(*DECODER, experts("num_experts"), EXPERTS_USED, EXPERT_FFN),
    check=_check,
    back=lambda keys, shapes: {"norm_topk_prob": True},
)
