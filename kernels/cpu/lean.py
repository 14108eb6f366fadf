"""How loops without memory of their own are compiled, and selections that stay such."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba import types
from numba.extending import intrinsic

_F = TypeVar("_F", bound=Callable[..., Any])


def lean(function: _F) -> _F:
    """Does what `numeric.compiled` does, but does not count references to arrays.

    Counting takes two atomic instructions for every slice, as much time as a short block needs. In exchange such a
    function must not make arrays: it gets all that it works in.
    """
    options = {"cache": True, "nogil": True, "error_model": "numpy", "boundscheck": False, "_nrt": False}
    compiled = numba.njit(**options)(function)
    # numba would keep machine code as long as the file of the function itself does not change, whatever is compiled
    # into it from others here.
    stored = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if hasattr(stored, "_source_stamp"):
        stored._source_stamp = _stamp()
    return compiled  # type: ignore[no-any-return]


@cache
def _stamp() -> tuple[float, int]:
    """Returns the time of the last change in this folder, and the size of all its modules."""
    states = [path.stat() for path in Path(__file__).parent.glob("*.py")]
    return max(state.st_mtime for state in states), sum(state.st_size for state in states)


@intrinsic  # type: ignore[untyped-decorator]
def pick(typing_context: Any, condition: Any, one: Any, other: Any) -> Any:
    """Returns `one if condition else other`, as a selection and never as a branch.

    Still, where it is stored to the place that `other` was loaded from, the compiler makes a store under a condition
    of it, and that is many times slower than storing either: loops here store elsewhere and copy.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return one(types.boolean, one, one), build
