#!/usr/bin/env python3
"""RTN and AWQ of ours against llm-compressor's AWQModifier: loss, wall time and memory on one model, in one run.

Both sides get the same token rows, an even interleaved mix of the calibration files, and the same group size. All
outputs are measured by one evaluator against the same base; llm-compressor's is first unpacked into a plain float32
folder with its own functions. Time and memory are of whole processes, evaluation not included.

    python benchmarks/awq.py MODEL --group-size 64 --peer PEERS/llmcompressor/bin/python \
        --calib wiki.txt --calib c4.txt --calib code.txt --text wiki.test.raw
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from common import Usage, measure, quantize_command, save, show, verdict

import quantize
from quantize.calib_data import token_rows
from quantize.tokenizer import load_tokenizer

SCRIPTS = Path(__file__).parent / "peers"
LENGTH = 512
RTN, AWQ, PEER = "ours rtn", "ours awq", "llm-compressor awq"


def write_ids(model: Path, calib: Sequence[str], rows: int, file: Path) -> str:
    """Writes the token rows that `quantize run` calibrates on, int64 `[rows, LENGTH]`; returns their hash."""
    text = token_rows(calib, load_tokenizer(quantize.open(model)), rows=rows, length=LENGTH)
    np.save(file, text.ids.numpy())
    return str(text.sha256)


def run_jobs(jobs: Mapping[str, Sequence[str | Path]], outputs: Mapping[str, Path], repeats: int) -> dict[str, Any]:
    """Runs every job `repeats` times, taking turns, and returns the median figures of each."""
    usages: dict[str, list[Usage]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, command in jobs.items():
            shutil.rmtree(outputs[name], ignore_errors=True)
            usages[name].append(measure(command))
            print(f"{name}: {usages[name][-1].figures}", flush=True)
    return {
        name: {
            "seconds": round(median(usage.seconds for usage in runs), 2),
            "peak_mb": round(median(usage.peak_bytes for usage in runs) / 1e6, 1),
        }
        for name, runs in usages.items()
    }


def peer_versions(python: Path) -> dict[str, str]:
    """Returns the versions of what the peer runs on."""
    names = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    return dict(zip(names, measure([python, "-c", code]).output.split(), strict=True))


def judge(rows: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Returns the bars: the first against our RTN, the others against llm-compressor if it ran."""
    ours, peer = rows[AWQ], rows.get(PEER)
    bars = [verdict("KL divergence, AWQ / RTN", ours["kld"] / rows[RTN]["kld"], 0.6)]
    if peer is not None:
        bars += [
            verdict("KL divergence, ours / llm-compressor", ours["kld"] / peer["kld"], 1.0),
            verdict("wall time, ours / llm-compressor", ours["seconds"] / peer["seconds"], 0.7),
            verdict("peak memory, ours / llm-compressor", ours["peak_mb"] / peer["peak_mb"], 1.0),
        ]
    return bars


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--group-size", type=int, required=True)
@click.option("--peer", type=click.Path(exists=True, path_type=Path), help="Python of llm-compressor's environment.")
@click.option("--calib", multiple=True, required=True, help="Calibration text; repeat it for an even mix.")
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path), help="Text to measure loss on.")
@click.option("--rows", default=64, show_default=True, help="Calibration rows of 512 tokens, for both sides.")
@click.option("--chunks", default=20, show_default=True)
@click.option("--repeats", default=1, show_default=True, help="Runs of each job; medians of time and memory count.")
@click.option(
    "--peer-dtype", default="auto", show_default=True, help="What llm-compressor loads the model in; float32 is faster."
)
@click.option("--work", type=click.Path(exists=True, path_type=Path), help="Folder for outputs; a temporary one else.")
def main(
    model: Path,
    group_size: int,
    peer: Path | None,
    calib: tuple[str, ...],
    text: Path,
    rows: int,
    chunks: int,
    repeats: int,
    peer_dtype: str,
    work: Path | None,
) -> None:
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        ids, packed, plain = folder / "ids.npy", folder / "packed", folder / "plain"
        digest = write_ids(model, calib, rows, ids)
        outputs = {RTN: folder / "rtn", AWQ: folder / "awq"}
        ours: dict[str, Any] = {"bits": 4, "group_size": group_size, "eval": "none"}
        text_options = {"calib": calib, "calib_samples": rows, "calib_length": LENGTH}
        jobs: dict[str, Sequence[str | Path]] = {
            RTN: quantize_command("run", model, method="rtn", out=outputs[RTN], **ours),
            AWQ: quantize_command("run", model, method="awq", out=outputs[AWQ], **ours, **text_options),
        }
        if peer is not None:
            outputs[PEER] = packed
            jobs[PEER] = [peer, SCRIPTS / "llmcompressor_awq.py", model, ids, str(group_size), peer_dtype, packed]
        figures = run_jobs(jobs, outputs, repeats)
        if peer is not None:
            measure([peer, SCRIPTS / "decompress.py", packed, plain])
            outputs[PEER] = plain
        results: dict[str, dict[str, float]] = {}
        for job, out in outputs.items():
            result = quantize.evaluate(out, model, text=str(text), chunks=chunks)
            loss = {"kld": result.kl_divergence, "perplexity": result.perplexity, "top1": result.top1_agreement}
            results[job] = {key: round(value, 5) for key, value in loss.items()} | figures[job]
    base = {"": "base", "perplexity": round(result.base_perplexity, 5)}
    table = [*({"": job, **row} for job, row in results.items()), base]
    bars = judge(results)
    show(f"{model.name}, int4-g{group_size}, {rows} x {LENGTH} calibration tokens", table)
    show("bars", bars)
    record = {"model": model.name, "group_size": group_size, "rows": rows, "length": LENGTH, "ids_sha256": digest}
    record |= {"calib": [Path(c).name for c in calib], "text": text.name, "chunks": chunks, "repeats": repeats}
    record |= {"peer_dtype": peer_dtype}
    record |= {"peer_versions": peer_versions(peer)} if peer is not None else {}
    save(f"awq-{model.name}", {**record, "table": table, "bars": bars})


if __name__ == "__main__":
    main()
