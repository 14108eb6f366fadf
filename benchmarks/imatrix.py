#!/usr/bin/env python3
"""Importance matrices: `quantize imatrix` against llama-imatrix on the same tokens, and what each is worth.

llama-imatrix reads a GGUF file of the model (float32, where every weight is the source's; then also float16, the usual
choice) and cuts the text into consecutive chunks; a model that opens texts with a beginning token has it in place of
each chunk's first. We get exactly those rows, as token ids, so that cutting and tokenizing are no part of the
difference. Both keep attention in float32. Runs take turns; figures are medians.

For every weight the mean squares are compared, column by column and summed. Then the model is quantized with either
matrix, and both files' KL divergence from it measured on other text.

    python benchmarks/imatrix.py MODEL [--calib wiki.txt] --text wiki.test.raw --programs llama.cpp/build/bin
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import llamacpp
import numpy as np
from common import Failed, Usage, measure, quantize_command, save, show, verdict

import quantize
from quantize.calib_data import read_text, token_rows
from quantize.formats.gguf.imatrix import read_imatrix
from quantize.tokenizer import load_tokenizer

OURS, EXACT = "ours", "llama-imatrix, f32"
_CHARACTERS = 12  # of text read for each token wanted: usual tokens have fewer


def write_rows(model: Path, calib: str, rows: int, length: int, folder: Path) -> tuple[Path, Path]:
    """Writes a text for llama-imatrix and the token ids of its chunks for us, one document; returns both paths.

    Raises:
        Failed: the text is too short, or our rows would not be those chunks.
    """
    tokenizer = load_tokenizer(quantize.open(model))
    plain = read_text(calib, limit=rows * length * _CHARACTERS).rstrip("\n")
    ids = tokenizer(plain, verbose=False).input_ids
    if len(ids) < max(2, rows) * length:
        raise Failed(f"{calib}: {len(ids)} tokens are no {max(2, rows)} chunks of {length}")
    table = np.array(ids[: rows * length]).reshape(rows, length)
    opened = ids[0] == tokenizer.bos_token_id
    if opened:
        table[:, 0] = tokenizer.bos_token_id
    text, listed = folder / "text.txt", folder / "ids.jsonl"
    text.write_text(plain, encoding="utf-8", newline="")
    listed.write_text(json.dumps(table[:, int(opened) :].ravel().tolist()) + "\n")
    if not np.array_equal(token_rows([str(listed)], tokenizer, rows=rows, length=length).ids.numpy(), table):
        raise Failed(f"{model}: what its tokenizer puts before a text is more than llama-imatrix does")
    return text, listed


def take_turns(jobs: Mapping[str, Sequence[str]], repeats: int) -> dict[str, dict[str, float]]:
    """Runs every job `repeats` times and returns median time and memory of each."""
    usages: dict[str, list[Usage]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, command in jobs.items():
            usages[name].append(measure(command))
            print(f"{name}: {usages[name][-1].figures}", flush=True)
    return {
        name: {
            "seconds": round(median(usage.seconds for usage in runs), 2),
            "peak_mb": round(median(usage.peak_bytes for usage in runs) / 1e6, 1),
        }
        for name, runs in usages.items()
    }


def differences(ours: Path, theirs: Path) -> dict[str, Any]:
    """Returns how far the mean squares of two matrices are apart, relative to the second's."""
    one, other = read_imatrix(ours).entries, read_imatrix(theirs).entries
    columns: dict[str, float] = {}
    summed: dict[str, float] = {}
    counts = 0.0
    for name in sorted(one.keys() & other.keys()):
        a, b = (entry.means().astype(np.float64) for entry in (one[name], other[name]))
        gap = np.abs(a - b)
        columns[name] = float(np.max(gap / np.where(b > 0, b, 1.0)))
        summed[name] = float(np.max(gap.sum(-1) / b.sum(-1)))
        counts = max(counts, float(np.abs(one[name].counts - other[name].counts).max()))
    worst = max(columns, key=columns.__getitem__)
    return {
        "entries": len(columns),
        "only in one": len(one.keys() ^ other.keys()),
        "largest difference of token counts": counts,
        "largest difference of a column": columns[worst],
        "in": worst,
        "median over entries of it": median(columns.values()),
        "largest difference, summed by entry": max(summed.values()),
    }


