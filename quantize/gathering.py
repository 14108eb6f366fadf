"""The importance matrix of a model, gathered block by block: never the whole model in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from quantize.anatomy import NamedAnatomy
from quantize.calib_data import CalibrationText
from quantize.calibration import calibration_text, open_sweep, text_sources
from quantize.checkpoint import open_checkpoint, refuse_nan
from quantize.formats import named
from quantize.formats.base import OUTPUT, TURNED, Checkpoint, NamedView, Observed
from quantize.formats.gguf.imatrix import Importance, ImportanceMatrix
from quantize.imatrix import SiteOf, gather
from quantize.parallel import default_threads, one_torch_thread
from quantize.planning import Request, sweep_peak
from quantize.progress import Progress
from quantize.ranks import ALONE, Ranks
from quantize.settings import Settings
from quantize.skeleton import Skeleton
from quantize.statistics import Squares
from quantize.sweep import Site

_STACK = 3


@dataclass(frozen=True, slots=True)
class Outlook:
    """What gathering an importance matrix takes and gives, known without reading a weight or a text.

    Attributes:
        source: Where the model lies.
        datasets: The texts.
        rows: Rows of text.
        length: Tokens of a row.
        blocks: Blocks that the text passes through.
        entries: Tensors that get importance if text reaches them.
        peak_bytes: Estimated peak of anonymous memory.
    """

    source: Path
    datasets: tuple[str, ...]
    rows: int
    length: int
    blocks: int
    entries: int
    peak_bytes: int


def outlook(model: str | Path | None, settings: Settings) -> Outlook:
    """Returns what `importance_of` would do with the same arguments.

    Raises:
        InputError: the model cannot be used, or GGUF has no names for it.
        UsageError: no text is named.
    """
    sources = tuple(map(_without_folder, text_sources(settings)))
    skeleton, checkpoint, view = _opened(model, settings)
    observed = _observed(view)
    reached = [name for name, found in observed.items() if _sites([found], skeleton)]
    request = Request(
        scheme=None,
        method=None,
        format=named("gguf"),
        samples=settings.calib_samples,
        length=settings.calib_length,
        threads=settings.threads or default_threads(),
        activation_budget=settings.activation_budget,
        gathers=True,
    )
    anatomy = NamedAnatomy({name: view.sources(name) for name in view.tensors})
    peak = sweep_peak(view, anatomy, reached, request)
    rows, length = settings.calib_samples, settings.calib_length
    return Outlook(checkpoint.path, sources, rows, length, len(skeleton.blocks), len(reached), peak)


def _opened(model: str | Path | None, settings: Settings) -> tuple[Skeleton, Checkpoint, NamedView]:
    """Returns a model's modules, its weights, and its tensors under GGUF's names."""
    checkpoint = open_checkpoint(model, settings.adapters)
    skeleton = Skeleton(checkpoint, settings.assume_tied)
    return skeleton, checkpoint, cast(NamedView, named("gguf").view(checkpoint, settings.arch, settings.assume_tied))


def importance_of(
    model: str | Path | None, settings: Settings, folder: Path, progress: Progress, ranks: Ranks = ALONE
) -> ImportanceMatrix:
    """Returns the importance matrix of a model over the calibration text that the settings name.

    Args:
        model: The source, as `open_checkpoint` takes it.
        settings: Text, adapters, threads, architecture.
        folder: Where activations wait that have no room in memory.
        progress: Told how far it is.
        ranks: Those that share the text; all get the same matrix, as one rank would.

    Raises:
        InputError: the model or the text cannot be used, or GGUF has no names for the model.
    """
    skeleton, checkpoint, view = _opened(model, settings)
    text = ranks.from_first(lambda: calibration_text(settings, skeleton, checkpoint, progress))
    threads = settings.threads or ranks.threads
    with one_torch_thread(), tempfile.TemporaryDirectory(dir=folder, prefix=".quantize-") as spill:
        return gather_importance(settings, skeleton, checkpoint, view, text, threads, Path(spill), progress, ranks)


def gather_importance(
    settings: Settings,
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    view: NamedView,
    text: CalibrationText,
    threads: int,
    folder: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> ImportanceMatrix:
    """Returns the mean squares of the inputs of a model's matrices over calibration text.

    Args:
        settings: The memory for waiting activations.
        skeleton: The model's modules.
        checkpoint: Its weights.
        view: The model under GGUF names, which tells the stored tensors that each of its tensors is made of.
        text: The rows.
        threads: Threads; the result does not depend on them.
        folder: Where activations wait that have no room in memory.
        progress: Told how many blocks are done.
        ranks: Those that share the text.

    Raises:
        InputError: a weight is NaN or Inf.
    """
    observed = _observed(view)
    wanted = _sites(observed.values(), skeleton)
    seen: dict[Site, Squares] = {}
    with open_sweep(settings, skeleton, checkpoint, text, threads, folder, ranks) as sweep:
        for stage in sweep.stages():
            if not settings.allow_nan:
                refuse_nan(checkpoint, stage.weights)
            sites = [site for site in wanted if site[0].startswith(f"{stage.path}.")]
            found = stage.run({site: str(number) for number, site in enumerate(sites)}, Squares)
            for number, site in enumerate(sites):
                if (part := found.get(str(number))) is not None:
                    # a block that a forward pass enters several times has the sum of what each of them brings
                    seen[site] = seen[site].merge(part) if site in seen else part
            if stage.path in skeleton.blocks:
                progress("gathering", skeleton.blocks.index(stage.path) + 1, len(skeleton.blocks))
    entries: dict[str, Importance] = {}
    shapes = {name: view.tensors[name].shape for name in observed}
    columns = {name: found.order for name, found in observed.items() if found.order is not None}
    for mark in ("", TURNED, OUTPUT):
        sources = {name: found.names for name, found in observed.items() if found.mark == mark}
        entries |= gather(sources, _site_of(seen, skeleton, mark), shapes=shapes, columns=columns)
    rows, length = text.ids.shape
    datasets = tuple(_without_folder(source) for source in text.sources)
    return ImportanceMatrix(dict(sorted(entries.items())), datasets, rows, length)


def _without_folder(source: str) -> str:
    """Returns a text source without where it lies."""
    return Path(source).name if Path(source).exists() else source


def _observed(view: NamedView) -> dict[str, Observed]:
    """Returns where a text shows what each matrix of a model is multiplied with."""
    names = [n for n, info in view.tensors.items() if n.endswith(".weight") and len(info.shape) > 1]
    return {name: found for name in names if (found := view.observed(name)) is not None}


def _sites(observed: Iterable[Observed], skeleton: Skeleton) -> list[Site]:
    """Returns every place that shows something of the tensors: also those that no text may reach."""
    sites: dict[Site, None] = {}
    for each in observed:
        for name in each.names:
            if (conversion := skeleton.conversion_of.get(name)) is None:
                continue
            for parameter in filter(skeleton.block_of, conversion.outputs):
                shape = _shape(parameter, skeleton)
                numbers = range(-1, shape[0] if len(shape) == _STACK and each.mark != OUTPUT else 0)
                sites |= {Site((parameter + each.mark, number)): None for number in numbers}
    return list(sites)


def _shape(parameter: str, skeleton: Skeleton) -> tuple[int, ...]:
    path, _, leaf = parameter.rpartition(".")
    value = getattr(skeleton.model.get_submodule(path), leaf)
    return tuple(value.shape)


def _site_of(seen: Mapping[Site, Squares], skeleton: Skeleton, mark: str) -> SiteOf:
    """Returns a function that gives what was observed of a stored tensor."""

    def site_of(name: str) -> Squares | list[Squares | None] | None:
        conversion = skeleton.conversion_of.get(name)
        if conversion is None:
            return None
        parameter = conversion.target
        whole = seen.get(Site((parameter + mark, -1)))
        shape = _shape(parameter, skeleton)
        if whole is not None or len(shape) != _STACK:
            return whole
        group = next(names for names in conversion.sources.values() if name in names)
        if len(group) == shape[0]:
            return seen.get(Site((parameter + mark, group.index(name))))
        return [seen.get(Site((parameter + mark, expert))) for expert in range(shape[0])]

    return site_of
