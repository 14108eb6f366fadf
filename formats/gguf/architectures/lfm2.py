"""LFM 2: short convolutions with blocks of attention among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantize.formats.gguf.architectures.base import HEAD, Architecture, Form, Rule, block, weight, without
from quantize.formats.gguf.architectures.operations import SQUEEZE
from quantize.formats.gguf.architectures.settings import CONTEXT, HEADS, HIDDEN, RMS, Field, Keys, Settings
from quantize.formats.gguf.metadata import Value, f32, integers, u32


def attends(settings: Settings, block: int) -> bool:
    """In blocks of attention."""
    return settings.layer_types[block] == "full_attention"


def _width(settings: Settings) -> int:
    """Returns the width of the MLP, which the config gives before it is adjusted."""
    width = int(settings.get("block_ff_dim", "intermediate_size"))
    if settings.get("block_auto_adjust_ff_dim"):
        width = 2 * width // 3
        factor = settings.get("block_ffn_dim_multiplier")
        width = int(factor * width) if factor is not None else width
        step = int(settings.need("block_multiple_of"))
        width = -(-width // step) * step
    return width


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes of convolution and MLP, and which blocks attend: those with heads of keys and values."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns them."""
        heads = [settings.kv_heads if attends(settings, block) else 0 for block in range(settings.layers)]
        return {
            "attention.head_count_kv": integers(heads),
            "feed_forward_length": u32(_width(settings)),
            "shortconv.l_cache": u32(settings.need("conv_L_cache")),
        }

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns them."""
        heads = keys.list("attention.head_count_kv", keys.whole("block_count"))
        return {
            "num_key_value_heads": max(heads),
            "layer_types": ["full_attention" if count else "conv" for count in heads],
            "intermediate_size": keys.whole("feed_forward_length"),
            "block_auto_adjust_ff_dim": False,
            "conv_L_cache": keys.whole("shortconv.l_cache"),
            "conv_bias": False,
        }


_CONV = without(attends)

LFM2 = Architecture(
    "lfm2",
    "lfm2",
    "Lfm2ForCausalLM",
    rules=(
        weight("token_embd", "model.embed_tokens"),
        # llama.cpp reads the last norm under this name.
        weight("token_embd_norm", "model.embedding_norm"),
        Rule(("output.weight",), (Form(("lm_head.weight",)),), group=HEAD),
        *block("attn_norm", "operator_norm"),
        *block("shortconv.in_proj", "conv.in_proj", where=_CONV),
        *block("shortconv.conv", "conv.conv", SQUEEZE, _CONV),
        *block("shortconv.out_proj", "conv.out_proj", where=_CONV),
        *block("attn_q", "self_attn.q_proj", where=attends),
        *block("attn_k", "self_attn.k_proj", where=attends),
        *block("attn_v", "self_attn.v_proj", where=attends),
        *block("attn_output", "self_attn.out_proj", where=attends),
        *block("attn_q_norm", "self_attn.q_layernorm", where=attends),
        *block("attn_k_norm", "self_attn.k_layernorm", where=attends),
        *block("ffn_norm", "ffn_norm"),
        *block("ffn_gate", "feed_forward.w1"),
        *block("ffn_up", "feed_forward.w3"),
        *block("ffn_down", "feed_forward.w2"),
    ),
    fields=(CONTEXT, HIDDEN, HEADS, _Sizes(), Field(RMS.key, ("norm_eps", "block_norm_eps"), f32)),
    rotated=lambda settings, rope: settings.hidden // settings.heads,
    check=lambda settings: settings.require("conv_bias", False),
)
