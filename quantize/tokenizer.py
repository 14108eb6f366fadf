"""The tokenizer that comes with a checkpoint."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import Checkpoint
from quantize.skeleton import Skeleton, quiet_transformers

_NAMED = 5
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
_HINT = "put its files beside the model; a type that needs importance can take --imatrix FILE instead"


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
            if not any(name in checkpoint.side_files for name in _TOKENIZERS):
                raise InputError(f"{checkpoint.path}: holds no tokenizer, which text needs", _HINT) from error
            raise InputError(f"{checkpoint.path}: its tokenizer cannot be loaded: {reason}", _HINT) from error


def require_rows(ids: Tensor, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    """Checks that the embedding has a row for every token.

    Raises:
        InputError: it lacks some; they are named.
    """
    rows = getattr(skeleton.model.get_input_embeddings(), "num_embeddings", None)
    lost = sorted(set(ids[ids >= rows].tolist())) if rows is not None else []
    if lost:
        named = ", ".join(map(str, lost[:_NAMED])) + (f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else "")
        raise InputError(
            f"{checkpoint.path}: its tokenizer gives tokens {named}, its embedding has {rows} rows",
            "the tokenizer is of another model, or the embedding was not extended",
        )


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
