"""GPT-2: learned positions, matrices on their side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantize.formats.gguf.architectures.base import Architecture, Rule, bias, block, outer, weight
from quantize.formats.gguf.architectures.operations import TRANSPOSE
from quantize.formats.gguf.architectures.settings import Field, Keys, Settings
from quantize.formats.gguf.metadata import Value, f32, u32


def _conv(target: str, source: str) -> tuple[Rule, ...]:
    target, source = f"blk.{{n}}.{target}", f".{source}"
    return weight(target, source, TRANSPOSE), bias(target, source)


@dataclass(frozen=True, slots=True)
class _Width:
    """The width of the MLP, four times the hidden state's where nothing is said."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns the width."""
        return {"feed_forward_length": u32(settings.get("n_inner", default=4 * settings.hidden))}

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns the width."""
        return {"n_inner": keys.whole("feed_forward_length")}


def _check(settings: Settings) -> None:
    settings.require("activation_function", "gelu_new", "gelu_pytorch_tanh")
    settings.require("scale_attn_by_inverse_layer_idx", False)


GPT2 = Architecture(
    "gpt2",
    "gpt2",
    "GPT2LMHeadModel",
    rules=(
        *outer("transformer.wte", "transformer.ln_f"),
        bias("output_norm", "transformer.ln_f"),
        weight("position_embd", "transformer.wpe"),
        *block("attn_norm", "ln_1", biased=True),
        *_conv("attn_qkv", "attn.c_attn"),
        *_conv("attn_output", "attn.c_proj"),
        *block("ffn_norm", "ln_2", biased=True),
        *_conv("ffn_up", "mlp.c_fc"),
        *_conv("ffn_down", "mlp.c_proj"),
    ),
    fields=(
        Field("context_length", ("n_positions", "n_ctx", "max_position_embeddings")),
        Field("embedding_length", ("n_embd", "hidden_size")),
        _Width(),
        Field("attention.head_count", ("n_head", "num_attention_heads")),
        Field("attention.layer_norm_epsilon", ("layer_norm_epsilon",), f32),
    ),
    layer="transformer.h.{n}",
    classes=("GPT2Model",),
    prefix="transformer.",
    rotated=None,
    check=_check,
    back=lambda keys, shapes: {"n_layer": keys.whole("block_count")},
    drops={r"\.attn\.bias$": "a buffer that engines compute"},
)
