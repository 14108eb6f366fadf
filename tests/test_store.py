"""Statistics on disk: reused they give the same bytes, and those of another model or text are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quantize
from quantize.errors import InputError, ResourceError
from quantize.statistics import Statistics
from quantize.store import StatisticsFile
from quantize.structure import Fold, Input
from quantize.sweep import Sweep

OPTIONS: dict[str, Any] = tiny.QUICK | {"method": "awq", "group_size": 32}
FOLD = Fold(producer="m.0.norm.weight", bias=None, offset=True, start=3, width=4, repeat=2)
INPUTS = (
    Input("m.0.q.weight", ("m.0.q.weight", "m.0.k.weight"), 4, FOLD),
    Input("m.0.o.weight", ("m.0.o.weight",), 6),
    Input("m.0.unseen.weight", ("m.0.unseen.weight",), 5),
)


def statistics(width: int, count: int = 7) -> Statistics:
    return Statistics.of(torch.randn(count, width, generator=torch.Generator().manual_seed(width)))


VALUES = {item.name: statistics(item.width) for item in INPUTS[:2]}


def record(path: Path, blocks: int = 1) -> StatisticsFile:
    file = StatisticsFile(path)
    with file.recording("model", "text", [name for item in INPUTS for name in item.consumers]):
        for block in range(blocks):
            file.write(f"m.{block}", INPUTS if not block else (), VALUES)
    return file


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    record(tmp_path / "s", blocks=2)
    file = StatisticsFile(tmp_path / "s")
    assert file.exists
    file.require("model", "text")
    inputs, values = file.read("m.0")
    assert inputs == INPUTS
    assert values.keys() == VALUES.keys()
    for name, found in values.items():
        assert found.count == VALUES[name].count
        for key in ("mean_abs", "max_abs", "hessian"):
            assert torch.equal(getattr(found, key), getattr(VALUES[name], key))
    assert file.read("m.1") == ((), {})
    with pytest.raises(InputError, match=r"holds nothing on m\.2"):
        file.read("m.2")


def test_the_package_can_read_it(tmp_path: Path) -> None:
    record(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as opened:
        assert opened.metadata()["kind"] == "quantize-statistics"
        assert torch.equal(opened.get_tensor("m.0.q.weight.hessian"), VALUES["m.0.q.weight"].hessian)


def test_the_header_has_room_for_long_names_and_many_inputs(tmp_path: Path) -> None:
    stem = "model.language_model.layers.93.block_sparse_moe.experts"
    names = [f"{stem}.{index}.{'very_' * 20}long_projection_name.weight" for index in range(500)]
    file = StatisticsFile(tmp_path / "s")
    one = Statistics.of(torch.ones(1, 2))
    fold = Fold(producer=names[0], bias=names[1], offset=True, start=10**6, width=10**6, repeat=10**6)
    with file.recording("m" * 64, "t" * 64, names):
        file.write(stem, tuple(Input(name, (name,), 2, fold) for name in names), dict.fromkeys(names, one))
    assert len(StatisticsFile(tmp_path / "s").read(stem)[1]) == 500


# ------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("store") / "model", tokenizer=True)


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A statistics file and the output of the run that wrote it."""
    folder = tmp_path_factory.mktemp("saved")
    quantize.run(model, out=folder / "Out", statistics=folder / "file", **OPTIONS)
    return folder


