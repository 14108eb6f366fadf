"""The Python API; the command line calls these functions and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from quantize import checkpoint as _checkpoint
from quantize import formats, methods, presets
from quantize.errors import InputError, UsageError, unknown_name
from quantize.evaluation import DEFAULT_TEXT, Evaluation, evaluate_checkpoints, protocol
from quantize.formats.base import Checkpoint
from quantize.formats.gguf.compare import compare as compare_gguf
from quantize.formats.gguf.container import read_part
from quantize.formats.gguf.edit import Edited
from quantize.formats.gguf.edit import edit as edit_gguf
from quantize.formats.gguf.header import read_values
from quantize.formats.gguf.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from quantize.formats.gguf.metadata import Value, parse_value, text
from quantize.formats.gguf.mixes import MIXES
from quantize.gathering import Outlook, importance_of, outlook
from quantize.imatrix import merge
from quantize.pipeline import Job
from quantize.planning import Plan
from quantize.progress import Progress, silent
from quantize.ranks import ours
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

    Under torchrun all workers call it alike, share the work, and get the same report or the same error.

    Args:
        model: A folder, a .gguf file or a hub id; None for the current folder.
        progress: Called with what is being done, how many parts are done, and of how many.
        announce: Called with the plan before the work begins.
        options: The fields of `quantize.settings.Settings`: `method`, `bits`, `group_size`, `out`, `calib`, ...

    Raises:
        QuantizeError: a subclass that tells the kind; see `quantize.errors`.
    """
    ranks = ours()
    with ranks.together():
        job = Job(model, _settings(options), progress if ranks.first else silent, ranks)
        if ranks.first:
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


