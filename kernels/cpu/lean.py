"""How loops without memory of their own are compiled, and selections that stay such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import types
from numba.extending import intrinsic

from quantize.kernels.cpu.numeric import compiled

_F = TypeVar("_F", bound=Callable[..., Any])
_intrinsic: Callable[[Any], Any] = intrinsic


def lean(function: _F) -> _F:
    """Does what `numeric.compiled` does, but does not count references to arrays.

    Counting takes two atomic instructions for every slice, as much time as a short block needs. In exchange such a
    function must not make arrays: it gets all that it works in.
    """
    loop: Any = compiled(function)
    loop.targetoptions["_nrt"] = False
    return loop  # type: ignore[no-any-return]


@_intrinsic
def pick(typing_context: Any, condition: Any, one: Any, other: Any) -> Any:
    """Returns `one if condition else other`, as a selection and never as a branch.

    Still, where it is stored to the place that `other` was loaded from, the compiler makes a store under a condition
    of it, and that is many times slower than storing either: loops here store elsewhere and copy.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return one(types.boolean, one, one), build
