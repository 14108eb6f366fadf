"""Faults that people reported against llama.cpp, Ollama and their tools, on the finished product.

The ids are those of the project's table of cases. What a module's own tests cover is not repeated here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantize
from quantize.errors import InputError, UsageError
from quantize.formats.gguf.container import read_part
from quantize.formats.gguf.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix
from quantize.kernels.cpu.ggml import ENCODERS
from quantize.schemes import parse_scheme

Cli = Callable[..., Any]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
ODD: dict[str, Any] = {"hidden_size": 320, "intermediate_size": 672, "num_attention_heads": 5, "num_key_value_heads": 5}
UP, STORED_UP = "blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are whole super-blocks."""
    return tiny.llama(tmp_path_factory.mktemp("wide") / "Wide", tokenizer=True, **WIDE)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral of four experts, of which each token takes one and none takes the last."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_experts_per_tok": 1, "vocab_size": tiny.VOCAB}
    folder = gguf_models.save("mixtral", tmp_path_factory.mktemp("experts") / "Experts", **sizes)
    tiny.byte_tokenizer(folder)

    def avoid(tensors: dict[str, Tensor]) -> None:
        for router in (value for name, value in tensors.items() if name.endswith("gate.weight")):
            router[3] = router[:3].mean(0)  # the mean is never the largest

    return change(folder, avoid)


@pytest.fixture(scope="module")
def importance(experts: Path) -> ImportanceMatrix:
    """Importance of `experts` over a short text."""
    return quantize.importance(experts, calib_samples=4, calib_length=64, threads=1)


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """A function that runs a command, checks that it ends in one line that holds some texts and leaves nothing."""

    def check(code: int, *words: object, names: tuple[object, ...]) -> str:
        before = listing(tmp_path)
        result = cli(*words)
        said: str = result.stderr
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert result.exit_code == code, said
        assert len(errors) == 1, said
        assert all(str(name) in errors[0] for name in names), said
        assert listing(tmp_path) == before
        return said

    return check


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrites the tensors of a folder after `edit` changed them in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spoilt(folder: Path, value: float, dtype: torch.dtype = torch.float32) -> Path:
    """A llama with one weight of that value in row 3, column 5."""
    weight = 0.05 * torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = value
    return tiny.llama(folder, tokenizer=True, dtype=dtype, extra={STORED_UP: weight.to(dtype)}, **WIDE)


def types(file: Path) -> dict[str, str]:
    return {name: str(stored.scheme) for name, stored in read_part(file).tensors.items()}


def decoded(file: Path) -> dict[str, Tensor]:
    """Every tensor under transformers' name, decoded."""
    model = quantize.open(file)
    return {name: model.read(name) for name in model.tensors}


def finite(file: Path) -> bool:
    """Whether no tensor reads back with NaN or Inf."""
    return all(bool(value.isfinite().all()) for value in decoded(file).values())


def stored_bytes(file: Path) -> dict[str, bytes]:
    """Payload of each tensor, read by the gguf package and not by us."""
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(file).tensors}


def one_each(model: Path) -> tuple[str, ...]:
    """Rules that give every block type to a matrix of its own, those of `ffn_down` left out."""
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")
    layers = quantize.open(model).config["num_hidden_layers"]
    names = [f"blk.{layer}.{kind}.weight" for layer in range(layers) for kind in kinds]
    return tuple(f"{name}={kind}" for name, kind in zip(names, ENCODERS, strict=False))


