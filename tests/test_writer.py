"""The output folder: killed at every system call, full disks, foreign folders, and what `--overwrite` may touch."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantize
from quantize.errors import InputError, ResourceError, UsageError, VerificationError
from quantize.formats.base import Piece
from quantize.formats.container import layout
from quantize.writer import JOURNAL, REPORT, OutputFolder, check_target, partial_path, tidy

TENSORS: dict[str, dict[str, Tensor]] = {
    "model-00001-of-00002.safetensors": {
        "a": torch.arange(40, dtype=torch.int32).reshape(10, 4),
        "b": torch.linspace(-1, 1, 24).bfloat16().reshape(6, 4),
        "empty": torch.zeros(0, 3),
    },
    "model-00002-of-00002.safetensors": {"c": torch.linspace(0, 9, 30).reshape(3, 10), "scalar": torch.tensor(2.5)},
}
FILES = {
    file: layout([Piece(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()], {"format": "pt"})
    for file, tensors in TENSORS.items()
}
NAMES = [*FILES, "side.txt", "deep/side.txt", "config.json", REPORT, "model.safetensors.index.json"]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def value_of(name: str) -> Tensor:
    return next(tensors[name] for tensors in TENSORS.values() if name in tensors)


def make(out: Path, source: Path, *, overwrite: bool = False, fingerprint: str = "f", restart: bool = False) -> None:
    """One whole run: what is done already is not made again, and every array has a record."""
    tidy(out)
    check_target(out, [source], overwrite)
    folder = OutputFolder(out, FILES, fingerprint, restart)
    try:
        fill(folder, source)
        folder.publish(overwrite)
    finally:
        folder.close()


def fill(folder: OutputFolder, source: Path) -> None:
    for name in ("c", "a", "empty", "scalar", "b"):
        if name not in folder.done:
            value = value_of(name)
            folder.put_parts(name, [value] if value.dim() == 0 or not len(value) else value.split(2))
            folder.record(name, {"notes": [name]})
            folder.commit()
    folder.verify()
    notes = sorted(note for record in folder.records.values() for note in record["notes"])
    written = {"config.json": json.dumps(notes), REPORT: json.dumps({"files": NAMES})}
    index = folder.index()
    assert index is not None
    copied = {"side.txt": source / "side.txt", "deep/side.txt": source / "side.txt", "config.json": source / "side.txt"}
    folder.write_side_files(copied, written | {"model.safetensors.index.json": index})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "side.txt").write_text("tokens\r\n")
    return folder


def start(out: Path, fingerprint: str = "f", restart: bool = False) -> OutputFolder:
    return OutputFolder(out, FILES, fingerprint, restart)


def half_done(out: Path) -> None:
    """Leaves an unfinished run with `a` and `c` done, `b` written but not committed."""
    folder = start(out)
    folder.put({"a": value_of("a"), "c": value_of("c")})
    folder.record("a", {"notes": ["said"]})
    folder.commit()
    folder.put({"b": value_of("b")})
    folder.close()


def test_a_finished_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "Out"
    make(out, source)
    assert sorted(tiny.contents(out)) == sorted(NAMES)
    for file, tensors in TENSORS.items():
        loaded = load_file(out / file)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in TENSORS.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(
        nbytes for place in FILES.values() for _, nbytes in place.where.values()
    )
    assert (out / "config.json").read_text() == '["a", "b", "c", "empty", "scalar"]'
    assert (out / "deep" / "side.txt").read_bytes() == b"tokens\r\n"
    assert names(tmp_path / "new") == ["Out"]


def test_one_file_has_no_index(tmp_path: Path) -> None:
    file, pieces = next(iter(FILES.items()))
    folder = OutputFolder(tmp_path / "Out", {file: pieces}, "f", restart=False)
    assert folder.index() is None
    folder.discard()
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------
# Killed


SYSTEM = ("pwrite", "write", "fsync", "fdatasync", "posix_fallocate", "ftruncate", "rename", "unlink", "mkdir", "rmdir")


def killed_at(number: int, torn: bool, work: Callable[[], None]) -> bool:
    """Runs `work` in a child that dies before its `number`th system call, or in the middle of it if it writes.

    Returns whether it died; anything but death and a clean end is an error.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            left = number

            def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **more: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if not left:
                        if torn and name in ("write", "pwrite"):
                            descriptor, data, *rest = arguments
                            real(descriptor, bytes(data)[: len(data) // 2], *rest)
                        os._exit(9)
                    return real(*arguments, **more)

                return call

            torch.set_num_threads(1)  # a forked child has none of the others
            for name in SYSTEM:
                setattr(os, name, counted(name, getattr(os, name)))
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended) in (0, 9)
    return os.waitstatus_to_exitcode(ended) == 9


@pytest.mark.parametrize("torn", [False, True], ids=["between", "within"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_killed_anywhere_the_same_run_ends_in_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool, old: bool
) -> None:
    for name in ("fsync", "fdatasync"):  # a killed process leaves its writes to the system
        monkeypatch.setattr(os, name, lambda descriptor: None)
    make(tmp_path / "Whole", source)
    whole = tiny.contents(tmp_path / "Whole")
    earlier = {"config.json": b"old", REPORT: json.dumps({"files": ["config.json", REPORT]}).encode()}
    number, died = 0, True
    while died:
        number += 1
        place = tmp_path / str(number)
        out = place / "Out"
        place.mkdir()
        if old:
            out.mkdir()
            for name, content in earlier.items():
                (out / name).write_bytes(content)
        died = killed_at(number, torn, lambda out=out: make(out, source, overwrite=old))  # type: ignore[misc]
        if out.exists():  # never anything but a whole folder, at most with the journal that comes off last
            found = {name: content for name, content in tiny.contents(out).items() if name != JOURNAL}
            assert found in (whole, earlier), number
        elif old:
            assert tiny.contents(place / "Out.replaced") == earlier, number
        if out.exists() and not old:
            with pytest.raises(UsageError, match="exists already"):
                make(out, source)
        else:
            make(out, source, overwrite=old)
        assert tiny.contents(out) == whole, number
        assert names(place) == ["Out"], number
        shutil.rmtree(place)
    assert number > 50


def test_a_calibrated_run_killed_by_signal_9(tmp_path: Path) -> None:
    """One run is killed as soon as it works, one in the middle."""
    model = tiny.llama(tmp_path / "model", tokenizer=True, num_hidden_layers=3)
    options = tiny.QUICK | {"method": "awq", "group_size": 32}
    quantize.run(model, out=tmp_path / "whole" / "Out", **options)
    whole = tiny.contents(tmp_path / "whole" / "Out")
    for lines in (1, 30):
        out = tmp_path / str(lines) / "Out"
        journal = partial_path(out) / JOURNAL
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)
                quantize.run(model, out=out, **options)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        while not (journal.is_file() and journal.read_bytes().count(b"\n") >= lines):
            assert time.monotonic() < deadline
            time.sleep(0.003)
        os.kill(child, signal.SIGKILL)
        _, ended = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(ended) == -signal.SIGKILL
        assert names(out.parent) == ["Out.partial"]
        assert lines == 1 or b'"done"' in journal.read_bytes()
        quantize.run(model, out=out, **options)
        assert tiny.contents(out) == whole
        assert names(out.parent) == ["Out"]


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_whole_run_killed_at_some_calls(tmp_path: Path, method: str) -> None:
    model = tiny.llama(tmp_path / "model", tokenizer=True, shards=2)
    options = tiny.QUICK | {"method": method, "group_size": 32}

    def run(place: str) -> None:
        quantize.run(model, out=tmp_path / place / "Out", **options)

    run("whole")
    whole = tiny.contents(tmp_path / "whole" / "Out")
    for number in random.Random(method).sample(range(1, 80), 4):
        assert killed_at(number, number % 2 == 0, lambda number=number: run(str(number)))  # type: ignore[misc]
        out = tmp_path / str(number) / "Out"
        if not out.exists():
            run(str(number))
        assert tiny.contents(out) == whole, number


# ------------------------------------------------------------------------------------------------------------
# What an unfinished run leaves


def test_only_what_was_committed_counts(tmp_path: Path) -> None:
    half_done(tmp_path / "Out")
    folder = start(tmp_path / "Out")
    assert folder.done == {"a", "c"}
    assert folder.records == {"a": {"notes": ["said"]}}
    with pytest.raises(VerificationError, match="tensor 'b' was never written"):
        folder.verify()
    folder.close()


def test_a_torn_last_line_is_forgotten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "Out"
    half_done(out)
    journal = partial_path(out) / JOURNAL
    content = journal.read_bytes()
    for torn in (b"{", b'{"done": "b", "crc32": 1', b"\0\0\0"):
        journal.write_bytes(content + torn)
        folder = start(out)
        assert folder.done == {"a", "c"}
        assert journal.read_bytes() == content
        folder.close()
    make(out, source)
    assert load_file(out / "model-00001-of-00002.safetensors")["b"].equal(value_of("b"))


@pytest.mark.parametrize("line", [b"nonsense", b"[]", b"\0\0", b"3"])
def test_lines_after_a_broken_one_are_not_believed(tmp_path: Path, line: bytes) -> None:
    half_done(tmp_path / "Out")
    journal = partial_path(tmp_path / "Out") / JOURNAL
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]))
    folder = start(tmp_path / "Out")
    assert folder.done == {"a"}
    folder.close()
    assert journal.read_bytes() == b"\n".join([*lines[:3], b""])


