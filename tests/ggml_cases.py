"""Weights to encode, and llama.cpp's encoders. `python tests/ggml_cases.py FOLDER` renews the golden file.

The weights are made of integers with exact arithmetic, so that every machine has the same.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantize.kernels.cpu import ggml

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Encoder = Callable[[str, Floats, Floats | None], Bytes]

ROOT = Path(__file__).parents[1]
LLAMA_CPP = Path(os.environ.get("QUANTIZE_LLAMA_CPP", ROOT / ".peers/llamacpp/bin")).absolute()
LIBRARY = LLAMA_CPP / "libggml-base.so"
GOLDEN = Path(__file__).parent / "kernels/golden/ggml.npz"
GOLDEN_COLS = 512


def library(path: Path = LIBRARY) -> Encoder:
    """Returns llama.cpp's encoder: type, float32 [rows, cols] and importance -> uint8 [rows, bytes]."""
    function = ctypes.CDLL(str(path)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(name: str, x: Floats, importance: Floats | None) -> Bytes:
        x, block, (rows, cols) = np.ascontiguousarray(x), ggml.BLOCKS[name], x.shape
        out = np.zeros((rows, cols // block.weights * block.nbytes), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        function(block.id, x.ctypes.data, out.ctypes.data, 0, rows, cols, weights)
        return out

    return encode


def modes(names: Iterator[str] | None = None) -> list[tuple[str, bool]]:
    """Returns (type, with importance) of all encoders, or of some types."""
    pairs = []
    for name in names or ggml.ENCODERS:
        if name not in ggml.NEEDS_IMPORTANCE:
            pairs.append((name, False))
        if name in ggml.USES_IMPORTANCE:
            pairs.append((name, True))
    return pairs


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> Floats:
    """Weights of about 0.02 with long tails: products of three uniform numbers, made of whole ones."""
    factors = np.random.default_rng(seed).integers(-1000, 1001, (3, rows, cols)).astype(np.float64)
    return (np.prod(factors, axis=0) * 2.0**-33).astype(np.float32)


def importance(cols: int, seed: int = 0) -> Floats:
    """Importance between about 1e-6 and 1, most of it small."""
    whole = np.random.default_rng(seed).integers(1, 1001, (2, cols)).astype(np.float64)
    return (np.prod(whole, axis=0) ** 2 * 2.0**-40).astype(np.float32)


def with_zeros(weights: Floats) -> Floats:
    """The importance with single zeros, and zeros in its whole first super-block."""
    changed = weights.copy()
    changed[:256] = 0
    changed[256::7] = 0
    return changed


def edges(cols: int) -> Floats:
    """One row for each unusual kind of block; all of them stay finite in every type."""
    x = heavy_tailed(22, cols, seed=1)
    x[0] = 0
    x[1] = 0.5
    x[2] = -0.5
    x[3] = np.abs(x[3])
    x[4] = -np.abs(x[4])
    x[5] *= np.float32(1e-6)
    x[6] *= np.float32(2.0**-110)
    x[7] *= np.float32(2.0**-125)
    x[8] *= np.float32(2.0**-140)
    x[9] *= 2.0**15
    x[10, ::37] = 50
    x[11, ::64] = -50
    x[12] = np.where(np.arange(cols) % 2, 0.25, -0.25)
    x[13, 1:] = 0
    x[14] = np.where(np.arange(cols) % 32 == 5, 1, 0)
    x[15] = -0.0
    x[16] = np.where(np.arange(cols) % 3 == 0, -0.0, np.abs(x[16]))
    x[17] = np.sign(x[17]) * np.float32(0.125)
    x[18] = 1 + x[18] * np.float32(2.0**-12)
    x[19] = -1 + x[19] * np.float32(2.0**-20)
    x[20] = np.arange(cols) % 16
    x[21] = np.where(np.arange(cols) // 16 % 2, 0, x[21])
    return np.ascontiguousarray(x, np.float32)


def golden_inputs(weighted: bool) -> list[tuple[Floats, Floats | None]]:
    """Returns what the golden file has bytes of: (weights, importance), each of rows of `GOLDEN_COLS`."""
    cols = GOLDEN_COLS
    if not weighted:
        return [(edges(cols), None), (heavy_tailed(4, cols), None)]
    weights = importance(cols)
    return [(edges(cols)[::2], weights), (heavy_tailed(4, cols), weights), (edges(cols)[1:12:4], with_zeros(weights))]


def key(name: str, weighted: bool) -> str:
    """Name of an entry of the golden file."""
    return f"{name}-{'importance' if weighted else 'plain'}"


def write_golden(encode: Encoder) -> None:
    """Writes the golden file with the bytes of an encoder."""
    entries = {
        key(name, weighted): np.concatenate([encode(name, *case) for case in golden_inputs(weighted)])
        for name, weighted in modes()
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **entries)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {len(entries)} entries")


if __name__ == "__main__":
    write_golden(library(Path(sys.argv[1]).absolute() / LIBRARY.name if len(sys.argv) > 1 else LIBRARY))
