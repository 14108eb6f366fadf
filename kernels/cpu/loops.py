"""Compiled loops: Python functions on arrays that become machine code once on a machine.

numba translates them and LLVM compiles them, but what numba does around that is left out, since it takes most of the
time: it makes machine code, two wrappers and cache files for every small helper, and loads all of them again when a
process starts. Here a helper only ever becomes LLVM code that is linked into its callers (translate.py). Only loops
that Python calls become machine code; it is kept in files, and the next process needs LLVM to load them and nothing
of numba's compiler.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cached_property
from hashlib import sha256
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from quantize.kernels.cpu import kept

_F = TypeVar("_F", bound=Callable[..., Any])
_NUMBERS: dict[type, type] = {bool: ctypes.c_uint8, int: ctypes.c_int64, np.float32: ctypes.c_float}
_LOCK = threading.RLock()


def compiled(function: _F) -> _F:
    """Compiles a function on first use, for the types that it is called with, and keeps the machine code.

    It runs without the global lock. Divisions by zero give Inf or NaN as in C: a branch would keep loops from being
    vectorised. References to arrays are not counted: that takes two atomic instructions for every slice, as much time
    as a short block needs. In exchange functions must not make arrays: they get all that they work in.
    """
    made: Any = Loop(function)
    return made  # type: ignore[no-any-return]


class Loop:
    """A compiled function, for Python and for other compiled functions.

    Args:
        function: What to compile.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self._entries: dict[str, Callable[..., int]] = {}

    def __call__(self, *args: Any) -> None:
        """Runs it.

        Args:
            args: C-contiguous arrays, numbers (bool, int, numpy.float32), and tuples of these.

        Raises:
            RuntimeError: compiled code raised an exception.
            TypeError: another kind of argument.
        """
        values: list[Any] = [ctypes.byref(ctypes.c_void_p()) for _ in range(2)]  # room for a result and an exception
        key = ",".join(_flatten(arg, values) for arg in args)
        entry = self._entries.get(key) or self._load(key, args, values)
        if entry(*values) != 0:
            raise RuntimeError(f"{self.__name__}: an exception in compiled code")

    def _load(self, key: str, args: tuple[Any, ...], values: list[Any]) -> Callable[..., int]:
        """Returns what to call for such arguments: kept machine code, or else compiled now."""
        with _LOCK:
            if key not in self._entries:
                symbol = f"{self.function.__module__}.{self.__name__}-{sha256(key.encode()).hexdigest()[:16]}"
                code = kept.read(f"{symbol}.o")
                if code is None:
                    code = self.source.machine_code(args, symbol)
                    kept.write(f"{symbol}.o", code)
                self._entries[key] = ctypes.CFUNCTYPE(ctypes.c_int32)(_linked(code, symbol))
            return self._entries[key]

    @cached_property
    def source(self) -> Any:
        """What compiles it."""
        from quantize.kernels.cpu.translate import Source

        return Source(self.function)

    @property
    def _numba_type_(self) -> Any:
        """What numba takes it for where another function calls it."""
        return self.source.type


class Elsewhere:
    """A function of LLVM code by its name, so that nothing of numba is imported where no loop must be compiled.

    Args:
        module: Where it is defined, by numba's `intrinsic`.
        name: Its name there.
    """

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @property
    def _numba_type_(self) -> Any:
        """What numba takes it for where a compiled function calls it."""
        from numba.core.registry import cpu_target

        function, context = getattr(import_module(self.module), self.name), cpu_target.typing_context
        context.refresh()
        return context.resolve_value_type(function)


def _flatten(arg: Any, values: list[Any]) -> str:
    """Appends the values that compiled code takes for an argument; returns what tells its type from others.

    An array is eight values or more, as numba has them: who owns it (nobody: references are not counted), number and
    size of elements, address, shape and strides.
    """
    if isinstance(arg, np.ndarray):
        if not arg.flags.c_contiguous or not arg.flags.writeable:
            raise TypeError("compiled code takes C-contiguous arrays that may be written")
        sizes = (arg.size, arg.itemsize, arg.ctypes.data, *arg.shape, *arg.strides)
        values += (None, None, *map(ctypes.c_int64, sizes))
        return f"{arg.dtype.str}[{arg.ndim}]"
    if isinstance(arg, tuple):
        return f"{type(arg).__qualname__}({' '.join(_flatten(item, values) for item in arg)})"
    if type(arg) not in _NUMBERS:
        raise TypeError(f"compiled code does not take {type(arg)}")
    values.append(_NUMBERS[type(arg)](arg))
    return type(arg).__name__


# -- machine code ------------------------------------------------------------------------------------------------------

_engine: Any = None


def _linked(code: bytes, symbol: str) -> int:
    """Makes machine code ready to run; returns the address of a function in it."""
    global _engine
    from llvmlite import binding as llvm  # type: ignore[import-untyped]

    if _engine is None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        _engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    _engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    _engine.finalize_object()
    return int(_engine.get_function_address(symbol))
