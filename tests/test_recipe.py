"""Recipes: what a pattern matches, which rule wins, and how broken ones are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import InputError, UsageError
from quantize.recipe import Rule, first_match, parse_rule, read_recipe
from quantize.schemes import AffineInt, Plain

Q = "model.layers.10.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("pattern", "names", "expected"),
    [
        ("*", [Q], True),
        ("*.q_proj", [Q], True),
        ("*.q_proj.weight", [Q], True),
        ("q_proj", [Q], False),
        ("*q_proj*", [Q], True),
        ("*.Q_proj", [Q], False),
        ("model.layers.10.*", [Q], True),
        ("model.layers.1.*", [Q], False),
        ("model.layers.1?.*", [Q], True),
        ("model.layers.[0-9].*", [Q], False),
        ("model.layers.[0-9][0-9].*", [Q], True),
        ("model.layers.[!2]*", [Q], True),
        ("re:.*q_proj", [Q], True),
        ("re:q_proj", [Q], False),
        (r"re:model\.layers\.(1|2)\..*", [Q], False),
        (r"re:model\.layers\.(10|20)\..*", [Q], True),
        ("re:.*weight", [Q], False),
        ("model.norm", ["model.norm.weight"], True),
        ("q_proj.bias", ["q_proj.bias"], True),
        ("lm_head.weight._scale", ["lm_head.weight._scale"], True),
        ("model.language_model.*", [Q, "model.language_model.layers.10.self_attn.q_proj"], True),
        ("model.language_model.*", [Q], False),
    ],
)
def test_patterns(pattern: str, names: list[str], expected: bool) -> None:
    assert Rule(pattern, None, "here").matches(names) == expected


@pytest.mark.parametrize(
    ("pattern", "wide"), [("a.b", False), ("a*", True), ("a?", True), ("a[1]", True), ("re:a", True)]
)
def test_patterns_and_plain_names(pattern: str, wide: bool) -> None:
    assert Rule(pattern, None, "here").wide == wide


@given(st.lists(st.sampled_from(["*.q_proj", "*", "re:.*5.*", "model.*", "nothing"]), max_size=5))
def test_the_first_match_wins(patterns: list[str]) -> None:
    rules = [Rule(pattern, None, "here") for pattern in patterns]
    hits = [index for index, rule in enumerate(rules) if rule.matches([Q])]
    assert first_match(rules, iter([Q])) == (hits[0] if hits else None)


@pytest.mark.parametrize(
    ("text", "pattern", "scheme"),
    [
        ("*.down_proj=keep", "*.down_proj", None),
        ("*.down_proj = KEEP ", "*.down_proj", None),
        ("a=int8-g32", "a", AffineInt(8, 32)),
        ("a=int4-g32-sym", "a", AffineInt(4, 32, symmetric=True)),
        ("lm_head=bf16", "lm_head", Plain(torch.bfloat16)),
        ("re:.*(?=x)x=f32", "re:.*(?=x)x", Plain(torch.float32)),
        (" re:a+ =f16", "re:a+", Plain(torch.float16)),
        ("a=b=keep", "a=b", None),
    ],
)
def test_rules_of_the_command_line(text: str, pattern: str, scheme: object) -> None:
    assert parse_rule(text, "--set") == Rule(pattern, scheme, "--set")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("*.down_proj", "'*.down_proj' is no rule"),
        ("", "'' is no rule"),
        ("=keep", "'=keep' is no rule"),
        (" =keep", "' =keep' is no rule"),
        ("a=", "'' is no scheme"),
        ("a=int4", "'int4' is no scheme"),
        ("re:(=keep", "--set: 're:(' is no regular expression"),
        (" re:[ =keep", "--set: 're:[' is no regular expression"),
    ],
)
def test_rules_that_are_none(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rule(text, "--set")
    assert said in caught.value.message


def recipe(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_keeps_its_order(tmp_path: Path) -> None:
    file = recipe(
        tmp_path,
        """
        rules:
          - {match: "*.down_proj", scheme: int8-g64}
          - match: re:.*layers\\.0\\..*
            scheme: keep
          - {match: "*", scheme: int4-g128}
        """,
    )
    assert read_recipe(file) == [
        Rule("*.down_proj", AffineInt(8, 64), str(file)),
        Rule(r"re:.*layers\.0\..*", None, str(file)),
        Rule("*", AffineInt(4, 128), str(file)),
    ]


def refused(file: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_recipe(file)
    assert str(file) in caught.value.message
    assert "\n" not in str(caught.value)
    return caught.value


def test_all_faults_of_shape_are_named(tmp_path: Path) -> None:
    rules = ["{match: a}", "{scheme: keep}", "{match: a, scheme: 4}", "{match: a, scheme: keep, group: 3}"]
    error = refused(recipe(tmp_path, "\n- ".join(["rules:", *rules]) + "\nmix: 1\n"))
    for place in ("rules.0.scheme: ", "rules.1.match: ", "rules.2.scheme: ", "rules.3.group: ", "; mix: "):
        assert place in error.message
    assert "match" in error.hint


def test_all_faults_of_content_are_named(tmp_path: Path) -> None:
    text = "rules:\n- {match: 're:(', scheme: keep}\n- {match: a, scheme: int4}\n- {match: ' ', scheme: keep}\n"
    error = refused(recipe(tmp_path, text))
    assert "rules.0: 're:(' is no regular expression" in error.message
    assert "rules.1: 'int4' is no scheme" in error.message
    assert "rules.2: an empty pattern" in error.message


@pytest.mark.parametrize("text", ["", "[]", "rules", "rules: {}", "rules: [a]", "{rules: [], rules2: []}"])
def test_files_of_another_shape(tmp_path: Path, text: str) -> None:
    error = refused(recipe(tmp_path, text))
    assert ": : " not in error.message


def test_an_unquoted_star_is_explained(tmp_path: Path) -> None:
    error = refused(recipe(tmp_path, "rules:\n- match: *.down_proj\n  scheme: keep\n"))
    assert "no valid YAML" in error.message
    assert error.hint == "put patterns in quotes: match: '*.down_proj'"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.yaml").message
    (tmp_path / "binary.yaml").write_bytes(b"rules: \xff\xfe")
    assert "no valid YAML" in refused(tmp_path / "binary.yaml").message
    refused(recipe(tmp_path, "rules: !!python/object/apply:os.system ['true']"))
