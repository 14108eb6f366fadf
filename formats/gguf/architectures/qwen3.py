"""Qwen 3."""

from quantize.formats.gguf.architectures.base import DECODER, Architecture, attention, block, head_norms, mlp, outer

QWEN3 = Architecture(
    "qwen3",
    "qwen3",
    "Qwen3ForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *attention("attention_bias"),
        *head_norms(),
        *block("ffn_norm", "post_attention_layernorm"),
        *mlp(),
    ),
    fields=DECODER,
    classes=("Qwen3Model",),
    check=lambda settings: settings.require("hidden_act", "silu"),
)
