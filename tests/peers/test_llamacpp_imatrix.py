"""Importance matrices against llama-imatrix and llama-quantize: files, sums, figures."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import save

import quantize
from quantize.calib_data import CalibrationText, read_text
from quantize.checkpoint import open_checkpoint
from quantize.formats.gguf.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from quantize.formats.gguf.view import GGUFView
from quantize.gathering import gather_importance
from quantize.imatrix import match, merge, statistics
from quantize.progress import silent
from quantize.settings import Settings
from quantize.skeleton import Skeleton
from quantize.tokenizer import load_tokenizer

PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[2] / ".peers"))
PROGRAMS = Path(os.environ.get("QUANTIZE_LLAMA_CPP", PEERS / "llamacpp/bin")).absolute()
CONTEXT, CHUNKS = 128, 12

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not (PROGRAMS / "llama-imatrix").exists(),
        reason=f"no {PROGRAMS / 'llama-imatrix'}: run 'make peers' or set QUANTIZE_LLAMA_CPP",
    ),
]

# Experts, shared experts, a fused matrix; with what llama.cpp asks of their configs.
CHANGES: dict[str, dict[str, object]] = {
    "llama": {},
    "mixtral": {},
    "qwen2-moe": {"norm_topk_prob": False, "num_attention_heads": 16, "num_key_value_heads": 4},
    "phi3": {"num_attention_heads": 16, "num_key_value_heads": 4},
    # matrices on their side; llama-imatrix ends in an assertion on llama4
    "gpt-oss": {
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1.5e5},
    },
    "gpt2": {"n_embd": 256, "hidden_size": ...},
}


def call(program: str, *words: object) -> str:
    """Returns what a program says."""
    command = [str(PROGRAMS / program), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (command, (done.stdout + done.stderr)[-2000:])
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Case:
    """A tiny model as a folder and a file, a text, and what llama-imatrix makes of them in both formats."""

    folder: Path
    model: Path
    text: Path
    new: Path
    older: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            at = tmp_path_factory.mktemp("imatrix")
            result = Case(*(at / part for part in ("folder", "model.gguf", "text.txt", "new.gguf", "older.dat")))
            save(name, result.folder, **{"hidden_size": 256, **CHANGES[name]})
            quantize.convert(result.folder, format="gguf", dtype="f32", out=result.model)
            result.text.write_text(read_text("default", limit=CONTEXT * CHUNKS), encoding="ascii", errors="replace")
            for kind, path in (("gguf", result.new), ("dat", result.older)):
                words = (
                    "-m",
                    result.model,
                    "-f",
                    result.text,
                    "-c",
                    CONTEXT,
                    "-t",
                    1,
                    "--no-ppl",
                    "-ctk",
                    "f32",
                    "-ctv",
                    "f32",
                )
                call("llama-imatrix", *words, "--output-format", kind, "-o", path)
            made[name] = result
        return made[name]

    return get


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_files_are_those_of_llama_imatrix(name: str, case: Callable[[str], Case], tmp_path: Path) -> None:
    made, found = case(name), tmp_path / "found"
    matrix = read_imatrix(made.new)
    assert (matrix.datasets, matrix.chunk_size) == ((str(made.text),), CONTEXT)
    assert matrix.chunk_count >= CHUNKS - 1
    write_imatrix(found, matrix)
    assert found.read_bytes() == made.new.read_bytes()
    write_imatrix(found, matrix, legacy=True)
    assert found.read_bytes() == made.older.read_bytes()
    older = read_imatrix(made.older)
    assert older.entries.keys() == matrix.entries.keys()
    for key, entry in matrix.entries.items():
        shaped = older.entries[key].shaped(*entry.sums.shape)
        assert shaped is not None
        np.testing.assert_allclose(shaped.means(), entry.means(), rtol=1e-6)


def test_merged_files_are_those_of_llama_imatrix(case: Callable[[str], Case], tmp_path: Path) -> None:
    made, theirs, ours = case("mixtral"), tmp_path / "theirs", tmp_path / "ours"
    for one, other in ((made.new, made.new), (made.new, made.older)):
        call("llama-imatrix", "-m", made.model, "-c", CONTEXT, "--in-file", f"{one},{other}", "-o", theirs)
        write_imatrix(ours, merge([read_imatrix(one), read_imatrix(other)]))
        wanted, found = read_imatrix(theirs), read_imatrix(ours)
        assert wanted.entries.keys() == found.entries.keys()
        for key, entry in wanted.entries.items():
            np.testing.assert_allclose(found.entries[key].sums, entry.sums, rtol=1e-6)
            np.testing.assert_array_equal(found.entries[key].counts, entry.counts)


def test_figures_are_those_of_llama_imatrix(case: Callable[[str], Case]) -> None:
    made = case("mixtral")
    rows = {row.name: row for row in statistics(read_imatrix(made.new))}
    lines: set[tuple[str, ...]] = set()
    for _ in range(100):  # the program ends without waiting for the thread that says it
        said = call("llama-imatrix", "-m", made.model, "--in-file", made.new, "--show-statistics")
        lines.update(re.findall(r"(\d+)\t(\w+)" + 11 * r"\s+(-?[\d.]+)%?" + r"\n", said))
        if len(lines) == len(rows):
            break
    if not lines:
        pytest.skip("llama-imatrix said nothing in 100 tries")
    for layer, name, *figures in lines:
        row = rows[f"blk.{layer}.{name}.weight"]
        found = [
            row.total, row.low, row.high, row.mean, row.deviation, 100 * row.active, row.columns, row.entropy,
            100 * row.evenness, 100 * row.outliers, row.likeness or 0.0,
        ]  # fmt: skip
        for ours, theirs in zip(found, figures, strict=True):
            digits = len(theirs.partition(".")[2])
            assert ours == pytest.approx(float(theirs), abs=0.51 * 10.0**-digits, rel=1e-5), (row.name, theirs)


def gathered(made: Case) -> ImportanceMatrix:
    """Returns what our own sweep gathers on the text, cut as llama-imatrix cuts it."""
    checkpoint = open_checkpoint(made.folder)
    skeleton, view = Skeleton(checkpoint), GGUFView(checkpoint)
    ids = torch.tensor(load_tokenizer(checkpoint)(made.text.read_text(encoding="utf-8"))["input_ids"])
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    text = CalibrationText(rows, ("text",), "", 0, ())
    settings = Settings()
    return gather_importance(settings, skeleton, checkpoint, view, text, 1, made.folder, silent)


@pytest.mark.parametrize("name", CHANGES)
def test_gathered_sums_are_those_of_llama_imatrix(name: str, case: Callable[[str], Case]) -> None:
    made = case(name)
    theirs, ours = read_imatrix(made.new), gathered(made)
    shapes = {name: info.shape for name, info in GGUFView(open_checkpoint(made.folder)).tensors.items()}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1 and name.endswith(".weight")}
    assert ours.entries.keys() == matrices.keys() & theirs.entries.keys()
    for key in ours.entries:
        entry = theirs.entries[key]
        found = ours.entries[key]
        # a token whose experts are all but equal may go elsewhere by a rounding error
        np.testing.assert_allclose(found.counts, entry.counts, atol=3)
        difference = np.abs(found.means() - entry.means())
        assert (difference.sum(-1) < 0.01 * entry.means().sum(-1)).all(), key
        if len(entry.counts) == 1:
            least = 1e-6 * entry.means().max()  # llama.cpp has its GELU in a table of half precision
            np.testing.assert_allclose(found.means(), entry.means(), rtol=0.01, atol=least, err_msg=key)
    laid = match(theirs, matrices)
    assert laid.found.keys() == ours.entries.keys()
    assert laid.missing == ()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_llama_quantize_takes_ours(name: str, legacy: bool, case: Callable[[str], Case], tmp_path: Path) -> None:
    made, ours = case(name), tmp_path / "ours"
    write_imatrix(ours, read_imatrix(made.new), legacy)
    for path, out in ((made.older if legacy else made.new, "theirs.gguf"), (ours, "ours.gguf")):
        said = call("llama-quantize", "--imatrix", path, made.model, tmp_path / out, "Q2_K_S", 1)
        assert "did not find weights" not in said.replace("did not find weights for token_embd.weight", "").replace(
            "did not find weights for output.weight", ""
        )
    theirs = read_payload(tmp_path / "theirs.gguf")
    assert theirs == read_payload(tmp_path / "ours.gguf")
    fresh = gathered(made)
    write_imatrix(ours, ImportanceMatrix(fresh.entries, ("text",), CHUNKS, CONTEXT), legacy)
    call("llama-quantize", "--imatrix", ours, made.model, tmp_path / "fresh.gguf", "Q2_K_S", 1)
    assert read_payload(tmp_path / "fresh.gguf").keys() == theirs.keys()


def read_payload(path: Path) -> dict[str, bytes]:
    """Returns the bytes of each tensor, read by the gguf package."""
    import gguf

    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
