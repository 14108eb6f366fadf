"""Calibration rows: their length, openings, separators, chats, mixtures, and texts that are too short."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.calib_data import token_rows
from quantize.errors import InputError, UsageError

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}<|end|>\n{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>"]
BOS, EOS, START, END = range(4)
Build = Callable[..., Any]


@pytest.fixture(scope="session")
def build() -> Build:
    """Builds a tokenizer whose ids are the special tokens, then the bytes: id 4 + b."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def built(*, bos: bool = True, eos: str | None = "</s>", template: str | None = TEMPLATE) -> Any:
        symbols = pre_tokenizers.ByteLevel.alphabet()
        byte_of = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        assert sorted(byte_of) == sorted(symbols)
        vocabulary = {token: i for i, token in enumerate(SPECIAL)} | {s: 4 + b for s, b in byte_of.items()}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token=eos,
            chat_template=template,
            model_max_length=16,
        )

    return built


def _byte_symbols() -> list[str]:
    """The character of each byte in a byte-level vocabulary: itself if visible, else from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


def codes(text: str) -> list[int]:
    return [4 + byte for byte in text.encode()]


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def plain(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def test_rows_are_the_text_without_padding(build: Build, tmp_path: Path) -> None:
    file = plain(tmp_path / "a.txt", "abcdefghij")
    rows = token_rows([file], build(), rows=3, length=4)
    assert rows.ids.dtype == torch.int64
    assert rows.ids.tolist() == [[BOS, *codes("abc")], [BOS, *codes("def")], [BOS, *codes("ghi")]]
    assert rows.sources == (file,)
    assert rows.special_tokens == 3
    assert rows.notices == ()
    assert rows.sha256 == hashlib.sha256(rows.ids.numpy().astype("<i8").tobytes()).hexdigest()


def test_no_opening_where_the_tokenizer_adds_none(build: Build, tmp_path: Path) -> None:
    rows = token_rows([plain(tmp_path / "a.txt", "abcdefgh")], build(bos=False), rows=2, length=4)
    assert rows.ids.tolist() == [codes("abcd"), codes("efgh")]
    assert rows.special_tokens == 0


def test_whatever_the_tokenizer_puts_in_front_opens_a_row(build: Build, tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = build()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> <s> $A </s>", special_tokens=[("<|start|>", START), ("<s>", BOS), ("</s>", EOS)]
    )
    rows = token_rows([plain(tmp_path / "a.txt", "abcd")], tokenizer, rows=2, length=4)
    assert rows.ids.tolist() == [[START, BOS, *codes("ab")], [START, BOS, *codes("cd")]]


def test_documents_are_separated_but_pieces_of_a_text_are_not(build: Build, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "a.jsonl", "ab", "", {"text": "cd"}, "ef")
    expected = [*codes("ab"), EOS, *codes("cd"), EOS, *codes("ef")]
    assert token_rows([rows], build(bos=False), rows=1, length=8).ids.tolist() == [expected]
    assert token_rows([rows], build(bos=False, eos=None), rows=1, length=6).ids.tolist() == [codes("abcdef")]
    text = "word word\n\n" * 2000
    book = plain(tmp_path / "b.txt", text)
    ids = token_rows([book], build(bos=False), rows=1, length=len(text)).ids
    assert ids.tolist() == [codes(text)]
    # The same as one long row of a data set.
    assert torch.equal(
        ids, token_rows([jsonl(tmp_path / "b.jsonl", text)], build(bos=False), rows=1, length=len(text)).ids
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff<"), min_size=1),
    st.integers(2, 9),
)
def test_rows_join_to_the_text(build: Build, tmp_path: Path, text: str, length: int) -> None:
    expected = codes(text)
    count = len(expected) // (length - 1)
    file = plain(tmp_path / "a.txt", text)
    if count == 0 or not text.strip():
        with pytest.raises(InputError):
            token_rows([file], build(), rows=max(count, 1), length=max(length, len(expected) + 2))
        return
    ids = token_rows([file], build(), rows=count, length=length).ids
    assert ids.shape == (count, length)
    assert ids[:, 0].tolist() == [BOS] * count
    assert ids[:, 1:].flatten().tolist() == expected[: count * (length - 1)]


def test_special_tokens_written_in_a_text_are_parsed_and_counted(build: Build, tmp_path: Path) -> None:
    file = plain(tmp_path / "a.txt", "<|start|>user Hi<|end|>")
    rows = token_rows([file], build(bos=False), rows=1, length=9)
    assert rows.ids.tolist() == [[START, *codes("user Hi"), END]]
    assert rows.special_tokens == 2


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


def test_chats_go_through_the_template(build: Build, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", CHAT)
    turns = [START, *codes("user Hi"), END, *codes("\n"), START, *codes("assistant Yo"), END, *codes("\n")]
    rows = token_rows([file], build(), rows=1, length=1 + len(turns))
    # The template writes a beginning token, the row has one of its own: only one is left.
    assert rows.ids.tolist() == [[BOS, *turns]]
    assert rows.special_tokens == 5
    assert rows.notices == ()
    # A tokenizer that adds none keeps the template's.
    assert token_rows([file], build(bos=False), rows=1, length=1 + len(turns)).ids.tolist() == [[BOS, *turns]]


def test_a_chat_that_closes_with_the_end_token_gets_no_second_one(build: Build, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"})
    turn = [START, *codes("user a"), END, *codes("\n")]
    rows = token_rows([file], build(eos="<|end|>"), rows=1, length=1 + 2 * len(turn))
    assert rows.ids.tolist() == [[BOS, *turn, START, *codes("user b"), END, *codes("\n")]]
    rows = token_rows([file], build(eos="</s>"), rows=1, length=2 + len(turn))
    assert rows.ids.tolist() == [[BOS, *turn, EOS]]


def test_chats_without_a_template_become_lines_with_one_notice(build: Build, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", CHAT, CHAT)
    text = "User: Hi\nAssistant: Yo"
    rows = token_rows([file], build(template=None), rows=2, length=1 + len(text))
    assert rows.ids.tolist() == [[BOS, *codes(text)], [BOS, EOS, *codes(text[:-1])]]
    assert rows.notices == (f"{file}: 2 chats as plain lines: the tokenizer has no chat template",)


def test_a_template_may_refuse_system_turns(build: Build, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "system", "content": "S"}, *CHAT["messages"]]}
    file = jsonl(tmp_path / "a.jsonl", chat)
    start = [START, *codes("user S\n\nHi"), END]
    rows = token_rows([file], build(template=NO_SYSTEM), rows=1, length=1 + len(start))
    assert rows.ids.tolist() == [[BOS, *start]]
    assert rows.notices == (f"{file}: 1 chat with the system turn in the next: the template takes none",)
    never = "{{ raise_exception('roles must alternate') }}"
    rows = token_rows([file], build(template=never), rows=1, length=5)
    assert rows.ids.tolist() == [[BOS, *codes("Syst")]]
    assert rows.notices == (f"{file}: 1 chat as plain lines: the chat template says 'roles must alternate'",)


def test_token_ids_are_taken_as_they_are(build: Build, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [BOS, 9, 8], {"input_ids": [7, 6]})
    assert token_rows([file], build(), rows=1, length=6).ids.tolist() == [[BOS, 9, 8, EOS, 7, 6]]


def test_sources_mix_evenly(build: Build, tmp_path: Path) -> None:
    files = [plain(tmp_path / f"{letter}.txt", letter * 100) for letter in "abc"]
    rows = token_rows(files, build(), rows=7, length=5)
    assert rows.ids[:, 1].tolist() == codes("abcabca")
    assert all(len(set(row[1:])) == 1 for row in rows.ids.tolist())
    assert rows.sources == tuple(files)


def test_too_little_text_says_how_much_there_is(build: Build, tmp_path: Path) -> None:
    file, long = plain(tmp_path / "a.txt", "abcdefgh"), plain(tmp_path / "b.txt", "x" * 100)
    with pytest.raises(InputError) as error:
        token_rows([file], build(), rows=5, length=5)
    assert error.value.message == f"calibration text '{file}' gives 2 of 5 rows of 5 tokens"
    assert error.value.hint == "add a source, or lower --calib-samples to 2 or --calib-length"
    # In a mixture the sample count that works is that of all sources.
    with pytest.raises(InputError) as error:
        token_rows([long, file], build(), rows=9, length=5)
    assert error.value.message == f"calibration text '{file}' gives 2 of 4 rows of 5 tokens"
    assert error.value.hint == "add a source, or lower --calib-samples to 5 or --calib-length"
    assert token_rows([long, file], build(), rows=5, length=5).ids.shape == (5, 5)
    with pytest.raises(InputError) as error:
        token_rows([file], build(), rows=1, length=500)
    assert error.value.hint == "add a source, or lower --calib-length"


def test_empty_and_missing_sources(build: Build, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no text"):
        token_rows([plain(tmp_path / "a.txt", "")], build(), rows=1, length=4)
    with pytest.raises(InputError, match="no such file"):
        token_rows(["default", str(tmp_path / "b.txt")], build(), rows=1, length=4)
    for sources, rows, length in [([], 1, 4), (["default"], 0, 4), (["default"], 1, 1)]:
        with pytest.raises(UsageError):
            token_rows(sources, build(), rows=rows, length=length)


def test_no_more_is_read_than_needed(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('"abcdefgh"\n' * 3 + "{broken\n", encoding="utf-8")
    assert token_rows([str(file)], build(), rows=4, length=6).ids.shape == (4, 6)
    with pytest.raises(InputError, match="line 4"):
        token_rows([str(file)], build(), rows=6, length=6)


def test_same_call_same_rows_and_a_seed_changes_them(build: Build) -> None:
    def digest(seed: int) -> str:
        return token_rows(["default"], build(), rows=8, length=256, seed=seed).sha256

    assert digest(0) == digest(0)
    assert digest(1) == digest(1) != digest(0)


def test_default_text_fills_rows_of_bytes(build: Build) -> None:
    rows = token_rows(["default", "default:eval"], build(template=None), rows=16, length=2048)
    assert rows.ids.shape == (16, 2048)
    assert [notice.split(":")[0] for notice in rows.notices] == ["default", "default"]


def test_no_warning_about_long_texts(build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        file = jsonl(tmp_path / "a.jsonl", "word " * 50, {"prompt": "word " * 50})
        token_rows([file], build(), rows=2, length=100)
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert caplog.records == []
