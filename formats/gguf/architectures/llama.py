"""Llama, Mistral, and what is built like them."""

from quantize.formats.gguf.architectures.base import DECODER, Architecture, attention, block, mlp, outer
from quantize.formats.gguf.architectures.operations import KEY, QUERY

LLAMA = Architecture(
    "llama",
    "llama",
    "LlamaForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *attention("attention_bias", {"q_proj": QUERY, "k_proj": KEY}),
        *block("ffn_norm", "post_attention_layernorm"),
        *mlp(biased="mlp_bias"),
    ),
    fields=DECODER,
    classes=("LLaMAForCausalLM", "LlamaModel", "MistralForCausalLM", "MistralModel"),
    model_types=("mistral",),
    check=lambda settings: settings.require("hidden_act", "silu"),
    claims=lambda keys: not keys.whole("expert_count", 0),
)
