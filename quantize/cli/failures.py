"""How a command ends: an exit code, one line for what went wrong, and libraries that keep quiet."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

INTERRUPTED = 130
RESOURCES = 4
DEBUG = "--debug"


@dataclass
class Session:
    """What the end of a command needs to know of it.

    Attributes:
        words: The command line without the program's name.
        partial: Where an unfinished output lies; None for commands that make none.
    """

    words: Sequence[str]
    partial: Path | None = None

    @property
    def debug(self) -> bool:
        """Whether tracebacks and the libraries' own warnings are wanted."""
        return DEBUG in self.words


def guarded(session: Session, command: Callable[[], Any]) -> int:
    """Runs `command` and returns the exit code; what went wrong has been said on stderr by then."""
    try:
        with _quiet_libraries(session.debug):
            code = command()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        return 0 if follows() else _misused(error)  # the first worker says the same
    except (click.Abort, KeyboardInterrupt):
        say("error: interrupted", _resume(session))
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            # Whoever read our output has gone; what is still buffered must not raise again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return _failed(error, session)


def follows() -> bool:
    """Returns whether this is one of several workers, and not the first, which speaks for all."""
    if "RANK" not in os.environ:
        return False
    from quantize.ranks import workers

    return workers()[0] > 0


def say(line: str, *hints: str) -> None:
    """Writes one line to stderr, and non-empty hints indented under it."""
    head, colon, rest = " ".join(line.splitlines()).partition(":")
    color = {"error": "red", "note": "cyan"}.get(head)
    click.echo(click.style(head + colon, fg=color, bold=True) + rest if color else head + colon + rest, err=True)
    for hint in hints:
        if hint:
            click.echo(f"  {' '.join(hint.splitlines())}", err=True)


def _misused(error: click.ClickException) -> int:
    context = error.ctx if isinstance(error, click.UsageError) else None
    message = error.format_message().rstrip(".")
    say(f"error: {message[:1].lower()}{message[1:]}", f"hint: {context.command_path} --help" if context else "")
    return error.exit_code


def _failed(error: Exception, session: Session) -> int:
    """Says what an exception of a command means and returns its exit code."""
    from quantize.errors import QuantizeError, resource_error

    if session.debug:
        import traceback

        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if follows() and _told():
        return 0  # a code of its own would make torchrun end the first worker before it has spoken
    known = error if isinstance(error, QuantizeError) else resource_error(error)
    if known is None:
        kind = type(error).__name__
        lines = str(error).strip().splitlines()
        say(f"error: {kind}: {lines[0]}" if lines else f"error: {kind}", _logged(error, session))
        return 1
    resume = _resume(session) if known.exit_code == RESOURCES else ""
    say(f"error: {known.message}", f"hint: {known.hint}" if known.hint else "", resume)
    return known.exit_code


def _told() -> bool:
    """Returns whether the first worker knows of this one's error, and will say it."""
    from quantize.ranks import first_knows

    return first_knows()


def _resume(session: Session) -> str:
    """Returns the command that continues an unfinished output, or "" where nothing is kept."""
    if session.partial is None or not session.partial.exists():
        return ""
    words = [word for word in session.words if word != "--restart"]
    return f"to continue: {shlex.join(['quantize', *words])}"


def _logged(error: Exception, session: Session) -> str:
    """Writes the traceback of an unexpected error to a file and returns a line that names it."""
    import platform
    import tempfile
    import time
    import traceback

    from quantize import __version__

    state = os.environ.get("XDG_STATE_HOME")
    folder = Path(state) / "quantize" if state else Path(tempfile.gettempdir())
    file = folder / f"quantize-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    head = f"quantize {__version__}, Python {platform.python_version()}\n{shlex.join(['quantize', *session.words])}\n\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(head + "".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return f"hint: repeat the command with {DEBUG} to see where"
    return f"hint: this is a fault of quantize; {file} tells where"


@contextmanager
def _quiet_libraries(debug: bool) -> Iterator[None]:
    """Keeps warnings and notices of libraries off the terminal; what matters of them is said by us."""
    if debug:
        yield
        return
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Without any handler Python prints the warnings of every logger.
    silence = logging.NullHandler()
    logging.getLogger().addHandler(silence)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(silence)
