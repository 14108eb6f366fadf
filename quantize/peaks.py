"""Grids that all rows of a tensor share, or several tensors: what they share is found before any row is coded."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, Self, runtime_checkable

from quantize.formats.base import Checkpoint
from quantize.parallel import spans
from quantize.planning import Entry, Plan
from quantize.schemes import Scheme

# Weights that are read at a time.
_RUN = 1 << 24


@runtime_checkable
class Sharing(Scheme, Protocol):
    """A scheme that needs to know the greatest magnitude of more than the rows that it is given."""

    @property
    def shared(self) -> bool:
        """Whether it does: some granularities do not."""

    @property
    def joint(self) -> bool:
        """Whether tensors that engines fuse share it, too."""

    def sharing(self, peak: float) -> Self:
        """Returns the grid for tensors whose greatest magnitude is `peak`."""


def with_peaks(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """Returns the plan with schemes that know what they share; every such tensor is read once for it.

    Args:
        plan: Its entries are by the names of `checkpoint`.
        checkpoint: The source.
    """
    waiting = {e.name: e.scheme for e in plan.quantized if not e.copied and _waits(e)}
    if not waiting:
        return plan
    peaks = {name: _peak(checkpoint, name) for name in waiting}
    for group in plan.format.bound_together(list(waiting)):
        if all(getattr(waiting[name], "joint", False) for name in group):
            peaks |= dict.fromkeys(group, max(peaks[name] for name in group))
    return replace(plan, entries=tuple(_settled(entry, peaks.get(entry.name)) for entry in plan.entries))


def _waits(entry: Entry) -> bool:
    return isinstance(entry.scheme, Sharing) and entry.scheme.shared


def _settled(entry: Entry, peak: float | None) -> Entry:
    if peak is None:
        return entry
    assert isinstance(entry.scheme, Sharing)
    return replace(entry, scheme=entry.scheme.sharing(peak))


def _peak(checkpoint: Checkpoint, name: str) -> float:
    """Returns the greatest magnitude of a matrix, NaN left out."""
    rows, cols = checkpoint.tensors[name].shape
    parts = (checkpoint.read(name, *run) for run in spans(rows, max(1, _RUN // cols)))
    return max(float(part.float().abs().nan_to_num_(0.0).amax()) for part in parts)
