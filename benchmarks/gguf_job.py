#!/usr/bin/env python3
"""The whole job from a model folder to a quantized GGUF file: ours in one step, llama.cpp's in its two.

Ours is `quantize run MODEL --type TYPE --eval none`. Theirs is convert_hf_to_gguf.py, which writes a plain file of the
model's own type (bf16 for a bf16 model, so that no weight is rounded on the way), then llama-quantize. Both get the
same ready importance matrix and take turns; figures are medians. Their time is the sum of the two, their peak memory
the larger of the two. Ours runs twice in a turn: with an empty folder for machine code (a first run on a machine), and
again with what that left. The model's files are read once before, so that the disk counts for nobody.

Tensors of the two results are compared byte for byte, and the metadata keys in which they differ are listed.

    python benchmarks/gguf_job.py MODEL --imatrix FILE --programs llama.cpp/build/bin \
        --converter llama.cpp/convert_hf_to_gguf.py [--types Q4_K_M,IQ3_XXS] [--repeats 3]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import llamacpp
from common import Usage, measure, quantize_command, save, show, verdict

from quantize.formats.gguf.compare import compare

COLD, WARM, PEER = "ours, first run", "ours", "llama.cpp"
CONVERT, QUANTIZE = "convert_hf_to_gguf.py", "llama-quantize"


@dataclass(frozen=True, slots=True)
class Job:
    """What one comparison needs.

    Attributes:
        model: The model folder.
        kind: The type or mix, such as Q4_K_M.
        imatrix: Importance for both sides; None for none.
        threads: For ours and llama-quantize; their converter knows no such option.
        folder: Where all outputs go.
        peer: llama.cpp.
        plain: Type of the file between their two steps.
    """

    model: Path
    kind: str
    imatrix: Path | None
    threads: int
    folder: Path
    peer: llamacpp.LlamaCpp
    plain: str

    def path(self, name: str) -> Path:
        """Returns the path of an output: `ours`, `theirs` or `between`."""
        return self.folder / f"{name}.gguf"

    def ours(self, code: Path) -> Usage:
        """Runs our side with a folder for machine code."""
        options = {"type": self.kind, "imatrix": self.imatrix or "none", "eval": "none", "threads": self.threads}
        command = quantize_command("run", self.model, out=self.path("ours"), overwrite=True, **options)
        return measure(command, env=code_folder(code))

    def convert(self) -> Usage:
        """Runs their first step."""
        return measure(self.peer.convert(self.model, self.path("between"), self.plain))

    def quantize(self) -> Usage:
        """Runs their second step."""
        between, theirs = self.path("between"), self.path("theirs")
        return measure(self.peer.quantize(between, theirs, self.kind, self.threads, self.imatrix))


def code_folder(path: Path) -> dict[str, str]:
    """Returns variables that make `path` the place of our machine code."""
    return {"XDG_CACHE_HOME": str(path), "NUMBA_CACHE_DIR": ""}


def take_turns(job: Job, repeats: int) -> tuple[dict[str, list[Usage]], Path]:
    """Runs all programs `repeats` times; returns what they took, and the last folder of machine code."""
    steps: dict[str, Callable[[Path], Usage]] = {
        COLD: job.ours,
        WARM: job.ours,
        CONVERT: lambda _: job.convert(),
        QUANTIZE: lambda _: job.quantize(),
    }
    usages: dict[str, list[Usage]] = {name: [] for name in steps}
    for turn in range(repeats):
        code = job.folder / f"code-{job.kind}-{turn}"
        for name, step in steps.items():
            usages[name].append(step(code))
            print(f"{job.kind}, {name}: {usages[name][-1].figures}", flush=True)
    return usages, code


def figures(usages: Mapping[str, Sequence[Usage]]) -> dict[str, dict[str, float]]:
    """Returns median time and memory of every program, and of llama.cpp's two together."""
    both = [
        replace(first, seconds=first.seconds + second.seconds, peak_bytes=max(first.peak_bytes, second.peak_bytes))
        for first, second in zip(usages[CONVERT], usages[QUANTIZE], strict=True)
    ]
    return {
        name: {
            "seconds": round(median(usage.seconds for usage in runs), 2),
            "peak_mb": round(median(usage.peak_bytes for usage in runs) / 1e6, 1),
        }
        for name, runs in {**usages, PEER: both}.items()
    }


