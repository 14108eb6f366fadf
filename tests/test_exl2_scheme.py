"""The EXL2 scheme: spelling, groups, exact bits, what it refuses, and the order of columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.errors import UsageError
from quantize.exl2_scheme import EXL2, Part, by_need
from quantize.kernels import exl2
from quantize.schemes import Scheme, parse_scheme

WIDTHS = st.lists(st.sampled_from(exl2.WIDTHS), min_size=1, max_size=4).map(lambda bits: sorted(bits, reverse=True))


@st.composite
def mixes(draw: st.DrawFn) -> EXL2:
    bits = draw(WIDTHS)
    cuts = sorted(draw(st.lists(st.integers(1, 9999), min_size=len(bits) - 1, max_size=len(bits) - 1, unique=True)))
    shares = [b - a for a, b in zip([0, *cuts], [*cuts, 10_000], strict=True)]
    one = draw(st.sampled_from([None, 32, 64, 128]))
    sizes = [one or draw(st.sampled_from([32, 64, 96, 128])) for _ in bits]
    return EXL2(tuple(map(Part, bits, shares, sizes)))


@st.composite
def file_groups(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Groups as a file may have them: any sizes that are multiples of 32, in falling width."""
    bits = sorted(draw(st.lists(st.sampled_from(exl2.WIDTHS), min_size=1, max_size=40)), reverse=True)
    return [(width, 32 * draw(st.integers(1, 4))) for width in bits]


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(rows, cols, generator=generator) * (0.2 + torch.rand(cols, generator=generator))


@given(mixes())
def test_spelling_parses_back(scheme: EXL2) -> None:
    assert parse_scheme(str(scheme)) == scheme
    assert parse_scheme(f" {str(scheme).upper()} ") == scheme


@pytest.mark.parametrize(
    ("text", "parts", "spelt"),
    [
        ("exl2-4b-g128", [(4, 10_000, 128)], None),
        ("exl2-5b.10-4b.90-g32", [(5, 1000, 32), (4, 9000, 32)], None),
        ("exl2-5b.1-4b-g32", [(5, 1000, 32), (4, 9000, 32)], "exl2-5b.10-4b.90-g32"),
        ("exl2-8b.05g32-4b.95g128", [(8, 500, 32), (4, 9500, 128)], None),
        ("exl2-8b.05g32-4b.95g32", [(8, 500, 32), (4, 9500, 32)], "exl2-8b.05-4b.95-g32"),
        ("exl2-3b.0625-2b.9375-g64", [(3, 625, 64), (2, 9375, 64)], None),
    ],
)
def test_spellings(text: str, parts: list[tuple[int, int, int]], spelt: str | None) -> None:
    scheme = parse_scheme(text)
    assert scheme == EXL2(tuple(Part(*part) for part in parts))
    assert str(scheme) == (spelt or text)
    assert isinstance(scheme, Scheme)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exl2-7b-g32", "no codes of"),
        ("exl2-1b-g32", "no codes of"),
        ("exl2-4b.10-5b.90-g32", "falling order"),
        ("exl2-4b.10-3b.80-g32", "0.1 \\+ 0.8, which is not 1"),
        ("exl2-4b-3b-g32", "which is not 1"),
        ("exl2-4b.5-3b.5-2b-g32", "which is not 1"),
        ("exl2-4b.5-3b.6-2b-g32", "which is not 1"),
        ("exl2-4b-g48", "48 is no group size"),
        ("exl2-4b-g16", "16 is no group size"),
        ("exl2-4b", "no or two group sizes"),
        ("exl2-4bg32-g64", "no or two group sizes"),
        ("exl2-8b.05g32-4b.95", "no or two group sizes"),
        ("exl2-g32", "is no scheme"),
        ("exl2", "is no scheme"),
    ],
)
def test_what_is_no_scheme(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_scheme(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "shape", "counts", "bits"),
    [
        ("exl2-3b.05-2b.95-g64", (4096, 4096), {3: 4, 2: 60}, 35785728),
        ("exl2-8b.05g32-4b.10g128-3b.85g128", (4096, 11008), {8: 18, 4: 9, 3: 73}, 153776832),
        ("exl2-4b-g128", (192, 576), {4: 5}, 464880),
        ("exl2-6b.05g32-3b.20g64-2b.75g64", (576, 1536), {6: 3, 3: 5, 2: 18}, 2285280),
        ("exl2-8b.15-6b.85-g128", (49152, 576), {8: 1, 6: 4}, 183453936),
    ],
)
def test_golden_groups_and_bits(text: str, shape: tuple[int, int], counts: dict[int, int], bits: int) -> None:
    scheme = parse_scheme(text)
    assert isinstance(scheme, EXL2)
    groups = [width for width, _ in scheme.groups(shape[1])]
    assert {width: groups.count(width) for width in dict.fromkeys(groups)} == counts
    assert scheme.bits_per_weight(shape) * shape[0] * shape[1] == pytest.approx(bits, rel=1e-12)


