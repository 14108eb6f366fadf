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
def test_neighbours_can_be_stored_and_differ(name: str) -> None:
    _, blocks = encoded(name)
    grids, found = levels.split(name, blocks), levels.codes(name, blocks)
    for other in levels.neighbours(name, grids):
        stored = levels.split(name, levels.join(name, other, found))
        assert stored.state.keys() == other.state.keys()
        for key, value in other.state.items():
            assert torch.equal(stored.state[key], value), key
        assert torch.equal(stored.scale, other.scale)
        assert torch.equal(stored.offset, other.offset)
        assert not (torch.equal(other.scale, grids.scale) and torch.equal(other.offset, grids.offset))
        if "codes" in grids.state and "d" in grids.state:
            assert torch.equal(other.state["d"], grids.state["d"])


@pytest.mark.parametrize("name", TYPES)
def test_each_sub_block_has_the_grid_that_was_chosen(name: str) -> None:
    _, blocks = encoded(name)
    grids = levels.split(name, blocks)
    tried = [grids, *levels.neighbours(name, grids)]
    which = torch.randint(len(tried), grids.scale.shape, generator=torch.Generator().manual_seed(0))
    made = levels.choose(name, tried, which)
    for field in ("scale", "offset"):
        of_all = torch.stack([getattr(each, field) for each in tried])
        assert torch.equal(getattr(made, field), of_all.gather(0, which[None])[0])


@pytest.mark.parametrize("name", TYPES)
def test_columns_are_put_together(name: str) -> None:
    _, blocks = encoded(name)
    width = blocks.shape[1] // 2
    parts = [levels.split(name, blocks[:, :width]), levels.split(name, blocks[:, width:])]
    whole, direct = levels.concatenate(name, parts), levels.split(name, blocks)
    assert torch.equal(whole.scale, direct.scale)
    assert torch.equal(whole.offset, direct.offset)


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
