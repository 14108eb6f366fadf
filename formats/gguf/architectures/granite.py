"""Granite 3, the dense models: Llama with four scales."""

from quantize.formats.gguf.architectures.base import DECODER, Architecture, attention, block, mlp, outer
from quantize.formats.gguf.architectures.operations import KEY, QUERY
from quantize.formats.gguf.architectures.settings import Field
from quantize.formats.gguf.metadata import f32

GRANITE = Architecture(
    "granite",
    "granite",
    "GraniteForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *attention("attention_bias", {"q_proj": QUERY, "k_proj": KEY}),
        *block("ffn_norm", "post_attention_layernorm"),
        *mlp(biased="mlp_bias"),
    ),
    fields=(
        *DECODER,
        Field("attention.scale", ("attention_multiplier",), f32),
        Field("embedding_scale", ("embedding_multiplier",), f32),
        Field("residual_scale", ("residual_multiplier",), f32),
        Field("logit_scale", ("logits_scaling",), f32),
    ),
    check=lambda settings: settings.require("hidden_act", "silu"),
)
