"""A Hugging Face tokenizer as the metadata of a GGUF header."""

from __future__ import annotations

import ast
import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.formats.gguf.chat_templates import chat_templates
from quantize.formats.gguf.merges import differing, scores_of, unreached
from quantize.formats.gguf.metadata import Kind, Value, flag, floats, integers, text, texts, u32
from quantize.formats.gguf.pretokenizers import check_name, find_name, steps, takes_whole
from quantize.formats.gguf.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from quantize.formats.gguf.side_files import SideFiles
from quantize.formats.gguf.special_tokens import special_tokens

_SPACE = "▁"  # stands for a space in sentencepiece's tokens
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_RWKV = "rwkv_vocab_v20230424.txt"
_KINDS = {"WordPiece": "bert", "Unigram": "t5"}
# llama.cpp shows these of Gemma 4 in its output, where a chat's tool calls are read.
_SHOWN = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
_NAMED = 5
# They take in the space before them in most models, and no one types them.
_MASKS = ("<mask>", "[MASK]")


@dataclass(frozen=True, slots=True)
class TokenizerMetadata:
    """The keys `tokenizer.*` of a header, and what a user should know of them, one sentence each."""

    metadata: dict[str, Value]
    notices: tuple[str, ...] = ()


class _Tokens:
    """The tokens by id; ids that are never put stay unused tokens of invented names."""

    def __init__(self, rows: int) -> None:
        self.texts = [f"[PAD{number}]" for number in range(rows)]
        self.types = [UNUSED] * rows
        self.scores = [_UNUSED_SCORE] * rows
        self.ids: dict[str, int] = {}  # by the text that the model's own files have
        self.beyond: dict[int, str] = {}

    def put(self, number: int, name: str, kind: int, score: float = 0.0, *, written: str | None = None) -> None:
        """Sets a token. `written` is its text in the header where that is another than in the model's files."""
        if not 0 <= number < len(self.texts):
            self.beyond[number] = name
            return
        self.ids[name] = number
        self.texts[number], self.types[number], self.scores[number] = written or name, kind, score

    def check(self) -> None:
        """Raises InputError for tokens that have no row, and for two tokens of one text."""
        if self.beyond:
            rest = f" and {len(self.beyond) - _NAMED} more" if len(self.beyond) > _NAMED else ""
            named = ", ".join(f"{number} '{self.beyond[number]}'" for number in sorted(self.beyond)[:_NAMED])
            raise InputError(
                f"the tokenizer has tokens {named}{rest}, the embedding has {len(self.texts)} rows",
                "the tokenizer is of another model, or the embedding was not extended",
            )
        seen: dict[str, int] = {}
        for number, name in enumerate(self.texts):
            if (first := seen.setdefault(name, number)) != number:
                raise InputError(f"tokens {first} and {number} are both '{name}', which llama.cpp cannot load")


def tokenizer_metadata(
    side_files: Mapping[str, Path],
    config: Mapping[str, Any],
    rows: int,
    pre: str | None = None,
    model: str | None = None,
) -> TokenizerMetadata:
    """Returns the header's keys for the tokenizer and the chat templates of a model.

    Args:
        side_files: The model's small files by name.
        config: Its `config.json`.
        rows: The number of the embedding's rows; those without a token get an unused one.
        pre: llama.cpp's name of how a byte-level vocabulary splits text; found from its definition when None.
        model: llama.cpp's name of the kind of tokenizer (`gpt2`, `llama`, `bert`, `t5`, `gemma4`, `rwkv`, `none`);
            found when None.

    Raises:
        InputError: the tokenizer is broken, of a kind that llama.cpp has not, has tokens beyond the rows, or splits
            text in a way that no name stands for.
        UsageError: `pre` is none of llama.cpp's names.
    """
    files = SideFiles(side_files, config)
    kind = model or _kind(files)
    if kind == "none":
        files.notices.append("no tokenizer beside the model: the file holds none")
        return TokenizerMetadata({"tokenizer.ggml.model": text("none")}, tuple(files.notices))
    if kind not in _MAKERS:
        raise InputError(f"'{kind}' is no kind of tokenizer that can be written: {', '.join(_MAKERS)}")
    if pre is not None:
        check_name(pre)
    tokens = _Tokens(rows)
    values = _MAKERS[kind](files, tokens, pre)
    tokens.check()
    found = {
        "tokenizer.ggml.model": text(kind),
        "tokenizer.ggml.pre": text("default"),  # of no meaning to the other kinds
        "tokenizer.ggml.tokens": texts(tokens.texts),
        "tokenizer.ggml.token_type": integers(tokens.types),
    }
    if kind in ("llama", "t5"):
        found["tokenizer.ggml.scores"] = floats(tokens.scores)
    found |= values | special_tokens(files, tokens.ids, rows, kind)
    if kind == "rwkv":
        found |= {f"tokenizer.ggml.{name}_token_id": u32(0) for name in ("bos", "eos")}
        found["tokenizer.ggml.eot_token_id"] = u32(261)  # two line ends
        found["tokenizer.chat_template"] = text("rwkv-world")
    return TokenizerMetadata(found | chat_templates(files), tuple(dict.fromkeys(files.notices)))


