"""EXL2's arithmetic: golden scales, values against numpy's own half precision, and what the search finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.kernels import exl2


def normal(rows: int, columns: int, seed: int, size: float = 0.05) -> Tensor:
    return size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def bits_of(value: Tensor) -> list[int]:
    return [each & 0xFFFF for each in value.view(torch.int16).flatten().tolist()]


@pytest.mark.parametrize(
    ("maximum", "step", "scale"),
    [
        (0.0123, 7, 0x1A4C),
        (0.0123, 15, 0x224C),
        (0.002, 3, 0x0818),  # a unit that is subnormal
        (0.002, 15, 0x1818),
        (0.05, 0, 0x0A66),
    ],
)
def test_golden_scales(maximum: float, step: int, scale: int) -> None:
    found = exl2.scales(torch.tensor([[step]], dtype=torch.uint8), torch.tensor([maximum]).half())
    assert bits_of(found) == [scale]


@given(st.integers(0, 0x7BFF))
def test_scales_round_as_half_precision_does(pattern: int) -> None:
    maximum = np.array([pattern], np.uint16).view(np.float16)
    steps = np.arange(16, dtype=np.uint8)
    unit = maximum * np.float16(1 / 256)
    squares = ((steps.astype(np.int32) + 1) ** 2).astype(np.float16)
    with np.errstate(over="ignore"):
        expected = squares * unit
    found = exl2.scales(torch.from_numpy(steps)[None].T, torch.from_numpy(maximum))
    assert found[:, 0].numpy().tobytes() == expected.tobytes()


@given(st.sampled_from(exl2.WIDTHS), st.integers(0, 2**31))
def test_values_round_once(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, 64), dtype=torch.uint8, generator=generator)
    scales = torch.rand(3, 2, generator=generator).mul_(10.0 ** -(seed % 7)).half()
    found = exl2.dequantize(codes, scales, [(bits, 32), (bits, 32)])
    signed = (codes.numpy().astype(np.int32) - 2 ** (bits - 1)).astype(np.float16)
    expected = signed * np.repeat(scales.numpy(), 32, 1)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("bits", exl2.WIDTHS)
def test_what_is_on_the_grid_stays(bits: int) -> None:
    scale = torch.tensor([0.5, 0.25])
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(2, 1)
    values = (codes.float() - 2 ** (bits - 1)) * scale[:, None]
    assert torch.equal(exl2.round_to_codes(values, scale, bits), codes)


def test_a_scale_of_nothing_gives_the_middle() -> None:
    codes = exl2.round_to_codes(torch.tensor([[-1.0, 0.0, 1.0]]), torch.zeros(1), 3)
    assert codes.tolist() == [[4, 4, 4]]


# Relative error of a normal matrix: below what an absmax scale per group and row leaves, by width.
BUDGET = {2: 0.38, 3: 0.205, 4: 0.106, 5: 0.054, 6: 0.028, 8: 0.0074}


@pytest.mark.parametrize("bits", exl2.WIDTHS)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_budget(bits: int, weighted: bool) -> None:
    weight = normal(128, 64, 1)
    importance = torch.ones(64) if weighted else None
    steps, maximum = exl2.fit(weight, bits, importance)
    scale = exl2.scales(steps[:, None], maximum)
    codes = exl2.round_to_codes(weight, scale[:, 0].float(), bits)
    error = exl2.dequantize(codes, scale, [(bits, 64)]) - weight
    assert float(error.norm() / weight.norm()) < BUDGET[bits] * (1.0 if weighted else 1.1)


@settings(max_examples=25)
@given(st.sampled_from([2, 3, 4]), st.integers(0, 2**31))
def test_importance_is_heeded(bits: int, seed: int) -> None:
    weight = normal(16, 32, seed)
    importance = torch.ones(32)
    importance[:4] = 1e4

    def cost(given: Tensor | None) -> float:
        steps, maximum = exl2.fit(weight, bits, given)
        scale = exl2.scales(steps[:, None], maximum)
        codes = exl2.round_to_codes(weight, scale[:, 0].float(), bits)
        return float((exl2.dequantize(codes, scale, [(bits, 32)]) - weight).square().matmul(importance).sum())

    assert cost(importance) <= cost(None) * 1.001


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6, 1e4, 1e30])
@pytest.mark.parametrize("bits", exl2.WIDTHS)
def test_the_smallest_and_the_largest_weights(bits: int, size: float) -> None:
    weight = normal(8, 32, 2, size)
    weight[3] = 0
    steps, maximum = exl2.fit(weight, bits)
    assert float(maximum) >= 2.0**-16
    scale = exl2.scales(steps[:, None], maximum)
    codes = exl2.round_to_codes(weight, scale[:, 0].float(), bits)
    values = exl2.dequantize(codes, scale, [(bits, 32)])
    assert bool(values.isfinite().all())
    assert not values[3].any()


def test_arguments_are_left_alone() -> None:
    weight, importance = normal(8, 32, 3), torch.rand(32)
    kept = weight.clone(), importance.clone()
    exl2.fit(weight, 4, importance)
    exl2.fit(weight, 4)
    assert torch.equal(weight, kept[0])
    assert torch.equal(importance, kept[1])
