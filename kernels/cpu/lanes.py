"""Eight float32 numbers as one value inside compiled functions: explicit SIMD where loops do not become any.

LLVM turns a loop into SIMD code only if it can prove, or cheaply check, that nothing it writes overlaps what it
reads; the short loops of the codebook searches fail that. A value of this type is a vector from the start. LLVM maps
it to one register or several, whatever the processor has. Each lane does what a float32 would do, to the bit:
nothing is contracted or reordered.

    value = load(array, at)     eight numbers from array[at] on; also of int8 arrays
    value = splat(number)       the same number eight times
    value = spread(array, at)   array[at] eight times
    a + b, a - b, a * b, a / b, minimum(a, b), maximum(a, b), root(a), whole(a), level(ratio, top)
    choose(less(a, b), this, other)
    store(array, at, value), store_whole(array, at, value)
    lowest(value)               the smallest lane
    peek(array, at), poke(array, at, value)     one number

Only compiled functions can call these.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

WIDTH = 8

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS, _BOOLS = (ir.VectorType(kind, WIDTH) for kind in (_FLOAT, _INT, ir.IntType(1)))


class _Vector(types.Type):  # type: ignore[misc]
    """A numba type that LLVM keeps in vector registers."""


_LANES, _MASK = _Vector(name="Lanes"), _Vector(name="LanesMask")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS if kind == _LANES else _BOOLS)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * WIDTH)


def _element(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Returns where an element lies in a C-contiguous array of one dimension."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    """Returns where a vector lies in an array."""
    return builder.bitcast(_element(context, builder, kind, array, index), vector.as_pointer())


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
    @infer_global(function)
    class _Typing(ConcreteTemplate):  # type: ignore[misc]
        cases = [signature(_LANES, _LANES, _LANES)]

    @lower_builtin(function, _LANES, _LANES)  # type: ignore[untyped-decorator]
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, name)(*args)


for _function, _name in {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}.items():
    _define_operator(getattr(operator, _function), _name)


@intrinsic  # type: ignore[untyped-decorator]
def splat(typing: Any, number: Any) -> Any:
    """Returns a float32 in all lanes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), args[0], ir.Constant(_INT, 0))
        return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * WIDTH))

    return _LANES(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def spread(typing: Any, array: Any, at: Any) -> Any:
    """Returns array[at], float32, in all lanes; `at` is not negative."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        one = builder.load(_element(context, builder, array, *args))
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), one, ir.Constant(_INT, 0))
        return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * WIDTH))

    return _LANES(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def peek(typing: Any, array: Any, at: Any) -> Any:
    """Returns array[at]. `at` is not negative: plain indexing spends three instructions on that."""
    return array.dtype(array, types.intp), lambda context, builder, sig, args: builder.load(
        _element(context, builder, array, *args)
    )


@intrinsic  # type: ignore[untyped-decorator]
def poke(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Does array[at] = value. `at` is not negative."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> None:
        builder.store(args[2], _element(context, builder, array, args[0], args[1]))

    return types.void(array, types.intp, array.dtype), generate


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, at: Any) -> Any:
    """Returns eight numbers of a C-contiguous float32 or int8 array of one dimension."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if array.dtype == types.float32:
            return builder.load(_pointer(context, builder, array, *args, _FLOATS), align=4)
        small = ir.VectorType(ir.IntType(8), WIDTH)
        values = builder.load(_pointer(context, builder, array, *args, small), align=1)
        return builder.sitofp(builder.sext(values, _INTS), _FLOATS)

    return _LANES(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Writes eight float32 numbers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> None:
        builder.store(args[2], _pointer(context, builder, array, args[0], args[1], _FLOATS), align=4)

    return types.void(array, types.intp, _LANES), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_whole(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Writes eight whole numbers to an int32 array."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> None:
        pointer = _pointer(context, builder, array, args[0], args[1], _INTS)
        builder.store(builder.fptosi(args[2], _INTS), pointer, align=4)

    return types.void(array, types.intp, _LANES), generate


@intrinsic  # type: ignore[untyped-decorator]
def count_up(typing: Any) -> Any:
    """Returns 0, 1, .. 7."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(_FLOATS, [float(i) for i in range(WIDTH)])

    return _LANES(), generate


@intrinsic  # type: ignore[untyped-decorator]
def minimum(typing: Any, a: Any, b: Any) -> Any:
    """Returns `a` where it is less, else `b`."""
    return _LANES(_LANES, _LANES), lambda context, builder, sig, args: _least(builder, *args)


@intrinsic  # type: ignore[untyped-decorator]
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """Returns `a` where it is greater, else `b`."""
    return _LANES(_LANES, _LANES), lambda context, builder, sig, args: _most(builder, *args)


@intrinsic  # type: ignore[untyped-decorator]
def less(typing: Any, a: Any, b: Any) -> Any:
    """Returns where `a` is less than `b`, as a mask."""
    return _MASK(_LANES, _LANES), lambda context, builder, sig, args: builder.fcmp_ordered("<", *args)


@intrinsic  # type: ignore[untyped-decorator]
def equal(typing: Any, a: Any, b: Any) -> Any:
    """Returns where two are equal, as a mask."""
    return _MASK(_LANES, _LANES), lambda context, builder, sig, args: builder.fcmp_ordered("==", *args)


@intrinsic  # type: ignore[untyped-decorator]
def choose(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """Returns `a` where the mask is set, else `b`."""
    return _LANES(_MASK, _LANES, _LANES), lambda context, builder, sig, args: builder.select(*args)


@intrinsic  # type: ignore[untyped-decorator]
def root(typing: Any, value: Any) -> Any:
    """Returns square roots."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [_FLOATS]), args)

    return _LANES(_LANES), generate


@intrinsic  # type: ignore[untyped-decorator]
def whole(typing: Any, value: Any) -> Any:
    """Returns the nearest whole numbers, ties to even; beyond 2**22 what llama.cpp makes of them (gridscan.wrapped)."""
    return _LANES(_LANES), lambda context, builder, sig, args: _whole(builder, args[0])


@intrinsic  # type: ignore[untyped-decorator]
def level(typing: Any, ratio: Any, top: Any) -> Any:
    """Returns the levels 0..top whose odd numbers 2 * level + 1 are nearest to ratios."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        half = builder.fmul(_constant(0.5), builder.fsub(args[0], _constant(1.0)))
        return _least(builder, _most(builder, _whole(builder, half), _constant(0.0)), args[1])

    return _LANES(_LANES, _LANES), generate


@intrinsic  # type: ignore[untyped-decorator]
def lowest(typing: Any, value: Any) -> Any:
    """Returns the smallest lane, float32."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        best = args[0]
        for step in (4, 2, 1):
            moved = ir.Constant(_INTS, [i ^ step for i in range(WIDTH)])
            best = _least(builder, best, builder.shuffle_vector(best, best, moved))
        return builder.extract_element(best, ir.Constant(_INT, 0))

    return types.float32(_LANES), generate
