"""Schemes: their spelling, their size, what they refuse, and what coding does to values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize import schemes
from quantize.errors import UsageError
from quantize.formats.awq import AWQFormat
from quantize.kernels.cpu.ggml import BLOCKS
from quantize.schemes import AffineInt, GGMLBlock, Plain, QuantizedTensor, Scheme, parse_scheme

GROUPS = st.sampled_from([-1, 8, 16, 32, 64, 128])
AFFINE = st.builds(AffineInt, st.integers(2, 8), GROUPS, st.booleans())
PLAIN = [Plain(dtype) for dtype in schemes.DTYPES.values()]


def block_grids() -> list[Scheme]:
    return [GGMLBlock(name) for name, block in BLOCKS.items() if block.weights > 1]


@given(AFFINE)
def test_affine_spelling_parses_back(scheme: AffineInt) -> None:
    assert parse_scheme(str(scheme)) == scheme
    assert parse_scheme(f" {str(scheme).upper()} ") == scheme


@pytest.mark.parametrize("scheme", [*PLAIN, *block_grids()], ids=str)
def test_other_spellings_parse_back(scheme: Scheme) -> None:
    assert parse_scheme(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("spelling", "scheme"),
    [
        ("int4-g128", AffineInt(4, 128)),
        ("int3-g64-sym", AffineInt(3, 64, symmetric=True)),
        ("int8-row", AffineInt(8, -1)),
        ("bf16", Plain(torch.bfloat16)),
        ("q4_k", GGMLBlock("q4_k")),
    ],
)
def test_spellings_of_the_documentation(spelling: str, scheme: Scheme) -> None:
    assert str(scheme) == spelling
    assert parse_scheme(spelling) == scheme


@pytest.mark.parametrize(
    "text", ["", "int4", "int4-128", "int4-g", "int9-g128", "int1-g128", "int4-g4", "int4-g128-asym", "q9_9", "fp4000"]
)
def test_what_is_no_scheme(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_scheme(text)
    assert caught.value.hint


def test_keep_is_named_among_the_choices() -> None:
    with pytest.raises(UsageError, match="'nonsense' is no scheme") as caught:
        parse_scheme("nonsense")
    assert "keep" in caught.value.hint


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (AffineInt(4, 128), (8, 256), None),
        (AffineInt(4, -1), (8, 72), None),
        (AffineInt(4, 128), (8, 192), "its width 192 is no multiple of the group size 128"),
        (AffineInt(4, 64), (56, 72), "its width 72 is no multiple of the group size 64"),
        (AffineInt(4, 128), (8, 3, 14, 14), "4-dimensional, not a matrix"),
        (AffineInt(4, 128), (4, 96, 64), "3-dimensional, not a matrix"),
        (AffineInt(4, 128), (128,), "1-dimensional, not a matrix"),
        (AffineInt(4, 128), (), "0-dimensional, not a matrix"),
        (AffineInt(4, -1), (8, 0), "its width 0 is no multiple of the group size -1"),
        (Plain(torch.bfloat16), (), None),
        (GGMLBlock("q4_k"), (2, 512), None),
        (GGMLBlock("q4_k"), (2, 320), "its width 320 is no multiple of the block size 256 of q4_k"),
        (GGMLBlock("q4_0"), (), "its width 0 is no multiple of the block size 32 of q4_0"),
    ],
)
def test_reject_says_why(scheme: Scheme, shape: tuple[int, ...], reason: str | None) -> None:
    assert scheme.reject(shape) == reason


@given(GROUPS, st.booleans(), st.integers(1, 4), st.integers(1, 4))
def test_bits_per_weight_are_the_bits_stored(group: int, symmetric: bool, rows: int, cols: int) -> None:
    scheme, shape = AffineInt(4, group, symmetric), (8 * rows, 128 * cols)
    pieces = AWQFormat().pieces("a.weight", shape, scheme)
    assert sum(piece.nbytes for piece in pieces) * 8 == pytest.approx(
        scheme.bits_per_weight(shape) * 1024 * rows * cols
    )


def test_bits_per_weight_of_other_grids() -> None:
    assert AffineInt(4, 128).bits_per_weight((8, 256)) == 4 + 20 / 128
    assert Plain(torch.bfloat16).bits_per_weight((3,)) == 16
    assert GGMLBlock("q4_0").bits_per_weight((1, 32)) == 4.5
    assert GGMLBlock("q6_k").bits_per_weight((1, 256)) == 6.5625


@given(AFFINE, st.integers(0, 2**31))
def test_coding_what_was_decoded_gives_the_same_values(scheme: AffineInt, seed: int) -> None:
    """It holds for groups that use both ends of their grid; symmetric groups always reach the end that sets them."""
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed))
    coded = scheme.encode(weight)
    group = scheme.group(128)
    codes = coded.arrays["codes"].reshape(4, -1, group)
    ends = (codes.amin(-1) == 0) & (codes.amax(-1) == 2**scheme.bits - 1)
    full = ends | torch.tensor(scheme.symmetric)
    again = scheme.encode(coded.dequantize())
    same = again.dequantize().reshape(codes.shape) == coded.dequantize().reshape(codes.shape)
    assert bool(same[full].all())
    if scheme.bits > 2:
        assert float(full.float().mean()) > 0.3


@given(AFFINE)
def test_arrays_are_of_the_types_that_the_docstring_names(scheme: AffineInt) -> None:
    weight = torch.randn(3, 128, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    kept = weight.clone()
    coded = scheme.encode(weight)
    groups = 128 // scheme.group(128)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in coded.arrays.items()} == {
        "codes": (torch.uint8, (3, 128)),
        "scales": (torch.float16, (3, groups)),
        "zeros": (torch.uint8, (3, groups)),
    }
    assert coded.shape == (3, 128)
    assert coded.dequantize().dtype == torch.float32
    assert torch.equal(weight, kept)
    if scheme.symmetric:
        assert bool((coded.arrays["zeros"] == 2 ** (scheme.bits - 1)).all())


def test_a_row_is_one_group() -> None:
    weight = torch.randn(2, 72, generator=torch.Generator().manual_seed(0))
    whole, same = AffineInt(4, -1).encode(weight), AffineInt(4, 72).encode(weight)
    assert torch.equal(whole.dequantize(), same.dequantize())
    assert whole.arrays["scales"].shape == (2, 1)


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1.0, 1e5])
def test_error_is_at_most_half_a_step_for_any_size(scale: float) -> None:
    weight = scale * torch.randn(16, 128, generator=torch.Generator().manual_seed(3))
    coded = AffineInt(4, 32).encode(weight)
    step = coded.arrays["scales"].float().repeat_interleave(32, 1)
    assert bool(((coded.dequantize() - weight).abs() <= 0.51 * step).all())
    assert bool(coded.dequantize().isfinite().all())


def test_half_of_the_groups_zero() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    weight[:, :32] = 0
    coded = AffineInt(4, 32).encode(weight)
    assert bool((coded.dequantize()[:, :32] == 0).all())
    assert bool((coded.arrays["scales"][:, 0] == 1).all())
    assert bool(coded.arrays["scales"].isfinite().all())


def test_clipped_range_saturates() -> None:
    weight = torch.tensor([[-4.0, 1, 2, 3, 4, 5, 6, 60]])
    coded = AffineInt(4, 8).encode_within(weight, torch.tensor([[-5.0]]), torch.tensor([[10.0]]))
    assert coded.dequantize().tolist() == [[-4, 1, 2, 3, 4, 5, 6, 10]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_plain_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 1 + 2**-9, 1 + 3 * 2**-9, -0.0, 65504.0]])
    coded = Plain(dtype).encode(weight)
    assert torch.equal(coded.arrays["values"], weight.to(dtype))
    assert coded.dequantize().dtype == torch.float32


def test_block_grids_code_and_decode() -> None:
    # one q4_0 block by hand: scale 0.5, low nibbles 0..15 count up from -8, high nibbles are all 8
    block = torch.tensor([*b"\x00\x38", *(0x80 | i for i in range(16))], dtype=torch.uint8).unsqueeze(0)
    coded = QuantizedTensor(GGMLBlock("q4_0"), (1, 32), {"blocks": block})
    assert coded.dequantize().tolist() == [[0.5 * (i - 8) for i in range(16)] + [0.0] * 16]
    again = GGMLBlock("q4_0").encode(coded.dequantize())
    assert torch.equal(again.arrays["blocks"], block)
    with pytest.raises(UsageError, match="iq2_xs cannot be made without importance"):
        GGMLBlock("iq2_xs").encode(torch.zeros(1, 256))
    with pytest.raises(UsageError, match="'q9_z' is no GGML type"):
        GGMLBlock("q9_z")


@pytest.mark.parametrize("type_", [str(scheme) for scheme in block_grids()])
def test_units_of_block_grids(type_: str) -> None:
    scheme = GGMLBlock(type_)
    assert scheme.unit in (1, 4, 8)
    assert scheme.block % scheme.unit == 0
    assert (scheme.unit > 1) == type_.startswith(("iq1", "iq2", "iq3"))
