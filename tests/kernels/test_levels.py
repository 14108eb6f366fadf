"""Blocks as levels: what a decoder reads is what the grids say, and writing undoes reading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.kernels import levels
from quantize.kernels.cpu import ggml
from quantize.schemes import GGMLBlock

TYPES = sorted(levels.GRIDS)
SUPER = [name for name in TYPES if levels.GRIDS[name].codes and not name.endswith("fp4")]


def random_blocks(name: str, rows: int, count: int, seed: int) -> torch.Tensor:
    """Returns blocks of random bytes whose halves and floats are finite."""
    random = np.random.default_rng(seed)
    nbytes = ggml.BLOCKS[name].nbytes
    blocks = torch.from_numpy(random.integers(0, 256, (rows, count * nbytes), np.uint8))
    edge = torch.tensor([0, 255, 128, 127], dtype=torch.uint8)
    spots = torch.from_numpy(random.random(blocks.shape) < 0.2)
    blocks = torch.where(spots, edge[torch.from_numpy(random.integers(0, 4, blocks.shape))], blocks)
    if name == "mxfp4":
        return blocks  # every byte is a scale; 255 reads as infinity on our side and is no valid block
    grids = levels.split(name, blocks)
    state = {
        key: levels.half(value.nan_to_num(1.0)) if value.is_floating_point() else value
        for key, value in grids.state.items()
    }
    return levels.join(name, levels.Levels(grids.scale, grids.offset, grids.points, state), levels.codes(name, blocks))


def encoded(name: str, rows: int = 6, cols: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weights and their blocks, among them rows of zeros, tiny and constant ones."""
    random = np.random.default_rng(seed)
    weight = random.standard_t(4, (rows, cols)).astype(np.float32) * np.float32(0.05)
    weight[0] = 0
    weight[1] *= np.float32(1e-7)
    weight[2, :256] = 0.5
    importance = random.random(cols, np.float32) + np.float32(0.1)
    return torch.from_numpy(weight), torch.from_numpy(ggml.encode(name, weight, importance))


@pytest.mark.parametrize("name", TYPES)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), count=st.integers(1, 3))
def test_writing_undoes_reading(name: str, seed: int, rows: int, count: int) -> None:
    blocks = random_blocks(name, rows, count, seed)
    assert torch.equal(levels.join(name, levels.split(name, blocks), levels.codes(name, blocks)), blocks)


@pytest.mark.parametrize("name", TYPES)
def test_values_are_those_of_the_decoder(name: str) -> None:
    _, blocks = encoded(name)
    for some in (blocks, random_blocks(name, 8, 4, 1)):
        grids, found = levels.split(name, some), ggml.decode(name, some.numpy())
        ours = levels.values(name, grids, levels.codes(name, some)).numpy()
        valid = np.isfinite(found) & np.isfinite(ours)
        assert valid.mean() > 0.9
        np.testing.assert_array_equal(ours[valid], found[valid])


@pytest.mark.parametrize("name", TYPES)
def test_storable_scales_stay(name: str) -> None:
    _, blocks = encoded(name)
    grids = levels.split(name, blocks)
    again = levels.snap(name, grids, grids.scale, grids.offset)
    assert torch.equal(again.scale, grids.scale)
    assert torch.equal(again.offset, grids.offset)
    nothing = torch.full_like(grids.scale, torch.nan)
    assert torch.equal(levels.snap(name, grids, nothing, nothing).scale, grids.scale)


@pytest.mark.parametrize("name", TYPES)
def test_snapped_grids_can_be_stored(name: str) -> None:
    _, blocks = encoded(name)
    grids, found = levels.split(name, blocks), levels.codes(name, blocks)
    torch.manual_seed(0)
    wild = torch.cat([torch.randn_like(grids.scale[:3]), torch.full_like(grids.scale[3:], 1e9)])
    snapped = levels.snap(name, grids, wild, -wild.abs())
    stored = levels.split(name, levels.join(name, snapped, found))
    assert stored.state.keys() == snapped.state.keys()
    for key, value in snapped.state.items():
        assert torch.equal(stored.state[key], value), key
    assert snapped.scale.isfinite().all()


@pytest.mark.parametrize("name", TYPES)
def test_no_neighbour_is_nearer(name: str) -> None:
    """Moving a storable field by one step never brings a scale nearer to the one that was wanted."""
    _, blocks = encoded(name)
    grids = levels.split(name, blocks)
    wanted = grids.scale * (0.7 + 0.6 * torch.rand_like(grids.scale))
    error = (levels.snap(name, grids, wanted, grids.offset).scale - wanted).abs()
    assert (error <= (grids.scale - wanted).abs()).all()


@pytest.mark.parametrize("name", TYPES)
def test_nearest_code_is_nearest(name: str) -> None:
    weight, blocks = encoded(name)
    grids = levels.split(name, blocks)
    found = levels.nearest(name, grids, weight)
    error = (levels.values(name, grids, found) - weight).abs()
    for code in range(0, len(grids.points), max(1, len(grids.points) // 16)):
        other = (levels.values(name, grids, torch.full_like(found, code)) - weight).abs()
        assert (error <= other * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("name", SUPER)
def test_super_scales_fit_what_is_wanted(name: str) -> None:
    _, blocks = encoded(name)
    grids = levels.split(name, blocks)
    fitted = levels.resuper(name, grids, grids.scale * 1.25, grids.offset * 1.5)
    torch.testing.assert_close(fitted.scale, grids.scale * 1.25, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(fitted.offset, grids.offset * 1.5, rtol=1e-3, atol=1e-6)
    assert torch.equal(fitted.state["codes"], grids.state["codes"])


def test_without_super_scales_there_is_nothing_to_refit() -> None:
    _, blocks = encoded("q4_0")
    grids = levels.split("q4_0", blocks)
    assert levels.resuper("q4_0", grids, grids.scale * 2, grids.offset) is grids


@pytest.mark.parametrize("name", TYPES)
def test_columns_and_rows_are_put_together_and_taken_apart(name: str) -> None:
    _, blocks = encoded(name)
    width = blocks.shape[1] // 2
    parts = [levels.split(name, blocks[:, :width]), levels.split(name, blocks[:, width:])]
    whole, direct = levels.concatenate(name, parts), levels.split(name, blocks)
    assert torch.equal(whole.scale, direct.scale)
    assert torch.equal(whole.offset, direct.offset)
    assert torch.equal(levels.take(direct, slice(2, 4)).scale, direct.scale[2:4])
    keep = torch.tensor([True, False] * 3)
    mixed = levels.pick(name, keep, direct, levels.snap(name, direct, direct.scale * 2, direct.offset))
    assert torch.equal(mixed.scale[::2], direct.scale[::2])


@pytest.mark.parametrize("name", TYPES)
def test_a_scheme_puts_blocks_together_as_its_encoder_does(name: str) -> None:
    scheme = GGMLBlock(name)
    weight, _ = encoded(name)
    importance = torch.rand(weight.shape[1]) + 0.1
    whole = scheme.encode(weight[:, :256], importance[:256]).arrays["blocks"]
    grids = scheme.fit(weight[:, :256], importance[:256])
    coded = scheme.assemble(levels.codes(name, whole), [grids])
    assert torch.equal(coded.arrays["blocks"], whole)
    twice = scheme.assemble(levels.codes(name, whole).repeat(1, 2), [grids, grids])
    assert torch.equal(twice.dequantize(), coded.dequantize().repeat(1, 2))
