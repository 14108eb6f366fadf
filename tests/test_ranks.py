"""Several workers: real processes started by torchrun, against one process; and the pieces that they are made of."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantize
from quantize.checksums import joined
from quantize.errors import InputError, ResourceError
from quantize.parallel import Pool
from quantize.ranks import ALONE, Dealer, Ranks, SharedPool, _dumps, _Failure, _loads, workers
from quantize.statistics import Accumulator, Squares, Statistics, over_all
from quantize.writer import JOURNAL, partial_path

# ------------------------------------------------------------------------------------------------------------
# Pieces


@given(st.lists(st.floats(0.1, 100), max_size=40), st.integers(1, 5))
def test_every_piece_is_dealt_to_one_rank_and_loads_are_even(weights: list[float], count: int) -> None:
    dealers = [Dealer(index, count) for index in range(count)]
    taken = [[dealer.mine(weight) for dealer in dealers] for weight in weights]
    assert all(sum(row) == 1 for row in taken)
    loads = [sum(w for w, row in zip(weights, taken, strict=True) if row[index]) for index in range(count)]
    assert max(loads) - min(loads) <= max(weights, default=0) + 1e-6


class Member(Ranks):
    """One of several ranks whose exchanges were all written down before."""

    def __init__(self, index: int, others: list[Any]) -> None:
        self.index, self.count = index, len(others)
        self._others = others

    def gather(self, value: Any) -> list[Any]:
        return [value if index == self.index else other for index, other in enumerate(self._others)]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(2, 4))
def test_shares_are_whole_and_disjoint(items: list[int], count: int) -> None:
    numbered = list(enumerate(items))
    shares = [Member(index, [None] * count).share(numbered, lambda item: item[1]) for index in range(count)]
    assert sorted(item for share in shares for item in share) == numbered
    assert ALONE.share(numbered, lambda item: item[1]) == numbered


@given(st.integers(0, 5000), st.integers(1, 1024), st.integers(2, 5))
def test_a_shared_pool_has_chunks_for_all(total: int, size: int, count: int) -> None:
    with Pool(1) as pool:
        spans = SharedPool(pool, Member(0, [None] * count)).spans(total, size)
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(total))
    assert all(0 < stop - start <= size for start, stop in spans)
    if total >= 64 * count:
        assert len(spans) >= min(count, total // 32)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4), st.randoms(use_true_random=False))
def test_checksums_of_runs_join_to_that_of_the_whole(data: bytes, cuts: list[int], dice: random.Random) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    runs = [(a, b - a, zlib.crc32(data[a:b])) for a, b in pairwise(edges)]
    dice.shuffle(runs)
    assert joined(runs, len(data)) == zlib.crc32(data)
    assert joined(runs, len(data) + 1) is None


def test_runs_that_overlap_or_lack_bytes_are_no_array() -> None:
    assert joined([(0, 4, 1), (3, 4, 1)], 7) is None
    assert joined([(1, 4, 1)], 5) is None
    assert joined([], 0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64])
def test_tensors_travel_by_their_values_alone(dtype: torch.dtype) -> None:
    whole = torch.arange(10_000).to(dtype).reshape(100, 100)
    for value in (whole[:2, :3], whole[0, 0], whole[:0], whole.T[3:5]):
        data = _dumps({"x": value})
        assert len(data) < 3000
        assert torch.equal(_loads(data)["x"], value)


def test_errors_travel_with_their_kind() -> None:
    error = _Failure.of(InputError("no such file", "look elsewhere")).error(1)
    assert isinstance(error, InputError)
    assert (error.message, error.hint) == ("no such file", "look elsewhere")
    assert isinstance(_Failure.of(MemoryError()).error(1), ResourceError)
    unknown = _Failure.of(KeyError("x")).error(3)
    assert str(unknown) == "worker 3: KeyError: 'x'"


def test_squares_of_all_ranks_are_those_of_one() -> None:
    batches = [torch.randn(7, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    alone: Accumulator[Squares] = Accumulator()
    parts: list[dict[str, Any]] = []
    for index in range(2):
        kept: Accumulator[Squares] = Accumulator(keep=True)
        for number, batch in enumerate(batches[index::2]):
            kept.add(number, Squares.of(batch))
            kept.finish(number)
        parts.append({"x": kept.parts, "unseen": []})
    for number, batch in enumerate(batches):
        alone.add(number, Squares.of(batch))
        alone.finish(number)
    totals = {"x": kept, "unseen": Accumulator[Squares](keep=True)}
    found = over_all(totals, Squares, Member(1, parts))
    assert found.keys() == {"x"}
    assert found["x"].count == 35
    assert torch.equal(found["x"].mean_square, over_all({"x": alone}, Squares)["x"].mean_square)


class Adding(Member):
    """Rank 0 of two that sums with what the other one would send."""

    def __init__(self, known: Mapping[str, Any], sent: Iterator[Tensor]) -> None:
        super().__init__(0, [None, known])
        self._sent = sent

    def mean_(self, tensor: Tensor, share: float) -> None:
        tensor.mul_(share).add_(next(self._sent))

    def largest_(self, tensor: Tensor) -> None:
        torch.maximum(tensor, next(self._sent), out=tensor)


def test_statistics_of_all_ranks_weigh_each_by_its_tokens() -> None:
    x, y = torch.randn(5, 8), torch.randn(11, 8)
    other, whole = Statistics.of(y), Statistics.of(torch.cat([x, y]))
    sent = [value for part in (other, other) for value in (part.mean_abs, part.max_abs, part.hessian)]
    shares = [11 / 16, 1, 11 / 16, 1, 1, 1]
    mine: Accumulator[Statistics] = Accumulator()
    mine.add(0, Statistics.of(x))
    known = {"both": (11, 8), "theirs": (11, 8)}
    ranks = Adding(known, (value * share for value, share in zip(sent, shares, strict=True)))
    totals = {"both": mine, "theirs": Accumulator[Statistics](), "nobody": Accumulator[Statistics]()}
    found = over_all(totals, Statistics, ranks)
    assert found.keys() == {"both", "theirs"}
    for name, expected in (("both", whole), ("theirs", other)):
        assert found[name].count == expected.count
        for array in ("mean_abs", "max_abs", "hessian"):
            assert torch.allclose(getattr(found[name], array), getattr(expected, array), atol=1e-6)


def test_a_process_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in ({}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in said.items():
            monkeypatch.setenv(name, value)
        assert workers() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    assert workers() == (1, 2)


# ------------------------------------------------------------------------------------------------------------
# Processes

TEXT: dict[str, Any] = {"calib_samples": 3, "calib_length": 256, "threads": 1}
JOBS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "bits": 4, "group_size": 64, "eval": "none", **TEXT},
    "awq": {"method": "awq", "bits": 4, "group_size": 64, "eval": "none", **TEXT},
    "rtn": {"method": "rtn", "bits": 4, "group_size": 64, "threads": 1},
    "mix.gguf": {"type": "Q4_K_M", "imatrix": "auto", "calib": ("default",), "eval": "none", **TEXT},
    "bf16.gguf": {"format": "gguf"},
}
WINDOWS = 6  # of 512 tokens, four in a batch: each worker has one
EXACT = ("rtn", "mix.gguf", "bf16.gguf")
SCRIPT = """
import json, os, sys
from pathlib import Path
import quantize
from quantize.cli import root
model, bad, out, jobs, words = sys.argv[1:]
try:
    root.main(json.loads(words))
