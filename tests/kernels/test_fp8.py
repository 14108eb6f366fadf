"""Scaled 8-bit and 4-bit floats and packed integers: golden values, saturation, zeros, subnormals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.float_schemes import FP8, MXFP4, NVFP4, Int8Channel, PackedInt, members
from quantize.kernels import affine, fp4, fp8, packed_ints
from quantize.schemes import FAMILIES, Levelled, Scheme, parse_scheme

SCHEMES = (*members(), FP8("block", 64, wide=True), PackedInt(5, -1, symmetric=True), PackedInt(4, 32))
# Relative squared error of normal weights, a little above what is measured.
ERRORS = {"fp8-channel": 8e-4, "fp8-block": 8e-4, "int8-channel": 1e-4, "nvfp4-a16": 1e-2, "mxfp4-a16": 1.4e-2,
          "int4-g128-sym-bf16": 1.4e-2, "int4-g128-bf16": 1.1e-2, "int8-g128-bf16": 5e-5}  # fmt: skip


def normal(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.1
    return values.to(dtype).float()


def e4m3() -> list[float]:
    """All finite values of E4M3 by their code, from their bits."""
    found = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        found.append(mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
    return found


# -- E4M3 --------------------------------------------------------------------------------------------------------


def test_golden_codes() -> None:
    values = [448, -448, 0, 1, 2.0**-6, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 500, -1e30, 17, 19]
    found = fp8.encode(torch.tensor([values]), torch.ones(1, 1))
    assert found.view(torch.uint8).tolist() == [[126, 254, 0, 56, 8, 1, 0, 2, 126, 254, 88, 90]]


def test_every_finite_code_is_itself() -> None:
    values = torch.tensor([[*e4m3(), *(-value for value in e4m3()[1:])]])
    codes = fp8.encode(values, torch.ones(1, 1))
    assert codes.float().tolist() == values.tolist()


@given(st.floats(-1e4, 1e4, width=32))
def test_the_nearest_code_is_chosen(value: float) -> None:
    (found,) = fp8.encode(torch.tensor([[value]]), torch.ones(1, 1)).float()[0].tolist()
    points = np.array(e4m3())
    rounded = float(torch.tensor(value).bfloat16()) if fp8.are_brain(torch.tensor([[value]])).item() else value
    assert abs(abs(found) - abs(rounded)) == np.abs(points - abs(rounded)).min()
    assert found == 0 or (found < 0) == (value < 0)


def test_scales_put_the_peak_on_the_greatest_code() -> None:
    assert fp8.scales(torch.tensor([448.0, 896.0, 1.0]), 448).tolist() == [1, 2, 146 * 2.0**-16]
    assert fp8.scales(torch.zeros(2), 448).tolist() == [2.0**-7] * 2


def test_tiles_may_be_smaller_at_the_edges() -> None:
    weight = torch.arange(15.0).reshape(3, 5)
    assert fp8.block_peaks(weight, 2).tolist() == [[6, 8, 9], [11, 13, 14]]
    assert fp8.spread(fp8.block_peaks(weight, 2), 2, (3, 5)).tolist()[2] == [11, 11, 13, 13, 14]


def test_rows_that_are_no_bfloat16_are_divided_exactly() -> None:
    brain, other = torch.tensor([[1.0, 0.3125]]), torch.tensor([[1.0, 0.3]])
    assert fp8.are_brain(torch.cat([brain, other])).tolist() == [[True], [False]]


# -- E2M1 --------------------------------------------------------------------------------------------------------


def test_golden_fp4_codes() -> None:
    table = {0.0: 0, 0.25: 0, 0.26: 1, 0.5: 1, 0.74: 1, 0.75: 2, 1.25: 2, 1.26: 3, 1.74: 3, 1.75: 4, 2.5: 4, 2.51: 5,
             3.49: 5, 3.5: 6, 5.0: 6, 5.01: 7, 100.0: 7, -6.0: 15, -0.1: 8, -1.0: 10}  # fmt: skip
    assert fp4.codes(torch.tensor(list(table))).tolist() == list(table.values())
    assert fp4.codes(torch.tensor([-0.0])).tolist() == [0]


def test_fp4_pairs() -> None:
    assert fp4.pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    assert fp4.unpack(torch.tensor([[0x21, 0x0F]], dtype=torch.uint8)).tolist() == [[1, 2, 15, 0]]
    assert fp4.decode(torch.tensor([[1, 2, 15, 8]], dtype=torch.uint8), torch.tensor([[2.0, 1.0]])).tolist() == [
        [1, 2, -6, 0]
    ]


@pytest.mark.parametrize(
    ("peak", "byte"), [(6.0, 127), (6.9, 127), (7.0, 128), (4.0, 127), (3.5, 127), (0.0, 0), (1e-38, 0), (3e38, 253)]
)
def test_mx_exponents(peak: float, byte: int) -> None:
    weight = torch.zeros(1, 32)
    weight[0, 5] = -peak
    codes, exponents = fp4.mx_encode(weight)
    assert exponents.tolist() == [[byte]]
    assert codes[0, 5].item() == fp4.codes(torch.tensor([-peak / 2.0 ** (byte - 127)])).item()
    assert int(codes.count_nonzero()) == int(codes[0, 5] != 0)


def test_powers() -> None:
    found = fp4.powers(torch.tensor([0, 1, 127, 254], dtype=torch.uint8)).tolist()
    assert found == [2.0**-127, 2.0**-126, 1, 2.0**127]
    assert fp4.powers(torch.tensor([255], dtype=torch.uint8)).isnan().all()


def test_nv_scales() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([6.0, -3.0])
    shared = fp4.global_scale(torch.tensor(6.0))
    codes, scales = fp4.nv_encode(weight, shared)
    assert shared.item() == 448
    assert scales.float().tolist() == [[448, 0.125]]
    assert codes[0, :3].tolist() == [7, 13, 0]
    assert fp4.global_scale(torch.tensor(0.0)).item() == 1


# -- integers ----------------------------------------------------------------------------------------------------


def test_golden_symmetric_integers() -> None:
    weight = torch.tensor([[7.5, -7.5, 0.5, 1.5, -0.5, 2.0]])
    scales, zeros = packed_ints.integer_grid(*affine.extremes(weight, 6), 4, True, fp8.are_brain(weight))
    assert (scales.tolist(), zeros.tolist()) == ([[1]], [[0]])
    assert packed_ints.round_integers(weight, scales, zeros, 4).tolist() == [[7, -8, 0, 2, 0, 2]]


def test_golden_integers_with_a_zero_point() -> None:
    weight = torch.tensor([[-1.0, 6.5, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0], [3.75, 7.5, 7.5, 0.5]])
    scales, zeros = packed_ints.integer_grid(*affine.extremes(weight, 4), 4, False, fp8.are_brain(weight))
    assert scales.tolist() == [[0.5], [2.0**-7], [0.5]]
    assert zeros.tolist() == [[-6], [0], [-8]]
    codes = packed_ints.round_integers(weight, scales, zeros, 4)
    assert codes.tolist() == [[-8, 7, -6, 0], [0, 0, 0, 0], [0, 7, 7, -7]]


@settings(max_examples=40)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**31))
def test_the_search_never_loses(bits: int, symmetric: bool, seed: int) -> None:
    weight = normal(4, 32, seed)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(seed))
    scheme = PackedInt(bits, 32, symmetric)
    fitted = scheme.fit(weight, importance)
    assert bool((fitted.scale > 0).all())
    codes = ((weight - fitted.offset) / fitted.scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
    searched = scheme.assemble(codes, [fitted]).dequantize()
    plain = scheme.encode(weight).dequantize()
    found, before = (((value - weight).square() @ importance).sum() for value in (searched, plain))
    assert found <= before * 1.0001


@pytest.mark.parametrize("scheme", [NVFP4(0.5), MXFP4()], ids=str)
def test_levels_of_small_floats(scheme: NVFP4 | MXFP4) -> None:
    assert isinstance(scheme, Levelled)
    weight = normal(40, 64).clamp(-0.5, 0.5)
    weight[3] = 0
    parts = [scheme.fit(weight[:, start : start + scheme.block].contiguous()) for start in range(0, 64, scheme.block)]
    scale = torch.cat([part.scale for part in parts], 1).repeat_interleave(scheme.block, 1)
    points = parts[0].points
    codes = ((weight / scale)[..., None] - points).abs().argmin(-1).to(torch.uint8)
    coded = scheme.assemble(codes, parts)
    values = coded.dequantize()
    torch.testing.assert_close(values, points[codes.int()] * scale, rtol=1e-6, atol=0)
    assert (values - weight).square().sum() < (scheme.encode(weight).dequantize() - weight).square().sum()
    for key, value in scheme.encode(weight).arrays.items():
        assert (coded.arrays[key].dtype, coded.arrays[key].shape) == (value.dtype, value.shape)
    near = scheme.neighbours(parts[0])
    chosen = scheme.choose([parts[0], *near], torch.full_like(parts[0].scale, 1, dtype=torch.int64))
    assert torch.equal(chosen.scale, near[0].scale)


def test_a_block_does_not_tell_the_global_scale() -> None:
    with pytest.raises(ValueError, match="peak"):
        NVFP4().fit(normal(4, 16))


def test_neighbours_are_storable() -> None:
    for scheme in (PackedInt(4, 32), PackedInt(4, 32, symmetric=True)):
        fitted = scheme.fit(normal(3, 32))
        assert isinstance(scheme, Levelled)
        for near in scheme.neighbours(fitted):
            assert near.state["scales"].dtype == torch.bfloat16
            assert torch.equal(near.scale, near.state["scales"].float())


# -- schemes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_spellings_are_read_back(scheme: Scheme) -> None:
    assert parse_scheme(str(scheme)) == scheme
    assert sum(family.pattern != "" and parse_scheme(str(scheme)) == scheme for family in FAMILIES) == len(FAMILIES)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_rounding_is_stable_and_near(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = normal(130, 256, dtype=dtype)
    before = weight.clone()
    coded = scheme.encode(weight)
    values = coded.dequantize()
    assert torch.equal(weight, before)
    assert (values.dtype, values.shape) == (torch.float32, weight.shape)
    error = float((values - weight).square().sum() / weight.square().sum())
    assert error < ERRORS.get(str(scheme), 0.4)
    assert torch.equal(coded.rows(3, 129).dequantize(), values[3:129])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-30, 1e30])
def test_zeros_tiny_and_huge_weights(scheme: Scheme, value: float) -> None:
    weight = torch.zeros(128, 128)
    weight[3, 5] = value
    found = scheme.encode(weight).dequantize()
    assert found.isfinite().all()
    assert found[weight == 0].abs().max() <= value / 100
    if value in (0.0, 1e30):
        assert float(found[3, 5]) == pytest.approx(value, rel=0.34)


@settings(max_examples=40)
@given(st.sampled_from([s for s in SCHEMES if not str(s).startswith("fp8-tensor")]), st.integers(1, 300))
def test_runs_of_rows_are_coded_as_the_whole(scheme: Scheme, rows: int) -> None:
    weight = normal(rows, 128, rows)
    if isinstance(scheme, NVFP4):
        scheme = scheme.sharing(float(weight.abs().max()))
    whole = scheme.encode(weight).arrays
    parts = [scheme.encode(weight[start : start + 128]).arrays for start in range(0, rows, 128)]
    for key, value in whole.items():
        joined = torch.cat([part[key] for part in parts])
        assert torch.equal(joined.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("scheme", [FP8("tensor"), NVFP4()], ids=str)
def test_what_rows_share_can_be_told(scheme: FP8 | NVFP4) -> None:
    weight = normal(10, 64)
    told = scheme.sharing(float(weight.abs().max()))
    assert (told, str(told)) == (scheme, str(scheme))
    assert torch.equal(told.encode(weight[:3]).dequantize(), scheme.encode(weight).dequantize()[:3])
    assert scheme.shared
    assert not FP8("channel").shared


@pytest.mark.parametrize(
    ("scheme", "shape", "said"),
    [
        (FP8("block"), (128, 100), "width 100 is no multiple of the tile size 128"),
        (FP8(), (3, 4, 5), "3-dimensional"),
        (FP8(), (0, 5), "empty"),
        (NVFP4(), (4, 24), "width 24 is no multiple of the block size 16"),
        (MXFP4(), (4, 48), "width 48 is no multiple of the block size 32"),
        (PackedInt(4, 32), (4, 48), "width 48 is no multiple of the group size 32"),
        (Int8Channel(), (7,), "1-dimensional"),
    ],
)
def test_shapes_that_are_refused(scheme: Scheme, shape: tuple[int, ...], said: str) -> None:
    assert said in str(scheme.reject(shape))


@pytest.mark.parametrize("scheme", [FP8(), FP8("tensor"), Int8Channel(), PackedInt(3, -1)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 33), (3, 129)])
def test_odd_shapes(scheme: Scheme, shape: tuple[int, int]) -> None:
    assert scheme.reject(shape) is None
    weight = normal(*shape)
    assert float((scheme.encode(weight).dequantize() - weight).norm() / weight.norm()) < 0.3
