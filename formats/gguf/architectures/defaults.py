"""What transformers assumes where a config of the commonest kinds is silent.

Facts of its config classes, held here because asking it costs seconds: it imports much before it answers. A test
compares them with what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": _ROPE,
    "pad_token_id": None,
}
_QWEN: dict[str, Any] = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
# By `model_type`. What is reckoned from other keys is not held: see `assumed`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        **_LLAMA,
        **_IDS,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "pretraining_tp": 1,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        **_LLAMA,
        **_IDS,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128, "attention_bias": False},
}
# Kinds whose head size follows from the width.
_SHARED_OUT = ("llama", "mistral")


def assumed(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns a config with what transformers assumes beside it; None where it has to be asked."""
    kind = str(config.get("model_type"))
    if kind not in DEFAULTS or config.get("use_sliding_window") or isinstance(config.get("rope_scaling"), dict):
        return None
    found = {**DEFAULTS[kind], **config}
    heads = found["num_attention_heads"]
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = heads
    if kind in _SHARED_OUT and found.get("head_dim") is None and isinstance(heads, int) and heads > 0:
        found["head_dim"] = found["hidden_size"] // heads
    if found.get("rope_parameters") is None:
        found["rope_parameters"] = dict(_ROPE)
    theta = config.get("rope_theta")
    if theta is not None and config.get("rope_parameters") is None:
        found["rope_parameters"] = {**_ROPE, "rope_theta": theta}
    return found