def importance(
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    legacy: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> ImportanceMatrix:
    """Returns the importance matrix of a model: how much each input column of each matrix is used by a text.

    Args:
        model: As for `run`.
        out: File to write it to, in llama.cpp's format.
        legacy: Whether in llama.cpp's older format, which knows nothing of single experts.
        overwrite: Whether a file that exists is replaced.
        progress: As for `run`.
        options: Fields of `quantize.settings.Settings` that say the text: `calib`, `calib_samples`, `calib_length`,
            `seed`; `adapters`, `arch`, `threads`, `assume_tied`, `activation_budget`.

    Raises:
        QuantizeError: as for `run`.
    """
    ranks = ours()
    with ranks.together():
        file = ranks.from_first(lambda: _new_file(out, overwrite))
        folder = Path.cwd() if file is None else file.parent
        matrix = importance_of(model, _settings(options), folder, progress if ranks.first else silent, ranks)
        if file is not None and ranks.first:
            write_imatrix(file, matrix, legacy)
    return matrix


def plan_importance(
    model: str | Path | None = None, *, out: str | Path | None = None, overwrite: bool = False, **options: Any
) -> Outlook:
    """Returns what `importance` with these options would do, from headers alone; touches nothing.

    Args:
        model: As for `run`.
        out: As for `importance`.
        overwrite: As for `importance`.
        options: As for `importance`.

    Raises:
        QuantizeError: it could not be done.
    """
    _new_file(out, overwrite)
    return outlook(model, _settings(options))


def merge_importance(
    files: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    legacy: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ImportanceMatrix:
    """Returns the importance matrix of all texts together that some files of llama.cpp's or ours were made with.

    Args:
        files: Of either format.
        out: File to write it to.
        legacy: As for `importance`.
        overwrite: As for `importance`.
        dry_run: Whether nothing shall be written.

    Raises:
        InputError: a file is none of an importance matrix, or is of another model.
    """

    def made() -> ImportanceMatrix:
        file = _new_file(out, overwrite)
        matrices = [read_imatrix(Path(path).expanduser()) for path in files]
        matrix = matrices[0] if len(matrices) == 1 else merge(matrices)
        if file is not None and not dry_run:
            write_imatrix(file, matrix, legacy)
        return matrix

    ranks = ours()
    with ranks.together():
        return ranks.from_first(made)


def edit(
    model: str | Path, put: Mapping[str, Value | str], remove: Sequence[str] = (), *, dry_run: bool = False
) -> Edited:
    """Sets and removes metadata of a GGUF file, in place where the new header has room, else by a copy.

    Args:
        model: The file; of a split model the first part.
        put: New values by key; texts are read as the command line spells them: `u32:5`, or `5` for a key that is there.
        remove: Keys to be dropped.
        dry_run: Whether nothing shall be written.

    Raises:
        UsageError: a value does not fit its type, or a key to remove is not there.
        InputError: the file is broken.
    """
    path = Path(model).expanduser()
    known = read_values(path)
    values = {key: _value(said, known.get(key)) if isinstance(said, str) else said for key, said in put.items()}
    return edit_gguf(path, values, remove, dry_run=dry_run)


def compare(model: str | Path, other: str | Path, *, contents: bool = False) -> dict[str, Any]:
    """Returns in what two models differ as plain values, from headers alone unless `contents` is asked for.

    Args:
        model: As for `open`.
        other: Another.
        contents: Whether bytes are compared as well; for GGUF files only.

    Raises:
        InputError: as for `open`.
    """
    paths = [_checkpoint.locate(each) for each in (model, other)]
    if all(formats.find(path).name == "gguf" for path in paths):
        return compare_gguf(paths[0], paths[1], contents=contents)
    return _checkpoint.compare(open(model), open(other))


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
    adapters: tuple[str, ...] = (),
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
        adapters: LoRA folders to merge into `model` on read, `DIR` or `DIR:SCALE`; the base stays as it is.
        assume_tied: Whether a missing head is the embedding.
        progress: As for `run`.

    Raises:
        InputError: a model or the text cannot be used, or the tokenizers differ.
        UsageError: the definition makes no windows.
    """
    ranks = ours()
    with ranks.together():
        return evaluate_checkpoints(
            open(model, adapters),
            open(base) if base is not None else None,
            names=(str(model), str(base) if base is not None else None),
            text=text,
            definition=protocol(definition, context, stride),
            chunks=chunks,
            threads=threads,
            assume_tied=assume_tied,
            progress=progress if ranks.first else silent,
            ranks=ranks,
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
    """Returns the methods, formats, schemes and GGUF types and which go together, computed by asking them."""
    kept = {"spelling": KEEP, "meaning": "as it is stored; in rules only"}
    return {
        "methods": [
            {"name": m.name, "summary": m.summary, "calibrates": m.calibrates} for m in methods.table().values()
        ],
        "formats": [
            {"name": f.name, "summary": f.summary, "schemes": presets.written(f)} for f in formats.table().values()
        ],
        "schemes": [*({"spelling": ", ".join(f.examples), "meaning": f.meaning} for f in FAMILIES), kept],
        "types": [{"name": name, "summary": mix.summary} for name, mix in MIXES.items() if name == mix.name],
        "combinations": presets.matrix(),
    }


def is_importance(source: str | Path) -> bool:
    """Returns whether a source is a file of an importance matrix, and no model."""
    path = Path(source).expanduser()
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        gguf = stream.read(4) == b"GGUF"
    return (
        path.suffix in (".dat", ".imatrix") if not gguf else read_part(path).metadata.get("general.type") == "imatrix"
    )


def importance_name(model: str | Path | None) -> str:
    """Returns the default name of a model's importance matrix."""
    name = Path.cwd().name if model is None else str(model).removeprefix("hub:").split("@")[0].rstrip("/")
    return f"{name.rsplit('/', 1)[-1].removesuffix('.gguf')}.imatrix.gguf"


def _value(said: str, known: Value | None) -> Value:
    """Returns a value as the command line spells it; `@FILE` is the text of a file."""
    if not said.startswith("@"):
        return parse_value(said, known)
    file = Path(said[1:]).expanduser()
    try:
        return text(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {error}") from error


def _new_file(out: str | Path | None, overwrite: bool) -> Path | None:
    """Returns a file's path, checked before the work and not after it."""
    if out is None:
        return None
    file = Path(out).expanduser()
    if file.exists() and not overwrite:
        raise UsageError(f"{file}: exists already", "say --overwrite, or choose another --out")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such folder", "make it, or name another file")
    return file


def _settings(options: dict[str, Any]) -> Settings:
    known = [field.name for field in fields(Settings)]
    for name in options:
        if name not in known:
            raise unknown_name("option", name, known)
    return Settings(**options)