# -- what stands in the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_b01_there_and_back_for_every_number_of_heads(tmp_path: Path, kv: int) -> None:
    source = tiny.llama(tmp_path / "Source", tokenizer=True, num_key_value_heads=kv, num_hidden_layers=4)
    file = quantize.convert(source, format="gguf", out=tmp_path / "there.gguf").out
    back = quantize.convert(file, out=tmp_path / "Back").out
    there, again = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert there.keys() == again.keys()
    # norms are float32 in a GGUF file and come back as that
    assert all(torch.equal(value.float(), again[name].float()) for name, value in there.items())
    config = json.loads((back / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, kv)


def test_b09_rope_scaling_in_old_and_new_keys(tmp_path: Path) -> None:
    """The same keys in the header from `rope_scaling` and from `rope_parameters`; an unknown kind is refused."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    configs: dict[str, dict[str, Any]] = {
        "Old": {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **scaling}},
        "New": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **scaling}},
    }
    headers = []
    for name, rope in configs.items():
        folder = tiny.llama(tmp_path / name, tokenizer=True, **rope)
        made = read_part(quantize.convert(folder, format="gguf", out=tmp_path / f"{name}.gguf").out).metadata
        headers.append({key: value for key, value in made.items() if ".rope." in key})
    assert headers[0] == headers[1]
    assert headers[0]["llama.rope.scaling.type"] == "yarn"
    assert headers[0]["llama.rope.freq_base"] == 5e5
    odd = tiny.llama(tmp_path / "Odd", tokenizer=True, rope_scaling={"type": "spiral", "factor": 4.0})
    with pytest.raises(InputError, match="spiral"):
        quantize.plan(odd, type="Q8_0", out=tmp_path / "odd.gguf")


def test_b48_parts_into_one_and_into_other_parts(wide: Path, tmp_path: Path) -> None:
    """Split keys are made anew: gone in one file, other numbers in other parts, and the type's number stays."""
    run = quantize.run(wide, type="Q8_0", out=tmp_path / "cut.gguf", split_size=600_000)
    first = tmp_path / run.files[0]
    count = sum(name.endswith(".gguf") for name in run.files)
    assert count > 2
    four = quantize.run(first, type="Q4_0", requantize=True, out=tmp_path / "four.gguf").out
    assert not [key for key in read_part(four).metadata if key.startswith("split.")]
    again = quantize.convert(first, format="gguf", out=tmp_path / "again.gguf", split_size=900_000)
    parts = [read_part(tmp_path / name) for name in again.files if name.endswith(".gguf")]
    assert 1 < len(parts) < count
    for number, part in enumerate(parts):
        found = [part.metadata[f"split.{key}"] for key in ("no", "count", "tensors.count")]
        assert found == [number, len(parts), sum(len(each.tensors) for each in parts)]
    numbers = [read_part(first).metadata["general.file_type"], parts[0].metadata["general.file_type"]]
    assert numbers == [7, 7]


def test_b50_head_width_of_the_config(tmp_path: Path) -> None:
    narrow = tiny.llama(tmp_path / "Narrow", tokenizer=True, hidden_size=80, head_dim=16)
    header = read_part(quantize.run(narrow, type="Q8_0", out=tmp_path / "a.gguf").out).metadata
    widths = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    assert [header[f"llama.{key}"] for key in widths] == [16, 16, 16]
    assert quantize.open(tmp_path / "a.gguf").config["head_dim"] == 16


def test_b53_buffers_are_no_weights(wide: Path, tmp_path: Path) -> None:
    """Buffers of a folder are left out; divisors of the rope in a GGUF source are neither lost nor counted twice."""
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
    }
    source = tiny.llama(tmp_path / "Source", tokenizer=True, extra=buffers, **WIDE)
    plain = types(quantize.run(wide, type="Q4_0", out=tmp_path / "plain.gguf").out)
    assert types(quantize.run(source, type="Q4_0", out=tmp_path / "a.gguf").out) == plain
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    scaled = tiny.llama(tmp_path / "Scaled", tokenizer=True, rope_theta=5e5, rope_scaling=rope, **WIDE)
    file = quantize.convert(scaled, format="gguf", out=tmp_path / "scaled.gguf").out
    assert types(quantize.run(file, type="Q4_0", out=tmp_path / "b.gguf").out) == {**plain, "rope_freqs.weight": "f32"}
    back = quantize.convert(file, out=tmp_path / "Back").out
    assert "rope_freqs.weight" not in load_file(back / "model.safetensors")
    assert json.loads((back / "config.json").read_text())["rope_parameters"]["factor"] == 8.0


