"""Tokenizers from Hugging Face files to GGUF headers and back, without llama.cpp (tests/peers has it)."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vocabularies
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from vocabularies import HARD, MARKED, save

from quantize.errors import InputError, UsageError
from quantize.formats.gguf import pretokenizers
from quantize.formats.gguf.container import read_part
from quantize.formats.gguf.merges import differing, pairs_of, scores_of, unreached
from quantize.formats.gguf.metadata import Value, floats, integers, text, texts
from quantize.formats.gguf.pretokenizers import NAMES, find_name, pre_tokenizer, steps, takes_whole
from quantize.formats.gguf.sentencepiece_model import read_model
from quantize.formats.gguf.special_tokens import Frame, read_frame
from quantize.formats.gguf.tokenizer import save_tokenizer
from quantize.formats.gguf.vocabulary import TokenizerMetadata, tokenizer_metadata

GGML = "tokenizer.ggml."
KNOWN = [name for name in NAMES if pre_tokenizer(name) is not None]
WRITTEN = [name for family in pretokenizers._FAMILIES for names in (family.merging, family.whole) for name in names[:1]]


# --- how text is split


@pytest.mark.parametrize("name", KNOWN)
def test_a_definition_gives_a_name_that_splits_so(name: str) -> None:
    found = find_name(pre_tokenizer(name), whole=takes_whole(name), bos=True)
    assert pre_tokenizer(found) == pre_tokenizer(name)
    assert takes_whole(found) == takes_whole(name)


def test_no_two_families_are_one() -> None:
    assert len(pretokenizers._BY_STEPS) == len(pretokenizers._FAMILIES)
    assert all(find_name(pre_tokenizer(name), whole=takes_whole(name), bos=True) == name for name in WRITTEN)


def split(expression: str, **more: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False} | more


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    "node",
    [
        split(LLAMA3),
        split(LLAMA3, behavior="Removed", invert=True),
        split(LLAMA3.replace(r"\p{L}\p{N}]?", r"\p{L}\p{N}]?+").replace(r"{1,3}", "{1,3}+")),
        split(LLAMA3.removesuffix(r"|\s+")),
        split(LLAMA3.replace(r"\r\n", "\r\n")),
        split(LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")),
        split(LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)",
                             "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")),
    ],
)  # fmt: skip
def test_spellings_of_one_definition(node: dict[str, Any]) -> None:
    whole = {"type": "Sequence", "pretokenizers": [node, BYTES]}
    assert find_name(whole, whole=True, bos=True) == "llama-bpe"
    assert find_name(whole, whole=False, bos=True) == "dbrx"
    assert find_name(whole, whole=True, bos=False) == "glm4"
    assert find_name(whole, whole=False, bos=False) == "chatglm-bpe"


def test_steps_that_differ_stay_apart() -> None:
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert steps({"type": "Sequence", "pretokenizers": [digits, gpt2]}) == steps(pre_tokenizer("smollm"))
    assert steps({"type": "Sequence", "pretokenizers": [split(r"\p{N}"), gpt2]}) == steps(pre_tokenizer("smollm"))
    assert steps(gpt2) != steps({"type": "Sequence", "pretokenizers": [{**digits, "individual_digits": False}, gpt2]})
    assert steps(split("a")) != steps(split("a", behavior="Removed")) != steps(split("a", behavior="MergedWithNext"))
    assert steps(None) == ()


def test_an_unknown_definition_is_shown_and_never_guessed(tmp_path: Path) -> None:
    made = vocabularies.byte_level("gpt-2", size=300)
    files = save(made, tmp_path)
    held = json.loads(files["tokenizer.json"].read_text())
    held["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split(r"\p{Thai}+"), BYTES]}
    files["tokenizer.json"].write_text(json.dumps(held))
    with pytest.raises(InputError, match=r"no pre-tokenizer of llama\.cpp splits.*\\p\{Thai\}\+") as caught:
        tokenizer_metadata(files, {}, 400)
    assert "--pre NAME" in str(caught.value.hint)
    assert "qwen2" in str(caught.value.hint)
    assert tokenizer_metadata(files, {}, 400, pre="qwen2").metadata[GGML + "pre"] == text("qwen2")
    with pytest.raises(UsageError, match="'qwen3' is no pre-tokenizer") as wrong:
        tokenizer_metadata(files, {}, 400, pre="qwen3")
    assert "qwen2" in str(wrong.value.hint)


def test_whole_pieces_against_merged_ones_is_told_only_where_it_matters(tmp_path: Path) -> None:
    files = save(vocabularies.byte_level("gpt-2", size=300), tmp_path)
    held = json.loads(files["tokenizer.json"].read_text())
    held["model"]["ignore_merges"] = True
    files["tokenizer.json"].write_text(json.dumps(held))
    assert not tokenizer_metadata(files, {"eos_token_id": 0}, 400).notices
    held["model"]["vocab"]["zqxj"] = 399
    files["tokenizer.json"].write_text(json.dumps(held))
    (notice,) = tokenizer_metadata(files, {"eos_token_id": 0}, 400).notices
    assert "1 tokens differ" in notice


# --- from Hugging Face files to a header


def tiny(folder: Path, **changes: Any) -> dict[str, Path]:
    """A byte-level tokenizer of 260 tokens: 256 bytes, one merge, BOS, EOS, and one that is not special."""
    held = json.loads(vocabularies.byte_level("gpt-2", size=259).to_str()) | changes
    settings = changes.pop("settings", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(held))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabularies.files(folder)


def test_types_and_rows(tmp_path: Path) -> None:
    files = tiny(tmp_path)
    size = 260
    found = tokenizer_metadata(files, {}, size + 2).metadata
    assert found[GGML + "model"] == text("gpt2")
    tokens, types = found[GGML + "tokens"].data, found[GGML + "token_type"].data
    assert tokens[:3] == vocabularies.SPECIAL
    assert types[:3] == [3, 3, 3]
    assert set(types[3 : size - 1]) == {1}
    assert (tokens[size - 1], types[size - 1]) == ("<tool_call>", 4)
    assert (tokens[size:], types[size:]) == (["[PAD260]", "[PAD261]"], [5, 5])
    assert GGML + "scores" not in found
    with pytest.raises(InputError, match=r"tokens 258 '.*', 259 '<tool_call>', the embedding has 258 rows"):
        tokenizer_metadata(files, {}, 258)
    with pytest.raises(InputError, match=r" and 15 more, the embedding has 240 rows"):
        tokenizer_metadata(files, {}, 240)


@pytest.mark.parametrize("special", [True, False])
def test_ids_are_written_whatever_the_flags_say(tmp_path: Path, special: bool) -> None:
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}] * special
                + [{"Sequence": {"id": "A", "type_id": 0}}]}  # fmt: skip
    settings = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "add_bos_token": False}
    found = tokenizer_metadata(tiny(tmp_path, post_processor=template, settings=settings), {}, 260)
    assert found.metadata[GGML + "bos_token_id"].data == 1
    assert found.metadata[GGML + "eos_token_id"].data == 2
    assert found.metadata[GGML + "add_bos_token"].data is special
    assert found.metadata[GGML + "add_eos_token"].data is False
    assert any("add_bos_token is False" in notice for notice in found.notices) == special


def test_flags_without_a_post_processor(tmp_path: Path) -> None:
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True}
    found = tokenizer_metadata(tiny(tmp_path / "a", post_processor=None, settings=settings), {}, 260).metadata
    assert (found[GGML + "add_bos_token"].data, found[GGML + "add_eos_token"].data) == (True, False)
    found = tokenizer_metadata(tiny(tmp_path / "b", post_processor=None), {}, 260).metadata
    assert (found[GGML + "add_bos_token"].data, found[GGML + "add_eos_token"].data) == (False, False)


def test_what_is_really_put_around_a_text_wins(tmp_path: Path) -> None:
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}, "single": [
        {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]}  # fmt: skip
    found = tokenizer_metadata(tiny(tmp_path, post_processor=template), {}, 260)
    assert found.metadata[GGML + "eos_token_id"].data == 0
    assert found.metadata[GGML + "eot_token_id"].data == 2
    assert found.metadata[GGML + "add_eos_token"].data is True
    assert any("the eos token is <|endoftext|>" in notice for notice in found.notices)


def test_ids_from_the_config_and_of_generation(tmp_path: Path) -> None:
    files = tiny(tmp_path, settings={})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7], "suppress_tokens": [5]}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<tool_call>"}}')
    files = vocabularies.files(tmp_path)
    found = tokenizer_metadata(files, {"text_config": {"bos_token_id": 1}, "mask_token_id": 999}, 260)
    ids = {key.removeprefix(GGML): value.data for key, value in found.metadata.items() if key.endswith("_id")}
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 259, "eot_token_id": 2, "eom_token_id": 7}
    assert found.metadata[GGML + "suppress_tokens"] == integers([5])
    assert any("mask token 999" in notice for notice in found.notices)


def test_infill_tokens_by_their_text(tmp_path: Path) -> None:
    made = vocabularies.byte_level("qwen2", size=300)
    made.add_special_tokens(["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|file_sep|>"])
    found = tokenizer_metadata(save(made, tmp_path), {}, 400).metadata
    ids = {key: value.data for key, value in found.items() if "fim_" in key}
    assert {key.removeprefix(GGML + "fim_").removesuffix("_token_id") for key in ids} == {
        "pre",
        "mid",
        "suf",
        "pad",
        "sep",
    }
    assert all(made.id_to_token(number) is not None for number in ids.values())


@pytest.mark.parametrize(
    ("processor", "frame"),
    [
        (None, None),
        ({"type": "ByteLevel"}, Frame()),
        ({"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}, Frame(("<s>",), ("</s>",), pairs=True)),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, {
            "type": "TemplateProcessing", "special_tokens": {"B": {"id": "B", "tokens": ["<b>"], "ids": [0]}},
            "single": [{"SpecialToken": {"id": "B"}}, {"SpecialToken": {"id": "C"}}, {"Sequence": {"id": "A"}}],
        }]}, Frame(("<b>", "C"))),
        ({"type": "TemplateProcessing", "single": []}, Frame()),
    ],
)  # fmt: skip
def test_frames(processor: Any, frame: Frame | None) -> None:
    assert read_frame(processor) == frame


def test_both_forms_of_merges(tmp_path: Path) -> None:
    files = tiny(tmp_path)
    held = json.loads(files["tokenizer.json"].read_text())
    first = tokenizer_metadata(files, {}, 260).metadata
    held["model"]["merges"] = [" ".join(pair) for pair in held["model"]["merges"]]
    files["tokenizer.json"].write_text(json.dumps(held))
    assert tokenizer_metadata(files, {}, 260).metadata == first
    held["model"]["merges"] = [["a b", " c"]]
    files["tokenizer.json"].write_text(json.dumps(held))
    assert tokenizer_metadata(files, {}, 260).metadata[GGML + "merges"] == texts(["aĠb Ġc"])
    for broken in (["ab"], [["", "b"]], [" b"]):
        held["model"]["merges"] = broken
        files["tokenizer.json"].write_text(json.dumps(held))
        with pytest.raises(InputError, match="broken merge"):
            tokenizer_metadata(files, {}, 260)


def test_files_of_older_kinds(tmp_path: Path) -> None:
    """vocab.json and merges.txt, and vocab.txt: transformers makes the definition."""
    made = vocabularies.byte_level("gpt-2", size=300)
    held = json.loads(made.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(held["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in held["merges"]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    found = tokenizer_metadata(vocabularies.files(tmp_path), {"model_type": "gpt2"}, 320).metadata
    assert found[GGML + "pre"] == text("gpt-2")
    assert found[GGML + "merges"] == texts(" ".join(pair) for pair in held["merges"])

    (folder := tmp_path / "bert").mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    config = {"model_type": "bert"}
    found = tokenizer_metadata(vocabularies.files(folder), config, 8).metadata
    assert found[GGML + "tokens"].data == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁a", "b", "[PAD7]"]
    assert [found[f"{GGML}{n}_token_id"].data for n in ("bos", "seperator", "padding", "unknown", "mask")] == [
        2,
        3,
        0,
        1,
        4,
    ]
    assert found[GGML + "normalizer.lowercase"].data is True


def test_a_sentencepiece_file_alone_says_what_its_definition_says(tmp_path: Path) -> None:
    for kind, made, folder in (("bpe", vocabularies.llama2(), "a"), ("unigram", vocabularies.t5(), "b")):
        files = save(made, tmp_path / folder)
        (tmp_path / folder / "tokenizer.model").write_bytes(vocabularies.sentencepiece(kind))
        alone = {"tokenizer.model": tmp_path / folder / "tokenizer.model"}
        plain = tokenizer_metadata(alone, {}, 1500).metadata
        both = tokenizer_metadata(vocabularies.files(tmp_path / folder), {}, 1510).metadata
        first = tokenizer_metadata(files, {}, 1510).metadata
        keys = ["model", "add_space_prefix"] + ["precompiled_charsmap", "remove_extra_whitespaces"] * (kind != "bpe")
        assert all(plain[GGML + key] == both[GGML + key] == first[GGML + key] for key in keys)
        assert plain[GGML + "tokens"].data == both[GGML + "tokens"].data[:1500] == first[GGML + "tokens"].data[:1500]
        held = vocabularies.pieces(kind)
        normal = [number for number, (_, _, piece) in enumerate(held) if piece == 1]
        assert [plain[GGML + "scores"].data[n] for n in normal] == [held[n][1] for n in normal]
        assert plain[GGML + "token_type"].data == [piece for _, _, piece in held]


def test_scores_of_merges_keep_the_order_of_the_model_file(tmp_path: Path) -> None:
    found = tokenizer_metadata(save(vocabularies.llama2(), tmp_path), {}, 1510)
    scores = dict(zip(found.metadata[GGML + "tokens"].data, found.metadata[GGML + "scores"].data, strict=True))
    made = [
        name for name, _, kind in sorted(vocabularies.pieces("bpe"), key=lambda p: -p[1]) if kind == 1 and len(name) > 1
    ]
    assert sorted(made, key=lambda name: -scores[name]) == made
    assert not any("merges" in notice for notice in found.notices)


def test_a_model_file_of_other_ids_does_not_rule(tmp_path: Path) -> None:
    made = json.loads(vocabularies.llama2().to_str())
    vocab = made["model"]["vocab"]
    vocab["▁a"], vocab["▁t"] = vocab["▁t"], vocab["▁a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    (tmp_path / "tokenizer.model").write_bytes(vocabularies.sentencepiece("bpe"))
    found = tokenizer_metadata(vocabularies.files(tmp_path), {}, 1510).metadata
    assert found[GGML + "tokens"].data.index("▁a") == vocab["▁a"]


def test_a_file_called_tokenizer_model_may_be_another(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert read_model(tmp_path / "tokenizer.model") is None
    (tmp_path / "tokenizer.model").write_bytes(vocabularies.sentencepiece("bpe")[:2000])
    assert read_model(tmp_path / "tokenizer.model") is None
    with pytest.raises(InputError, match="No such file"):
        read_model(tmp_path / "absent")


def test_merges_that_follow_no_score_are_told(tmp_path: Path) -> None:
    held = json.loads(vocabularies.llama2().to_str())
    held["model"]["merges"] = held["model"]["merges"][1:] + held["model"]["merges"][:1]
    del held["model"]["merges"][5]
    (tmp_path / "tokenizer.json").write_text(json.dumps(held))
    found = tokenizer_metadata(vocabularies.files(tmp_path), {}, 1510)
    assert any("follow no score" in notice for notice in found.notices)


def test_added_tokens_that_a_header_cannot_describe_are_told(tmp_path: Path) -> None:
    held = json.loads(vocabularies.llama2().to_str())
    entry = dict(held["added_tokens"][-1])
    assert not tokenizer_metadata(save(vocabularies.llama2(), tmp_path), {}, 1510).notices
    for number, (content, more) in enumerate({
        "<|end|>": {"rstrip": True, "special": True}, "<mask>": {"lstrip": True, "special": True},
        "<tool>": {"normalized": True},
    }.items()):  # fmt: skip
        held["added_tokens"].append(entry | {"id": 1501 + number, "content": content} | more)
    (tmp_path / "tokenizer.json").write_text(json.dumps(held))
    beside, behind = tokenizer_metadata(vocabularies.files(tmp_path), {}, 1510).notices
    assert beside.startswith("<|end|>: the tokenizer looks at what stands beside")
    assert behind.startswith("<tool>: found by the tokenizer behind a space only")


def test_gemma4_keeps_its_merges(tmp_path: Path) -> None:
    made = vocabularies.llama2()
    made.add_special_tokens(["<|tool_call>"])
    found = tokenizer_metadata(save(made, tmp_path), {"model_type": "gemma4_text"}, 1510).metadata
    assert found[GGML + "model"] == text("gemma4")
    assert len(found[GGML + "merges"].data) == len(json.loads(made.to_str())["model"]["merges"])
    where = found[GGML + "tokens"].data.index("<|tool_call>")
    assert found[GGML + "token_type"].data[where] == 4  # shown in the output, where programs read it
    assert GGML + "scores" not in found


def test_rwkv(tmp_path: Path) -> None:
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("1 '\\x00' 1\n2 b'\\xff' 1\n3 'é\\n' 3\n4 ' a b' 4\n")
    found = tokenizer_metadata(vocabularies.files(tmp_path), {}, 6).metadata
    assert found[GGML + "tokens"].data == ["<s>", r"\x00", r"\xff", r"\xc3\xa9\n", " a b", "[PAD5]"]
    assert found["tokenizer.chat_template"] == text("rwkv-world")
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("1 spam 4\n")
    with pytest.raises(InputError, match="a broken line: '1 spam 4'"):
        tokenizer_metadata(vocabularies.files(tmp_path), {}, 6)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    found = tokenizer_metadata({}, {}, 8)
    assert found.metadata == {GGML + "model": text("none")}
    assert found.notices


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "no JSON"),
        ("{}", "holds no 'model'"),
        ('{"model": {"type": "WordLevel", "vocab": {}}}', "of kind WordLevel"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "ByteLevel"},'
         ' "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": [{"id": 1, "content": "a"}]}', "both 'a'"),
    ],
)  # fmt: skip
def test_broken_definitions(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=match):
        tokenizer_metadata(vocabularies.files(tmp_path), {}, 8)


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'plamo2' is no kind"):
        tokenizer_metadata(tiny(tmp_path), {}, 260, model="plamo2")


def test_files_that_make_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(InputError, match=r"no tokenizer can be made of tekken\.json"):
        tokenizer_metadata(vocabularies.files(tmp_path), {"model_type": "mistral"}, 8)


# --- chat templates


def templates(folder: Path, **contents: Any) -> TokenizerMetadata:
    files = tiny(folder, settings={"eos_token": "<|im_end|>", **contents.pop("settings", {})})
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        files[path.relative_to(folder).as_posix()] = path
    return tokenizer_metadata(files, {}, 260)


def chat(found: TokenizerMetadata) -> dict[str, Any]:
    return {k.removeprefix("tokenizer."): v.data for k, v in found.metadata.items() if "chat_template" in k}


def test_a_template_from_any_of_its_places(tmp_path: Path) -> None:
    assert chat(templates(tmp_path / "a", chat_template_dot_jinja="J")) == {"chat_template": "J"}
    assert chat(templates(tmp_path / "b", settings={"chat_template": "C"})) == {"chat_template": "C"}
    assert chat(templates(tmp_path / "c", chat_template_dot_json='{"chat_template": "O"}')) == {"chat_template": "O"}
    listed = [{"name": "default", "template": "D"}, {"name": "tool use", "template": "T"}]
    expected = {"chat_template": "D", "chat_templates": ["tool_use"], "chat_template.tool_use": "T"}
    assert chat(templates(tmp_path / "d", settings={"chat_template": listed})) == expected
    more = {"chat_template_dot_jinja": "J", "additional_chat_templates__rag_dot_jinja": "R"}
    expected = {"chat_template": "J", "chat_templates": ["rag"], "chat_template.rag": "R"}
    assert chat(templates(tmp_path / "e", **more)) == expected
    assert chat(templates(tmp_path / "f")) == {}


def test_the_first_of_two_templates_wins_and_the_other_is_told(tmp_path: Path) -> None:
    found = templates(tmp_path / "a", chat_template_dot_jinja="J", settings={"chat_template": "C"})
    assert chat(found) == {"chat_template": "J"}
    (notice,) = found.notices
    assert "taken from chat_template.jinja, another in tokenizer_config.json" in notice
    found = templates(tmp_path / "b", chat_template_dot_jinja="J\n", settings={"chat_template": "J"})
    assert not found.notices
    with pytest.raises(InputError, match="no JSON"):
        templates(tmp_path / "c", chat_template_dot_json="{")


# --- and back


def read_back(found: TokenizerMetadata, folder: Path, arch: str = "llama") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = vocabularies.write_gguf(folder / "model.gguf", found.metadata, arch)
    (back := folder / "back").mkdir()
    save_tokenizer(read_part(path), back)
    return back


MADE: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: vocabularies.byte_level("gpt-2"),
    "llama-bpe": lambda: vocabularies.byte_level("llama-bpe", bos=True),
    "deepseek-llm": lambda: vocabularies.byte_level("deepseek-llm"),
    "llama": vocabularies.llama2,
    "t5": vocabularies.t5,
    "bert": vocabularies.word_piece,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "t5": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "bert": {f"{name.lower()}_token": f"[{name}]" for name in ("CLS", "SEP", "PAD", "UNK", "MASK")},
}
BYTE_LEVEL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}


@pytest.mark.parametrize("name", MADE)
def test_there_and_back_gives_the_same_ids(tmp_path: Path, name: str) -> None:
    made = MADE[name]()
    files = save(made, tmp_path / "source", **SETTINGS.get(name, BYTE_LEVEL))
    rows = made.get_vocab_size() + 5
    found = tokenizer_metadata(files, {}, rows)
    back = read_back(found, tmp_path / "file", {"bert": "bert", "t5": "t5"}.get(name, "llama"))
    rebuilt = Tokenizer.from_file(str(back / "tokenizer.json"))
    assert rebuilt.get_vocab() == made.get_vocab()
    for sample in (HARD, MARKED, "", " ", "a", "<s></s>", " x  y "):
        assert rebuilt.encode(sample).ids == made.encode(sample).ids
        assert rebuilt.decode(made.encode(sample).ids) == made.decode(made.encode(sample).ids)
    again = tokenizer_metadata(vocabularies.files(back), {}, rows)
    assert found.metadata.keys() == again.metadata.keys()
    changed = {key for key, value in found.metadata.items() if value.encode() != again.metadata[key].encode()}
    # Scores become merges and scores again: their order stays.
    assert changed <= ({GGML + "scores"} if name == "llama" else set())
    assert not again.notices


@pytest.mark.parametrize("name", ["gpt-2", "bert"])
def test_transformers_reads_what_is_written(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    made = MADE[name]()
    found = tokenizer_metadata(save(made, tmp_path / "source", **SETTINGS.get(name, BYTE_LEVEL)), {}, 2000)
    back = read_back(found, tmp_path / "file", "bert" if name == "bert" else "llama")
    (back / "config.json").write_text('{"model_type": "llama"}')
    loaded = AutoTokenizer.from_pretrained(back)
    assert loaded(HARD)["input_ids"] == made.encode(HARD).ids
    assert len(loaded) == made.get_vocab_size()
    assert loaded.model_max_length == 512
    if name == "gpt-2":
        assert (loaded.bos_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")
        assert loaded.chat_template == "{{ messages }}"
    else:
        assert loaded("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
        assert (loaded.cls_token, loaded.sep_token, loaded.mask_token) == ("[CLS]", "[SEP]", "[MASK]")


def vocab_only(**more: Value) -> TokenizerMetadata:
    found = {
        "model": text("gpt2"), "pre": text("gpt-2"), "tokens": texts(["a", "b", "ab", "<end>"]),
        "token_type": integers([1, 1, 1, 3]), "merges": texts(["a b"]),
    } | {key.replace("__", "."): value for key, value in more.items()}  # fmt: skip
    return TokenizerMetadata({GGML + key: value for key, value in found.items()})


def test_unused_and_empty_tokens(tmp_path: Path) -> None:
    tokens = texts(["a", "", "[PAD2]", "[PAD9]"])
    back = read_back(vocab_only(tokens=tokens, token_type=integers([1, 1, 5, 5]), merges=texts(["a a", "x"])), tmp_path)
    held = json.loads((back / "tokenizer.json").read_text())
    assert held["model"]["vocab"] == {"a": 0, "[EMPTY_1]": 1, "[PAD9]": 3}
    assert held["model"]["merges"] == []


def test_tokens_that_end_a_text_are_special_whatever_their_type(tmp_path: Path) -> None:
    back = read_back(vocab_only(tokens=texts(["a", "b", "ab", "<|im_end|>"]), token_type=integers([1] * 4)), tmp_path)
    (added,) = json.loads((back / "tokenizer.json").read_text())["added_tokens"]
    assert (added["content"], added["special"]) == ("<|im_end|>", True)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"pre": text("afmoe")}, r"tokenizer\.ggml\.pre is 'afmoe': how it splits"),
        ({"model": text("plamo2")}, "kind 'plamo2', which cannot be read yet"),
        ({"tokens": texts(["a", "a", "b", "c"])}, "the same token twice"),
        ({"token_type": integers([1])}, "token_type holds 1 values for 4 tokens"),
        ({"model": text("llama"), "scores": floats([0.0])}, "scores holds 1 values for 4 tokens"),
        ({"model": text("t5"), "precompiled_charsmap": integers([255, 255, 255, 0, 1, 2, 3, 4])}, "truncated"),
        ({"model": text("bert"), "normalizer__lowercase": Value(text("").kind, "x")}, None),
    ],
)
def test_hostile_headers(tmp_path: Path, more: dict[str, Value], match: str | None) -> None:
    if match is None:
        read_back(vocab_only(**more), tmp_path)
        return
    with pytest.raises(InputError, match=match):
        read_back(vocab_only(**more), tmp_path)


def test_template_names_stay_in_their_folder(tmp_path: Path) -> None:
    found = vocab_only()
    found.metadata["tokenizer.chat_template.../../../x"] = text("{{ x }}")
    back = read_back(found, tmp_path)
    (file,) = (back / "additional_chat_templates").iterdir()
    assert file.name == "_________x.jinja"


def test_a_header_without_tokens(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = vocabularies.write_gguf(tmp_path / "m.gguf", {GGML + "model": text("none")})
    save_tokenizer(read_part(path), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    path = vocabularies.write_gguf(tmp_path / "n.gguf", {GGML + "model": text("gpt2"), GGML + "pre": text("gpt-2")})
    with pytest.raises(InputError, match="lacks the array"):
        save_tokenizer(read_part(path), tmp_path / "out")


# --- merges and scores


def merged_by_scores(sample: str, scores: dict[str, float]) -> list[str]:
    """The definition, slowly: the neighbours with the best score together are merged, the leftmost of equal ones."""
    parts = list(sample)
    while True:
        best = [(-scores[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not best:
            return parts
        at = min(best)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(st.randoms(use_true_random=False), st.integers(2, 40))
def test_merges_of_scores_merge_as_scores_do(rng: random.Random, count: int) -> None:
    names = {"".join(rng.choices("abc", k=rng.randint(2, 4))) for _ in range(count)}
    # Distinct scores, and no token that overlaps with itself, whose cuts would tie.
    scores = dict.fromkeys("abc", -1e6) | {
        name: -float(rank)
        for rank, name in enumerate(rng.sample(sorted(names), len(names)))
        if len(set(name)) == len(name)
    }
    pairs = pairs_of(scores)
    merger = models.BPE(vocab={name: n for n, name in enumerate(scores)}, merges=pairs)
    sample = "".join(rng.choices("abc", k=30))
    assert [token.value for token in merger.tokenize(sample)] == merged_by_scores(sample, scores)
    assert differing(dict.fromkeys(scores, 0), pairs, set()) is None
    order = scores_of(pairs)
    assert sorted(order, key=lambda n: -order[n]) == [n for n in sorted(scores, key=lambda n: -scores[n]) if n in order]


def test_what_differs() -> None:
    vocab = dict.fromkeys(("a", "b", "c", "ab", "bc", "abc"), 0)
    assert differing(vocab, [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], set()) is None
    assert differing(vocab, [("a", "b"), ("b", "c"), ("ab", "c")], set()) == "abc"
    assert differing(vocab, [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")], set()) == "abc"
    ids = {name: number for number, name in enumerate(vocab)}
    assert unreached(ids, [("a", "b"), ("b", "c")], set()) == 1
    assert unreached(ids, [("a", "b"), ("b", "c")], {"abc"}) == 0
