"""Statistics of inputs and how they add up."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.statistics import Accumulator, Statistics, gram


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def direct(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.double()
    return x.abs().mean(0), x.abs().amax(0), x.T @ x / len(x)


def assert_equal(a: Statistics, b: Statistics) -> None:
    assert a.count == b.count
    for key in ("mean_abs", "max_abs", "hessian"):
        assert torch.equal(getattr(a, key), getattr(b, key)), key


@pytest.mark.parametrize("width", [1, 7, 64, 65, 257, 300])
def test_gram_is_the_product(width: int) -> None:
    x = rows(50, width)
    torch.testing.assert_close(gram(x), (x.double().T @ x.double()).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gram(x), gram(x).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,), (1, 1, 8)])
def test_figures_of_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = Statistics.of(x)
    mean_abs, max_abs, hessian = direct(x.reshape(-1, 8))
    assert found.count == x.numel() // 8
    for value, wanted in ((found.mean_abs, mean_abs), (found.max_abs, max_abs), (found.hessian, hessian)):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.mean_square, found.hessian.diagonal())


def test_half_precision_inputs_are_computed_in_float32() -> None:
    x = (rows(200, 4) * 300).half()
    assert float(Statistics.of(x).hessian.max()) > 65504


@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_parts_merge_to_the_whole(counts: list[int], width: int, seed: int) -> None:
    x = rows(sum(counts), width, seed)
    total = Statistics.empty(width)
    for part in torch.split(x, counts):
        total = total.merge(Statistics.of(part))
    assert total.count == len(x)
    if len(x):
        for value, wanted in zip((total.mean_abs, total.max_abs, total.hessian), direct(x), strict=True):
            torch.testing.assert_close(value, wanted.float(), rtol=1e-4, atol=1e-5)


def test_no_tokens_are_neutral() -> None:
    some = Statistics.of(rows(3, 4))
    empty = Statistics.of(torch.zeros(0, 4))
    assert empty.count == 0
    assert_equal(Statistics.empty(4).merge(Statistics.of(rows(3, 4))), some)
    assert_equal(Statistics.of(rows(3, 4)).merge(empty), some)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_batches_add_up_in_their_order_whatever_order_they_come_in(order: tuple[int, ...]) -> None:
    parts = {batch: [rows(4, 3, 10 * batch + part) for part in range(2)] for batch in range(3)}
    straight = Statistics.empty(3)
    for batch in range(3):
        for x in parts[batch]:
            straight = straight.merge(Statistics.of(x))
    found = Accumulator()
    for part, batch in itertools.product(range(2), order):  # interleaved
        found.add(batch, Statistics.of(parts[batch][part]))
    for batch in order:
        found.finish(batch)
    assert found.total is not None
    assert_equal(found.total, straight)


def test_batches_may_add_nothing() -> None:
    found = Accumulator()
    found.finish(1)
    found.add(2, Statistics.of(rows(2, 3)))
    assert found.total is None
    found.finish(0)
    assert found.total is not None
    assert found.total.count == 2
