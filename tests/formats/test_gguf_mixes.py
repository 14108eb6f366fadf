"""llama.cpp's named mixes: a golden file of the program's own choices, and the laws around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mix_models import MODELS, NAMES, brief, quantized

from quantize.errors import UsageError
from quantize.formats.gguf.mixes import (
    MIXES,
    Choice,
    Facts,
    choose,
    find_mix,
    fit,
    lacking_importance,
    needs_importance,
)
from quantize.formats.gguf.mixrules import protection, walking_order
from quantize.formats.gguf.overrides import (
    WEIGHT_TYPES,
    Override,
    from_gguf,
    parse_tensor_types,
    parse_type,
    unmatched,
)
from quantize.kernels.cpu.ggml import BLOCKS

# What llama-quantize --dry-run gave; tests/peers/test_llamacpp_mixes.py wrote it and checks it.
GOLDEN = json.loads((Path(__file__).parent / "mixes.json").read_text(encoding="utf-8"))
LLAMA = Facts("llama", 8, 8, 8)
SQUARE = (256, 256)


def chosen(mix: str, *names: str, facts: Facts = LLAMA, shape: tuple[int, ...] = SQUARE, **options: object) -> list:
    choices = choose(MIXES[mix], dict.fromkeys(names, shape), facts, **{"importance": False, **options})  # type: ignore[arg-type]
    return [choice.type for choice in choices.values()]


@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_quantize(name: str) -> None:
    model, checked = MODELS[name], 0
    for wanted, mixes in GOLDEN[name].items():
        for mix in mixes.split():
            choices = choose(MIXES[mix.rstrip("+")], model.shapes, model.facts, importance=mix.endswith("+"))
            found = quantized(model.shapes, {name: choice.type for name, choice in choices.items()})
            assert brief(found) == wanted, mix
            vectors = {name for name, shape in model.shapes.items() if len(shape) < 2}
            assert {choices[name].type for name in vectors} <= {None}
            checked += 1
    assert checked >= 2 * (len(NAMES) - 1)


def test_order_of_the_tensors_given_is_kept_and_means_nothing() -> None:
    model = MODELS["llama, tied, 3 share"]
    backwards = dict(reversed(model.shapes.items()))
    straight = choose(MIXES["Q4_K_M"], model.shapes, model.facts, importance=False)
    found = choose(MIXES["Q4_K_M"], backwards, model.facts, importance=False)
    assert list(found) == list(backwards)
    assert found == straight


def test_layers_count_as_numbers() -> None:
    assert walking_order(["blk.10.b", "blk.2.b", "output.weight", "blk.2.a", "a"]) == [
        "a", "output.weight", "blk.2.a", "blk.2.b", "blk.10.b",
    ]  # fmt: skip


def test_reasons_are_in_plain_words() -> None:
    shapes = {"token_embd.weight": SQUARE, "blk.0.attn_v.weight": SQUARE, "blk.0.attn_norm.weight": (256,)}
    choices = choose(MIXES["Q4_K_M"], shapes, LLAMA, importance=False)
    assert [choice.rule for choice in choices.values()] == [
        "Q4_K_M: embedding that is the head too",
        "Q4_K_M: attention value, first and last eighth and each third between",
        "kept: a vector",
    ]


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("output_norm.weight", (256,), "a vector"),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 256), "a vector"),
        ("blk.0.attn_q_norm.weight", SQUARE, "normalization"),
        ("blk.0.attn_q.bias", SQUARE, "no weight matrix by its name"),
        ("blk.0.ssm_a", SQUARE, "no weight matrix by its name"),
        ("blk.0.ffn_gate_inp.weight", SQUARE, "router"),
        ("position_embd.weight", SQUARE, "position embedding"),
        ("v.patch_embd.weight", (8, 3, 14, 14), "4 dimensions"),
        ("v.patch_embd.weight", (8, 3, 14), "patch embedding"),
        ("v.other.weight", (8, 3, 14, 14), "4 dimensions"),
        ("blk.0.ffn_down.weight", SQUARE, None),
        ("blk.0.ffn_down_exps.weight", (4, 256, 256), None),
        ("blk.0.ffn_gate_inp_shexp.weight", SQUARE, None),
        ("blk.0.attn_k_b.weight", SQUARE, None),
    ],
)
def test_what_is_never_quantized(name: str, shape: tuple[int, ...], reason: str | None) -> None:
    assert protection(name, shape, "llama") == reason


def test_what_single_architectures_protect() -> None:
    assert protection("blk.0.attn_k_b.weight", SQUARE, "glm5-next") == "small or delicate in glm5-next"
    names = ["output.weight", "blk.0.attn_q_a.weight", "blk.0.attn_q.weight"]
    assert chosen("Q4_K_M", *names, facts=Facts("glm5-next", 8, 8, 8)) == ["q6_k", "q8_0", "q4_k"]
    stack = {"output.weight": SQUARE, "blk.0.ffn_up_exps.weight": (4, 256, 256), "blk.0.attn_k_b.weight": (4, 256, 256)}
    for architecture, last in (("bailingmoe3", "q8_0"), ("deepseek2", "mxfp4")):
        found = choose(MIXES["MXFP4_MOE"], stack, Facts(architecture, 8, 8, 8, 4), importance=False)
        assert [choice.type for choice in found.values()] == ["q8_0", "mxfp4", last]


def test_the_size_called_70b() -> None:
    names = ["output.weight", *(f"blk.{layer}.attn_v.weight" for layer in range(80))]
    for facts, value in (
        (Facts("llama", 80, 64, 8), "q5_k"),
        (Facts("llama", 80, 64, 64), "q3_k"),
        (Facts("llama", 80, 64, 8, 8), "q8_0"),
        (Facts("qwen2", 80, 64, 64), "q5_k"),
        (Facts("qwen3", 80, 64, 8), "q3_k"),
    ):
        assert set(chosen("Q3_K_S", *names, facts=facts)[1:]) == {value}, facts


def test_no_key_and_value_heads() -> None:
    assert chosen("Q2_K", "output.weight", "blk.0.attn_v.weight", facts=Facts("mamba", 8, 0, 0)) == ["q6_k", "q3_k"]


@given(st.sampled_from(WEIGHT_TYPES), st.integers(1, 4096))
def test_a_fallback_fits_and_is_not_smaller(kind: str, width: int) -> None:
    found = fit(kind, width)
    assert width % BLOCKS[found].weights == 0
    assert BLOCKS[found].bits >= BLOCKS[kind].bits or kind in ("f32", "iq4_nl")
    assert (found == kind) == (width % BLOCKS[kind].weights == 0)


def test_a_fallback_says_what_was_wanted() -> None:
    shapes = {"output.weight": (100, 320), "blk.0.attn_q.weight": (320, 320), "blk.0.ffn_down.weight": (320, 172)}
    found = choose(MIXES["Q4_K_M"], shapes, LLAMA, importance=False)
    assert [(choice.type, choice.wanted) for choice in found.values()] == [
        ("q8_0", None), ("q5_0", "q4_k"), ("f16", "q6_k"),
    ]  # fmt: skip


def test_rows_of_no_whole_sign_block_fall_back() -> None:
    assert chosen("Q1_0", "output.weight", "blk.0.attn_q.weight", shape=(64, 320)) == ["q8_0", "q4_0"]


def test_types_that_were_asked_for_go_through_the_fallback() -> None:
    names = ["token_embd.weight", "output.weight", "blk.0.attn_q.weight"]
    asked = {"output": "q6_k", "embedding": "q4_k", "overrides": parse_tensor_types("attn_q=q5_k")}
    assert chosen("Q4_0", *names, shape=(64, 320), **asked) == ["q5_0", "q8_0", "q5_1"]


def test_order_of_what_was_asked_for() -> None:
    names = ["token_embd.weight", "output.weight", "per_layer_token_embd.weight", "blk.0.attn_q.weight"]
    rules = parse_tensor_types("q8_=q8_0 weight=q3_k attn=q6_k")
    assert chosen("Q4_K_M", *names, overrides=rules) == ["q3_k"] * 4
    assert chosen("Q4_K_M", *names, overrides=rules, embedding="q5_k", output="q8_0") == [
        "q5_k",
        "q8_0",
        "q3_k",
        "q3_k",
    ]
    assert chosen("Q4_K_M", *names, embedding="q5_k") == ["q5_k", "q6_k", "q5_k", "q4_k"]
    assert chosen("Q4_K_M", names[0], output="q8_0") == ["q8_0"]
    assert chosen("Q4_K_M", names[0], output="q8_0", embedding="q5_k") == ["q5_k"]
    assert chosen("Q4_K_M", *names, leave_output=True)[1] is None


@pytest.mark.parametrize("mix", ["F16", "BF16", "F32"])
def test_rules_hold_in_float_files_too(mix: str) -> None:
    names = ["token_embd.weight", "output.weight", "blk.0.attn_q.weight"]
    found = chosen(mix, *names, overrides=parse_tensor_types("attn_q=q8_0"), output="q6_k")
    assert found == [MIXES[mix].base, "q6_k", "q8_0"]


def test_a_rule_for_a_protected_tensor_is_named() -> None:
    choices = choose(
        MIXES["Q4_0"], {"blk.0.attn_norm.weight": (256,)}, LLAMA, importance=False, overrides=[Override("norm", "q8_0")]
    )
    assert choices == {"blk.0.attn_norm.weight": Choice(None, "kept: a vector, whatever norm=q8_0 says")}


def test_tensors_that_no_text_reaches() -> None:
    names = [
        "output.weight",
        "blk.7.ffn_up.weight",
        "blk.7.attn_k.weight",
        "blk.7.attn_q.weight",
        "blk.6.ffn_up.weight",
    ]
    blind = frozenset(names[1:4])
    rules = parse_tensor_types("attn_k=iq2_xxs attn_q=f16")
    for mix, base in (("IQ2_XXS", "iq2_xxs"), ("Q4_K_M", "q4_k"), ("Q8_0", "q8_0"), ("BF16", "bf16")):
        found = chosen(mix, *names, blind=blind, overrides=rules, importance=True)
        assert found[1] == ("bf16" if mix == "BF16" else "q8_0")
        assert found[2:] == ["iq2_xxs", "f16", base]  # a user's word counts


def test_pure_gives_all_the_main_type() -> None:
    names = ["token_embd.weight", "output.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"]
    assert chosen("Q4_K_M", *names, pure=True) == ["q4_k"] * 4
    assert chosen("IQ3_XXS", *names, pure=True) == ["iq3_xxs"] * 4
    # cannot be made without importance, which these two never have
    assert chosen("IQ2_XXS", *names, pure=True) == ["q2_k", "q5_k", "iq2_xxs", "iq2_xxs"]


@pytest.mark.parametrize("options", [{"embedding": "iq2_xxs"}, {"overrides": [Override("token_embd", "iq1_s")]}])
def test_a_look_up_cannot_have_a_type_that_needs_importance(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"token_embd\.weight: iq\w+ needs importance, and rows that are looked up"):
        chosen("Q4_K_M", "token_embd.weight", "output.weight", importance=True, **options)


def test_what_needs_importance() -> None:
    assert [mix for mix in NAMES if needs_importance(MIXES[mix].base, MIXES[mix])] == [
        "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "IQ3_XXS",
    ]  # fmt: skip
    assert not needs_importance("q2_k", MIXES["Q2_K"])


def test_what_lacks_importance_is_known_before_the_run() -> None:
    names = ["token_embd.weight", "output.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight"]

    def lacking(mix: str, covered: set[str], **options: object) -> list[str]:
        shapes = dict.fromkeys(names, SQUARE)
        choices = choose(MIXES[mix], shapes, LLAMA, **{"importance": True, **options})  # type: ignore[arg-type]
        return lacking_importance(choices, MIXES[mix], covered)

    assert lacking("Q4_K_M", set()) == []
    assert lacking("IQ2_XXS", {"blk.0.attn_q.weight"}) == ["blk.1.attn_q.weight"]
    assert lacking("Q2_K_S", {"blk.0.attn_q.weight"}) == ["blk.1.attn_q.weight"]  # its embedding is exempt
    assert lacking("Q4_K_M", set(), output="iq2_xs") == ["output.weight"]
    assert lacking("Q4_K_M", set(), output="iq3_xxs") == []


def test_names_of_mixes() -> None:
    assert find_mix("q4_k_m") is find_mix("Q4_K") is find_mix("15") is MIXES["Q4_K_M"]
    assert find_mix("IQ2_S").base == "iq2_xs"  # llama.cpp's names are off by one here
    assert len({mix.file_type for mix in MIXES.values()}) == len(NAMES) == 35
    assert all(mix.base in WEIGHT_TYPES and mix.summary for mix in MIXES.values())
    with pytest.raises(UsageError, match="unknown GGUF type 'Q4_K_X'"):
        find_mix("Q4_K_X")


def test_the_syntax_of_tensor_type_files() -> None:
    text = "attn_V=Q6_K  \\.\\d\\D=iq4_xs\n\n\tffn_(?=up)=bf16"
    assert parse_tensor_types(text) == [
        Override("attn_V", "q6_k"), Override("\\.\\d\\D", "iq4_xs"), Override("ffn_(?=up)", "bf16"),
    ]  # fmt: skip
    assert parse_tensor_types("") == []
    assert str(Override("attn_V", "q6_k")) == "attn_V=q6_k"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn_v", "'attn_v' is no rule for a tensor's type"),
        ("=q4_0", "'=q4_0' is no rule for a tensor's type"),
        ("attn_v=", "'attn_v=' is no rule for a tensor's type"),
        ("attn_v=q4_q", "unknown GGML type 'q4_q'"),
        ("attn_v=i32", "unknown GGML type 'i32'"),
        ("attn[=q4_0", r"'attn\[=q4_0': unterminated character set"),
    ],
)
def test_broken_rules_are_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_tensor_types(f"ok=q4_0 {text}")


def test_types_are_known_in_any_case() -> None:
    assert parse_type("Q4_k") == "q4_k"


def test_rules_that_fit_nothing_are_known() -> None:
    rules = [*parse_tensor_types("attn_q=q4_0 attn_x=q4_0 .=q8_0"), Override("blk.0.attn", "q4_0", exact=True)]
    assert unmatched(rules, ["blk.0.attn_q.weight"]) == [rules[1], rules[3]]


def test_the_types_of_an_existing_file_as_rules() -> None:
    types = {"token_embd.weight": "Q6_K", "blk.0.attn_q.weight": "iq4_xs", "blk.0.table": "i32"}
    rules = from_gguf(types)
    assert rules == [
        Override("token_embd.weight", "q6_k", exact=True), Override("blk.0.attn_q.weight", "iq4_xs", exact=True),
    ]  # fmt: skip
    names = ["token_embd.weight", "output.weight", "blk.0.attn_q.weight"]
    assert chosen("Q4_K_M", *names, overrides=rules) == ["q6_k", "q6_k", "iq4_xs"]
    first = [*parse_tensor_types("attn=q8_0"), *rules]
    assert chosen("Q4_K_M", *names, overrides=first) == ["q6_k", "q6_k", "q8_0"]
    assert chosen("Q4_K_M", *names, overrides=[*rules, *parse_tensor_types(".=q8_0")]) == ["q6_k", "q8_0", "iq4_xs"]
