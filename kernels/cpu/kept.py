"""Where compiled loops are kept between runs; needs no compiler to be asked."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path


@cache
def code_folder() -> Path:
    """Returns the folder for machine code of these very sources.

    numba looks at the file of a function and not at those of the functions that it calls, which are compiled into it:
    so the name holds a hash of all files here, and code of other versions is never taken.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return base / "quantize" / "compiled" / digest.hexdigest()[:16]
