"""Help: it teaches, it is there for every command, and it answers at once."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any

import click
import pytest

from quantize.cli import COMMANDS, root

HELP = [sys.executable, "-c", "import sys; from quantize.cli import main; sys.argv = ['quantize', '--help']; main()"]
CLICK = [sys.executable, "-c", "import click"]


def command(name: str) -> click.Command:
    found: click.Command = import_module(f"quantize.cli.{name}").command
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(cli: Callable[..., Any], name: str) -> None:
    result = cli(name, "--help")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    examples = [line for line in lines if line.startswith(f"    quantize {name}")]
    assert len(examples) >= (1 if name == "list" else 2), result.stdout
    assert cli(name, "-h").stdout == result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_page_repeats_the_first_sentence_of_each_command(name: str) -> None:
    assert (command(name).help or "").split("\n")[0] == COMMANDS[name]
    assert command(name).name == name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    for option in command(name).params:
        if isinstance(option, click.Option):
            assert option.help, option.opts


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_parse(name: str) -> None:
    import shlex

    for line in (command(name).epilog or "").splitlines()[2:]:
        words = shlex.split(line.split(" | ")[0])
        assert words[:2] == ["quantize", name]
        command(name).make_context(name, words[2:], resilient_parsing=False)


def test_defaults_are_those_of_the_library() -> None:
    from quantize.pipeline import Settings

    context = command("run").make_context("run", ["Model"])
    library = {field.name: getattr(Settings(), field.name) for field in fields(Settings)}
    given = {name: value for name, value in context.params.items() if name not in ("model", "as_json", "dry_run")}
    assert given == library


def test_no_arguments_show_the_help(cli: Callable[..., Any]) -> None:
    result = cli()
    assert "Commands:" in result.stdout + result.stderr


def test_version(cli: Callable[..., Any]) -> None:
    from quantize import __version__

    assert cli("--version").stdout == f"quantize {__version__}\n"


def test_python_m_quantize() -> None:
    result = subprocess.run([sys.executable, "-m", "quantize", "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("Usage: quantize ")


def test_help_leaves_heavy_packages_alone() -> None:
    code = (
        "import atexit, sys; from quantize.cli import main; sys.argv = ['quantize', '--help'];"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = result.stderr.split()
    assert not {"torch", "rich", "numpy", "transformers", "yaml", "pydantic"} & set(loaded)
    ours = {name for name in loaded if name.startswith("quantize")}
    assert {name for name in ours if not name.startswith("quantize.cli")} <= {"quantize", "quantize.version"}
    assert not {f"quantize.cli.{name}" for name in COMMANDS} & ours


def seconds(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def test_help_answers_at_once() -> None:
    figures: list[tuple[float, float]] = []
    for _ in range(4):  # the machine may be busy with other things
        pairs = [(seconds(HELP), seconds(CLICK)) for _ in range(7)]
        ours, click_alone = (statistics.median(side) for side in zip(*pairs, strict=True))
        if ours < 0.3 and ours < 2 * click_alone:
            return
        figures.append((ours, click_alone))
    pytest.fail(f"seconds for the help page and for importing click: {figures}")


def test_an_unknown_command_or_option_names_the_nearest(cli: Callable[..., Any]) -> None:
    result = cli("evla", "Model")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "error: no such command 'evla'; did you mean 'eval'?"
    result = cli("run", "Model", "--bitz", "4")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no such option")
    assert "--bits" in result.stderr.splitlines()[0]


def test_the_group_lists_what_it_finds() -> None:
    context = click.Context(root)
    assert [root.get_command(context, name) is not None for name in root.list_commands(context)] == [True] * len(
        COMMANDS
    )
    assert root.get_command(context, "quantise") is None
