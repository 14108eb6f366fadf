"""GPTQ and AWQ+GPTQ on blocks made up at random: what they promise, what they say, what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.errors import UsageError
from quantize.methods import named
from quantize.methods.awq_gptq import AWQGPTQ
from quantize.methods.base import Block, Method, Result
from quantize.methods.feedback import loss
from quantize.methods.gptq import GPTQ
from quantize.methods.rtn import RTN
from quantize.parallel import Pool
from quantize.schemes import AffineInt, GGMLBlock, Scheme, parse_scheme
from quantize.statistics import Statistics
from quantize.structure import Fold, Input

WIDTH, INNER = 64, 96
G32 = AffineInt(4, 32)


def seen(seed: int, tokens: int, width: int, size: float = 1.0) -> Statistics:
    """Returns the statistics of correlated inputs, channels of unlike size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(tokens, width // 4) @ normal(width // 4, width) + normal(tokens, width)
    return Statistics.of(size * x * (0.7 * normal(width)).exp())


def block_of(
    seed: int = 0,
    scheme: Scheme = G32,
    *,
    tokens: int = 400,
    counts: dict[str, int] | None = None,
    unseen: tuple[str, ...] = (),
    width: int = WIDTH,
    inner: int = INNER,
) -> Block:
    """Returns a block: a norm feeds gate and up and those of two experts; each up feeds its down.

    Args:
        seed: Of all numbers.
        scheme: Of all matrices.
        tokens: Tokens that the statistics saw, where `counts` does not say so by the input's name.
        counts: Tokens of single inputs.
        unseen: Inputs without statistics.
        width: Of the norm.
        inner: Rows of gate and up.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {"norm": 1 + 0.2 * torch.randn(width, generator=generator)}
    inputs: list[Input] = []
    norm = Fold("norm", None, False, 0, width, 1)
    for expert in ("", "0.", "1."):
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            loud = 1 + 3 * (torch.rand(shape[1], generator=generator) > 0.9)
            weights[expert + name] = 0.08 * torch.randn(shape, generator=generator) * loud
        inputs.append(Input(f"{expert}gate", (f"{expert}gate", f"{expert}up"), width, norm))
        inputs.append(Input(f"{expert}down", (f"{expert}down",), inner, Fold(f"{expert}up", None, False, 0, inner, 1)))
    statistics = {
        item.name: seen(seed + index, (counts or {}).get(item.name, tokens), item.width)
        for index, item in enumerate(inputs)
        if item.name not in unseen
    }
    schemes = {name: scheme for name, value in weights.items() if value.dim() > 1}
    return Block("block", weights, dict.fromkeys(weights, torch.float32), schemes, inputs, statistics)


def quantized(block: Block, method: Method | None = None, threads: int = 1) -> Result:
    with Pool(threads) as pool:
        return (method or GPTQ()).quantize(block, pool)


def losses(block: Block, result: Result) -> dict[str, float]:
    """Returns the mean squared error of each output: e H e^T summed over rows, in double precision."""
    found: dict[str, float] = {}
    for item in (item for item in block.inputs if item.name in block.statistics):
        hessian = block.statistics[item.name].hessian.double()
        for name in (name for name in item.consumers if name in block.schemes):
            error = result.coded[name].dequantize().double() - block.weights[name].double()
            found[name] = float((error @ hessian * error).sum())
    return found


def same(one: Result, other: Result) -> bool:
    return one.coded.keys() == other.coded.keys() and all(
        torch.equal(array, other.coded[name].arrays[key])
        for name, coded in one.coded.items()
        for key, array in coded.arrays.items()
    )


@given(
    seed=st.integers(0, 2**20),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([16, 32, -1]),
    symmetric=st.booleans(),
    order=st.sampled_from(["blocks", "columns", "none"]),
    tokens=st.sampled_from([100, 400]),
)
@settings(max_examples=10)
def test_never_worse_than_nearest(seed: int, bits: int, group: int, symmetric: bool, order: str, tokens: int) -> None:
    scheme = AffineInt(bits, group, symmetric)
    block = replace(block_of(seed, tokens=tokens), schemes=dict.fromkeys(("gate", "up", "down"), scheme))
    result = quantized(block, named("gptq", {"act_order": order}))
    assert result.notes == ()
    assert result.changed == result.targets == {}
    assert result.coded.keys() == block.schemes.keys()
    nearest = losses(block, quantized(block, RTN()))
    for name, lost in losses(block, result).items():
        assert lost <= nearest[name] * (1 + 1e-6), name


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "q4_0", "q8_0", "iq4_nl"])
def test_better_than_the_encoder_of_gguf(name: str) -> None:
    block = block_of(1, GGMLBlock(name), tokens=900, width=256, inner=256)
    block = replace(block, schemes={"up": GGMLBlock(name)})
    result = quantized(block)
    plain = GGMLBlock(name).encode(block.weights["up"], block.statistics["gate"].mean_square.clone())
    assert losses(block, result)["up"] < 0.75 * losses(block, Result({"up": plain}))["up"]


def test_nothing_is_changed_and_threads_do_not_matter() -> None:
    block = block_of(2)
    before = {name: value.clone() for name, value in block.weights.items()}
    hessians = {name: each.hessian.clone() for name, each in block.statistics.items()}
    first = quantized(block, threads=1)
    assert all(torch.equal(value, before[name]) for name, value in block.weights.items())
    assert all(torch.equal(each.hessian, hessians[name]) for name, each in block.statistics.items())
    assert same(first, quantized(block, threads=3))


def test_consumers_of_one_input_on_grids_of_unlike_blocks() -> None:
    """Groups of 16, 48 and a row; blocks of 32 and of 256: each has an order of columns that keeps its own whole."""
    kinds: list[tuple[Scheme, Scheme]] = [
        (AffineInt(4, 16), AffineInt(3, -1)),
        (GGMLBlock("q4_k"), GGMLBlock("q5_0")),
        (GGMLBlock("q5_0"), AffineInt(2, 128)),
    ]
    for one, two in kinds:
        block = block_of(3, tokens=2100, width=512, inner=8)
        mixed = replace(block, schemes={"gate": one, "up": two})
        both = quantized(mixed)
        assert both.notes == ()
        for name, scheme in (("gate", one), ("up", two)):
            alone = quantized(replace(block, schemes={name: scheme}))
            assert torch.equal(both.coded[name].dequantize(), alone.coded[name].dequantize())
            nearest = losses(mixed, quantized(mixed, RTN()))
            assert losses(mixed, both)[name] < nearest[name]


# -- little text -------------------------------------------------------------------------------------------------------


def test_experts_with_few_tokens_or_none() -> None:
    """An expert that never gets a token, and one that gets fewer than it has columns, are rounded to nearest and named.

    Nothing of it touches the others.
    """
    counts = {"0.gate": WIDTH - 1, "0.down": INNER - 1}
    block = block_of(4, counts=counts, unseen=("1.gate", "1.down"))
    result, whole = quantized(block), quantized(block_of(4))
    assert result.notes == (
        "block: saw fewer tokens than columns, rounded to nearest: 0.gate and 2 more",
        "block: saw no calibration token, rounded to nearest: 1.gate and 2 more",
    )
    nearest = quantized(block, RTN())
    for name, coded in result.coded.items():
        expected = (whole if name in ("gate", "up", "down") else nearest).coded[name]
        assert torch.equal(coded.dequantize(), expected.dequantize()), name
    one = quantized(block_of(4, unseen=("1.down",)))
    assert one.notes == ("block: saw no calibration token, rounded to nearest: 1.down",)


def test_as_many_tokens_as_columns_are_enough() -> None:
    assert quantized(block_of(5, tokens=INNER)).notes == ()
    assert len(quantized(block_of(5, tokens=INNER - 1)).notes) == 1


def test_shrinkage_grows_with_little_text() -> None:
    """The fewer tokens, the nearer the result is to the one by importance alone; with enough, the option decides."""
    scheme = AffineInt(3, 32)
    hessian = seen(6, 4000, WIDTH)

    def made(count: int, **options: Any) -> Tensor:
        block = replace(block_of(6, scheme), statistics={"gate": replace(hessian, count=count)}, schemes={"up": scheme})
        return quantized(block, named("gptq", options)).coded["up"].dequantize()

    alone = made(4000, shrinkage=1.0)
    away = [float((made(count) != alone).float().mean()) for count in (WIDTH, 2 * WIDTH, 4 * WIDTH, 4000)]
    assert away[0] < away[1] < away[2]
    assert torch.equal(made(4 * WIDTH), made(4000))
    assert not torch.equal(made(4000), made(4000, shrinkage=0.3))
    assert torch.equal(made(WIDTH, shrinkage=1.0), alone)


# -- what calibration may break ----------------------------------------------------------------------------------------


def test_a_hessian_of_low_rank_takes_more_damping_and_says_so() -> None:
    """Tokens that repeat one another, and a dead column: with little damping the factor fails at first."""
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(8)).repeat(100, 1)
    x[:, 9] = 0
    statistics = Statistics.of(x)
    block = replace(block_of(8), statistics={"gate": statistics}, schemes={"up": G32, "gate": G32})
    result = quantized(block, GPTQ(damping=1e-9, shrinkage=0.0))
    assert len(result.notes) == 1
    assert result.notes[0].startswith("gate: its Hessian took damping ")
    assert 1e-9 < float(result.notes[0].split()[-1]) < 1e-3
    assert losses(block, result)["up"] < losses(block, quantized(block, RTN()))["up"]
    assert quantized(block, GPTQ(damping=0.01, shrinkage=0.0)).notes == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_hessian_without_meaning_is_named_and_rounded_without_feedback(value: float) -> None:
    """One token that holds a NaN spoils the Hessian, not the file."""
    for name in ("gptq", "awq+gptq"):
        block = block_of(9)
        broken = {
            key: replace(each, hessian=torch.full_like(each.hessian, value)) for key, each in block.statistics.items()
        }
        result = quantized(replace(block, statistics=broken), named(name))
        assert result.notes[0] == "gate: its Hessian cannot be factorized, rounded without feedback"
        assert len(result.notes) == len(block.inputs)
        nearest = quantized(block, RTN())
        for matrix, weight in block.weights.items():
            if matrix in block.schemes:
                held = result.coded[matrix].dequantize()
                assert bool(held.isfinite().all())
                plain = nearest.coded[matrix].dequantize()
                assert (held - weight).square().sum() <= 1.0001 * (plain - weight).square().sum()


def test_one_column_that_drowns_all_others() -> None:
    """A column of 3e4 among ones: the factor of a half-precision product fails there."""
    x = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(10))
    x[:, 3] *= 3e4
    block = replace(block_of(10), statistics={"gate": Statistics.of(x)}, schemes={"up": G32})
    result = quantized(block)
    assert result.notes == ()
    assert losses(block, result)["up"] <= losses(block, quantized(block, RTN()))["up"]


@pytest.mark.parametrize(
    "scheme", [AffineInt(2, 32), AffineInt(4, -1, True), GGMLBlock("q4_0"), GGMLBlock("q5_1")], ids=str
)
def test_zero_and_tiny_groups_and_dead_columns(scheme: Scheme) -> None:
    """Half of the groups zero or 1e-8, half of the columns without activation: all numbers, zeros stay zeros."""
    block = block_of(11, scheme)
    x = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(11))
    x[:, ::2] = 0
    weight = block.weights["up"].clone()
    weight[: INNER // 2, :32] = 0
    weight[INNER // 2 :, :32] = 1e-8
    weight[0] = 0
    block = replace(
        block, weights=block.weights | {"up": weight}, statistics={"gate": Statistics.of(x)}, schemes={"up": scheme}
    )
    result = quantized(block)
    held = result.coded["up"].dequantize()
    assert bool(held.isfinite().all())
    assert not held[0].any()
    assert losses(block, result)["up"] <= losses(block, quantized(block, RTN()))["up"] * (1 + 1e-6)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iq1_s", "iq2_xxs", "iq2_s", "iq3_xxs", "iq3_s", "bf16", "f32"])
def test_grids_without_levels_are_refused(name: str) -> None:
    for method in (GPTQ(), AWQGPTQ()):
        assert method.reject(parse_scheme(name))
    assert "several together" in str(GPTQ().reject(parse_scheme("iq2_xxs")))


def test_grids_with_levels_are_accepted() -> None:
    for name in ("int2-g16", "int3-g128-sym", "int8-row", "q2_k", "q6_k", "iq4_xs", "q8_0", "q4_0", "mxfp4"):
        assert GPTQ().reject(parse_scheme(name)) is None
    assert AWQGPTQ().reject(parse_scheme("int4-g128")) is None


def test_options_by_name() -> None:
    made = named("gptq", {"damping": 0.05, "shrinkage": 0.0, "act_order": "columns"})
    assert made == GPTQ(damping=0.05, shrinkage=0.0, act_order="columns")
    assert isinstance(named("awq+gptq", {"damping": 0.05}), AWQGPTQ)
    assert named("gptq") == named("gptq", {})


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("rtn", {"damping": 0.1}, "--damping has no meaning for method rtn"),
        ("awq", {"act_order": "none"}, "--act-order has no meaning for method awq"),
        ("gptq", {"damping": 0.0}, "--damping 0.0 is no share above 0"),
        ("gptq", {"damping": -1.0}, "--damping -1.0 is no share above 0"),
        ("gptq", {"shrinkage": 1.5}, "--shrinkage 1.5 is no share of 0 to 1"),
        ("awq+gptq", {"act_order": "desc"}, "unknown act-order 'desc'"),
        ("gptqq", {}, "unknown method 'gptqq'"),
    ],
)
def test_options_that_make_no_sense(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        named(method, options)
    assert said in str(raised.value)
    assert raised.value.hint
    if "no meaning" in said:
        assert "gptq" in raised.value.hint


# -- awq, then gptq ----------------------------------------------------------------------------------------------------


def prepared(block: Block) -> tuple[Block, dict[str, Tensor]]:
    """Returns the block as `prepare` leaves it, and what it changed."""
    with Pool(1) as pool:
        made = AWQGPTQ().prepare(block, pool)
    assert made is not None
    assert made.notes == ()
    weights = {**block.weights, **made.changed}
    return replace(block, weights=weights, statistics=made.statistics), dict(made.changed)


def test_a_folded_block_is_the_same_function() -> None:
    block = block_of(12)
    after, changed = prepared(block)
    assert "norm" in changed
    assert not torch.equal(changed["up"], block.weights["up"])
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)).double()

    def run(weights: Any, expert: str) -> tuple[Tensor, Tensor]:
        hidden = x * weights["norm"].double()
        gate, up = (hidden @ weights[expert + name].double().T for name in ("gate", "up"))
        inner = torch.nn.functional.silu(gate) * up
        return inner, inner @ weights[f"{expert}down"].double().T

    for expert in ("", "0.", "1."):
        (_, before), (_, now) = run(block.weights, expert), run(after.weights, expert)
        torch.testing.assert_close(now, before, rtol=1e-5, atol=1e-5 * float(before.std()))


def test_statistics_after_the_fold_are_those_of_the_scaled_inputs() -> None:
    """Output and error of every matrix mean the same with scaled weights on the mapped statistics."""
    block = block_of(13)
    after, _ = prepared(block)
    for item in block.inputs:
        was, now = block.statistics[item.name], after.statistics[item.name]
        assert now.count == was.count
        # rows of gate and of down feed nothing that is folded: their columns grew by what the input shrank
        before, scaled = (each.weights[item.consumers[0]] for each in (block, after))
        at = before.abs().argmax(0, keepdim=True)
        scale = (scaled.gather(0, at) / before.gather(0, at)).squeeze(0)
        assert float(scale.max() / scale.min()) > 1.1
        for key, expected in (
            ("hessian", was.hessian / torch.outer(scale, scale)),
            ("mean_abs", was.mean_abs / scale),
            ("max_abs", was.max_abs / scale),
        ):
            torch.testing.assert_close(getattr(now, key), expected, rtol=1e-3, atol=1e-6)


def test_both_together_on_the_scaled_block() -> None:
    block, _ = prepared(block_of(14, AffineInt(3, 32)))
    result = quantized(block, AWQGPTQ())
    assert same(result, quantized(block, GPTQ()))
    nearest = losses(block, quantized(block, RTN()))
    assert all(lost < 0.8 * nearest[name] for name, lost in losses(block, result).items())


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**16), bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans())
def test_a_scale_that_feedback_would_not_gain_by_is_dropped(seed: int, bits: int, symmetric: bool) -> None:
    """The sample is all rows here, so no input's loss under the Hessian as it is used is larger than without scales."""
    block, method = block_of(seed, AffineInt(bits, 32, symmetric)), AWQGPTQ()
    after, _ = prepared(block)

    def lost(some: Block, name: str) -> float:
        error = quantized(some, method).coded[name].dequantize() - some.weights[name]
        return float(loss(error, method.curvature(some.statistics[name], some.schemes[name]).hessian).double().sum())

    for name in ("down", "0.down", "1.down"):  # the rows of the others are divided by the scales of these
        kept = not torch.equal(after.weights[name], block.weights[name])
        assert lost(after, name) <= lost(block, name) * (0.951 if kept else 1.0)


def test_scales_that_cost_are_dropped_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(3)
    generator = torch.Generator().manual_seed(0)
    wild = {item.name: (2 * torch.randn(item.width, generator=generator)).exp() for item in block.inputs}
    monkeypatch.setattr("quantize.methods.awq_gptq.search_scales", lambda *_: (wild, []))
    after, changed = prepared(block)
    assert changed == {}
    assert all(after.statistics[name] is seen for name, seen in block.statistics.items())
