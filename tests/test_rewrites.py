"""LoRA adapters merged on read, against merges computed here by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

import quantize
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError
from quantize.formats.awq import AWQFormat
from quantize.schemes import AffineInt, Plain

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
RANK = 4


def pair(rows: int, cols: int, seed: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, cols, generator=generator), torch.randn(rows, rank, generator=generator)


def adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "bias": "none", "base_model_name_or_path": "org/base"}
    settings = {key: value for key, value in (settings | config).items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def halves(module: str, rows: int, cols: int, seed: int = 0, rank: int = RANK) -> dict[str, Tensor]:
    a, b = pair(rows, cols, seed, rank)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def merged(base: Tensor, rows: int, cols: int, scale: float, seed: int = 0, rank: int = RANK) -> Tensor:
    a, b = pair(rows, cols, seed, rank)
    return (base.float() + scale * (b @ a)).to(base.dtype)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "base")


def weights(path: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 16 / 4),
        ({"use_rslora": True}, 16 / 4**0.5),
        ({"lora_alpha": 3}, 3 / 4),
        ({"use_dora": False, "alpha_pattern": {}, "rank_pattern": {}, "modules_to_save": None}, 4),
        ({"peft_type": ...}, 4),
    ],
)
def test_two_matrices_change_and_nothing_else(base: Path, tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    lora = adapter(tmp_path / "lora", halves(Q, 64, 64) | halves(DOWN, 64, 128, 1), **config)
    checkpoint = open_checkpoint(base, (str(lora),))
    before = weights(base)
    assert checkpoint.tensors == open_checkpoint(base).tensors
    for name, value in before.items():
        expected = value
        if name == f"{Q}.weight":
            expected = merged(value, 64, 64, scale)
        elif name == f"{DOWN}.weight":
            expected = merged(value, 64, 128, scale, 1)
        assert torch.equal(checkpoint.read(name), expected), name
    assert not torch.equal(checkpoint.read(f"{Q}.weight"), before[f"{Q}.weight"])
    assert checkpoint.path == base
    assert checkpoint.file(f"{Q}.weight") == base / "model.safetensors"


def test_names_with_the_adapters_own_name(base: Path, tmp_path: Path) -> None:
    tensors = {name.replace(".weight", ".default.weight"): value for name, value in halves(Q, 64, 64).items()}
    lora = adapter(tmp_path / "lora", tensors)
    expected = merged(weights(base)[f"{Q}.weight"], 64, 64, 4)
    assert torch.equal(open_checkpoint(base, (str(lora),)).read(f"{Q}.weight"), expected)


def test_a_range_of_rows_is_the_same_sum(base: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", halves(Q, 64, 64))
    checkpoint = open_checkpoint(base, (str(lora),))
    rows = checkpoint.read(f"{Q}.weight", 10, 20)
    torch.testing.assert_close(rows, merged(weights(base)[f"{Q}.weight"], 64, 64, 4)[10:20])


@pytest.mark.parametrize(("suffix", "factor"), [("", 1.0), (":0.5", 0.5), (":-2", -2.0), (":1e-1", 0.1)])
def test_the_scale_after_the_folder(base: Path, tmp_path: Path, suffix: str, factor: float) -> None:
    lora = adapter(tmp_path / "lora", halves(Q, 64, 64))
    checkpoint = open_checkpoint(base, (f"{lora}{suffix}",))
    expected = merged(weights(base)[f"{Q}.weight"], 64, 64, 4 * factor)
    assert torch.equal(checkpoint.read(f"{Q}.weight"), expected)


def test_a_folder_with_a_colon_in_its_name(base: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora:2", halves(Q, 64, 64))
    value = weights(base)[f"{Q}.weight"]
    assert torch.equal(open_checkpoint(base, (str(lora),)).read(f"{Q}.weight"), merged(value, 64, 64, 4))
    assert torch.equal(open_checkpoint(base, (f"{lora}:3",)).read(f"{Q}.weight"), merged(value, 64, 64, 12))


def test_two_adapters_add_before_rounding(base: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", halves(Q, 64, 64))
    two = adapter(tmp_path / "two", halves(Q, 64, 64, 9, rank=2), r=2)
    value = weights(base)[f"{Q}.weight"]
    (a1, b1), (a2, b2) = pair(64, 64, 0), pair(64, 64, 9, 2)
    expected = (value.float() + 4 * (b1 @ a1) + 4.0 * (b2 @ a2)).bfloat16()
    assert torch.equal(open_checkpoint(base, (str(one), f"{two}:0.5")).read(f"{Q}.weight"), expected)


def test_matrices_that_are_stored_transposed(tmp_path: Path) -> None:
    """As GPT-2's Conv1D: the weight is [in, out]."""
    value = tiny.values({"h.0.attn.c_attn.weight": (16, 48)})
    base = tiny.write(tmp_path / "base", {}, value)
    lora = adapter(tmp_path / "lora", halves("h.0.attn.c_attn", 48, 16), fan_in_fan_out=True)
    checkpoint = open_checkpoint(base, (str(lora),))
    a, b = pair(48, 16, 0)
    expected = (value["h.0.attn.c_attn.weight"].float() + 4 * (b @ a).T).bfloat16()
    assert torch.equal(checkpoint.read("h.0.attn.c_attn.weight"), expected)
    torch.testing.assert_close(checkpoint.read("h.0.attn.c_attn.weight", 3, 7), expected[3:7])


