"""The table of GGML types, and every encoder and decoder against golden bytes and the gguf package."""

from __future__ import annotations

from typing import Any

import ggml_cases
import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.kernels.cpu import ggml

COLS = 512
WITHOUT_GRID = [name for name in ggml.ENCODERS if not name.startswith(("iq1", "iq2", "iq3"))]


@pytest.fixture(scope="module")
def golden() -> Any:
    with np.load(ggml_cases.GOLDEN) as entries:
        return dict(entries)


def blocks_of(name: str, encoded: Any) -> Any:
    return encoded.reshape(-1, ggml.BLOCKS[name].nbytes)


def test_blocks_are_those_of_the_gguf_package() -> None:
    known = {kind.name.lower(): kind for kind in gguf.GGMLQuantizationType}
    for name, block in ggml.BLOCKS.items():
        if name in known and name not in ("q1_0", "q2_0"):
            assert block.id == known[name]
            assert (block.weights, block.nbytes) == gguf.GGML_QUANT_SIZES[known[name]]
    assert ggml.BLOCKS["q4_k"].bits == 4.5


def test_every_type_with_blocks_has_an_encoder_and_a_decoder() -> None:
    several = {name for name, block in ggml.BLOCKS.items() if block.weights > 1}
    assert several == set(ggml.ENCODERS) == set(ggml.DECODERS)
    assert several >= ggml.USES_IMPORTANCE >= ggml.NEEDS_IMPORTANCE


@pytest.mark.parametrize(("name", "weighted"), ggml_cases.modes(WITHOUT_GRID))
def test_bytes_are_those_of_llama_cpp(name: str, weighted: bool, golden: Any) -> None:
    ours = np.concatenate([ggml.encode(name, *case) for case in ggml_cases.golden_inputs(weighted)])
    different = (blocks_of(name, ours) != blocks_of(name, golden[ggml_cases.key(name, weighted)])).any(1)
    assert not different.any(), f"{different.sum()} of {different.size} blocks, first {different.argmax()}"


@pytest.mark.parametrize("name", [name for name in WITHOUT_GRID if name not in ("q1_0", "q2_0")])
def test_decoding_is_that_of_the_gguf_package(name: str, golden: Any) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, COLS // ggml.BLOCKS[name].weights * ggml.BLOCKS[name].nbytes), np.uint8)
    for blocks in (golden[ggml_cases.key(name, False)], noise):
        with np.errstate(all="ignore"):
            theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
        np.testing.assert_array_equal(ggml.decode(name, blocks), theirs.reshape(len(blocks), -1))


@pytest.mark.parametrize(("name", "levels"), [("q1_0", (-1, 1)), ("q2_0", (-1, 0, 1))])
def test_types_that_the_gguf_package_lacks(name: str, levels: tuple[int, ...]) -> None:
    signs = np.random.default_rng(0).choice(np.float32(levels), (3, COLS)) * np.float32(0.25)
    np.testing.assert_array_equal(ggml.decode(name, ggml.encode(name, signs)), signs)


@pytest.mark.parametrize("name", WITHOUT_GRID)
def test_nothing_unusual_becomes_nan(name: str) -> None:
    x = ggml_cases.edges(COLS)
    x[9] *= np.float32(2.0**110)  # beyond float16: llama.cpp writes Inf here, and refuses the file afterwards
    for weights in (None, ggml_cases.with_zeros(ggml_cases.importance(COLS)), np.zeros(COLS, np.float32)):
        assert np.isfinite(ggml.decode(name, ggml.encode(name, x, weights))).all()


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "mxfp4", "q3_k", "q4_k", "iq4_xs"])
@settings(max_examples=20)
@given(rows=st.integers(0, 9), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_rows_are_encoded_each_by_itself(name: str, rows: int, blocks: int, seed: int) -> None:
    cols = blocks * ggml.BLOCKS[name].weights
    x, weights = ggml_cases.heavy_tailed(rows, cols, seed), ggml_cases.importance(cols, seed)
    whole = ggml.encode(name, x, weights)
    assert whole.shape == (rows, blocks * ggml.BLOCKS[name].nbytes)
    for row, encoded in zip(x, whole, strict=True):
        np.testing.assert_array_equal(ggml.encode(name, row[None], weights)[0], encoded)
    assert ggml.decode(name, whole).shape == x.shape


def test_error_falls_with_bits() -> None:
    x = ggml_cases.heavy_tailed(4, 1024)

    def error(name: str) -> float:
        return float(np.square(ggml.decode(name, ggml.encode(name, x)) - x).mean() / np.square(x).mean())

    errors = [error(name) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.15
    assert errors[-1] < 1e-4


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    x, weights = ggml_cases.heavy_tailed(4, 1024), ggml_cases.importance(1024)
    for name in ("q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "iq4_nl"):
        plain, weighted = (ggml.decode(name, ggml.encode(name, x, w)) - x for w in (None, weights))
        assert (weighted**2 * weights).sum() < (plain**2 * weights).sum()


def test_what_cannot_be_encoded_is_refused() -> None:
    x = np.zeros((2, 256), np.float32)
    with pytest.raises(KeyError, match="no encoder for 'q9_9'; there are "):
        ggml.encode("q9_9", x)
    with pytest.raises(KeyError, match="no decoder for 'i64'"):
        ggml.decode("i64", np.zeros((1, 8), np.uint8))
    with pytest.raises(ValueError, match="multiple of 256 weights"):
        ggml.encode("q4_k", x[:, :96])
    with pytest.raises(ValueError, match="importance of shape"):
        ggml.encode("q4_k", x, np.ones(255, np.float32))
    with pytest.raises(ValueError, match="without importance"):
        ggml.encode("iq2_xs", x)
    with pytest.raises(ValueError, match="multiple of 18 bytes"):
        ggml.decode("q4_0", np.zeros((1, 19), np.uint8))


def test_warming_takes_any_names() -> None:
    ggml.warm(["q8_0", "f16", "q4_0"], decoders=True)
