"""The layout of the repository: links, package list, wheel, and what `import quantize` gives and costs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import quantize

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("formats", "kernels", "calib_data")


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_to_the_folders_at_the_top(name: str) -> None:
    link = ROOT / "quantize" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name
    assert not (ROOT / name).is_symlink()


def test_kernels_is_no_regular_package() -> None:
    """With an `__init__.py` the checkout would answer `import kernels` in place of another package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_package_list_is_the_folders_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = set()
    for top in ("quantize", *LINKED):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.parent.relative_to(ROOT).parts
            found.add(".".join(parts if top == "quantize" else ("quantize", *parts)))
    assert set(listed) == found
    assert len(listed) == len(set(listed))


def test_public_names() -> None:
    assert quantize.__all__ == [
        "__version__",
        "catalog",
        "compare",
        "convert",
        "edit",
        "evaluate",
        "importance",
        "inspect",
        "open",
        "plan",
        "run",
    ]
    for name in quantize.__all__:
        assert getattr(quantize, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = quantize.quantise


def test_the_import_is_light() -> None:
    script = (
        "import sys, quantize, quantize.cli; "
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets', 'gguf', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of all files of a wheel, built from a copy so that no older build can add to it."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    tree, out = tmp_path_factory.mktemp("tree") / "tree", tmp_path_factory.mktemp("wheel")
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("quantize", *LINKED):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is absent from setuptools' `packages` configuration" not in done.stdout + done.stderr
    (file,) = out.iterdir()
    return zipfile.ZipFile(file).namelist()


def test_the_wheel_has_one_package_at_its_top(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"quantize"}


def test_the_wheel_has_every_module_text_and_mark(wheel: list[str]) -> None:
    expected = {"quantize/py.typed"}
    for top in ("quantize", *LINKED):
        for file in (ROOT / top).rglob("*"):
            if file.suffix == ".py" or (top == "calib_data" and file.suffix in (".txt", ".jsonl")):
                parts = file.relative_to(ROOT).parts
                expected.add("/".join(parts if top == "quantize" else ("quantize", *parts)))
    assert sum(name.startswith("quantize/calib_data/default/") for name in expected) >= 12
    assert {name for name in wheel if ".dist-info/" not in name} == expected