def test_b76_bf16_stays_bit_for_bit(tmp_path: Path) -> None:
    """Subnormals, negative zeros and the payload of NaNs; bf16 to f32 is exact as well."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).reshape(256, 256)
    weight = torch.cat([patterns, patterns.flip(0)]).view(torch.bfloat16)
    source = tiny.llama(tmp_path / "Source", tokenizer=True, extra={STORED_UP: weight}, **WIDE)
    options: dict[str, Any] = {"format": "gguf", "allow_nan": True}
    quantize.convert(source, out=tmp_path / "a.gguf", **options)
    held = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}[UP]
    assert np.array_equal(held.view(np.int16), weight.view(torch.int16).numpy())
    back = quantize.open(tmp_path / "a.gguf").read(STORED_UP)
    assert torch.equal(back.view(torch.int16), weight.view(torch.int16))
    quantize.convert(source, out=tmp_path / "b.gguf", dtype="f32", **options)
    longer = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}[UP]
    bits = (weight.view(torch.int16).to(torch.int32) << 16).numpy()
    finite = weight.isfinite().numpy()
    assert np.array_equal(longer.view(np.int32)[finite], bits[finite])


def test_b44_b45_b82_templates_rows_and_ids(tmp_path: Path) -> None:
    """Two templates are told apart, rows beyond the tokens are unused tokens, ids are there whatever is added."""
    source = tiny.llama(tmp_path / "Source", tokenizer=True, vocab_size=300)
    (source / "chat_template.jinja").write_text("of the file")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"chat_template": "of the settings", "add_bos_token": False}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("with tools")
    report = quantize.run(source, type="Q8_0", out=tmp_path / "a.gguf")
    assert [note for note in report.notes if "two chat templates" in note]
    part = read_part(report.out)
    assert part.metadata["tokenizer.chat_template"] == "of the file"
    assert part.metadata["tokenizer.chat_template.tools"] == "with tools"
    assert part.metadata["tokenizer.ggml.bos_token_id"] == 256
    assert part.metadata["tokenizer.ggml.add_bos_token"] is False
    assert len(part.array("tokenizer.ggml.tokens")) == 300
    assert part.array("tokenizer.ggml.token_type")[258:] == [5] * 42
    short = tiny.llama(tmp_path / "Short", tokenizer=True, vocab_size=257)
    with pytest.raises(InputError, match=r"tokens 257 '</s>', the embedding has 257 rows"):
        quantize.plan(short, type="Q8_0", out=tmp_path / "b.gguf")


def test_b05_b06_heads_that_are_the_embedding(tmp_path: Path, refused: Callable[..., str]) -> None:
    tied = tiny.llama(tmp_path / "Tied", tokenizer=True, tie_word_embeddings=True, **WIDE)
    file = quantize.run(tied, type="Q4_K_M", out=tmp_path / "tied.gguf").out
    assert "output.weight" not in types(file)
    assert types(file)["token_embd.weight"] == "q6_k"  # it is the head as well
    back = quantize.convert(file, out=tmp_path / "Back").out
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is True
    headless = tiny.llama(tmp_path / "Headless", tokenizer=True, drop=["lm_head.weight"], **WIDE)
    words = ("run", headless, "--type", "Q4_K_M", "--out", tmp_path / "b.gguf")
    assert "--assume-tied" in refused(3, *words, names=("lm_head.weight", "config.json"))
    assert types(quantize.run(headless, type="Q4_K_M", assume_tied=True, out=tmp_path / "b.gguf").out) == types(file)


def test_b10_a_broken_file_fails_the_gate(wide: Path, tmp_path: Path, cli: Cli) -> None:
    good = quantize.run(wide, type="Q8_0", out=tmp_path / "good.gguf").out
    bad = Path(shutil.copy(good, tmp_path / "bad.gguf"))
    part = read_part(bad).tensors["blk.0.ffn_down.weight"].extent
    with bad.open("r+b") as stream:  # rows moved by one
        stream.seek(part.offset)
        rows = stream.read(part.nbytes)
        stream.seek(part.offset)
        stream.write(rows[-(part.nbytes // 256) :] + rows[: -(part.nbytes // 256)])
    words = ("--base", wide, "--chunks", 2, "--context", 64, "--max-kld", 0.02)
    assert cli("eval", good, *words).exit_code == 0
    result = cli("eval", bad, *words)
    assert result.exit_code not in (0, 1, 2, 3)
    assert "max-kld" in result.stderr or "KL" in result.stderr


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_b55_eight_bit_floats_without_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    """Such weights are what they say, in bf16 and in f16; with scales, which only one kind has, they are scaled."""
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    source = tiny.llama(tmp_path / "Source", tokenizer=True, extra={STORED_UP: weight}, **WIDE)
    for name in ("bf16", "f16"):
        out = quantize.convert(source, format="gguf", dtype=name, out=tmp_path / f"{name}.gguf").out
        assert torch.equal(quantize.open(out).read(STORED_UP).float(), weight.float())
    twice = torch.full((4, 2), 2.0)
    scaled = tiny.llama(tmp_path / "Scaled", tokenizer=True, quantization_config={"quant_method": "fp8"},
                        extra={STORED_UP: weight, f"{STORED_UP}_scale_inv": twice}, **WIDE)  # fmt: skip
    out = tmp_path / "x.gguf"
    if dtype == torch.float8_e4m3fn:
        quantize.convert(scaled, format="gguf", dtype="bf16", out=out)
        assert torch.equal(quantize.open(out).read(STORED_UP).float(), 2 * weight.float())
        return
    with pytest.raises(InputError, match="fp8"):
        quantize.run(scaled, type="Q4_0", requantize=True, out=out)


def test_an_adapter_is_merged_before_rounding(wide: Path, tmp_path: Path) -> None:
    name, lora = "model.layers.0.self_attn.q_proj", tmp_path / "Lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    halves = {"lora_A": torch.full((2, 256), 0.1), "lora_B": torch.full((256, 2), 0.2)}
    save_file({f"base_model.model.{name}.{h}.weight": v for h, v in halves.items()}, lora / "adapter_model.safetensors")
    options: dict[str, Any] = {"format": "gguf", "adapters": (str(lora),), "dtype": "f32"}
    for source in (wide, quantize.convert(wide, format="gguf", out=tmp_path / "base.gguf").out):
        out = quantize.convert(source, out=tmp_path / f"{source.stem}-merged.gguf", **options).out
        base, merged = (quantize.open(path).read(f"{name}.weight").float() for path in (wide, out))
        assert torch.equal(merged, (base + 0.04).bfloat16().float())  # in the dtype of the source


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_b13_b17_a_type_that_a_row_does_not_fit(refused: Callable[..., str], tmp_path: Path, cli: Cli) -> None:
    """Known before the work: what stands in, and what that costs; or nothing is written."""
    odd = tiny.llama(tmp_path / "Odd", tokenizer=True, **ODD)
    out = tmp_path / "a.gguf"
    for option, rule in (("tensor_types", "attn_q=q4_k"), ("set", "*.attn_q=q4_k")):
        words = ("--set" if option == "set" else "--tensor-type", rule)
        names = ("blk.0.attn_q.weight cannot be q4_k", "width 320", "block size 256")
        for flag in ("--no-fallback", "--strict"):
            refused(2, "run", odd, "--type", "Q4_0", *words, flag, "--out", out, names=names)
        asked: dict[str, Any] = {option: (rule,)}
        report = quantize.run(odd, type="Q4_0", out=out, overwrite=True, **asked)
        assert types(report.out)["blk.0.attn_q.weight"] == "q5_0"
    done = json.loads(cli("run", odd, "--type", "Q4_K_M", "--dry-run", "--json", "--out", tmp_path / "b.gguf").stdout)
    assert done["planned_bits_per_weight"] < 5.1 < 5.9 < done["bits_per_weight"]
    table = cli("run", odd, "--type", "Q4_K_M", "--dry-run", "--out", tmp_path / "b.gguf").stdout
    assert "15 tensors, 95.6 % of the weights; 4.98 bits per weight were planned" in table
    refused(2, "run", odd, "--type", "Q4_K_M", "--no-fallback", "--out", tmp_path / "b.gguf", names=("width 320",))


def test_b14_a_very_small_model_takes_every_type(tmp_path: Path) -> None:
    """Rows of 64, and of 172, which no block divides: those stay floats."""
    small = tiny.llama(tmp_path / "Small", tokenizer=True, intermediate_size=172, vocab_size=512, num_hidden_layers=5)
    rules = one_each(small)
    # nothing here can have types that need importance but by a fallback, which needs none
    out = quantize.run(small, type="Q8_0", tensor_types=rules, imatrix="none", out=tmp_path / "a.gguf").out
    found = types(out)
    assert {kind for name, kind in found.items() if "ffn_down" in name} == {"f16"}
    given = {found[rule.split("=")[0]] for rule in rules}
    assert not given & {"f16", "f32", "bf16"}
    assert given >= {"q2_0", "q4_0", "q4_1", "q5_0", "q8_0", "iq4_nl", "mxfp4", "nvfp4"}
    assert finite(out)


def test_b67_only_matrices_are_quantized(tmp_path: Path, refused: Callable[..., str]) -> None:
    """A vision model gives its text model and says what is left out; a file of the vision tower is not taken."""
    config = tiny.llama_config(**WIDE)
    tensors = {f"language_model.{name}": value for name, value in tiny.values(tiny.llama_shapes(config)).items()} | {
        "vision_tower.vision_model.embeddings.patch_embedding.weight": torch.ones(8, 3, 14, 14),
        "multi_modal_projector.linear_1.weight": torch.ones(256, 8),
    }
    said = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": config,
            "vision_config": {"model_type": "clip_vision_model"}}  # fmt: skip
    source = tiny.write(tmp_path / "Llava", said, tensors, tokenizer=True)
    report = quantize.run(source, type="Q4_K_M", out=tmp_path / "a.gguf")
    assert "the text model only: 2 tensors of its other parts belong in an mmproj file" in report.notes
    text = tiny.llama(tmp_path / "Text", tokenizer=True, **WIDE)
    assert types(report.out) == types(quantize.run(text, type="Q4_K_M", out=tmp_path / "b.gguf").out)
    tower = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    tower.add_tensor("v.patch_embd.weight", np.ones((8, 3, 14, 14), np.float32))
    for step in (tower.write_header_to_file, tower.write_kv_data_to_file, tower.write_tensors_to_file, tower.close):
        step()
    words = ("run", tmp_path / "mmproj.gguf", "--type", "Q4_K_M", "--out", tmp_path / "c.gguf")
    refused(3, *words, names=("mmproj.gguf", "'clip'"))


def test_b67_convolutions_stay_floats(tmp_path: Path) -> None:
    """A model with convolutions: three dimensions in the folder, float32 in the file."""
    folder = gguf_models.save("lfm2", tmp_path / "Lfm", hidden_size=256, intermediate_size=256, vocab_size=tiny.VOCAB)
    tiny.byte_tokenizer(folder)
    assert any(value.dim() == 3 for value in load_file(folder / "model.safetensors").values())
    found = types(quantize.run(folder, type="Q4_K_M", out=tmp_path / "a.gguf").out)
    assert {kind for name, kind in found.items() if "shortconv.conv" in name} == {"f32"}
    assert "q4_k" in found.values()


# -- importance --------------------------------------------------------------------------------------------------------


def test_b18_an_expert_without_tokens(experts: Path, importance: ImportanceMatrix, tmp_path: Path) -> None:
    """It is named, weighed evenly, and the stack's importance is used all the same."""
    file = tmp_path / "m.gguf"
    write_imatrix(file, importance)
    counts = importance.entries["blk.0.ffn_up_exps.weight"].counts
    assert counts[3] == 0
    assert (counts[:3] > 0).all()
    for kind in ("IQ2_XXS", "Q2_K"):
        report = quantize.run(experts, type=kind, imatrix=file, out=tmp_path / f"{kind}.gguf")
        assert "blk.0.ffn_up_exps.weight: no token reached 1 of 4 experts: 3" in report.notes
        assert finite(report.out)
        source, kinds = quantize.open(experts), types(report.out)
        name = next(n for n in source.tensors if "layers.0" in n and "experts.3.w3" in n)
        alone = parse_scheme(kinds["blk.0.ffn_up_exps.weight"]).encode(source.read(name).float(), torch.ones(256))
        stack = stored_bytes(report.out)["blk.0.ffn_up_exps.weight"]
        assert stack.endswith(alone.arrays["blocks"].numpy().tobytes())


