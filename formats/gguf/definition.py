"""A header's vocabulary as a Hugging Face `tokenizer.json`.

The arrays of a header say less than a `tokenizer.json`; what they leave out is what llama.cpp does with them, so that
both give the same ids. Where llama.cpp only comes near to the definition that its name stands for (see
`pretokenizers`), the definition is what is written: the model was made with it.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantize.errors import InputError
from quantize.formats.gguf.container import Part
from quantize.formats.gguf.merges import Pair, pairs_of
from quantize.formats.gguf.pretokenizers import pre_tokenizer, starts_with_bos, takes_whole
from quantize.formats.gguf.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from quantize.formats.gguf.special_tokens import ENDS

_SPACE = "▁"
# What llama.cpp assumes where a header names no id, by kind.
_IDS = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "bert": {"bos": 101, "unknown": 100, "seperator": 102, "padding": 0, "mask": 103},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
}
# Names under which bytes stay apart and spaces are marked, as the kind gemma4 has it.
_MARKED = ("gemma4", "granite-embed-multi-311m", "sarvam-moe")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a header says of its tokens.

    Attributes:
        part: The file.
        kind: llama.cpp's name of its kind.
        pre: And of how it splits text.
        texts: Text of each token.
        types: Type of each token, those set right that llama.cpp knows by their text.
    """

    part: Part
    kind: str
    pre: str
    texts: list[str]
    types: list[int]

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a value of the header by its key's end."""
        return self.part.metadata.get(f"tokenizer.ggml.{key}", default)

    def special(self, name: str) -> str | None:
        """Returns the text of the token with a task, or None."""
        number = self.get(f"{name}_token_id", _IDS.get(self.kind, {}).get(name))
        return self.texts[number] if isinstance(number, int) and 0 <= number < len(self.texts) else None

    def puts(self, name: str) -> bool:
        """Returns whether the token `bos` or `eos` is put around a text."""
        if self.kind == "bert" or (name == "bos" and self.pre in _MARKED[:2]):
            return True
        assumed = {"llama": ("bos",), "t5": ("eos",)}.get(self.kind, ("bos",) if starts_with_bos(self.pre) else ())
        return bool(self.get(f"add_{name}_token", name in assumed))

    def known(self) -> dict[str, int]:
        """Returns the ids by text, without the tokens that only fill rows of the embedding."""
        pairs = enumerate(zip(self.texts, self.types, strict=True))
        return {text: number for number, (text, kind) in pairs if kind != UNUSED or text != f"[PAD{number}]"}


def read_vocabulary(part: Part) -> Vocabulary | None:
    """Returns a header's vocabulary, or None when it has none.

    Raises:
        InputError: it is broken, or of a kind that cannot be read.
    """
    kind = part.metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    pre = str(part.metadata.get("tokenizer.ggml.pre")) if kind == "gpt2" else ""  # of no meaning to the others
    if kind == "gemma4" or (kind == "gpt2" and pre in _MARKED):
        kind, pre = "gemma4", pre or "gemma4"
    if kind not in _MODELS:
        raise InputError(f"{part.file}: its tokenizer is of kind '{kind}', which cannot be read yet")
    if kind == "gpt2" and pre_tokenizer(pre) is None:
        what = f"tokenizer.ggml.pre is '{pre}': how it splits text is not known"
        raise InputError(f"{part.file}: {what}", "use the model it was made from")
    texts = [text or f"[EMPTY_{number}]" for number, text in enumerate(part.array("tokenizer.ggml.tokens"))]
    types = _array(part, "token_type", len(texts), NORMAL)
    if len(set(texts)) != len(texts):
        raise InputError(f"{part.file}: its vocabulary has the same token twice")
    types = [CONTROL if text in ENDS and kind == NORMAL else kind for text, kind in zip(texts, types, strict=True)]
    return Vocabulary(part, str(kind), pre, texts, types)


def _array(part: Part, name: str, count: int, default: float) -> list[Any]:
    """Returns one number for each token."""
    key = f"tokenizer.ggml.{name}"
    if key not in part.metadata:
        return [default] * count
    values = part.array(key)
    if len(values) < count or not all(isinstance(value, int | float) for value in values):
        raise InputError(f"{part.file}: {key} holds {len(values)} values for {count} tokens")
    return values[:count]


def definition(held: Vocabulary) -> dict[str, Any]:
    """Returns the content of the `tokenizer.json`."""
    made = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(held), "normalizer": None,
            "pre_tokenizer": None, "post_processor": _around(held), "decoder": None}  # fmt: skip
    return made | _MODELS[held.kind](held)


def _added(held: Vocabulary) -> list[dict[str, Any]]:
    return [
        {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != USER_DEFINED}
        for number, (text, kind) in enumerate(zip(held.texts, held.types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]  # fmt: skip


def _around(held: Vocabulary) -> dict[str, Any] | None:
    """Returns the `post_processor` that puts BOS and EOS around a text."""
    bos = held.special("bos") if held.puts("bos") else None
    eos = held.special("seperator" if held.kind == "bert" else "eos") if held.puts("eos") else None
    if bos is None and eos is None:
        if held.kind != "gpt2":
            return None
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}

    def one(name: str, number: int) -> list[dict[str, Any]]:
        starts = [] if held.kind == "bert" and name == "B" else [bos]
        parts: list[dict[str, Any]] = [{"SpecialToken": {"id": t, "type_id": number}} for t in starts if t is not None]
        parts.append({"Sequence": {"id": name, "type_id": number}})
        return parts + ([{"SpecialToken": {"id": eos, "type_id": number}}] if eos is not None else [])

    ids = {text: held.texts.index(text) for text in (bos, eos) if text is not None}
    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1 if held.kind in ("bert", "gpt2", "llama") else 0),
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in ids.items()},
    }