@pytest.mark.parametrize("infix", ["", ".modules_to_save", ".modules_to_save.default"])
def test_modules_that_were_trained_whole(base: Path, tmp_path: Path, infix: str) -> None:
    head = torch.randn(320, 64, generator=torch.Generator().manual_seed(3))
    norm = torch.full((64,), 2.5)
    tensors = {f"lm_head{infix}.weight": head, f"model.norm{infix}.weight": norm} | halves(Q, 64, 64)
    lora = adapter(tmp_path / "lora", tensors, modules_to_save=["lm_head", "norm"])
    checkpoint = open_checkpoint(base, (str(lora),))
    assert torch.equal(checkpoint.read("lm_head.weight"), head.bfloat16())
    assert torch.equal(checkpoint.read("lm_head.weight", 5, 9), head[5:9].bfloat16())
    assert torch.equal(checkpoint.read("model.norm.weight"), norm.bfloat16())


def test_a_quantized_base_is_dequantized_where_it_changes(tmp_path: Path) -> None:
    scheme = AffineInt(4, 32)
    coded = scheme.encode(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    arrays = AWQFormat().pack("a.weight", coded) | AWQFormat().pack("b.weight", coded)
    block = AWQFormat().quantization_config({"a.weight": scheme})
    base = tiny.write(tmp_path / "base", {"quantization_config": block}, arrays)
    lora = adapter(tmp_path / "lora", halves("a", 8, 64))
    checkpoint = open_checkpoint(base, (str(lora),))
    assert checkpoint.tensors["a.weight"].scheme == Plain(torch.float32)
    assert torch.equal(checkpoint.read("a.weight"), merged(coded.dequantize(), 8, 64, 4))
    assert checkpoint.read_coded("a.weight") is None
    assert checkpoint.tensors["b.weight"].scheme == scheme
    assert torch.equal(checkpoint.read("b.weight"), coded.dequantize())
    found = checkpoint.read_coded("b.weight")
    assert found is not None
    assert torch.equal(found.arrays["codes"], coded.arrays["codes"])


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (halves(Q, 64, 64), {"use_dora": True}, "use_dora"),
        (halves(Q, 64, 64), {"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        (halves(Q, 64, 64), {"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        (halves(Q, 64, 64), {"lora_bias": True}, "lora_bias"),
        (halves(Q, 64, 64), {"bias": "all"}, "trained biases"),
        (halves(Q, 64, 64), {"peft_type": "IA3"}, "IA3"),
        (halves(Q, 64, 64), {"r": 0}, "rank 0"),
        (halves(Q, 64, 64), {"r": None}, "rank None"),
        ({**halves(Q, 64, 64), f"{Q}.lora_magnitude_vector": torch.ones(64)}, {}, "no part of a plain LoRA"),
        ({**halves(Q, 64, 64), f"{Q}.lora_B.bias": torch.ones(64)}, {}, "no part of a plain LoRA"),
        ({"model.embed_tokens.lora_embedding_A": torch.ones(4, 320)}, {}, "no part of a plain LoRA"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 64)}, {}, "has lora_A only"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 5)}, {}, "lora_B [64, 5]"),
        (halves("model.layers.7.mlp.up_proj", 128, 64), {}, "changes 'model.layers.7.mlp.up_proj.weight'"),
        (halves(Q, 96, 64), {}, "is for shape [96, 64], in "),
        (halves(DOWN, 128, 64), {}, "is for shape [128, 64], in "),
        (halves(Q, 64, 64) | {"lm_head.weight": torch.ones(321, 64)}, {}, "is for shape [321, 64], in "),
    ],
)
def test_adapters_that_cannot_be_merged(
    base: Path, tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], said: str
) -> None:
    lora = adapter(tmp_path / "lora", tensors, **config)
    with pytest.raises(InputError) as caught:
        open_checkpoint(base, (str(lora),))
    assert said in caught.value.message
    assert str(lora) in caught.value.message


def test_folders_that_are_no_adapter(base: Path, tmp_path: Path) -> None:
    for text in (str(tmp_path / "none"), str(base), f"{tmp_path / 'none'}:0.5"):
        with pytest.raises(InputError, match="no LoRA adapter"):
            open_checkpoint(base, (text,))
    for text in (f"{tmp_path / 'none'}:half", f"{tmp_path / 'none'}:nan", f"{tmp_path / 'none'}:"):
        with pytest.raises(InputError, match="no such adapter folder"):
            open_checkpoint(base, (text,))
    lora = adapter(tmp_path / "lora", halves(Q, 64, 64))
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: No such file"):
        open_checkpoint(base, (str(lora),))
    (lora / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"adapter_config\.json: holds no JSON object"):
        open_checkpoint(base, (str(lora),))


def test_a_run_quantizes_the_merged_model(base: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", halves(Q, 64, 64))
    before = weights(base)
    by_hand = dict(before) | {f"{Q}.weight": merged(before[f"{Q}.weight"], 64, 64, 2)}
    config = json.loads((base / "config.json").read_text())
    same = tiny.write(tmp_path / "same", config, by_hand)
    quantize.run(same, method="rtn", group_size=32, out=tmp_path / "one")
    report = quantize.run(base, method="rtn", group_size=32, adapters=(f"{lora}:0.5",), out=tmp_path / "two")
    one, two = tiny.contents(tmp_path / "one"), tiny.contents(tmp_path / "two")
    assert one["model.safetensors"] == two["model.safetensors"]
    assert one["config.json"] == two["config.json"]
    assert report.settings["adapters"] == ["lora:0.5"]
    assert b"lora:0.5" in two["README.md"]
    quantize.run(base, method="rtn", group_size=32, out=tmp_path / "three")
    assert tiny.contents(tmp_path / "three")["model.safetensors"] != one["model.safetensors"]
