"""What a method name alone means, and how combinations that do not stand are named."""

from __future__ import annotations

import pytest

from quantize import formats, methods
from quantize.errors import InputError, UsageError
from quantize.float_schemes import FP8, PackedInt
from quantize.presets import Choice, choose, matrix, written
from quantize.schemes import AffineInt, parse_scheme


@pytest.mark.parametrize(
    ("arguments", "scheme", "target", "suffix"),
    [
        (("awq", None, None, False, None, None), AffineInt(4, 128), "awq", "-AWQ"),
        (("awq", 4, 64, True, "awq", None), AffineInt(4, 64, symmetric=True), "awq", "-AWQ"),
        (("rtn", 4, None, False, None, None), AffineInt(4, 128), "awq", "-RTN-Int4"),
        (("rtn", None, -1, False, None, None), AffineInt(4, -1), "awq", "-RTN-Int4"),
        (("awq", None, None, None, None, None), AffineInt(4, 128), "awq", "-AWQ"),
        (("rtn", 2, 64, None, None, None), AffineInt(2, 64), "gptq", "-RTN-Int2"),
        (("rtn", 3, None, None, None, None), AffineInt(3, 128), "gptq", "-RTN-Int3"),
        (("rtn", 8, None, None, None, None), AffineInt(8, 128, symmetric=True), "gptq", "-RTN-Int8"),
        (("rtn", 8, None, False, None, None), AffineInt(8, 128), "gptq", "-RTN-Int8"),
        (("rtn", 4, 256, None, None, None), AffineInt(4, 256), "gptq", "-RTN-Int4"),
        (("rtn", 4, None, None, "gptq_v2", None), AffineInt(4, 128), "gptq_v2", "-RTN-Int4"),
        (("rtn", 5, None, None, None, None), PackedInt(5, 128, symmetric=True), "compressed-tensors", "-W5A16"),
        (("gptq", 4, 64, False, "compressed-tensors", None), PackedInt(4, 64), "compressed-tensors", "-GPTQ-W4A16"),
    ],
)
def test_choices(arguments: tuple[object, ...], scheme: AffineInt, target: str, suffix: str) -> None:
    assert choose(*arguments) == Choice(str(arguments[0]), scheme, target, suffix)  # type: ignore[arg-type]


def test_fp8_is_a_grid_rounded_to_nearest() -> None:
    found = choose("fp8", None, None, None, None, None)
    assert found == Choice("rtn", FP8(), "compressed-tensors", "-FP8-Dynamic")


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ((None, 4, None, False, None, None), UsageError, "neither --method nor --type"),
        ((None, None, None, False, "awq", None), UsageError, "format awq holds quantized tensors"),
        (("awk", 4, None, False, None, None), UsageError, "unknown method 'awk' (did you mean 'awq'?)"),
        (("awq", 4, None, False, "awk", None), UsageError, "unknown format 'awk' (did you mean 'awq'?)"),
        (("awq", 0, None, False, None, None), UsageError, "0 bits is no integer scheme"),
        (("awq", 16, None, False, None, None), UsageError, "16 bits is no integer scheme"),
        (("awq", 4, 0, False, None, None), UsageError, "group size 0 is too small"),
        (("fp8", 8, None, None, None, None), UsageError, "--method fp8 has one grid"),
        (("fp8", None, None, None, "gguf", None), InputError, "format gguf cannot hold fp8-channel"),
        (("rtn", 4, 96, False, "gptq", None), InputError, "format gptq cannot hold int4-g96: GPTQ readers take"),
        (("rtn", 4, None, False, "exl2", None), InputError, "format exl2 cannot hold int4-g128"),
        (("rtn", 4, None, False, "hf", None), InputError, "format hf cannot hold int4-g128"),
        (("rtn", 4, 256, False, "awq", None), InputError, "group sizes 16, 32, 64, 128 and -1"),
        (("rtn", 4, None, False, "gguf", None), InputError, "format gguf cannot hold int4-g128"),
        ((None, None, None, False, "awq", "Q4_K_M"), UsageError, "Q4_K_M is a GGUF type, not one of format awq"),
        (("awq", None, None, False, None, "Q4_K_M"), InputError, "--method awq cannot choose points of Q4_K_M"),
        ((None, None, None, False, None, "Q4_K_N"), UsageError, "did you mean 'Q4_K_S'"),
    ],
)
def test_refusals(arguments: tuple[object, ...], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        choose(*arguments)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert getattr(caught.value, "hint", "")


def test_the_matrix_is_what_methods_and_formats_answer() -> None:
    rows = matrix()
    found = {(row["method"], row["format"]) for row in rows}
    assert {(method, target) for method in ("rtn", "awq") for target in ("awq", "gptq", "gptq_v2")} <= found
    assert ("rtn", "gguf") in found
    for row in rows:
        schemes = row["schemes"]
        assert isinstance(schemes, list)
        for scheme in map(parse_scheme, schemes):
            assert methods.METHODS[str(row["method"])].reject(scheme) is None
            assert formats.FORMATS[str(row["format"])].reject(scheme) is None


def test_what_formats_can_write() -> None:
    assert {"q4_k", "iq2_xs", "q8_0", "f32", "f16", "bf16"} <= set(written(formats.FORMATS["gguf"]))
    assert not any(name.startswith("int") for name in written(formats.FORMATS["gguf"]))
    assert written(formats.FORMATS["hf"]) == ["f32", "f16", "bf16"]
    assert "int4-g128" in written(formats.FORMATS["awq"])
    expected = {f"int{bits}-g128{sym}" for bits in (2, 3, 4, 8) for sym in ("", "-sym")}
    assert expected | {"f32", "f16", "bf16"} == set(written(formats.FORMATS["gptq"]))


def test_gptq_is_symmetric_where_its_engines_want_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.presets.method_table", lambda: dict.fromkeys(("gptq", "awq+gptq")))
    assert choose("gptq", None, None, None, None, None) == Choice("gptq", AffineInt(4, 128, True), "gptq", "-GPTQ-Int4")
    assert choose("gptq", 3, 64, None, None, None) == Choice("gptq", AffineInt(3, 64, True), "gptq", "-GPTQ-Int3")
    assert choose("gptq", 4, None, False, None, None).scheme == AffineInt(4, 128)
    assert choose("gptq", 4, None, None, "awq", None).scheme == AffineInt(4, 128)
    assert choose("awq+gptq", 4, None, None, None, None) == Choice("awq+gptq", AffineInt(4, 128), "awq", "-AWQ-GPTQ")
    found = choose("awq+gptq", 3, None, None, None, None)
    assert (found.format, found.suffix) == ("gptq", "-AWQ-GPTQ-Int3")
