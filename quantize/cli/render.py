"""What commands show: tables on stdout, progress and remarks on stderr, or one JSON value alone on stdout."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from quantize.cli.failures import Session
from quantize.evaluation import Evaluation
from quantize.formats.gguf.edit import Edited
from quantize.formats.gguf.imatrix import ImportanceMatrix
from quantize.gathering import Outlook
from quantize.imatrix import coverage, statistics
from quantize.planning import Plan, describe
from quantize.progress import Progress as Callback
from quantize.report import Report, figures, interval, json_text
from quantize.writer import partial_path

# Seconds between lines of progress where there is no terminal.
_PAUSE = 10.0
# Wide enough that nothing is cut where no terminal sets the width.
_WIDE = 400


# Pieces


def size(nbytes: float) -> str:
    """Returns bytes in decimal units: `1.23 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} bytes"


def emit(value: Any) -> None:
    """Writes a value as JSON to stdout."""
    click.echo(json_text(value), nl=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; columns whose title starts with `>` are flushed right."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        right = column.startswith(">")
        shown.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        shown.add_row(*(Text(str(cell)) for cell in row))
    _console().print(shown)


def facts(rows: Iterable[tuple[str, object]]) -> None:
    """Prints names and their values, aligned."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in rows:
        shown.add_row(Text(name), Text(str(value)))
    _console().print(shown)


def notes(lines: Iterable[str]) -> None:
    """Prints remarks, one a line."""
    for line in lines:
        click.echo(f"note: {line}")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


# While it runs


@contextmanager
def progress() -> Iterator[Callback]:
    """A context that gives the callback for long work: a bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            for task in tasks.values():
                bar.update(task, visible=False)
            tasks[what] = bar.add_task(what, total=total)
            bar.start()
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()


def _lines() -> Callback:
    last: float | None = None

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        last = time.monotonic() if last is None else last
        if time.monotonic() - last >= _PAUSE:
            last = time.monotonic()
            click.echo(f"{what}: {done} of {total}", err=True)

    return show


def header(plan: Plan) -> None:
    """Says on stderr what a run is about to do; after an interruption, the command's end looks where it said."""
    session = click.get_current_context().find_object(Session)
    if session is not None:
        session.partial = partial_path(plan.out)
    method = plan.method.name if plan.method else "no rounding"
    click.echo(f"{plan.source}: {method}, {_schemes(plan)}, format {plan.format.name}", err=True)
    bits = f"{plan.bits_per_weight:.2f} bits per weight"
    click.echo(f"{size(plan.source_bytes)} -> {size(plan.output_bytes)}, {bits}, in {plan.out}", err=True)


# Results


def report(value: Report, as_json: bool) -> None:
    """Shows what a run did."""
    if as_json:
        emit(value.to_dict())
        return
    numbers = value.figures
    rows: list[tuple[str, object]] = [
        ("output", value.out),
        ("size", f"{size(numbers['output_bytes'])} of {size(numbers['source_bytes'])}"),
        ("bits per weight", _bits(numbers["bits_per_weight"], numbers["linear_bits_per_weight"], numbers["quantized"])),
        *([("fallbacks", _fallbacks(numbers["fallbacks"], numbers))] if numbers["fallbacks"] else []),
    ]
    facts([*rows, *(_quality(value.quality) if value.quality else [])])
    notes(value.notes)
    if value.quality is None and value.method is not None:
        click.echo(f"loss not measured; to measure it: quantize eval {value.out} --base {value.source}")


def plan(value: Plan, as_json: bool) -> None:
    """Shows a plan; raises what the run would be refused with."""
    if as_json:
        emit(describe(value))
    else:
        _plan(value)
    if value.refusal is not None:
        raise value.refusal


def _plan(value: Plan) -> None:
    method = value.method.name if value.method else "none (plain conversion)"
    facts(
        [
            ("source", value.source),
            ("output", value.out),
            ("method", method),
            ("format", value.format.name),
        ]
    )
    click.echo()
    groups: dict[tuple[str, ...], int] = {}
    for entry in value.entries:
        shape = " x ".join(map(str, entry.shape)) or "scalar"
        key = (_pattern(entry.name), shape, str(entry.source), str(entry.scheme), entry.rule)
        groups[key] = groups.get(key, 0) + 1
    table(
        ("tensor", ">count", ">shape", "from", "to", "rule"),
        ((name, count, *rest) for (name, *rest), count in groups.items()),
    )
    dropped: dict[tuple[str, str], int] = {}
    for name, rule in value.dropped.items():
        dropped[_pattern(name), rule] = dropped.get((_pattern(name), rule), 0) + 1
    if dropped:
        click.echo()
        table(("dropped", ">count", "rule"), ((name, count, rule) for (name, rule), count in dropped.items()))
    click.echo()
    facts(
        [
            ("size", f"{size(value.output_bytes)} of {size(value.source_bytes)}"),
            ("bits per weight", _bits(value.bits_per_weight, value.linear_bits_per_weight, len(value.quantized))),
            ("tensors", f"{len(value.entries)}, {len(value.quantized)} of them quantized"),
            ("fallbacks", _fallbacks(len(value.fallbacks), figures(value, value.source_bytes))),
            ("peak memory", f"{size(value.peak_bytes)} (estimate)"),
            ("free disk", size(value.free_bytes)),
        ]
    )
    notes(value.notices)


def evaluation(value: Evaluation, as_json: bool) -> None:
    """Shows an evaluation."""
    record = value.to_dict()
    if as_json:
        emit(record)
        return
    facts([("model", value.model), *_quality(record)])


def contents(value: Mapping[str, Any], as_json: bool) -> None:
    """Shows what a checkpoint holds."""
    if as_json:
        emit(value)
        return
    names = ", ".join(value["architectures"] or [])
    quantization = ", ".join(f"{k} {v}" for k, v in value["quantization"].items() if not isinstance(v, (list, dict)))
    facts(
        [
            ("path", value["path"]),
            ("format", value["format"]),
            ("architecture", names or value["model_type"]),
            ("quantization", quantization or "none"),
            ("tensors", value["tensors"]),
            ("weights", f"{value['weights']:,}"),
            ("size", f"{size(value['bytes'])}, {value['bits_per_weight']:.2f} bits per weight"),
        ]
    )
    click.echo()
    table(
        ("scheme", ">tensors", ">weights", ">size", ">bits per weight"),
        (
            (name, row["tensors"], f"{row['weights']:,}", size(row["bytes"]), f"{row['bits_per_weight']:.2f}")
            for name, row in value["schemes"].items()
        ),
    )
    for title, rows in (("metadata", value["metadata"]), ("dropped", value["dropped"])):
        if rows:
            click.echo(f"\n{title}")
            facts((f"  {name}", _short(text)) for name, text in rows.items())
    if value["side_files"]:
        click.echo("\nside files")
        for name in value["side_files"]:
            click.echo(f"  {name}")


def difference(value: Mapping[str, Any], as_json: bool) -> None:
    """Shows in what two checkpoints differ."""
    if as_json:
        emit(value)
        return
    table(
        ("", ">tensors", ">size", ">bits per weight", "types"),
        (
            (m["path"], m["tensors"], size(m["tensor_bytes"]), f"{m['bits_per_weight']:.2f}", ", ".join(m["types"]))
            for m in value["models"]
        ),
    )
    rows: list[tuple[str, str, str, str]] = []
    for what in ("metadata", "tensors"):
        part = value[what]
        rows += [(what, key, "", _brief(new)) for key, new in part["added"].items()]
        rows += [(what, key, _brief(old), "") for key, old in part["removed"].items()]
        rows += [(what, key, _brief(old), _brief(new)) for key, (old, new) in part["changed"].items()]
    rows += [("contents", name, "", "other bytes") for name in value["differing"] or ()]
    click.echo()
    if rows:
        table(("", "name", "first", "second"), rows)
    else:
        click.echo("no difference" + ("" if value["differing"] is not None else " in the headers"))


def edited(value: Edited, dry_run: bool, as_json: bool) -> None:
    """Shows what an edit did, or would do."""
    if as_json:
        emit({"changed": list(value.changed), "in_place": value.in_place, "written": value.written})
        return
    if not value.changed:
        click.echo("nothing to change: every value was so already")
        return
    how = "in place" if value.in_place else "by a copy"
    done = "would change" if dry_run else "changed"
    click.echo(f"{done} {', '.join(value.changed)} {how}, {size(value.written)} written")


def outlook(value: Outlook, out: str, as_json: bool) -> None:
    """Shows what gathering an importance matrix would do."""
    tokens = value.rows * value.length
    if as_json:
        emit({"out": out, "tokens": tokens, **asdict(value), "source": str(value.source)})
        return
    facts(
        [
            ("source", value.source),
            ("output", out),
            ("text", f"{value.rows} rows of {value.length} tokens, {tokens} in all: {', '.join(value.datasets)}"),
            ("entries", f"{value.entries}, gathered over {value.blocks} blocks"),
            ("peak memory", f"{size(value.peak_bytes)} (estimate)"),
        ]
    )


def importance(value: ImportanceMatrix, out: str | None, as_json: bool) -> None:
    """Shows an importance matrix."""
    rows = statistics(value)
    stacks = coverage(value)
    if as_json:
        made = {"datasets": value.datasets, "chunk_count": value.chunk_count, "chunk_size": value.chunk_size}
        experts = [asdict(stack) for stack in stacks]
        emit({"out": out, **made, "entries": [asdict(row) for row in rows], "experts": experts})
        return
    if out is None:
        table(
            (
                "weight",
                ">columns",
                ">sum",
                ">mean",
                ">max",
                ">active",
                ">evenness",
                ">outliers",
                ">as the layer before",
            ),
            (
                (
                    row.name,
                    row.columns,
                    f"{row.total:.4g}",
                    f"{row.mean:.4g}",
                    f"{row.high:.4g}",
                    f"{100 * row.active:.1f} %",
                    f"{row.evenness:.3f}",
                    f"{100 * row.outliers:.1f} %",
                    "" if row.likeness is None else f"{row.likeness:.4f}",
                )
                for row in rows
            ),
        )
        click.echo()
    texts = ", ".join(value.datasets) or "unknown"
    facts(
        [
            *([("output", out)] if out is not None else []),
            ("entries", len(value.entries)),
            ("text", f"{value.chunk_count} chunks of {value.chunk_size or 'unknown'} tokens: {texts}"),
        ]
    )
    lacking = [s for s in stacks if s.unseen or s.rare]
    notes(f"{s.name}: {len(s.unseen)} of {s.experts} experts saw no token, {len(s.rare)} few" for s in lacking)


def _brief(value: Mapping[str, Any]) -> str:
    if "shape" in value:
        return f"{value['type']} {' x '.join(map(str, value['shape']))}"
    if "sha256" in value:
        return f"{value['type']} of {value['length']}, sha256 {value['sha256'][:12]}"
    return _short(value.get("value"))


def catalog(value: Mapping[str, Any], as_json: bool) -> None:
    """Shows methods, formats and schemes."""
    if as_json:
        emit(value)
        return
    table(("method", "what it does"), ((row["name"], row["summary"]) for row in value["methods"]))
    click.echo()
    table(
        ("format", "for", "written schemes"),
        ((row["name"], row["summary"], _ranges(row["schemes"]) or "none: read only") for row in value["formats"]),
    )
    click.echo()
    table(("scheme", "meaning"), ((row["spelling"], row["meaning"]) for row in value["schemes"]))
    click.echo()
    table(
        ("--type", "what it is (average bits of an 8B llama)"),
        ((row["name"], row["summary"]) for row in value["types"]),
    )
    click.echo()
    table(
        ("method", "format", "schemes"),
        ((row["method"], row["format"], _ranges(row["schemes"])) for row in value["combinations"]),
    )


def _quality(value: Mapping[str, Any]) -> list[tuple[str, object]]:
    protocol = value["protocol"]
    rows: list[tuple[str, object]] = [("perplexity", f"{value['perplexity']:.4f}")]
    if "base" in value:
        quantiles = ", ".join(f"{name} {number:.4f}" for name, number in value["kld_quantiles"].items())
        rows += [
            ("base perplexity", f"{value['base']['perplexity']:.4f} ({value['base']['model']})"),
            ("ln difference", f"{interval(value['ln_ppl_difference'])} (paired, 95 % interval)"),
            ("KL divergence", f"{interval(value['kl_divergence'])}; {quantiles}"),
            ("same top token", interval(value["top1_agreement"])),
        ]
    else:
        rows += [("ln perplexity", f"{interval(value['ln_ppl'])} (95 % interval)")]
    text = f"{protocol['scored_tokens']} tokens in {protocol['chunks']} chunks of {protocol['text']}"
    return [*rows, ("text", text), ("protocol", protocol["definition"])]


def _bits(whole: float, linears: float, quantized: int) -> str:
    return f"{whole:.2f}" + (f", of the quantized tensors {linears:.2f}" if quantized else "")


def _fallbacks(count: int, numbers: Mapping[str, Any]) -> str:
    """Returns how much of a model got something else than asked for, and what that cost."""
    if not count:
        return "0"
    share, planned = 100 * numbers["fallback_share"], numbers["planned_bits_per_weight"]
    return f"{count} tensors, {share:.1f} % of the weights; {planned:.2f} bits per weight were planned"


def _schemes(plan: Plan) -> str:
    used = sorted({str(entry.scheme) for entry in plan.quantized} or {str(entry.scheme) for entry in plan.entries})
    return ", ".join(used)


def _pattern(name: str) -> str:
    """Returns a name with its numbers replaced by `*`, so that the layers of a model share a row."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _ranges(schemes: Sequence[str]) -> str:
    """Returns spellings in one line, those that differ only in the bits as a range: `int2..8-g128`."""
    widths: dict[tuple[str, str], list[int]] = {}
    result: list[str] = []
    for scheme in schemes:
        match = re.fullmatch(r"(int)(\d+)(-.+)", scheme)
        if match is None:
            result.append(scheme)
        else:
            widths.setdefault((match[1], match[3]), []).append(int(match[2]))
    for (head, tail), bits in widths.items():
        runs = f"{min(bits)}..{max(bits)}" if len(bits) > 1 and max(bits) - min(bits) == len(bits) - 1 else None
        result += [f"{head}{runs}{tail}"] if runs else [f"{head}{b}{tail}" for b in bits]
    return ", ".join(result)
