"""RTN and AWQ of ours against llm-compressor's AWQModifier: loss, wall time and memory on one model, in one run.

Both sides get the same token rows: an even interleaved mix of the calibration files. All outputs are measured by one
evaluator against the same base; llm-compressor's is first unpacked into a plain float32 folder with its own functions.

    python benchmarks/awq.py MODEL --group-size 64 --peer PEERS/llmcompressor/bin/python \
        --calib wiki.txt --calib c4.txt --calib code.txt --text wiki.test.raw
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import Usage, measure, quantize_command, save, show, verdict

import quantize as library
from quantize.calib_data import token_rows
from quantize.tokenizer import load_tokenizer

SCRIPTS = Path(__file__).parent / "peers"


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--group-size", type=int, required=True)
@click.option("--peer", type=click.Path(exists=True, path_type=Path), help="Python of llm-compressor's environment.")
@click.option("--calib", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default=64, show_default=True, help="Calibration rows of 512 tokens, for both sides.")
@click.option("--chunks", default=20, show_default=True)
def main(
    model: Path, group_size: int, peer: Path | None, calib: tuple[Path, ...], text: Path, rows: int, chunks: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        common: dict[str, Any] = {"bits": 4, "group_size": group_size, "eval": "none"}
        jobs: dict[str, tuple[Usage, Path]] = {}
        for method, extra in (("rtn", {}), ("awq", {"calib": list(calib), "calib_samples": rows})):
            out = work / method
            jobs[f"ours {method}"] = (
                measure(quantize_command("run", model, method=method, out=out, **common, **extra)),
                out,
            )
        if peer is not None:
            jobs["llm-compressor awq"] = _peer(peer, model, group_size, calib, rows, work)
        table = []
        for name, (usage, out) in jobs.items():
            result = library.evaluate(out, base=model, text=str(text), chunks=chunks)
            figures = {
                "KL divergence": round(result.kl_divergence, 5),
                "perplexity": round(result.perplexity, 3),
                "same top-1": round(result.top1_agreement, 4),
            }
            table.append({"": name, **figures, **usage.figures})
            show(f"{model.name}, group {group_size}, {rows} x 512 calibration tokens", table)
        by_name = {row[""]: row for row in table}
        ours, nearest = by_name["ours awq"], by_name["ours rtn"]
        bars = [verdict("KL divergence, AWQ / RTN", ours["KL divergence"] / nearest["KL divergence"], 0.6)]
        if peer is not None:
            other = by_name["llm-compressor awq"]
            bars += [
                verdict("KL divergence, ours / llm-compressor", ours["KL divergence"] / other["KL divergence"], 1.0),
                verdict("wall time, ours / llm-compressor", ours["seconds"] / other["seconds"], 0.7),
                verdict("peak memory, ours / llm-compressor", ours["peak_mb"] / other["peak_mb"], 1.0),
            ]
        show("bars", bars)
        record = {"model": model.name, "group_size": group_size, "rows": rows, "chunks": chunks}
        record |= {"text": text.name, "calib": [c.name for c in calib], "table": table, "bars": bars}
        save(f"awq-{model.name}", record)


def _peer(
    python: Path, model: Path, group_size: int, calib: tuple[Path, ...], rows: int, work: Path
) -> tuple[Usage, Path]:
    """Returns what llm-compressor took, and its output as a plain folder."""
    checkpoint = library.open(model)
    text = token_rows([str(c) for c in calib], load_tokenizer(checkpoint), rows=rows, length=512)
    ids, packed, plain = work / "ids.npy", work / "packed", work / "plain"
    np.save(ids, text.ids.numpy())
    usage = measure([python, SCRIPTS / "llmcompressor_awq.py", model, ids, str(group_size), packed])
    measure([python, SCRIPTS / "decompress.py", packed, plain])
    return usage, plain


if __name__ == "__main__":
    main()
