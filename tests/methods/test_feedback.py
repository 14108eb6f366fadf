"""Error feedback against the algorithm of the paper written plainly, and what it promises on any input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.kernels import levels
from quantize.kernels.levels import Levels
from quantize.methods.feedback import Factor, blocks_by_need, factorize, feed_back, joined, loss
from quantize.schemes import AffineInt, GGMLBlock, Levelled, QuantizedTensor, Scheme

ORDERS = ("blocks", "columns", "none")
DAMPING = 0.01
AFFINE = [
    AffineInt(bits, group, symmetric)
    for bits, group, symmetric in [
        (2, 16, False), (2, 32, True), (3, -1, True), (3, 64, False), (4, 32, True), (4, -1, False), (4, 128, False),
        (8, 64, True),
    ]
]  # fmt: skip
SUPER = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")
SMALL = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")


def inputs(seed: int, width: int, tokens: int = 0, rank: int = 0) -> Tensor:
    """Returns correlated inputs `[tokens, width]`, channels of unlike size; of a rank, where one is given."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 3 * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shared = normal(tokens, rank or width // 4) @ normal(rank or width // 4, width)
    return (shared if rank else shared + normal(tokens, width)) * (0.7 * normal(width)).exp()


def hessian_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def weight_of(seed: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    loud = 1 + 3 * (torch.rand(width, generator=generator) > 0.9)
    return 0.05 * torch.randn(rows, width, generator=generator) * loud


def order_of(kind: str, hessian: Tensor, scheme: Scheme) -> Tensor:
    if kind == "none":
        return torch.arange(len(hessian))
    return blocks_by_need(hessian.diagonal(), -1 if kind == "columns" else scheme.block)


def factor_of(hessian: Tensor, scheme: Scheme, order: str, damping: float = DAMPING) -> Factor:
    return factorize(hessian, order_of(order, hessian, scheme), damping)


def rounded(weight: Tensor, hessian: Tensor, scheme: Levelled, order: str = "blocks") -> QuantizedTensor:
    """Returns what plain feedback makes of the rows."""
    return fed_back(weight, factor_of(hessian, scheme, order), scheme, order)


def fed_back(weight: Tensor, factor: Factor, scheme: Levelled, order: str = "blocks") -> QuantizedTensor:
    made = feed_back(weight, factor, scheme, fit_first=order == "columns")
    return scheme.assemble(made.codes, made.levels)


def cost(coded: QuantizedTensor, weight: Tensor, hessian: Tensor) -> float:
    """Returns the sum over rows of e H e^T, in double precision."""
    error = coded.dequantize().double() - weight.double()
    return float((error @ hessian.double() * error).sum())


def grids_of(coded: QuantizedTensor) -> tuple[Tensor, Tensor, int]:
    """Returns scale and zero code of every weight of an affine tensor, double `[rows, cols]`, and the largest code."""
    assert isinstance(coded.scheme, AffineInt)
    group = coded.shape[1] // coded.arrays["scales"].shape[1]
    wide = [coded.arrays[key].double().repeat_interleave(group, 1) for key in ("scales", "zeros")]
    return wide[0], wide[1], 2**coded.scheme.bits - 1


def paper(
    weight: Tensor, hessian: Tensor, order: Tensor, damping: float, point: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """GPTQ as the paper has it: the Cholesky factor of the inverse, one column after the other, double precision.

    Args:
        weight: `[rows, K]`.
        hessian: `[K, K]`.
        order: The columns, in the order of their rounding.
        damping: Share of the mean diagonal added.
        point: Gives the value that a column becomes, by its number and its weights updated so far.

    Returns:
        The weights before their rounding, and after it; `[rows, K]` each, in the columns' own places.
    """
    h = hessian.double()[order][:, order]
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, before, after = weight.double()[:, order], torch.empty(weight.shape).double(), torch.empty(weight.shape).double()
    for i, column in enumerate(order.tolist()):
        value = point(column, w[:, i])
        before[:, column], after[:, column] = w[:, i], value
        error = (w[:, i] - value) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return before, after


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", AFFINE, ids=str)
def test_every_code_is_the_papers_on_the_same_grids(scheme: AffineInt, order: str) -> None:
    """The errors made are handed to the reference, so that a tie that falls the other way moves no later column."""
    width = 192 if scheme.group(192) in (16, 32, 64, 192) else 256
    weight, hessian = weight_of(1, 9, width), hessian_of(inputs(1, width))
    coded = rounded(weight, hessian, scheme, order)
    scale, zero, top = grids_of(coded)
    held = coded.dequantize().double()
    before, _ = paper(weight, hessian, order_of(order, hessian, scheme), DAMPING, lambda i, _: held[:, i])
    wanted = before / scale + zero
    nearest = wanted.round().clamp(0, top)
    codes = coded.arrays["codes"].double()
    tied = (wanted - wanted.floor() - 0.5).abs() < 1e-3
    assert bool(((codes == nearest) | (tied & ((codes - wanted).abs() < 0.502))).all())
    assert float((codes == nearest).double().mean()) > 0.99


@pytest.mark.parametrize("order", ORDERS)
def test_the_papers_own_run_ends_in_the_same_tensor(order: str) -> None:
    scheme = AffineInt(4, 32)
    weight, hessian = weight_of(2, 6, 96), hessian_of(inputs(2, 96))
    coded = rounded(weight, hessian, scheme, order)
    scale, zero, top = grids_of(coded)

    def point(column: int, now: Tensor) -> Tensor:
        s, z = scale[:, column], zero[:, column]
        return ((now / s + z).round().clamp(0, top) - z) * s

    _, after = paper(weight, hessian, order_of(order, hessian, scheme), DAMPING, point)
    torch.testing.assert_close(coded.dequantize().double(), after, rtol=1e-6, atol=1e-9)


# Group sizes and widths that go together: some are no multiple of 128, or of the run that is rounded at a time.
_SHAPES = [
    (16, 16),
    (16, 48),
    (16, 144),
    (32, 32),
    (32, 96),
    (32, 160),
    (64, 64),
    (64, 320),
    (-1, 8),
    (-1, 100),
    (-1, 200),
]


@given(
    seed=st.integers(0, 2**20),
    bits=st.sampled_from([2, 3, 4, 8]),
    shape=st.sampled_from(_SHAPES),
    symmetric=st.booleans(),
    order=st.sampled_from(ORDERS),
    size=st.sampled_from([1e-6, 1.0, 1e3]),
    rows=st.sampled_from([1, 3, 12]),
)
@settings(max_examples=60)
@example(seed=0, bits=2, shape=(32, 160), symmetric=True, order="columns", size=1.0, rows=12)
@example(seed=0, bits=8, shape=(-1, 200), symmetric=False, order="none", size=1e-6, rows=1)
def test_never_worse_than_rounding_to_nearest(
    seed: int, bits: int, shape: tuple[int, int], symmetric: bool, order: str, size: float, rows: int
) -> None:
    """Summed over rows; codes are in range and nothing but numbers comes out."""
    group, width = shape
    scheme = AffineInt(bits, group, symmetric)
    weight, hessian = weight_of(seed, rows, width) * size, hessian_of(inputs(seed, width))
    kept = weight.clone(), hessian.clone()
    coded = rounded(weight, hessian, scheme, order)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])
    assert coded.shape == (rows, width)
    assert coded.scheme == scheme
    codes, scales, zeros = (coded.arrays[key] for key in ("codes", "scales", "zeros"))
    assert (codes.dtype, scales.dtype, zeros.dtype) == (torch.uint8, torch.float16, torch.uint8)
    assert scales.shape == zeros.shape == (rows, width // scheme.group(width))
    assert int(codes.max()) < 2**bits
    assert bool(scales.isfinite().all())
    assert bool((scales != 0).all())
    if symmetric:
        assert bool((zeros == 2 ** (bits - 1)).all())
    assert cost(coded, weight, hessian) <= cost(scheme.encode(weight), weight, hessian) * (1 + 1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_much_better_than_nearest_on_correlated_inputs(bits: int, order: str) -> None:
    scheme = AffineInt(bits, 64)
    weight, hessian = weight_of(3, 32, 256), hessian_of(inputs(3, 256))
    nearest = cost(scheme.encode(weight), weight, hessian)
    assert cost(rounded(weight, hessian, scheme, order), weight, hessian) < 0.6 * nearest


# -- grids of GGUF -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "order"), [*((name, "blocks") for name in (*SUPER, *SMALL)), ("q3_k", "columns"), ("q5_0", "none")]
)
def test_blocks_of_gguf(name: str, order: str) -> None:
    """The blocks decode to the values whose errors were fed back, and lose less than the plain encoder's.

    Were they other values, most columns would be far from the nearest of their grid in the reference.
    """
    scheme = GGMLBlock(name)
    width = 512 if name in SUPER else 288
    weight, hessian = weight_of(4, 3, width), hessian_of(inputs(4, width))
    coded = rounded(weight, hessian, scheme, order)
    held = coded.dequantize().double()
    assert coded.arrays["blocks"].shape == (3, width // scheme.block * scheme.block_bytes)
    before, _ = paper(weight, hessian, order_of(order, hessian, scheme), DAMPING, lambda i, _: held[:, i])
    nearest, step = nearest_point(before, grids_in(coded))
    assert bool(((held - before).abs() <= nearest + 1e-3 * step + 1e-9).all())
    plain = scheme.encode(weight, hessian.diagonal().clone())
    assert cost(coded, weight, hessian) < 0.8 * cost(plain, weight, hessian)


def grids_in(coded: QuantizedTensor) -> Levels:
    assert isinstance(coded.scheme, GGMLBlock)
    return levels.split(coded.scheme.type, coded.arrays["blocks"])


def nearest_point(wanted: Tensor, grids: Levels) -> tuple[Tensor, Tensor]:
    """Returns how far the nearest point of each weight's grid is, and the size of its scale; `[rows, cols]`."""
    run = wanted.shape[1] // grids.scale.shape[1]
    scale, offset = (value.double().repeat_interleave(run, 1) for value in (grids.scale, grids.offset))
    points = scale[..., None] * grids.points.double() + offset[..., None]
    return (points - wanted[..., None]).abs().amin(-1), scale.abs()


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "iq4_nl"])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6])
def test_blocks_of_gguf_whatever_the_size_of_activations(name: str, size: float) -> None:
    scheme = GGMLBlock(name)
    x = inputs(5, 256)
    weight, hessian = weight_of(5, 3, 256), hessian_of(x * size)
    assert cost(rounded(weight, hessian, scheme), weight, hessian_of(x)) < 0.8 * cost(
        scheme.encode(weight), weight, hessian_of(x)
    )


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e3])
@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "q4_0"])
def test_zero_rows_and_weights_of_any_size_in_gguf(name: str, size: float) -> None:
    scheme = GGMLBlock(name)
    weight, hessian = weight_of(6, 3, 256) * size, hessian_of(inputs(6, 256))
    weight[0] = 0
    weight[1, :128] = 0
    coded = rounded(weight, hessian, scheme)
    held = coded.dequantize()
    assert bool(held.isfinite().all())
    assert not held[0].any()
    assert cost(coded, weight, hessian) <= cost(scheme.encode(weight), weight, hessian) * (1 + 1e-6)


