"""What the benchmarks share: running a child process and knowing what it took, results as JSON and as tables.

Memory is what the project's bars speak of: RssAnon + RssShmem of the process and all its descendants, the highest of
samples taken every 20 ms. Pages of mapped files are not counted. Linux only.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
QUANTIZE = Path(sys.executable).with_name("quantize")
_INTERVAL = 0.02
_COUNTED = ("RssAnon:", "RssShmem:")


# A benchmark that is told to end takes its child with it.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Failed(Exception):
    """A child process ended with an error."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a child process took.

    Attributes:
        seconds: Wall time.
        peak_bytes: Highest RssAnon + RssShmem of its process tree.
        code: Exit status.
        output: Standard output and error together.
    """

    seconds: float
    peak_bytes: int
    code: int
    output: str

    @property
    def figures(self) -> dict[str, float]:
        """Time and memory as they go into results."""
        return {"seconds": round(self.seconds, 2), "peak_mb": round(self.peak_bytes / 1e6, 1)}


def measure(
    command: Sequence[str | Path],
    *,
    data_limit: int | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> Usage:
    """Runs a command to its end and returns what it took.

    Args:
        command: Program and arguments.
        data_limit: RLIMIT_DATA of the child in bytes.
        env: Variables beyond this process's own.
        check: Whether a non-zero exit status is an error.

    Raises:
        Failed: the command failed; the end of its output is in the message.
    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            preexec_fn=None if data_limit is None else partial(_limit_data, data_limit),
        )
        sampler = _Sampler(child.pid)
        sampler.start()
        try:
            code = child.wait()
            seconds = time.perf_counter() - start
        finally:
            child.kill()
            sampler.stop()
        log.seek(0)
        output = log.read().decode(errors="replace")
    if check and code:
        raise Failed(f"{Path(command[0]).name} exited with {code}:\n{output[-4000:]}")
    return Usage(seconds, sampler.peak, code, output)


def quantize_command(command: str, model: Path, **options: Any) -> list[str]:
    """Returns a command line of the `quantize` that stands beside this interpreter.

    Args:
        command: The subcommand.
        model: Its argument.
        options: Long options with underscores for dashes; a list repeats the option, True is a flag, None is left out.
    """
    line = [str(QUANTIZE), command, str(model)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is True:
                line.append(flag)
            elif item is not None and item is not False:
                line += [flag, str(item)]
    return line


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Writes `results/NAME.json`, with the versions that the figures belong to, and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "processors": len(os.sched_getaffinity(0)),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {package: version(package) for package in ("quantize", "torch", "transformers")},
        **result,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows as a plain table; columns are the keys, in the order in which they first come."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(f"\n{title}")
    for line in cells:
        padded = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"  {padded.rstrip()}", flush=True)


def verdict(label: str, value: float, bar: float) -> dict[str, Any]:
    """Returns a row that says whether `value` is at most `bar`."""
    return {"bar": label, "measured": round(value, 5), "at most": bar, "holds": bool(value <= bar)}


def hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file under a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def tree_bytes(pid: int) -> int:
    """Returns RssAnon + RssShmem of a process and its descendants; what has ended counts nothing."""
    return sum(_own_bytes(member) for member in _family(pid))


class _Sampler(threading.Thread):
    """Watches a process tree until stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.peak = max(self.peak, tree_bytes(self._pid))

    def stop(self) -> None:
        self._done.set()
        self.join()


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return
    for task in tasks:
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _family(int(child))


def _own_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_COUNTED))


def _limit_data(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
