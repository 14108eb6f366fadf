"""Recipes: ordered rules that say which tensor gets which scheme; the first that matches wins.

Patterns are globs over the whole stored name without `.weight`, case-sensitive; `re:` starts a regular expression.
The module's name in transformers is accepted as an alias where it differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from quantize.errors import InputError, UsageError
from quantize.schemes import Scheme, parse_scheme

# The spelling that leaves a tensor as it is stored.
KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a recipe.

    Attributes:
        pattern: A glob, or `re:` and a regular expression.
        scheme: The grid, or None to keep the tensor as it is stored.
        origin: Where the rule was written, for messages.
    """

    pattern: str
    scheme: Scheme | None
    origin: str

    @property
    def wide(self) -> bool:
        """Whether it is a pattern and no plain name."""
        return self.pattern.startswith("re:") or any(sign in self.pattern for sign in "*?[")

    def matches(self, names: Iterable[str]) -> bool:
        """Returns whether one of a tensor's names matches; `.weight` at the end is ignored."""
        stems = [name.removesuffix(".weight") for name in names]
        if self.pattern.startswith("re:"):
            return any(re.fullmatch(self.pattern[3:], stem) for stem in stems)
        return any(fnmatchcase(stem, self.pattern.removesuffix(".weight")) for stem in stems)


class _RuleModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    match: str
    scheme: str


class _RecipeModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rules: list[_RuleModel]


def parse_rule(text: str, origin: str) -> Rule:
    """Returns the rule written `PATTERN=SCHEME`.

    Raises:
        UsageError: there is no `=`, the scheme is unknown, or the regular expression is broken.
    """
    pattern, equals, scheme = text.rpartition("=")
    if not equals or not pattern.strip():
        raise UsageError(f"{origin}: '{text}' is no rule", "write 'PATTERN=SCHEME', such as '*.down_proj=keep'")
    return _rule(pattern, scheme, origin)


def read_recipe(path: Path) -> list[Rule]:
    """Returns the rules of a YAML file: a list `rules` of `match` and `scheme`.

    Raises:
        InputError: the file cannot be read, is no YAML, or has other keys, patterns that are none or schemes that are
            unknown; all faults are named at once.
    """
    try:
        model = _RecipeModel.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        hint = "put patterns in quotes: match: '*.down_proj'"
        raise InputError(f"{path}: no valid YAML: {' '.join(str(error).split())}", hint) from error
    except ValidationError as error:
        faults = [": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in error.errors()]
        raise _broken(path, faults) from None
    rules: list[Rule] = []
    faults = []
    for number, rule in enumerate(model.rules):
        try:
            rules.append(_rule(rule.match, rule.scheme, str(path)))
        except UsageError as error:
            faults.append(f"rules.{number}: {error.message.removeprefix(f'{path}: ')}")
    if faults:
        raise _broken(path, faults)
    return rules


def _broken(path: Path, faults: Sequence[str]) -> InputError:
    hint = "a recipe is 'rules:' and entries of 'match:' and 'scheme:', such as '*.down_proj' and int8-g64 or keep"
    return InputError(f"{path}: {'; '.join(faults)}", hint)


def first_match(rules: Sequence[Rule], names: Iterable[str]) -> int | None:
    """Returns the position of the first rule that matches one of a tensor's names."""
    names = list(names)
    return next((index for index, rule in enumerate(rules) if rule.matches(names)), None)


def _rule(pattern: str, scheme: str, origin: str) -> Rule:
    pattern = pattern.strip()
    if not pattern:
        raise UsageError(f"{origin}: an empty pattern matches nothing", "'*' matches every linear of the blocks")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(f"{origin}: '{pattern}' is no regular expression: {error}") from None
    kept = scheme.strip().lower() == KEEP
    return Rule(pattern, None if kept else parse_scheme(scheme), origin)
