"""What is made once on a machine and kept between runs: machine code, and tables that it works with."""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def code_folder() -> Path:
    """Returns the folder for what these very sources, libraries and this kind of processor give.

    Its name holds a hash of them all, so that other code is never taken: a loop has other functions compiled into it.

    Raises:
        RuntimeError: the user has no home.
    """
    from llvmlite import binding  # type: ignore[import-untyped]

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = tuple(map(version, ("numba", "llvmlite", "numpy", "gguf")))
    processor = (binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())
    digest = hashlib.sha256("\n".join(versions + processor).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return base / "quantize" / "compiled" / digest.hexdigest()[:16]


def read(name: str) -> bytes | None:
    """Returns the contents of a kept file, or None."""
    with suppress(OSError, RuntimeError):
        return (code_folder() / name).read_bytes()
    return None


def write(name: str, contents: bytes) -> None:
    """Keeps a file if there is a folder for it; other processes may be writing the same."""
    with suppress(OSError, RuntimeError):
        folder = code_folder()
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{name}.{os.getpid()}.{threading.get_ident()}"
        part.write_bytes(contents)
        part.replace(folder / name)
