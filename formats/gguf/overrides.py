"""Types that a user or an existing file names for single tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantize.errors import UsageError, unknown_name
from quantize.kernels.cpu.ggml import BLOCKS

# A weight can be stored as these.
WEIGHT_TYPES = tuple(name for name in BLOCKS if not re.fullmatch(r"i\d+|f64", name))


@dataclass(frozen=True, slots=True)
class Override:
    """One rule `pattern=type`.

    Attributes:
        pattern: A regular expression that is searched in a tensor's name; the whole name if `exact`.
        type: GGML's name of the type, in lower case.
        exact: Whether `pattern` is a name.
    """

    pattern: str
    type: str
    exact: bool = False

    def __str__(self) -> str:
        return f"{self.pattern}={self.type}"


def parse_type(text: str) -> str:
    """Returns GGML's lower-case name of a type that a weight can have.

    Raises:
        UsageError: there is none of that name.
    """
    if text.lower() not in WEIGHT_TYPES:
        raise unknown_name("GGML type", text, WEIGHT_TYPES)
    return text.lower()


def parse_tensor_types(text: str) -> list[Override]:
    r"""Returns the rules in llama.cpp's spelling `regex=type`, separated by white space.

    That is a file for its `--tensor-type-file`, or one value of its `--tensor-type`. Unlike there, a pattern keeps
    its case (lower-casing turns `\D` into `\d`) and may hold a `=`; names of types are understood in any case.

    Raises:
        UsageError: a rule without pattern or type, a broken pattern, or an unknown type.
    """
    rules: list[Override] = []
    for word in text.split():
        pattern, _, kind = word.rpartition("=")
        if not pattern or not kind:
            raise UsageError(f"'{word}' is no rule for a tensor's type", "write PATTERN=TYPE, such as attn_v=q6_k")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"'{word}': {error}", "the pattern is a regular expression") from None
        rules.append(Override(pattern, parse_type(kind)))
    return rules


def from_gguf(types: Mapping[str, str]) -> list[Override]:
    """Returns rules that give every tensor the type that it has in an existing file.

    Args:
        types: GGML type by tensor name. Integer tensors are passed over.
    """
    return [Override(name, kind.lower(), exact=True) for name, kind in types.items() if kind.lower() in WEIGHT_TYPES]


class Overrides:
    """Rules in order; the first that fits a name wins."""

    def __init__(self, rules: Sequence[Override] = ()) -> None:
        self._rules = tuple(rules)
        self._exact: dict[str, int] = {}
        self._searched: list[tuple[int, re.Pattern[str]]] = []
        for place, rule in enumerate(self._rules):
            if rule.exact:
                self._exact.setdefault(rule.pattern, place)
            else:
                self._searched.append((place, re.compile(rule.pattern)))

    def find(self, name: str) -> Override | None:
        """Returns the rule for the tensor called `name`."""
        exact = self._exact.get(name, len(self._rules))
        place = next((p for p, pattern in self._searched if p < exact and pattern.search(name)), exact)
        return self._rules[place] if place < len(self._rules) else None


def unmatched(rules: Sequence[Override], names: Iterable[str]) -> list[Override]:
    """Returns the rules that fit none of the names, in order; one that comes too late still counts as fitting."""
    names = set(names)
    return [
        rule
        for rule in rules
        if (rule.pattern not in names if rule.exact else not any(map(re.compile(rule.pattern).search, names)))
    ]