def test_saved_and_reused_give_the_bytes_of_the_direct_run(
    model: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize.run(model, out=tmp_path / "direct" / "Out", **OPTIONS)
    direct = tiny.contents(tmp_path / "direct" / "Out")
    assert tiny.contents(saved / "Out") == direct
    assert sorted(path.name for path in saved.iterdir()) == ["Out", "file"]
    before = (saved / "file").read_bytes()
    monkeypatch.setattr(Sweep, "stages", lambda self: pytest.fail("it was swept again"))
    quantize.run(model, out=tmp_path / "reused" / "Out", statistics=saved / "file", **OPTIONS)
    assert tiny.contents(tmp_path / "reused" / "Out") == direct
    assert (saved / "file").read_bytes() == before


def test_they_serve_another_group_size_and_rule(model: Path, saved: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"group_size": 16, "set": ("*.1.*.down_proj=keep",)}
    quantize.run(model, out=tmp_path / "direct" / "Out", **options)
    quantize.run(model, out=tmp_path / "reused" / "Out", statistics=saved / "file", **options)
    assert tiny.contents(tmp_path / "direct" / "Out") == tiny.contents(tmp_path / "reused" / "Out")


def refused(model: Path, file: Path, out: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        quantize.run(model, out=out, statistics=file, **(OPTIONS | options))
    assert str(file) in caught.value.message
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()
    return caught.value


def test_of_another_model_or_text_they_are_refused(model: Path, saved: Path, tmp_path: Path) -> None:
    other = tiny.llama(tmp_path / "other", seed=1, tokenizer=True)
    out = tmp_path / "Out"
    assert "statistics of another model" in refused(other, saved / "file", out).message
    (tmp_path / "text.txt").write_text("A quite different text. " * 400)
    for change in ({"calib_samples": 5}, {"calib_length": 32}, {"calib": (str(tmp_path / "text.txt"),)}):
        error = refused(model, saved / "file", out, **change)
        assert "statistics of another calibration text" in error.message
        assert "--calib" in error.hint


def test_a_method_without_calibration_ignores_them(model: Path, tmp_path: Path) -> None:
    quantize.run(model, method="rtn", group_size=32, out=tmp_path / "Out", statistics=tmp_path / "none" / "file")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused_before_anything_is_written(
    model: Path, saved: Path, tmp_path: Path, share: float
) -> None:
    file = tmp_path / "file"
    content = (saved / "file").read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "truncated" in refused(model, file, tmp_path / "Out").message


def test_files_of_another_kind(model: Path, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("{}")
    refused(model, file, tmp_path / "Out")
    save_file({"x": torch.ones(1)}, file)
    assert "no statistics of ours" in refused(model, file, tmp_path / "Out").message
    with safe_open(saved / "file", "pt") as opened:
        metadata = opened.metadata()
    save_file({"x": torch.ones(1)}, file, metadata | {"prefix": "int4-g128"})
    assert "no statistics of ours" in refused(model, file, tmp_path / "Out").message
    for blocks in ("", "{", '{"model.layers.0": [{}]}', '{"model.layers.0": [3]}'):
        save_file({"x": torch.ones(1)}, file, metadata | {"blocks": blocks})
        assert "its description of the blocks is broken" in refused(model, file, tmp_path / "Out").message
    save_file({"x": torch.ones(1)}, file, metadata | {"blocks": json.dumps({})})
    assert "holds nothing on model.layers.0" in refused(model, file, tmp_path / "Out").message
    refused(model, tmp_path, tmp_path / "Out")
    assert "no such folder" in refused(model, tmp_path / "none" / "file", tmp_path / "Out").message


# ------------------------------------------------------------------------------------------------------------
# Runs that do not end


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_half_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    quantize.run(model, out=tmp_path / "whole" / "Out", statistics=tmp_path / "whole" / "file", **OPTIONS)
    real: Callable[..., None] = StatisticsFile.write
    count = iter(range(1))
    monkeypatch.setattr(
        StatisticsFile, "write", lambda *arguments: real(*arguments) if next(count, None) == 0 else interrupt()
    )
    with pytest.raises(KeyboardInterrupt):
        quantize.run(model, out=tmp_path / "Out", statistics=tmp_path / "file", **OPTIONS)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Out.partial", "whole"]
    quantize.run(model, out=tmp_path / "Out", statistics=tmp_path / "file", **OPTIONS)
    assert (tmp_path / "file").read_bytes() == (tmp_path / "whole" / "file").read_bytes()
    assert tiny.contents(tmp_path / "Out") == tiny.contents(tmp_path / "whole" / "Out")


def test_a_full_disk_under_the_statistics_keeps_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(StatisticsFile, "_finish", full)
    with pytest.raises(ResourceError, match="No space left") as caught:
        quantize.run(model, out=tmp_path / "Out", statistics=tmp_path / "file", **OPTIONS)
    assert str(tmp_path / "file") in caught.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Out.partial"]
