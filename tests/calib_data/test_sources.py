"""Sources: files of every kind, bad rows, and what the bundled text promises."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.calib_data import Document, documents, read_text
from quantize.calib_data.sources import PIECE, bundled, mixed, pieces
from quantize.errors import InputError

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, content: str) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode())
        return str(path)

    return written


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# Plain text


@given(st.text(alphabet=st.sampled_from("ab \t\r\n\u2028\ufeffé𝄞"), max_size=200), st.integers(1, 12))
def test_pieces_join_to_the_text(text: str, size: int) -> None:
    parts = list(pieces(io.StringIO(text, newline=""), size))
    assert "".join(parts) == text
    assert all(1 <= len(part) <= size for part in parts)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one\n\n\ntwo\nthree four", "one\n\n\n"),
        ("one\n \n  two\nthree", "one\n \n"),
        ("one\r\n\r\ntwo three four", "one\r\n\r\n"),
        ("one two\nthree four", "one two\n"),
        ("one two three four", "one two"),
        ("onetwothreefour", "onetwothreef"),
    ],
)
def test_pieces_are_cut_where_it_hurts_least(text: str, first: str) -> None:
    assert next(pieces(io.StringIO(text, newline=""), 12)) == first


def test_plain_text_is_preserved_and_streamed(write: Write) -> None:
    text = "\n" * 9000 + "Ünï\r\n\r\n" + "word " * 5000 + "\n\nlast line without end"
    file = write("book.md", text)
    found = list(documents(file))
    assert "".join(d.text or "" for d in found) == text == read_text(file)
    assert [d.continues for d in found] == [False] + [True] * (len(found) - 1)
    assert max(len(d.text or "") for d in found) <= PIECE
    assert len(read_text(file, limit=10_000)) < 3 * PIECE


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json"):
        content = "hi" if name == "a.txt" else '["hi"]' if name == "a.json" else '"hi"\n'
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert list(documents(str(tmp_path / name))) == [Document(text="hi")]


# Rows


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ("a text", Document(text="a text")),
        ({"text": "a text", "messages": None}, Document(text="a text")),
        ({"content": "a text"}, Document(text="a text")),
        ([3, 1, 4], Document(ids=[3, 1, 4])),
        ({"input_ids": [3, 1, 4], "attention_mask": [1, 1, 1]}, Document(ids=[3, 1, 4])),
        ({"messages": CHAT, "text": "<rendered>"}, Document(messages=CHAT)),
        ({"messages": [{**CHAT[0], "name": "x"}, CHAT[1]]}, Document(messages=CHAT)),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
            Document(messages=CHAT),
        ),
        ({"prompt": "Hi", "response": "Hello."}, Document(messages=CHAT)),
        ({"instruction": "Hi", "input": "", "output": "Hello."}, Document(messages=CHAT)),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Document(messages=CHAT)),
        ({"prompt": "Hi"}, Document(messages=CHAT[:1])),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            Document(messages=[{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
            Document(messages=CHAT[:1]),
        ),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows(write: Write, name: str, row: object, document: Document) -> None:
    assert list(documents(write(name, lines(row) if name == "rows.jsonl" else json.dumps([row])))) == [document]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("17", "neither a string, a list nor an object"),
        ("null", "neither a string, a list nor an object"),
        ("{}", "no text in its columns: none"),
        ('{"label": 1, "text": null}', "no text in its columns: label, text"),
        ('{"text": 5}', "text is expected, not 5"),
        ('{"text": "\\ud83d"}', "its text holds half of a surrogate pair"),
        ("[1, -2]", "token ids are whole numbers"),
        ("[1, true]", "token ids are whole numbers"),
        ('["a"]', "token ids are whole numbers"),
        ('{"input_ids": "12"}', "token ids are whole numbers"),
        ('{"messages": "hi"}', "its turns are no list"),
        ('{"messages": ["hi"]}', "a turn is no object"),
        ('{"messages": [{"content": "hi"}]}', "a turn names no role"),
        ('{"messages": [{"role": "user"}]}', "text is expected, not None"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "text is expected, not None"),
    ],
)
def test_a_bad_row_is_named(write: Write, line: str, complaint: str) -> None:
    file = write("rows.jsonl", f'"good"\n\n{line}\n')
    stream = documents(file)
    assert next(stream) == Document(text="good")
    with pytest.raises(InputError, match=re.escape(f"{file}, line 3: {complaint}")):
        next(stream)


def test_blank_rows_are_left_out_but_count_in_the_whole_text(write: Write) -> None:
    file = write("rows.jsonl", lines({"text": ""}, {"text": " = A = \n"}, {"text": ""}, {"text": " b \n"}))
    assert [d.text for d in documents(file)] == [" = A = \n", " b \n"]
    assert read_text(file) == "\n\n = A = \n\n\n\n\n b \n"


def test_the_whole_text_of_chats_and_ids(write: Write) -> None:
    assert read_text(write("rows.jsonl", lines({"messages": CHAT}))) == "User: Hi\nAssistant: Hello."
    with pytest.raises(InputError, match="holds token ids, not text"):
        read_text(write("ids.jsonl", lines([1, 2])))


def test_json_may_hold_a_list_or_one_row_a_line(write: Write) -> None:
    assert [d.text for d in documents(write("a.json", '\n[{"text": "a"},\n "b"]'))] == ["a", "b"]
    assert [d.text for d in documents(write("b.json", '{"text": "a"}\n"b"\n'))] == ["a", "b"]
    with pytest.raises(InputError, match="row 2: "):
        list(documents(write("c.json", '["a", 2]')))
    with pytest.raises(InputError, match="not valid JSON"):
        list(documents(write("d.json", '["a", ')))


def test_parquet(tmp_path: Path, write: Write) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file = str(tmp_path / "rows.parquet")
    texts = [f"text {n}" for n in range(600)]
    pq.write_table(pa.table({"picture": [b"\xff"] * 600, "text": texts}), file)
    assert [d.text for d in documents(file)] == texts
    pq.write_table(pa.table({"messages": [CHAT, None], "text": [None, "b"]}), file)
    assert list(documents(file)) == [Document(messages=CHAT), Document(text="b")]
    pq.write_table(pa.table({"text": ["a", None]}), file)
    with pytest.raises(InputError, match=r"rows.parquet, row 2: no text in its columns: text"):
        list(documents(file))
    pq.write_table(pa.table({"label": [1]}), file)
    with pytest.raises(InputError, match="no text in its columns: label"):
        list(documents(file))
    whole = Path(file).read_bytes()
    for broken in ("no parquet", "", whole[: len(whole) // 2].decode("latin-1")):
        with pytest.raises(InputError, match="broken"):
            list(documents(write("broken.parquet", broken)))


# What cannot be read


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_holds_no_text(write: Write, name: str, content: str) -> None:
    file = write(name, content)
    for read in (list, lambda stream: read_text(file)):
        with pytest.raises(InputError, match=re.escape(f"{file}: holds no text")):
            read(documents(file))


def test_refusals_come_with_the_call(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as missing:
        documents("defualt")
    assert "hub:NAME" in missing.value.hint
    with pytest.raises(InputError, match="a folder, not a text") as folder:
        documents(str(tmp_path))
    assert ".jsonl" in folder.value.hint
    for source, complaint in [
        ("", "a folder, not a text"),
        ("a\0b", "null"),
        ("a" * 5000, "too long"),
        (f"{__file__}/x", "Not a directory"),
        ("self", "written by the model"),
        ("default:test", "default:test: the bundled text has no such part"),
        ("default:", "default:: the bundled text has no such part"),
        ("hub:", "names no data set"),
        ("hub:@config", "names no data set"),
    ]:
        with pytest.raises(InputError, match=complaint):
            documents(source)


@pytest.mark.parametrize(("name", "good"), [("a.txt", b"good\n"), ("a.jsonl", b'"good"\n'), ("a.json", b'"a"\n')])
def test_other_encodings_are_named(tmp_path: Path, name: str, good: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(good + b'"caf\xe9"\n')
    with pytest.raises(InputError, match=re.escape(f"{file}, line 2: not valid UTF-8")):
        list(documents(str(file)))


# Order


def test_a_seed_shuffles_rows_but_no_text(write: Write) -> None:
    rows = [f"row {n}" for n in range(3000)]
    file = write("rows.jsonl", lines(*rows))

    def order(seed: int) -> list[str | None]:
        return [d.text for d in documents(file, seed=seed)]

    assert order(0) == rows
    assert order(1) == order(1) != order(2)
    assert order(1) != rows
    assert sorted(map(str, order(1))) == sorted(rows)
    book = write("book.txt", "word " * 5000)
    assert list(documents(book, seed=1)) == list(documents(book))


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.text(max_size=30), max_size=8), max_size=4))
def test_any_prefix_of_a_mixture_is_fair(texts: dict[str, list[str]]) -> None:
    kinds = {kind: [Document(text=f"{kind}{text}") for text in found] for kind, found in texts.items()}
    check_fair(kinds, list(mixed(kinds)))


def check_fair(kinds: dict[str, list[Document]], order: list[Document]) -> None:
    """At any moment, what two kinds have given of themselves differs by no more than one document."""
    sizes = {id(d): len(d.plain().encode()) for stored in kinds.values() for d in stored}
    kind_of = {id(d): kind for kind, stored in kinds.items() for d in stored}
    totals = {kind: sum(sizes[id(d)] for d in stored) for kind, stored in kinds.items() if stored}
    step = max((max(sizes[id(d)] for d in kinds[kind]) / totals[kind] for kind in totals), default=0)
    given_so_far = dict.fromkeys(totals, 0)
    assert sorted(map(id, order)) == sorted(sizes)
    for document in order:
        given_so_far[kind_of[id(document)]] += sizes[id(document)]
        shares = [given_so_far[kind] / totals[kind] for kind in totals]
        assert max(shares) - min(shares) <= step + 1e-9


# The bundled text

KINDS = ["code", "data", "dialogue", "languages", "math", "prose"]


@pytest.mark.parametrize(("part", "least"), [("train", 165_000), ("eval", 40_000)])
def test_bundled_text_has_all_kinds_and_is_large_enough(part: str, least: int) -> None:
    kinds = bundled(part)
    assert list(kinds) == KINDS
    assert not any(document.blank for stored in kinds.values() for document in stored)
    assert sum(len(d.plain().encode()) for stored in kinds.values() for d in stored) >= least
    assert all(d.messages for d in kinds["dialogue"])
    assert all(d.text for kind in KINDS if kind != "dialogue" for d in kinds[kind])


@pytest.mark.parametrize("part", ["train", "eval"])
def test_any_prefix_of_the_bundled_text_is_a_fair_mix(part: str) -> None:
    kinds = bundled(part)
    check_fair(kinds, list(mixed(kinds)))


def test_default_is_the_train_part_and_stays_the_same() -> None:
    train = list(documents("default"))
    assert train == list(documents("default:train")) == list(documents("default", seed=0))
    assert train == list(mixed(bundled("train")))
    assert list(documents("default:eval")) == list(mixed(bundled("eval")))
    other = list(documents("default", seed=1))
    assert other != train
    assert sorted(map(repr, other)) == sorted(map(repr, train))
    assert len(set(map(kind_of_train(), islice(documents("default", seed=1), 12)))) >= 5


def kind_of_train() -> Callable[[Document], str]:
    table = {repr(d): kind for kind, stored in bundled("train").items() for d in stored}
    return lambda document: table[repr(document)]


def test_no_separator_and_no_turn_marker_is_left_in_the_bundled_text() -> None:
    for part in ("train", "eval"):
        for document in documents(f"default:{part}"):
            assert "%%" not in document.plain().split("\n")
            assert "<|im_start|>" not in document.plain()


def test_train_and_eval_share_no_sentence() -> None:
    def sentences(part: str) -> set[str]:
        text = "\n".join(d.plain() for d in documents(f"default:{part}"))
        parts = re.split(r"(?<=[.!?。！？])\s+|\n+", text)
        return {s for part in parts if len(s := " ".join(part.split())) >= 60}

    train, held_out = sentences("train"), sentences("eval")
    assert len(train) > 500
    assert len(held_out) > 100
    assert train & held_out == set()
