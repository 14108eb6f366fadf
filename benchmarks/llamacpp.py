"""llama.cpp's own programs, as the benchmarks call them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from common import measure

import quantize

PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[1] / ".peers"))
PROGRAMS = Path(os.environ.get("QUANTIZE_LLAMA_CPP", PEERS / "llamacpp/bin"))
CONVERTER = PEERS / "llamacpp/llama.cpp/convert_hf_to_gguf.py"

_EXISTING = click.Path(exists=True, path_type=Path)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """Where the programs are.

    Attributes:
        programs: Folder of llama-quantize and llama-imatrix.
        converter: convert_hf_to_gguf.py.
        python: An interpreter with torch and transformers; the converter brings its own gguf package.
    """

    programs: Path
    converter: Path
    python: Path

    @property
    def version(self) -> str:
        """What the programs say of themselves."""
        said = measure([self.programs / "llama-imatrix", "--version"]).output
        return next((line for line in said.splitlines() if line.startswith("version")), "unknown")

    def convert(self, model: Path, out: Path, kind: str) -> list[str]:
        """Returns the command that writes a model folder as a GGUF file of plain type `kind`."""
        return [*map(str, (self.python, self.converter, model, "--outfile", out, "--outtype", kind))]

    def quantize(self, source: Path, out: Path, kind: str, threads: int, imatrix: Path | None) -> list[str]:
        """Returns the command that makes a GGUF file of type `kind` from a plain one."""
        weights = [] if imatrix is None else ["--imatrix", imatrix]
        return [*map(str, (self.programs / "llama-quantize", *weights, source, out, kind, threads))]

    def imatrix(self, source: Path, text: Path, out: Path, *, length: int, chunks: int, threads: int) -> list[str]:
        """Returns the command that gathers an importance matrix: text as it stands, attention's memory in float32."""
        words: tuple[Any, ...] = (
            self.programs / "llama-imatrix", "-m", source, "-f", text, "-o", out, "-c", length, "--chunks", chunks,
            "-t", threads, "-ctk", "f32", "-ctv", "f32", "--no-ppl", "--no-escape",
        )  # fmt: skip
        return [*map(str, words)]


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a click command the options that say where the programs are, as one argument `peer`."""

    @click.option("--programs", type=_EXISTING, default=PROGRAMS, help="Folder of llama.cpp's programs.")
    @click.option(
        "--converter", type=click.Path(path_type=Path), default=CONVERTER, help="Path of convert_hf_to_gguf.py."
    )
    @click.option("--peer-python", type=_EXISTING, default=sys.executable, help="Interpreter for the converter.")
    @functools.wraps(command)
    def with_peer(*, programs: Path, converter: Path, peer_python: Path, **rest: Any) -> None:
        # not resolved: a virtual environment is known by the link
        command(peer=LlamaCpp(programs.absolute(), converter.absolute(), peer_python.absolute()), **rest)

    return with_peer


def plain_type(model: Path) -> str:
    """Returns the type that holds a model's matrices exactly: its own where all have the same, else f32."""
    kinds = {str(info.scheme) for info in quantize.open(model).tensors.values() if len(info.shape) > 1}
    return kinds.pop() if len(kinds) == 1 and kinds <= {"bf16", "f16"} else "f32"