def test_b23_zeros_in_importance(tmp_path: Path) -> None:
    """Whole super-blocks of zeros and single ones: every type that uses importance stays finite and near."""
    deep = tiny.llama(tmp_path / "Deep", tokenizer=True, num_hidden_layers=5, **WIDE)
    plain = quantize.convert(deep, format="gguf", out=tmp_path / "plain.gguf").out
    shapes = {name: stored.shape for name, stored in read_part(plain).tensors.items() if len(stored.shape) > 1}
    sums = {name: np.ones((1, shape[-1]), np.float32) for name, shape in shapes.items()}
    for values in sums.values():
        values[0, :256] = 0
        values[0, 256::3] = 0
    file = tmp_path / "zeros.gguf"
    entries = {name: Importance(values, np.ones(1, np.float32)) for name, values in sums.items()}
    write_imatrix(file, ImportanceMatrix(entries, ("zeros",), 1, 1))
    out = quantize.run(deep, type="Q8_0", tensor_types=one_each(deep), imatrix=file, out=tmp_path / "a.gguf").out
    assert set(ENCODERS) <= set(types(out).values())
    weights, held = decoded(plain), decoded(out)
    for name, value in held.items():
        assert value.isfinite().all(), name
        assert (value - weights[name].float()).square().sum() < 0.7 * weights[name].float().square().sum(), name


