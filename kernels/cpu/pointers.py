"""What raw.py describes, as LLVM code. Imported only when something must be compiled."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

# numba's own annotations do not fit functions that are only ever compiled.
_infer_global: Callable[..., Callable[[Any], Any]] = infer_global
_lower_builtin: Callable[..., Callable[[Any], Any]] = lower_builtin
_intrinsic: Callable[[Any], Any] = intrinsic


class Raw(types.Type):
    """The numba type of a pointer."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Raw({dtype})")


@register_model(Raw)
class _RawModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        element = manager.lookup(kind.dtype).get_data_type()
        super().__init__(manager, kind, element.as_pointer())  # type: ignore[no-untyped-call]


@_intrinsic
def raw(typing: Any, array: Any) -> Any:
    """Returns a pointer to the first element of a C-contiguous array."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_array(array)(context, builder, args[0]).data

    return Raw(array.dtype)(array), generate


def _is_indexed(args: Any) -> bool:
    """Returns whether the first two types are a pointer and an integer."""
    return isinstance(args[0], Raw) and isinstance(args[1], types.Integer)


@_infer_global(operator.getitem)
class _GetTyping(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        return args[0].dtype(args[0], types.intp) if _is_indexed(args) else None


@_infer_global(operator.setitem)
class _SetTyping(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        return types.none(args[0], types.intp, args[2]) if _is_indexed(args) else None


@_infer_global(operator.add)
class _AddTyping(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        return args[0](args[0], types.intp) if _is_indexed(args) else None


@_lower_builtin(operator.getitem, Raw, types.Integer)
def _get(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return context.unpack_value(builder, sig.args[0].dtype, builder.gep(args[0], [args[1]]))


@_lower_builtin(operator.setitem, Raw, types.Integer, types.Any)
def _set(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    dtype = sig.args[0].dtype
    value = context.cast(builder, args[2], sig.args[2], dtype)
    context.pack_value(builder, dtype, value, builder.gep(args[0], [args[1]]))
    return context.get_dummy_value()


@_lower_builtin(operator.add, Raw, types.Integer)
def _add(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.gep(args[0], [args[1]])
