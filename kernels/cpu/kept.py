"""Where compiled loops are kept between runs."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def code_folder() -> Path:
    """Returns the folder for machine code of these very sources, compilers and this kind of processor.

    Its name holds a hash of them all, so that other code is never taken: a loop has other functions compiled into it.

    Raises:
        RuntimeError: the user has no home.
    """
    from llvmlite import binding  # type: ignore[import-untyped]

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = (version("numba"), version("llvmlite"), version("numpy"))
    processor = (binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())
    digest = hashlib.sha256("\n".join(versions + processor).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return base / "quantize" / "compiled" / digest.hexdigest()[:16]