def _kind(files: SideFiles) -> str:
    """Returns llama.cpp's name of the kind of tokenizer, `none` for a model without one."""
    if str(files.config.get("model_type")).startswith("gemma4") and files.definition:
        return "gemma4"
    held = files.definition.get("model", {})
    if held.get("type") == "BPE":
        nodes = [files.definition.get(key) for key in ("pre_tokenizer", "decoder")]
        return "gpt2" if any(_nodes(node, "ByteLevel") for node in nodes) else "llama"
    if held:
        kind = held.get("type")
        if kind not in _KINDS:
            raise InputError(f"the tokenizer is of kind {kind}, which llama.cpp has not")
        return _KINDS[kind]
    if files.sentencepiece is not None:
        if not (files.sentencepiece.unigram or files.sentencepiece.bpe):
            raise InputError("the tokenizer.model splits into words or characters, which llama.cpp does not")
        return "t5" if files.sentencepiece.unigram else "llama"
    return "rwkv" if _RWKV in files.files else "none"


def _nodes(node: Any, kind: str) -> list[Mapping[str, Any]]:
    """Returns all nodes of one type in a normaliser, pre-tokenizer or decoder."""
    if not isinstance(node, dict):
        return []
    parts = [part for key in ("normalizers", "pretokenizers", "decoders") for part in node.get(key) or []]
    return [node] * (node.get("type") == kind) + [found for part in parts for found in _nodes(part, kind)]


def _looks_special(name: str) -> bool:
    """Returns whether a token is a control token by its look, though its files do not call it special."""
    pairs = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return name in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        name.startswith(start) and name.endswith(end) for start, end in pairs
    )


def _put_added(files: SideFiles, tokens: _Tokens, *, shown: Iterable[str] = ()) -> None:
    """Sets the added tokens; spaces in those that are not special are plain ones, as the text has them."""
    for number, (name, special) in files.added.items():
        in_range = 0 <= number < len(tokens.types)
        if in_range and tokens.types[number] == UNKNOWN and tokens.texts[number] == name:
            continue
        if (special or _looks_special(name)) and name not in shown:
            tokens.put(number, name, CONTROL, _ADDED_SCORE)
        else:
            tokens.put(number, name, USER_DEFINED, _ADDED_SCORE, written=name.replace(_SPACE, " "))
    _note_added(files)


def _note_added(files: SideFiles) -> None:
    """Notes added tokens that a header cannot describe: it has no more than their texts."""
    entries = files.definition.get("added_tokens", [])
    flags = ("lstrip", "rstrip", "single_word")
    if odd := [e["content"] for e in entries if any(e.get(key) for key in flags) and e["content"] not in _MASKS]:
        named = " ".join(odd[:_NAMED]) + (" ..." if len(odd) > _NAMED else "")
        files.notices.append(f"{named}: the tokenizer looks at what stands beside such a token, llama.cpp does not")
    prepends = _nodes(files.definition.get("normalizer"), "Prepend")
    if prepends and (odd := [e["content"] for e in entries if e.get("normalized") and not e.get("special")]):
        named = " ".join(odd[:_NAMED]) + (" ..." if len(odd) > _NAMED else "")
        files.notices.append(f"{named}: found by the tokenizer behind a space only, by llama.cpp everywhere")


def _merges(files: SideFiles) -> list[tuple[str, str]]:
    """Returns the merges as pairs, from either way in which JSON holds them."""
    pairs = []
    for merge in files.definition["model"].get("merges", []):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1) if " " in merge else ("", "")
        if not left or not right:
            raise InputError(f"the tokenizer.json has a broken merge: {merge!r}")
        pairs.append((left, right))
    return pairs


def _merge_texts(pairs: Iterable[tuple[str, str]]) -> Value:
    """Returns merges as a header holds them: a space between the two parts, and in a part U+0120 for it."""
    return texts(f"{left.replace(' ', chr(0x120))} {right.replace(' ', chr(0x120))}" for left, right in pairs)


