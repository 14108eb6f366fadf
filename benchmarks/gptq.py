#!/usr/bin/env python3
"""RTN, AWQ, GPTQ and AWQ+GPTQ of ours against GPTQModel's GPTQ: loss, wall time and memory on one model, in one run.

All get the same token rows, an even interleaved mix of the calibration files, and the same grid: symmetric, which is
GPTQModel's default, or with zero points. All outputs are measured by one evaluator against the same base. Time and
memory are of whole processes, evaluation not included. GPTQModel runs on the CPU with its defaults
(desc_act off), the model loaded in float32, which is its fastest way there.

    python benchmarks/gptq.py MODEL --bits 4 3 --group-size 64 --peer PEERS/gptqmodel/bin/python \
        --calib wiki.txt c4.txt code.txt --text wiki.test.raw
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awq import SCRIPTS, run_jobs, write_ids
from common import measure, quantize_command, save, show, verdict

import quantize

LENGTH = 512
METHODS = ("rtn", "awq", "gptq", "awq+gptq")
PEER = "GPTQModel gptq"


def judge(bits: int, rows: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Returns the bars of one width: those among ours, and those against GPTQModel if it ran."""
    loss = {name: row["kld"] for name, row in rows.items()}
    ours, peer = rows["gptq"], rows.get(PEER)
    better = min(loss["awq"], loss["gptq"])
    bars = [
        verdict(f"{bits} bits: KL divergence, GPTQ / RTN", loss["gptq"] / loss["rtn"], 0.75),
        verdict(f"{bits} bits: KL divergence, AWQ+GPTQ / better of the two", loss["awq+gptq"] / better, 1.0),
    ]
    if peer is not None:
        bars += [
            verdict(f"{bits} bits: KL divergence, ours / GPTQModel", ours["kld"] / peer["kld"], 1.0),
            verdict(f"{bits} bits: wall time, ours / GPTQModel", ours["seconds"] / peer["seconds"], 1.0),
            verdict(f"{bits} bits: peak memory, ours / GPTQModel", ours["peak_mb"] / peer["peak_mb"], 0.5),
        ]
    return bars


def compare(options: argparse.Namespace, bits: int, ids: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Quantizes to one width in all ways and returns the figures of each."""
    outputs = {name: folder / f"{name}-{bits}" for name in METHODS}
    grid: dict[str, Any] = {"bits": bits, "group_size": options.group_size, "eval": "none"}
    grid |= {"sym" if options.symmetric else "no_sym": True}
    text = {"calib": options.calib, "calib_samples": options.rows, "calib_length": LENGTH}
    jobs: dict[str, list[str | Path]] = {
        name: list(
            quantize_command("run", options.model, method=name, out=out, **grid, **({} if name == "rtn" else text))
        )
        for name, out in outputs.items()
    }
    if options.peer is not None:
        outputs[PEER] = folder / f"peer-{bits}"
        words = (bits, options.group_size, int(options.symmetric), options.peer_dtype, options.peer_batch)
        jobs[PEER] = [options.peer, SCRIPTS / "gptqmodel_gptq.py", options.model, ids, *map(str, words), outputs[PEER]]
    figures = run_jobs(jobs, outputs, options.repeats)
    found: dict[str, dict[str, float]] = {}
    for name, out in outputs.items():
        result = quantize.evaluate(out, options.model, text=str(options.text), chunks=options.chunks)
        loss = {"kld": result.kl_divergence, "perplexity": result.perplexity, "top1": result.top1_agreement}
        found[name] = {key: round(value, 5) for key, value in loss.items()} | figures[name]
        found[name]["base perplexity"] = round(result.base_perplexity, 5)
    return found


def peer_versions(python: Path) -> dict[str, str]:
    """Returns the versions of what the peer runs on."""
    names = ("GPTQModel", "torch", "transformers")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    return dict(zip(names, measure([python, "-c", code]).output.split(), strict=True))


def arguments() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--no-sym", dest="symmetric", action="store_false", help="with zero points")
    parser.add_argument("--peer", type=Path, help="Python of GPTQModel's environment")
    parser.add_argument("--peer-dtype", default="float32", help="what GPTQModel loads the model in")
    parser.add_argument("--peer-batch", type=int, default=1, help="rows of GPTQModel's batches")
    parser.add_argument("--calib", nargs="+", required=True, help="calibration texts, mixed evenly")
    parser.add_argument("--text", type=Path, required=True, help="text to measure loss on")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows of 512 tokens, for all")
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each job; medians of time and memory count")
    parser.add_argument("--work", type=Path, help="folder for outputs; a temporary one else")
    parser.add_argument("--name", help="name of the result; gptq-MODEL else")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    table: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        digest = write_ids(options.model, options.calib, options.rows, folder / "ids.npy")
        for bits in options.bits:
            rows = compare(options, bits, folder / "ids.npy", folder)
            table += [{"bits": bits, "": job, **row} for job, row in rows.items()]
            bars += judge(bits, rows)
    kind = "symmetric" if options.symmetric else "zero points"
    show(f"{options.model.name}, groups of {options.group_size}, {kind}, {options.rows} x {LENGTH} tokens", table)
    show("bars", bars)
    record = {
        "model": options.model.name,
        "group_size": options.group_size,
        "symmetric": options.symmetric,
        "rows": options.rows,
        "length": LENGTH,
        "ids_sha256": digest,
        "calib": [Path(source).name for source in options.calib],
        "text": options.text.name,
        "chunks": options.chunks,
        "repeats": options.repeats,
        "peer_dtype": options.peer_dtype,
        "peer_batch": options.peer_batch,
        "peer_versions": peer_versions(options.peer) if options.peer is not None else {},
    }
    save(options.name or f"gptq-{options.model.name}", {**record, "table": table, "bars": bars})


if __name__ == "__main__":
    main()
