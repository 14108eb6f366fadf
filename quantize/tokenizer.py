"""The tokenizer that comes with a checkpoint."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.formats.base import Checkpoint
from quantize.skeleton import quiet_transformers


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Returns the transformers tokenizer made of the checkpoint's side files.

    Raises:
        InputError: there is none, or it is broken.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        for name, file in checkpoint.side_files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file.absolute())
        (Path(folder) / "config.json").write_text(_config_text(checkpoint), encoding="utf-8")
        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{checkpoint.path}: its tokenizer cannot be loaded: {reason}") from error


def tokenizer_sha256(checkpoint: Checkpoint) -> str:
    """Returns a hash of the tokenizer's own files."""
    digest = hashlib.sha256()
    for name, file in sorted(checkpoint.side_files.items()):
        if name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"):
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()


def _config_text(checkpoint: Checkpoint) -> str:
    import json

    return json.dumps(checkpoint.config, default=str)
