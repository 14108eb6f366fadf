"""Token ids of llama.cpp from a header that we write, against those of the tokenizer it was written from, and back."""

from __future__ import annotations

import ctypes
import functools
import os
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import vocabularies
from tokenizers import Tokenizer, normalizers
from vocabularies import HARD, MARKED, save

from quantize.calib_data import read_text
from quantize.formats.gguf import pretokenizers
from quantize.formats.gguf.container import read_part
from quantize.formats.gguf.metadata import Value, text
from quantize.formats.gguf.tokenizer import save_tokenizer
from quantize.formats.gguf.vocabulary import tokenizer_metadata

PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[2] / ".peers"))
LIBRARY = Path(os.environ.get("QUANTIZE_LLAMA_CPP", PEERS / "llamacpp/bin")).absolute() / "libllama.so"

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not LIBRARY.exists(), reason=f"no {LIBRARY}: run 'make peers' or set QUANTIZE_LLAMA_CPP"),
]


class _Options(ctypes.Structure):
    """`llama_model_params`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("devices", "buffers")),
        *((name, ctypes.c_int32) for name in ("layers", "split", "load", "lazy", "main")),
        *((name, ctypes.c_void_p) for name in ("shares", "progress", "user", "overrides")),
        *((name, ctypes.c_bool) for name in ("vocab_only", "check", "extra", "no_host", "no_alloc", "mtp")),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(LIBRARY))
    loaded.llama_model_default_params.restype = _Options
    loaded.llama_model_load_from_file.restype = ctypes.c_void_p
    loaded.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Options]
    loaded.llama_model_get_vocab.restype = ctypes.c_void_p
    loaded.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    loaded.llama_model_free.argtypes = [ctypes.c_void_p]
    loaded.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32,
        ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    loaded.quiet = _LOG(lambda *_: None)  # kept, or the library would call what is gone
    loaded.llama_log_set(loaded.quiet, None)
    loaded.llama_backend_init()
    return loaded


class Vocabulary:
    """A file's vocabulary in llama.cpp."""

    def __init__(self, path: Path) -> None:
        options = library().llama_model_default_params()
        options.vocab_only, options.layers = True, 0
        self.model = library().llama_model_load_from_file(str(path).encode(), options)
        assert self.model, f"llama.cpp does not load {path.name}"
        self.held = library().llama_model_get_vocab(self.model)

    def ids(self, sample: str) -> list[int]:
        raw = sample.encode()
        room = len(raw) + 8
        found = (ctypes.c_int32 * room)()
        count = library().llama_tokenize(self.held, raw, len(raw), found, room, True, True)
        assert count >= 0
        return list(found[:count])

    def __del__(self) -> None:
        if self.model:
            library().llama_model_free(self.model)


def compare(made: Tokenizer, files: Mapping[str, Path], folder: Path, samples: list[str], **options: Any) -> Path:
    """Checks both ways: header from the tokenizer's files, and a tokenizer from that header. Returns the file."""
    arch = options.pop("arch", "llama")
    found = tokenizer_metadata(files, options.pop("config", {}), made.get_vocab_size() + 9, **options)
    path = vocabularies.write_gguf(folder / "model.gguf", found.metadata, arch)
    held = Vocabulary(path)
    (back := folder / "back").mkdir()
    save_tokenizer(read_part(path), back)
    rebuilt = Tokenizer.from_file(str(back / "tokenizer.json"))
    for sample in samples:
        expected = made.encode(sample).ids
        assert held.ids(sample) == expected, differs(made, held.ids(sample), expected)
        assert rebuilt.encode(sample).ids == expected
    return path


def differs(made: Tokenizer, found: list[int], expected: list[int]) -> str:
    """Both sides around the first difference, as texts."""
    at = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
    near = slice(max(at - 3, 0), at + 4)
    return f"{[made.id_to_token(n) for n in found[near]]} for {[made.id_to_token(n) for n in expected[near]]}"


