"""Option values, the peers' spellings, and what no command accepts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from quantize.cli import options
from quantize.cli.eval import command as eval_command
from quantize.cli.run import command as run_command


def parsed(command: click.Command, *words: str) -> dict[str, Any]:
    return command.make_context(command.name, list(words)).params


@pytest.mark.parametrize(
    ("word", "ours", "value"),
    [
        ("--q-bits", "bits", 3),
        ("--q_bits", "bits", 3),
        ("--wbits", "bits", 3),
        ("--w-bit", "bits", 3),
        ("--w_bit", "bits", 3),
        ("--group_size", "group_size", 3),
        ("--q-group-size", "group_size", 3),
        ("--q_group_size", "group_size", 3),
        ("--groupsize", "group_size", 3),
        ("--output", "out", "3"),
        ("--output_dir", "out", "3"),
        ("--nsamples", "calib_samples", 3),
        ("--num_calibration_samples", "calib_samples", 3),
        ("--seqlen", "calib_length", 3),
        ("--max_seq_length", "calib_length", 3),
        ("--dataset", "calib", ("3",)),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_peers_spellings(word: str, ours: str, value: object, joined: bool, capsys: pytest.CaptureFixture[str]) -> None:
    params = parsed(run_command, "Model", *([f"{word}=3"] if joined else [word, "3"]))
    assert params[ours] == value
    assert params["model"] == "Model"
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1
    assert word in notes[0]
    assert f"--{ours.replace('_', '-')} " in notes[0]


def test_peers_spellings_mean_what_the_command_has() -> None:
    assert parsed(eval_command, "Model", "--dataset", "x.txt", "--seqlen", "64")["text"] == "x.txt"
    assert parsed(eval_command, "Model", "--n_ctx", "64")["context"] == 64


def test_every_option_is_understood_in_snake_case(capsys: pytest.CaptureFixture[str]) -> None:
    for option in run_command.params:
        for name in option.opts if isinstance(option, click.Option) else ():
            snake = "--" + name.removeprefix("--").replace("-", "_")
            if snake != name:
                assert options.Command._respelt(run_command, [snake]) == [name]


def test_peers_point_at_options_that_exist() -> None:
    from importlib import import_module

    from quantize.cli import COMMANDS

    known = {name for c in COMMANDS for p in import_module(f"quantize.cli.{c}").command.params for name in p.opts}
    for theirs, ours in options.PEERS.items():
        assert set(ours) <= known, theirs


def test_a_model_option_is_the_argument() -> None:
    assert parsed(run_command, "--model", "Model")["model"] == "Model"
    assert parsed(run_command, "--hf-path=Model")["model"] == "Model"


def test_what_follows_two_dashes_is_left_alone() -> None:
    assert parsed(run_command, "--", "--w_bit")["model"] == "--w_bit"


def test_values_are_left_alone() -> None:
    assert parsed(run_command, "Model", "--set", "a_b=int4-g32")["set"] == ("a_b=int4-g32",)


@pytest.mark.parametrize(
    ("text", "number"),
    [("2GB", 2 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("64k", 64000), ("1024", 1024), ("1 gb", 10**9)],
)
def test_sizes(text: str, number: int) -> None:
    assert parsed(run_command, "Model", "--activation-budget", text)["activation_budget"] == number


@pytest.mark.parametrize(("text", "number"), [("2%", 0.02), ("0.02", 0.02), ("90 %", 0.9), ("1", 1.0), ("150%", 1.5)])
def test_shares(text: str, number: float) -> None:
    params = parsed(eval_command, "Model", "--base", "Base", "--max-ppl-increase", text)
    assert params["max_ppl_increase"] == pytest.approx(number)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "Model", "--activation-budget", "much"), "'much' is no size"),
        (("eval", "Model", "--base", "B", "--min-top1", "90"), "may mean 90% or 9000%"),
        (("eval", "Model", "--base", "B", "--min-top1", "most"), "'most' is no share"),
        (("run", "Model", "--device", "cuda"), "only cpu is"),
        (("run", "Model", "--bits", "four"), "'four' is not a valid integer"),
        (("run", "Model", "--threads", "0"), "--threads"),
        (("eval", "Model", "--min-top1", "90%"), "a limit needs a base"),
        (("eval",), "missing argument 'MODEL'"),
        (("run", "Model", "Other", "--method", "rtn"), "unexpected extra argument"),
    ],
)
def test_misuse_is_one_line_with_code_2(cli: Callable[..., Any], words: tuple[str, ...], said: str) -> None:
    result = cli(*words)
    assert result.exit_code == 2
    first, hint = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert said in first
    assert hint == f"  hint: quantize {words[0]} --help"
    assert result.stdout == ""


def test_neither_method_nor_type(cli: Callable[..., Any], tiny_llama: Callable[..., Path]) -> None:
    result = cli("run", tiny_llama())
    assert result.exit_code == 2
    assert "--method" in result.stderr
    assert "--type" in result.stderr


def test_no_model_and_none_here(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("run", "--method", "rtn")
    assert result.exit_code == 2
    assert "no model named" in result.stderr
    monkeypatch.chdir(tiny_llama())
    assert cli("inspect", "--json").exit_code == 0
    assert cli("plan", "--method", "rtn", "--out", tmp_path / "out").exit_code == 0
