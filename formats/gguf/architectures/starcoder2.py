"""StarCoder 2: norms, projections and a plain MLP with biases."""

from quantize.formats.gguf.architectures.base import Architecture, attention, bias, block, outer
from quantize.formats.gguf.architectures.settings import CONTEXT, FFN, HEADS, HIDDEN, KV_HEADS, Field, Settings
from quantize.formats.gguf.metadata import f32


def _check(settings: Settings) -> None:
    settings.require("use_bias", True)
    settings.require("hidden_act", "gelu_pytorch_tanh")


STARCODER2 = Architecture(
    "starcoder2",
    "starcoder2",
    "Starcoder2ForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        bias("output_norm", "model.norm"),
        *block("attn_norm", "input_layernorm", biased=True),
        *attention(True),
        *block("ffn_norm", "post_attention_layernorm", biased=True),
        *block("ffn_up", "mlp.c_fc", biased=True),
        *block("ffn_down", "mlp.c_proj", biased=True),
    ),
    fields=(
        CONTEXT,
        HIDDEN,
        FFN,
        HEADS,
        KV_HEADS,
        Field("attention.layer_norm_epsilon", ("norm_epsilon",), f32),
    ),
    check=_check,
    back=lambda keys, shapes: {"use_bias": True},
)
