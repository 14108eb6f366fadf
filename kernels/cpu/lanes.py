"""Eight float32 numbers as one value inside compiled functions: explicit SIMD where loops do not become any.

LLVM turns a loop into SIMD code only if it can prove, or cheaply check, that nothing it writes overlaps what it
reads; the short loops of the codebook searches fail that. A value of this type is a vector from the start. LLVM maps
it to one register or several, whatever the processor has. Each lane does what a float32 would do, to the bit:
nothing is contracted or reordered.

    value = load(pointer, at)       eight numbers from pointer[at] (raw.py) on, float32 or int8
    value = splat(number)           the same number eight times
    a + b, a - b, a * b, a / b, minimum(a, b), maximum(a, b), root(a), whole(a), level(ratio, top)
    choose(less(a, b), this, other), bits(less(a, b))
    store(pointer, at, value), store_whole(pointer, at, value)
    lowest(value), highest(value)   the smallest and the largest lane

Only compiled functions can call these.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

WIDTH = 8

# numba's own annotations do not fit functions that are only ever compiled.
_infer_global: Callable[..., Callable[[Any], Any]] = infer_global
_lower_builtin: Callable[..., Callable[[Any], Any]] = lower_builtin
_intrinsic: Callable[[Any], Any] = intrinsic

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS, _BOOLS, _BYTES = (ir.VectorType(kind, WIDTH) for kind in (_FLOAT, _INT, ir.IntType(1), ir.IntType(8)))


class _Vector(types.Type):
    """A numba type that LLVM keeps in vector registers."""


_LANES, _MASK = _Vector(name="Lanes"), _Vector(name="LanesMask")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS if kind == _LANES else _BOOLS)  # type: ignore[no-untyped-call]


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * WIDTH)


def _vector_at(builder: Any, pointer: Any, index: Any, vector: Any) -> Any:
    """Returns where a vector lies behind a pointer."""
    return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())


def _whole(builder: Any, value: Any) -> Any:
    """The bits of value + 1.5 * 2**23 hold its nearest whole number, ties to even; too large numbers wrap around."""
    magic = _constant(12582912.0)
    bits = builder.bitcast(builder.fadd(value, magic), _INTS)
    bits = builder.and_(bits, ir.Constant(_INTS, [0x7FFFFF] * WIDTH))
    bits = builder.or_(bits, ir.Constant(_INTS, [0x4B000000] * WIDTH))
    return builder.fsub(builder.bitcast(bits, _FLOATS), magic)


def _least(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _most(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _define_operator(function: Callable[..., Any], name: str) -> None:
    @_infer_global(function)
    class _Typing(ConcreteTemplate):
        cases: ClassVar = [_LANES(_LANES, _LANES)]

    @_lower_builtin(function, _LANES, _LANES)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, name)(*args)


for _function, _name in {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}.items():
    _define_operator(getattr(operator, _function), _name)


def _spread(builder: Any, number: Any) -> Any:
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * WIDTH))


@_intrinsic
def splat(typing: Any, number: Any) -> Any:
    """Returns a float32 in all lanes."""
    return _LANES(types.float32), lambda context, builder, sig, args: _spread(builder, args[0])


@_intrinsic
def load(typing: Any, pointer: Any, at: Any) -> Any:
    """Returns eight numbers from pointer[at] on, float32 or int8."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if pointer.dtype == types.float32:
            return builder.load(_vector_at(builder, args[0], args[1], _FLOATS), align=4)
        values = builder.load(_vector_at(builder, args[0], args[1], _BYTES), align=1)
        return builder.sitofp(builder.sext(values, _INTS), _FLOATS)

    return _LANES(pointer, types.intp), generate


@_intrinsic
def store(typing: Any, pointer: Any, at: Any, value: Any) -> Any:
    """Writes eight float32 numbers from pointer[at] on."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> None:
        builder.store(args[2], _vector_at(builder, args[0], args[1], _FLOATS), align=4)

    return types.void(pointer, types.intp, _LANES), generate


@_intrinsic
def store_whole(typing: Any, pointer: Any, at: Any, value: Any) -> Any:
    """Writes eight whole numbers as int32 from pointer[at] on."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> None:
        numbers = builder.fptosi(args[2], _INTS)
        builder.store(numbers, _vector_at(builder, args[0], args[1], _INTS), align=4)

    return types.void(pointer, types.intp, _LANES), generate


@_intrinsic
def count_up(typing: Any) -> Any:
    """Returns 0, 1, .. 7."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(_FLOATS, [float(i) for i in range(WIDTH)])

    return _LANES(), generate


@_intrinsic
def minimum(typing: Any, a: Any, b: Any) -> Any:
    """Returns `a` where it is less, else `b`."""
    return _LANES(_LANES, _LANES), lambda context, builder, sig, args: _least(builder, *args)


@_intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """Returns `a` where it is greater, else `b`."""
    return _LANES(_LANES, _LANES), lambda context, builder, sig, args: _most(builder, *args)


@_intrinsic
def less(typing: Any, a: Any, b: Any) -> Any:
    """Returns where `a` is less than `b`, as a mask."""
    return _MASK(_LANES, _LANES), lambda context, builder, sig, args: builder.fcmp_ordered("<", *args)


@_intrinsic
def equal(typing: Any, a: Any, b: Any) -> Any:
    """Returns where two are equal, as a mask."""
    return _MASK(_LANES, _LANES), lambda context, builder, sig, args: builder.fcmp_ordered("==", *args)


@_intrinsic
def choose(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """Returns `a` where the mask is set, else `b`."""
    return _LANES(_MASK, _LANES, _LANES), lambda context, builder, sig, args: builder.select(*args)


@_intrinsic
def root(typing: Any, value: Any) -> Any:
    """Returns square roots."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        name, kind = f"llvm.sqrt.v{WIDTH}f32", ir.FunctionType(_FLOATS, [_FLOATS])
        function = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        return builder.call(function, args)

    return _LANES(_LANES), generate


@_intrinsic
def whole(typing: Any, value: Any) -> Any:
    """Returns the nearest whole numbers, ties to even; beyond 2**22 what llama.cpp makes of them (gridscan.wrapped)."""
    return _LANES(_LANES), lambda context, builder, sig, args: _whole(builder, args[0])


@_intrinsic
def level(typing: Any, ratio: Any, top: Any) -> Any:
    """Returns the levels 0..top whose odd numbers 2 * level + 1 are nearest to ratios."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        half = builder.fmul(_constant(0.5), builder.fsub(args[0], _constant(1.0)))
        return _least(builder, _most(builder, _whole(builder, half), _constant(0.0)), args[1])

    return _LANES(_LANES, _LANES), generate


@_intrinsic
def bits(typing: Any, mask: Any) -> Any:
    """Returns a mask as a number: bit i is lane i."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(WIDTH)), ir.IntType(64))

    return types.int64(_MASK), generate


def _extreme(builder: Any, value: Any, better: Callable[..., Any]) -> Any:
    for step in (4, 2, 1):
        moved = ir.Constant(_INTS, [i ^ step for i in range(WIDTH)])
        value = better(builder, value, builder.shuffle_vector(value, value, moved))
    return builder.extract_element(value, ir.Constant(_INT, 0))


@_intrinsic
def lowest(typing: Any, value: Any) -> Any:
    """Returns the smallest lane, float32."""
    return types.float32(_LANES), lambda context, builder, sig, args: _extreme(builder, args[0], _least)


@_intrinsic
def highest(typing: Any, value: Any) -> Any:
    """Returns the largest lane, float32."""
    return types.float32(_LANES), lambda context, builder, sig, args: _extreme(builder, args[0], _most)
