"""Gemma, the first."""

from quantize.formats.gguf.architectures.base import DECODER, Architecture, attention, block, mlp, outer
from quantize.formats.gguf.architectures.operations import PLUS_ONE
from quantize.formats.gguf.architectures.settings import Settings


def _check(settings: Settings) -> None:
    settings.require("use_bidirectional_attention", False)
    if settings.get("hidden_activation", "hidden_act") not in ("gelu_pytorch_tanh", "gelu", None):
        raise settings.refuse("config.json names another activation than gelu_pytorch_tanh")


GEMMA = Architecture(
    "gemma",
    "gemma",
    "GemmaForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm", operation=PLUS_ONE),
        *block("attn_norm", "input_layernorm", PLUS_ONE),
        *attention(),
        *block("ffn_norm", "post_attention_layernorm", PLUS_ONE),
        *mlp(),
    ),
    fields=DECODER,
    check=_check,
    back=lambda keys, shapes: {"hidden_act": "gelu_pytorch_tanh"},
    head_tied=True,
)
