"""How long work tells its caller how far it is, without printing."""

from __future__ import annotations

from collections.abc import Callable

# What is being done, how many parts are done, and of how many.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Reports to nobody."""
