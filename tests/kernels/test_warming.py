"""Types compiled in processes of their own, once on a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from quantize.kernels.cpu import ggml

_CODE = """
from quantize.kernels.cpu import ggml
warming = ggml.Warming(["q8_0", "f32"])
print(warming.names)
warming.wait()
print(ggml.Warming(["q8_0"]).names)
"""


def test_a_type_is_compiled_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[:2] == ["['q8_0']", "[]"]
    (folder,) = (tmp_path / "quantize" / "compiled").iterdir()
    assert (folder / "q8_0.ready").exists()
    assert list(folder.rglob("*.o"))


def test_a_folder_that_cannot_be_written_to_only_costs_time(tmp_path: Path) -> None:
    """Machine code that cannot be kept is made anew: the result is the same."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    code = "from quantize.kernels.cpu import ggml; import numpy as np; w = ggml.Warming(['q8_0']); w.wait(); "
    code += "print(ggml.encode('q8_0', np.ones((1, 32), np.float32)).tolist()[0][2])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(blocked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "127"


def test_every_type_has_a_family() -> None:
    names = [name for family in ggml._FAMILIES for name in family]
    assert sorted(names) == sorted(ggml.ENCODERS)
