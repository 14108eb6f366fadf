"""What a method name means where nothing else is said: scheme, format and the output's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantize.errors import InputError, UsageError, unknown_name
from quantize.formats import FORMATS
from quantize.methods import table as method_table
from quantize.schemes import AffineInt, Scheme

# Methods and formats of the plan that do not stand yet: named so that the answer is not "unknown".
_TO_COME = ("gptq", "awq+gptq", "exl2", "fp8")


@dataclass(frozen=True, slots=True)
class Choice:
    """A resolved combination.

    Attributes:
        method: Name of the method.
        scheme: The grid of the linears.
        format: Name of the format.
        suffix: What the output's name gets.
    """

    method: str
    scheme: Scheme
    format: str
    suffix: str


def choose(
    method: str | None, bits: int | None, group_size: int | None, symmetric: bool, target: str | None, type_: str | None
) -> Choice:
    """Returns what a command means.

    Raises:
        UsageError: neither method nor type was given, or the method is unknown.
        InputError: the combination is planned but no format holds it yet.
    """
    if method is None and type_ is None:
        raise UsageError("neither --method nor --type was given", "try --method awq --bits 4, or --type Q4_K_M")
    if type_ is not None:
        raise InputError(f"--type {type_}: GGUF cannot be written yet", "formats that can: awq, hf")
    if method in _TO_COME:
        raise InputError(f"--method {method} does not stand yet", "methods that do: " + ", ".join(method_table()))
    if method not in method_table():
        raise unknown_name("method", str(method), [*method_table(), *_TO_COME])
    scheme = AffineInt(bits or 4, group_size or 128, symmetric)
    holders = [name for name, f in FORMATS.items() if f.reject(scheme) is None]
    if target is None:
        target = holders[0] if holders else None
    if target not in FORMATS:
        if target is None:
            raise InputError(f"no format here holds {scheme} yet", "formats that hold 4-bit groups: awq with --bits 4")
        raise unknown_name("format", target, FORMATS)
    if reason := FORMATS[target].reject(scheme):
        raise InputError(
            f"format {target} cannot hold {scheme}: {reason}", f"formats that accept it: {holders or 'none yet'}"
        )
    return Choice(method, scheme, target, suffix(method, scheme, target))


# The names that people know, by method and format.
_SUFFIXES: dict[tuple[str, str], Callable[[AffineInt], str]] = {
    ("awq", "awq"): lambda scheme: "-AWQ",
}


def suffix(method: str, scheme: Scheme, target: str) -> str:
    """Returns what is appended to the model's name, such as `-AWQ` or `-RTN-Int4`."""
    assert isinstance(scheme, AffineInt)
    build = _SUFFIXES.get((method, target))
    return build(scheme) if build else f"-{method.upper()}-Int{scheme.bits}"


def matrix() -> list[dict[str, object]]:
    """Returns one row for each method and format: the schemes that go through both, computed by asking them."""
    grids: list[Scheme] = [AffineInt(bits, 128, symmetric) for bits in range(2, 9) for symmetric in (False, True)]
    rows: list[dict[str, object]] = []
    for method in method_table().values():
        for target in FORMATS.values():
            both = [str(g) for g in grids if method.reject(g) is None and target.reject(g) is None]
            if both:
                rows.append({"method": method.name, "format": target.name, "schemes": both})
    return rows
