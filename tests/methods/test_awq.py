"""AWQ on blocks made up at random: never worse than rounding to nearest on its own measure, whatever the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.methods.awq import AWQ
from quantize.methods.base import Block, Result
from quantize.methods.rtn import RTN
from quantize.parallel import Pool
from quantize.schemes import AffineInt
from quantize.statistics import Statistics
from quantize.structure import Fold, Input, grouped

WIDTH, INNER, GROUP = 64, 96, 32


def block_of(
    seed: int,
    *,
    bits: int = 4,
    symmetric: bool = False,
    tokens: int = 40,
    weight: float = 0.1,
    activation: float = 1.0,
    spread: float = 1.0,
    dead: float = 0.0,
    zero_groups: bool = False,
    offset: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    unseen: tuple[str, ...] = (),
) -> Block:
    """Returns a block: a norm feeds a router, gate and up and two experts; each up feeds its down.

    Args:
        seed: Of all numbers.
        bits: Of the grid.
        symmetric: Of the grid.
        tokens: Tokens that the statistics saw.
        weight: Size of weights.
        activation: Size of activations.
        spread: How far channels differ, as the deviation of their logarithms.
        dead: Share of channels without any activation and of columns without any weight.
        zero_groups: Whether some groups of weights are zero or tiny.
        offset: Whether the norm multiplies by one more than its gain.
        dtype: Of stored tensors that stay unquantized.
        unseen: Inputs without statistics.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def matrix(rows: int, columns: int) -> Tensor:
        value = weight * normal(rows, columns)
        value[:, torch.rand(columns, generator=generator) < dead] = 0
        if zero_groups:
            value[: rows // 2, :GROUP] = 0
            value[rows // 2 :, GROUP : 2 * GROUP] *= 1e-8
        return value.to(dtype).float()

    def seen(columns: int, count: int) -> Statistics:
        x = activation * normal(count, columns) * (spread * normal(columns)).exp()
        x[:, torch.rand(columns, generator=generator) < dead] = 0
        return Statistics.of(x)

    weights = {"norm": (1 + 0.2 * normal(WIDTH) - float(offset)).to(dtype).float(), "router": matrix(4, WIDTH)}
    for name in ("", "0.", "1."):
        weights |= {f"{name}gate": matrix(INNER, WIDTH), f"{name}up": matrix(INNER, WIDTH)}
        weights |= {f"{name}down": matrix(WIDTH, INNER)}
    norm = Fold("norm", None, offset, 0, WIDTH, 1)
    inputs = [Input("router", ("router", "gate", "up"), WIDTH, norm)]
    inputs += [Input(f"{e}.gate", (f"{e}.gate", f"{e}.up"), WIDTH, norm) for e in (0, 1)]
    inputs += [
        Input(f"{n}down", (f"{n}down",), INNER, Fold(f"{n}up", None, False, 0, INNER, 1)) for n in ("", "0.", "1.")
    ]
    counts = {"router": tokens, "0.gate": -(-tokens // 2), "1.gate": 1, "0.down": -(-tokens // 2), "1.down": 1}
    statistics = {
        item.name: seen(item.width, counts.get(item.name, tokens)) for item in inputs if item.name not in unseen
    }
    scheme = AffineInt(bits, GROUP, symmetric)
    schemes = {name: scheme for name, value in weights.items() if value.dim() == 2 and name != "router"}
    return Block("block", weights, dict.fromkeys(weights, dtype), schemes, inputs, statistics)


def quantized(block: Block, threads: int = 1) -> Result:
    with Pool(threads) as pool:
        return AWQ().quantize(block, pool)


def effective(block: Block, result: Result) -> dict[str, Tensor]:
    """Returns the matrices as they act on the block's own activations: what was folded is taken back out."""
    values = {name: coded.dequantize().double() for name, coded in result.coded.items()}
    scaled = {name: value.double() for name, value in block.weights.items()}  # by what is known so far
    for item in block.inputs:
        fold = item.fold
        assert fold is not None
        name = fold.producer
        if name == "norm":
            shift = 1.0 if fold.offset else 0.0
            stored = result.changed.get(name, block.weights[name]).to(block.dtypes[name]).double()
            was, now = block.weights[name].double() + shift, stored + shift
            ratio = torch.where(was != 0, now / was, 1.0)
        else:
            was, now = scaled[name], result.targets.get(name, block.weights[name]).double()
            at = was.abs().argmax(-1, keepdim=True)
            ratio = torch.where(was.gather(-1, at) != 0, now.gather(-1, at) / was.gather(-1, at), 1.0).squeeze(-1)
            values[name] = values[name] / ratio.unsqueeze(-1)
        for consumer in item.consumers:
            scaled[consumer] = scaled[consumer] / ratio
            if consumer in values:
                values[consumer] = values[consumer] * ratio
    return values


def loss(block: Block, group: tuple[Input, ...], values: dict[str, Tensor]) -> float:
    """Returns tr((Q - W) H (Q - W)^T) over all matrices that share a fold, each weighted by its tokens."""
    total = 0.0
    for item in group:
        statistics = block.statistics.get(item.name)
        for name in item.consumers if statistics else ():
            if name in values:
                assert statistics is not None
                error = values[name].double() - block.weights[name].double()
                total += statistics.count * float(((error @ statistics.hessian.double()) * error).sum())
    return total


def assert_never_worse(block: Block) -> None:
    result = quantized(block)
    assert result.coded.keys() == block.schemes.keys()
    with Pool(1) as pool:
        nearest = {name: coded.dequantize() for name, coded in RTN().quantize(block, pool).coded.items()}
    values = effective(block, result)
    assert all(bool(value.isfinite().all()) for value in (*values.values(), *result.changed.values()))
    for group in grouped(block.inputs):
        assert loss(block, group, values) <= loss(block, group, nearest) * (1 + 1e-4) + 1e-30


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    bits=st.sampled_from([3, 4, 8]),
    symmetric=st.booleans(),
    tokens=st.sampled_from([1, 2, 40]),
    weight=st.sampled_from([1e-6, 0.1, 1e3]),
    activation=st.sampled_from([1e-5, 1.0, 1e4]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    dead=st.sampled_from([0.0, 0.3, 1.0]),
    zero_groups=st.booleans(),
    offset=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    unseen=st.sampled_from([(), ("1.gate", "1.down"), ("router",), ("down", "0.down", "1.down")]),
)
def test_never_worse_than_rounding_to_nearest(seed: int, **options: object) -> None:
    assert_never_worse(block_of(seed, **options))  # type: ignore[arg-type]


def test_gains_where_channels_differ() -> None:
    block = block_of(0, spread=1.5, dtype=torch.float32)
    values = effective(block, quantized(block))
    with Pool(1) as pool:
        nearest = {name: coded.dequantize() for name, coded in RTN().quantize(block, pool).coded.items()}
    for group in grouped(block.inputs):
        assert loss(block, group, values) < 0.8 * loss(block, group, nearest)


def test_one_scale_serves_all_inputs_of_a_fold() -> None:
    block = block_of(1, spread=1.5, dtype=torch.float32, unseen=("1.gate", "1.down"))
    result = quantized(block)
    factor = block.weights["norm"] / result.changed["norm"]
    assert not torch.allclose(factor, torch.ones(WIDTH))
    torch.testing.assert_close(result.changed["router"], block.weights["router"] * factor)
    gate = result.targets["0.gate"]
    torch.testing.assert_close(gate, block.weights["0.gate"] * factor)
    # the expert without tokens is scaled as its siblings are, and said to be rounded to nearest
    torch.testing.assert_close(result.targets["1.gate"], block.weights["1.gate"] * factor)
    assert [note.split(":")[0] for note in result.notes] == ["1.down", "1.gate", "1.up"]


def test_nothing_is_changed_in_the_block_and_threads_do_not_matter() -> None:
    block = block_of(2, spread=1.0)
    before = {name: value.clone() for name, value in block.weights.items()}
    first, second = quantized(block, 1), quantized(block, 3)
    for name, value in block.weights.items():
        assert torch.equal(value, before[name])
    for name, coded in first.coded.items():
        for key, array in coded.arrays.items():
            assert torch.equal(array, second.coded[name].arrays[key])
    assert first.changed.keys() == second.changed.keys()
    assert all(torch.equal(value, second.changed[name]) for name, value in first.changed.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_without_finite_errors_leave_the_scale_at_one(value: float) -> None:
    block = block_of(3)
    broken = {name: replace(s, hessian=torch.full_like(s.hessian, value)) for name, s in block.statistics.items()}
    result = quantized(replace(block, statistics=broken))
    assert result.coded.keys() == block.schemes.keys()
    assert result.changed == {}
    assert any("no finite error for router, kept unscaled" in note for note in result.notes)