def ready_seconds(kinds: Sequence[str], code: Path) -> float:
    """Returns what a fresh process needs until the encoders of some types can be called, code being compiled."""
    script = f"from quantize.kernels.cpu import ggml; ggml.warm({list(kinds)})"
    line = f"import time; start = time.perf_counter(); {script}; print(time.perf_counter() - start)"
    runs = [measure([sys.executable, "-c", line], env=code_folder(code)).output for _ in range(3)]
    return float(median(map(float, runs)))


def difference(job: Job) -> dict[str, Any]:
    """Returns in what the two outputs differ, and their sizes."""
    found = compare(job.path("ours"), job.path("theirs"), contents=True)
    mine, theirs = found["models"]
    tensors, differing = found["tensors"], found["differing"]
    bad = sorted({*tensors["added"], *tensors["removed"], *tensors["changed"], *differing})
    keys = {what: sorted(found["metadata"][what]) for what in ("added", "removed", "changed")}
    return {
        "tensors": theirs["tensors"],
        "tensors that differ": len(bad),
        "their names": bad,
        "bytes, ours": mine["bytes"],
        "bytes, llama.cpp": theirs["bytes"],
        "bytes, llama.cpp between": job.path("between").stat().st_size,
        "types": theirs["types"],
        "metadata only theirs": keys["added"],
        "metadata only ours": keys["removed"],
        "metadata that differs": keys["changed"],
    }


def run_one(job: Job, repeats: int) -> dict[str, Any]:
    """Measures one type, prints it, and returns its record."""
    usages, code = take_turns(job, repeats)
    rows, files = figures(usages), difference(job)
    ready = ready_seconds(sorted(files["types"]), code)
    ours, peer = rows[WARM], rows[PEER]
    bars = [
        verdict(f"{job.kind}: wall time, ours / llama.cpp", ours["seconds"] / peer["seconds"], 0.5),
        verdict(f"{job.kind}: first run's wall time, ours / llama.cpp", rows[COLD]["seconds"] / peer["seconds"], 1.0),
        verdict(f"{job.kind}: peak memory, ours / llama.cpp", ours["peak_mb"] / peer["peak_mb"], 1.0),
        verdict(f"{job.kind}: tensors that differ", files["tensors that differ"], 0),
        verdict(f"{job.kind}: seconds until compiled encoders are ready", ready, 1.0),
    ]
    show(f"{job.model.name} -> {job.kind}, plain file {job.plain}", [{"": name, **row} for name, row in rows.items()])
    show("files", [{"": key, "value": value} for key, value in files.items()])
    show("bars", bars)
    return {"type": job.kind, "table": rows, "ready_seconds": round(ready, 2), "files": files, "bars": bars}


def read_once(model: Path) -> None:
    """Brings a model's files into the page cache."""
    for path in model.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--imatrix", required=True, help="Importance matrix for both sides, or none.")
@click.option("--types", default="Q4_K_M,IQ3_XXS", show_default=True, help="Types or mixes, by commas.")
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Runs of each program; medians count.")
@click.option("--work", type=click.Path(exists=True, path_type=Path), help="Folder for outputs; a temporary one else.")
@llamacpp.options
def main(
    model: Path, imatrix: str, types: str, threads: int, repeats: int, work: Path | None, peer: llamacpp.LlamaCpp
) -> None:
    weights = None if imatrix == "none" else Path(imatrix)
    read_once(model)
    with tempfile.TemporaryDirectory(dir=work) as name:
        plain = llamacpp.plain_type(model)
        jobs = [Job(model, kind, weights, threads, Path(name), peer, plain) for kind in types.split(",")]
        results = [run_one(job, repeats) for job in jobs]
    record = {"model": model.name, "imatrix": weights is not None, "plain_type": plain, "threads": threads}
    record |= {"repeats": repeats, "peer": peer.version, "results": results}
    print(save(f"gguf-job-{model.name}", record))


if __name__ == "__main__":
    main()
