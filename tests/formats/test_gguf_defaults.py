"""What is held of transformers' assumptions is what it assumes."""

from __future__ import annotations

from typing import Any

import pytest

from quantize.formats.gguf.architectures.defaults import DEFAULTS, assumed

# Neither says anything of what a GGUF file holds.
_TRAINING = {"use_cache", "initializer_range", "attention_dropout", "layer_types", "model_type"}
CONFIGS: list[dict[str, Any]] = [
    {},
    {"hidden_size": 96, "num_attention_heads": 6},
    {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    {"head_dim": 32, "rope_theta": 500000.0, "vocab_size": 300},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: ",".join(config) or "empty")
@pytest.mark.parametrize("kind", DEFAULTS)
def test_assumptions_are_those_of_transformers(kind: str, config: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    said = CONFIG_MAPPING[kind](**config).to_dict()
    own = {key: said[key] for key in said if key not in {*PreTrainedConfig().to_dict(), *_TRAINING}}
    found = assumed({"model_type": kind, **config})
    assert found is not None
    assert {key: found.get(key) for key in own} == own


def test_what_has_to_be_asked() -> None:
    assert assumed({"model_type": "gemma3_text"}) is None
    assert assumed({"model_type": "qwen2", "use_sliding_window": True}) is None
    assert assumed({"model_type": "llama", "rope_scaling": {"type": "yarn"}}) is None
