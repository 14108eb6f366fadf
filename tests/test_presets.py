"""What a method name alone means, and how combinations that do not stand are named."""

from __future__ import annotations

import pytest

from quantize import formats, methods
from quantize.errors import InputError, UsageError
from quantize.presets import Choice, choose, matrix, written
from quantize.schemes import AffineInt, parse_scheme


@pytest.mark.parametrize(
    ("arguments", "scheme", "target", "suffix"),
    [
        (("awq", None, None, False, None, None), AffineInt(4, 128), "awq", "-AWQ"),
        (("awq", 4, 64, True, "awq", None), AffineInt(4, 64, symmetric=True), "awq", "-AWQ"),
        (("rtn", 4, None, False, None, None), AffineInt(4, 128), "awq", "-RTN-Int4"),
        (("rtn", None, -1, False, None, None), AffineInt(4, -1), "awq", "-RTN-Int4"),
    ],
)
def test_choices(arguments: tuple[object, ...], scheme: AffineInt, target: str, suffix: str) -> None:
    assert choose(*arguments) == Choice(str(arguments[0]), scheme, target, suffix)  # type: ignore[arg-type]


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
        (("gptq", 4, None, False, None, None), InputError, "--method gptq does not stand yet"),
        (("rtn", 8, None, False, None, None), InputError, "no format here holds int8-g128 yet"),
        (("rtn", 4, None, False, "exl2", None), InputError, "format exl2 cannot hold int4-g128"),
        (("rtn", 4, None, False, "hf", None), InputError, "format hf cannot hold int4-g128"),
        (("rtn", 4, 256, False, "awq", None), InputError, "group sizes 16, 32, 64, 128 and -1"),
        (("rtn", 4, None, False, "gguf", None), InputError, "format gguf cannot hold int4-g128"),
        ((None, None, None, False, "awq", "Q4_K_M"), UsageError, "Q4_K_M is a GGUF type, not one of format awq"),
        (("awq", None, None, False, None, "Q4_K_M"), InputError, "--method awq cannot choose points of GGUF types yet"),
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
    assert {(row["method"], row["format"]) for row in rows} == {("rtn", "awq"), ("awq", "awq"), ("rtn", "gguf")}
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
