"""Folds found by tracing: which they are, and that the whole model does not change when they are used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, forward, load, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.checkpoint import open_checkpoint
from quantize.skeleton import Skeleton
from quantize.structure import Fold, Input, fold_all, grouped
from quantize.sweep import Stage, Sweep
from quantize.trace import Known, trace

# Of the second block, or the one named: what is multiplied with one input, and where a scale of it can go, as
# `producer` for a norm's gain, `1+producer` for an offset one, `producer[start:]` for rows of a matrix, and `xN` if N
# runs of channels share the rows.
QKV = "q_proj k_proj v_proj"
MLP = {"gate_proj up_proj": "post_attention_layernorm", "down_proj": "up_proj[0:]"}
LLAMA = {QKV: "input_layernorm", "o_proj": "v_proj[0:] x2"} | MLP
GEMMA = {QKV: "1+input_layernorm", "o_proj": "v_proj[0:] x2", "down_proj": "up_proj[0:]"}
ROUTED = {f"{e}.gate_proj {e}.up_proj": "post_attention_layernorm" for e in range(4)}
ROUTED |= {f"{e}.down_proj": f"{e}.up_proj[0:]" for e in range(4)}
WANTED: dict[str, dict[str, str | None]] = {
    "llama": LLAMA,
    "llama-mha": LLAMA | {"o_proj": "v_proj[0:]"},
    "llama-mqa": LLAMA | {"o_proj": "v_proj[0:] x4"},
    "qwen2": LLAMA,
    "gemma": GEMMA | {"gate_proj up_proj": "1+post_attention_layernorm"},
    "gemma3": GEMMA | {"gate_proj up_proj": "1+pre_feedforward_layernorm"},
    "phi3": {
        "qkv_proj": "input_layernorm",
        "o_proj": "qkv_proj[96:] x2",
        "gate_up_proj": "post_attention_layernorm",
        "down_proj": "gate_up_proj[96:]",
    },
    "cohere": {
        f"{QKV} gate_proj up_proj": "input_layernorm",
        "o_proj": "v_proj[0:] x2",
        "down_proj": "up_proj[0:]",
    },
    # the norms come after the linears
    "olmo2": {QKV: None, "o_proj": "v_proj[0:] x2", "gate_proj up_proj": None, "down_proj": "up_proj[0:]"},
    # what lies between the matrices of its MLP is not linear
    "starcoder2": {
        QKV: "input_layernorm",
        "o_proj": "v_proj[0:] x2",
        "c_fc": "post_attention_layernorm",
        "c_proj": None,
    },
    # values lie between queries and keys, head by head
    "gpt-neox": {
        "query_key_value": "input_layernorm",
        "dense": None,
        "dense_h_to_4h": "post_attention_layernorm",
        "dense_4h_to_h": None,
    },
    # a ReLU lets positive factors through
    "opt": {
        QKV: "self_attn_layer_norm",
        "out_proj": "v_proj[0:]",
        "fc1": "final_layer_norm",
        "fc2": "fc1[0:]",
    },
    "falcon": {"query_key_value dense_h_to_4h": "input_layernorm", "dense": None, "dense_4h_to_h": None},
    "mixtral": {
        QKV: "input_layernorm",
        "o_proj": "v_proj[0:] x2",
        "gate": "post_attention_layernorm",
        **{f"{e}.w1 {e}.w3": "post_attention_layernorm" for e in range(4)},
        **{f"{e}.w2": f"{e}.w3[0:]" for e in range(4)},
    },
    "qwen3-moe": {QKV: "input_layernorm", "o_proj": "v_proj[0:] x2", "gate": "post_attention_layernorm"} | ROUTED,
    "qwen2-moe": {
        QKV: "input_layernorm",
        "o_proj": "v_proj[0:] x2",
        "shared_expert.gate_proj shared_expert.up_proj gate shared_expert_gate": "post_attention_layernorm",
        "shared_expert.down_proj": "shared_expert.up_proj[0:]",
    }
    | ROUTED,
    "qwen3-next": {
        QKV: "1+input_layernorm",
        "o_proj": "v_proj[0:] x2",
        "shared_expert.gate_proj shared_expert.up_proj gate shared_expert_gate": "1+post_attention_layernorm",
        "shared_expert.down_proj": "shared_expert.up_proj[0:]",
    }
    | {consumers: fold.replace("post", "1+post") for consumers, fold in ROUTED.items()},
    "deepseek-v3": {
        "q_a_proj kv_a_proj_with_mqa": "input_layernorm",
        "q_b_proj": "q_a_layernorm",
        "kv_b_proj": "kv_a_layernorm",
        "o_proj": None,
        "gate shared_experts.gate_proj shared_experts.up_proj": "post_attention_layernorm",
        "shared_experts.down_proj": "shared_experts.up_proj[0:]",
    }
    | ROUTED,
    # its experts are matrices of another kind: their norm must stay
    "gpt-oss": {QKV: "input_layernorm", "o_proj": "v_proj[0:] x2", "router": None},
    "lara-mini": {
        QKV: "input_layernorm",
        "o_proj": "v_proj[0:] x2",
        "gate shared_expert.gate_proj shared_expert.up_proj": None,
        "shared_expert.down_proj": "shared_expert.up_proj[0:]",
    },
    # encoder output feeds keys and values
    "t5": {
        "SelfAttention.q SelfAttention.k SelfAttention.v": "0.layer_norm",
        "SelfAttention.o": "SelfAttention.v[0:]",
        "EncDecAttention.q": "1.layer_norm",
        "EncDecAttention.k EncDecAttention.v": None,
        "EncDecAttention.o": "EncDecAttention.v[0:]",
        "DenseReluDense.wi": "2.layer_norm",
        "DenseReluDense.wo": "DenseReluDense.wi[0:]",
    },
    # keys and values are normalised after their projection, and later blocks use them
    "gemma4": {
        QKV: "input_layernorm",
        "o_proj": None,
        "gate_proj up_proj": "pre_feedforward_layernorm",
        "down_proj": "up_proj[0:]",
        "per_layer_input_gate": None,
        "per_layer_projection": None,
    },
    "llava": LLAMA,
}
BLOCKS = {"t5": "decoder.block.1", "llava": "model.language_model.layers.1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = architectures.save(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


def traced(
    path: Path, probe: Tensor | None = None, known: Known | None = None
) -> tuple[Skeleton, dict[str, tuple[Input, ...]], dict[str, Tensor]]:
    """Returns the inputs of each block, and all stored tensors of blocks with random scales folded in."""
    checkpoint = open_checkpoint(path)
    skeleton = Skeleton(checkpoint)
    generator = torch.Generator().manual_seed(7)
    inputs: dict[str, tuple[Input, ...]] = {}
    folded: dict[str, Tensor] = {}
    with Sweep(
        skeleton, checkpoint, [token_ids(1)], threads=1, probe=token_ids(1) if probe is None else probe
    ) as sweep:
        for stage in sweep.stages():
            inputs[stage.path] = trace(stage, skeleton, known).inputs
            folded |= fold_all(inputs[stage.path], stage.weights, random_scales(inputs[stage.path], generator))
    return skeleton, inputs, folded


def random_scales(inputs: tuple[Input, ...], generator: torch.Generator) -> dict[str, Tensor]:
    scales = {}
    for item, *_ in grouped(inputs):
        if item.fold is not None:
            rows = int(item.fold.row_of(item.width).max()) + 1
            scales[item.name] = torch.empty(rows).uniform_(0.25, 4.0, generator=generator)
    return scales


def described(inputs: tuple[Input, ...], like: Mapping[str, str | None]) -> dict[str, str | None]:
    """Returns inputs in the words of `WANTED`, names as long as `like` spells them."""
    words = {word for key in like for word in key.split()}
    words |= {fold.removeprefix("1+").split("[")[0] for fold in like.values() if fold}

    def short(name: str) -> str:
        stem = name.removesuffix(".weight")
        return max((word for word in words if f".{stem}".endswith(f".{word}")), key=len, default=stem)

    def where(fold: Fold | None) -> str | None:
        if fold is None:
            return None
        repeat = f" x{fold.repeat}" if fold.repeat > 1 else ""
        rows = "" if "norm" in fold.producer else f"[{fold.start}:]"
        return f"{'1+' if fold.offset else ''}{short(fold.producer)}{rows}{repeat}"

    return {" ".join(map(short, item.consumers)): where(item.fold) for item in inputs}


def logits(path: Path, tensors: Mapping[str, Tensor], into: Path, ids: Tensor) -> Tensor:
    """Returns the logits of the model with some of its stored tensors exchanged, as transformers computes them."""
    shutil.copytree(path, into)
    save_file({**load_file(path / "model.safetensors"), **tensors}, into / "model.safetensors", {"format": "pt"})
    return forward(load(into), ids)


def assert_unchanged(path: Path, folded: Mapping[str, Tensor], into: Path) -> None:
    ids = token_ids(seed=1)
    base = forward(load(path), ids)
    torch.testing.assert_close(logits(path, folded, into, ids), base, rtol=1e-4, atol=1e-4 * float(base.std()))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("zamba2", "switch")])
def test_folds_are_right_and_change_nothing(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = folder(name)
    skeleton, inputs, folded = traced(path, known={})
    if name in WANTED:
        block = BLOCKS.get(name, skeleton.blocks[1])
        assert described(inputs[block], WANTED[name]) == WANTED[name]
    assert folded or name == "gpt2"
    assert_unchanged(path, folded, tmp_path / "folded")


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_experts_out_of_reach_go_with_their_siblings(name: str, tmp_path: Path) -> None:
    counts = {"num_experts": 16} if name == "qwen3-moe" else {"num_local_experts": 16}
    path = architectures.save(name, tmp_path / "many", **counts)
    _, inputs, folded = traced(path, probe=token_ids(1, 2))  # two tokens reach four experts at most
    for items in inputs.values():
        experts = [item for item in items if "experts" in item.name]
        assert len(experts) == 32
        assert all(item.fold for item in experts)
        assert len({item.fold for item in experts if len(item.consumers) == 2}) == 1
    assert_unchanged(path, folded, tmp_path / "folded")


def test_without_siblings_a_norm_that_may_feed_them_stays(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Experts that are modules of their own: one that was not reached could hang on the norm as well."""
    skeleton, inputs, folded = traced(folder("switch"), probe=token_ids(1, 1))
    sparse = inputs["encoder.block.1"]
    assert all(item.fold is None for item in sparse if item.width == 64)
    assert all(item.fold is not None for item in inputs["encoder.block.0"])
    assert {name for item in sparse for name in item.consumers} >= {
        name for name in skeleton.linears if name.startswith("encoder.block.1.") and "experts" in name
    }
    assert_unchanged(folder("switch"), folded, tmp_path / "folded")


