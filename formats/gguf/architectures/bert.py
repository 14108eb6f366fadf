"""BERT, for embeddings of texts."""

from __future__ import annotations

from typing import Any

from quantize.formats.gguf.architectures.base import Architecture, Form, Rule, block, weight
from quantize.formats.gguf.architectures.settings import CONTEXT, FFN, HEADS, HIDDEN, LAYER_NORM, Keys, Settings
from quantize.formats.gguf.metadata import Value, flag, u32

_TYPES = "tokenizer.ggml.token_type_count"


def _more(settings: Settings) -> dict[str, Value]:
    return {"attention.causal": flag(False), _TYPES: u32(settings.get("type_vocab_size", default=1))}


def _back(keys: Keys, shapes: Any) -> dict[str, Any]:
    types = shapes.get("token_types.weight", (keys.metadata.get(_TYPES, 1),))
    return {"type_vocab_size": types[0], "hidden_act": "gelu"}


def _check(settings: Settings) -> None:
    settings.require("hidden_act", "gelu")
    settings.require("position_embedding_type", "absolute")
    settings.require("is_decoder", False)


def _norm(target: str, source: str, per_block: bool = True) -> tuple[Rule, ...]:
    """Returns the rules of a norm, whose parts old checkpoints call gamma and beta."""
    target, source = (f"blk.{{n}}.{target}", f".{source}") if per_block else (target, source)
    return tuple(
        Rule((f"{target}.{leaf}",), (Form((f"{source}.{leaf}",)), Form((f"{source}.{old}",))))
        for leaf, old in (("weight", "gamma"), ("bias", "beta"))
    )


BERT = Architecture(
    "bert",
    "bert",
    "BertModel",
    rules=(
        weight("token_embd", "embeddings.word_embeddings"),
        weight("token_types", "embeddings.token_type_embeddings"),
        weight("position_embd", "embeddings.position_embeddings"),
        *_norm("token_embd_norm", "embeddings.LayerNorm", per_block=False),
        *block("attn_q", "attention.self.query", biased=True),
        *block("attn_k", "attention.self.key", biased=True),
        *block("attn_v", "attention.self.value", biased=True),
        *block("attn_output", "attention.output.dense", biased=True),
        *_norm("attn_output_norm", "attention.output.LayerNorm"),
        *block("ffn_up", "intermediate.dense", biased=True),
        *block("ffn_down", "output.dense", biased=True),
        *_norm("layer_output_norm", "output.LayerNorm"),
    ),
    fields=(CONTEXT, HIDDEN, FFN, HEADS, LAYER_NORM),
    layer="encoder.layer.{n}",
    classes=("BertForMaskedLM", "BertForPreTraining"),
    prefix="bert.",
    rotated=None,
    more=_more,
    back=_back,
    check=_check,
    drops={
        r"(^|\.)pooler\.": "the pooler: llama.cpp pools by itself",
        r"^cls\.": "the head of training: llama.cpp embeds with this architecture",
    },
)
