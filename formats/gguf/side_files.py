"""A model's small files, looked up by name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.formats.gguf.sentencepiece_model import SentencePieceModel, read_model

_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
# Files of which transformers makes a tokenizer when there is no tokenizer.json.
_CONVERTIBLE = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
                "tiktoken.model", "tekken.json")  # fmt: skip


class SideFiles:
    """A model's small files, looked up by name. JSON that is no object counts as missing."""

    def __init__(self, files: Mapping[str, Path], config: Mapping[str, Any]) -> None:
        self.files, self.config = files, config
        self.notices: list[str] = []

    def text(self, name: str) -> str | None:
        """Returns a text file's content, or None.

        Raises:
            InputError: it cannot be read, or is no UTF-8.
        """
        if name not in self.files:
            return None
        try:
            return self.files[name].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.files[name]}: {error}") from error

    def json(self, name: str) -> dict[str, Any]:
        """Returns an object of a JSON file, empty when there is none.

        Raises:
            InputError: it is no JSON.
        """
        held = self.text(name)
        try:
            value = json.loads(held) if held is not None else {}
        except ValueError as error:
            raise InputError(f"{self.files[name]}: no JSON: {error}") from error
        return value if isinstance(value, dict) else {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The `tokenizer_config.json`."""
        return self.json("tokenizer_config.json")

    @cached_property
    def generation(self) -> dict[str, Any]:
        """The `generation_config.json`."""
        return self.json("generation_config.json")

    @cached_property
    def sentencepiece(self) -> SentencePieceModel | None:
        """The model file of the sentencepiece library, when there is one."""
        for name in _SENTENCEPIECE:
            if name in self.files and (model := read_model(self.files[name])) is not None:
                return model
        return None

    @cached_property
    def definition(self) -> dict[str, Any]:
        """The `tokenizer.json`; made of other files when there is none; empty when a sentencepiece file must do.

        Raises:
            InputError: it is broken, or the files that are there make no tokenizer.
        """
        if "tokenizer.json" in self.files:
            made = self.json("tokenizer.json")
            if not isinstance(made.get("model"), dict):
                raise InputError(f"{self.files['tokenizer.json']}: no tokenizer: it holds no 'model'")
            return made
        if self.sentencepiece is not None or not any(name in self.files for name in _CONVERTIBLE):
            return {}
        return self._converted()

    def _converted(self) -> dict[str, Any]:
        """Returns the `tokenizer.json` that transformers makes of the other files."""
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            for name, file in self.files.items():
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file.absolute())
            (Path(folder) / "config.json").unlink(missing_ok=True)
            (Path(folder) / "config.json").write_text(json.dumps(dict(self.config)), encoding="utf-8")
            try:
                loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                made: dict[str, Any] = json.loads(loaded.backend_tokenizer.to_str())
            except Exception as error:  # whatever a broken vocabulary makes the libraries raise
                found = ", ".join(name for name in _CONVERTIBLE if name in self.files)
                raise InputError(
                    f"no tokenizer can be made of {found}: {error}", "add the model's tokenizer.json"
                ) from error
        return made

    @cached_property
    def added(self) -> dict[int, tuple[str, bool]]:
        """Text of each added token by id, and whether it is special."""
        found: dict[int, tuple[str, bool]] = {}
        for entry in self.definition.get("added_tokens", []):
            found[int(entry["id"])] = (entry["content"], bool(entry.get("special")))
        for number, entry in (self.settings.get("added_tokens_decoder") or {}).items():
            if isinstance(entry, dict) and "content" in entry:
                found.setdefault(int(number), (entry["content"], bool(entry.get("special"))))
        for content, number in self.json("added_tokens.json").items():
            found.setdefault(int(number), (content, False))
        return found

    @property
    def added_texts(self) -> set[str]:
        """The texts of the added tokens."""
        return {name for name, _ in self.added.values()}
