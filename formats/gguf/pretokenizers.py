r"""How byte-level vocabularies split text before they merge, under llama.cpp's names (`tokenizer.ggml.pre`).

A GGUF file does not hold the splitting, only a name; the program that reads the file holds the expressions. Each
family here is the splitting as a Hugging Face `tokenizer.json` defines it, with the names that split so. Looked up
by definition it gives the name for a file that is written; looked up by name, the definition for one that is read.
Definitions that differ only in spelling are one: see `steps`.

llama.cpp's own expressions are simpler in places, and there it cuts some text unlike the definition: gpt-4o and
tekken know the case of ASCII letters only and end a word at a combining mark (U+0301), and no family normalises text
(NFC) or folds `'ſ` to `'s`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.errors import InputError, UsageError

Node = Mapping[str, Any]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LETTERS, _MARKS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LINES, _SPACES = r"\s*[\r\n]+", r"\s+(?!\S)|\s+"
_QWEN2 = "|".join((_CONTRACTIONS, _LETTERS, r"\p{N}", _MARKS, _LINES, _SPACES))
_LLAMA3 = "|".join((_CONTRACTIONS, _LETTERS, r"\p{N}{1,3}", _MARKS, _LINES, _SPACES))
# A word by its case: capitals, then small letters; at least one of the two.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+", rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*")
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = "|".join((*_CASED, r"\p{N}", _SLASHED, _LINES, _SPACES))
_CASED_ENDINGS = "|".join(f"{word}{_CONTRACTIONS}?" for word in _CASED)
_GPT4O = "|".join((_CASED_ENDINGS, r"\p{N}{1,3}", _SLASHED, _LINES, _SPACES))
_NOT_HAN = r"&&[^\p{Han}]"
_KIMI = "|".join((
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{_NOT_HAN}]*[{_LOWER}{_NOT_HAN}]+{_CONTRACTIONS}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{_NOT_HAN}]+[{_LOWER}{_NOT_HAN}]*{_CONTRACTIONS}?",
    r"\p{N}{1,3}", _MARKS, _LINES, _SPACES,
))  # fmt: skip
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK_WORDS = rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_DEEPSEEK3 = rf"{_DEEPSEEK_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPARK = rf"{_DEEPSEEK_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
_DEEPSEEK_LETTERS = (  # escaped, because editors that normalise text change some of them
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_SIGNS = "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"
_DEEPSEEK_CJK = "[一-龥\u0800-一가-\ud7ff]+"
_QWEN35 = "|".join((
    _CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _LINES, _SPACES,
))  # fmt: skip
_JAIS2 = "|".join((
    _CONTRACTIONS, _LETTERS, r"\p{N}{1,3}", _MARKS, _LINES,
    *(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4)), r"\s{1,2}(?!\S)", r"\s{1}",
))  # fmt: skip
_BAILING = "|".join((
    "'(?i:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r"\s*[\r\n]",
    _SPACES,
))  # fmt: skip
_SEED = "|".join((_CONTRACTIONS, _LETTERS, r"\p{N}{1}", r" ?[^\s\p{L}\p{N}\r\n]+", _LINES, _SPACES))
_EXAONE_MOE = "|".join((
    _CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
    r"\s*[\r\n]", _SPACES,
))  # fmt: skip
_YOUTU = ("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
          "|".join((_CASED_ENDINGS, r"\p{N}", _SLASHED, _LINES, _SPACES)))  # fmt: skip
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_THREES_FROM_RIGHT = r"\d{1,3}(?=(?:\d{3})*\b)"


def _split(*expressions: str, behavior: str = "Isolated") -> list[Node]:
    return [{"type": "Split", "pattern": {"Regex": e}, "behavior": behavior, "invert": False} for e in expressions]


def _bytes(*, words: bool = False) -> Node:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}


def _digits(*, individual: bool) -> Node:
    return {"type": "Digits", "individual_digits": individual}


@dataclass(frozen=True, slots=True)
class Family:
    """Names that split alike.

    Attributes:
        nodes: The splitting as a `tokenizer.json` spells it, in order.
        merging: Names whose vocabulary merges every piece; the first is the one that is written.
        whole: Names that take a piece which is itself a token without merging it; likewise.
    """

    nodes: tuple[Node, ...]
    merging: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


def _family(nodes: list[Node], merging: str = "", whole: str = "") -> Family:
    """Returns a family whose last step turns what is split into bytes, where no step does so already."""
    last = [] if any(node["type"] == "ByteLevel" for node in nodes) else [_bytes()]
    return Family((*nodes, *last), tuple(merging.split()), tuple(whole.split()))


_FAMILIES = (
    _family(
        _split(_LLAMA3),
        "dbrx smaug-bpe chatglm-bpe",
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano glm4 glm5",
    ),
    _family(_split(_QWEN2), "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    _family(
        [_bytes(words=True)],
        "gpt-2 phi-2 olmo mpt jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert jina-es "
        "jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe",
    ),
    _family(
        [_digits(individual=True), _bytes(words=True)],
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ),
    _family(_split(_GPT4O), "gpt-4o llama4 kanana2 talkie minimax-m2", "granite-embed-multi-97m"),
    _family(_split(_TEKKEN), whole="tekken"),
    _family(_split(_QWEN35), "qwen35"),
    _family(_split(r"\p{N}{1,3}", _CJK, _DEEPSEEK3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    _family(
        [*_split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK), _digits(individual=True)], "deepseek-coder"
    ),
    _family(
        [
            *_split(r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", _DEEPSEEK_SIGNS, r"\s+$", _DEEPSEEK_CJK),
            _digits(individual=True),
        ],
        "deepseek-llm",
    ),
    _family(
        [
            {"type": "Punctuation", "behavior": "Contiguous"},
            _bytes(words=True),
            _digits(individual=False),
            *_split("[0-9][0-9][0-9]"),
        ],
        "falcon",
    ),
    _family(_split(_BLOOM), "bloom poro-chat gpt3-finnish"),
    _family(_split(_KIMI), "kimi-k2"),
    _family(_split(_THREES_FROM_RIGHT, _GPT4O), "tiny_aya cohere2moe"),
    _family(_split(r"\p{N}+", r"(?=(\d{3})+(?!\d))"), "superbpe"),
    _family(_split(_BAILING), "bailingmoe bailingmoe2 llada-moe"),
    _family(_split(_SEED), "seed-coder"),
    _family(_split("|".join((_LETTERS, r"\p{N}", _MARKS, _LINES, _SPACES))), "ufakzeka"),
    _family(_split(_EXAONE_MOE), "exaone-moe"),
    _family(_split(*_YOUTU), whole="youtu"),
    _family(_split(_JAIS2), "jais-2"),
    _family([*_split(r"\p{N}{1,3}", _CJK, _SPARK), _digits(individual=True)], "spark2_5"),
    _family([*_split(r"(?:\r?\n)+(?!\r?\n)", behavior="MergedWithNext"), *_split(_QWEN2)], "laguna"),
    _family(_split(r"\p{N}{1,3}", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), whole="minicpm5"),
    _family(
        [
            *_split(r"<sentinel:[0-9]+>", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )"),
            _digits(individual=True),
            {"type": "Punctuation", "behavior": "Isolated"},
            _bytes(words=True),
        ],
        "chameleon",
    ),
)
# Taken by the loader, for `--pre`; how their vocabularies split in a `tokenizer.json` is not known here.
_MORE_NAMES = ("afmoe", "default", "gemma4", "granite-embed-multi-311m", "sarvam-moe", "viking", "whitespace")
_BY_NAME = {name: family for family in _FAMILIES for name in (*family.merging, *family.whole)}
NAMES = tuple(sorted({*_BY_NAME, *_MORE_NAMES}))
# Without a word about it in the header, llama.cpp puts BOS first for these.
_STARTING = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
             "jina-v5-nano", "tekken", "chameleon"}  # fmt: skip


def _plain(expression: str) -> str:
    """Returns one spelling of expressions that match the same text in these definitions."""
    for control, escape in {"\r": r"\r", "\n": r"\n", "\t": r"\t"}.items():
        expression = expression.replace(control, escape)
    expression = re.sub(r"(?<=[+*?])\+|(?<=\d\})\+", "", expression)  # nothing here gives back what it took
    expression = expression.replace(r"\p{N}{1}", r"\p{N}")
    spelled = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    for other in (spelled, "'(?i:[sdmt]|ll|ve|re)", "(?i:'(?:[sdmt]|ll|ve|re))", "(?i:[sdmt]|ll|ve|re)"):
        expression = expression.replace(other, _CONTRACTIONS)
    expression = expression.replace("'(?:[sdmt]|ll|ve|re)|", "'s|'t|'re|'ve|'m|'ll|'d|")
    # What no alternative takes is a piece too: a last single space.
    return re.sub(r"(?<=\|\\s\+\(\?!\\S\))\|\\s\+?$", "", expression)


def steps(node: Node | None) -> tuple[str, ...]:
    """Returns a `pre_tokenizer` as a list of steps, equal for definitions that split alike.

    An expression stands for a split around each of its matches; other steps are named in brackets. Whether bytes
    are mapped before or after a split makes no step of its own.
    """
    if node is None:
        return ()
    kind = node.get("type")
    if kind == "Sequence":
        return tuple(step for part in node.get("pretokenizers", []) for step in steps(part))
    if kind == "Split":
        pattern = node.get("pattern", {})
        expression = _plain(pattern.get("Regex", re.escape(pattern.get("String", ""))))
        behavior, invert = node.get("behavior"), bool(node.get("invert"))
        return (expression,) if behavior == "Isolated" or (behavior, invert) == ("Removed", True) else (
            f"<{behavior}{' inverted' * invert} {expression}>",
        )  # fmt: skip
    if kind == "ByteLevel":
        return (_plain(_GPT2),) if node.get("use_regex", True) else ()
    if kind == "Digits":
        return (r"\p{N}" if node.get("individual_digits") else r"\p{N}+",)
    if kind == "Punctuation":
        return (f"<Punctuation {node.get('behavior')}>",)
    return (f"<{kind}>",)


_BY_STEPS = {steps({"type": "Sequence", "pretokenizers": family.nodes}): family for family in _FAMILIES}


def check_name(name: str) -> str:
    """Returns `name`.

    Raises:
        UsageError: llama.cpp knows no pre-tokenizer of that name.
    """
    if name not in NAMES:
        raise UsageError(f"'{name}' is no pre-tokenizer of llama.cpp", f"--pre takes one of {', '.join(NAMES)}")
    return name


def find_name(pre_tokenizer: Node | None, *, whole: bool, bos: bool) -> str:
    """Returns the name under which llama.cpp splits as a `pre_tokenizer` of a byte-level vocabulary does.

    Args:
        pre_tokenizer: The node of the `tokenizer.json`.
        whole: Whether a piece that is itself a token is taken without merging (`ignore_merges`).
        bos: Whether the vocabulary has a BOS token. llama.cpp gives some one unless their name says otherwise.

    Raises:
        InputError: none splits so.
    """
    found = steps(pre_tokenizer)
    family = _BY_STEPS.get(found)
    if family is None:
        raise InputError(
            f"no pre-tokenizer of llama.cpp splits text as this tokenizer does: {_brief(found)}",
            f"name the nearest with --pre NAME, one of {', '.join(NAMES)}",
        )
    if found == _BY_STEPS_OF_LLAMA3 and not bos:
        return "glm4" if whole else "chatglm-bpe"
    return (family.whole or family.merging)[0] if whole else (family.merging or family.whole)[0]


_BY_STEPS_OF_LLAMA3 = steps(_split(_LLAMA3)[0])


def _brief(found: tuple[str, ...], limit: int = 200) -> str:
    listed = " then ".join(found) or "not at all"
    return listed if len(listed) <= limit else listed[:limit] + "..."


def pre_tokenizer(name: str) -> dict[str, Any] | None:
    """Returns the `pre_tokenizer` node of a name, or None when its definition is not known."""
    family = _BY_NAME.get(name)
    if family is None:
        return None
    nodes = [dict(node) for node in family.nodes]
    return nodes[0] if len(nodes) == 1 else {"type": "Sequence", "pretokenizers": nodes}


def takes_whole(name: str) -> bool:
    """Returns whether a piece that is itself a token is taken without merging under this name."""
    family = _BY_NAME.get(name)
    return family is not None and name in family.whole


def starts_with_bos(name: str) -> bool:
    """Returns whether llama.cpp puts BOS first under this name where the header does not say."""
    return name in _STARTING
