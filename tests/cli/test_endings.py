"""How commands end: interrupts, faults of our own, memory, and libraries that would like to be heard."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize import api
from quantize.methods.rtn import RTN

Cli = Callable[..., Any]
Tiny = Callable[..., Path]


def failing_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture
def third_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """A function after which the third tensor of a run fails, once."""

    def arm(error: BaseException) -> None:
        original, calls = RTN.quantize, []

        def quantize(self: RTN, block: Any, pool: Any) -> Any:
            calls.append(block)
            if len(calls) == 3:
                raise error
            return original(self, block, pool)

        monkeypatch.setattr(RTN, "quantize", quantize)

    return arm


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 4), (OSError(28, "No space left on device"), 4)]
)
def test_what_can_be_resumed_is_kept_and_continued(
    cli: Cli, tiny_llama: Tiny, tmp_path: Path, third_fails: Callable[..., None], error: BaseException, code: int
) -> None:
    whole, out = tmp_path / "Whole", tmp_path / "Out"
    words = ("run", tiny_llama(), "--method", "rtn", "--group-size", "32", "--out")
    assert cli(*words, whole).exit_code == 0
    third_fails(error)
    result = cli(*words, out)
    assert result.exit_code == code
    assert not out.exists()
    assert (tmp_path / "Out.partial").is_dir()
    assert result.stderr.count("error:") == 1
    resume = next(line for line in result.stderr.splitlines() if line.startswith("  to continue: "))
    assert resume.endswith(f"quantize {' '.join(map(str, (*words, out)))}")
    assert cli(*words, out).exit_code == 0
    assert not (tmp_path / "Out.partial").exists()
    for file in whole.iterdir():
        if file.name != "README.md":  # its title is the folder's name
            assert (out / file.name).read_bytes() == file.read_bytes()


def test_an_interrupt_elsewhere_has_nothing_to_continue(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "inspect", failing_with(KeyboardInterrupt()))
    result = cli("inspect", "Model")
    assert result.exit_code == 130
    assert result.stderr.strip() == "error: interrupted"


def test_an_unexpected_error_is_one_line_and_a_log(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(api, "inspect", failing_with(ValueError("first line\nsecond line")))
    result = cli("inspect", "Model")
    assert result.exit_code == 1
    first, hint = result.stderr.splitlines()
    assert first == "error: ValueError: first line"
    log = next((tmp_path / "quantize").iterdir())
    assert str(log) in hint
    assert "Traceback" in log.read_text()
    assert "quantize inspect Model" in log.read_text()


def test_a_log_that_cannot_be_written_is_no_second_error(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(api, "inspect", failing_with(ValueError()))
    result = cli("inspect", "Model")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ValueError\n")
    assert "--debug" in result.stderr


def test_debug_shows_tracebacks(cli: Cli, tmp_path: Path) -> None:
    assert "Traceback" not in cli("inspect", tmp_path / "nothing").stderr
    result = cli("inspect", tmp_path / "nothing", "--debug")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert result.stderr.count("\nerror: ") == 1


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), OSError(12, "x")],
)
def test_no_memory_is_4(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(api, "inspect", failing_with(error))
    result = cli("inspect", "Model")
    assert result.exit_code == 4
    assert result.stderr.startswith("error: out of memory\n")


def test_an_output_that_does_not_read_back_is_7(
    cli: Cli, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantize.writer import OutputFolder

    monkeypatch.setattr(OutputFolder, "_checksum", lambda *_: -1)
    result = cli("run", tiny_llama(), "--method", "rtn", "--group-size", "32", "--out", tmp_path / "Out")
    assert result.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_libraries_do_not_write_on_the_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    def loud(_: Any) -> dict[str, Any]:
        warnings.warn("a warning of a library", UserWarning, stacklevel=1)
        logging.getLogger("some.library").warning("another")
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "inspect", loud)
    assert "library" not in cli("inspect", "Model").stderr


def test_a_reader_that_leaves_is_no_error(tiny_llama: Tiny) -> None:
    command = [sys.executable, "-m", "quantize", "inspect", str(tiny_llama()), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert said == b""


def test_a_whole_process_is_quiet(tiny_llama: Tiny, tmp_path: Path) -> None:
    words = ["run", str(tiny_llama()), "--method", "rtn", "--group-size", "32", "--out", "Out", "--json"]
    result = subprocess.run([sys.executable, "-m", "quantize", *words], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["out"] == "Out"
    head, sizes = result.stderr.splitlines()
    assert head.startswith(str(tiny_llama()))
    assert "->" in sizes