WRITTEN = [name for family in pretokenizers._FAMILIES for names in (family.merging, family.whole) for name in names[:1]]
# llama.cpp's own expressions end a word at a combining mark here, which the definition does not ...
NO_MARKS = ("gpt-4o", "tekken", "kimi-k2")
# ... and here group digits from the right also where a letter stands behind them.
DIGITS = ("tiny_aya",)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_of_splitting(tmp_path: Path, name: str) -> None:
    made = vocabularies.byte_level(name, bos=name in ("llama-bpe", "dbrx"))
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    samples = [HARD, MARKED, read_text("default:eval"), "", " ", "\n", "a  ", "  a"]
    if name in NO_MARKS:
        samples[1:3] = [MARKED[: MARKED.index("न")], read_text("default:eval", limit=60_000)]
    if name in DIGITS:
        samples[0] = HARD.replace("1314151天", "天").replace("12ab34", "")
        samples[2] = read_text("default:eval", limit=2_000)
    path = compare(made, save(made, tmp_path / "source", **settings), tmp_path, samples)
    assert read_part(path).metadata["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("name", ["gpt-4o", "tekken", "kimi-k2", "tiny_aya"])
def test_what_llamacpp_splits_by_its_own_design(tmp_path: Path, name: str) -> None:
    """If this fails, llama.cpp has come nearer to the definition, and the lists above and the notes can go."""
    made = vocabularies.byte_level(name)
    found = tokenizer_metadata(save(made, tmp_path, eos_token="<|im_end|>"), {}, made.get_vocab_size())
    held = Vocabulary(vocabularies.write_gguf(tmp_path / "model.gguf", found.metadata))
    sample = read_text("default:eval") + HARD
    assert held.ids(sample) != made.encode(sample).ids


def test_every_name_loads(tmp_path: Path) -> None:
    made = vocabularies.byte_level("gpt-2", size=300)
    found = tokenizer_metadata(save(made, tmp_path, eos_token="<|im_end|>"), {}, made.get_vocab_size()).metadata
    for name in pretokenizers.NAMES:
        path = vocabularies.write_gguf(tmp_path / "model.gguf", found | {"tokenizer.ggml.pre": text(name)})
        Vocabulary(path)


def test_composed_text_of_a_tokenizer_that_composes(tmp_path: Path) -> None:
    made = vocabularies.byte_level("qwen2")
    made.normalizer = normalizers.NFC()
    compare(made, save(made, tmp_path / "source", eos_token="<|im_end|>"), tmp_path, [HARD])


def test_a_vocabulary_without_merges(tmp_path: Path) -> None:
    tiny.byte_tokenizer(tmp_path)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    compare(made, vocabularies.files(tmp_path), tmp_path, [HARD, MARKED])


LIKE_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("source", ["json", "both", "model"])
def test_sentencepiece_bpe(tmp_path: Path, source: str) -> None:
    made = vocabularies.llama2()
    files = dict(save(made, tmp_path / "source", **LIKE_LLAMA))
    if source != "json":
        (tmp_path / "tokenizer.model").write_bytes(vocabularies.sentencepiece("bpe"))
        files["tokenizer.model"] = tmp_path / "tokenizer.model"
    if source == "model":
        del files["tokenizer.json"]
        (tmp_path / "added_tokens.json").write_text('{"<tool_call>": 1500}')
        files["added_tokens.json"] = tmp_path / "added_tokens.json"
    compare(made, files, tmp_path, [HARD, MARKED, read_text("default:eval"), "", " a", "</s> x", "<s>"])


def test_sentencepiece_bpe_that_marks_the_start_only(tmp_path: Path) -> None:
    made = vocabularies.llama2(legacy=False)
    samples = [HARD[: HARD.index("<tool_call>")], MARKED, read_text("default:eval")]
    compare(made, save(made, tmp_path / "source", **LIKE_LLAMA), tmp_path, samples)


def test_gemma4(tmp_path: Path) -> None:
    made = vocabularies.llama2()
    made.normalizer = normalizers.Replace(" ", "▁")
    files = save(made, tmp_path / "source", **LIKE_LLAMA)
    compare(made, files, tmp_path, [HARD, MARKED, read_text("default:eval")], config={"model_type": "gemma4"})


@pytest.mark.parametrize("source", ["json", "model"])
def test_unigram(tmp_path: Path, source: str) -> None:
    made = vocabularies.t5()
    files = dict(save(made, tmp_path / "source", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"))
    if source == "model":
        (tmp_path / "spiece.model").write_bytes(vocabularies.sentencepiece("unigram"))
        (tmp_path / "added_tokens.json").write_text('{"<extra_id_0>": 1500}')
        files["spiece.model"], files["added_tokens.json"] = tmp_path / "spiece.model", tmp_path / "added_tokens.json"
        del files["tokenizer.json"]
    samples = [HARD, MARKED, read_text("default:eval"), "  a  b  ", "a<extra_id_0> b", "", "</s>"]
    compare(made, files, tmp_path, samples, arch="t5")


def loses(line: str) -> bool:
    return any(unicodedata.category(letter) == "Mc" or "HANGUL" in unicodedata.name(letter, "") for letter in line)


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_piece(tmp_path: Path, lowercase: bool) -> None:
    made = vocabularies.word_piece(lowercase=lowercase)
    settings = {f"{name.lower()}_token": f"[{name}]" for name in ("CLS", "SEP", "PAD", "UNK", "MASK")}
    samples = [HARD, MARKED, read_text("default:eval"), "[MASK] a [SEP]"]
    if lowercase:
        # llama.cpp takes letters apart by a table of its own: Hangul loses its vowels, and spacing marks are dropped.
        samples = ["\n".join(line for line in sample.splitlines() if not loses(line)) for sample in samples]
    compare(made, save(made, tmp_path / "source", **settings), tmp_path, samples, arch="bert")


def test_rwkv(tmp_path: Path) -> None:
    """No other implementation is at hand: the longest token that fits, of bytes."""
    words = [bytes([n]) for n in range(256)] + [b"Hello", b"\n\n", b" World", "é".encode(), b"Hell", b"'", b"\\n"]
    lines = [f"{n + 1} {word!r} {len(word)}" for n, word in enumerate(dict.fromkeys(words))]
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("\n".join(lines))
    found = tokenizer_metadata(vocabularies.files(tmp_path), {}, 300)
    held = Vocabulary(vocabularies.write_gguf(tmp_path / "model.gguf", found.metadata))
    unique = list(dict.fromkeys(words))

    def expected(sample: str) -> list[int]:
        raw, ids = sample.encode(), []
        while raw:
            word = max((w for w in unique if raw.startswith(w)), key=len)
            ids.append(unique.index(word) + 1)
            raw = raw[len(word) :]
        return ids

    for sample in ("Hello World\n\né\\n'", HARD.replace("\r", "")):
        assert held.ids(sample) == expected(sample)


def test_added_flags_are_followed(tmp_path: Path) -> None:
    made: Callable[..., Tokenizer] = vocabularies.byte_level
    values: dict[str, Value] = tokenizer_metadata(
        save(made("qwen2", bos=True), tmp_path, bos_token="<|endoftext|>", eos_token="<|im_end|>"), {}, 1600
    ).metadata
    assert Vocabulary(vocabularies.write_gguf(tmp_path / "a.gguf", values)).ids("")[:1] == [0]
    del values["tokenizer.ggml.add_bos_token"]
    assert Vocabulary(vocabularies.write_gguf(tmp_path / "b.gguf", values)).ids("") == []
