"""The methods, one module each. A new one takes its module and one line in the table below."""

from __future__ import annotations

from importlib.metadata import entry_points

from quantize.errors import unknown_name
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


def named(name: str) -> Method:
    """Returns the method called `name`.

    Raises:
        UsageError: there is none; the message lists the choices.
    """
    known = table()
    if name not in known:
        raise unknown_name("method", name, known)
    return known[name]
