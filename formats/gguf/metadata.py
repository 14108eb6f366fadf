"""The typed values of a GGUF header (the format's "key-value pairs"), as data and as text."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral, Real
from typing import Any

import numpy as np

from quantize.errors import InputError, UsageError


class Kind(IntEnum):
    """The format's value types, by its numbers."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    TEXT = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


# `struct`'s letters of the numbers.
LETTERS = {Kind.U8: "B", Kind.I8: "b", Kind.U16: "H", Kind.I16: "h", Kind.U32: "I", Kind.I32: "i", Kind.F32: "f",
           Kind.BOOL: "?", Kind.U64: "Q", Kind.I64: "q", Kind.F64: "d"}  # fmt: skip
ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_FLOATS = (Kind.F32, Kind.F64)
_SPELLINGS = {kind.name.lower(): kind for kind in Kind if kind is not Kind.ARRAY} | {
    "string": Kind.TEXT,
    "str": Kind.TEXT,
}
_TYPED = re.compile(r"(?P<open>\[)?(?P<kind>[a-z]+\d*)(?(open)\]):(?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Value:
    """One value: a number, a text, or an array of one of these.

    Attributes:
        kind: Its type; of an array that of its elements.
        data: int, float, bool or str; a list of them for an array.
        array: Whether it is an array.
    """

    kind: Kind
    data: Any
    array: bool = False

    @property
    def type(self) -> str:
        """The spelling of the type: `u32`, `text`, `[f32]`."""
        return f"[{self.kind.name.lower()}]" if self.array else self.kind.name.lower()

    def encode(self) -> bytes:
        """Returns type and value as a header holds them, little-endian.

        Raises:
            ValueError: the data does not fit the type.
        """
        if not self.array:
            return struct.pack("<I", self.kind) + _encode(self.kind, [self.data])
        return struct.pack("<IIQ", Kind.ARRAY, self.kind, len(self.data)) + _encode(self.kind, self.data)


def _encode(kind: Kind, values: Any) -> bytes:
    for type_ in set(map(type, values)):
        if not _holds(kind, type_):
            raise ValueError(f"{kind.name.lower()} cannot hold a value of type {type_.__name__}: {values!r:.60}")
    if kind is Kind.TEXT:
        texts = [text.encode() for text in values]
        return b"".join(part for text in texts for part in (struct.pack("<Q", len(text)), text))
    try:
        with np.errstate(over="ignore"):
            numbers = np.asarray(values, dtype=np.dtype(LETTERS[kind]).newbyteorder("<"))
    except OverflowError:
        raise ValueError(f"{kind.name.lower()} cannot hold {values!r:.60}") from None
    if kind is Kind.F32 and np.isinf(numbers).any() and not np.array_equal(np.isinf(numbers), np.isinf(values)):
        raise ValueError(f"f32 cannot hold {values!r:.60}")
    return numbers.tobytes()


def _holds(kind: Kind, type_: type) -> bool:
    """Returns whether values of a Python type are of a kind: truth values are no numbers, floats no integers."""
    truth = issubclass(type_, (bool, np.bool_))
    if kind in (Kind.TEXT, Kind.BOOL):
        return issubclass(type_, str) if kind is Kind.TEXT else truth
    return issubclass(type_, Real if kind in _FLOATS else Integral) and not truth


def alignment_of(metadata: Mapping[str, Value]) -> int:
    """Returns the bytes to whose multiples the data of a file with this metadata is aligned.

    Raises:
        InputError: the key for it holds no power of two as u32.
    """
    value = metadata.get(ALIGNMENT)
    if value is None:
        return _DEFAULT_ALIGNMENT
    number = value.data
    if value.kind is not Kind.U32 or value.array or number < 1 or number & (number - 1):
        raise InputError(f"{ALIGNMENT} is {value.type}:{number}, not a u32 that is a power of two")
    return int(number)


def parse_value(text: str, existing: Value | None = None) -> Value:
    """Returns the value that a command line spells.

    `TYPE:VALUE` or `[TYPE]:JSON LIST` says the type: u8 to u64, i8 to i64, f32, f64, bool, text. Without it the
    type is that of the value that the key has; a new key gets bool for `true` and `false`, u32 (i32 when negative,
    64 bits when too large) for integers, f32 for other numbers, an array for a JSON list, else text.

    Raises:
        UsageError: the text does not fit the type.
    """
    match = _TYPED.fullmatch(text)
    kind = _SPELLINGS.get(match["kind"]) if match else None
    if match and kind is not None:
        return _parse(match["rest"], kind, match["open"] is not None)
    if existing is not None:
        return _parse(text, existing.kind, existing.array)
    return _guess(text)


def _parse(text: str, kind: Kind, array: bool) -> Value:
    """Returns the value of a known type."""
    value = Value(kind, _parse_list(text) if array else _parse_one(text, kind), array)
    try:
        value.encode()
    except ValueError:
        raise UsageError(f"'{text:.60}' is no {value.type}") from None
    return value


def _parse_one(text: str, kind: Kind) -> int | float | bool | str:
    if kind is Kind.TEXT:
        return text
    try:
        if kind is Kind.BOOL:
            return {"true": True, "false": False}[text.strip().lower()]
        return float(text) if kind in _FLOATS else int(text, 0)
    except (KeyError, ValueError):
        choices = "say true or false" if kind is Kind.BOOL else ""
        raise UsageError(f"'{text:.60}' is no {kind.name.lower()}", choices) from None


def _parse_list(text: str) -> list[Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list):
        raise UsageError(f"'{text:.60}' is no JSON list", 'write an array as [1, 2] or ["a", "b"]')
    return values


def _guess(text: str) -> Value:
    """Returns the value of a new key, its type read off the text."""
    if text.strip().lower() in ("true", "false"):
        return _parse(text, Kind.BOOL, False)
    if re.fullmatch(r"[+-]?\d+", text):
        return _parse(text, _integer_kind(int(text), int(text), (Kind.U32, Kind.I32, Kind.U64, Kind.I64)), False)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return _parse(text, Kind.F32, False)
    if not text.startswith("["):
        return Value(Kind.TEXT, text)
    try:
        values = _parse_list(text)
    except UsageError:
        return Value(Kind.TEXT, text)
    types = set(map(type, values))
    if types == {int}:
        return _parse(text, _integer_kind(min(values), max(values), (Kind.I32, Kind.I64, Kind.U64)), True)
    for kind, allowed in ((Kind.BOOL, {bool}), (Kind.TEXT, {str}), (Kind.F32, {int, float})):
        if types and types <= allowed:
            return _parse(text, kind, True)
    raise UsageError(f"'{text:.60}': elements of which type?", "say it, as in [i32]:[] or [text]:[]")


def _integer_kind(low: int, high: int, choices: Iterable[Kind]) -> Kind:
    """Returns the first kind that holds both numbers."""
    for kind in choices:
        limits = np.iinfo(LETTERS[kind])
        if limits.min <= low and high <= limits.max:
            return kind
    raise UsageError(f"{low if low < 0 else high} does not fit 64 bits")


def u32(value: int) -> Value:
    """Returns an unsigned number, the kind of all sizes and counts."""
    return Value(Kind.U32, int(value))


def f32(value: float) -> Value:
    """Returns a float32."""
    return Value(Kind.F32, float(value))


def flag(value: bool) -> Value:
    """Returns a truth value."""
    return Value(Kind.BOOL, bool(value))


def text(value: str) -> Value:
    """Returns a text."""
    return Value(Kind.TEXT, str(value))


def texts(values: Iterable[str]) -> Value:
    """Returns an array of texts."""
    return Value(Kind.TEXT, list(values), array=True)


def integers(values: Iterable[int]) -> Value:
    """Returns an array of int32."""
    return Value(Kind.I32, [int(value) for value in values], array=True)


def floats(values: Iterable[float]) -> Value:
    """Returns an array of float32."""
    return Value(Kind.F32, [float(value) for value in values], array=True)


def flags(values: Iterable[bool]) -> Value:
    """Returns an array of truth values."""
    return Value(Kind.BOOL, [bool(value) for value in values], array=True)
