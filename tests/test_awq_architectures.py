"""RTN and AWQ from folder to folder on tiny models of many architectures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file

import quantize
from quantize.errors import InputError
from quantize.schemes import Plain

# One of each kind at every run; where the others differ, tests of the sweep and of tracing see it.
ALWAYS = {"llama", "qwen2", "gemma3", "phi3", "cohere", "opt", "mixtral", "qwen2-moe", "deepseek-v3", "gpt-oss", "t5"}
ALWAYS |= {"gemma3n", "qwen3-next", "llava"}
NAMES = [pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.slow) for n in ARCHITECTURES if n != "gpt2"]
QUICK: dict[str, Any] = {"bits": 4, "group_size": 32, "eval": "none", "threads": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    lines = (f"On day {i} the boat '{'abcdefg'[i % 7]}' made {i * i % 97} miles; {i} is fine." for i in range(90))
    file.write_text("\n".join(lines))
    return file


def run(path: Path, out: Path, text: Path, **options: Any) -> Any:
    if options.get("method") == "awq":
        options |= {"calib": (str(text),), "calib_samples": 4, "calib_length": 32}
    return quantize.run(path, out=out, **(QUICK | options))


def measured(out: Path, base: Path, text: Path) -> float:
    found = quantize.evaluate(out, base=base, text=str(text), context=32, chunks=4, threads=2)
    assert math.isfinite(found.perplexity)
    assert math.isfinite(found.base_perplexity)
    return found.kl_divergence


@pytest.mark.parametrize("name", NAMES)
def test_from_folder_to_folder(name: str, text: Path, tmp_path: Path) -> None:
    path = architectures.save(name, tmp_path / name, torch.bfloat16)
    loss = {}
    for method in ("rtn", "awq"):
        out = tmp_path / method
        report = run(path, out, text, method=method)
        source, result = quantize.open(path), quantize.open(out)
        assert result.tensors.keys() == source.tensors.keys()
        coded = [name for name, info in result.tensors.items() if not isinstance(info.scheme, Plain)]
        assert coded
        assert set(report.errors) == set(coded)
        unused = "adapter_list" if name == "zamba2" else ".experts."
        assert all("saw no calibration token" in note and unused in note for note in report.notes)
        loss[method] = measured(out, path, text)
    # no bar, but a fold gone wrong would show
    assert loss["awq"] <= 1.3 * loss["rtn"]


def test_towers_are_copied(text: Path, tmp_path: Path) -> None:
    path = architectures.save("gemma3-vision", tmp_path / "source", torch.bfloat16)
    run(path, tmp_path / "out", text, method="awq")
    source, result = quantize.open(path), quantize.open(tmp_path / "out")
    others = [name for name in source.tensors if "language_model" not in name]
    assert any("vision_tower" in name for name in others)
    assert any("multi_modal_projector" in name for name in others)
    assert all(torch.equal(result.read(name), source.read(name)) for name in others)


def test_an_expert_without_tokens_is_named(text: Path, tmp_path: Path) -> None:
    path = architectures.save("qwen3-moe", tmp_path / "source", num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    norm = tensors["model.layers.0.post_attention_layernorm.weight"]
    router = tensors["model.layers.0.mlp.gate.weight"]
    # one channel far above the others, always of one sign, decides against the last expert
    tensors["model.layers.0.self_attn.o_proj.weight"][5] = 0
    tensors["model.embed_tokens.weight"][:, 5] = 40
    router[:, 5] = 0
    router[3, 5] = -10 * norm[5].sign()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    report = run(path, tmp_path / "out", text, method="awq")
    assert {note.split(":")[0] for note in report.notes} == {
        f"model.layers.0.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert all("saw no calibration token" in note for note in report.notes)
    assert measured(tmp_path / "out", path, text) < 0.5


def test_conv1d_is_refused_and_converted_as_it_is(text: Path, tmp_path: Path) -> None:
    path = architectures.save("gpt2", tmp_path / "source")
    for method in ("rtn", "awq"):
        with pytest.raises(InputError, match="no tensor of this model can be quantized"):
            run(path, tmp_path / method, text, method=method)
    quantize.run(path, format="hf", out=tmp_path / "out", threads=1)
    source, result = load_file(path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert source.keys() == result.keys()
    assert all(torch.equal(result[name], source[name]) for name in source)


def test_an_overflow_leaves_nothing_behind(text: Path, tmp_path: Path) -> None:
    path = architectures.save("llama", tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].mul_(3e38).clamp_(-3e38, 3e38)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1 gives \d+ NaN or Inf"):
        run(path, tmp_path / "out", text, method="awq")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["mixtral"])
def test_same_bytes_on_any_number_of_threads(name: str, text: Path, tmp_path: Path) -> None:
    path = architectures.save(name, tmp_path / "source", torch.bfloat16)
    before = torch.get_rng_state(), torch.get_num_threads()
    for threads in (1, 2):
        run(path, tmp_path / f"out{threads}", text, method="awq", threads=threads)
    assert (tmp_path / "out1/model.safetensors").read_bytes() == (tmp_path / "out2/model.safetensors").read_bytes()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
