"""GGUF files: what llama.cpp, Ollama and LM Studio load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import Checkpoint, Piece
from quantize.formats.folder import is_folder
from quantize.formats.gguf.checkpoint import GGUFCheckpoint
from quantize.schemes import QuantizedTensor, Scheme, Shape

__all__ = ["GGUFCheckpoint", "GGUFFormat"]


class GGUFFormat:
    """Reader of GGUF files."""

    name = "gguf"
    summary = "GGUF: llama.cpp, Ollama, LM Studio; read only so far"
    one_group = False

    def sniff(self, path: Path) -> bool:
        """Returns whether `path` is a file that is GGUF or called so, or a folder with such files only.

        A broken file of that name and a folder of several models are claimed too: `open` says what is wrong.
        """
        if path.is_dir():
            return not is_folder(path) and any(path.glob("*.gguf"))
        if path.suffix == ".gguf" or not path.is_file():
            return path.is_file()
        try:
            with path.open("rb") as stream:
                return stream.read(4) == b"GGUF"
        except OSError:
            return False

    def open(self, path: Path) -> Checkpoint:
        """Returns the model at `path` as a checkpoint."""
        return GGUFCheckpoint(path)

    def reject(self, scheme: Scheme) -> str | None:
        """Returns the reason why nothing can be written yet."""
        return "GGUF cannot be written yet"

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns None: `reject` refuses everything already."""
        return None

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Raises InputError: there is no writer yet."""
        raise InputError("GGUF cannot be written yet")

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Raises InputError: there is no writer yet."""
        raise InputError("GGUF cannot be written yet")

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Raises InputError: there is no writer yet."""
        raise InputError("GGUF cannot be written yet")

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns no groups: every tensor of a GGUF file may have its own type."""
        return []
