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
    if not equals or not pattern:
        raise UsageError(f"{origin}: '{text}' is no rule", "write 'PATTERN=SCHEME', such as '*.down_proj=keep'")
    return _rule(pattern, scheme, origin)


def read_recipe(path: Path) -> list[Rule]:
    """Returns the rules of a YAML file: a list `rules` of `match` and `scheme`.

    Raises:
        InputError: the file cannot be read, is no YAML, or has other keys; all faults are named at once.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = _RecipeModel.model_validate(content)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"{path}: {faults}", "a recipe is 'rules:' and entries of 'match:' and 'scheme:'") from None
    return [_rule(rule.match, rule.scheme, str(path)) for rule in model.rules]


def first_match(rules: Sequence[Rule], names: Iterable[str]) -> int | None:
    """Returns the position of the first rule that matches one of a tensor's names."""
    names = list(names)
    return next((index for index, rule in enumerate(rules) if rule.matches(names)), None)


def _rule(pattern: str, scheme: str, origin: str) -> Rule:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(f"{origin}: '{pattern}' is no regular expression: {error}") from None
    kept = scheme.strip().lower() == KEEP
    return Rule(pattern.strip(), None if kept else parse_scheme(scheme), origin)