def test_b69_importance_under_other_names(experts: Path, importance: ImportanceMatrix, tmp_path: Path) -> None:
    """A file that names experts one by one serves their stack; of one that fits nothing the counts are told."""
    split = {
        (name.replace("_exps", f".{e}") if "_exps" in name else name): (
            Importance(entry.sums[e : e + 1], entry.counts[e : e + 1]) if "_exps" in name else entry
        )
        for name, entry in importance.entries.items()
        for e in range(len(entry.counts))
    }
    one, other = tmp_path / "stacked.gguf", tmp_path / "single.gguf"
    write_imatrix(one, importance)
    write_imatrix(other, ImportanceMatrix(split, importance.datasets, importance.chunk_count, importance.chunk_size))
    assert "blk.0.ffn_up.2.weight" in read_imatrix(other).entries
    outs = [
        quantize.run(experts, type="IQ2_XXS", imatrix=f, out=tmp_path / f"{f.stem}-out.gguf").out for f in (one, other)
    ]
    assert stored_bytes(outs[0]) == stored_bytes(outs[1])
    foreign = {f"transformer.h.{n}": entry for n, entry in importance.entries.items()}
    write_imatrix(tmp_path / "foreign.gguf", ImportanceMatrix(foreign, (), 1, 64))
    with pytest.raises(InputError, match=r"none of the model's 14 tensors matched.*transformer\.h\.blk"):
        quantize.run(experts, type="Q4_K_M", imatrix=tmp_path / "foreign.gguf", out=tmp_path / "x.gguf")