@pytest.mark.parametrize("place", [0, 7, 159])
def test_an_array_that_changed_on_disk_is_made_again(source: Path, tmp_path: Path, place: int) -> None:
    out = tmp_path / "Out"
    half_done(out)
    file = partial_path(out) / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    start_of_a = content.index(value_of("a").numpy().tobytes())
    content[start_of_a + place] ^= 1
    file.write_bytes(content)
    folder = start(out)
    assert folder.done == {"c"}
    folder.close()
    make(out, source)
    assert load_file(out / "model-00001-of-00002.safetensors")["a"].equal(value_of("a"))


@pytest.mark.parametrize("size", [0, 8, 150])
def test_a_file_that_was_cut_or_lost(source: Path, tmp_path: Path, size: int) -> None:
    out = tmp_path / "Out"
    half_done(out)
    file = partial_path(out) / "model-00001-of-00002.safetensors"
    if size:
        os.truncate(file, size)
    else:
        file.unlink()
    folder = start(out)
    assert folder.done == {"c"}
    folder.close()
    make(out, source)
    assert load_file(out / "model-00001-of-00002.safetensors")["a"].equal(value_of("a"))


def test_verification_finds_what_does_not_read_back(tmp_path: Path) -> None:
    folder = start(tmp_path / "Out")
    folder.put({name: value for tensors in TENSORS.values() for name, value in tensors.items()})
    folder.commit()
    folder.verify()
    with (folder.path / "model-00002-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(VerificationError, match=r"00002\.safetensors: tensor 'scalar' does not read back"):
        folder.verify()
    folder.discard()


def test_other_settings_are_refused_until_restart(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "Out"
    half_done(out)
    before = tiny.contents(partial_path(out))
    with pytest.raises(InputError, match="an unfinished run with other settings") as caught:
        start(out, "g")
    assert "--restart" in caught.value.hint
    assert tiny.contents(partial_path(out)) == before
    folder = start(out, "g", restart=True)
    assert not folder.done
    assert not folder.records
    folder.close()
    make(out, source, fingerprint="g")


def test_a_wrong_resume_of_a_whole_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model, text, seed or rule than that of the unfinished run."""
    model, other = tiny.llama(tmp_path / "one", tokenizer=True), tiny.llama(tmp_path / "two", seed=1, tokenizer=True)
    out, options = tmp_path / "Out", tiny.QUICK | {"method": "awq", "group_size": 32, "out": tmp_path / "Out"}
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "verify", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize.run(model, **options)
    before = tiny.contents(partial_path(out))
    changes: list[dict[str, Any]] = [
        {"calib_samples": 5},
        {"seed": 1},
        {"set": ("*.down_proj=keep",)},
        {"group_size": 16},
        {"method": "rtn"},
        {"dtype": "f32"},
    ]
    for change in ({"model": other}, *changes):
        with pytest.raises(InputError, match="other settings, text or model"):
            quantize.run(**({"model": model} | options | change))  # type: ignore[arg-type]
    assert tiny.contents(partial_path(out)) == before
    quantize.run(other, restart=True, **options)
    assert out.is_dir()
    assert not partial_path(out).exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = start(tmp_path / "Out")
    for restart in (False, True):
        with pytest.raises(UsageError, match="another run is at work there"):
            start(tmp_path / "Out", restart=restart)
    folder.close()
    start(tmp_path / "Out").close()


# ------------------------------------------------------------------------------------------------------------
# What is not ours


@pytest.mark.parametrize("content", [None, "", "my notes", '{"other": 1}\n'])
@pytest.mark.parametrize("restart", [False, True])
def test_a_foreign_partial_folder_is_left_alone(tmp_path: Path, restart: bool, content: str | None) -> None:
    folder = tmp_path / "Out.partial"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    if content:
        (folder / JOURNAL).write_text(content)
    before = tiny.contents(folder)
    with pytest.raises(UsageError, match="exists and is not ours"):
        start(tmp_path / "Out", restart=restart)
    assert tiny.contents(folder) == before


def test_a_file_in_the_place_of_the_partial_folder(tmp_path: Path) -> None:
    (tmp_path / "Out.partial").write_text("mine")
    with pytest.raises(UsageError, match=r"Out\.partial: is no folder"):
        start(tmp_path / "Out")
    assert (tmp_path / "Out.partial").read_text() == "mine"


def test_overwrite_replaces_only_what_we_wrote(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "Out"
    make(out, source)
    with pytest.raises(UsageError, match="exists already") as caught:
        check_target(out, [source], overwrite=False)
    assert "--overwrite" in caught.value.hint
    check_target(out, [source], overwrite=True)
    for name in ("notes.txt", ".git/config", "deep/more.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
        with pytest.raises(UsageError, match=f"holds {name}, which quantize did not write"):
            check_target(out, [source], overwrite=True)
        (out / name).unlink()
    (out / REPORT).write_text("{}")
    with pytest.raises(UsageError, match="which quantize did not write"):
        check_target(out, [source], overwrite=True)


def test_overwrite_refuses_a_model_of_others_and_a_file(source: Path, tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Model")
    with pytest.raises(UsageError, match=r"holds config\.json, which quantize did not write"):
        check_target(model, [source], overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="holds a file"):
        check_target(tmp_path / "file", [source], overwrite=True)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", [source], overwrite=True)


def test_overwrite_of_a_link_replaces_the_link(source: Path, tmp_path: Path) -> None:
    make(tmp_path / "Real", source)
    (tmp_path / "Out").symlink_to(tmp_path / "Real")
    make(tmp_path / "Out", source, overwrite=True)
    assert not (tmp_path / "Out").is_symlink()
    assert tiny.contents(tmp_path / "Out") == tiny.contents(tmp_path / "Real")
    (tmp_path / "Dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists already"):
        check_target(tmp_path / "Dangling", [source], overwrite=False)
    assert names(tmp_path) == ["Dangling", "Out", "Real", "source"]


def test_overwrite_leaves_a_folder_that_is_called_like_its_own_spare(source: Path, tmp_path: Path) -> None:
    make(tmp_path / "Out", source)
    (tmp_path / "Out.replaced").mkdir()
    (tmp_path / "Out.replaced" / "mine").touch()
    make(tmp_path / "Out", source, overwrite=True)
    assert names(tmp_path) == ["Out", "Out.replaced", "source"]
    assert names(tmp_path / "Out.replaced") == ["mine"]


@pytest.mark.parametrize("name", ["Photos", "../Photos", "Out.replaced-x", "Out.partial", ["Photos"], None])
def test_a_journal_that_came_with_a_folder_removes_nothing_else(tmp_path: Path, name: object) -> None:
    out = tmp_path / "deep" / "Out"
    out.mkdir(parents=True)
    (out / JOURNAL).write_text(json.dumps({"fingerprint": "f"}) + "\n" + json.dumps({"replaced": name}) + "\n")
    for other in ("Photos", "deep/Photos", "deep/Out.replaced-x", "deep/Out.partial"):
        (tmp_path / other).mkdir()
    before = sorted(tmp_path.rglob("*"))
    tidy(out)
    assert sorted(tmp_path.rglob("*")) == [path for path in before if path.name != JOURNAL]


def test_a_name_that_was_taken_meanwhile_keeps_the_work(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "Out"
    folder = start(out)
    folder.put({name: value for tensors in TENSORS.values() for name, value in tensors.items()})
    folder.commit()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ResourceError, match="Directory not empty") as caught:
        folder.publish(overwrite=False)
    assert "move away" in caught.value.hint
    folder.close()
    assert names(out) == ["mine"]
    shutil.rmtree(out)
    folder = start(out)
    assert len(folder.done) == 5
    folder.publish(overwrite=False)


def test_the_output_is_never_an_input(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "in" / "model")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "in-link").symlink_to(tmp_path / "in")
    for out in (model, tmp_path / "link", tmp_path / "in" / ".." / "in" / "model", tmp_path / "in-link" / "model"):
        with pytest.raises(UsageError, match="output and input are the same"):
            check_target(out, [model], overwrite=True)
        with pytest.raises(UsageError, match="output and input are the same"):
            quantize.run(model, method="rtn", out=out, overwrite=True)
    for out in (tmp_path / "in", tmp_path / "in-link"):
        with pytest.raises(UsageError, match="lies inside it"):
            check_target(out, [model], overwrite=True)
    with pytest.raises(UsageError, match="lies inside it"):
        check_target(tmp_path / "in", [tmp_path / "in-link" / "model"], overwrite=True)
    file, hard = tmp_path / "m.gguf", tmp_path / "hard.gguf"
    file.touch()
    os.link(file, hard)
    with pytest.raises(UsageError, match="output and input are the same"):
        check_target(hard, [file], overwrite=True)
    check_target(model / "inside", [model], overwrite=False)


# ------------------------------------------------------------------------------------------------------------
# A full disk


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that lets a system call fail for want of space after some good ones."""

    def arm(name: str, after: int = 0, code: int = errno.ENOSPC) -> None:
        real, count = getattr(os, name), iter(range(after))

        def call(*arguments: Any) -> Any:
            if next(count, None) is None:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_to_reserve_leaves_nothing(tmp_path: Path, full: Callable[..., None], after: int, code: int) -> None:
    full("posix_fallocate", after, code)
    with pytest.raises(ResourceError, match=os.strerror(code)) as caught:
        start(tmp_path / "Out")
    assert "free some space" in caught.value.hint
    assert names(tmp_path) == []


def test_no_space_to_reserve_keeps_what_an_earlier_run_did(tmp_path: Path, full: Callable[..., None]) -> None:
    half_done(tmp_path / "Out")
    full("posix_fallocate")
    with pytest.raises(ResourceError):
        start(tmp_path / "Out")
    assert (tmp_path / "Out.partial").is_dir()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_cannot_reserve(source: Path, tmp_path: Path, full: Callable[..., None], code: int) -> None:
    full("posix_fallocate", code=code)
    make(tmp_path / "Out", source)
    assert load_file(tmp_path / "Out" / "model-00002-of-00002.safetensors")["c"].equal(value_of("c"))


@pytest.mark.parametrize(
    ("call", "after"), [("pwrite", 2), ("pwrite", 6), ("fdatasync", 1), ("write", 2), ("fsync", 3), ("fsync", 9)]
)
def test_no_space_later_keeps_the_work(
    source: Path, tmp_path: Path, full: Callable[..., None], monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    make(tmp_path / "Whole", source)
    full(call, after)
    with pytest.raises(ResourceError, match="No space left"):
        make(tmp_path / "Out", source)
    monkeypatch.undo()
    assert not (tmp_path / "Out").exists()
    assert (tmp_path / "Out.partial").is_dir()
    make(tmp_path / "Out", source)
    assert tiny.contents(tmp_path / "Out") == tiny.contents(tmp_path / "Whole")


@pytest.mark.parametrize(("call", "after"), [("pwrite", 9), ("fdatasync", 3)])
def test_a_whole_run_on_a_full_disk_goes_on_later(
    tmp_path: Path, full: Callable[..., None], monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    model = tiny.llama(tmp_path / "model")
    quantize.run(model, method="rtn", group_size=32, out=tmp_path / "whole" / "Out")
    full(call, after)
    with pytest.raises(ResourceError) as caught:
        quantize.run(model, method="rtn", group_size=32, out=tmp_path / "Out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "Out").exists()
    assert OutputFolder.reserved_bytes(tmp_path / "Out") > 0
    monkeypatch.undo()
    quantize.run(model, method="rtn", group_size=32, out=tmp_path / "Out")
    assert tiny.contents(tmp_path / "Out") == tiny.contents(tmp_path / "whole" / "Out")


def test_other_faults_of_the_system_are_bad_input(tmp_path: Path, full: Callable[..., None]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Not a directory"):
        start(tmp_path / "file" / "Out")
    full("posix_fallocate", code=errno.EIO)
    with pytest.raises(InputError, match=os.strerror(errno.EIO)):
        start(tmp_path / "Out")


def test_a_side_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = start(tmp_path / "Out")
    with pytest.raises(InputError, match=r"gone\.txt: No such file"):
        folder.write_side_files({"gone.txt": tmp_path / "gone.txt"}, {})
    folder.discard()


# ------------------------------------------------------------------------------------------------------------
# Paths


def test_spaces_umlauts_and_a_current_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llama(tmp_path / "my model" / "Füße & 100% $HOME", tokenizer=True)
    before = tiny.contents(tmp_path / "my model")
    here = tmp_path / "read only"
    here.mkdir()
    here.chmod(0o555)
    monkeypatch.chdir(here)
    out = tmp_path / "Größe; rm -rf" / "The Out.put"
    report = quantize.run(model, method="awq", group_size=32, out=str(out), **tiny.QUICK)
    assert report.out == out
    assert names(here) == []
    assert names(out.parent) == ["The Out.put"]
    assert tiny.contents(tmp_path / "my model") == before
    assert len(quantize.open(out).tensors) == 21


def test_relative_outputs_land_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(tmp_path / "model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    quantize.run(model, method="rtn", group_size=32, out="Out")
    quantize.run("../model", method="rtn", group_size=32)
    assert names(tmp_path / "here") == ["Out", "model-RTN-Int4"]
    for out in (".", ".."):
        with pytest.raises(UsageError):
            quantize.run(model, method="rtn", group_size=32, out=out, overwrite=True)
    assert names(tmp_path) == ["here", "model"]