# -- Hessians ----------------------------------------------------------------------------------------------------------


def test_a_factor_is_the_hessian_again() -> None:
    hessian = hessian_of(inputs(7, 80))
    for order in ORDERS:
        factor = factor_of(hessian, AffineInt(4, 16), order)
        assert factor.damping == DAMPING
        assert sorted(factor.order.tolist()) == list(range(80))
        unit = factor.feed.triu(1).double() + torch.eye(80, dtype=torch.float64)
        damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(80, dtype=torch.float64)
        again = unit * factor.cost.double() @ unit.T
        expected = damped[factor.order][:, factor.order]
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@given(
    seed=st.integers(0, 2**20),
    group=st.sampled_from([8, 16, 24, 48, -1]),
    ties=st.booleans(),
)
@settings(max_examples=30)
def test_blocks_of_columns_stay_whole(seed: int, group: int, ties: bool) -> None:
    need = torch.rand(48, generator=torch.Generator().manual_seed(seed))
    need = (need * 3).floor() if ties else need
    order = blocks_by_need(need, group)
    assert sorted(order.tolist()) == list(range(48))
    size = 48 if group == -1 else group
    blocks = order.reshape(-1, size)
    assert bool((blocks // size == blocks[:, :1] // size).all())
    assert bool((need[blocks].diff(dim=1) <= 0).all())
    assert bool((need[blocks[:, 0]].diff() <= 0).all())


@pytest.mark.parametrize("order", ORDERS)
def test_few_tokens_take_more_damping(order: str) -> None:
    """3 tokens over 64 columns and one that is dead: what is too little for a factor grows until it is enough."""
    x = inputs(8, 64, tokens=3, rank=2)
    x[:, 5] = 0
    weight, hessian, scheme = weight_of(8, 4, 64), hessian_of(x), AffineInt(4, 32)
    factor = factor_of(hessian, scheme, order, damping=1e-12)
    assert factor.damping is not None
    assert 1e-12 < factor.damping < 1e-6
    assert factor.feed.isfinite().all()
    assert (factor.cost > 0).all()
    coded = fed_back(weight, factor, scheme, order)
    assert bool(coded.dequantize().isfinite().all())
    # without a token in its column, a weight is simply rounded: it can make up for nothing
    scale, _, _ = grids_of(coded)
    assert bool(((coded.dequantize() - weight)[:, 5].abs() <= 0.5001 * scale[:, 5]).all())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_hessian_that_says_nothing_gives_no_feedback(value: float) -> None:
    weight, scheme = weight_of(9, 4, 64), AffineInt(4, 32)
    factor = factorize(torch.full((64, 64), value), torch.arange(64), DAMPING)
    assert factor.damping is None
    assert not factor.feed.any()
    coded = fed_back(weight, factor, scheme)
    error, nearest = (each.dequantize() - weight for each in (coded, scheme.encode(weight)))
    assert float(error.square().sum()) <= 1.0001 * float(nearest.square().sum())
    assert bool(coded.dequantize().isfinite().all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "scheme", [AffineInt(2, 16), AffineInt(4, 32, True), AffineInt(3, -1), AffineInt(8, 32)], ids=str
)
def test_dead_columns_and_zero_groups(scheme: AffineInt, order: str) -> None:
    """Half of the columns never see a token, whole groups of weights are zero or tiny."""
    x = inputs(10, 96)
    x[:, torch.rand(96, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    x[:, 32:64] = 0
    weight, hessian = weight_of(10, 6, 96), hessian_of(x)
    weight[0] = 0
    weight[1, :32] = 0
    weight[2:4, 32:64] = 1e-8
    coded = rounded(weight, hessian, scheme, order)
    held = coded.dequantize()
    assert bool(held.isfinite().all())
    assert not held[0].any()
    assert bool((coded.arrays["scales"] != 0).all())
    assert cost(coded, weight, hessian) <= cost(scheme.encode(weight), weight, hessian) * (1 + 1e-6)


def test_rows_do_not_know_each_other() -> None:
    scheme = AffineInt(3, 32)
    weight, hessian = weight_of(11, 7, 96), hessian_of(inputs(11, 96))
    factor = factor_of(hessian, scheme, "blocks")
    parts = [fed_back(weight[start : start + 3], factor, scheme) for start in (0, 3, 6)]
    whole = joined(parts, 7)
    assert whole.shape == (7, 96)
    torch.testing.assert_close(whole.dequantize(), fed_back(weight, factor, scheme).dequantize())


def test_loss_is_that_of_each_row() -> None:
    errors, hessian = weight_of(12, 5, 40), hessian_of(inputs(12, 40))
    expected = torch.stack([row @ hessian @ row for row in errors])
    torch.testing.assert_close(loss(errors, hessian), expected)