def test_importance_of_another_model(wide: Path, importance: ImportanceMatrix, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "m.gguf"
    entries = {n: Importance(np.ones((1, 512), np.float32), e.counts[:1]) for n, e in importance.entries.items()}
    write_imatrix(file, ImportanceMatrix(entries, (), 1, 64))
    result = cli("run", wide, "--type", "Q4_K_M", "--imatrix", file, "--out", tmp_path / "a.gguf")
    assert result.exit_code == 3
    assert "has 512 values" in result.stderr
    assert "another model" in result.stderr
    for path in (wide, quantize.convert(wide, format="gguf", out=tmp_path / "model.gguf").out):
        result = cli("run", wide, "--type", "Q4_K_M", "--imatrix", path, "--out", tmp_path / "a.gguf")
        assert result.exit_code == 3
        assert str(path) in result.stderr


def test_b71_marks_of_turns_in_calibration_text(wide: Path, tmp_path: Path) -> None:
    """Chats go through the template, and the marks of turns are the model's own tokens."""
    source = Path(shutil.copytree(wide, tmp_path / "Chatty"))
    (source / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    chats, plain = tmp_path / "chats.jsonl", tmp_path / "plain.txt"
    turns = [{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "a chat of two turns"}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    plain.write_text("<s>what is this?</s><s>a chat of two turns</s>" * 40)
    options: dict[str, Any] = {"calib_samples": 4, "calib_length": 64, "threads": 1}
    made = [quantize.importance(source, calib=(str(file),), **options) for file in (chats, plain)]
    name = "blk.0.attn_q.weight"
    # the same ids, though one is a chat and the other spells the marks
    assert np.array_equal(made[0].entries[name].sums, made[1].entries[name].sums)
    options |= {"eval": "none", "type": "IQ2_XXS", "out": tmp_path / "a.gguf"}
    report = quantize.run(source, calib=(str(chats),), **options)
    assert report.settings["calibration_special_tokens"] > 16


# -- values ------------------------------------------------------------------------------------------------------------


def test_b29_nan_and_inf_in_the_source(experts: Path, tmp_path: Path, refused: Callable[..., str], cli: Cli) -> None:
    model = Path(shutil.copytree(experts, tmp_path / "Model"))
    expert = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    change(model, lambda tensors: tensors[expert][7, 5:6].fill_(float("nan")))
    words = ("run", model, "--type", "Q4_0", "--out", tmp_path / "a.gguf")
    file = model / "model.safetensors"
    said = refused(3, *words, names=(file, expert, "holds 1 NaN or Inf, first at [2, 7, 5]"))
    assert "--allow-nan" in said
    assert cli(*words, "--allow-nan").exit_code == 0
    # found where it is, and not by what it does to the passing text
    few = ("--calib-samples", 2, "--calib-length", 32)
    refused(3, "run", model, "--type", "IQ2_XXS", *few, "--out", tmp_path / "c.gguf", names=(file, expert, "1 NaN"))
    refused(3, "imatrix", model, *few, "--out", tmp_path / "m.gguf", names=(file, expert, "1 NaN or Inf"))
    norm = "model.layers.1.input_layernorm.weight"
    spoiled = tiny.llama(tmp_path / "Norm", tokenizer=True, extra={norm: torch.full((64,), float("inf"))})
    words = ("run", spoiled, "--type", "Q4_0", "--out", tmp_path / "b.gguf")
    refused(3, *words, names=(spoiled / "model.safetensors", norm, "holds 64 NaN or Inf"))


def test_b30_values_beyond_half_precision(tmp_path: Path) -> None:
    """No Inf is written, and nothing becomes 0 in silence: neither in floats nor by the scales of blocks."""
    large, small, huge = (spoilt(tmp_path / f"V{v:g}", v) for v in (1e5, 1e-9, 1e8))
    for options in ({"type": "F16"}, {"format": "gguf", "dtype": "f16"}):
        with pytest.raises(InputError, match=rf"'{STORED_UP}'.* has 1 values beyond f16, up to 100000") as caught:
            quantize.run(large, out=tmp_path / "x.gguf", **options)
        assert f"--set '{UP}=bf16'" in str(caught.value.hint)
        note = f"{UP}: 1 values too small for f16 became 0"
        out = tmp_path / f"small-{len(options)}.gguf"
        assert quantize.run(small, out=out, **options).notes == (note,)
    kept = quantize.run(large, type="F16", set=(f"{UP}=bf16",), out=tmp_path / "kept.gguf").out
    assert types(kept)[UP] == "bf16"
    for name in ("Q4_0", "Q8_0", "TQ2_0", "IQ4_NL"):
        with pytest.raises(InputError, match=rf"'{STORED_UP}'.* weights up to 1e\+08, too large for"):
            quantize.run(huge, type=name, out=tmp_path / "x.gguf")
    for name in ("Q4_K_M", "Q6_K"):  # scales of scales reach so far
        values = decoded(quantize.run(huge, type=name, out=tmp_path / f"{name}.gguf").out)[STORED_UP]
        assert 5e7 < values.abs().max() < 2e8
    assert not list(tmp_path.glob("x*"))


# -- sources -----------------------------------------------------------------------------------------------------------


def test_b39_a_shard_that_is_not_there(tmp_path: Path, refused: Callable[..., str]) -> None:
    """The file is named first; a block that the config counts and nobody stored is not counted in the file."""
    source = tiny.llama(tmp_path / "Source", tokenizer=True, shards=2)
    index = source / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["mtp.layers.0.mlp.up_proj.weight"] = "mtp.safetensors"
    index.write_text(json.dumps(table))
    words = ("run", source, "--type", "Q4_0", "--out", tmp_path / "a.gguf")
    refused(3, *words, names=("missing mtp.safetensors", "1 of 22 tensors"))
    folder = gguf_models.save("glm4moe", tmp_path / "Glm", num_nextn_predict_layers=1, vocab_size=tiny.VOCAB)
    tiny.byte_tokenizer(folder)
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    header = read_part(quantize.run(folder, type="Q8_0", out=tmp_path / "b.gguf").out).metadata
    assert header["glm4moe.block_count"] == 2
    assert not header.get("glm4moe.nextn_predict_layers")


def test_b56_quantized_folders(wide: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """AWQ is dequantized; what cannot be read is named and says what to use."""
    coded = quantize.run(wide, method="rtn", bits=4, group_size=64, out=tmp_path / "AWQ").out
    out = tmp_path / "a.gguf"
    said = refused(3, "run", coded, "--type", "Q4_0", "--out", out, names=("already quantized (int4-g64)",))
    assert "--requantize" in said
    assert types(quantize.run(coded, type="Q4_0", requantize=True, out=out).out)[UP] == "q4_0"
    for dtype, kind in ((None, "bf16"), ("f32", "f32")):
        plain = quantize.convert(coded, format="gguf", dtype=dtype, out=tmp_path / f"{kind}.gguf").out
        assert types(plain)[UP] == kind
        assert types(plain)["blk.0.attn_norm.weight"] == "f32"
        expected = quantize.open(coded).read(STORED_UP)
        held = quantize.open(plain).read(STORED_UP)
        assert torch.equal(held, expected.to(held.dtype))
    for name, method in (("Gptq", "gptq"), ("Nf4", "bitsandbytes")):
        other = tiny.llama(tmp_path / name, tokenizer=True, quantization_config={"quant_method": method, "bits": 4})
        said = refused(3, "run", other, "--type", "Q4_0", "--out", tmp_path / "x.gguf", names=(other, method))
        assert "model it was made from" in said


def test_b56_codes_that_gguf_holds_go_over_beside_floats(tmp_path: Path) -> None:
    """A folder of 4-bit experts converted: their codes stay, and what llama.cpp wants in float32 is that."""
    folder = gguf_models.save("gpt-oss", tmp_path / "Oss", dtype=torch.bfloat16, vocab_size=tiny.VOCAB)
    gguf_models.edit(folder, gguf_models.four_bit_experts())
    tiny.byte_tokenizer(folder)
    found = types(quantize.convert(folder, format="gguf", out=tmp_path / "a.gguf").out)
    assert found["blk.0.ffn_gate_exps.weight"] == "mxfp4"
    assert found["blk.0.attn_q.weight"] == "bf16"
    floats = ("attn_norm.weight", "attn_q.bias", "attn_sinks.weight", "ffn_gate_inp.weight", "ffn_down_exps.bias")
    assert {found[f"blk.0.{name}"] for name in floats} == {"f32"}


def test_b58_folders_that_hold_no_model(wide: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    lora, empty = tmp_path / "Lora", tmp_path / "Empty"
    lora.mkdir()
    empty.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, lora / "adapter_model.safetensors")
    words = ("--type", "Q4_0", "--out", tmp_path / "a.gguf")
    said = refused(3, "run", lora, *words, names=(lora, "LoRA"))
    assert f"quantize run org/base --adapter {lora}" in said
    refused(3, "run", empty, *words, names=(empty, "no model"))
    said = refused(3, "run", wide / "model.safetensors", *words, names=("model.safetensors", "no model"))
    assert f"name its folder: {wide}" in said


@pytest.mark.parametrize("command", [("run", "--type", "Q4_0"), ("convert", "--format", "gguf")])
def test_b87_every_tensor_is_known_before_the_first_byte(
    tmp_path: Path, refused: Callable[..., str], command: tuple[str, ...]
) -> None:
    """Helper tensors of unknown kinds, and whole numbers in the place of weights."""
    helper, packed = {"lm_head.weight._scale": torch.ones(320)}, torch.ones(128, 64, dtype=torch.uint8)
    words = (*command[1:], "--out", tmp_path / "a.gguf")
    source = tiny.llama(tmp_path / "Helper", tokenizer=True, extra=helper)
    refused(3, command[0], source, *words, names=(source, "lm_head.weight._scale", "no place"))
    source = tiny.llama(tmp_path / "Packed", tokenizer=True, extra={STORED_UP: packed})
    refused(3, command[0], source, *words, names=(source, STORED_UP, "u8"))


def test_b90_any_name_of_a_file_and_of_a_folder(
    wide: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of another name; a folder here that is called like a repository is the folder; odd paths."""
    monkeypatch.chdir(tmp_path)
    source = Path(shutil.copytree(wide, tmp_path / "org" / "my model ü"))
    (source / "model.safetensors").rename(source / "llama.safetensors")
    result = cli("run", "org/my model ü", "--type", "Q4_0")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "my model ü-Q4_0.gguf").exists()
    out = tmp_path / "out put.dir" / "ä b.gguf"
    out.parent.mkdir()
    quantize.run(source, type="Q4_0", out=out)
    assert out.read_bytes()[:4] == b"GGUF"
    nameless = Path(shutil.copy(out, tmp_path / "sha256-0123"))  # as Ollama keeps its files
    assert quantize.open(nameless).format == "gguf"
    back = quantize.convert(nameless, format="gguf", out=tmp_path / "back.gguf").out
    assert types(back) == types(out)


def test_b91_b35_parts_joined_by_other_means(wide: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Parts joined byte-wise are recognised; several parts on a command line are an error and lose nothing."""
    run = quantize.run(wide, type="Q8_0", out=tmp_path / "cut.gguf", split_size=600_000)
    parts = [tmp_path / name for name in run.files if name.endswith(".gguf")]
    (tmp_path / "joined.gguf").write_bytes(b"".join(part.read_bytes() for part in parts))
    words = ("convert", tmp_path / "joined.gguf", "--format", "gguf", "--out", tmp_path / "whole.gguf")
    said = refused(3, *words, names=("parts joined byte-wise",))
    assert "quantize convert" in said
    refused(2, "convert", *parts, tmp_path / "whole.gguf", "--format", "gguf", names=("unexpected extra argument",))
    refused(2, "run", *parts, "--type", "Q4_0", names=("unexpected extra argument",))
    for part in parts:
        words = ("convert", parts[0], "--format", "gguf", "--overwrite", "--out", part)
        refused(2, *words, names=(part.name, "the same"))
    parts[1].unlink()
    words = ("convert", parts[0], "--format", "gguf", "--out", tmp_path / "whole.gguf")
    refused(3, *words, names=(f"missing {parts[1].name}", f"1 of {len(parts)} parts"))


# -- the command -------------------------------------------------------------------------------------------------------


def test_b89_dry_runs_touch_nothing(wide: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = quantize.run(wide, type="Q8_0", out=tmp_path / "cut.gguf", split_size=600_000)
    part = tmp_path / run.files[0]
    whole = quantize.convert(part, format="gguf", out=tmp_path / "whole.gguf").out
    matrix = tmp_path / "old.imatrix.gguf"
    quantize.importance(wide, out=matrix, calib_samples=1, calib_length=16)
    before = listing(tmp_path)
    for words in (
        ("run", wide, "--type", "IQ2_XXS", "--imatrix", "new.gguf", "--ollama"),
        ("run", wide, "--type", "Q4_K_M", "--split-size", "1MB"),
        ("run", whole, "--type", "Q4_0", "--requantize"),
        ("convert", part, "--format", "gguf"),
        ("convert", whole, "--format", "hf"),
        ("imatrix", wide, "--out", "importance.gguf"),
        ("imatrix", matrix, matrix, "--out", "both.gguf"),
        ("edit", whole, "--put", "general.name=other"),
        ("edit", whole, "--put", f"general.name={'long ' * 1000}"),
    ):
        result = cli(*words, "--dry-run")
        assert result.exit_code == 0, result.stderr
        assert listing(tmp_path) == before


def test_names_that_are_unknown(wide: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Types, ways of splitting and architectures: the nearest or all that there are."""
    base = ("run", wide, "--out", tmp_path / "a.gguf", "--type")
    assert "did you mean 'Q4_K_S'?" in refused(2, *base, "Q4_K_X", names=("unknown GGUF type 'Q4_K_X'",))
    assert "--set '*=nvfp4'" in refused(2, *base, "NVFP4", names=("a type of tensors, not of whole files",))
    for words in (("--output-type", "q9"), ("--embedding-type", "q9"), ("--tensor-type", "ffn=q9")):
        assert "q8_0" in refused(2, *base, "Q4_0", *words, names=("unknown GGML type 'q9'",))
    assert "llama-bpe" in refused(2, *base, "Q4_0", "--pre", "llama9", names=("llama9",))
    assert "qwen3moe" in refused(3, *base, "Q4_0", "--arch", "qwen9", names=("qwen9",))


def test_a_class_that_is_unknown(tmp_path: Path, refused: Callable[..., str]) -> None:
    """It is taken as what --arch says."""
    own = {"architectures": ["MyOwnForCausalLM"], "model_type": "my_own"}
    source = tiny.llama(tmp_path / "Own", tokenizer=True, **own, **WIDE)
    words = ("run", source, "--type", "Q4_0", "--out", tmp_path / "a.gguf")
    assert "--arch llama" in refused(3, *words, names=("MyOwnForCausalLM",))
    quantize.run(source, type="Q4_0", arch="llama", pre="llama-bpe", out=tmp_path / "a.gguf")
    header = read_part(tmp_path / "a.gguf").metadata
    assert header["general.architecture"] == "llama"
    assert header["tokenizer.ggml.pre"] == "llama-bpe"


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "Source", **WIDE)
    report = quantize.run(source, type="Q4_0", out=tmp_path / "a.gguf")
    assert report.notes == ("no tokenizer beside the model: the file holds none",)
    assert read_part(report.out).metadata["tokenizer.ggml.model"] == "none"
    with pytest.raises(InputError, match="holds no tokenizer, which text needs") as caught:
        quantize.run(source, type="IQ2_XXS", out=tmp_path / "b.gguf", **tiny.QUICK)
    assert "--imatrix FILE" in str(caught.value.hint)


def test_pure_gives_every_matrix_one_type(wide: Path, tmp_path: Path) -> None:
    found = types(quantize.run(wide, type="Q4_K_M", pure=True, out=tmp_path / "a.gguf").out)
    assert {kind for name, kind in found.items() if "norm" not in name} == {"q4_k"}


def test_inspect_tells_what_an_edit_and_a_run_changed(wide: Path, tmp_path: Path, cli: Cli) -> None:
    one = quantize.run(wide, type="Q4_K_M", out=tmp_path / "one.gguf").out
    other = quantize.run(wide, type="Q4_K_M", output_type="q8_0", out=tmp_path / "other.gguf").out
    assert cli("edit", other, "--put", "general.name=Renamed").exit_code == 0
    found = json.loads(cli("inspect", one, other, "--contents", "--json").stdout)
    assert set(found["tensors"]["changed"]) == {"output.weight"}
    assert found["metadata"]["changed"]["general.name"][1]["value"] == "Renamed"
    assert found["differing"] == []


def test_types_of_a_file_that_is_of_another_model(wide: Path, tmp_path: Path) -> None:
    one = quantize.run(
        tiny.llama(tmp_path / "One", tokenizer=True, num_hidden_layers=1, **WIDE),
        type="Q4_0",
        out=tmp_path / "one.gguf",
    ).out
    report = quantize.run(wide, type="Q2_K", recipe=one, out=tmp_path / "a.gguf")
    assert types(report.out)["blk.0.ffn_up.weight"] == "q4_0"
    assert types(report.out)["blk.1.ffn_up.weight"] == "q2_k"
    assert [note for note in report.notes if note.startswith("9 tensors such as blk.1.attn_norm.weight are not in")]
    tower = gguf.GGUFWriter(tmp_path / "other.gguf", "clip")
    tower.add_tensor("v.blk.0.attn_q.weight", np.ones((32, 32), np.float32))
    for step in (tower.write_header_to_file, tower.write_kv_data_to_file, tower.write_tensors_to_file, tower.close):
        step()
    with pytest.raises(UsageError, match="has no tensor of this model"):
        quantize.plan(wide, type="Q2_K", recipe=tmp_path / "other.gguf", out=tmp_path / "b.gguf")


def test_options_that_would_do_nothing_are_refused(wide: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    run = ("run", wide, "--out", tmp_path / "a.gguf", "--type", "Q4_0")
    for words in (("--bits", 3), ("--group-size", 64), ("--sym",)):
        refused(2, *run, *words, names=(f"{words[0]} has no meaning beside --type Q4_0",))
    folder = ("--out", tmp_path / "Out")
    for words in (("--imatrix", "m.gguf"), ("--pure",), ("--tensor-type", "attn_q=q8_0"), ("--ollama",)):
        refused(
            2, "run", wide, "--method", "rtn", *folder, *words, names=(f"{words[0]} has no meaning for format awq",)
        )
    refused(2, "convert", wide, *folder, "--pre", "llama-bpe", names=("--pre has no meaning for format hf",))
    refused(2, *run, "--split-size", 0, names=("--split-size",))


def test_parts_are_named_by_what_opens_them(wide: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """The report, its hints and the Modelfile name the first part; nobody's Modelfile is replaced unasked."""
    mine = tmp_path / "a.gguf.Modelfile"
    mine.write_text("mine")
    words = ("run", wide, "--type", "Q8_0", "--ollama", "--out", tmp_path / "a.gguf")
    refused(2, *words, names=(mine, "exists already"))
    report = quantize.run(wide, type="Q8_0", ollama=True, split_size=600_000, out=tmp_path / "cut.gguf")
    assert report.out == tmp_path / report.files[0]
    assert (tmp_path / f"{report.files[0]}.Modelfile").read_text().splitlines()[1] == f"FROM ./{report.files[0]}"
    assert all((tmp_path / name).exists() for name in report.files)
    assert mine.read_text() == "mine"


# -- memory ------------------------------------------------------------------------------------------------------------

_LIMITED = """
import resource, sys
import torch, quantize, transformers
small, large, out, limit = sys.argv[1:]
quantize.run(small, type="Q8_0", out=f"{out}.gguf", threads=1)  # what is loaded and compiled once is not counted
held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(limit),) * 2)
try:
    torch.empty(2 * int(limit), dtype=torch.uint8).fill_(1)
except (RuntimeError, MemoryError):
    print("limited")
quantize.convert(large, format="gguf", dtype="f16", out=out + "a.gguf", threads=1)
quantize.run(large, type="Q8_0", out=out + "b.gguf", threads=1)
"""


def hollow(folder: Path, config: dict[str, Any], shards: int) -> Path:
    """Writes a model of zeros whose shards have holes where the weights are: no disk is needed for them."""
    names = list(shapes := tiny.llama_shapes(config))
    tiny.write(folder, config, {"none": torch.zeros(1)}, tokenizer=True)
    (folder / "model.safetensors").unlink()
    for shard in range(shards):
        header, end = {}, 0
        for name in names[shard::shards]:
            start, end = end, end + 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        file = folder / f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(file, 8 + len(text) + end)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of data holds on Linux only")
def test_b31_a_model_larger_than_the_memory_allowed(tmp_path: Path) -> None:
    """180 MB of weights in shards with 96 MB of memory beyond what the libraries hold."""
    small = tiny.llama(tmp_path / "Small", tokenizer=True, **WIDE)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    large = hollow(tmp_path / "Large", tiny.llama_config(num_hidden_layers=5, **sizes), shards=3)
    assert sum(file.stat().st_size for file in large.glob("*.safetensors")) > 165e6
    out, limit = tmp_path / "out", 96 * 2**20
    command = [sys.executable, "-c", _LIMITED, small, large, out, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["limited"]
    assert types(tmp_path / "outb.gguf")["blk.4.ffn_up.weight"] == "q8_0"
