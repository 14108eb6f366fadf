"""The Python API; the command line calls these functions and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from quantize import checkpoint as _checkpoint
from quantize import formats, methods, presets
from quantize.errors import unknown_name
from quantize.evaluation import DEFAULT_TEXT, Evaluation, evaluate_checkpoints, protocol
from quantize.formats.base import Checkpoint
from quantize.pipeline import Job
from quantize.planning import Plan
from quantize.progress import Progress, silent
from quantize.recipe import KEEP
from quantize.report import Report
from quantize.schemes import FAMILIES
from quantize.settings import Settings


def _unannounced(plan: Plan) -> None:
    """Lets a plan pass."""


def open(model: str | Path | None = None, adapters: tuple[str, ...] = ()) -> Checkpoint:
    """Returns a model's checkpoint: config, side files, and tensors that are read by name when asked for.

    Args:
        model: A folder, a .gguf file or a hub id; None for the current folder.
        adapters: LoRA folders to merge on read, `DIR` or `DIR:SCALE`.

    Raises:
        InputError: there is no such model, or it is broken or of an unknown kind.
    """
    return _checkpoint.open_checkpoint(model, adapters)


def plan(model: str | Path | None = None, **options: Any) -> Plan:
    """Returns what `run` with these options would do, from headers alone; touches nothing.

    Args:
        model: As for `run`.
        options: As for `run`.

    Returns:
        The plan; its `refusal` says if the run would not start because of what lies on the disk.

    Raises:
        QuantizeError: there is no plan that could be carried out.
    """
    return Job(model, _settings(options)).plan


def run(
    model: str | Path | None = None,
    *,
    progress: Progress = silent,
    announce: Callable[[Plan], None] = _unannounced,
    **options: Any,
) -> Report:
    """Quantizes a model and returns the report; the output stands complete under its final name.

    Args:
        model: A folder, a .gguf file or a hub id; None for the current folder.
        progress: Called with what is being done, how many parts are done, and of how many.
        announce: Called with the plan before the work begins.
        options: The fields of `quantize.pipeline.Settings`: `method`, `bits`, `group_size`, `out`, `calib`, ...

    Raises:
        QuantizeError: a subclass that tells the kind; see `quantize.errors`.
    """
    job = Job(model, _settings(options), progress)
    announce(job.plan)
    return job.run()


def convert(
    model: str | Path,
    *,
    format: str = "hf",
    progress: Progress = silent,
    announce: Callable[[Plan], None] = _unannounced,
    **options: Any,
) -> Report:
    """Writes a model in another format without rounding to a coarser grid; quantized sources are dequantized.

    Args:
        model: As for `run`.
        format: Name of the target format.
        progress: As for `run`.
        announce: As for `run`.
        options: As for `run`; `dtype` says what plain tensors become (a quantized source becomes bf16).

    Raises:
        QuantizeError: as for `run`.
    """
    return run(model, progress=progress, announce=announce, format=format, **options)


def evaluate(
    model: str | Path,
    base: str | Path | None = None,
    *,
    text: str = DEFAULT_TEXT,
    definition: str = "llamacpp",
    context: int = 512,
    stride: int | None = None,
    chunks: int | None = None,
    threads: int | None = None,
    assume_tied: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Returns a model's perplexity and, against a base, KL divergence, top-1 agreement and the paired difference.

    Args:
        model: A folder, a .gguf file or a hub id.
        base: What it is compared with; None for perplexity alone.
        text: A text file, `hub:NAME`, or `default:eval`, the bundled text that calibration never uses.
        definition: `llamacpp`, `gptq` or `sliding`; see `quantize.evaluation.protocol`.
        context: Tokens in a window.
        stride: Tokens between windows' starts; None for the definition's own.
        chunks: Windows to score at most; None for all.
        threads: Threads; None for all processors.
        assume_tied: Whether a missing head is the embedding.
        progress: As for `run`.

    Raises:
        InputError: a model or the text cannot be used, or the tokenizers differ.
        UsageError: the definition makes no windows.
    """
    return evaluate_checkpoints(
        open(model),
        open(base) if base is not None else None,
        names=(str(model), str(base) if base is not None else None),
        text=text,
        definition=protocol(definition, context, stride),
        chunks=chunks,
        threads=threads,
        assume_tied=assume_tied,
        progress=progress,
    )


def inspect(model: str | Path | None = None, adapters: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns what a checkpoint holds as plain values: schemes, sizes, metadata and every tensor, from headers alone.

    Args:
        model: As for `open`.
        adapters: As for `open`.

    Raises:
        InputError: as for `open`.
    """
    return _checkpoint.describe(open(model, adapters))


def catalog() -> dict[str, Any]:
    """Returns the methods, formats and schemes and which go together, computed by asking them."""
    kept = {"spelling": KEEP, "meaning": "as it is stored; in rules only"}
    return {
        "methods": [
            {"name": m.name, "summary": m.summary, "calibrates": m.calibrates} for m in methods.table().values()
        ],
        "formats": [
            {"name": f.name, "summary": f.summary, "schemes": presets.written(f)} for f in formats.table().values()
        ],
        "schemes": [*({"spelling": ", ".join(f.examples), "meaning": f.meaning} for f in FAMILIES), kept],
        "combinations": presets.matrix(),
    }


def _settings(options: dict[str, Any]) -> Settings:
    known = [field.name for field in fields(Settings)]
    for name in options:
        if name not in known:
            raise unknown_name("option", name, known)
    return Settings(**options)
