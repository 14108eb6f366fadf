"""Turns a full-precision LLM checkpoint into a smaller one that real engines load, and says what that cost.

report = quantize.run("path/or/hub-id", method="awq", bits=4)
result = quantize.evaluate("Model-AWQ", base="path/or/hub-id")
checkpoint = quantize.open("Model-AWQ")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantize.version import VERSION as __version__

__all__ = [
    "__version__",
    "catalog",
    "compare",
    "convert",
    "edit",
    "evaluate",
    "importance",
    "inspect",
    "open",
    "plan",
    "run",
]

if TYPE_CHECKING:
    from quantize.api import catalog, compare, convert, edit, evaluate, importance, inspect, open, plan, run


def __getattr__(name: str) -> Any:
    """Loads the API when it is first used, so that `quantize --help` does not import torch."""
    if name in __all__:
        from quantize import api

        return getattr(api, name)
    raise AttributeError(f"module 'quantize' has no attribute '{name}'")
