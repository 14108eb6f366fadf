"""What was done and what it cost. JSON first; model card and terminal tables are views of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.planning import Plan


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a run.

    Attributes:
        out: The output folder.
        source: The model as the user named it.
        base: What the figures compare with: the source, or "SOURCE, dequantized from TYPE".
        method: Name of the method, or None for a conversion.
        format: Name of the format.
        settings: What decides the bytes: scheme, recipe, seed, calibration.
        figures: Sizes and counts.
        notes: Fallbacks and notices, one line each.
        errors: Relative squared error `|Q - W|^2 / |W|^2` of each quantized tensor, by stored name.
        quality: The evaluation, or None where it was not measured.
        files: Every file of the output by its name in the folder: `--overwrite` removes no others.
    """

    out: Path
    source: str
    base: str
    method: str | None
    format: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    quality: Mapping[str, Any] | None = None
    files: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, the output's path included."""
        return {
            "out": str(self.out),
            "source": self.source,
            "base": self.base,
            "method": self.method,
            "format": self.format,
            "settings": dict(self.settings),
            "figures": dict(self.figures),
            "notes": list(self.notes),
            "errors": dict(self.errors),
            "quality": self.quality,
            "files": list(self.files),
        }

    def to_json(self) -> str:
        """Returns the report as JSON text; it holds no times and no local paths, so equal runs give equal files."""
        value = self.to_dict()
        del value["out"]
        return json_text(value)


def json_text(value: Any) -> str:
    """Returns plain values as JSON text with a line end; numbers that are not finite, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures(plan: Plan, source_bytes: int) -> dict[str, Any]:
    """Returns the sizes and counts of a plan that a report shows."""
    weights = sum(entry.count for entry in plan.entries)
    quantized = sum(entry.count for entry in plan.quantized)
    return {
        "source_bytes": source_bytes,
        "output_bytes": plan.output_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "planned_bits_per_weight": round(plan.planned_bits_per_weight, 4),
        "linear_bits_per_weight": round(plan.linear_bits_per_weight, 4),
        "tensors": len(plan.entries),
        "quantized": len(plan.quantized),
        "fallbacks": len(plan.fallbacks),
        "dropped": len(plan.dropped),
        "quantized_share": round(quantized / max(1, weights), 4),
        "fallback_share": round(plan.fallback_share, 4),
    }


def card(report: Report, original: str | None) -> str:
    """Returns the model card, README.md of the output.

    Args:
        report: The outcome.
        original: The source's own card; its licence line is taken over and its text follows ours.
    """
    front, body = _split(original or "")
    kept = [line for line in front if line.split(":")[0] in ("license", "license_name", "license_link", "language")]
    lines = ["---", f"base_model: {report.source}", "base_model_relation: quantized"]
    lines += [f"library_name: {'mlx' if report.format == 'mlx' else 'transformers'}"]
    lines += [*kept, "tags:", f"- {report.format}", "---", ""]
    name, numbers, settings = report.out.name, report.figures, report.settings
    lines += [f"# {name}", ""]
    if report.method is None:
        lines += [f"`{report.source}` in {report.format} format.", ""]
    else:
        lines += [f"`{report.source}` quantized with {report.method} to {settings['scheme']} ({report.format}).", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| size | {numbers['output_bytes'] / 1e6:.1f} MB of {numbers['source_bytes'] / 1e6:.1f} MB |"]
    lines += [f"| bits per weight | {numbers['bits_per_weight']:.2f}, of the quantized linears "
              f"{numbers['linear_bits_per_weight']:.2f} |"] if numbers["quantized"] else []  # fmt: skip
    lines += [f"| {key} | {value} |" for key, value in settings.items() if key != "scheme" and value not in (None, [])]
    lines += ["", "## Measured loss", "", *_quality(report), ""]
    if report.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in report.notes), ""]
    if body.strip():
        lines += ["## Card of the source", "", body.strip(), ""]
    return "\n".join(lines)


def _quality(report: Report) -> list[str]:
    if report.quality is None:
        command = f"quantize eval {report.out.name} --base {report.source}"
        return ["Not measured. To measure it:", "", f"    {command}"]
    value = report.quality
    rows = [
        f"| perplexity of {report.base} | {value['base']['perplexity']:.4f} |",
        f"| perplexity of this model | {value['perplexity']:.4f} |",
        f"| difference of ln perplexity, paired, 95 % interval | {interval(value['ln_ppl_difference'])} |",
        f"| KL divergence from the base | {interval(value['kl_divergence'])} |",
        f"| same most likely token | {100 * value['top1_agreement']['mean']:.2f} % |",
    ]
    protocol = value["protocol"]
    said = (
        f"{protocol['scored_tokens']} tokens of {protocol['text']} (sha256 {protocol['text_sha256'][:12]}), "
        f"context {protocol['context']}, {protocol['definition']}."
    )
    return ["| | |", "|---|---|", *rows, "", said]


def interval(value: Mapping[str, float]) -> str:
    """Returns a mean with its 95 % interval as text."""
    if not math.isfinite(value["low"]):
        return f"{value['mean']:.5f} (one chunk gives no interval)"
    return f"{value['mean']:.5f} [{value['low']:.5f}, {value['high']:.5f}]"


def _split(text: str) -> tuple[list[str], str]:
    """Returns the front-matter lines and the body of a card."""
    lines = text.splitlines()
    if lines and lines[0].strip() == "---" and "---" in lines[1:]:
        end = lines.index("---", 1)
        return lines[1:end], "\n".join(lines[end + 1 :])
    return [], text