def _bpe(held: Vocabulary, pairs: list[Pair], **more: Any) -> dict[str, Any]:
    """Returns a `model` that merges; pairs whose text is no token are left out, because the library has none."""
    vocab = held.known()
    merges = [[left, right] for left, right in pairs if left in vocab and right in vocab and left + right in vocab]
    settings = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}  # fmt: skip
    return {"type": "BPE", **settings, **more, "vocab": vocab, "merges": merges}


def _pairs(held: Vocabulary) -> list[Pair]:
    """Returns a header's merges: two parts, and a space between, which a part may have as its first letter."""
    found = []
    for merge in held.part.array("tokenizer.ggml.merges"):
        cut = merge.find(" ", 1)
        if cut > 0:
            found.append((merge[:cut], merge[cut + 1 :]))
    return found


def _byte_level(held: Vocabulary) -> dict[str, Any]:
    return {
        "pre_tokenizer": pre_tokenizer(held.pre),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(held, _pairs(held), ignore_merges=takes_whole(held.pre)),
    }


def _marks(*more: dict[str, Any]) -> dict[str, Any]:
    """Returns the decoder of tokens in which marks stand for spaces."""
    first = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {"type": "Sequence", "decoders": [first, {"type": "ByteFallback"}, {"type": "Fuse"}, *more]}


_SPACES_TO_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}


def _sentencepiece(held: Vocabulary) -> dict[str, Any]:
    spaced = bool(held.get("add_space_prefix", True))
    scores = _array(held.part, "scores", len(held.texts), 0.0)
    # What is found in the text before it is merged makes no merge.
    merged = {
        text: float(score)
        for text, score, kind in zip(held.texts, scores, held.types, strict=True)
        if kind not in (CONTROL, UNKNOWN, USER_DEFINED, BYTE)
    }
    return {
        # Every space becomes its mark, one more goes in front, and nothing is split before merging.
        "normalizer": {"type": "Sequence", "normalizers": [*([_PREPEND] if spaced else []), _SPACES_TO_MARKS]},
        "decoder": _marks(*([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spaced else [])),
        "model": _bpe(held, pairs_of(merged), unk_token=held.special("unknown"), fuse_unk=True, byte_fallback=True),
    }


def _gemma4(held: Vocabulary) -> dict[str, Any]:
    lines = {"type": "Split", "pattern": {"Regex": r"\n+"}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": _SPACES_TO_MARKS,
        "pre_tokenizer": lines,
        "decoder": _marks(),
        "model": _bpe(held, _pairs(held), unk_token=held.special("unknown"), fuse_unk=True, byte_fallback=True),
    }


def _unigram(held: Vocabulary) -> dict[str, Any]:
    squeeze, spaced = bool(held.get("remove_extra_whitespaces")), bool(held.get("add_space_prefix"))
    steps: list[dict[str, Any]] = []
    if "tokenizer.ggml.precompiled_charsmap" in held.part.metadata:
        compiled = bytes(value & 255 for value in held.part.array("tokenizer.ggml.precompiled_charsmap"))
        if len(compiled) < 8 or struct.unpack_from("<I", compiled)[0] + 4 > len(compiled):
            raise InputError(f"{held.part.file}: its precompiled_charsmap is truncated")
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(compiled).decode()})
    if squeeze:
        steps += [
            {"type": "Replace", "pattern": {"Regex": " +$"}, "content": ""},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": _SPACE},
        ]
    elif spaced:
        steps.append(_PREPEND)  # also where the text starts with a space, which the next step would take for it
    scheme = "always" if squeeze or spaced else "never"
    marks = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}
    # As float32 holds them, not as their shortest decimals: llama.cpp adds these up in double precision too.
    scores = np.asarray(_array(held.part, "scores", len(held.texts), 0.0), dtype=np.float32).tolist()
    wanted = [
        [text, 0.0 if kind == USER_DEFINED else score]
        for text, score, kind in zip(held.texts, scores, held.types, strict=True)
    ]
    while wanted and held.types[len(wanted) - 1] == UNUSED and wanted[-1][0] == f"[PAD{len(wanted) - 1}]":
        wanted.pop()
    unknown = held.special("unknown")
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": marks,
        "decoder": marks,
        "model": {
            "type": "Unigram",
            "unk_id": None if unknown is None else held.texts.index(unknown),
            "vocab": wanted,
            "byte_fallback": held.types.count(BYTE) == 256,
        },
    }


def _word_piece(held: Vocabulary) -> dict[str, Any]:
    lower = bool(held.get("normalizer.lowercase", True))
    accents = bool(held.get("normalizer.strip_accents", lower))
    vocab = {}
    for number, (text, kind) in enumerate(zip(held.texts, held.types, strict=True)):
        if kind == UNUSED and text == f"[PAD{number}]":
            continue
        if kind in (NORMAL, UNUSED):
            text = text[1:] if text.startswith(_SPACE) else f"##{text}"
        vocab[text] = number
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": accents,
                  "lowercase": lower}  # fmt: skip
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": held.special("unknown") or "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }


_MODELS: dict[str, Callable[[Vocabulary], dict[str, Any]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "gemma4": _gemma4,
    "t5": _unigram,
    "bert": _word_piece,
}
