"""The design's import rules hold, and the checker sees a forbidden import in every folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("formats", "kernels", "calib_data")


def lint(folder: Path) -> tuple[int, str]:
    """Runs the checker in `folder`, on the package that lies there."""
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("quantize", *LINKED):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_rules_hold(tree: Path) -> None:
    pytest.importorskip("importlinter")
    status, said = lint(tree)
    assert status == 0, said
    assert "0 broken" in said


def test_a_forbidden_import_is_seen_in_every_folder(tree: Path) -> None:
    """One run over several plants: the report names each of them."""
    pytest.importorskip("importlinter")
    plants = {
        "kernels/affine.py": "quantize.errors",
        "formats/container.py": "quantize.methods.rtn",
        "quantize/methods/rtn.py": "quantize.formats.awq",
        "quantize/schemes.py": "quantize.writer",
        "calib_data/rows.py": "quantize.pipeline",
        "quantize/recipe.py": "quantize.cli",
    }
    for file, module in plants.items():
        with (tree / file).open("a") as stream:
            stream.write(f"\nimport {module}\n")
    status, said = lint(tree)
    assert status == 1, said
    for file, module in plants.items():
        importer = ("" if file.startswith("quantize/") else "quantize/") + file.removesuffix(".py")
        assert f"{importer.replace('/', '.')} -> {module}" in said, (file, said)
