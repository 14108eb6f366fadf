"""Tokens with a task (begin, end, padding, infill, ...) and what is put around a text, as a header states them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.formats.gguf.metadata import Value, flag, integers, u32
from quantize.formats.gguf.side_files import SideFiles

# Our name of a task, in order, and its key in the header ("seperator" is the format's spelling).
_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
# The texts by which llama.cpp finds tokens that a header does not name; here the first that exists is named, so that
# the choice does not depend on the order of a hash table.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]",
                "<end_of_utterance>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|endoftext|>")  # fmt: skip
_END_OF_MESSAGE = ("<|eom_id|>",)
# What the classes of transformers take where a tokenizer's settings name nothing, by llama.cpp's name of the kind.
_USUAL = {
    "bert": {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"},
    "t5": {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"},
    "llama": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
}
# Texts that end a generation wherever they stand in a vocabulary: such a token is special to llama.cpp.
ENDS = frozenset({*_END_OF_TURN, *_END_OF_MESSAGE, "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "[EOS]", "<eos>",
                  "<turn|>", "[e~["})  # fmt: skip
_INFILL = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Frame:
    """What a tokenizer's post-processor puts around one text.

    Attributes:
        before: Texts of the tokens before it.
        after: And behind it.
        pairs: Whether it separates two texts as BERT does.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    pairs: bool = False


def read_frame(processor: Mapping[str, Any] | None) -> Frame | None:
    """Returns what a `post_processor` puts around a text, or None where none says so."""
    if processor is None:
        return None
    kind = processor.get("type")
    if kind == "Sequence":
        found = [frame for part in processor.get("processors", []) if (frame := read_frame(part)) is not None]
        return next((frame for frame in reversed(found) if frame != Frame()), found[-1] if found else None)
    if kind in ("BertProcessing", "RobertaProcessing"):
        return Frame((processor["cls"][0],), (processor["sep"][0],), pairs=True)
    if kind != "TemplateProcessing":
        return Frame()
    names = [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in processor.get("single", [])]
    if None not in names:
        return Frame()
    middle = names.index(None)
    before, after = names[:middle], [name for name in names[middle + 1 :] if name is not None]
    known = processor.get("special_tokens", {})
    spelled = {name: (known.get(name, {}).get("tokens") or [name])[0] for name in names if name is not None}
    return Frame(tuple(spelled[n] for n in before if n is not None), tuple(spelled[n] for n in after))


def special_tokens(files: SideFiles, ids: Mapping[str, int], rows: int, kind: str) -> dict[str, Value]:
    """Returns the header's keys of the tokens with a task, and whether BOS and EOS are put around a text.

    An id is written whether or not its token is put there: chat templates and programs use it all the same.

    Args:
        files: The model's small files; what cannot be said in a header is noted with them.
        ids: Every token's id by its text in those files.
        rows: The number of the embedding's rows.
        kind: llama.cpp's name of the kind of tokenizer.
    """
    found = _named(files, ids, kind)
    frame = read_frame(files.definition.get("post_processor"))
    flags = _flags(files, found, ids, frame)
    _ends(files, found, ids)
    for name, texts in _INFILL.items():
        if (number := _first(texts, ids)) is not None:
            found[name] = number
    for name, number in list(found.items()):
        if not 0 <= number < rows:
            files.notices.append(f"the {name} token {number} has no row in the embedding and is left out")
            del found[name]
    if "eos" not in found:
        files.notices.append("no end token is named: llama.cpp takes one by its text, or its own default")
    values = {f"tokenizer.ggml.{_KEYS.get(name, name)}_token_id": u32(number) for name, number in found.items()}
    suppressed = files.generation.get("suppress_tokens")
    if isinstance(suppressed, list) and suppressed and all(isinstance(n, int) for n in suppressed):
        values["tokenizer.ggml.suppress_tokens"] = integers(suppressed)
    return values | {f"tokenizer.ggml.add_{name}_token": flag(value) for name, value in flags.items()}


def _first(texts: Sequence[str], ids: Mapping[str, int]) -> int | None:
    return next((ids[text] for text in texts if text in ids), None)


def _content(value: Any) -> str | None:
    """Returns the text of a token as JSON spells it: itself, or an object that has it."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _named(files: SideFiles, ids: Mapping[str, int], kind: str) -> dict[str, int]:
    """Returns ids by task, from the tokenizer's settings first, then from the model's."""
    config = files.config
    text_config = config.get("text_config")
    numbers = [config, text_config if isinstance(text_config, dict) else {}, files.generation]
    found: dict[str, int] = {}
    for name in (*_KEYS, "cls"):
        for held in (files.settings, files.json("special_tokens_map.json")):
            text = _content(held.get(f"{name}_token"))
            if text is not None and text in ids:
                found.setdefault(name, ids[text])
        for numbered in numbers:
            number = numbered.get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
                found.setdefault(name, number)
    unknown = files.definition.get("model", {}).get("unk_token")
    if isinstance(unknown, str) and unknown in ids:
        found.setdefault("unk", ids[unknown])
    for name, text in _USUAL.get(kind, {}).items():
        if text in ids:
            found.setdefault(name, ids[text])
    if "cls" in found:
        found.setdefault("bos", found["cls"])
    if "sep" in found:
        found.setdefault("eos", found["sep"])
    found.pop("cls", None)
    return found


def _flags(files: SideFiles, found: dict[str, int], ids: Mapping[str, int], frame: Frame | None) -> dict[str, bool]:
    """Returns whether BOS, EOS and a separator are put around a text; `found` follows what is really put there."""
    wanted = {name: files.settings.get(f"add_{name}_token") for name in ("bos", "eos")}
    said: dict[str, bool] = {name: value for name, value in wanted.items() if isinstance(value, bool)}
    if frame is None:
        # A file of sentencepiece alone leaves it to its program, whose defaults llama.cpp has too.
        return {"bos": False, "eos": False} | said if files.definition else said
    flags = {}
    for name, put in (("bos", frame.before), ("eos", frame.after)):
        token = put[0 if name == "bos" else -1] if put else None
        flags[name] = token is not None and token in ids
        if said.get(name, flags[name]) != flags[name]:
            does = "does" if flags[name] else "does not"
            files.notices.append(f"add_{name}_token is {said[name]}, but the tokenizer {does} put one: that is kept")
        if len(put) > 1:
            files.notices.append(f"of the tokens {' '.join(put)} around a text llama.cpp can put only {token}")
        if token is not None and flags[name] and found.get(name) != ids[token]:
            if name in found:
                files.notices.append(f"the {name} token is {token}, which the tokenizer puts around a text")
            if name == "eos" and name in found:
                found["eot"] = found[name]
            found[name] = ids[token]
    if frame.pairs and flags["eos"]:
        found.setdefault("sep", found["eos"])
        flags["sep"] = True
    return flags


def _ends(files: SideFiles, found: dict[str, int], ids: Mapping[str, int]) -> None:
    """Adds the tokens that end a turn and a message: those that generation ends with, else those of known texts."""
    ends = files.generation.get("eos_token_id")
    ends = [n for n in ends if isinstance(n, int)] if isinstance(ends, list) else []
    for name, texts in (("eot", _END_OF_TURN), ("eom", _END_OF_MESSAGE)):
        listed = [text for text in texts if ids.get(text) in ends]
        number = _first(listed or texts, ids)
        if number is not None:
            found.setdefault(name, number)
    for number in ends:
        taken = {found.get(name) for name in ("eos", "eot", "eom")}
        free = next((name for name in ("eot", "eom") if name not in found), None)
        if number not in taken and free is not None:
            found[free] = number
