"""Coordinate descent: the loss falls, the gradient stays true, and the compiled loop does what torch does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.methods import descent
from quantize.methods.descent import Rounded, descend
from quantize.methods.feedback import factorize, feed_back, loss
from quantize.schemes import Levelled, parse_scheme

SCHEMES = ("int4-g32-sym", "int3-g64", "int2-row", "q2_k", "q3_k", "q4_k", "q6_k", "q4_0", "q5_1", "iq4_xs", "iq4_nl")
WIDTH = 256


def problem(seed: int, rows: int = 9, zero: bool = False) -> tuple[Tensor, Tensor]:
    """Returns weights and a positive definite Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    x = torch.randn(600, WIDTH, generator=generator) @ mixing
    hessian = x.T @ x / 600
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    weight = 0.05 * torch.randn(rows, WIDTH, generator=generator)
    if zero:
        weight[0] = 0
        weight[1, :64] = 0
    return weight, hessian


def rounded(weight: Tensor, hessian: Tensor, scheme: Levelled) -> Rounded:
    return feed_back(weight, factorize(hessian, torch.arange(WIDTH), 0.01), scheme)


def lost(weight: Tensor, hessian: Tensor, scheme: Levelled, state: Rounded) -> Tensor:
    """Returns the loss of each row of what is written, not of what the solver believes."""
    return loss(scheme.assemble(state.codes, state.levels).dequantize() - weight, hessian)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_row_gets_worse_and_most_get_better(name: str) -> None:
    weight, hessian = problem(1, zero=True)
    scheme = parse_scheme(name)
    assert isinstance(scheme, Levelled)
    state = rounded(weight, hessian, scheme)
    before = lost(weight, hessian, scheme, state)
    for rounds in (1, 3):
        after = lost(weight, hessian, scheme, descend(weight, hessian, scheme, copied(state), rounds))
        assert bool((after <= before * (1 + 1e-4) + 1e-12).all())
        assert float(after.sum()) < 0.99 * float(before.sum())


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    name=st.sampled_from(["int4-g32-sym", "int3-g64", "q2_k", "q3_k", "q4_k", "q6_k", "q5_0"]),
    rows=st.sampled_from([1, 5, 32, 45]),
    zero=st.booleans(),
)
def test_the_compiled_loop_does_what_torch_does(seed: int, name: str, rows: int, zero: bool) -> None:
    """Codes may differ where two are equally good: the loss is what counts."""
    weight, hessian = problem(seed, rows, zero and rows > 1)
    scheme = parse_scheme(name)
    assert isinstance(scheme, Levelled)
    state = rounded(weight, hessian, scheme)
    fast = lost(weight, hessian, scheme, descend(weight, hessian, scheme, copied(state), 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "_compiled", lambda *_: False)
        slow = lost(weight, hessian, scheme, descend(weight, hessian, scheme, copied(state), 2))
    assert float(fast.sum()) == pytest.approx(float(slow.sum()), rel=0.01)


@pytest.mark.parametrize("name", ["int4-g32-sym", "q4_k", "iq4_xs"])
def test_the_gradient_stays_true(name: str) -> None:
    weight, hessian = problem(3)
    scheme = parse_scheme(name)
    assert isinstance(scheme, Levelled)
    state = descent._State(weight, hessian, scheme, rounded(weight, hessian, scheme))
    state.mend_codes()
    state.mend_grids()
    assert torch.allclose(state.gradient, hessian @ (state.values - weight.T), atol=1e-5)
    written = scheme.assemble(state.codes.T.contiguous(), state.levels).dequantize()
    assert torch.allclose(written.T, state.values, atol=1e-6)


def copied(state: Rounded) -> Rounded:
    return Rounded(state.codes.clone(), list(state.levels))
