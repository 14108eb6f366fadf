"""The tokenizer that a GGUF header describes, as Hugging Face files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.formats.gguf.container import Part
from quantize.formats.gguf.definition import Vocabulary, definition, read_vocabulary

_TEMPLATE = "tokenizer.chat_template"
# Tasks by transformers' names, and by the header's.
_TASKS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def save_tokenizer(part: Part, folder: Path) -> None:
    """Writes the tokenizer that a header describes as Hugging Face files; nothing when it describes none.

    These are `tokenizer.json`, `tokenizer_config.json` and the chat templates, and they give the same ids as
    llama.cpp does with the file. transformers' own reading of GGUF is not used: it knows few ways of splitting text,
    and takes most of them for GPT-2's.

    Raises:
        InputError: the vocabulary is broken, or its kind or its way of splitting text is not known.
    """
    held = read_vocabulary(part)
    if held is None:
        return
    made = json.dumps(definition(held), ensure_ascii=False)
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(made)
    except Exception as error:  # the library has no class of its own for what it refuses
        raise InputError(f"{part.file}: its tokenizer cannot be rebuilt: {error}") from error
    (folder / "tokenizer.json").write_text(made, encoding="utf-8")
    settings = json.dumps(_settings(held), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
    _save_templates(part.metadata, folder)


def _settings(held: Vocabulary) -> dict[str, Any]:
    """Returns the content of `tokenizer_config.json`, with a class that older readers know too."""
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in _TASKS.items():
        if (text := held.special(key)) is not None:
            found[f"{name}_token"] = text
    if held.kind == "bert":
        found |= {"cls_token": found.pop("bos_token", None), "model_input_names": _BERT_INPUTS}
        if found.get("eos_token") == found.get("sep_token"):
            found.pop("eos_token", None)
    else:
        found |= {f"add_{name}_token": held.puts(name) for name in ("bos", "eos") if f"{name}_token" in found}
    metadata = held.part.metadata
    if context := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        found["model_max_length"] = context
    return {key: value for key, value in found.items() if value is not None}


_BERT_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]


def _save_templates(metadata: Mapping[str, Any], folder: Path) -> None:
    """Writes the chat templates; a name from the header becomes a file's, so other letters in it are replaced."""
    if isinstance(template := metadata.get(_TEMPLATE), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for key, template in metadata.items():
        if not key.startswith(f"{_TEMPLATE}.") or not isinstance(template, str):
            continue
        name = re.sub(r"[^A-Za-z0-9_-]", "_", key.removeprefix(f"{_TEMPLATE}."))
        if name:
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(template, encoding="utf-8")
