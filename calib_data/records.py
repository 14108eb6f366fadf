"""Documents, and how one is read out of a row of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantize.errors import InputError

# The columns that are understood; the first that is filled wins. A chat comes before its rendering as text.
CHATS = ("messages", "conversations")
TEXTS = ("text", "content")
IDS = ("input_ids",)
PROMPTS = ("prompt", "instruction", "question")
ADDITIONS = ("input",)
ANSWERS = ("response", "output", "completion", "answer")
COLUMNS = CHATS + TEXTS + IDS + PROMPTS + ADDITIONS + ANSWERS

# Who speaks, in the words of older chat collections and in those of chat templates.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_HINT = "a row is a string, token ids, or an object with 'text', 'messages', or 'prompt' and 'response'"


@dataclass(frozen=True, slots=True)
class Document:
    """One text, one chat, or one list of token ids; exactly one of the three is set.

    Attributes:
        text: A text as it stands.
        messages: The turns of a chat, each with the keys `role` and `content`.
        ids: Token ids, from 0.
        continues: The text goes on where the document before it stopped; nothing belongs between the two.
    """

    text: str | None = None
    messages: list[dict[str, str]] | None = None
    ids: list[int] | None = None
    continues: bool = False

    @property
    def blank(self) -> bool:
        """Whether there is nothing in it but white space."""
        return not (self.ids or self.messages or (self.text or "").strip())

    def plain(self) -> str:
        """Returns the text, or a chat as lines `Role: content`.

        Raises:
            ValueError: it holds token ids.
        """
        if self.ids is not None:
            raise ValueError("holds token ids, not text")
        if self.messages is not None:
            return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in self.messages)
        return self.text or ""


def from_row(row: object, where: str) -> Document:
    """Returns the document in one row of a data set; a row may hold an empty text.

    Args:
        row: A string, a list of token ids, or an object with some of `COLUMNS`; a column that is None does
            not count.
        where: The file and line, for the error.

    Raises:
        InputError: the row holds nothing that is understood.
    """
    try:
        return _parse(row)
    except ValueError as error:
        raise InputError(f"{where}: {error}", _HINT) from None


def _parse(row: object) -> Document:
    if isinstance(row, str):
        return Document(text=_text(row))
    if isinstance(row, list):
        return Document(ids=_ids(row))
    if not isinstance(row, dict):
        raise ValueError("neither a string, a list nor an object")
    if (chat := _first(row, CHATS)) is not None:
        return Document(messages=_messages(chat))
    if (text := _first(row, TEXTS)) is not None:
        return Document(text=_text(text))
    if (ids := _first(row, IDS)) is not None:
        return Document(ids=_ids(ids))
    if (prompt := _first(row, PROMPTS)) is not None:
        turns = _turns(prompt, "user")
        if addition := _first(row, ADDITIONS):
            turns[-1]["content"] += f"\n\n{_text(addition)}"
        answer = _first(row, ANSWERS)
        return Document(messages=turns if answer is None else turns + _turns(answer, "assistant"))
    raise ValueError(f"no text in its columns: {', '.join(map(str, row)) or 'none'}")


def _first(row: Mapping[object, object], names: tuple[str, ...]) -> object:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"text is expected, not {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise ValueError("its text holds half of a surrogate pair") from None
    return value


def _ids(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError("token ids are whole numbers from 0")
    return value


def _turns(value: object, role: str) -> list[dict[str, str]]:
    """Returns one side of an exchange as turns; some collections keep turns there already."""
    if isinstance(value, list) and value:
        return _messages(value)
    return [{"role": role, "content": _text(value)}]


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise ValueError("its turns are no list")
    return [_message(turn) for turn in value]


def _message(turn: object) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise ValueError("a turn is no object")
    role = _first(turn, ("role", "from"))
    if not isinstance(role, str):
        raise ValueError("a turn names no role")
    content = _first(turn, ("content", "value"))
    if isinstance(content, list):  # parts, as models that also see pictures take them
        content = "".join(_text(part.get("text") if isinstance(part, dict) else part) for part in content)
    return {"role": _ROLES.get(role.lower(), role), "content": _text(content)}