except SystemExit as end:
    assert end.code == 0, end.code
for name, options in json.loads(jobs).items():
    quantize.run(model, out=Path(out) / name, **options)
try:
    quantize.run(bad, out=Path(out) / "bad", method="rtn", bits=4, group_size=64, threads=1)
except quantize.errors.QuantizeError as error:
    Path(out, "error" + os.environ["RANK"]).write_text(f"{error.exit_code} {error.message}")
"""


def jobs(model: Path) -> dict[str, dict[str, Any]]:
    """The jobs, with a text to evaluate one of them on."""
    return {**JOBS, "rtn": {**JOBS["rtn"], "eval": str(model.with_name("eval.txt"))}}


@dataclass(frozen=True)
class Started:
    """What two workers were started for: outputs, all but the first of one start, and what was said there.

    Attributes:
        out: The folder of the outputs.
        kept: Checksums of the arrays that a first start, whose second worker was killed, had written.
        code: How that start ended.
        said: Everything that the second start said.
    """

    out: Path
    kept: dict[str, int]
    code: int
    said: str


def torchrun(*words: str | Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def worker(agent: int, rank: str) -> int | None:
    """The process id of a worker, by what torchrun told it."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    return None


def killed(words: list[str], journal: Path) -> tuple[dict[str, int], int]:
    """Kills the second worker when some of a first block is written; returns checksums of arrays, and how it ended."""
    run = torchrun("-m", "quantize", *words)
    end = time.monotonic() + 120
    while not (journal.is_file() and b"layers.0.self_attn" in journal.read_bytes()):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)
    victim = worker(run.pid, "1")
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    run.communicate(timeout=60)
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    return {entry["done"]: entry["crc32"] for entry in entries if "done" in entry}, run.returncode


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are whole super-blocks."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("model")
    (folder / "eval.txt").write_text(("Some words, and then some more. " * 16) * WINDOWS)
    return tiny.llama(folder / "Model", tokenizer=True, **sizes)


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """A run whose second worker is killed; then a start that ends it, makes all else, and meets a broken tensor."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("finds the workers in /proc")
    folder = tmp_path_factory.mktemp("two")
    bad = shutil.copytree(model, folder / "source" / "Bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    script = folder / "source" / "script.py"
    script.write_text(SCRIPT)
    out = folder / "out"
    out.mkdir()
    words = ["run", str(model), "--out", str(out / "gptq")]
    for name, value in JOBS["gptq"].items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    kept, code = killed(words, partial_path(out / "gptq") / JOURNAL)
    assert not (out / "gptq").exists()
    rest = {name: options for name, options in jobs(model).items() if name != "gptq"}
    run = torchrun(script, model, bad, out, json.dumps(rest), json.dumps(words))
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 0, said
    return Started(out, kept, code, said)


@pytest.fixture(scope="module")
def one(model: Path, two: Started, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of one process."""
    out = tmp_path_factory.mktemp("one")
    for name, options in jobs(model).items():
        quantize.run(model, out=out / name, **options)
    return out


