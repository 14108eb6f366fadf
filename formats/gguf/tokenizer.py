"""The tokenizer that a GGUF header describes, as Hugging Face files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.formats.gguf.container import Part

# How a byte-level vocabulary splits text, by `tokenizer.ggml.pre`. transformers knows the expressions of the
# first three sets and splits by GPT-2's for every other name, so names outside all these sets are refused.
_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
           "jina-v5-nano"}  # fmt: skip
_WHOLE_PIECES = _LLAMA3 | {"tekken"}  # a piece that is itself a token is not merged up to it
_MERGED = {"dbrx", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"}
_DIGITS_APART = {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"}
_LIKE_GPT2 = {"gpt-2", "phi-2", "olmo", "jais", "trillion", "exaone4", "gigachat", "a.x-4.0", "mellum"}
_SPLITS = _WHOLE_PIECES | _MERGED | _DIGITS_APART | _LIKE_GPT2
# What the tokenizer that transformers builds says of this load and not of the model.
_LOAD_KEYS = ("is_local", "local_files_only", "name_or_path", "vocab_file", "added_tokens_decoder", "backend")


def save_tokenizer(part: Part, folder: Path) -> None:
    """Writes the tokenizer that a header describes as Hugging Face files; nothing when it describes none.

    Raises:
        InputError: its kind, or its way of splitting text, is not known.
    """
    metadata = part.metadata
    kind = metadata.get("tokenizer.ggml.model")
    pre = str(metadata.get("tokenizer.ggml.pre")) if kind == "gpt2" else ""  # of no meaning to the other kind
    if kind in (None, "none", "no_vocab"):
        return
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{part.file}: its tokenizer is of kind '{kind}', which cannot be read yet")
    if kind == "gpt2" and pre not in _SPLITS:
        what = f"tokenizer.ggml.pre is '{pre}': how it splits text is not known"
        raise InputError(f"{part.file}: {what}", "use the model it was made from")
    from transformers import PreTrainedTokenizerFast

    try:
        # Not AutoTokenizer, which reads the whole header once more, slowly, to find an architecture we know.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(part.file.parent), gguf_file=part.file.name, local_files_only=True
        )
    except Exception as error:  # whatever a broken vocabulary makes the libraries raise
        raise InputError(f"{part.file}: its tokenizer cannot be rebuilt: {error}") from error
    spaced = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    _set_splitting(tokenizer.backend_tokenizer, kind, pre, spaced)
    if pre in _LLAMA3:  # llama.cpp's default for these
        tokenizer.add_bos_token = bool(metadata.get("tokenizer.ggml.add_bos_token", True))
    start = "tokenizer.chat_template."
    templates = {k.removeprefix(start): v for k, v in metadata.items() if k.startswith(start)}
    if templates:
        tokenizer.chat_template = templates | {"default": metadata.get("tokenizer.chat_template", "")}
    tokenizer.save_pretrained(folder)
    _tidy(folder / "tokenizer_config.json", metadata)


def _set_splitting(backend: Any, kind: str, pre: str, spaced: bool) -> None:
    """Makes a tokenizer split as llama.cpp does, where transformers' reading of GGUF does not.

    Args:
        backend: The `tokenizers.Tokenizer`, changed in place.
        kind: `llama` (sentencepiece) or `gpt2` (byte-level).
        pre: The header's name for how a byte-level vocabulary splits.
        spaced: Whether a sentencepiece vocabulary puts a space in front of the text.
    """
    from tokenizers import decoders, normalizers, pre_tokenizers

    if kind == "llama":
        # Every space becomes its mark, one more goes in front, and nothing is split before merging.
        prefix = [normalizers.Prepend("▁")] if spaced else []
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        strip = [decoders.Strip(" ", 1, 0)] if spaced else []
        marks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*marks, *strip])
    elif pre in _DIGITS_APART:
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.model.ignore_merges = pre in _WHOLE_PIECES


def _tidy(file: Path, metadata: Mapping[str, Any]) -> None:
    """Rewrites a tokenizer config: nothing of this load, and a class that older readers know too."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in _LOAD_KEYS}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if context := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        config["model_max_length"] = context
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
