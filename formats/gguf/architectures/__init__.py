"""Architectures: what GGUF names and orders differently from transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    **dict(zip(("attn_q", "attn_k", "attn_v", "attn_output"), _ATTENTION, strict=True)),
    "ffn_norm": "post_attention_layernorm",
    **dict(zip(("ffn_gate", "ffn_up", "ffn_down"), _MLP, strict=True)),
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one dense decoder architecture of GGUF maps to transformers.

    Attributes:
        model_type: Its `model_type` in config.json.
        model_class: Its class for causal language modelling.
        block: Modules of a block, GGUF to transformers.
        biases: Modules of a block with a bias, by the config's flag for them; those under "" always.
        permuted: Whether the rows of q and k are stored in rotary pairs instead of halves.
    """

    model_type: str
    model_class: str
    block: Mapping[str, str]
    biases: Mapping[str, Sequence[str]]
    permuted: bool = False

    def rename(self, name: str) -> str | None:
        """Returns the transformers name of a tensor, or None when the architecture has no such tensor."""
        module, _, leaf = name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        if match and match[2] in self.block:
            module = f"model.layers.{int(match[1])}.{self.block[match[2]]}"
        else:
            module = _OUTER.get(module, "")
        return f"{module}.{leaf}" if module and leaf in ("weight", "bias") else None

    def names(self, config: Mapping[str, Any]) -> set[str]:
        """Returns the transformers names of all tensors that a model of `config` has."""
        outer = [module for module in _OUTER.values() if module != "lm_head" or not config["tie_word_embeddings"]]
        biased = {leaf for flag, leaves in self.biases.items() if config.get(flag, not flag) for leaf in leaves}
        layers = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
        weights = [f"{layer}.{leaf}" for layer in layers for leaf in self.block.values()]
        biases = {f"{layer}.{leaf}.bias" for layer in layers for leaf in biased}
        return biases | {f"{module}.weight" for module in (*outer, *weights)}


ARCHITECTURES = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _BLOCK, {"attention_bias": _ATTENTION, "mlp_bias": _MLP}, permuted=True
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _BLOCK, {"": _ATTENTION[:3]}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _BLOCK | _HEAD_NORMS, {"attention_bias": _ATTENTION}),
}
