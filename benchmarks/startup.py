#!/usr/bin/env python3
"""How long `quantize --help` takes, and how much of that is Python and click."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

import click
from common import QUANTIZE, save, show, verdict

LIMIT_SECONDS = 0.3
LIMIT_RATIO = 2.0


def seconds(command: Sequence[str]) -> float:
    """Returns the wall time of a command."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


@click.command()
@click.option("--repeats", default=21, show_default=True)
def main(repeats: int) -> None:
    """Runs both commands in turn and writes results/startup.json."""
    commands = {"quantize --help": [str(QUANTIZE), "--help"], "import click": [sys.executable, "-c", "import click"]}
    for command in commands.values():
        seconds(command)  # from here on the files are in the page cache
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            times[name].append(seconds(command))
    rows = [
        {"command": name, "median": round(median(values), 4), "fastest": round(min(values), 4)}
        for name, values in times.items()
    ]
    ours, bare = (median(values) for values in times.values())
    bars = [verdict("seconds", ours, LIMIT_SECONDS), verdict("over import click", ours / bare, LIMIT_RATIO)]
    show(f"start-up, {repeats} runs each", rows)
    show("bars", bars)
    save("startup", {"repeats": repeats, "rows": rows, "bars": bars})


if __name__ == "__main__":
    main()
