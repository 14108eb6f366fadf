"""The text that a run calibrates on, and sweeps over the model with it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from quantize.calib_data import CalibrationText, token_rows
from quantize.errors import UsageError
from quantize.formats.base import Checkpoint
from quantize.parallel import one_torch_thread
from quantize.progress import Progress
from quantize.ranks import ALONE, Ranks
from quantize.selftext import SELF, sample_rows
from quantize.settings import Settings
from quantize.skeleton import Skeleton
from quantize.sweep import Sweep
from quantize.tokenizer import load_tokenizer, require_rows

_PROBE_TOKENS = 32
_BATCH_TOKENS = 512


def text_sources(settings: Settings) -> tuple[str, ...]:
    """Returns the sources of text that the settings name.

    Raises:
        UsageError: they name none.
    """
    sources = tuple(settings.calib) or ("default",)
    if "none" in sources:
        raise UsageError(f"{settings.method or 'an importance matrix'} needs calibration text", "drop --calib none")
    return sources


def calibration_text(
    settings: Settings, skeleton: Skeleton, checkpoint: Checkpoint, progress: Progress
) -> CalibrationText:
    """Returns the rows of text that the settings name.

    Raises:
        UsageError: they name none.
        InputError: a source cannot be read, holds too little, or gives tokens that the model has no row for.
    """
    text = _mixed_rows(text_sources(settings), settings, skeleton, checkpoint, progress)
    require_rows(text.ids, skeleton, checkpoint)
    return text


def _mixed_rows(
    sources: tuple[str, ...], settings: Settings, skeleton: Skeleton, checkpoint: Checkpoint, progress: Progress
) -> CalibrationText:
    """Returns the rows of all sources, row r from source r % n; those of `self` are sampled from the model."""
    count, length, seed = settings.calib_samples, settings.calib_length, settings.seed
    tokenizer = load_tokenizer(checkpoint)
    if SELF not in sources:
        return token_rows(sources, tokenizer, rows=count, length=length, seed=seed)
    own = [row for row in range(count) if sources[row % len(sources)] == SELF]
    with one_torch_thread():
        sampled = sample_rows(
            skeleton, checkpoint, tokenizer, rows=len(own), length=length, seed=seed, progress=progress
        )
    others = tuple(source for source in sources if source != SELF)
    notices: tuple[str, ...] = ()
    special = int(torch.isin(sampled, torch.tensor(tokenizer.all_special_ids)).sum())
    ids = torch.empty(count, length, dtype=torch.int64)
    ids[own] = sampled
    if others:
        rest = token_rows(others, tokenizer, rows=count - len(own), length=length, seed=seed)
        ids[[row for row in range(count) if row not in set(own)]] = rest.ids
        special, notices = special + rest.special_tokens, rest.notices
    return CalibrationText(ids, sources, hashlib.sha256(ids.numpy().tobytes()).hexdigest(), special, notices)


def open_sweep(
    settings: Settings,
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    text: CalibrationText,
    threads: int,
    folder: Path,
    ranks: Ranks = ALONE,
) -> Sweep:
    """Returns the sweep of a model over calibration text, a context that has yet to be entered.

    Args:
        settings: The memory for waiting activations.
        skeleton: The model's modules.
        checkpoint: Its weights.
        text: The rows.
        threads: Threads.
        folder: Where activations wait that have no room in memory.
        ranks: Those that share the rows: batch b is for rank `b % count`.
    """
    batches: Sequence[torch.Tensor] = torch.split(text.ids, max(1, _BATCH_TOKENS // text.ids.shape[1]))
    return Sweep(
        skeleton,
        checkpoint,
        list(batches[ranks.index :: ranks.count]),
        threads=threads,
        probe=text.ids[:1, :_PROBE_TOKENS],
        budget=settings.activation_budget,
        folder=folder,
        ranks=ranks,
    )
