"""Tiny models with random weights, written with the safetensors package and not with our own writer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS, HIDDEN, FFN, HEADS, KV, VOCAB = 2, 64, 128, 4, 2, 320


def llama_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return {key: value for key, value in (config | changes).items() if value is not ...}


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    wide, narrow = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        shapes |= {
            f"{stem}.input_layernorm.weight": (hidden,),
            f"{stem}.self_attn.q_proj.weight": (wide, hidden),
            f"{stem}.self_attn.k_proj.weight": (narrow, hidden),
            f"{stem}.self_attn.v_proj.weight": (narrow, hidden),
            f"{stem}.self_attn.o_proj.weight": (hidden, wide),
            f"{stem}.post_attention_layernorm.weight": (hidden,),
            f"{stem}.mlp.gate_proj.weight": (ffn, hidden),
            f"{stem}.mlp.up_proj.weight": (ffn, hidden),
            f"{stem}.mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def values(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Random matrices with a few loud columns, as real models have them; gains near 1."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = 1 + 0.2 * value
        else:
            value = 0.08 * value * (1 + 3 * (torch.rand(shape[-1], generator=generator) > 0.9))
        made[name] = value.to(dtype)
    return made


def llama(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    extra: Mapping[str, Tensor] | None = None,
    drop: Iterable[str] = (),
    shards: int = 1,
    tokenizer: bool = False,
    **config: Any,
) -> Path:
    """Writes a llama; `extra` tensors are added, those in `drop` left out, `config` keys of value `...` removed."""
    settings = llama_config(**config)
    tensors = values(llama_shapes(settings), seed, dtype) | dict(extra or {})
    tensors = {name: value for name, value in tensors.items() if name not in set(drop)}
    return write(folder, settings, tensors, shards=shards, tokenizer=tokenizer)


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, shards: int = 1, tokenizer: bool = False
) -> Path:
    """Writes a model folder; more than one shard gets an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.clone() for name, value in tensors.items()}
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names, table = list(tensors), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = names[shard::shards]
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
            table.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": 0}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    if tokenizer:
        byte_tokenizer(folder)
    return folder


def byte_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of one token per byte and the two special tokens 256 and 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative name."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# Options under which a calibrated run takes a second.
QUICK: dict[str, Any] = {"calib_samples": 4, "calib_length": 64, "eval": "none", "threads": 1}