def test_matrices_of_several_blocks_stay(folder: Callable[[str], Path], tmp_path: Path) -> None:
    _, inputs, folded = traced(folder("zamba2"), known={})
    shared = [item for item in inputs["model.layers.1"] if "shared_transformer" in item.name]
    assert shared
    assert all(item.fold is None for item in shared)
    assert any(item.fold for item in inputs["model.layers.3"])
    assert_unchanged(folder("zamba2"), folded, tmp_path / "folded")


def test_blocks_of_a_known_make_are_not_searched(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = traced(folder("qwen3-moe"))[1]
    runs: list[str] = []
    probe = Stage.probe
    monkeypatch.setattr(Stage, "probe", lambda self, **kw: (runs.append(self.path), probe(self, **kw))[1])
    assert traced(folder("qwen3-moe"), known={})[1] == searched
    assert runs.count("model.layers.0") > 5
    assert runs.count("model.layers.1") == 2


def test_what_is_known_is_not_trusted(folder: Callable[[str], Path]) -> None:
    right = traced(folder("llama"))[1]
    known: Known = {}
    traced(folder("llama"), known=known)
    for rules in known.values():
        for key, fold in rules.items():
            assert fold is not None
            rules[key] = Fold(fold.producer, fold.bias, not fold.offset, fold.start, fold.width, fold.repeat)
    assert traced(folder("llama"), known=known)[1] == right


def test_a_block_is_as_before_after_tracing(folder: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(folder("mixtral"))
    skeleton = Skeleton(checkpoint)
    with Sweep(skeleton, checkpoint, [token_ids(1)], threads=1, probe=token_ids(1)) as sweep:
        stages = sweep.stages()
        stage = next(stages)
        before: dict[str, Any] = {n: p.clone() for n, p in stage.module.named_parameters()}
        trace(stage, skeleton)
        for name, value in stage.module.named_parameters():
            assert torch.equal(value, before[name])
        assert all(torch.equal(value, checkpoint.read(name)) for name, value in stage.weights.items())


def test_groups_keep_order_and_share_one_scale() -> None:
    norm, other = (Fold(name, None, False, 0, 4, 1) for name in ("norm", "other"))
    inputs = [
        Input("a", ("a",), 4, norm),
        Input("b", ("b",), 4),
        Input("c", ("c", "d"), 4, norm),
        Input("e", ("e",), 4),
    ]
    inputs.append(Input("f", ("f",), 4, other))
    assert [[item.name for item in group] for group in grouped(inputs)] == [["a", "c"], ["b"], ["e"], ["f"]]
    weights = {name: torch.ones(2, 4) for name in "abcdef"} | {"norm": torch.ones(4), "other": torch.ones(4)}
    changed = fold_all(inputs, weights, {"c": torch.full((4,), 2.0)})
    assert {name: float(value.flatten()[0]) for name, value in changed.items()} == {"norm": 0.5, "a": 2, "c": 2, "d": 2}
