"""The group of commands: which there are, and how one is found and ended.

A new command takes its module, whose `click.Command` is called `command`, and one line in the table below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from quantize.cli.failures import Session, follows, guarded

# In the order of the help page; each line is the first sentence of the command's own help.
COMMANDS = {
    "run": "Quantize a model: any method to any format that holds it.",
    "convert": "Write a model in another format without coarser rounding.",
    "plan": "Show what a run would do: schemes, sizes, memory, fallbacks.",
    "eval": "Measure a model's quality, and pass or fail it against limits.",
    "inspect": "Show what a checkpoint holds, or in what two differ.",
    "imatrix": "Gather, merge or show an importance matrix: what llama.cpp's types weigh their errors by.",
    "edit": "Change the metadata of a GGUF file; tensors stay as they are.",
    "list": "List methods, formats and schemes, and which go together.",
}

# Those that several workers share; the others are the first one's alone.
_SHARED = ("run", "convert", "eval", "imatrix")

_EXAMPLES = """\b
Examples:
  quantize run path/or/hub-id --method awq --bits 4
  quantize eval Model-AWQ --base path/or/hub-id
  quantize COMMAND --help
"""


class Commands(click.Group):
    """A group that imports a command's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns a command, or None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"quantize.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the command that `args` begin with; the error for an unknown one names the nearest."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, n=1)
            said = f"did you mean '{close[0]}'?" if close else f"commands are: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command '{args[0]}'; {said}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the table, without importing the commands for their help."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Runs one command and exits with its code; whatever goes wrong ends in one line."""
        session = Session(list(sys.argv[1:] if args is None else args))
        extra |= {"standalone_mode": False, "obj": session}
        main = super().main

        def run() -> int:
            return guarded(session, lambda: main(session.words, prog_name or "quantize", **extra))

        sys.exit(_silently(session.words, run) if follows() else run())


def _silently(words: Sequence[str], run: Callable[[], int]) -> int:
    """Does the part of a worker that another one speaks for; nothing where there is nothing to share."""
    if "--dry-run" in words or not words or words[0] not in _SHARED:
        return 0
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        return run()


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from quantize import __version__

        click.echo(f"quantize {__version__}")
        ctx.exit()


@click.group(
    "quantize",
    cls=Commands,
    epilog=_EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def root() -> None:
    """Turns a full-precision language model into a smaller one that real engines load, and says what that cost."""


def main() -> None:
    """The console script `quantize`."""
    root.main()
