"""gpt-oss: attention with sinks, experts stored as 4-bit blocks or on their side."""

from quantize.formats.gguf.architectures.base import (
    Architecture,
    Form,
    Rule,
    attention,
    block,
    outer,
)
from quantize.formats.gguf.architectures.operations import MICRO_SCALED, TRANSPOSE, chain, split_inner, turns
from quantize.formats.gguf.architectures.settings import (
    CONTEXT,
    EXPERTS_USED,
    FFN,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    KV_HEADS,
    RMS,
    Field,
    Settings,
    Window,
    experts,
)

# Gate and up by turns.
_TURNS = split_inner(turns)
_BOTH, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


def _check(settings: Settings) -> None:
    settings.require("swiglu_limit", 7.0)
    settings.require("hidden_act", "silu")


GPT_OSS = Architecture(
    "gpt-oss",
    "gpt_oss",
    "GptOssForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *attention(True),
        Rule(("blk.{n}.attn_sinks.weight",), (Form((".self_attn.sinks",)),)),
        *block("post_attention_norm", "post_attention_layernorm"),
        *block("ffn_gate_inp", "mlp.router", biased=True),
        Rule(
            ("blk.{n}.ffn_gate_exps.weight", "blk.{n}.ffn_up_exps.weight"),
            (
                Form((_BOTH,), chain(TRANSPOSE, _TURNS)),
                Form((f"{_BOTH}_blocks", f"{_BOTH}_scales"), chain(MICRO_SCALED, _TURNS)),
            ),
        ),
        Rule(("blk.{n}.ffn_gate_exps.bias", "blk.{n}.ffn_up_exps.bias"), (Form((f"{_BOTH}_bias",), _TURNS),)),
        Rule(
            ("blk.{n}.ffn_down_exps.weight",),
            (Form((_DOWN,), TRANSPOSE), Form((f"{_DOWN}_blocks", f"{_DOWN}_scales"), MICRO_SCALED)),
        ),
        Rule(("blk.{n}.ffn_down_exps.bias",), (Form((f"{_DOWN}_bias",)),)),
    ),
    fields=(
        CONTEXT,
        HIDDEN,
        FFN,
        HEADS,
        KV_HEADS,
        HEAD_SIZE,
        RMS,
        experts("num_local_experts"),
        EXPERTS_USED,
        Field("expert_feed_forward_length", ("intermediate_size",)),
        Window(2),
    ),
    check=_check,
    back=lambda keys, shapes: {"attention_bias": True},
    head_required=True,
)
