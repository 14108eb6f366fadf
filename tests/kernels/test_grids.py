"""Codebooks, their searches, and the encoders and decoders of the seven types that use them."""

from __future__ import annotations

from typing import Any

import ggml_cases
import gguf
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.kernels.cpu import ggml, grids, lanes
from quantize.kernels.cpu.raw import raw

COLS = 512
NAMES = ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"]  # from small to large
DISTANCES = {"iq1": 3, "iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq3_xxs": 2, "iq3_s": 3}


@pytest.fixture(scope="module")
def golden() -> Any:
    with np.load(ggml_cases.GOLDEN) as entries:
        return dict(entries)


def kept(x: Any, name: str, weights: Any) -> Any:
    """Returns what a type makes of some weights."""
    return ggml.decode(name, ggml.encode(name, x, weights))


@pytest.mark.parametrize(("name", "weighted"), ggml_cases.modes(NAMES))
def test_bytes_are_those_of_llama_cpp(name: str, weighted: bool, golden: Any) -> None:
    ours = np.concatenate([ggml.encode(name, *case) for case in ggml_cases.golden_inputs(weighted)])
    theirs = golden[ggml_cases.key(name, weighted)]
    nbytes = ggml.BLOCKS[name].nbytes
    different = (ours.reshape(-1, nbytes) != theirs.reshape(-1, nbytes)).any(1)
    assert not different.any(), f"{different.sum()} of {different.size} blocks, first {different.argmax()}"


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_that_of_the_gguf_package(name: str, golden: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, COLS // 256 * ggml.BLOCKS[name].nbytes), np.uint8)
    for blocks in (golden[ggml_cases.key(name, True)], noise):
        with np.errstate(all="ignore"):
            theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
        np.testing.assert_array_equal(ggml.decode(name, blocks), theirs.reshape(len(blocks), -1))


@pytest.mark.parametrize("name", DISTANCES)
def test_candidates_are_all_points_at_the_smallest_distances(name: str) -> None:
    book = grids.codebook(name)
    weights = book.points.shape[1]
    base = 8 if weights == 4 else 3
    places = base ** np.arange(weights)
    np.testing.assert_array_equal(book.where[book.points @ places], np.arange(len(book.points)))
    keys = np.random.default_rng(0).integers(0, base**weights, 300)
    for key in keys[book.where[keys] < 0]:
        number = -1 - book.where[key]
        distance = np.square(2 * (book.points.astype(int) - key // places % base)).sum(1)
        within = np.flatnonzero(distance <= np.unique(distance)[: DISTANCES[name]][-1])
        expected = within[np.argsort(distance[within], kind="stable")]
        tiles = slice(book.first[number], book.first[number + 1])
        found = book.names.reshape(-1, grids.TILE)[tiles].ravel()
        np.testing.assert_array_equal(found[: expected.size], expected)
        assert (found[expected.size :] == expected[-1]).all()
        assert found.size - expected.size < grids.TILE
        levels = book.levels.reshape(-1, weights, grids.TILE)[tiles].transpose(0, 2, 1).reshape(-1, weights)
        np.testing.assert_array_equal(levels, book.points[found])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_unusual_becomes_nan(name: str) -> None:
    x = ggml_cases.edges(COLS)
    importance = ggml_cases.importance(COLS)
    for weights in (importance, ggml_cases.with_zeros(importance), np.zeros(COLS, np.float32)):
        assert np.isfinite(kept(x, name, weights)).all()
    assert not kept(np.zeros((1, COLS), np.float32), name, importance).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_no_checkpoint_should_hold_does_no_harm_to_other_blocks(name: str, value: float) -> None:
    x, weights = ggml_cases.heavy_tailed(2, COLS), ggml_cases.importance(COLS)
    broken = x.copy()
    broken[0, 5], broken[1, 300] = value, value
    half = ggml.BLOCKS[name].nbytes
    clean, found = ggml.encode(name, x, weights), ggml.encode(name, broken, weights)
    np.testing.assert_array_equal(found[0, half:], clean[0, half:])
    np.testing.assert_array_equal(found[1, :half], clean[1, :half])


@pytest.mark.parametrize("name", ["iq1_m", "iq2_xs", "iq3_s"])
@settings(max_examples=15)
@given(rows=st.integers(0, 5), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_rows_are_encoded_each_by_itself(name: str, rows: int, blocks: int, seed: int) -> None:
    x, weights = ggml_cases.heavy_tailed(rows, 256 * blocks, seed), ggml_cases.importance(256 * blocks, seed)
    whole = ggml.encode(name, x, weights)
    assert whole.shape == (rows, blocks * ggml.BLOCKS[name].nbytes)
    for row, encoded in zip(x, whole, strict=True):
        np.testing.assert_array_equal(ggml.encode(name, row[None], weights)[0], encoded)


def test_a_zero_block_of_iq3_s_leaves_its_neighbours_alone() -> None:
    # llama.cpp writes the points and signs of all later blocks of the super-block one place too early.
    x = ggml_cases.heavy_tailed(1, 256)
    expected = kept(x, "iq3_s", None)
    x[0, 32:64] = 0
    found = kept(x, "iq3_s", None)
    np.testing.assert_array_equal(np.sign(found[0, 64:]), np.sign(expected[0, 64:]))
    assert np.square(found - x).mean() < 0.1 * np.square(x).mean()


def test_error_falls_with_bits_and_importance_moves_it() -> None:
    x, weights = ggml_cases.heavy_tailed(4, 1024), ggml_cases.importance(1024)
    scale = (np.square(x) * weights).sum()
    errors = {name: (np.square(kept(x, name, weights) - x) * weights).sum() / scale for name in NAMES}
    assert errors["iq1_s"] > errors["iq1_m"] > errors["iq2_xs"]
    falling = [errors[name] for name in NAMES if name != "iq1_m"]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] < 0.5
    assert falling[-1] < 0.03
    for name in set(NAMES) - ggml.NEEDS_IMPORTANCE:
        assert (np.square(kept(x, name, None) - x) * weights).sum() / scale > errors[name]


@numba.njit
def _each(a: Any, b: Any, out: Any) -> Any:
    x, y, to = lanes.load(raw(a), 0), lanes.load(raw(b) + 1, 0), raw(out)
    results = (
        x + y, x - y, x * y, x / y, lanes.minimum(x, y), lanes.maximum(x, y), lanes.root(y), lanes.whole(x),
        lanes.level(x, lanes.splat(np.float32(7))), lanes.choose(lanes.less(x, y), x, y), lanes.count_up(),
    )  # fmt: skip
    for i in range(len(results)):
        lanes.store(to, 8 * i, results[i])
    return lanes.lowest(x), lanes.highest(x), lanes.bits(lanes.less(x, y)), lanes.bits(lanes.equal(x, y)), raw(a)[1]


def test_lanes_compute_what_numpy_does() -> None:
    a = np.float32([2.5, -3.5, 0.5, 1.5, 4, 100, 5.1, -0.3])
    b = np.float32([9, 1, 2, 3, 1.5, 5, 6, 7, 8])
    out = np.zeros((11, 8), np.float32)
    scalars = _each(a, b, out)
    y = b[1:]
    expected = [a + y, a - y, a * y, a / y, np.minimum(a, y), np.maximum(a, y), np.sqrt(y), np.round(a)]
    expected += [np.clip(np.round((a - 1) / 2), 0, 7), np.minimum(a, y), np.arange(8)]
    np.testing.assert_array_equal(out, np.float32(expected))
    assert scalars == (a.min(), a.max(), int(np.packbits(a < y, bitorder="little")[0]), 1 << 3, a[1])


def test_rounding_wraps_like_llama_cpp_beyond_four_million() -> None:
    a = np.float32([2.0**22, 2.0**22 + 4, -(2.0**22), -(2.0**22) - 1, np.inf, -np.inf, 1e30, 7])
    out = np.zeros((11, 8), np.float32)
    _each(a, np.ones(9, np.float32), out)
    bits = (a + np.float32(12582912)).view(np.int32)
    np.testing.assert_array_equal(out[7], (bits & 0x7FFFFF) - 0x400000)
