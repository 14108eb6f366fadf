"""MLX's grids: laws, the numbers of one group worked out by hand, and the search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.kernels import mlx

BITS = (2, 3, 4, 5, 6, 8)


def normal(rows: int = 32, cols: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def test_one_group_by_hand() -> None:
    """The larger end, 1.3125, is code 0; the step, 31/16/15, becomes 1.3125/10 so that 0 is ten steps away."""
    weight = (torch.arange(32, dtype=torch.float32) - 10) / 16
    codes, scales, biases = mlx.affine(weight[None], 4, 32)
    assert (scales.item(), biases.item()) == (pytest.approx(-0.13125), 1.3125)
    assert codes[0].tolist() == [15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 10, 9, 9, 8, 8,
                                 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]  # fmt: skip
    again, scales, biases = mlx.affine(-weight[None], 4, 32)
    assert (scales.item(), biases.item()) == (pytest.approx(0.13125), -1.3125)
    assert torch.equal(again, codes)


@pytest.mark.parametrize(
    ("value", "scale", "bias"), [(0.0, -1e-7, 0.0), (0.25, -1e-7, 0.25), (-0.25, -1e-7, -0.25)], ids=str
)
def test_constant_groups(value: float, scale: float, bias: float) -> None:
    codes, scales, biases = mlx.affine(torch.full((1, 32), value), 4, 32)
    assert scales.item() == pytest.approx(scale, rel=0.01)
    assert biases.item() == bias
    assert torch.equal(mlx.affine_values(codes, scales, biases), torch.full((1, 32), value))


@given(st.sampled_from(BITS), st.sampled_from((32, 64, 128)), st.integers(0, 999), st.floats(-30, 10), st.booleans())
def test_errors_are_within_a_step_and_zero_is_exact(
    bits: int, group: int, seed: int, exponent: float, one_sign: bool
) -> None:
    weight = normal(3, group * 2, seed) * 2**exponent
    weight = weight.abs() if one_sign else weight
    weight[:, 5] = 0
    codes, scales, biases = mlx.affine(weight, bits, group)
    values = mlx.affine_values(codes, scales, biases)
    steps = scales.abs().repeat_interleave(group, 1)
    # nudging the step moves the far end by up to half a step
    assert ((values - weight).abs() <= steps * 1.01).all()
    most = weight.unflatten(-1, (-1, group)).abs().amax(-1)
    assert (values[:, 5].abs() <= most[:, 0] * 1e-5).all()
    assert int(codes.max()) < 2**bits


# Relative errors on normal weights, groups of 64, scales in float32: measured with MLX.
@pytest.mark.parametrize(
    ("bits", "expected"), [(2, 0.395), (3, 0.191), (4, 0.0909), (5, 0.0441), (6, 0.0217), (8, 0.0054)]
)
def test_error_on_normal_weights(bits: int, expected: float) -> None:
    weight = normal(512, 512)
    values = mlx.affine_values(*mlx.affine(weight, bits, 64))
    assert float((values - weight).square().mean().sqrt()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_searched_grids_lose_less(bits: int, dtype: torch.dtype) -> None:
    weight, costs = normal(256, 64), torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 3

    def error(scales: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
        codes = mlx.nearest(weight[:, None], scales.float(), biases.float(), bits).squeeze(1)
        return (mlx.affine_values(codes, scales, biases) - weight).square() @ costs

    _, *plain = mlx.affine(weight, bits, 64)
    before, after = error(*(p.to(dtype) for p in plain)), error(*mlx.search(weight, costs, bits, dtype))
    assert (after <= before).all()
    assert float(after.sum()) < 0.93 * float(before.sum())


def test_search_survives_awkward_rows() -> None:
    weight = torch.stack([torch.zeros(32), torch.full((32,), 0.3), torch.full((32,), 1e-20), torch.full((32,), 6e4)])
    for costs in (torch.ones(32), torch.zeros(32)):
        scales, biases = mlx.search(weight, costs, 4, torch.float16)
        codes = mlx.nearest(weight[:, None], scales.float(), biases.float(), 4).squeeze(1)
        values = mlx.affine_values(codes, scales, biases)
        assert (values - weight).abs().amax(1).tolist() <= [0, 3e-4, 1e-7, 32]


# -- small floats ------------------------------------------------------------------------------------------------------


def test_four_bit_floats_by_hand() -> None:
    """amax 6: scale 1. Ties go to the smaller magnitude, and nothing is -0."""
    row = torch.tensor([0.25, 0.26, -0.75, 1.25, -1.75, 2.5, -3.5, 5.0, 6.0, -6.0, -0.1, 0.0] + [0.0] * 20)
    codes, scales = mlx.float_encode(row[None], "mxfp4")
    assert scales.item() == 127
    assert codes[0, :12].tolist() == [0, 1, 9, 2, 11, 4, 13, 6, 7, 15, 0, 0]
    values = mlx.float_values(codes, scales, "mxfp4")
    assert values[0, :10].tolist() == [0, 0.5, -0.5, 1, -1.5, 2, -3, 4, 6, -6]


@pytest.mark.parametrize(
    ("mode", "most", "byte"),
    [("mxfp4", 6.0, 127), ("mxfp4", 6.1, 128), ("mxfp4", 3.0, 126), ("mxfp4", 0.0, 127), ("mxfp8", 448.0, 127),
     ("mxfp8", 1.0, 119), ("mxfp8", 1e-42, 0), ("nvfp4", 6.0, 0x38), ("nvfp4", 2688.0, 0x7E), ("nvfp4", 1e9, 0x7E),
     ("nvfp4", 0.0, 0)],
)  # fmt: skip
def test_scale_bytes(mode: str, most: float, byte: int) -> None:
    weight = torch.zeros(1, mlx.MODES[mode].group)
    weight[0, 3] = -most
    codes, scales = mlx.float_encode(weight, mode)
    assert scales.item() == byte
    assert mlx.float_values(codes, scales, mode).isfinite().all()


def test_scale_values_are_exact() -> None:
    every = torch.arange(255, dtype=torch.uint8)
    assert mlx.scale_values(every, "mxfp4").tolist() == [2.0 ** (i - 127) for i in range(255)]


@pytest.mark.parametrize("mode", mlx.MODES)
def test_points_and_codes_belong_together(mode: str) -> None:
    points = torch.tensor(mlx.MODES[mode].points)
    assert (points.diff() > 0).all()
    codes = mlx.codes_of_points(torch.arange(len(points)), mode)
    one = torch.full((len(points), 1), 127 if mlx.MODES[mode].power else 0x38, dtype=torch.uint8)
    assert torch.equal(mlx.float_values(codes[:, None], one, mode)[:, 0], points)


@given(st.sampled_from(sorted(mlx.MODES)), st.integers(0, 999), st.floats(-20, 8))
def test_what_was_rounded_stays(mode: str, seed: int, exponent: float) -> None:
    weight = normal(2, 64, seed) * 2**exponent
    values = mlx.float_values(*mlx.float_encode(weight, mode), mode)
    assert values.isfinite().all()
    if mlx.MODES[mode].power:
        assert torch.equal(mlx.float_values(*mlx.float_encode(values, mode), mode), values)
        # half a step of the coarsest octave
        limit = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / (3 if mode == "mxfp4" else 14)
        assert ((values - weight).unflatten(-1, (-1, 32)).abs() <= limit).all()


@pytest.mark.parametrize("mode", mlx.MODES)
def test_searched_scales_lose_less(mode: str) -> None:
    group = mlx.MODES[mode].group
    weight, costs = normal(256, group), torch.rand(group, generator=torch.Generator().manual_seed(1))
    plain = mlx.float_encode(weight, mode)[1]
    found = mlx.search_scales(weight, costs, mode)

    def error(scales: torch.Tensor) -> torch.Tensor:
        middles = torch.tensor(mlx.MODES[mode].points)
        levels = weight / mlx.scale_values(scales, mode)
        codes = torch.bucketize(levels, (middles[1:] + middles[:-1]) / 2)
        values = mlx.float_values(mlx.codes_of_points(codes, mode), scales, mode)
        return (values - weight).square() @ costs

    assert float(error(found).sum()) <= float(error(plain).sum()) * (1.0 if mode == "mxfp8" else 0.97)
