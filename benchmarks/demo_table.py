"""Prints base and quantized models side by side, from the reports that `quantize run` left in their folders.

usage: demo_table.py BASE FOLDER [FOLDER ...]    the folders made from BASE with --eval
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(origin: str, folders: list[str]) -> None:
    reports = [json.loads((Path(folder) / "quantize.json").read_text(encoding="utf-8")) for folder in folders]
    first = reports[0]
    protocol = first["quality"]["protocol"]
    table = Table(title=f"{protocol['scored_tokens']} tokens of {protocol['text']}, {protocol['definition']}")
    for column in ("model", "size MB", "bits/weight", "perplexity", "KL divergence", "same top-1"):
        table.add_column(column, justify="left" if column == "model" else "right")
    base, weights = first["quality"]["base"], first["figures"]["source_bytes"]
    bits = first["figures"]["bits_per_weight"] * weights / first["figures"]["output_bytes"]
    size = f"{weights / 1e6:.1f}"
    table.add_row(_base_name(Path(origin)), size, f"{bits:.2f}", f"{base['perplexity']:.3f}", "0", "100 %")
    for folder, report in zip(folders, reports, strict=True):
        quality, figures = report["quality"], report["figures"]
        table.add_row(
            Path(folder).name,
            f"{figures['output_bytes'] / 1e6:.1f}",
            f"{figures['bits_per_weight']:.2f}",
            f"{quality['perplexity']:.3f}",
            f"{quality['kl_divergence']['mean']:.4f}",
            f"{100 * quality['top1_agreement']['mean']:.1f} %",
        )
    Console(width=120).print(table)


def _base_name(origin: Path) -> str:
    """Says what the base is: a folder that was itself made from a quantized file tells so in its own report."""
    report = origin / "quantize.json"
    if not report.is_file():
        return origin.name
    made_from = str(json.loads(report.read_text(encoding="utf-8"))["base"])
    return f"{origin.name} ({made_from.rpartition(', ')[2]})"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
