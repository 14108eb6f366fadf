"""The scale search of affine grids against plain fits and a search over everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.kernels import affine
from quantize.kernels.affine_search import search


def weights(seed: int, rows: int = 16, group: int = 32, size: float = 0.1, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(rows, group, generator=generator) * torch.randn(rows, group, generator=generator).abs()
    return size * (value + shift)


def costs(seed: int, group: int = 32) -> Tensor:
    return torch.rand(group, generator=torch.Generator().manual_seed(seed + 1)) ** 3 + 1e-4


def lost(weight: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Returns the weighted squared error of each row on its grid, double."""
    w, s, z = weight.double(), scales.double(), zeros.double()
    codes = (w / s).round().add(z).clamp(0, 2**bits - 1)
    return ((codes - z) * s - w).square() @ importance.double()


@given(
    seed=st.integers(0, 2**20),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([8, 32, 100]),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
    shift=st.sampled_from([-3.0, -0.5, 0.0, 3.0]),
)
@example(seed=0, bits=2, symmetric=True, group=8, size=1e-6, shift=3.0)
@settings(max_examples=60)
def test_never_worse_than_the_plain_grid(
    seed: int, bits: int, symmetric: bool, group: int, size: float, shift: float
) -> None:
    """Whatever comes out can be stored: float16 scales but for zero, whole zero codes in range."""
    weight, importance = weights(seed, group=group, size=size, shift=shift), costs(seed, group)
    kept = weight.clone(), importance.clone()
    scales, zeros = search(weight, importance, bits, symmetric)
    assert torch.equal(weight, kept[0])
    assert torch.equal(importance, kept[1])
    assert scales.shape == zeros.shape == (16, 1)
    assert torch.equal(scales, scales.half().float())
    assert bool((scales.isfinite() & (scales != 0)).all())
    assert symmetric or bool((scales > 0).all())
    assert torch.equal(zeros, zeros.round().clamp(0, 2**bits - 1))
    if symmetric:
        assert bool((zeros == 2 ** (bits - 1)).all())
    plain = affine.grid(*affine.extremes(weight, group), bits, symmetric)
    found, before = lost(weight, importance, scales, zeros, bits), lost(weight, importance, *plain, bits)
    assert bool((found <= before * (1 + 1e-5) + 1e-20).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "share"), [(2, 0.75), (3, 0.9), (4, 0.95)])
def test_clipping_pays_at_few_bits(bits: int, share: float, symmetric: bool) -> None:
    weight, importance = weights(1, rows=200, group=64), costs(1, 64)
    plain = affine.grid(*affine.extremes(weight, 64), bits, symmetric)
    found = lost(weight, importance, *search(weight, importance, bits, symmetric), bits).sum()
    assert found < share * lost(weight, importance, *plain, bits).sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "limit"), [(2, 1.08), (3, 1.08), (4, 1.08)])
def test_near_the_best_of_all_grids(bits: int, limit: float, symmetric: bool) -> None:
    """A search over 200 scales and every zero code, of either sign where symmetric; normal weights, mild costs."""
    weight = 0.1 * torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    importance = 0.2 + costs(2)
    largest = 2 * weight.abs().amax(1, keepdim=True) / (2**bits - 1)
    middle = float(2 ** (bits - 1))
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.2, 1.3, 200).tolist():
        scale = (largest * share).half().float()
        for zero in [middle] if symmetric else range(2**bits):
            for sign in (1, -1) if symmetric else (1,):
                best = torch.minimum(best, lost(weight, importance, sign * scale, torch.tensor(float(zero)), bits))
    found = lost(weight, importance, *search(weight, importance, bits, symmetric), bits)
    assert float(found.sum() / best.sum()) < limit


def test_costs_decide_what_is_clipped() -> None:
    """A loud weight that costs nothing is clipped away; one that costs much is kept."""
    weight = torch.linspace(-0.3, 0.3, 32)[None].clone()
    weight[0, 7] = 0.45
    cheap, dear = torch.ones(32), torch.ones(32)
    cheap[7], dear[7] = 0.0, 1e6
    for symmetric in (False, True):
        low, high = (search(weight, cost, 4, symmetric) for cost in (cheap, dear))
        reached = [float(max((15 - zero) * scale, -zero * scale)) for scale, zero in (low, high)]
        assert reached[0] < 0.36
        assert reached[1] == pytest.approx(0.45, abs=0.03)


def test_a_negative_scale_puts_the_longer_side_where_there_are_more_codes() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.3, 1.0] * 2, [-0.1, 0.2, -0.3, -1.0] * 2])
    scales, zeros = search(weight, torch.ones(8), 2, True)
    assert zeros.flatten().tolist() == [2, 2]
    assert scales[0] < 0 < scales[1]
    assert torch.equal(*lost(weight, torch.ones(8), scales, zeros, 2))


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_rows_and_one_sign(symmetric: bool) -> None:
    weight = torch.zeros(4, 16)
    weight[1] = 0.5
    weight[2] = -0.5
    weight[3, 3] = 1e-9
    for importance in (torch.ones(16), torch.zeros(16)):
        scales, zeros = search(weight, importance, 4, symmetric)
        assert bool((scales.isfinite() & (scales != 0)).all())
        error = lost(weight, torch.ones(16), scales, zeros, 4)
        assert bool((error[:3] <= 1e-4).all())
        assert error[3] <= 1e-9
