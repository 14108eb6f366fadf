"""The codebook types against llama.cpp's own library, on more weights than the golden file holds."""

from __future__ import annotations

import ctypes

import ggml_cases
import numpy as np
import pytest

from quantize.kernels.cpu import ggml

NAMES = ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"]

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not ggml_cases.LIBRARY.exists(), reason=f"no {ggml_cases.LIBRARY}: set QUANTIZE_LLAMA_CPP"),
]


def importances(cols: int) -> list[ggml_cases.Floats]:
    """Even and uneven ones, with zeros, tiny, huge."""
    weights = ggml_cases.importance(cols)
    spiked = weights.copy()
    spiked[::7] *= 1e5
    tiny, huge = weights * np.float32(1e-12), weights * np.float32(1e8)
    return [weights, ggml_cases.with_zeros(weights), np.zeros_like(weights), np.ones_like(weights), spiked, tiny, huge]


@pytest.mark.parametrize(("name", "weighted"), ggml_cases.modes(NAMES))
def test_bytes_are_those_of_llama_cpp(name: str, weighted: bool) -> None:
    encode, cols = ggml_cases.library(), 1024
    unimportant = ggml_cases.heavy_tailed(2, cols, seed=2)
    unimportant[:, 270] = 1e6  # with_zeros gives it no importance: levels wrap around
    unimportant[:, 277] = -1e7
    for x in (ggml_cases.heavy_tailed(16, cols), ggml_cases.edges(cols), unimportant):
        for weights in importances(cols) if weighted else [None]:
            ours, theirs = ggml.encode(name, x, weights), encode(name, x, weights)
            nbytes = ggml.BLOCKS[name].nbytes
            different = (ours.reshape(-1, nbytes) != theirs.reshape(-1, nbytes)).any(1)
            assert not different.any(), f"{different.sum()} of {different.size} blocks, first {different.argmax()}"


@pytest.mark.parametrize("name", NAMES)
def test_decoded_weights_are_those_of_llama_cpp(name: str) -> None:
    decode = getattr(ctypes.CDLL(str(ggml_cases.LIBRARY)), f"dequantize_row_{name}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    blocks = np.random.default_rng(0).integers(0, 256, (64, ggml.BLOCKS[name].nbytes), np.uint8)
    theirs = np.zeros((64, 256), np.float32)
    decode(blocks.ctypes.data, theirs.ctypes.data, theirs.size)
    np.testing.assert_array_equal(ggml.decode(name, blocks), theirs)


def test_llama_cpp_spoils_a_super_block_of_iq3_s_that_has_a_zero_block() -> None:
    """The one case in which bytes differ. When this fails, llama.cpp was mended, and no case is left."""
    x = ggml_cases.heavy_tailed(1, 256)
    x[0, 32:64] = 0
    theirs = ggml.decode("iq3_s", ggml_cases.library()("iq3_s", x, None))
    ours = ggml.decode("iq3_s", ggml.encode("iq3_s", x))
    assert np.square(theirs - x).mean() > 10 * np.square(ours - x).mean()
