"""Reads a `tokenizer.model` of the sentencepiece library: the parts of its protocol buffer that a header needs.

Read here because sentencepiece's own reader of it needs the protobuf package, and its processor hides the charsmap.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from quantize.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the numbers of GGUF's token types too
_UNIGRAM, _BPE = 1, 2
_Field = tuple[int, int | float | bytes]


@dataclass(slots=True)
class SentencePieceModel:
    """What a model file holds.

    Attributes:
        pieces: Text, score and type of every token, by id.
        kind: 1 for Unigram, 2 for BPE, 3 and 4 for words and characters.
        charsmap: The compiled normalisation, empty for none.
        prefix: Whether a space is put before the text.
        squeeze: Whether runs of spaces become one, and those at the ends none.
        suffix: Whether a word's space stands behind it.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    kind: int = _UNIGRAM
    charsmap: bytes = b""
    prefix: bool = True
    squeeze: bool = True
    suffix: bool = False

    @property
    def unigram(self) -> bool:
        """Whether its tokens are chosen by their probabilities."""
        return self.kind == _UNIGRAM

    @property
    def bpe(self) -> bool:
        """Whether its tokens are merged by their scores."""
        return self.kind == _BPE


def read_model(file: Path) -> SentencePieceModel | None:
    """Returns what a model file holds, or None for another file of that name (tiktoken uses it too).

    Raises:
        InputError: it cannot be read.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    try:
        model = _model(data)
    except (IndexError, ValueError, struct.error, TypeError):
        return None
    return model if model.pieces else None


def _fields(data: bytes) -> Iterator[_Field]:
    """Yields number and value of each field of a message: integers, float32, or the bytes of a nested message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 5:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif wire == 1:
            yield number, struct.unpack_from("<d", data, at)[0]
            at += 8
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field ends beyond its message")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"no wire type {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _message(value: int | float | bytes) -> dict[int, int | float | bytes]:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message should stand")
    return dict(_fields(value))


def _model(data: bytes) -> SentencePieceModel:
    model, trained = SentencePieceModel(), False
    for number, value in _fields(data):
        if number == 1:
            held = _message(value)
            text = held.get(1, b"")
            if not isinstance(text, bytes):
                raise ValueError("a piece that is no text")
            model.pieces.append((text.decode(), float(held.get(2, 0.0)), int(held.get(3, NORMAL))))
        elif number == 2:
            held, trained = _message(value), True
            model.kind, model.suffix = int(held.get(3, _UNIGRAM)), bool(held.get(24, 0))
        elif number == 3:
            held = _message(value)
            charsmap = held.get(2, b"")
            model.charsmap = charsmap if isinstance(charsmap, bytes) else b""
            model.prefix, model.squeeze = bool(held.get(3, 1)), bool(held.get(4, 1))
    if not trained:
        raise ValueError("truncated: how it was made stands behind the pieces")
    return model
