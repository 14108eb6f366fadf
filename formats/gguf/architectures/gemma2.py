"""Gemma 2."""

from __future__ import annotations

from typing import Any

from quantize.formats.gguf.architectures.base import (
    DECODER,
    Architecture,
    Rule,
    attention,
    block,
    mlp,
    outer,
)
from quantize.formats.gguf.architectures.operations import PLUS_ONE, SAME, Operation
from quantize.formats.gguf.architectures.settings import Field, Keys, Settings, Window
from quantize.formats.gguf.metadata import f32


def four_norms(operation: Operation = SAME) -> tuple[Rule, ...]:
    """Returns the rules of the norms before and after attention and MLP."""
    return (
        *block("attn_norm", "input_layernorm", operation),
        *block("post_attention_norm", "post_attention_layernorm", operation),
        *block("ffn_norm", "pre_feedforward_layernorm", operation),
        *block("post_ffw_norm", "post_feedforward_layernorm", operation),
    )


def check_scale(settings: Settings, largest: int) -> None:
    """Refuses a scale of attention that llama.cpp does not derive from the shape.

    Args:
        settings: The model's settings.
        largest: The number of blocks of the largest model, which scales by the hidden state's share of a head.
    """
    expected = settings.hidden // settings.heads if settings.layers == largest else settings.head_dim
    settings.require("query_pre_attn_scalar", expected)
    if settings.get("hidden_activation", "hidden_act") not in ("gelu_pytorch_tanh", "gelu"):
        raise settings.refuse("config.json names another activation than gelu_pytorch_tanh")


def scale(largest: int, layers: int, size: int, share: int) -> dict[str, Any]:
    """Returns the config of the scale that llama.cpp derives."""
    return {"query_pre_attn_scalar": share if layers == largest else size, "hidden_activation": "gelu_pytorch_tanh"}


def scale_back(largest: int) -> Any:
    """Returns what gives the config of the scale, from a file's metadata."""

    def back(keys: Keys, shapes: Any) -> dict[str, Any]:
        share = keys.whole("embedding_length") // max(keys.whole("attention.head_count"), 1)
        return scale(largest, keys.whole("block_count"), keys.whole("attention.key_length", share), share)

    return back


GEMMA2 = Architecture(
    "gemma2",
    "gemma2",
    "Gemma2ForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm", operation=PLUS_ONE),
        *four_norms(PLUS_ONE),
        *attention(),
        *mlp(),
    ),
    fields=(
        *DECODER,
        Field("attn_logit_softcapping", ("attn_logit_softcapping",), f32, optional=True),
        Field("final_logit_softcapping", ("final_logit_softcapping",), f32, optional=True),
        Window(2),
    ),
    check=lambda settings: check_scale(settings, 46),
    back=scale_back(46),
    head_tied=True,
)
