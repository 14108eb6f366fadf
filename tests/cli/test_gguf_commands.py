"""The commands around GGUF files: imatrix, edit, inspect of two, and the gate that wants to be sure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

import quantize
from quantize.formats.gguf.container import read_part
from quantize.formats.gguf.imatrix import read_imatrix

Cli = Callable[..., Any]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("wide") / "Wide", tokenizer=True, **WIDE)


@pytest.fixture(scope="module")
def eight(wide: Path) -> Path:
    return quantize.run(wide, type="Q8_0", out=wide.parent / "eight.gguf").out


def test_imatrix(cli: Cli, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = ("--calib-samples", "4", "--calib-length", "64")
    planned = json.loads(cli("imatrix", wide, *text, "--json", "--dry-run").stdout)
    assert (planned["entries"], planned["tokens"]) == (14, 256)
    assert not (tmp_path / "Wide.imatrix.gguf").exists()
    result = cli("imatrix", wide, *text, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    matrix = read_imatrix(tmp_path / "Wide.imatrix.gguf")
    assert len(matrix.entries) == len(said["entries"]) == 14
    assert matrix.chunk_count == 4
    assert matrix.chunk_size == 64
    assert matrix.entries["blk.0.ffn_down.weight"].counts.tolist() == [256]
    again = cli("imatrix", wide, *text)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    legacy = cli("imatrix", "Wide.imatrix.gguf", "--out", "old.dat", "--legacy")
    assert legacy.exit_code == 0, legacy.stderr
    both = cli("imatrix", "Wide.imatrix.gguf", "old.dat", "--out", "both.gguf")
    assert both.exit_code == 0, both.stderr
    assert read_imatrix(tmp_path / "both.gguf").chunk_count == 8
    shown = cli("imatrix", "both.gguf")
    assert "blk.1.attn_q.weight" in shown.stdout
    assert cli("imatrix", wide, wide).exit_code == 2


def test_edit_and_inspect_two(cli: Cli, eight: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(eight.read_bytes())
    assert "no difference" in cli("inspect", eight, copy, "--contents").stdout
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}\n" * 200)
    words = ("--put", f"tokenizer.chat_template=@{template}", "--put", "llama.rope.freq_base=500000",
             "--put", "mine.flag=false", "--remove", "general.size_label")  # fmt: skip
    before = copy.read_bytes()
    dry = cli("edit", copy, *words, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert "would change" in dry.stdout
    assert copy.read_bytes() == before
    assert cli("edit", copy, *words).exit_code == 0
    found = read_part(copy).metadata
    assert found["tokenizer.chat_template"] == template.read_text()
    assert found["llama.rope.freq_base"] == 500000.0
    assert found["mine.flag"] is False
    assert "general.size_label" not in found
    difference = json.loads(cli("inspect", eight, copy, "--json").stdout)
    assert set(difference["metadata"]["removed"]) == {"general.size_label"}
    assert set(difference["metadata"]["changed"]) == {"llama.rope.freq_base"}
    assert difference["tensors"] == {"added": {}, "removed": {}, "changed": {}}
    assert cli("edit", copy).exit_code == 2
    assert cli("edit", copy, "--put", "novalue").exit_code == 2
    assert cli("edit", copy, "--remove", "no.such.key").exit_code == 2


def test_inspect_two_of_different_formats(cli: Cli, wide: Path, eight: Path) -> None:
    result = cli("inspect", wide, eight)
    assert result.exit_code == 0, result.stderr
    assert "q8_0 128 x 256" in result.stdout


def test_a_gate_that_wants_to_be_sure(cli: Cli, wide: Path, eight: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 20)
    words = ("eval", eight, "--base", wide, "--text", text, "--context", "64", "--chunks", "6")
    kld = json.loads(cli(*words, "--json").stdout)["kl_divergence"]
    within = str((kld["mean"] + kld["high"]) / 2)
    assert cli(*words, "--max-kld", within).exit_code == 0
    result = cli(*words, "--max-kld", within, "--conclusive")
    assert result.exit_code == 6
    assert "reaches across the limit" in result.stderr
    assert cli(*words, "--max-kld", str(2 * kld["high"]), "--conclusive").exit_code == 0
    assert cli(*words, "--max-kld", str(kld["mean"] / 2), "--conclusive").exit_code == 5


def test_type_on_the_command_line(cli: Cli, wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    result = cli("run", wide, "--type", "q4_k_m", "--out", out, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "Q4_K_M: its main type" in result.stdout
    assert not out.exists()
    result = cli("run", wide, "--type", "Q4_K_M", "--out", out, "--tensor-type-file", "attn_v=q8_0")
    assert result.exit_code == 0, result.stderr
    assert str(read_part(out).tensors["blk.0.attn_v.weight"].scheme) == "q8_0"
    assert "--tensor-type-file is spelt --tensor-type here" in result.stderr