def files(folder: Path, name: str) -> dict[str, bytes]:
    """The files of an output and of its report."""
    path = folder / name
    if path.is_dir():
        return tiny.contents(path)
    report = path.with_name(f"{path.stem}.quantize.json")
    return {"file": path.read_bytes(), "report": report.read_bytes()}


def equal_codes(one: Path, two: Path) -> dict[str, float]:
    """The share of weights that are equal in two outputs, by tensor."""
    first, second = quantize.open(one), quantize.open(two)
    shares: dict[str, float] = {}
    for name in first.tensors:
        a, b = first.read_coded(name), second.read_coded(name)
        if a is not None and b is not None:
            shares[name] = float((a.dequantize() == b.dequantize()).double().mean())
        else:
            assert a is None
            assert torch.allclose(first.read(name).float(), second.read(name).float(), rtol=1e-2)
    return shares


@pytest.mark.parametrize("name", EXACT)
def test_without_hessians_the_files_are_those_of_one_process(one: Path, two: Started, name: str) -> None:
    assert files(one, name) == files(two.out, name)
    assert not [path.name for path in two.out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("name", "surely"), [("awq", ""), ("gptq", "layers.0.self_attn")])
def test_with_hessians_codes_differ_by_rounding(one: Path, two: Started, name: str, surely: str) -> None:
    # a sum in another order flips a code here and there; with feedback, one flip moves what comes after it
    shares = equal_codes(one / name, two.out / name)
    assert min(share for tensor, share in shares.items() if surely in tensor) > 0.99
    reports = [json.loads((folder / name / "quantize.json").read_text()) for folder in (one, two.out)]
    assert reports[0]["notes"] == reports[1]["notes"]
    for tensor, error in reports[0]["errors"].items():
        assert reports[1]["errors"][tensor] == pytest.approx(error, rel=0.02)


def test_windows_of_an_evaluation_are_shared(two: Started) -> None:
    quality = json.loads((two.out / "rtn" / "quantize.json").read_text())["quality"]  # equal to that of one process
    assert quality["protocol"]["chunks"] == WINDOWS


def test_a_failing_worker_ends_all_with_its_error(two: Started) -> None:
    said = [(two.out / f"error{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("3 ")
    assert "'model.layers.1.mlp.up_proj.weight' holds 1 NaN or Inf, first at [3, 5]" in said[0]
    assert not (two.out / "bad").exists()
    assert not partial_path(two.out / "bad").exists()


def test_a_killed_worker_ends_all_and_its_work_is_taken_up(two: Started) -> None:
    assert two.code != 0
    assert any("layers.0.self_attn" in name for name in two.kept)
    with safe_open(two.out / "gptq" / "model.safetensors", "pt") as file:
        for name, crc in two.kept.items():
            assert zlib.crc32(file.get_tensor(name).contiguous().flatten().view(torch.uint8).numpy()) == crc


def test_only_the_first_worker_speaks(two: Started) -> None:
    assert two.said.count("bits per weight  ") == 1
    assert two.said.count("format gptq\n") == 1
