#!/usr/bin/env python3
"""The same command gives the same files: again, with other threads, and after being killed at random moments."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from common import hashes, measure, quantize_command, save, show


def finished(command: Sequence[str], out: Path) -> dict[str, str]:
    """Runs a command to its end and returns the hashes of its output, which is removed."""
    measure(command)
    found = hashes(out)
    shutil.rmtree(out)
    return found


def window(command: Sequence[str], out: Path) -> tuple[float, float]:
    """Runs a command and returns after how many seconds its unfinished output came and went."""
    start, times = time.perf_counter(), []
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None:
        if partial(out).exists():
            times.append(time.perf_counter() - start)
        time.sleep(0.01)
    shutil.rmtree(out)
    return times[0], times[-1]


def partial(out: Path) -> Path:
    """Returns where an output is while it is unfinished."""
    return out.with_name(f"{out.name}.partial")


def killed(command: Sequence[str], out: Path, after: float) -> str:
    """Runs a command, kills it after some seconds, and returns what that left: "nothing", "partial" or "complete"."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after)
    child.kill()
    child.wait()
    if out.exists():
        return "complete"
    return "partial" if partial(out).exists() else "nothing"


def check(model: Path, out: Path, kills: int, dice: random.Random, options: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of what was equal for one command."""
    command = quantize_command("run", model, out=out, threads=2, **options)
    reference = finished(command, out)
    again = finished(command, out)
    single = finished(quantize_command("run", model, out=out, threads=1, **options), out)
    begin, end = window(command, out)
    left, equal = [], 0
    for _ in range(kills):
        left.append(killed(command, out, dice.uniform(begin, end)))
        if left[-1] == "complete":  # killed between the last rename and the end of the process
            equal += hashes(out) == reference
            shutil.rmtree(out)
        equal += finished(command, out) == reference
    return {
        "model": model.name,
        "method": options["method"],
        "files": len(reference),
        "seconds": round(end, 1),
        "again": again == reference,
        "one thread": single == reference,
        "kills": kills,
        "of them mid-output": left.count("partial"),
        "same after kill": equal == kills + left.count("complete"),
    }


@click.command()
@click.argument("models", type=click.Path(exists=True, path_type=Path), nargs=-1, required=True)
@click.option("--kills", default=5, show_default=True, help="Kills of each command.")
@click.option("--group-size", default=64, show_default=True)
@click.option("--samples", default=4, show_default=True)
@click.option("--length", default=128, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the moments of the kills.")
@click.option("--work", type=click.Path(exists=True, path_type=Path), help="Folder for outputs; a temporary one else.")
def main(
    models: tuple[Path, ...], kills: int, group_size: int, samples: int, length: int, seed: int, work: Path | None
) -> None:
    """Checks RTN and AWQ on MODELS and writes results/determinism.json."""
    dice = random.Random(seed)
    common: dict[str, Any] = {"bits": 4, "group_size": group_size, "eval": "none"}
    calibration = {"calib_samples": samples, "calib_length": length}
    rows = []
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for model in models:
            for method, more in (("rtn", {}), ("awq", calibration)):
                options = {"method": method, **common, **more}
                rows.append(check(model, Path(folder) / f"{model.name}-{method}", kills, dice, options))
                show("same command, same files", rows[-1:])
    show("same command, same files", rows)
    save("determinism", {"seed": seed, "samples": samples, "length": length, "rows": rows})
    if not all(row[key] for row in rows for key in ("again", "one thread", "same after kill")):
        raise SystemExit("files differ")


if __name__ == "__main__":
    main()
