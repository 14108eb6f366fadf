"""Tiny models with random weights of many architectures, made and saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import byte_tokenizer
from torch import Tensor, nn

VOCABULARY = 320
_DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_SHARED_KV = {
    "num_hidden_layers": 3,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 32,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

# The class of each and what its config has beyond `_DENSE`; `...` takes a key away.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-mha": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama-mqa": ("LlamaForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma3": ("Gemma3ForCausalLM", _SLIDING),
    "phi3": ("Phi3ForCausalLM", {}),
    "cohere": ("CohereForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    # LayerNorms with biases; two-matrix MLPs
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "gpt-neox": ("GPTNeoXForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "falcon": ("FalconForCausalLM", {"head_dim": ..., "multi_query": True}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}),
    # experts
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", _EXPERTS),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {**_EXPERTS, **_LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "gpt-oss": ("GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4ForCausalLM",
        {"num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
    ),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        {
            **_T5,
            "num_experts": 4,
            "expert_capacity": 64,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_decoder_layers": 2,
        },
    ),
    # what crosses between blocks
    "t5": ("T5ForConditionalGeneration", _T5),
    "gemma3n": (
        "Gemma3nForCausalLM",
        {
            **_SHARED_KV,
            "laurel_rank": 32,
            "activation_sparsity_pattern": [0.9, 0.0, 0.0],
            "altup_num_inputs": 2,
        },
    ),
    "gemma4": ("Gemma4ForCausalLM", {**_SHARED_KV, "global_head_dim": 16}),
    "qwen3-next": ("Qwen3NextForCausalLM", {**_EXPERTS, **_HYBRID, "shared_expert_intermediate_size": 32}),
    "qwen3.5": ("Qwen3_5ForCausalLM", _HYBRID),
    # one block's matrices are another's too
    "zamba2": (
        "Zamba2ForCausalLM",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_mem_blocks": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 32,
            "mamba_d_state": 16,
            "mamba_ngroups": 1,
        },
    ),
    # stored fused, split by transformers
    "lara-mini": ("LaraMiniForCausalLM", {**_EXPERTS, **_HYBRID, "shared_expert_intermediate_size": 32}),
    # a language model and a tower
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_DENSE},
            "vision_config": {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **_TOWER},
            "image_token_index": 3,
        },
    ),
    "gemma3-vision": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_DENSE, **_SLIDING},
            "vision_config": {"image_size": 16, "patch_size": 4, **_TOWER},
            "mm_tokens_per_image": 4,
            "image_token_index": 3,
            "boi_token_index": 4,
            "eoi_token_index": 5,
        },
    ),
}


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Writes a tiny model whose every parameter is random, norms and biases too, with a tokenizer of bytes.

    The caller's random state is not touched.
    """
    import transformers

    kind, extra = ARCHITECTURES[name]
    cls = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {**_DENSE, **extra, **changes}
        model = cls(cls.config_class(**{key: value for key, value in settings.items() if value is not ...}))
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.15)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


def load(folder: Path) -> Any:
    """Returns the whole model as transformers loads it, float32."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def token_ids(rows: int = 4, length: int = 16, seed: int = 0) -> Tensor:
    """Random token ids `[rows, length]` that name no special token."""
    return torch.randint(6, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def forward(model: Any, ids: Tensor) -> Tensor:
    """Returns the logits; a decoder gets the same ids as its encoder."""
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return logits
