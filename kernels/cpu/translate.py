"""From Python functions to machine code, through numba and LLVM. Imported only when something must be compiled."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
from numba.core import compiler, types
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager
from numba.core.registry import cpu_target
from numba.core.runtime import nrt
from numba.core.typed_passes import (
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.typing import templates
from numba.core.untyped_passes import (
    DeadBranchPrune,
    FixupArgs,
    GenericRewrites,
    IRProcessing,
    ReconstructSSA,
    RewriteSemanticConstants,
    TranslateByteCode,
)

_OPTIONS = {"nopython": True, "nogil": True, "error_model": "numpy", "boundscheck": False, "_nrt": False}
# What every process has, so that machine code may call it.
_EVERYWHERE = frozenset({"memset", "memcpy", "memmove", "sqrtf", "log2", "floor", "floorf"})
# numba's own annotations are few, and do not fit what is done with it here.
_compiler: Any = compiler
_memory: Any = nrt.rtsys
_passes: Any = PassManager
_templates: Any = templates
_typeof: Callable[[Any], Any] = numba.typeof


class _Passes(CompilerBase):
    """The steps of numba that loops need: no closures, comprehensions, generators, or operations on whole arrays."""

    def define_pipelines(self) -> list[Any]:
        """Returns the one row of steps."""
        passes = _passes("loop")
        for step in (
            TranslateByteCode,
            FixupArgs,
            IRProcessing,
            RewriteSemanticConstants,
            GenericRewrites,
            DeadBranchPrune,
            ReconstructSSA,
            DeadBranchPrune,
            NopythonTypeInference,
            PreLowerStripPhis,
            IRLegalization,
            NativeLowering,
            NoPythonBackend,
        ):
            passes.add_pass(step, step.__name__)
        passes.finalize()
        return [passes]


class _Library(CPUCodeLibrary):
    """Optimized LLVM code of a function, for linking into others; it never becomes machine code by itself."""

    def add_linking_library(self, library: Any) -> None:
        """Adds code that this calls, unless it is numba's memory management: loops have none."""
        if library is not _memory.library:
            super().add_linking_library(library)  # type: ignore[no-untyped-call]

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def machine_code(self, name: str, symbol: str) -> bytes:
        """Returns an object file in which a function is called `symbol` and nothing else can be seen."""
        self._ensure_finalized()  # type: ignore[no-untyped-call]
        module: Any = self._final_module
        for item in (*module.functions, *module.global_variables):
            if item.name == name:
                item.name = symbol
            elif not item.is_declaration:
                item.linkage = "internal"
            elif not item.name.startswith("llvm.") and item.name not in _EVERYWHERE:
                raise TypeError(f"{symbol} cannot be kept: it calls {item.name}")
        return bytes(self._codegen._tm.emit_object(module))


class Source:
    """Compiles one function, once for each combination of argument types.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.py_func = function
        self.type: Any = types.Dispatcher(self)
        self._results: dict[tuple[Any, ...], Any] = {}

    def __str__(self) -> str:
        return self.py_func.__qualname__

    def machine_code(self, args: tuple[Any, ...], symbol: str) -> bytes:
        """Compiles it.

        Args:
            args: Arguments of the types that it is going to be called with.
            symbol: The function's name in the result.

        Returns:
            An object file.

        Raises:
            TypeError: it calls something that other processes do not have.
            numba.core.errors.NumbaError: numba does not understand it.
        """
        with global_compiler_lock, _no_garbage_collection():
            result = self._compile(tuple(map(_typeof, args)))
            return bytes(result.library.machine_code(result.fndesc.llvm_func_name, symbol))

    def _compile(self, args: tuple[Any, ...]) -> Any:
        """Returns what numba knows of it compiled for some types."""
        if args not in self._results:
            flags, target, options = _compiler.Flags(), cpu_target.target_context, cpu_target.options
            options.parse_as_flags(flags, _OPTIONS)  # type: ignore[no-untyped-call]
            flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
            result = _compiler.compile_extra(
                cpu_target.typing_context,
                target,
                self.py_func,
                args,
                None,
                flags,
                {},
                library=_Library(target.codegen(), str(self)),  # type: ignore[no-untyped-call]
                pipeline_class=_Passes,
            )
            target.insert_user_function(result.fndesc, result.fndesc, [result.library])
            self._results[args] = result
        return self._results[args]

    # -- what numba asks of a function that another one calls ------------------------------------------------------

    is_compiling = False  # loops do not call themselves

    def get_call_template(self, args: Any, kws: Any) -> tuple[Any, None, Any, dict[str, Any]]:
        """Returns how to type a call, after compiling for it."""
        self._compile(tuple(args))
        name = self.py_func.__name__
        return _templates.make_concrete_template(name, name, self.nopython_signatures), None, args, {}

    @property
    def nopython_signatures(self) -> list[Any]:
        """Signatures that it is compiled for."""
        return [result.signature for result in self._results.values()]

    def get_overload(self, args: Any) -> Any:
        """Returns what its code for some types is registered under."""
        return self._results[tuple(args)].fndesc


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Compiling makes millions of objects that stay; looking through them again and again takes a tenth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
