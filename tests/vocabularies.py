"""Small tokenizers trained on the bundled text, as a model's folder has them, and a text that is hard to tokenize."""

from __future__ import annotations

import functools
import io
import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from quantize.calib_data import read_text
from quantize.formats.gguf.metadata import Kind, Value, f32, u32
from quantize.formats.gguf.pretokenizers import pre_tokenizer, takes_whole
from quantize.formats.gguf.sentencepiece_model import read_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HARD = """Hello World! 🚀🦙 (normal) 😶\u200d🌫️ (joined) 👩\u200d👩\u200d👧\u200d👦 ✅ <|im_start|>user
def f(x, *args):
\treturn x[0]**2 + 3.14e-10  # tab-indented\r
    if a>=b && c!=d || !e: {"k": [1, 22, 333, 4444, 55555]}


I've you're DON'T we'LL it'S 'tis o'clock ''' ``` \"\"\" don’t l’été
3 33 333 3333 1234567890 1,234,567.89 ½ ² Ⅻ 12ab34
我想在apple工作1314151天～ 日本語テキスト カタカナ 한국어 텍스트
مرحبا بالعالم، كيف حالك؟ สวัสดีชาวโลก <tool_call>{"a": 1}</tool_call> <tool_call>
Café naïve Ångström straße ΑΒΓαβγ Привет мир ñandú
trailing spaces   \n \n  \n\t \tmixed\ttabs  and    runs      of        spaces
<|endoftext|> <|im_end|>x<|im_end|> <|im_start|>
\u00a0nbsp\u200bzwsp\u3000wide…—–“quotes”«»
camelCase HTTPServer snake_case kebab-case https://example.com/a?b=c&d=%20
"""
# Letters with combining marks, and capitals beyond ASCII.
MARKED = "e\u0301a\u0300 n\u0303 नमस्ते दुनिया कैसे हो ก็ ภาษาไทย ÀÉÎõü ŁÓDŹ ПРИВЕТ МИР ΑΒΓ"


def _kept(make: Callable[..., Tokenizer]) -> Callable[..., Tokenizer]:
    """Trains once for the same arguments; every caller gets a tokenizer of its own."""

    @functools.cache
    def content(*args: Any, **more: Any) -> str:
        return make(*args, **more).to_str()

    @functools.wraps(make)
    def copy(*args: Any, **more: Any) -> Tokenizer:
        return Tokenizer.from_str(content(*args, **more))

    return copy


@functools.cache
def text() -> str:
    """About 100 000 characters: prose, code, mathematics and many languages."""
    return "".join(read_text("default:train").splitlines(keepends=True)[::3])


@_kept
def byte_level(pre: str, *, bos: bool = False, size: int = 1500, spaces: bool = True) -> Tokenizer:
    """A byte-level BPE that splits text as llama.cpp's `pre` does, with special and other added tokens."""
    whole = takes_whole(pre)
    made = Tokenizer(models.BPE(ignore_merges=whole))
    made.pre_tokenizer = _splitter(pre_tokenizer(pre))
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(text().splitlines(keepends=True), trainer)
    made.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    made.post_processor = (
        processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        if bos
        else processors.ByteLevel(trim_offsets=False)
    )
    return made


def _splitter(node: dict[str, Any] | None) -> Any:
    """The pre-tokenizer that a JSON node describes."""
    whole = {"version": "1.0", "pre_tokenizer": node, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    return Tokenizer.from_str(json.dumps(whole | {"added_tokens": []})).pre_tokenizer


@_kept
def word_piece(*, lowercase: bool = True) -> Tokenizer:
    """BERT's kind."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    made.train_from_iterator(text().splitlines(), trainer)
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


@functools.cache
def sentencepiece(kind: str) -> bytes:
    """A `tokenizer.model`: `bpe` as Llama 2 has it, or `unigram` as T5 has it."""
    import sentencepiece as library

    made = io.BytesIO()
    like_llama = {"byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
                  "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}  # fmt: skip
    like_t5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(text().splitlines()),
        model_writer=made,
        model_type=kind,
        vocab_size=1500,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
        **(like_llama if kind == "bpe" else like_t5),
    )
    return made.getvalue()


@_kept
def llama2(*, legacy: bool = True) -> Tokenizer:
    """The `tokenizer.json` of a sentencepiece BPE model, as transformers makes it of one."""
    from quantize.formats.gguf.merges import pairs_of

    model = pieces("bpe")
    scores = {name: score for name, score, kind in model if kind == 1}
    vocab = {name: number for number, (name, _, _) in enumerate(model)}
    made = Tokenizer(
        models.BPE(vocab=vocab, merges=pairs_of(scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return made


@_kept
def t5() -> Tokenizer:
    """The `tokenizer.json` of a Unigram model, as transformers makes it of one."""
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "tokenizer.model").write_bytes(sentencepiece("unigram"))
        held = read_model(file)
    assert held is not None
    made = Tokenizer(models.Unigram([(name, score) for name, score, _ in held.pieces], unk_id=2, byte_fallback=False))
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(held.charsmap),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return made


def pieces(kind: str) -> list[tuple[str, float, int]]:
    """Text, score and type of each token of a sentencepiece model."""
    import sentencepiece as library

    held = library.SentencePieceProcessor(model_proto=sentencepiece(kind))
    kinds = [
        2 if held.IsUnknown(n) else 3 if held.IsControl(n) else 6 if held.IsByte(n) else 1 for n in range(len(held))
    ]
    return [(held.IdToPiece(n), held.GetScore(n), kinds[n]) for n in range(len(held))]


def save(made: Tokenizer, folder: Path, **settings: Any) -> dict[str, Path]:
    """Writes `tokenizer.json` and `tokenizer_config.json` and returns a folder's files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return files(folder)


def files(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its relative name."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def write_gguf(path: Path, metadata: Mapping[str, Value], arch: str = "llama") -> Path:
    """Writes a file that holds a vocabulary and no tensors.

    Not with the gguf package's writer, which leaves out empty arrays.
    """
    sizes = {"context_length": 512, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64,
             "attention.head_count": 4}  # fmt: skip
    known = {"general.architecture": Value(Kind.TEXT, arch)} | {f"{arch}.{key}": u32(n) for key, n in sizes.items()}
    known |= {f"{arch}.attention.layer_norm_{kind}epsilon": f32(1e-5) for kind in ("", "rms_")} | dict(metadata)
    pairs = b"".join(struct.pack("<Q", len(key)) + key.encode() + value.encode() for key, value in known.items())
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(known)) + pairs)
    return path
