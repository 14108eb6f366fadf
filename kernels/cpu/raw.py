"""Bare pointers inside compiled functions: arrays without shape, bounds or reference count.

An array costs its functions seven arguments, two atomic operations for each function that holds it, and three
instructions per index for negative ones. That is most of the time where functions work on a few numbers. So the
outermost function takes arrays and hands on pointers:

    pointer = raw(array)                    to the first element of a C-contiguous array
    pointer[i], pointer[i] = value          element i; nothing is checked, i must not be negative
    pointer + i                             pointer to element i

The array must outlive the pointer: only arguments of the outermost function are sure to. Only compiled functions can
use these.
"""

from __future__ import annotations

import operator
from typing import Any

from numba.core import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model


class Raw(types.Type):  # type: ignore[misc]
    """The numba type of a pointer."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Raw({dtype})")


@register_model(Raw)
class _RawModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, manager.lookup(kind.dtype).get_data_type().as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def raw(typing: Any, array: Any) -> Any:
    """Returns a pointer to the first element of a C-contiguous array."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_array(array)(context, builder, args[0]).data

    return Raw(array.dtype)(array), generate


def is_indexed(args: Any) -> bool:
    """Returns whether the first two types are a pointer and an integer."""
    return isinstance(args[0], Raw) and isinstance(args[1], types.Integer)


@infer_global(operator.getitem)
class _GetTyping(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(args[0].dtype, args[0], types.intp) if is_indexed(args) else None


@infer_global(operator.setitem)
class _SetTyping(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(types.none, args[0], types.intp, args[2]) if is_indexed(args) else None


@infer_global(operator.add)
class _AddTyping(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(args[0], args[0], types.intp) if is_indexed(args) else None


@lower_builtin(operator.getitem, Raw, types.Integer)  # type: ignore[untyped-decorator]
def _get(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return context.unpack_value(builder, sig.args[0].dtype, builder.gep(args[0], [args[1]]))


@lower_builtin(operator.setitem, Raw, types.Integer, types.Any)  # type: ignore[untyped-decorator]
def _set(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    dtype = sig.args[0].dtype
    value = context.cast(builder, args[2], sig.args[2], dtype)
    context.pack_value(builder, dtype, value, builder.gep(args[0], [args[1]]))
    return context.get_dummy_value()


@lower_builtin(operator.add, Raw, types.Integer)  # type: ignore[untyped-decorator]
def _add(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.gep(args[0], [args[1]])
