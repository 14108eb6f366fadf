"""Laws of the affine grids, and a numpy twin that shares no code with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantize.kernels import affine

MIN, MAX = 2.0**-24, 65504.0
MAGNITUDES = st.sampled_from([1e-12, 1e-8, 3e-7, 1e-5, 1e-3, 1.0, 1e3, 1e5, 1e34])
BITS = st.integers(2, 8)


@st.composite
def weights(draw: st.DrawFn, magnitudes: st.SearchStrategy[float] = MAGNITUDES) -> tuple[Tensor, int]:
    """Rows of groups of very different sizes: some one-sided, some zero, some with a lone outlier."""
    group = draw(st.sampled_from([8, 16, 24]))
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    value = torch.randn(rows, groups, group, generator=generator)
    for g in range(groups):
        value[:, g] *= draw(magnitudes)
        kind = draw(st.sampled_from(["both", "positive", "negative", "zero", "outlier", "equal"]))
        if kind == "positive":
            value[:, g] = value[:, g].abs()
        elif kind == "negative":
            value[:, g] = -value[:, g].abs()
        elif kind == "zero":
            value[:, g] = 0
        elif kind == "outlier":
            value[:, g, 0] *= 1000
        elif kind == "equal":
            value[:, g] = value[:, g, :1]
    return value.reshape(rows, -1), group


def twin(weight: np.ndarray, group: int, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zeros, one group at a time in numpy's float32 and float16."""
    one = np.float32
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    rows, cols = weight.shape
    codes = np.zeros((rows, cols), np.uint8)
    scales = np.zeros((rows, cols // group), np.float16)
    zeros = np.zeros((rows, cols // group), np.uint8)
    for r in range(rows):
        for g in range(cols // group):
            part = weight[r, g * group : (g + 1) * group]
            low, high = min(part.min(), one(0)), max(part.max(), one(0))
            if symmetric:
                span = max(high / one(top - middle), low / one(-middle))
            else:
                span = high / one(top) - low / one(top)
            fine = np.ceil(span / one(MIN)) * one(MIN) if span < 2.0**-14 else span
            scale = np.float16(np.clip(fine, one(MIN), one(MAX)))
            if low == 0 and high == 0:
                scale = np.float16(1)
            zero = middle if symmetric else np.clip(np.rint(-low / (span if span > MAX else one(scale))), 0, top)
            codes[r, g * group : (g + 1) * group] = np.clip(np.rint(part / one(scale)) + zero, 0, top)
            scales[r, g], zeros[r, g] = scale, zero
    return codes, scales, zeros


@given(weights(), BITS, st.booleans())
def test_equals_the_numpy_twin(made: tuple[Tensor, int], bits: int, symmetric: bool) -> None:
    weight, group = made
    low, high = affine.extremes(weight, group)
    scales, zeros = affine.grid(low, high, bits, symmetric)
    codes = affine.round_to_codes(weight, scales, zeros, bits)
    expected = twin(weight.numpy(), group, bits, symmetric)
    np.testing.assert_array_equal(codes.numpy().astype(np.uint8), expected[0])
    np.testing.assert_array_equal(scales.numpy().astype(np.float16), expected[1])
    np.testing.assert_array_equal(zeros.numpy().astype(np.uint8), expected[2])
    values = (expected[0].astype(np.float32) - np.repeat(expected[2], group, 1)) * np.repeat(expected[1], group, 1)
    np.testing.assert_array_equal(affine.dequantize(codes, scales, zeros).numpy(), values.astype(np.float32))


@given(weights(), BITS, st.booleans())
def test_no_error_above_half_a_step(made: tuple[Tensor, int], bits: int, symmetric: bool) -> None:
    weight, group = made
    low, high = affine.extremes(weight, group)
    scales, _ = affine.grid(low, high, bits, symmetric)
    error = (affine.round_trip(weight, low, high, bits, symmetric) - weight).abs()
    # a float16 scale is off by 2**-11 of itself, which the outermost codes feel 2**bits times
    step = scales.double().repeat_interleave(group, 1)
    bound = step * (0.5 + 2.0 ** (bits - 11)) + 1e-6 * weight.abs()
    saturated = step >= MAX
    assert bool(((error <= bound) | saturated).all())


@given(weights(), BITS, st.booleans())
def test_the_grid_can_be_stored(made: tuple[Tensor, int], bits: int, symmetric: bool) -> None:
    weight, group = made
    low, high = affine.extremes(weight, group)
    assert bool((low <= 0).all())
    assert bool((high >= 0).all())
    scales, zeros = affine.grid(low, high, bits, symmetric)
    assert torch.equal(scales, scales.half().float())
    assert bool(((scales >= MIN) & (scales <= MAX)).all())
    assert torch.equal(zeros, zeros.round())
    assert bool(((zeros >= 0) & (zeros < 2**bits)).all())
    if symmetric:
        assert bool((zeros == 2 ** (bits - 1)).all())
    codes = affine.round_to_codes(weight, scales, zeros, bits)
    assert torch.equal(codes, codes.round())
    assert bool(((codes >= 0) & (codes < 2**bits)).all())


@given(weights(), BITS, st.booleans())
def test_rounding_twice_on_one_grid_changes_nothing(made: tuple[Tensor, int], bits: int, symmetric: bool) -> None:
    weight, group = made
    low, high = affine.extremes(weight, group)
    once = affine.round_trip(weight, low, high, bits, symmetric)
    assert torch.equal(affine.round_trip(once, low, high, bits, symmetric), once)


@given(weights(), BITS, st.booleans())
def test_inputs_are_not_changed(made: tuple[Tensor, int], bits: int, symmetric: bool) -> None:
    weight, group = made
    low, high = affine.extremes(weight, group)
    scales, zeros = affine.grid(low, high, bits, symmetric)
    codes = affine.round_to_codes(weight, scales, zeros, bits)
    before = [value.clone() for value in (weight, low, high, scales, zeros, codes)]
    affine.extremes(weight, group)
    affine.grid(low, high, bits, symmetric)
    affine.round_to_codes(weight, scales, zeros, bits)
    affine.dequantize(codes, scales, zeros)
    affine.round_trip(weight, low, high, bits, symmetric)
    for value, copy in zip((weight, low, high, scales, zeros, codes), before, strict=True):
        assert torch.equal(value, copy)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_is_exact_with_scale_one(symmetric: bool) -> None:
    weight = torch.zeros(2, 32)
    weight[1, :16] = torch.linspace(-1, 1, 16)
    low, high = affine.extremes(weight, 16)
    scales, zeros = affine.grid(low, high, 4, symmetric)
    assert scales[0].tolist() == [1, 1]
    assert scales[1, 1] == 1
    assert zeros[0].tolist() == ([8, 8] if symmetric else [0, 0])
    assert torch.equal(affine.round_trip(weight, low, high, 4, symmetric)[:, 16:], weight[:, 16:])


def test_a_group_below_the_smallest_scale_becomes_zero() -> None:
    weight = torch.linspace(-1e-8, 1e-8, 16).unsqueeze(0)
    low, high = affine.extremes(weight, 16)
    scales, _ = affine.grid(low, high, 4, symmetric=False)
    assert scales.item() == MIN
    assert torch.equal(affine.round_trip(weight, low, high, 4, symmetric=False), torch.zeros_like(weight))


def test_a_scale_among_the_subnormal_float16_is_rounded_up() -> None:
    """Rounded to nearest, 1.4 units become 1, and the outermost weights would lie six steps off the grid."""
    high = torch.tensor([[15 * 1.4 * MIN]])
    scales, _ = affine.grid(torch.zeros(1, 1), high, 4, symmetric=False)
    assert scales.item() == 2 * MIN
    scales, _ = affine.grid(torch.zeros(1, 1), 15 * torch.tensor([[3 * MIN]]), 4, symmetric=False)
    assert scales.item() == 3 * MIN


@pytest.mark.parametrize("size", [2e6, 3e38])
def test_a_group_beyond_the_largest_scale_saturates_and_stays_finite(size: float) -> None:
    weight = size * torch.linspace(-1, 1, 16).unsqueeze(0)
    low, high = affine.extremes(weight, 16)
    scales, _ = affine.grid(low, high, 4, symmetric=False)
    assert scales.item() == MAX
    back = affine.round_trip(weight, low, high, 4, symmetric=False)
    assert bool(back.isfinite().all())
    assert bool((back.sign() == weight.sign()).all())


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_weights_take_the_outermost_code(sign: int) -> None:
    weight = sign * torch.tensor([[float("inf"), 1.0, 2.0, -1.0, 0.0, 0.0, 0.0, 0.0]])
    low, high = affine.extremes(weight, 8)
    back = affine.round_trip(weight, low, high, 4, symmetric=False)
    assert back[0, 0].item() == sign * 15 * MAX
    assert back[0, 1:].tolist() == [0] * 7


def test_hand_computed_group() -> None:
    weight = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 2.75]])
    low, high = affine.extremes(weight, 8)
    scales, zeros = affine.grid(low, high, 4, symmetric=False)
    assert (scales.item(), zeros.item()) == (0.25, 4)
    assert affine.round_to_codes(weight, scales, zeros, 4).tolist() == [[0, 2, 4, 5, 6, 8, 12, 15]]
    assert torch.equal(affine.round_trip(weight, low, high, 4, symmetric=False), weight)


def test_ties_go_to_the_even_code() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, 0, 0, 0, 0]])
    codes = affine.round_to_codes(weight, torch.ones(1, 1), torch.full((1, 1), 8.0), 4)
    assert codes.tolist() == [[8, 10, 10, 8, 8, 8, 8, 8]]


def test_values_outside_the_given_range_saturate() -> None:
    weight = torch.tensor([[-9.0, -1, 0, 1, 2, 3, 14, 99]])
    back = affine.round_trip(weight, torch.tensor([[0.0]]), torch.tensor([[15.0]]), 4, symmetric=False)
    assert back.tolist() == [[0, 0, 0, 1, 2, 3, 14, 15]]
