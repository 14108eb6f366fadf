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


def finished(command: Sequence[str], out: Path) -> tuple[dict[str, str], float]:
    """Runs a command to its end; returns the hashes of its output, which is removed, and the seconds it took."""
    usage = measure(command)
    found = hashes(out)
    shutil.rmtree(out)
    return found, usage.seconds


def killed(command: Sequence[str], out: Path, after: float) -> bool:
    """Runs a command, kills it after some seconds, and returns whether that left an unfinished output.

    Raises:
        AssertionError: something stands under the final name although the command did not end.
    """
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after)
    ended = child.poll() is not None
    child.kill()
    child.wait()
    if ended:
        shutil.rmtree(out, ignore_errors=True)
        return False
    if out.exists():
        raise AssertionError(f"{out.name} exists, but the run was killed after {after:.2f} s")
    return out.with_name(f"{out.name}.partial").exists()


def check(model: Path, out: Path, kills: int, dice: random.Random, options: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of what was equal for one command."""
    command = quantize_command("run", model, out=out, threads=2, **options)
    reference, seconds = finished(command, out)
    again, _ = finished(command, out)
    single, _ = finished(quantize_command("run", model, out=out, threads=1, **options), out)
    resumed, equal = 0, 0
    for _ in range(kills):
        resumed += killed(command, out, dice.uniform(0, seconds))
        equal += finished(command, out)[0] == reference
    return {
        "model": model.name,
        "method": options["method"],
        "files": len(reference),
        "seconds": round(seconds, 1),
        "again": again == reference,
        "one thread": single == reference,
        "kills": kills,
        "of them mid-output": resumed,
        "same after kill": equal == kills,
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
