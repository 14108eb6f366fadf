"""T5 and UMT5: an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantize.formats.gguf.architectures.base import HEAD, Architecture, Form, Rule, Where, always, weight
from quantize.formats.gguf.architectures.lazy import Lazy, Mapped
from quantize.formats.gguf.architectures.operations import Operation
from quantize.formats.gguf.architectures.settings import RMS, Field, Keys, Settings
from quantize.formats.gguf.metadata import Value, f32, flag, u32


def _decoders(settings: Settings) -> int:
    return int(settings.get("num_decoder_layers", default=settings.layers))


def gated(settings: Settings, block: int) -> bool:
    """In models whose MLP has a gate."""
    return str(settings.get("feed_forward_proj", default="relu")).startswith("gated")


def _first(settings: Settings, block: int) -> bool:
    return block == 0


def _side(short: str, long: str, mlp: int, count: Any, biased: Where) -> tuple[Rule, ...]:
    """Returns the rules of encoder or decoder.

    Args:
        short: What GGUF calls it.
        long: What transformers calls it.
        mlp: The number of the MLP among a block's parts.
        count: Gives the number of blocks.
        biased: The blocks with position biases of their own.
    """

    def rule(target: str, source: str, where: Where = always) -> Rule:
        form = Form((f"{long}.block.{{n}}.layer.{source}.weight",))
        return Rule((f"{short}.blk.{{n}}.{target}.weight",), (form,), where, count=count)

    dense = f"{mlp}.DenseReluDense"
    return (
        rule("attn_norm", "0.layer_norm"),
        *(rule(f"attn_{part}", f"0.SelfAttention.{part}") for part in "qkvo"),
        rule("attn_rel_b", "0.SelfAttention.relative_attention_bias", biased),
        rule("ffn_norm", f"{mlp}.layer_norm"),
        rule("ffn_gate", f"{dense}.wi_0", gated),
        rule("ffn_up", f"{dense}.wi_1", gated),
        rule("ffn_up", f"{dense}.wi", lambda settings, block: not gated(settings, block)),
        rule("ffn_down", f"{dense}.wo"),
    )


def _cross() -> tuple[Rule, ...]:
    def rule(target: str, source: str) -> Rule:
        form = Form((f"decoder.block.{{n}}.layer.1.{source}.weight",))
        return Rule((f"dec.blk.{{n}}.cross_attn_{target}.weight",), (form,), count=_decoders)

    return (rule("norm", "layer_norm"), *(rule(part, f"EncDecAttention.{part}") for part in "qkvo"))


def _more(settings: Settings) -> dict[str, Value]:
    size = settings.head_dim
    folded = {_FOLDED: flag(True)} if _scales(settings) else {}
    return {"attention.key_length": u32(size), "attention.value_length": u32(size), **folded}


def _back(keys: Keys, shapes: Any) -> dict[str, Any]:
    gate = "enc.blk.0.ffn_gate.weight" in shapes
    return {
        "num_layers": keys.whole("block_count"),
        "d_kv": keys.whole("attention.key_length"),
        "feed_forward_proj": "gated-gelu" if gate else "relu",
        "is_encoder_decoder": True,
        "scale_decoder_outputs": "output.weight" not in shapes,
    }


def _check(settings: Settings) -> None:
    settings.require("feed_forward_proj", "relu", "gated-gelu")


def _scales(settings: Settings) -> bool:
    """Returns whether transformers scales what enters the head, which llama.cpp does not."""
    tied = bool(settings.get("tie_word_embeddings", default=True))
    return bool(settings.get("scale_decoder_outputs", default=tied))


def _scaled(settings: Settings, tensors: Sequence[Lazy]) -> Sequence[Lazy]:
    factor = settings.hidden**-0.5
    return [Mapped(tensors[0], lambda x: x * factor)] if _scales(settings) else tensors


def _unscaled(settings: Settings, tensors: Sequence[Lazy]) -> Sequence[Lazy]:
    factor = settings.hidden**0.5
    folded = settings.keys is not None and settings.keys.raw(_FOLDED)
    return [Mapped(tensors[0], lambda x: x * factor)] if folded else tensors


# The last norm takes the scale. Files of others leave it out, so that one of ours says so.
_SCALED = Operation(_scaled, _unscaled)
_FOLDED = "decoder_output_scale_folded"
_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class _Context:
    """The context of training, which models with relative positions may leave open."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns the context."""
        return {"context_length": u32(settings.own.get("n_positions", _CONTEXT))}

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns the context."""
        return {"n_positions": keys.whole("context_length", _CONTEXT)}


_EMBEDDINGS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")


def _rules(biased: Where) -> tuple[Rule, ...]:
    return (
        Rule(("token_embd.weight",), tuple(Form((f"{name}.weight",)) for name in _EMBEDDINGS)),
        weight("enc.output_norm", "encoder.final_layer_norm"),
        weight("dec.output_norm", "decoder.final_layer_norm", _SCALED),
        Rule(("output.weight",), (Form(("lm_head.weight",)),), group=HEAD),
        *_side("enc", "encoder", 1, lambda settings: settings.layers, biased),
        *_side("dec", "decoder", 2, _decoders, biased),
        *_cross(),
    )


# UMT5 goes by the name of T5, with biases in every block. Files of others do not say which they are.
_EVERYWHERE = "relative_attention_bias_everywhere"

T5 = Architecture(
    "t5",
    "t5",
    "T5ForConditionalGeneration",
    rules=_rules(_first),
    fields=(
        _Context(),
        Field("embedding_length", ("d_model", "hidden_size")),
        Field("feed_forward_length", ("d_ff",)),
        Field("decoder_block_count", ("num_decoder_layers",), optional=True),
        Field("attention.head_count", ("num_heads",)),
        Field("attention.layer_norm_epsilon", ("layer_norm_epsilon",), f32),
        Field(RMS.key, ("layer_norm_epsilon",), f32),
        Field("attention.relative_buckets_count", ("relative_attention_num_buckets",)),
        Field("decoder_start_token_id", ("decoder_start_token_id",), optional=True),
    ),
    layer="encoder.block.{n}",
    classes=("T5WithLMHeadModel", "MT5ForConditionalGeneration"),
    prefix="",
    rotated=None,
    more=_more,
    back=_back,
    check=_check,
    claims=lambda keys: not keys.raw(_EVERYWHERE),
    drops={r"(encoder|decoder)\.embed_tokens\.weight$|^shared\.weight$": "the embedding once more"},
)
UMT5 = replace(
    T5,
    model_type="umt5",
    model_class="UMT5ForConditionalGeneration",
    classes=(),
    rules=_rules(always),
    more=lambda settings: _more(settings) | {_EVERYWHERE: flag(True)},
    claims=lambda keys: bool(keys.raw(_EVERYWHERE)),
)
