"""Whole runs on tiny models: values, ties, side files, and reports that are the same wherever and whenever they run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

import quantize
from quantize.errors import InputError, UsageError
from quantize.methods.base import Result
from quantize.methods.rtn import RTN
from quantize.schemes import AffineInt, Plain

BF16 = torch.bfloat16
SIMPLE: dict[str, Any] = {"method": "rtn", "group_size": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("pipeline") / "Model", tokenizer=True)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize.run(model, out=tmp_path_factory.mktemp("quantized") / "Out", **SIMPLE).out


def weights(path: Path) -> dict[str, Tensor]:
    checkpoint = quantize.open(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def config(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return value


# ------------------------------------------------------------------------------------------------------------
# Values


def test_nearest_rounding_end_to_end(model: Path, quantized: Path) -> None:
    before, after = weights(model), weights(quantized)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if re.search(r"_proj\.weight$", name):
            expected = AffineInt(4, 32).encode(value).dequantize()
            assert torch.equal(after[name], expected)
        else:
            assert after[name].dtype == value.dtype
            assert torch.equal(after[name], value)


def test_errors_in_the_report_are_those_of_the_files(model: Path, tmp_path: Path) -> None:
    report = quantize.run(model, out=tmp_path / "Out", **SIMPLE)
    before, after = weights(model), weights(tmp_path / "Out")
    assert list(report.errors) == sorted(report.errors)
    assert len(report.errors) == 14
    for name, error in report.errors.items():
        lost = (after[name] - before[name].float()).square().sum() / before[name].float().square().sum()
        assert error == pytest.approx(float(lost), rel=1e-4)
        assert 0 < error < 0.05


@pytest.mark.parametrize("dtype", [None, "f32", "bf16", "f16"])
def test_converting_back_gives_exactly_the_coded_values(quantized: Path, tmp_path: Path, dtype: str | None) -> None:
    quantize.convert(quantized, out=tmp_path / "Out", dtype=dtype)
    coded, back = weights(quantized), weights(tmp_path / "Out")
    assert coded.keys() == back.keys()
    expected = {"f32": torch.float32, "f16": torch.float16}.get(dtype or "bf16", BF16)
    for name, value in coded.items():
        assert back[name].dtype == expected
        assert torch.equal(back[name], value.to(expected)), name
    written = config(tmp_path / "Out")
    assert "quantization_config" not in written
    assert "torch_dtype" not in written
    assert written["dtype"] == str(expected).removeprefix("torch.")


def test_converting_a_plain_model_copies_it(model: Path, tmp_path: Path) -> None:
    quantize.convert(model, out=tmp_path / "Out")
    before, after = tiny.contents(model), tiny.contents(tmp_path / "Out")
    copies = weights(tmp_path / "Out")
    assert all(torch.equal(copies[name], value) for name, value in weights(model).items())
    assert config(tmp_path / "Out") == config(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert before[name] == after[name]


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    """Values are computed here from the blocks; queries and keys are stored in rotary pairs."""
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj",
             "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    settings = tiny.llama_config(num_hidden_layers=1)
    values = tiny.values(tiny.llama_shapes(settings), dtype=torch.float32)
    writer = gguf.GGUFWriter(tmp_path / "Name-Q8_0.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(320)
    expected: dict[str, Tensor] = {}
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for short, long in outer.items() | {f"blk.0.{s}": f"model.layers.0.{n}" for s, n in names.items()}.items():
        value = values[f"{long}.weight"]
        if short.endswith(("attn_q", "attn_k")):
            value = value.reshape(-1, 2, 8, 64).transpose(1, 2).reshape(value.shape)
        kind = Type.F32 if value.dim() == 1 else Type.Q8_0
        stored = gguf.quantize(value.numpy(), kind)
        writer.add_tensor(f"{short}.weight", stored, raw_dtype=kind)
        read = torch.from_numpy(np.array(gguf.dequantize(stored, kind)))
        if short.endswith(("attn_q", "attn_k")):
            read = read.reshape(-1, 8, 2, 64).transpose(1, 2).reshape(read.shape)
        expected[f"{long}.weight"] = read
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = quantize.convert(tmp_path / "Name-Q8_0.gguf", out=tmp_path / "Out", dtype="f32")
    back = weights(tmp_path / "Out")
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], value) for name, value in expected.items())
    assert "dequantized" in report.base
    assert "Name-Q8_0" in report.base


def test_odd_tensors_are_copied_bit_for_bit(tmp_path: Path) -> None:
    bits = torch.tensor([0x0001, 0x007F, -0x8000], dtype=torch.int16)
    extra = {
        "mtp.scalar": torch.tensor(2.5),
        "mtp.empty": torch.zeros(0, 7),
        "mtp.hollow": torch.zeros(3, 0, dtype=BF16),
        "mtp.subnormal": bits.view(BF16),
        "mtp.eighths": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
        "mtp.flags": torch.tensor([True, False, True]),
        "mtp.large": torch.tensor([2**62, -1]),
        "mtp.cube": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).half(),
    }
    model = tiny.llama(tmp_path / "Model", extra=extra)
    for out, options in (("one", SIMPLE), ("two", {"format": "hf"})):
        quantize.run(model, out=tmp_path / out, **options)
        found = weights(tmp_path / out)
        for name, value in extra.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert found[name].reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


def test_every_source_tensor_is_in_the_output_or_in_a_named_drop(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.2.embed_tokens.weight": torch.ones(320, 64, dtype=BF16),
        "visual.patch_embed.weight": torch.ones(8, 3, 2, 2, dtype=BF16),
    }
    model = tiny.llama(tmp_path / "Model", extra=extra, shards=2, tokenizer=True)
    stored = {*tiny.llama_shapes(tiny.llama_config()), *extra}
    for out, options in (("rtn", SIMPLE), ("awq", tiny.QUICK | {"method": "awq"}), ("hf", {"format": "hf"})):
        job = quantize.plan(model, out=tmp_path / out, **options)
        report = quantize.run(model, out=tmp_path / out, **options)
        assert {*quantize.open(tmp_path / out).tensors, *job.dropped} == stored
        assert all(job.dropped.values())
        assert report.figures["tensors"] + report.figures["dropped"] == len(stored)


# ------------------------------------------------------------------------------------------------------------
# Numbers that do not fit


def test_a_cast_that_would_overflow_names_the_tensor(tmp_path: Path) -> None:
    big = torch.full((64,), 1e5, dtype=BF16)
    model = tiny.llama(tmp_path / "Model", extra={"model.norm.weight": big})
    with pytest.raises(InputError, match=r"tensor 'model\.norm\.weight' has 64 values beyond f16, up to") as caught:
        quantize.convert(model, out=tmp_path / "Out", dtype="f16")
    assert "bf16" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["Model"]


@pytest.mark.parametrize("options", [{"format": "hf", "dtype": "f16"}, {**SIMPLE, "set": ("mtp.*=f16",)}])
def test_values_that_a_cast_makes_zero_are_counted(tmp_path: Path, options: dict[str, Any]) -> None:
    small = torch.tensor([[1e-9, 0.0, 1.0], [-1e-12, 0.0, 6e-8]], dtype=BF16)
    model = tiny.llama(tmp_path / "Model", extra={"mtp.small": small})
    report = quantize.run(model, out=tmp_path / "Out", **options)
    assert report.notes == ("mtp.small: 2 values too small for f16 became 0",)
    assert "2 values too small" in (tmp_path / "Out" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match=r"--strict: mtp\.small: 2 values"):
        quantize.run(model, out=tmp_path / "Strict", strict=True, **options)
    assert not (tmp_path / "Strict").exists()
    assert not (tmp_path / "Strict.partial").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "mtp.scalar"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, name: str, bad: float) -> None:
    shape = (tiny.llama_shapes(tiny.llama_config()) | {"mtp.scalar": ()})[name]
    value = torch.ones(shape, dtype=BF16)
    value[(-1,) * len(shape)] = bad
    model = tiny.llama(tmp_path / "Model", extra={name: value})
    with pytest.raises(InputError, match=f"'{name}' holds 1 NaN or Inf") as caught:
        quantize.run(model, out=tmp_path / "Out", **SIMPLE)
    assert "--allow-nan" in caught.value.hint
    assert str(model / "model.safetensors") in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["Model"]
    quantize.run(model, out=tmp_path / "Out", allow_nan=True, **SIMPLE)
    assert (tmp_path / "Out").is_dir()


def test_huge_and_tiny_weights_stay_finite(tmp_path: Path) -> None:
    """As the last projection of a merged model, ten thousand times too large, and a layer of nothing."""
    shapes = tiny.llama_shapes(tiny.llama_config())
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    extra = {name: value * factor for (name, value), factor in zip(
        tiny.values({up: shapes[up], down: shapes[down]}).items(), (1e-8, 1e4), strict=True)}  # fmt: skip
    extra["model.layers.0.mlp.up_proj.weight"] = torch.zeros(shapes[up], dtype=BF16)
    model = tiny.llama(tmp_path / "Model", extra=extra, tokenizer=True)
    for out, options in (("rtn", SIMPLE), ("awq", tiny.QUICK | {"method": "awq", "group_size": 32})):
        report = quantize.run(model, out=tmp_path / out, **options)
        assert all(math.isfinite(error) for error in report.errors.values())
        found = quantize.open(tmp_path / out)
        for name in found.tensors:
            coded = found.read_coded(name)
            assert coded is None or bool(coded.arrays["scales"].isfinite().all())
        assert not found.read("model.layers.0.mlp.up_proj.weight").any()


# ------------------------------------------------------------------------------------------------------------
# Ties and heads


@pytest.mark.parametrize(
    ("flag", "head", "tied"),
    [
        (False, True, False),
        (True, False, True),
        (..., True, False),  # a llama's config that is silent means untied
    ],
)
def test_the_tie_is_written_as_the_model_has_it(tmp_path: Path, flag: Any, head: bool, tied: bool) -> None:
    drop = [] if head else ["lm_head.weight"]
    model = tiny.llama(tmp_path / "Model", tie_word_embeddings=flag, drop=drop)
    for out, options in (("rtn", SIMPLE), ("hf", {"format": "hf"})):
        quantize.run(model, out=tmp_path / out, **options)
        assert config(tmp_path / out)["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in quantize.open(tmp_path / out).tensors) == head


def test_a_silent_config_of_a_class_that_ties(tmp_path: Path) -> None:
    settings = tiny.llama_config(architectures=["GemmaForCausalLM"], model_type="gemma", head_dim=16)
    del settings["tie_word_embeddings"]
    tensors = tiny.values(tiny.llama_shapes(settings | {"tie_word_embeddings": True}))
    model = tiny.write(tmp_path / "Model", settings, tensors)
    quantize.run(model, out=tmp_path / "Out", **SIMPLE)
    assert config(tmp_path / "Out")["tie_word_embeddings"] is True


def test_a_tie_that_only_the_text_config_names_is_made_explicit(tmp_path: Path) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = tiny.llama_config(tie_word_embeddings=True)
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "hidden_size": 32,
              "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    made = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=3))
    made.save_pretrained(tmp_path / "Model")
    stored = config(tmp_path / "Model")
    del stored["tie_word_embeddings"]
    (tmp_path / "Model" / "config.json").write_text(json.dumps(stored))
    assert not any("lm_head" in name for name in quantize.open(tmp_path / "Model").tensors)
    quantize.run(tmp_path / "Model", out=tmp_path / "Out", **SIMPLE)
    written = config(tmp_path / "Out")
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is True
    assert "quantization_config" in written
    kept = written["quantization_config"]["modules_to_not_convert"]
    assert any("vision_tower" in name for name in kept)
    assert any("multi_modal_projector" in name for name in kept)


def test_a_missing_head_is_one_early_message(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Model", drop=["lm_head.weight"])
    for work in (quantize.plan, quantize.run):
        with pytest.raises(InputError, match=r"'lm_head\.weight' is missing.*tie_word_embeddings is false") as caught:
            work(model, out=tmp_path / "Out", **SIMPLE)
        assert "--assume-tied" in caught.value.hint
    quantize.run(model, out=tmp_path / "Out", assume_tied=True, **SIMPLE)
    assert config(tmp_path / "Out")["tie_word_embeddings"] is True


@pytest.mark.parametrize("flag", [True, False])
def test_transformers_loads_what_we_convert_and_computes_the_same(tmp_path: Path, flag: bool) -> None:
    from transformers import AutoModelForCausalLM

    drop = ["lm_head.weight"] if flag else []
    model = tiny.llama(tmp_path / "Model", tie_word_embeddings=flag, drop=drop)
    quantize.convert(model, out=tmp_path / "Out")
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (model, tmp_path / "Out")
        )
    assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------------
# Files beside the weights


def test_side_files_are_carried_byte_for_byte(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Model", tokenizer=True)
    side = {
        "generation_config.json": b'{"temperature":0.6}  ',
        "preprocessor_config.json": b"{}\r\n",
        "processor_config.json": b"\xef\xbb\xbf{}",
        "chat_template.jinja": "{{ 'ü' }}".encode(),
        "additional_chat_templates/tools.jinja": b"{# tools #}",
        "modeling_custom.py": b"import torch\n",
        "LICENSE": b"do as you like",
        "tokenizer.model": bytes(range(256)),
        "1_Pooling/config.json": b"{}",
    }
    for name, content in side.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content)
    side |= {name: (model / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: de\ntags: [x]\n---\n# My model\n\nIt speaks.\n")
    (model / "quantize.json").write_text("an older report")
    for out, options in (("rtn", SIMPLE), ("awq", tiny.QUICK | {"method": "awq", "group_size": 32})):
        report = quantize.run(model, out=tmp_path / out, **options)
        found = tiny.contents(tmp_path / out)
        assert {name: found[name] for name in side} == side
        ours = {"README.md", "config.json", "quantize.json", "model.safetensors"}
        assert found.keys() == side.keys() | ours
        assert sorted(found) == list(report.files)
        card = found["README.md"].decode()
        assert card.startswith("---\nbase_model: Model\nbase_model_relation: quantized\nlibrary_name: transformers\n")
        assert "license: mit\n" in card
        assert "language: de\n" in card
        assert card.endswith("## Card of the source\n\n# My model\n\nIt speaks.\n")


def test_the_config_keeps_what_it_had(tmp_path: Path) -> None:
    more = {"auto_map": {"AutoModel": "modeling_custom.X"}, "unknown": [1, {"a": None}], "name": "Größe"}
    model = tiny.llama(tmp_path / "Model", **more)
    quantize.run(model, out=tmp_path / "Out", **SIMPLE)
    written = config(tmp_path / "Out")
    block = written.pop("quantization_config")
    assert written == config(model)
    assert block["group_size"] == 32
    assert "Größe" in (tmp_path / "Out" / "config.json").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# The same bytes


def test_reports_do_not_tell_when_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for place in ("one", "two with a longer name"):
        base = tmp_path / place
        model = tiny.llama(base / "Model", tokenizer=True)
        (base / "text.txt").write_text("Some words to calibrate on, and then some more of them. " * 60)
        (base / "recipe.yaml").write_text("rules: [{match: '*.0.*.down_proj', scheme: keep}]")
        monkeypatch.chdir(base if found else tmp_path)
        options = tiny.QUICK | {"method": "awq", "group_size": 32, "calib": (str(base / "text.txt"),)}
        options |= {"recipe": base / "recipe.yaml", "eval": str(base / "text.txt"), "statistics": base / "statistics"}
        name = "Model" if found else str(model)
        quantize.run(name, out=base / "Out", **options)
        found.append(tiny.contents(base / "Out"))
    assert found[0] == found[1]
    for name, content in found[0].items():
        if not name.endswith(".safetensors"):
            assert str(tmp_path).encode() not in content, name
            assert not re.search(rb"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", content), name
    report = json.loads(found[0]["quantize.json"])
    assert report["source"] == "Model"
    assert report["settings"]["calibration"] == "text.txt"
    assert report["quality"]["protocol"]["text"] == "text.txt"


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_threads_change_nothing(model: Path, tmp_path: Path, method: str) -> None:
    found = []
    for threads in (1, 2, 3):
        options = tiny.QUICK | {"method": method, "group_size": 32, "threads": threads}
        quantize.run(model, out=tmp_path / str(threads) / "Out", **options)
        found.append(tiny.contents(tmp_path / str(threads) / "Out"))
    assert found[0] == found[1] == found[2]


def test_the_callers_threads_and_random_state_are_left_alone(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    np.random.seed(7)
    numpy_before = np.random.get_state()[1].tolist()
    quantize.run(model, out=tmp_path / "Out", **(tiny.QUICK | {"method": "awq"}))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert np.random.get_state()[1].tolist() == numpy_before


@pytest.mark.parametrize(
    ("given", "said", "name"),
    [
        ("{}/models--org--Some-Model/snapshots/0123abc", "org/Some-Model", "Some-Model-RTN-Int4"),
        ("{}/Some.Model-1.5B", "Some.Model-1.5B", "Some.Model-1.5B-RTN-Int4"),
        ("{}/link", "Some.Model-1.5B", "Some.Model-1.5B-RTN-Int4"),
        ("{}/Some.Model-1.5B/", "Some.Model-1.5B", "Some.Model-1.5B-RTN-Int4"),
    ],
)
def test_names_of_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("models--org--Some-Model/snapshots/0123abc", "Some.Model-1.5B"):
        tiny.llama(tmp_path / "in" / place)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "in" / "Some.Model-1.5B")
    report = quantize.run(given.format(tmp_path / "in"), **SIMPLE)
    assert (report.source, str(report.out)) == (said, name)
    assert (tmp_path / name).is_dir()


# ------------------------------------------------------------------------------------------------------------
# Strictness, tokens, second roundings


def test_strict_refuses_what_a_method_had_to_do(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Result] = RTN.quantize

    def with_note(self: RTN, block: Any, pool: Any) -> Result:
        result = real(self, block, pool)
        return Result(result.coded, notes=(f"{block.name}: saw no calibration token",))

    monkeypatch.setattr(RTN, "quantize", with_note)
    report = quantize.run(model, out=tmp_path / "Out", **SIMPLE)
    assert len(report.notes) == 14
    with pytest.raises(UsageError, match=r"--strict: model\.layers\.0.* saw no calibration token"):
        quantize.run(model, out=tmp_path / "Strict", strict=True, **SIMPLE)
    assert [path.name for path in tmp_path.iterdir()] == ["Out"]


def test_tokens_that_the_embedding_lacks_are_named(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Model", tokenizer=True, vocab_size=60)
    with pytest.raises(InputError, match=r"its tokenizer gives tokens \d+.*its embedding has 60 rows") as caught:
        quantize.run(model, out=tmp_path / "Out", **(tiny.QUICK | {"method": "awq", "group_size": 32}))
    assert "and" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["Model"]
    quantize.run(model, out=tmp_path / "Out", **SIMPLE)  # which reads no text


def test_a_second_rounding_is_asked_for(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already quantized") as caught:
        quantize.run(quantized, out=tmp_path / "Out", **SIMPLE)
    assert "--requantize" in caught.value.hint
    report = quantize.run(quantized, out=tmp_path / "Out", requantize=True, **SIMPLE)
    assert "dequantized" in report.base
    once, twice = quantize.open(quantized), quantize.open(tmp_path / "Out")
    assert all(once.tensors[name].scheme == twice.tensors[name].scheme for name in once.tensors)
    assert twice.tensors["model.norm.weight"].scheme == Plain(BF16)
    # what lies on the grid already is not rounded again
    assert all(torch.equal(once.read(name), twice.read(name)) for name in once.tensors)