def _byte_level(files: SideFiles, tokens: _Tokens, pre: str | None) -> dict[str, Value]:
    model, node = files.definition.get("model", {}), files.definition.get("pre_tokenizer")
    if model.get("type") != "BPE":
        raise InputError("a tokenizer of kind gpt2 needs a tokenizer.json with merges")
    for name, number in model["vocab"].items():
        tokens.put(number, name, NORMAL)
    _put_added(files, tokens)
    whole = bool(model.get("ignore_merges"))
    bos = any(held.get("bos_token") for held in (files.settings, files.json("special_tokens_map.json")))
    bos = bos or files.config.get("bos_token_id") is not None
    name = pre or find_name(node, whole=whole, bos=bos)
    pairs = _merges(files)
    if takes_whole(name) != whole and (lost := unreached(model["vocab"], pairs, files.added_texts)):
        how = "does not merge" if whole else "merges"
        files.notices.append(f"the tokenizer {how} pieces that are tokens, '{name}' is otherwise: {lost} tokens differ")
    if any(step.get("add_prefix_space") for step in _nodes(node, "ByteLevel")):
        files.notices.append("the tokenizer puts a space before the text, llama.cpp does not")
    _note_normalizer(files, allowed=("NFC",))
    return {"tokenizer.ggml.pre": text(name), "tokenizer.ggml.merges": _merge_texts(pairs)}


def _note_normalizer(files: SideFiles, allowed: tuple[str, ...]) -> None:
    """Notes a normaliser that llama.cpp has not. NFC is not worth a word: text is composed nearly always."""
    node = files.definition.get("normalizer")
    kinds = {part.get("type") for part in (node.get("normalizers", [node]) if isinstance(node, dict) else [])}
    if rest := sorted(str(kind) for kind in kinds - set(allowed)):
        files.notices.append(f"the tokenizer normalises text ({', '.join(rest)}), llama.cpp does not")


def _put_pieces(files: SideFiles, tokens: _Tokens) -> None:
    """Sets the tokens of a sentencepiece model file."""
    assert files.sentencepiece is not None
    for number, (name, score, kind) in enumerate(files.sentencepiece.pieces):
        tokens.put(number, name, kind, score, written=name.replace(_SPACE, " ") if kind == USER_DEFINED else None)


def _sentencepiece(files: SideFiles, tokens: _Tokens, pre: str | None) -> dict[str, Value]:
    model, held = files.sentencepiece, files.definition.get("model", {})
    vocabulary: dict[str, int] = held.get("vocab", {})
    if not held:
        _put_pieces(files, tokens)
        assert model is not None
        if model.charsmap:
            files.notices.append("the tokenizer normalises text by a table of its own, llama.cpp does not")
    elif model is not None and model.bpe and _agree(model.pieces, vocabulary, files):
        _put_pieces(files, tokens)
    else:
        pairs = _merges(files)
        scores = scores_of(pairs)
        for name, number in vocabulary.items():
            kind = BYTE if _BYTE.fullmatch(name) else UNKNOWN if name == held.get("unk_token") else NORMAL
            tokens.put(number, name, kind, scores.get(name, _ADDED_SCORE))
        if lost := differing(vocabulary, pairs, files.added_texts):
            what = f"llama.cpp merges '{lost}' otherwise than the tokenizer, whose merges follow no score"
            files.notices.append(f"{what}: some words may get other tokens")
    _put_added(files, tokens)
    if not held:
        assert model is not None
        return {"tokenizer.ggml.add_space_prefix": flag(model.prefix)}
    _note_normalizer(files, allowed=("Prepend", "Replace"))
    spaced = bool(_nodes(files.definition.get("normalizer"), "Prepend"))
    for node in _nodes(files.definition.get("pre_tokenizer"), "Metaspace"):
        scheme = node.get("prepend_scheme") or ("always" if node.get("add_prefix_space", True) else "never")
        spaced = spaced or scheme != "never"
        if scheme == "first":
            files.notices.append("the tokenizer puts a space before a text's start only, llama.cpp before every part")
        if node.get("split", True) and any(_SPACE in name[1:] for name in vocabulary):
            files.notices.append("the tokenizer splits before every space, llama.cpp does not")
    allowed = {"<Metaspace>", "<MergedWithPrevious \\ >", "<MergedWithPrevious  >"}
    if odd := [step for step in steps(files.definition.get("pre_tokenizer")) if step not in allowed]:
        files.notices.append(f"the tokenizer splits text before it merges ({odd[0]}), llama.cpp does not")
    return {"tokenizer.ggml.add_space_prefix": flag(spaced)}