@given(mixes(), st.integers(1, 64))
def test_groups_fill_the_columns(scheme: EXL2, runs: int) -> None:
    cols = 32 * runs
    groups = scheme.groups(cols)
    assert sum(size for _, size in groups) == cols
    assert all(size > 0 and size % 32 == 0 for _, size in groups)
    assert [bits for bits, _ in groups] == sorted((bits for bits, _ in groups), reverse=True)


@given(file_groups())
def test_any_groups_of_a_file_have_a_scheme(groups: list[tuple[int, int]]) -> None:
    scheme = EXL2.of_groups(groups)
    assert scheme.groups(sum(size for _, size in groups)) == groups
    assert parse_scheme(str(scheme)) == scheme


@pytest.mark.parametrize("cols", [65_536, 65_504])
def test_the_widest_matrix(cols: int) -> None:
    groups = [(4, 32)] * (cols // 32 - 1) + [(2, 32)]
    assert EXL2.of_groups(groups).groups(cols) == groups


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((64,), "1-dimensional"),
        ((2, 64, 64), "3-dimensional"),
        ((64, 48), "width 48 is no multiple of 32"),
        ((64, 0), "empty"),
        ((0, 64), "empty"),
        ((64, 65_568), "beyond 65536"),
    ],
)
def test_shapes_that_it_refuses(shape: tuple[int, ...], said: str) -> None:
    assert said in str(parse_scheme("exl2-4b-g32").reject(shape))


def test_a_width_that_the_group_does_not_divide() -> None:
    scheme = parse_scheme("exl2-4b-g128")
    assert scheme.reject((8, 160)) is None
    assert isinstance(scheme, EXL2)
    assert scheme.groups(160) == [(4, 128), (4, 32)]


def test_the_most_important_columns_get_the_widest_codes() -> None:
    scheme, weight = parse_scheme("exl2-8b.25-2b.75-g32"), weights(48, 128)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1))
    coded = scheme.encode(weight, importance)
    first = coded.arrays["order"][0]
    assert first.tolist() == by_need(importance).tolist()
    errors = (coded.dequantize() - weight).square().mean(0) / weight.square().mean(0)
    assert float(errors[first[:32]].max()) < float(errors[first[32:]].min())


def test_equal_columns_stay_in_order() -> None:
    assert by_need(torch.tensor([1.0, 2.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


@settings(max_examples=20)
@given(mixes(), st.integers(1, 5), st.integers(0, 2**31))
def test_rows_are_those_of_the_whole(scheme: EXL2, runs: int, seed: int) -> None:
    weight = weights(24, 32 * runs, seed)
    coded = scheme.encode(weight)
    whole = coded.dequantize()
    assert whole.shape == weight.shape
    assert torch.equal(coded.rows(5, 17).dequantize(), whole[5:17])
    assert coded.rows(3, 3).dequantize().shape == (0, weight.shape[1])


def test_more_bits_are_never_worse() -> None:
    weight = weights(64, 256)
    texts = ("2b-g32", "3b.10-2b-g32", "3b-g32", "4b.10-3b-g32", "4b-g32", "5b-g32", "6b-g32", "8b.10-6b-g32", "8b-g32")
    errors = [float((parse_scheme(f"exl2-{text}").encode(weight).dequantize() - weight).norm()) for text in texts]
    assert errors == sorted(errors, reverse=True)
