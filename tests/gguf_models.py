"""Tiny random models of the architectures that GGUF files are made of, and a plain writer of such files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantize
from quantize.formats.folder import FolderCheckpoint
from quantize.formats.gguf.view import GGUFView

VOCABULARY = 300
_DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Where heads must share out the hidden state.
_EQUAL = {"head_dim": ...}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
_LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_LATENT = {
    **_EQUAL,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "query_pre_attn_scalar": 32}
_SHARED_KV = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 32,
    "global_head_dim": 64,
}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_STATE = {"state_size": 16, "time_step_rank": 4, "intermediate_size": 128}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {"long_factor": [2.0 + i for i in range(8)], "short_factor": [1.0 + i / 8 for i in range(8)]}

#: The class of each and what its config has beyond `_DENSE`; `...` takes a key away.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("LlamaForCausalLM", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama3": (
        "LlamaForCausalLM",
        {"rope_parameters": {**_LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}},
    ),
    "llama-yarn": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "llama-yarn-scaled": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 0.8,
            }
        },
    ),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", _EQUAL),
    "qwen2moe": (
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, **_EQUAL, "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
    ),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3moe": ("Qwen3MoeForCausalLM", {**_EXPERTS, "norm_topk_prob": True}),
    "qwen3next": (
        "Qwen3NextForCausalLM",
        {**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "qwen35": ("Qwen3_5ForCausalLM", _LINEAR),
    "qwen35moe": ("Qwen3_5MoeForCausalLM", {**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 64}),
    "gemma": ("GemmaForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": ("Gemma2ForCausalLM", _SLIDING),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **_SLIDING,
            "num_hidden_layers": 7,
            "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
        },
    ),
    "gemma3-own-pattern": ("Gemma3ForCausalLM", _SLIDING),
    "gemma4": ("Gemma4ForCausalLM", _SHARED_KV),
    "gemma4moe": (
        "Gemma4ForCausalLM",
        {
            **_SHARED_KV,
            **_EXPERTS,
            "num_kv_shared_layers": 0,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 30.0,
        },
    ),
    "phi3": ("Phi3ForCausalLM", {**_EQUAL, "sliding_window": None}),
    "phi3-long": (
        "Phi3ForCausalLM",
        {
            **_EQUAL,
            "sliding_window": None,
            "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **_LONG},
        },
    ),
    "phi3-short": (
        "Phi3ForCausalLM",
        {
            **_EQUAL,
            "sliding_window": None,
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **_LONG},
        },
    ),
    "granite": (
        "GraniteForCausalLM",
        {
            "attention_multiplier": 0.1,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1.5e5},
        },
    ),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        {**_ROUTED, **_LATENT, "n_shared_experts": 2, "norm_topk_prob": False, "topk_method": "greedy"},
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {**_ROUTED, **_LATENT, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5},
    ),
    "deepseek-v3-yarn": (
        "DeepseekV3ForCausalLM",
        {
            **_ROUTED,
            **_LATENT,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "glm4moe": (
        "Glm4MoeForCausalLM",
        {**_ROUTED, "use_qk_norm": True, "attention_bias": True, "n_group": 1, "topk_group": 1},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
        },
    ),
    "falcon": ("FalconForCausalLM", {**_EQUAL, "multi_query": True, "num_kv_heads": 4}),
    "falcon40": (
        "FalconForCausalLM",
        {**_EQUAL, "new_decoder_architecture": True, "multi_query": False, "num_kv_heads": 2},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {**_EQUAL, "sliding_window": None}),
    "mamba": ("MambaForCausalLM", _STATE),
    "jamba": (
        "JambaForCausalLM",
        {
            **_EQUAL,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "lfm2": ("Lfm2ForCausalLM", {**_EQUAL, "layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
    "bert": ("BertModel", {"type_vocab_size": 2, "num_key_value_heads": ..., **_EQUAL}),
    "t5": ("T5ForConditionalGeneration", _T5),
    "umt5": ("UMT5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "flan-t5": (
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}

#: Where another seed than 0 is taken: with it no token's experts are so close that float16 chooses others.
SEEDS = {"qwen35moe": 1, "gemma4moe": 1}


def build(name: str, **changes: Any) -> Any:
    """Returns a model whose every parameter is random, norms and biases too; the caller's random state stays."""
    import transformers

    kind, extra = MODELS[name]
    cls = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(changes.pop("_seed", SEEDS.get(name, 0)))
        settings = {**_DENSE, **extra, **changes}
        model = cls(cls.config_class(**{key: value for key, value in settings.items() if value is not ...}))
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            noise = 0.1 * torch.randn(value.shape)
            if isinstance(value, nn.Parameter) and value.dim() > 1 and not key.endswith("A_log"):
                value.data = noise
            elif isinstance(value, nn.Parameter) or key.endswith("e_score_correction_bias"):
                value.data += noise  # norms near their own neutral value
            else:
                continue
            value.data = value.data.bfloat16().float()  # as checkpoints are: exact in bfloat16, and in float16 too
    return model.eval()


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Writes such a model, without a tokenizer."""
    build(name, **changes).to(dtype).save_pretrained(folder)
    if name == "flan-t5":  # transformers 5 makes it tied, which published ones are not
        held = load_file(folder / "model.safetensors")
        held["lm_head.weight"] = held["shared.weight"].flip(0).contiguous()
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        said = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(said))
    return folder


def load(name: str, folder: Path) -> Any:
    """Returns the model in a folder as transformers loads it: as saved, not as built."""
    import transformers

    return getattr(transformers, MODELS[name][0]).from_pretrained(folder).eval()


def edit(folder: Path, tensors: Mapping[str, Tensor | None], **config: Any) -> FolderCheckpoint:
    """Changes tensors (None takes one away) and config keys (`...` takes one away) of a folder."""
    held = load_file(folder / "model.safetensors") | tensors
    save_file({name: value for name, value in held.items() if value is not None}, folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text()) | config
    said = {key: value for key, value in said.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(said))
    return FolderCheckpoint(folder)


def four_bit_experts() -> dict[str, Tensor | None]:
    """Returns the changes that make the experts of `gpt-oss` 4-bit blocks, as the published model has them."""
    generator = torch.Generator().manual_seed(0)
    changes: dict[str, Tensor | None] = {}
    for layer in range(2):
        for name, rows, columns in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            codes = torch.randint(0, 256, (4, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(120, 125, (4, rows, columns // 32), dtype=torch.uint8, generator=generator)
            changes |= {stem: None, f"{stem}_blocks": codes, f"{stem}_scales": scales}
    return changes


def further_block(folder: Path) -> dict[str, Tensor | None]:
    """Returns the tensors that make a `qwen35` in a folder predict further tokens: one block of attention more."""
    held, stem = load_file(folder / "model.safetensors"), "model.layers.2."
    names = [name for name in held if name.startswith(stem)]
    more: dict[str, Tensor | None] = {f"mtp.layers.0.{name.removeprefix(stem)}": held[name].clone() for name in names}
    norm = held["model.norm.weight"]
    more |= {"mtp.fc.weight": torch.randn(64, 128), "mtp.norm.weight": norm.clone()}
    return more | {f"mtp.pre_fc_norm_{part}.weight": norm.clone() for part in ("embedding", "hidden")}


def write_gguf(view: GGUFView, path: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """Writes the model that a view shows as a file of one type, and without a vocabulary."""
    settings: dict[str, Any] = {"type": kind.name, "pure": True, "imatrix": "none", "eval": "none", "threads": 1}
    return quantize.run(view.path, out=path, **settings).out
