"""Mixtral: a Mistral with routed experts, which GGUF calls `llama` too."""

from quantize.formats.gguf.architectures.base import (
    DECODER,
    Architecture,
    Form,
    Rule,
    attention,
    block,
    outer,
    routed,
)
from quantize.formats.gguf.architectures.operations import KEY, QUERY
from quantize.formats.gguf.architectures.settings import EXPERTS_USED, experts

MIXTRAL = Architecture(
    "llama",
    "mixtral",
    "MixtralForCausalLM",
    rules=(
        *outer("model.embed_tokens", "model.norm"),
        *block("attn_norm", "input_layernorm"),
        *attention(operations={"q_proj": QUERY, "k_proj": KEY}),
        *block("ffn_norm", "post_attention_layernorm"),
        Rule(("blk.{n}.ffn_gate_inp.weight",), (Form((".block_sparse_moe.gate.weight",)), Form((".mlp.gate.weight",)))),
        *routed("block_sparse_moe.experts", ("w1", "w3", "w2"), stacked="mlp.experts"),
    ),
    fields=(*DECODER, experts("num_local_experts"), EXPERTS_USED),
    check=lambda settings: settings.require("hidden_act", "silu"),
    claims=lambda keys: bool(keys.whole("expert_count", 0)),
)
