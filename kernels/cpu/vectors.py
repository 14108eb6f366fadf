"""What lanes.py names, as LLVM code, and `numeric.pick`. Imported only when something must be compiled."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

from quantize.kernels.cpu.lanes import WIDTH

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


@_intrinsic
def bit_extremes(typing_context: Any, bits: Any) -> Any:
    """Returns the greatest, the greatest with flipped sign bits, and the least of 32 int32, by vector instructions."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        whole = ir.VectorType(ir.IntType(32), 32)
        values = builder.load(builder.bitcast(array.data, whole.as_pointer()), align=4)
        flipped = builder.xor(values, ir.Constant(whole, [-0x80000000] * 32))
        results = []
        for kind, vector in (("smax", values), ("smax", flipped), ("smin", values)):
            function = ir.FunctionType(ir.IntType(32), [whole])
            name = f"llvm.vector.reduce.{kind}.v32i32"
            reduction: Any = cgutils.get_or_insert_function(builder.module, function, name)  # type: ignore[no-untyped-call]
            results.append(builder.call(reduction, [vector]))
        return context.make_tuple(builder, signature.return_type, results)

    return types.UniTuple(types.int32, 3)(bits), build  # type: ignore[no-untyped-call]


@_intrinsic
def pick(typing_context: Any, condition: Any, one: Any, other: Any) -> Any:
    """Returns `one if condition else other`, as a selection and never as a branch.

    Still, where it is stored to the place that `other` was loaded from, the compiler makes a store under a condition
    of it, and that is many times slower than storing either: loops here store elsewhere and copy.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return one(types.boolean, one, one), build
