#!/usr/bin/env python3
"""Two workers with one thread each against one process with one thread: wall time, and what differs in the output.

Both run `quantize run MODEL --method METHOD --bits BITS --group-size N --eval none --threads 1`; two workers by
`python -m torch.distributed.run --standalone --nproc-per-node 2 -m`. They take turns; figures are medians of whole
processes, start included. What starting takes, measured by `--dry-run` on either side, is shown beside them, and the
speed-up without it: of short runs it is most. Needs as many free processors as workers.

    python benchmarks/ranks.py MODEL [--methods rtn,awq,gptq] [--samples 64] [--workers 2] [--repeats 3]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
from common import Usage, measure, quantize_command, save, show

import quantize

ONE, START = "one process", "start"
BAR = 1.5


def command(model: Path, out: Path, workers: int, options: Mapping[str, Any]) -> list[str]:
    """Returns the command line of a run by so many workers."""
    words = quantize_command("run", model, out=out, overwrite=True, threads=1, eval="none", **options)
    if workers == 1:
        return words
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    return [sys.executable, *launcher, "-m", "quantize", *words[1:]]


def take_turns(jobs: Mapping[str, Sequence[str]], label: str, repeats: int) -> dict[str, list[Usage]]:
    """Runs every job `repeats` times, in turn."""
    usages: dict[str, list[Usage]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, words in jobs.items():
            usages[name].append(measure(words))
            print(f"{label}, {name}: {usages[name][-1].figures}", flush=True)
    return usages


def seconds(usages: Sequence[Usage]) -> float:
    """Returns the median wall time."""
    return float(median(usage.seconds for usage in usages))


def difference(one: Path, many: Path) -> dict[str, float]:
    """Returns the share of weights that are equal in two outputs, and the ratio of their mean rounding errors."""
    first, second = quantize.open(one), quantize.open(many)
    equal = count = 0
    for name in first.tensors:
        a, b = first.read(name), second.read(name)
        equal, count = equal + int((a == b).sum()), count + a.numel()
    errors = [json.loads((out / "quantize.json").read_text(encoding="utf-8"))["errors"] for out in (one, many)]
    means = [sum(values.values()) / max(1, len(values)) for values in errors]
    return {"equal weights": round(equal / count, 5), "errors, ratio": round(means[1] / max(means[0], 1e-30), 5)}


def run_one(model: Path, folder: Path, method: str, workers: int, repeats: int, options: dict[str, Any]) -> Any:
    """Measures one method, prints it, and returns its record."""
    many = f"{workers} workers"
    outs = {ONE: folder / "one", many: folder / "many"}
    counts = {ONE: 1, many: workers}
    jobs = {name: command(model, outs[name], counts[name], options) for name in outs}
    starts = {name: [*words, "--dry-run"] for name, words in jobs.items()}
    usages, starting = take_turns(jobs, method, repeats), take_turns(starts, f"{method}, {START}", repeats)
    whole = {name: seconds(runs) for name, runs in usages.items()}
    start = {name: seconds(runs) for name, runs in starting.items()}
    ratio = whole[ONE] / whole[many]
    row = {
        "method": method,
        "one, s": round(whole[ONE], 2),
        "workers, s": round(whole[many], 2),
        "speed-up": round(ratio, 3),
        "one, start s": round(start[ONE], 2),
        "workers, start s": round(start[many], 2),
        "speed-up without start": round((whole[ONE] - start[ONE]) / max(1e-9, whole[many] - start[many]), 3),
        "peak MB, one": round(max(u.peak_bytes for u in usages[ONE]) / 1e6, 1),
        "peak MB, all workers": round(max(u.peak_bytes for u in usages[many]) / 1e6, 1),
        **difference(outs[ONE], outs[many]),
        "at least": BAR,
        "holds": ratio >= BAR,
    }
    for out in outs.values():
        shutil.rmtree(out)
    show(f"{model.name}, {method}", [row])
    return row


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--methods", default="rtn,awq,gptq", show_default=True, help="Methods, by commas.")
@click.option("--bits", default=4, show_default=True)
@click.option("--group-size", default=64, show_default=True)
@click.option("--samples", default=64, show_default=True, help="Rows of calibration text.")
@click.option("--length", default=512, show_default=True, help="Tokens of a row.")
@click.option("--workers", default=2, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Runs of each; medians count.")
def main(
    model: Path, methods: str, bits: int, group_size: int, samples: int, length: int, workers: int, repeats: int
) -> None:
    rows = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for method in methods.split(","):
            options: dict[str, Any] = {"method": method, "bits": bits, "group_size": group_size}
            if method != "rtn":
                options |= {"calib_samples": samples, "calib_length": length}
            rows.append(run_one(model, Path(folder), method, workers, repeats, options))
    show("workers", rows)
    path = save(f"ranks-{model.name}", {"samples": samples, "length": length, "workers": workers, "rows": rows})
    print(f"\n{path}")


if __name__ == "__main__":
    main()
