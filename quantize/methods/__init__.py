"""The methods, one module each. A new one takes its module and one line in the table below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import entry_points
from typing import Any, cast

from quantize.errors import UsageError, unknown_name
from quantize.methods.awq import AWQ
from quantize.methods.awq_gptq import AWQGPTQ
from quantize.methods.base import Block, Method, Prepared, Result
from quantize.methods.gptq import GPTQ
from quantize.methods.rtn import RTN

__all__ = ["METHODS", "Block", "Method", "Prepared", "Result", "named", "table"]

METHODS: dict[str, Method] = {method.name: method for method in (RTN(), AWQ(), GPTQ(), AWQGPTQ())}


def table() -> dict[str, Method]:
    """Returns our methods and those that other packages announce under the entry point `quantize.methods`."""
    others = (entry.load()() for entry in entry_points(group="quantize.methods"))
    return {method.name: method for method in others} | METHODS


def named(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Returns the method called `name`.

    Args:
        name: Its name.
        options: What differs from its defaults, by the names of its attributes.

    Raises:
        UsageError: there is none, or it has no such option; the message lists the choices.
    """
    known = table()
    if name not in known:
        raise unknown_name("method", name, known)
    method = known[name]
    if not options:
        return method
    for option in options:
        if option not in _options(method):
            users = [other.name for other in known.values() if option in _options(other)]
            said = option.replace("_", "-")
            raise UsageError(f"--{said} has no meaning for method {name}", f"methods that have it: {', '.join(users)}")
    return cast(Method, replace(cast(Any, method), **options))


def _options(method: Any) -> list[str]:
    return [field.name for field in fields(method)] if is_dataclass(method) else []
