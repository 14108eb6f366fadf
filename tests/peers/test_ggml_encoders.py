"""Our GGML encoders against llama.cpp's own library, byte for byte, on weights that the golden file does not have."""

from __future__ import annotations

import ggml_cases
import numpy as np
import pytest

from quantize.kernels.cpu import ggml

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not ggml_cases.LIBRARY.exists(), reason=f"no {ggml_cases.LIBRARY}: run 'make peers' or set QUANTIZE_LLAMA_CPP"
    ),
]


def importances(cols: int, seed: int) -> list[ggml_cases.Floats]:
    """Importance as it comes, with zeros, of hugely different sizes, and of one column alone."""
    usual = ggml_cases.importance(cols, seed)
    uneven = usual * np.float32(2.0) ** np.random.default_rng(seed).integers(-60, 20, cols).astype(np.float32)
    alone = np.where(np.arange(cols) % 256 == 77, usual, 0)
    return [usual, ggml_cases.with_zeros(usual), uneven, alone.astype(np.float32)]


def scaled(rows: int, cols: int, seed: int) -> ggml_cases.Floats:
    """Weights whose groups of 8, 16 or 32 differ in size by powers of two."""
    sizes = np.random.default_rng(seed).integers(-12, 4, (rows, cols // 32)).repeat(32, axis=1)
    sizes[::2] += np.random.default_rng(seed + 1).integers(-9, 9, (len(sizes[::2]), cols // 8)).repeat(8, axis=1)
    return ggml_cases.heavy_tailed(rows, cols, seed) * (np.float32(2.0) ** sizes.astype(np.float32))


@pytest.mark.parametrize(("name", "weighted"), ggml_cases.modes())
def test_same_bytes(name: str, weighted: bool) -> None:
    theirs, cols, block = ggml_cases.library(), 1024, ggml.BLOCKS[name]
    for seed in range(10, 13):
        for x in (ggml_cases.heavy_tailed(16, cols, seed), scaled(16, cols, seed), ggml_cases.edges(cols)):
            for weights in importances(cols, seed) if weighted else [None]:
                ours, other = (f(name, x, weights).reshape(-1, block.nbytes) for f in (ggml.encode, theirs))
                different = (ours != other).any(1)
                assert not different.any(), f"seed {seed}: {different.sum()} of {len(ours)}, first {different.argmax()}"
