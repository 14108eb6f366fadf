"""The block types of GGML: their sizes, and which loops encode and decode them.

All names are in lower case. A type's loops live in a module that is imported when the type is first used, since
compiling takes seconds. Every loop works on whole rows, in one thread, without the global lock:

    encoder(x, importance, out)    x float32 [rows, cols], importance float32 [cols] or [0], out uint8 [rows, bytes]
    decoder(blocks, out)           blocks uint8 [rows, bytes], out float32 [rows, cols]

all C-contiguous. The bytes are those of llama.cpp's `ggml_quantize_chunk` as its x86-64 Linux build without fused
multiply-add gives them. A new type is one line in each table.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantize.kernels.cpu import kept


class Block(NamedTuple):
    """How a type is stored.

    Attributes:
        id: Its number in GGUF files.
        weights: Weights in a block; they lie side by side in a row.
        nbytes: Bytes of a block.
    """

    id: int
    weights: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.weights


BLOCKS: dict[str, Block] = {
    "f32": Block(0, 1, 4),
    "f16": Block(1, 1, 2),
    "q4_0": Block(2, 32, 18),
    "q4_1": Block(3, 32, 20),
    "q5_0": Block(6, 32, 22),
    "q5_1": Block(7, 32, 24),
    "q8_0": Block(8, 32, 34),
    "q2_k": Block(10, 256, 84),
    "q3_k": Block(11, 256, 110),
    "q4_k": Block(12, 256, 144),
    "q5_k": Block(13, 256, 176),
    "q6_k": Block(14, 256, 210),
    "iq2_xxs": Block(16, 256, 66),
    "iq2_xs": Block(17, 256, 74),
    "iq3_xxs": Block(18, 256, 98),
    "iq1_s": Block(19, 256, 50),
    "iq4_nl": Block(20, 32, 18),
    "iq3_s": Block(21, 256, 110),
    "iq2_s": Block(22, 256, 82),
    "iq4_xs": Block(23, 256, 136),
    "i8": Block(24, 1, 1),
    "i16": Block(25, 1, 2),
    "i32": Block(26, 1, 4),
    "i64": Block(27, 1, 8),
    "f64": Block(28, 1, 8),
    "iq1_m": Block(29, 256, 56),
    "bf16": Block(30, 1, 2),
    "tq1_0": Block(34, 256, 54),
    "tq2_0": Block(35, 256, 66),
    "mxfp4": Block(39, 32, 17),
    "nvfp4": Block(40, 64, 36),
    "q1_0": Block(41, 128, 18),
    "q2_0": Block(42, 64, 18),
}

_HERE = "quantize.kernels.cpu."
_SIMPLE, _TERNARY, _FP4 = _HERE + "simple", _HERE + "ternary", _HERE + "fp4"
_KQUANTS, _IQ4, _DECODE = _HERE + "kquants", _HERE + "iq4", _HERE + "decode"
_GRID23, _GRID1, _GRID_DECODE = _HERE + "grid23", _HERE + "grid1", _HERE + "griddecode"

# Type -> module and function. The author of a type adds it here.
ENCODERS: dict[str, tuple[str, str]] = {
    **{name: (_SIMPLE, f"encode_{name}") for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")},
    **{name: (_TERNARY, f"encode_{name}") for name in ("q1_0", "q2_0", "tq1_0", "tq2_0")},
    **{name: (_FP4, f"encode_{name}") for name in ("mxfp4", "nvfp4")},
    **{name: (_KQUANTS, f"encode_{name}") for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")},
    **{name: (_IQ4, f"encode_{name}") for name in ("iq4_nl", "iq4_xs")},
    **{name: (_GRID23, f"encode_{name}") for name in ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")},
    **{name: (_GRID1, f"encode_{name}") for name in ("iq1_s", "iq1_m")},
}

DECODERS: dict[str, tuple[str, str]] = {
    name: (_GRID_DECODE if module in (_GRID23, _GRID1) else _DECODE, f"decode_{name}")
    for name, (module, _) in ENCODERS.items()
}

# Types whose search makes no sense without importance; llama.cpp ends the program.
NEEDS_IMPORTANCE = frozenset({"iq2_xxs", "iq2_xs", "iq1_s"})

# Types that share their searches, longest to compile first: what one process compiles, the next would compile again.
_FAMILIES = (
    ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"),
    ("q2_k", "q4_k", "q5_k", "q4_1", "q5_1"),
    ("q3_k", "q6_k", "q4_0", "q5_0"),
    ("iq1_s", "iq1_m"),
    ("iq4_nl", "iq4_xs"),
    ("q8_0", "q1_0", "q2_0", "tq1_0", "tq2_0", "mxfp4", "nvfp4"),
)

# Types that look at importance; the others round every weight to its nearest.
USES_IMPORTANCE = frozenset(
    {"q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"}
    | {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"}
)


def encode(name: str, x: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Rounds rows of weights to blocks of a type, in this thread and without the global lock.

    Args:
        name: The type, a key of `ENCODERS`.
        x: float32 [rows, cols], finite; cols is a multiple of the type's block.
        importance: float32 [cols], not negative: mean square of the input that each column meets. Types outside
            `USES_IMPORTANCE` ignore it.

    Returns:
        uint8 [rows, cols // weights * nbytes].

    Raises:
        KeyError: no such type.
        ValueError: shape, or no importance for a type in `NEEDS_IMPORTANCE`.
    """
    loop, block = _loop(name, True), BLOCKS[name]
    if x.ndim != 2 or x.shape[1] % block.weights:
        raise ValueError(f"{name} takes rows of a multiple of {block.weights} weights, not an array {x.shape}")
    if importance is None or name not in USES_IMPORTANCE:
        if name in NEEDS_IMPORTANCE:
            raise ValueError(f"{name} cannot be made without importance")
        importance = np.zeros(0, np.float32)
    elif importance.shape != x.shape[1:]:
        raise ValueError(f"importance of shape {importance.shape} for {x.shape[1]} columns")
    out = np.empty((x.shape[0], x.shape[1] // block.weights * block.nbytes), np.uint8)
    loop(_own(x, np.float32), _own(importance, np.float32), out)
    return out


def decode(name: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns the weights that rows of blocks stand for, in this thread and without the global lock.

    Args:
        name: The type, a key of `DECODERS`.
        blocks: uint8 [rows, bytes], bytes a multiple of the type's block.

    Returns:
        float32 [rows, bytes // nbytes * weights].

    Raises:
        KeyError: no such type.
        ValueError: shape.
    """
    loop, block = _loop(name, False), BLOCKS[name]
    if blocks.ndim != 2 or blocks.shape[1] % block.nbytes:
        raise ValueError(f"{name} has rows of a multiple of {block.nbytes} bytes, not an array {blocks.shape}")
    out = np.empty((blocks.shape[0], blocks.shape[1] // block.nbytes * block.weights), np.float32)
    loop(_own(blocks, np.uint8), out)
    return out


def warm(names: Iterable[str], *, decoders: bool = False) -> None:
    """Compiles the encoders of some types, or loads what an earlier process compiled, by encoding one block of each.

    Args:
        names: Types; those without an encoder are passed over.
        decoders: Whether the decoders too.

    It takes seconds for a type that was never compiled on this machine; the compiler works in one thread.
    """
    for name in sorted(set(names) & ENCODERS.keys()):
        x = np.ones((1, BLOCKS[name].weights), np.float32)
        blocks = encode(name, x, x[0])
        if decoders and name in DECODERS:
            decode(name, blocks)
            kept.write(f"{name}.ready", b"")


class Warming:
    """Compiles types in processes of their own, side by side: numba's compiler holds one lock per process.

    Args:
        names: Types; those that an earlier process compiled on this machine are passed over.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = [name for name in sorted(set(names) & ENCODERS.keys()) if kept.read(f"{name}.ready") is None]
        self._processes: list[subprocess.Popen[bytes]] = []
        groups = [group for family in _FAMILIES if (group := [name for name in family if name in self.names])]
        self._pool = ThreadPoolExecutor(max(1, min(len(groups), os.cpu_count() or 1)), "compile")
        self._jobs = [self._pool.submit(self._compile, group) for group in groups]

    def _compile(self, names: list[str]) -> None:
        code = f"from quantize.kernels.cpu import ggml; ggml.warm({names!r}, decoders=True)"
        nowhere = subprocess.DEVNULL
        with suppress(OSError):  # then it is compiled when it is first used
            process = subprocess.Popen([sys.executable, "-c", code], stdin=nowhere, stdout=nowhere, stderr=nowhere)
            self._processes.append(process)
            process.wait()

    def wait(self) -> None:
        """Waits until all are compiled. What failed is compiled when it is first used."""
        for job in self._jobs:
            job.result()

    def stop(self) -> None:
        """Ends what is still being compiled."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()


@cache
def _loop(name: str, encoder: bool) -> Callable[..., Any]:
    table = ENCODERS if encoder else DECODERS
    if name not in table:
        raise KeyError(f"no {'encoder' if encoder else 'decoder'} for {name!r}; there are {', '.join(sorted(table))}")
    module, function = table[name]
    return getattr(import_module(module), function)  # type: ignore[no-any-return]


def _own(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """Returns the array as loops take it; of one that may not be written, a copy: for it they would compile anew."""
    return np.require(array, dtype, ["C", "W"])
