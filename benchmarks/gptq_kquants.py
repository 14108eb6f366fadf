#!/usr/bin/env python3
"""GPTQ onto llama.cpp's block types against llama.cpp's own encoder with an importance matrix, at identical size.

All matrices of the blocks get one type, embedding and head stay as they are. Both sides calibrate on the same rows, an
even interleaved mix of the calibration files. Loss is the KL divergence from the unquantized model on several texts,
some of which are of kinds that calibration never saw. The figure is the geometric mean over the texts of ours / theirs,
with its 95 % interval from resampled chunks, the same chunks on both sides.

With --columns N, the first N input columns of every linear are rounded and the rest kept, in memory, by the same
encoders; that serves models whose widths are no multiples of 256, and files of which could not be written.

    python benchmarks/gptq_kquants.py MODEL --calib wiki.txt c4.txt code.txt technical.txt \
        --text wiki.test.raw multilingual.txt tiny.txt --programs PEERS/llamacpp/bin
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import partial_columns
from common import measure, quantize_command, save, show, verdict
from llamacpp import CONVERTER, PROGRAMS, LlamaCpp, plain_type

import quantize

LENGTH = 512
BARS = {"Q4_K_S": 0.75, "Q3_K_S": 0.70, "Q2_K": 0.70}
_DRAWS = 4000

Chunks = Mapping[str, np.ndarray]


def ratio(ours: Chunks, theirs: Chunks) -> dict[str, float]:
    """Returns the geometric mean over texts of the ratio of mean KL divergences, with its 95 % interval."""
    generator = np.random.default_rng(0)
    mean = float(np.mean([np.log(ours[text].mean() / theirs[text].mean()) for text in ours]))
    logs = np.zeros(_DRAWS)
    for text in ours:
        picks = generator.integers(0, len(ours[text]), (_DRAWS, len(ours[text])))
        logs += np.log(ours[text][picks].mean(1) / theirs[text][picks].mean(1)) / len(ours)
    low, high = np.quantile(logs, (0.025, 0.975))
    return {"ratio": float(np.exp(mean)), "low": float(np.exp(low)), "high": float(np.exp(high))}


def losses(model: Path, base: Path, texts: list[Path], chunks: int) -> dict[str, np.ndarray]:
    """Returns the mean KL divergence of each chunk of each text."""
    found = {}
    for text in texts:
        result = quantize.evaluate(model, base, text=str(text), chunks=chunks)
        found[text.stem] = result.chunks["kld"] / result.chunks["tokens"]
    return found


def as_files(options: argparse.Namespace, kind: str, folder: Path) -> tuple[Chunks, Chunks, dict[str, Any]]:
    """Writes a file on each side and returns the losses of both, ours first."""
    peer = LlamaCpp(options.programs.absolute(), options.converter.absolute(), options.peer_python.absolute())
    plain, matrix = folder / "plain.gguf", folder / "imatrix.gguf"
    dtype = plain_type(options.model)
    text = {"calib": options.calib, "calib_samples": options.rows, "calib_length": LENGTH}
    if not plain.exists():
        measure(peer.convert(options.model, plain, dtype))
        measure(quantize_command("imatrix", options.model, out=matrix, **text))
    kept = {"embedding_type": dtype.upper(), "output_type": dtype.upper()}
    own, other = folder / f"ours-{kind}.gguf", folder / f"theirs-{kind}.gguf"
    command = quantize_command(
        "run", options.model, method="gptq", type=kind, pure=True, out=own, eval="none", **kept, **text
    )
    took = measure([*command, *options.extra])
    line = peer.quantize(plain, other, kind, 2, matrix)
    flags = ["--pure", "--token-embedding-type", dtype, "--output-tensor-type", dtype]
    measure([line[0], *flags, *line[1:]])
    facts: dict[str, Any] = {"mb": own.stat().st_size / 1e6, "their mb": other.stat().st_size / 1e6, **took.figures}
    results = [losses(file, options.model, options.text, options.chunks) for file in (own, other)]
    return results[0], results[1], facts


def in_memory(options: argparse.Namespace, kind: str) -> tuple[Chunks, Chunks, dict[str, Any]]:
    """Rounds the first columns of a model in memory in both ways and returns the losses of both, ours first."""
    start = time.perf_counter()
    found = [
        partial_columns.losses(
            options.model, options.columns, kind, way, options.calib, options.rows, options.text, options.chunks
        )
        for way in ("gptq", "importance")
    ]
    return found[0], found[1], {"seconds": time.perf_counter() - start}


def arguments() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", nargs="+", default=list(BARS), help="mixes whose base type all linears get")
    parser.add_argument("--calib", nargs="+", required=True, help="calibration texts, mixed evenly")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="texts to measure loss on")
    parser.add_argument("--rows", type=int, default=128, help="calibration rows of 512 tokens, for both")
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--columns", type=int, help="round only so many input columns of each linear, in memory")
    parser.add_argument("--extra", nargs="*", default=[], help="further options of our run, such as --shrinkage=0.4")
    parser.add_argument("--programs", type=Path, default=PROGRAMS, help="folder of llama.cpp's programs")
    parser.add_argument("--converter", type=Path, default=CONVERTER, help="convert_hf_to_gguf.py")
    parser.add_argument(
        "--peer-python", type=Path, default=Path(quantize_command("run", Path())[0]).with_name("python")
    )
    parser.add_argument("--work", type=Path, help="folder for outputs; a temporary one else")
    parser.add_argument("--name", help="name of the result; gptq-kquants-MODEL else")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    table: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        for kind in options.types:
            ours, theirs, facts = in_memory(options, kind) if options.columns else as_files(options, kind, Path(name))
            figure = ratio(ours, theirs)
            row: dict[str, Any] = {"type": kind}
            for text in ours:
                row |= {text: float(ours[text].mean()), f"{text}, llama.cpp": float(theirs[text].mean())}
            table.append({**row, **figure, **facts})
            bars.append(verdict(f"{kind}: upper end of the ratio", figure["high"], BARS.get(kind, 1.0)))
            show(kind, table[-1:])
    show(f"{options.model.name}, {options.rows} x {LENGTH} tokens", table)
    show("bars", bars)
    record = {
        "model": options.model.name,
        "rows": options.rows,
        "length": LENGTH,
        "columns": options.columns,
        "calib": [Path(source).name for source in options.calib],
        "chunks": options.chunks,
        "extra": options.extra,
    }
    save(options.name or f"gptq-kquants-{options.model.name}", {**record, "table": table, "bars": bars})


if __name__ == "__main__":
    main()
