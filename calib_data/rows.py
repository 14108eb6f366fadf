"""Calibration rows: documents as token ids, cut into rows of one length without any padding."""

from __future__ import annotations

import hashlib
import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from quantize.calib_data.records import Document
from quantize.calib_data.sources import documents, pieces
from quantize.errors import InputError, UsageError


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The rows that calibration runs on.

    Attributes:
        ids: Token ids, int64 `[rows, length]`; every one belongs to the text, none is padding.
        sources: Where row r comes from: `sources[r % len(sources)]`.
        sha256: Hex digest of `ids` as little-endian int64, row by row.
        special_tokens: How many of the ids are special tokens: openings, separators, marks of chat turns.
        notices: What the user should know about the text, one line each.
    """

    ids: Tensor
    sources: tuple[str, ...]
    sha256: str
    special_tokens: int
    notices: tuple[str, ...] = ()


def token_rows(sources: Sequence[str], tokenizer: Any, *, rows: int, length: int, seed: int = 0) -> CalibrationText:
    """Returns rows of tokens; row r comes from source r % n, and no more is read than the rows need.

    The documents of a source follow one another, with the tokenizer's end token between them. A long text is
    tokenized in pieces of some 8000 characters. A chat goes through the tokenizer's template, or is written
    as lines `Role: content`, with a notice, where there is none or it refuses. A row opens with what the
    tokenizer itself puts in front of a text (the beginning token, or nothing); an opening that a document
    brings along is dropped.

    Args:
        sources: At least one, spelt as in `documents`.
        tokenizer: A tokenizer of transformers. That its ids suit the model is for the caller to check.
        rows: How many rows, at least 1.
        length: Tokens per row, the opening included.
        seed: As in `documents`.

    Raises:
        UsageError: no source, no row, or a length with no room for text.
        InputError: a source gives too few rows, or cannot be read.
    """
    opening = _opening(tokenizer)
    if not sources:
        raise UsageError("no calibration text is named", "name one: --calib default")
    if rows < 1:
        raise UsageError(f"--calib-samples {rows} leaves no text", "at least 1 is needed")
    if length <= len(opening):
        raise UsageError(f"--calib-length {length} leaves no text", f"at least {len(opening) + 1} is needed")
    streams = [_Stream(source, tokenizer, opening, seed) for source in sources]
    cut = [stream.rows(length) for stream in streams]
    table: list[list[int]] = []
    for r in range(rows):
        place = r % len(sources)
        row = next(cut[place], None)
        if row is None:
            wanted = len(range(place, rows, len(sources)))
            raise _too_little(sources[place], r // len(sources), wanted, length, enough_for=r)
        table.append(row)
    ids = torch.tensor(table, dtype=torch.int64)
    return CalibrationText(
        ids=ids,
        sources=tuple(sources),
        sha256=hashlib.sha256(ids.numpy().astype("<i8", copy=False).tobytes()).hexdigest(),
        special_tokens=int(torch.isin(ids, torch.tensor(_special_ids(tokenizer), dtype=torch.int64)).sum()),
        notices=tuple(notice for stream in streams for notice in stream.notices()),
    )


def _too_little(source: str, got: int, wanted: int, length: int, *, enough_for: int) -> InputError:
    message = f"calibration text '{source}' gives {got} of {wanted} rows of {length} tokens"
    fewer = f"--calib-samples to {enough_for} or " if enough_for else ""
    return InputError(message, f"add a source, or lower {fewer}--calib-length")


class _Stream:
    """The token ids of one source; counts what had to be done to its chats."""

    def __init__(self, source: str, tokenizer: Any, opening: list[int], seed: int) -> None:
        self.source = source
        self.documents = documents(source, seed=seed)
        self.tokenizer = tokenizer
        self.opening = opening
        self.untemplated = 0  # chats written as lines because there is no template
        self.merged = 0  # chats whose system turn went into the next one
        self.refused = 0  # chats written as lines because the template refuses them
        self.refusal = ""

    def rows(self, length: int) -> Iterator[list[int]]:
        """Yields rows of exactly `length` ids; what is left at the end is dropped."""
        stream = (i for ids in self._ids() for i in ids)
        while len(text := list(islice(stream, length - len(self.opening)))) == length - len(self.opening):
            yield self.opening + text

    def notices(self) -> list[str]:
        """Returns one line for each thing that was done to chats."""
        lines = []
        if self.untemplated:
            lines.append(f"{_chats(self.untemplated)} as plain lines: the tokenizer has no chat template")
        if self.merged:
            lines.append(f"{_chats(self.merged)} with the system turn in the next: the template takes none")
        if self.refused:
            lines.append(f"{_chats(self.refused)} as plain lines: the chat template says '{self.refusal}'")
        return [f"{self.source}: {line}" for line in lines]

    def _ids(self) -> Iterator[list[int]]:
        end = self.tokenizer.eos_token_id
        last: list[int] = []
        for document in self.documents:
            # A chat often closes with the end token and a line end of its own.
            if last and end is not None and not document.continues and end not in last[-2:]:
                yield [end]
            last = []
            for ids in self._encode(document):
                yield ids
                last = ids or last

    def _encode(self, document: Document) -> Iterator[list[int]]:
        """Yields the ids of a document, without an opening of its own."""
        if document.text is not None:
            parts: Iterable[list[int]] = map(self._tokenize, pieces(io.StringIO(document.text, newline="")))
        else:
            parts = [self._chat(document) if document.ids is None else document.ids]
        for number, ids in enumerate(parts):
            opened = number == 0 and self.opening and ids[: len(self.opening)] == self.opening
            yield ids[len(self.opening) :] if opened else ids

    def _tokenize(self, text: str) -> list[int]:
        # verbose=False: no warning that a text is longer than the model's context, for it is cut into rows.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _chat(self, document: Document) -> list[int]:
        """Returns the ids of a chat: by the template, else without its system turn, else as lines."""
        messages = document.messages or []
        if not getattr(self.tokenizer, "chat_template", None):
            self.untemplated += 1
            return self._tokenize(document.plain())
        attempts = [messages]
        if len(messages) > 1 and messages[0]["role"] == "system":
            system, following, *others = messages
            content = f"{system['content']}\n\n{following['content']}"
            attempts.append([{**following, "content": content}, *others])
        refusal = ""
        for number, attempt in enumerate(attempts):
            try:
                ids = self._templated(attempt)
            except Exception as error:  # a template is a program of the model's author and may raise anything
                refusal = refusal or textwrap.shorten(str(error), 120, placeholder=" ...")
            else:
                self.merged += number
                return ids
        self.refused += 1
        self.refusal = self.refusal or refusal
        return self._tokenize(document.plain())

    def _templated(self, messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
        return ids


def _chats(number: int) -> str:
    return "1 chat" if number == 1 else f"{number} chats"


def _opening(tokenizer: Any) -> list[int]:
    """Returns the ids that the tokenizer puts in front of a text: its beginning token, others, or none."""
    full: list[int] = tokenizer("a").input_ids
    text: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    if text and text[0] in full:
        return full[: full.index(text[0])]
    return full[:1] if full[:1] == [tokenizer.bos_token_id] else []


def _special_ids(tokenizer: Any) -> list[int]:
    """Returns the ids of all special tokens, those of chat turns included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return sorted({*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)})
