"""The errors that end a command, each with its exit code.

QuantizeError                1   unexpected
├── UsageError               2   options that contradict, a pattern that matches nothing, an output that exists
├── InputError               3   a model, file or text that is missing, broken, unsupported or gated
├── ResourceError            4   memory or disk; work is saved and can be resumed
├── QualityError             5   a quality limit was exceeded
├── InconclusiveError        6   a gate could not decide and was asked to fail then
└── VerificationError        7   the written output does not read back as planned

130 (interrupted) is not an error of ours: the command line maps KeyboardInterrupt to it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch's allocator says in its RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class QuantizeError(Exception):
    """Base of all errors meant for the user: one line that says what and where, and one that says what next.

    Attributes:
        message: What went wrong, naming file and tensor.
        hint: What to do next; may be empty.
        exit_code: The process exit code that this kind of error ends in.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(QuantizeError):
    """The command itself cannot be carried out as given."""

    exit_code = 2


class InputError(QuantizeError):
    """A model, file or text cannot be used."""

    exit_code = 3


class ResourceError(QuantizeError):
    """Memory or disk does not suffice."""

    exit_code = 4


class QualityError(QuantizeError):
    """A quality limit was exceeded."""

    exit_code = 5


class InconclusiveError(QuantizeError):
    """A gate could not decide and was asked to fail in that case."""

    exit_code = 6


class VerificationError(QuantizeError):
    """The written output does not read back as planned."""

    exit_code = 7


def resource_error(error: BaseException) -> ResourceError | None:
    """Returns the error of ours for an exception by which the system or torch says that memory or disk ran out.

    None for every other exception.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f"{error.filename}: " if error.filename else ""
        return ResourceError(f"{where}{error.strerror}", "free some space, then repeat the command")
    said = str(error)
    starved = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if starved or (isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)):
        return ResourceError(
            "out of memory", "try fewer --threads, a smaller --activation-budget or fewer --calib-samples"
        )
    return None


@contextmanager
def system_errors(path: object, hint: str) -> Iterator[None]:
    """A context in which the system's errors become ours, naming their own file or else `path`."""
    try:
        yield
    except OSError as error:
        full = resource_error(error)
        kind, way_out = (ResourceError, full.hint) if full else (InputError, hint)
        raise kind(f"{error.filename or path}: {error.strerror or error}", way_out) from error


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """Returns the error for a `kind` called `name` that does not exist, listing the nearest or all `choices`."""
    known = sorted(choices)
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(known)}"
    return UsageError(f"unknown {kind} '{name}'", hint)
