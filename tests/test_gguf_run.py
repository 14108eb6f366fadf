"""`run` and `convert` to GGUF: from a folder to a file, what stands in it, and what may go wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch

import quantize
from quantize.errors import InputError, QuantizeError, UsageError
from quantize.formats.gguf.container import read_part
from quantize.kernels.cpu import ggml
from quantize.writer import JOURNAL, partial_path

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are whole super-blocks."""
    return tiny.llama(tmp_path_factory.mktemp("wide") / "Wide", tokenizer=True, **WIDE)


def types(file: Path) -> dict[str, str]:
    return {name: str(stored.scheme) for name, stored in read_part(file).tensors.items()}


def stored_bytes(file: Path) -> dict[str, bytes]:
    """Payload of each tensor, read by the gguf package and not by us."""
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(file).tensors}


def test_q4_k_m_is_what_llama_cpp_makes_of_the_mix(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "Wide-Q4_K_M.gguf"
    report = quantize.run(wide, type="Q4_K_M", out=out)
    found = types(out)
    assert found["token_embd.weight"] == "q4_k"
    assert found["output.weight"] == "q6_k"
    assert found["blk.0.attn_q.weight"] == "q4_k"
    assert found["blk.0.attn_norm.weight"] == "f32"
    source = quantize.open(wide)
    weight = source.read("model.layers.1.mlp.up_proj.weight").float()
    expected = ggml.encode("q4_k", weight.numpy()).tobytes()
    assert stored_bytes(out)["blk.1.ffn_up.weight"] == expected
    assert report.files == (out.name, f"{out.stem}.quantize.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(report.files)
    assert json.loads((tmp_path / report.files[1]).read_text())["errors"]["blk.1.ffn_up.weight"] < 0.01


def test_the_default_name_is_that_of_the_mix(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert quantize.run(wide, type="q8_0").out == Path("Wide-Q8_0.gguf")
    assert quantize.convert(wide, format="gguf").out == Path("Wide-BF16.gguf")
    assert quantize.convert(wide, format="gguf", dtype="f16").out == Path("Wide-F16.gguf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tiny.llama(tmp_path / "Source", dtype=dtype, tokenizer=True)
    out = tmp_path / "there.gguf"
    quantize.convert(source, format="gguf", out=out)
    there, back = quantize.open(source), quantize.open(out)
    assert set(there.tensors) == set(back.tensors)
    for name in there.tensors:
        assert torch.equal(there.read(name).float(), back.read(name).float()), name


def test_threads_and_repetition_change_nothing(wide: Path, tmp_path: Path) -> None:
    first = quantize.run(wide, type="Q3_K_M", out=tmp_path / "1.gguf", threads=1).out.read_bytes()
    assert quantize.run(wide, type="Q3_K_M", out=tmp_path / "2.gguf", threads=2).out.read_bytes() == first


def test_importance_is_gathered_where_types_need_it(wide: Path, tmp_path: Path) -> None:
    plan = quantize.plan(wide, type="IQ2_XXS", out=tmp_path / "a.gguf", **tiny.QUICK)
    assert {str(e.scheme) for e in plan.quantized} >= {"iq2_xxs", "q2_k"}
    report = quantize.run(wide, type="IQ2_XXS", out=tmp_path / "a.gguf", **tiny.QUICK)
    assert types(report.out)["blk.0.ffn_up.weight"] == "iq2_xxs"
    header = read_part(report.out).metadata
    assert header["quantize.imatrix.chunks_count"] == tiny.QUICK["calib_samples"]
    matrix = tmp_path / "kept.gguf"
    twice = quantize.run(wide, type="IQ2_XXS", out=tmp_path / "b.gguf", imatrix=matrix, **tiny.QUICK)
    assert matrix.exists()
    again = quantize.run(wide, type="IQ2_XXS", out=tmp_path / "c.gguf", imatrix=matrix, eval="none")
    assert stored_bytes(twice.out) == stored_bytes(report.out) == stored_bytes(again.out)
    with pytest.raises(InputError, match="iq2_xxs needs importance"):
        quantize.plan(wide, type="IQ2_XXS", imatrix="none", out=tmp_path / "d.gguf")


def test_parts(wide: Path, tmp_path: Path) -> None:
    whole = quantize.run(wide, type="Q8_0", out=tmp_path / "whole.gguf")
    report = quantize.run(wide, type="Q8_0", out=tmp_path / "cut.gguf", split_size=1_000_000)
    names = [name for name in report.files if name.endswith(".gguf")]
    assert len(names) > 1
    assert names[0] == f"cut-00001-of-{len(names):05}.gguf"
    assert all((tmp_path / name).exists() for name in names)
    joined = quantize.convert(tmp_path / names[0], format="gguf", out=tmp_path / "joined.gguf")
    assert stored_bytes(joined.out) == stored_bytes(whole.out)
    assert types(joined.out) == types(whole.out)
    assert "split.count" not in read_part(joined.out).metadata


def test_a_gguf_file_is_a_source_like_any_other(wide: Path, tmp_path: Path) -> None:
    eight = quantize.run(wide, type="Q8_0", out=tmp_path / "8.gguf").out
    with pytest.raises(InputError, match="rounding twice"):
        quantize.run(eight, type="Q4_0", out=tmp_path / "4.gguf")
    four = quantize.run(eight, type="Q4_0", out=tmp_path / "4.gguf", requantize=True).out
    assert types(four)["blk.0.ffn_up.weight"] == "q4_0"
    before, after = read_part(eight).metadata, read_part(four).metadata
    assert before.keys() == after.keys()
    assert before["tokenizer.ggml.tokens"] == after["tokenizer.ggml.tokens"]
    # what the target has already is not rounded again
    again = quantize.run(eight, type="Q8_0", out=tmp_path / "again.gguf", requantize=True).out
    assert stored_bytes(again) == stored_bytes(eight)


def test_types_of_single_tensors(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    rules = ("blk.0.attn_v=q8_0", "model.layers.1.mlp.down_proj=q5_k", "re:blk\\.1\\.attn_.*=f16")
    quantize.run(wide, type="Q4_K_S", out=out, set=rules, tensor_types=("ffn_gate=q6_k",), output_type="q8_0")
    found = types(out)
    assert found["blk.0.attn_v.weight"] == "q8_0"
    assert found["blk.1.ffn_down.weight"] == "q5_k"
    assert found["blk.1.attn_q.weight"] == "f16"
    assert found["blk.0.ffn_gate.weight"] == "q6_k"
    assert found["output.weight"] == "q8_0"
    copy = quantize.run(wide, type="Q2_K", out=tmp_path / "b.gguf", recipe=out).out
    assert types(copy) == found
    with pytest.raises(UsageError, match="matches no tensor"):
        quantize.plan(wide, type="Q4_K_S", out=out, overwrite=True, tensor_types=("nowhere=q6_k",))


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    odd = tiny.llama(tmp_path / "Odd", tokenizer=True, hidden_size=320, intermediate_size=672, num_attention_heads=5,
                     num_key_value_heads=5)  # fmt: skip
    plan = quantize.plan(odd, type="Q4_K_M", out=tmp_path / "odd.gguf")
    assert len(plan.fallbacks) > 5
    with pytest.raises(UsageError, match=r"token_embd\.weight cannot be q4_k: its width 320 is no multiple"):
        quantize.plan(odd, type="Q4_K_M", out=tmp_path / "odd.gguf", fallback=False)
    assert types(quantize.run(odd, type="Q4_K_M", out=tmp_path / "odd.gguf").out)["blk.0.ffn_up.weight"] == "q5_0"


def test_rows_of_172(tmp_path: Path) -> None:
    """No block divides them: such tensors stay floats and the file can be read."""
    odd = tiny.llama(tmp_path / "Odd", tokenizer=True, intermediate_size=172)
    found = types(quantize.run(odd, type="Q4_0", out=tmp_path / "odd.gguf").out)
    assert found["blk.0.ffn_down.weight"] == "f16"
    assert found["blk.0.ffn_up.weight"] == "q4_0"


@pytest.mark.parametrize("link", ["same", "symlink", "hardlink"])
def test_input_and_output_are_the_same_file(wide: Path, tmp_path: Path, link: str) -> None:
    source = quantize.run(wide, type="Q8_0", out=tmp_path / "source.gguf").out
    out = source if link == "same" else tmp_path / "other.gguf"
    if link == "symlink":
        out.symlink_to(source)
    elif link == "hardlink":
        os.link(source, out)
    content = source.read_bytes()
    with pytest.raises(UsageError, match="the same"):
        quantize.run(source, type="Q4_0", out=out, requantize=True, overwrite=True)
    assert source.read_bytes() == content


def test_an_output_that_exists_is_kept_unless_told(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        quantize.run(wide, type="Q8_0", out=out)
    assert out.read_bytes() == b"mine"
    quantize.run(wide, type="Q8_0", out=out, overwrite=True)
    assert types(out)["output.weight"] == "q8_0"
    with pytest.raises(UsageError, match=r"called NAME\.gguf"):
        quantize.run(wide, type="Q8_0", out=tmp_path / "b")
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        quantize.run(wide, type="Q8_0", out=folder, overwrite=True)


def test_nan_in_the_source(tmp_path: Path) -> None:
    broken = torch.ones(128, 64)
    broken[3, 5] = float("nan")
    source = tiny.llama(tmp_path / "Source", tokenizer=True, extra={"model.layers.1.mlp.up_proj.weight": broken})
    with pytest.raises(InputError, match="holds 1 NaN or Inf"):
        quantize.run(source, type="Q4_0", out=tmp_path / "a.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["Source"]


def test_killed_and_repeated(wide: Path, tmp_path: Path) -> None:
    whole = quantize.run(wide, type="Q5_K_M", out=tmp_path / "whole.gguf").out.read_bytes()
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "quantize", "run", wide, "--type", "Q5_K_M", "--out", out, "--threads", "1"]
    journal = partial_path(out) / JOURNAL
    for pause in (0.0, 0.02, 0.1):
        before = journal.stat().st_mtime_ns if journal.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or journal.stat().st_mtime_ns == before):
            time.sleep(0.002)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            break
        assert not list(tmp_path.glob("out*.json"))
    if not out.exists():
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole
    assert not partial_path(out).exists()


def test_modelfile(wide: Path, tmp_path: Path) -> None:
    report = quantize.run(wide, type="Q8_0", out=tmp_path / "a.gguf", ollama=True)
    assert (tmp_path / "a.gguf.Modelfile").read_text().splitlines()[1] == "FROM ./a.gguf"
    assert "a.gguf.Modelfile" in report.files


def test_evaluation_of_the_file(wide: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 60)
    report = quantize.run(wide, type="Q6_K", out=tmp_path / "a.gguf", eval=str(text))
    assert report.quality is not None
    assert 0 < report.quality["kl_divergence"]["mean"] < 0.2


def test_other_formats_and_methods_say_what_to_do(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="cannot hold int4-g128") as raised:
        quantize.plan(wide, method="rtn", bits=4, format="gguf", out=tmp_path / "a.gguf")
    assert "--type" in str(raised.value.hint)
    with pytest.raises(QuantizeError, match="Q4_K_X"):
        quantize.plan(wide, type="Q4_K_X", out=tmp_path / "a.gguf")


def test_values_read_back_are_those_that_gguf_decodes(wide: Path, tmp_path: Path) -> None:
    out = quantize.run(wide, type="Q4_K_M", out=tmp_path / "a.gguf").out
    ours = quantize.open(out)
    theirs = {t.name: t for t in gguf.GGUFReader(out).tensors}
    tensor = theirs["blk.0.ffn_down.weight"]
    expected = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(ours.read("model.layers.0.mlp.down_proj.weight").numpy(), expected)


def test_a_text_that_is_named_is_used(wide: Path, tmp_path: Path) -> None:
    """Q4_K_M does without importance; who names a text wants it."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 60)
    plain = quantize.run(wide, type="Q4_K_M", out=tmp_path / "a.gguf").out
    named = quantize.run(wide, type="Q4_K_M", out=tmp_path / "b.gguf", calib=(str(text),), **tiny.QUICK).out
    assert read_part(named).metadata["quantize.imatrix.dataset"] == "text.txt"
    assert stored_bytes(plain) != stored_bytes(named)
    left = quantize.run(wide, type="Q4_K_M", out=tmp_path / "c.gguf", calib=(str(text),), imatrix="none", eval="none")
    assert stored_bytes(left.out) == stored_bytes(plain)


def test_a_name_that_no_file_system_takes(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a name of 254 bytes"):
        quantize.plan(wide, type="Q8_0", out=tmp_path / f"{'n' * 249}.gguf")


def test_a_dtype_that_is_none(wide: Path, tmp_path: Path) -> None:
    for name in ("int4-g128", "q8_0", "f8_e4m3"):
        with pytest.raises(UsageError, match="is no floating type"):
            quantize.convert(wide, format="gguf", dtype=name, out=tmp_path / "a.gguf")
