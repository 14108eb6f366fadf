"""What the skeleton knows of a model without its weights: blocks, linears, names, ties, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, load
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError
from quantize.skeleton import Skeleton


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = architectures.save(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


def skeleton_of(path: Path, assume_tied: bool = False) -> Skeleton:
    return Skeleton(open_checkpoint(path), assume_tied)


def rewrite(path: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """Changes config keys and stored tensors; `None` takes one away."""
    stored: dict[str, Tensor | None] = {**load_file(path / "model.safetensors"), **tensors}
    save_file({n: v for n, v in stored.items() if v is not None}, path / "model.safetensors", {"format": "pt"})
    values = json.loads((path / "config.json").read_text()) | (config or {})
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stored_tensors_become_the_parameters_that_transformers_loads(name: str, folder: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(folder(name))
    skeleton = Skeleton(checkpoint)
    assert skeleton.unused == ()
    filled = skeleton.fill(lambda _: True, checkpoint.read)
    for key, value in load(folder(name)).state_dict().items():
        assert torch.equal(filled[key], value), key
    for stored in checkpoint.tensors:
        assert stored in skeleton.linears or skeleton.role(stored).startswith("copied: ")


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("t5", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
        ("llava", ["model.language_model.layers.0", "model.language_model.layers.1"]),
        ("gemma3-vision", ["model.language_model.layers.0", "model.language_model.layers.1"]),
    ],
)
def test_blocks_are_those_of_the_language_model(name: str, blocks: list[str], folder: Callable[[str], Path]) -> None:
    skeleton = skeleton_of(folder(name))
    assert list(skeleton.blocks) == blocks
    towers = [name for name in open_checkpoint(folder(name)).tensors if "vision" in name or "projector" in name]
    assert all(skeleton.role(name) in ("copied: outside the blocks", "copied: embedding") for name in towers)
    assert not skeleton.linears.keys() & set(towers)


def test_roles_of_what_is_no_quantizable_linear(folder: Callable[[str], Path]) -> None:
    skeleton = skeleton_of(folder("qwen2-moe"))
    roles = {
        "lm_head.weight": "copied: head",
        "model.embed_tokens.weight": "copied: embedding",
        "model.norm.weight": "copied: outside the blocks",
        "model.layers.0.mlp.gate.weight": "copied: router",
        "model.layers.0.mlp.shared_expert_gate.weight": "copied: router",
        "model.layers.0.self_attn.q_proj.bias": "copied: norm, bias or other vector",
    }
    assert {name: skeleton.role(name) for name in roles} == roles
    assert not roles.keys() & skeleton.linears.keys()
    assert skeleton.linears["model.layers.1.mlp.experts.3.up_proj.weight"] == "model.layers.1.mlp.experts"
    gpt2 = skeleton_of(folder("gpt2"))
    assert gpt2.role("transformer.h.0.attn.c_attn.weight") == "copied: no plain linear"
    assert gpt2.linears == {}


def test_takes_no_memory_and_no_random_numbers(folder: Callable[[str], Path]) -> None:
    before = torch.get_rng_state()
    skeleton = skeleton_of(folder("gemma3n"))
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.untyped_storage().nbytes() for p in skeleton.model.parameters()) < 4 * 1000
    assert all(parameter.device.type == "cpu" for parameter in skeleton.model.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.model.buffers())


def test_computing_without_weights_shows(folder: Callable[[str], Path]) -> None:
    skeleton = skeleton_of(folder("llama"))
    linear = skeleton.model.get_submodule("model.layers.0.mlp.up_proj")
    assert bool(linear(torch.ones(1, 64)).isnan().all())


def test_ties(folder: Callable[[str], Path]) -> None:
    skeleton = skeleton_of(folder("llama-mqa"))
    assert skeleton.head == "lm_head"
    assert skeleton.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert skeleton.whole("lm_head.weight") == "model.embed_tokens.weight"
    skeleton.put({"model.embed_tokens.weight": torch.ones(320, 64)})
    assert bool((skeleton.model.lm_head.weight == 1).all())


@pytest.mark.parametrize("flags", [{"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}])
def test_a_head_that_is_nowhere(flags: dict[str, Any], tmp_path: Path) -> None:
    name = "llava" if "text_config" in flags else "llama"
    path = architectures.save(name, tmp_path / "untied")
    config = json.loads((path / "config.json").read_text())
    if "text_config" in flags:
        flags = {"tie_word_embeddings": False, "text_config": config["text_config"] | flags["text_config"]}
    head = next(n for n in open_checkpoint(path).tensors if n.endswith("lm_head.weight"))
    rewrite(path, flags, **{head: None})
    with pytest.raises(InputError, match=r"lm_head\.weight' is missing, yet tie_word_embeddings is false") as caught:
        skeleton_of(path)
    assert "--assume-tied" in caught.value.hint
    if name == "llama":
        assert "lm_head.weight" in skeleton_of(path, assume_tied=True).tied


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    path = architectures.save("mixtral", tmp_path / "holes")
    rewrite(path, **{"model.norm.weight": None, "model.layers.1.self_attn.q_proj.weight": None})
    with pytest.raises(InputError, match=r"tensors: 'model\.layers\.1\.self_attn\.q_proj\.weight', 'model\.norm"):
        skeleton_of(path)


def test_a_missing_expert_is_noticed(tmp_path: Path) -> None:
    path = architectures.save("qwen3-moe", tmp_path / "expert")
    rewrite(path, **{"model.layers.1.mlp.experts.2.down_proj.weight": None})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts.*makes shape \[3, 64, 32\].*\[4, 64, 32\]"):
        skeleton_of(path)


def test_a_wrong_shape_names_tensor_and_shapes(tmp_path: Path) -> None:
    path = rewrite(architectures.save("llama", tmp_path / "wide"), {"intermediate_size": 128})
    with pytest.raises(InputError, match=r"mlp\.down_proj\.weight.*\[64, 96\].*\[64, 128\]"):
        skeleton_of(path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "no_such_model"}, "unknown architecture: model_type 'no_such_model'"),
        ({"architectures": ["NoSuchForCausalLM"]}, "unknown architecture 'NoSuchForCausalLM'"),
        ({"num_attention_heads": "many"}, "does not make a model"),
    ],
)
def test_configs_that_make_no_model(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = rewrite(architectures.save("llama", tmp_path / "odd"), config)
    with pytest.raises(InputError, match=words):
        skeleton_of(path)


def test_unused_tensors_and_which_of_them_are_known(tmp_path: Path) -> None:
    path = architectures.save("llama", tmp_path / "more")
    extra = {
        "model.layers.2.mlp.up_proj.weight": torch.ones(2, 2),
        "mtp.fc.weight": torch.ones(2, 2),
        "lm_head.weight._scale": torch.ones(2),
    }
    skeleton = skeleton_of(rewrite(path, **extra))
    assert set(skeleton.unused) == extra.keys()
    assert {name for name in extra if skeleton.ignores(name)} == extra.keys() - {"lm_head.weight._scale"}


def test_infinities_in_the_config(tmp_path: Path) -> None:
    """transformers writes them as objects of its own, since JSON has none."""
    path = architectures.save("zamba2", tmp_path / "infinite")
    rewrite(path, {"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert skeleton_of(path).model.config.time_step_limit[1] == float("inf")


def test_blocks_of_paths(folder: Callable[[str], Path]) -> None:
    skeleton = skeleton_of(folder("t5"))
    assert skeleton.block_of("decoder.block.1.layer.0.SelfAttention.q.weight") == "decoder.block.1"
    assert skeleton.block_of("decoder.block.1") == "decoder.block.1"
    assert skeleton.block_of("decoder.final_layer_norm") is None
    stored = skeleton.stored_names("encoder.block.1")
    assert stored
    assert all(name.startswith("encoder.block.1.") for name in stored)
    assert isinstance(skeleton.model.get_submodule("encoder.block.1"), nn.Module)