def worth(model: Path, matrices: Mapping[str, Path], kind: str, text: str, chunks: int, threads: int) -> dict[str, Any]:
    """Returns the KL divergence of the model quantized with each of two matrices, ours first, and their difference."""
    results = {}
    for name, matrix in matrices.items():
        out = matrix.with_name("quantized.gguf")
        options = {"type": kind, "imatrix": matrix, "eval": "none", "threads": threads, "overwrite": True}
        measure(quantize_command("run", model, out=out, **options))
        results[name] = quantize.evaluate(out, model, text=text, chunks=chunks, threads=threads)
    ours, theirs = results.values()
    both = replace(ours, chunks={**ours.chunks, "other": theirs.chunks["kld"]})
    intervals = {
        name: result.interval(lambda c: c["kld"].sum(-1) / c["tokens"].sum(-1)) for name, result in results.items()
    }
    return {**intervals, "difference": both.interval(lambda c: (c["kld"] - c["other"]).sum(-1) / c["tokens"].sum(-1))}


def judge(found: Mapping[str, Any], kld: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Returns the bars; noise is half the 95 % interval that the choice of text gives llama.cpp's figure."""
    theirs = kld[EXACT]
    noise = (theirs["high"] - theirs["low"]) / 2
    return [
        verdict("entries only in one of the two", found["only in one"], 0),
        verdict("largest relative difference of a column", found["largest difference of a column"], 0.01),
        verdict("the same, summed by entry", found["largest difference, summed by entry"], 0.01),
        verdict("difference of KL divergence / noise", abs(kld["difference"]["mean"]) / noise, 1.0),
    ]


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--calib", default="default", show_default=True, help="Text for the matrices.")
@click.option("--calib-samples", "rows", default=64, show_default=True, help="Chunks of it.")
@click.option("--calib-length", "length", default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path), help="Text to measure loss on.")
@click.option("--chunks", default=20, show_default=True, help="Chunks of it.")
@click.option("--type", "kind", default="IQ2_XS", show_default=True, help="What the model is quantized to.")
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=1, show_default=True, help="Runs of each program; medians count.")
@click.option("--work", type=click.Path(exists=True, path_type=Path), help="Folder for outputs; a temporary one else.")
@llamacpp.options
def main(
    model: Path,
    calib: str,
    rows: int,
    length: int,
    text: Path,
    chunks: int,
    kind: str,
    threads: int,
    repeats: int,
    work: Path | None,
    peer: llamacpp.LlamaCpp,
) -> None:
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        plain, listed = write_rows(model, calib, rows, length, folder)
        matrices = {OURS: folder / "ours.imatrix.gguf"}
        jobs: dict[str, Sequence[str]] = {}
        options = {"calib_samples": rows, "calib_length": length, "threads": threads, "overwrite": True}
        jobs[OURS] = quantize_command("imatrix", model, calib=listed, out=matrices[OURS], **options)
        for dtype in ("f32", "f16"):
            job, source = f"llama-imatrix, {dtype}", folder / f"{dtype}.gguf"
            quantize.convert(model, format="gguf", dtype=dtype, out=source)
            matrices[job] = folder / f"{dtype}.imatrix.gguf"
            jobs[job] = peer.imatrix(source, plain, matrices[job], length=length, chunks=rows, threads=threads)
        table = take_turns(jobs, repeats)
        apart = {job: differences(matrices[OURS], path) for job, path in matrices.items() if job != OURS}
        kld = worth(model, {job: matrices[job] for job in (OURS, EXACT)}, kind, str(text), chunks, threads)
    bars = judge(apart[EXACT], kld)
    show(f"{model.name}, {rows} x {length} tokens", [{"": job, **row} for job, row in table.items()])
    show("ours from", [{"": key, **{job: row[key] for job, row in apart.items()}} for key in apart[EXACT]])
    show(f"KL divergence of {kind}, {chunks} chunks", [{"": job, **row} for job, row in kld.items()])
    show("bars", bars)
    record = {
        "model": model.name,
        "calib": Path(calib).name,
        "rows": rows,
        "length": length,
        "type": kind,
        "repeats": repeats,
    }
    record |= {"text": text.name, "chunks": chunks, "threads": threads, "peer": peer.version}
    record |= {"table": table, "differences": apart, "kl_divergence": kld, "bars": bars}
    print(save(f"imatrix-{model.name}", record))


if __name__ == "__main__":
    main()
