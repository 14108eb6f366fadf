"""Qwen 2 and 2.5."""

from quantize.formats.gguf.architectures.base import DECODER, Architecture, attention, block, mlp, outer

QWEN2 = Architecture(
    "qwen2",
    "qwen2",
    "Qwen2ForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *attention(True, biased_output=False),
        *block("ffn_norm", "post_attention_layernorm"),
        *mlp(),
    ),
    fields=DECODER,
    classes=("Qwen2Model",),
    check=lambda settings: settings.require("hidden_act", "silu"),
)