def _agree(pieces: list[tuple[str, float, int]], vocabulary: Mapping[str, int], files: SideFiles) -> bool:
    """Returns whether a model file's tokens have the ids of the tokenizer.json, which rules."""
    added = {name: number for number, (name, _) in files.added.items()}
    known = {**added, **vocabulary}
    alike = {number: name for number, (name, _, _) in enumerate(pieces)}
    return all(alike.get(number, name) == name for name, number in known.items())


def _unigram(files: SideFiles, tokens: _Tokens, pre: str | None) -> dict[str, Value]:
    model, held = files.sentencepiece, files.definition.get("model", {})
    if not held:
        assert model is not None
        _put_pieces(files, tokens)
        _put_added(files, tokens)
        charsmap, prefix, squeeze = model.charsmap, model.prefix, model.squeeze
    else:
        for number, (name, score) in enumerate(held["vocab"]):
            kind = UNKNOWN if number == held.get("unk_id") else BYTE if _BYTE.fullmatch(name) else NORMAL
            tokens.put(number, name, kind, score)
        _put_added(files, tokens)
        normalizer, node = files.definition.get("normalizer"), files.definition.get("pre_tokenizer")
        compiled = _nodes(normalizer, "Precompiled")
        charsmap = base64.b64decode(compiled[0].get("precompiled_charsmap") or "") if compiled else b""
        spaces = [part.get("pattern", {}).get("Regex") for part in _nodes(normalizer, "Replace")]
        squeeze = " {2,}" in spaces or bool(_nodes(node, "WhitespaceSplit"))
        marks = _nodes(node, "Metaspace")
        prefix = any(
            (m.get("prepend_scheme") or m.get("add_prefix_space", True)) not in ("never", False) for m in marks
        )
        if held.get("byte_fallback"):
            files.notices.append("the tokenizer spells unknown letters as bytes, llama.cpp's Unigram does not")
    if model is not None and model.suffix:
        files.notices.append("the tokenizer keeps a word's space behind it, llama.cpp before it")
    values = {"add_space_prefix": flag(prefix), "remove_extra_whitespaces": flag(squeeze)}
    if charsmap:
        values["precompiled_charsmap"] = Value(Kind.U8, list(charsmap), array=True)
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def _word_piece(files: SideFiles, tokens: _Tokens, pre: str | None) -> dict[str, Value]:
    held = files.definition["model"]
    start = held.get("continuing_subword_prefix", "##")
    special = files.added_texts | {held.get("unk_token")}
    for name, number in held["vocab"].items():
        inner = name.startswith(start)
        written = name if name in special else name[len(start) :] if inner and len(name) > len(start) else _SPACE + name
        tokens.put(number, name, NORMAL, written=written)
    _put_added(files, tokens)
    node = files.definition.get("normalizer")
    values = {}
    for part in _nodes(node, "BertNormalizer"):
        lower, accents = bool(part.get("lowercase")), part.get("strip_accents")
        values = {"lowercase": lower, "strip_accents": lower if accents is None else bool(accents)}
        if not part.get("handle_chinese_chars", True):
            files.notices.append("the tokenizer does not split Chinese letters apart, llama.cpp does")
    if not values:
        values = {
            "lowercase": bool(_nodes(node, "Lowercase")),
            "strip_accents": bool(_nodes(node, "StripAccents")),
        }
    return {f"tokenizer.ggml.normalizer.{key}": flag(value) for key, value in values.items()}


def _gemma4(files: SideFiles, tokens: _Tokens, pre: str | None) -> dict[str, Value]:
    held = files.definition["model"]
    for name, number in held["vocab"].items():
        kind = BYTE if _BYTE.fullmatch(name) else UNKNOWN if name == held.get("unk_token") else NORMAL
        tokens.put(number, name, kind)
    _put_added(files, tokens, shown=_SHOWN)
    values = {"pre": text("gemma4"), "merges": _merge_texts(_merges(files)), "add_space_prefix": flag(False)}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def _rwkv(files: SideFiles, tokens: _Tokens, pre: str | None) -> dict[str, Value]:
    tokens.put(0, "<s>", CONTROL)
    for line in (files.text(_RWKV) or "").splitlines():
        number, _, rest = line.partition(" ")
        try:
            literal = ast.literal_eval(rest.rpartition(" ")[0])
            raw = literal.encode() if isinstance(literal, str) else bytes(literal)
            tokens.put(int(number), repr(raw)[2:-1], NORMAL)
        except (ValueError, SyntaxError, TypeError) as error:
            raise InputError(f"{files.files[_RWKV]}: a broken line: {line[:60]!r}") from error
    return {}


_MAKERS = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram, "bert": _word_piece, "gemma4": _gemma4,
           "rwkv": _rwkv}  # fmt: skip
