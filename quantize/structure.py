"""How the linears of a block hang together: which share an input, and where a scale of that input can be taken back.

Values only; `quantize.trace` finds them by running a block.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fold:
    """How a scale of an input's channels is taken back where the input comes from.

    Channel k of the input is fed by row `rows.start + row(k)` of the producer, where
    `row(k) = k // (width * repeat) * width + k % width`: repeat is 1 for a plain producer and the number of query
    heads per key-value head for a value projection, width then is the head size.

    Attributes:
        producer: Stored name of the weight: a norm's gain or a linear's matrix.
        bias: Stored name of the bias that goes with it, or None.
        offset: Whether the module multiplies by `1 + weight`.
        start: First row of the producer that feeds channel 0.
        width: Run of channels that map to consecutive rows.
        repeat: How many such runs share the same rows.
    """

    producer: str
    bias: str | None
    offset: bool
    start: int
    width: int
    repeat: int

    def row_of(self, channels: int) -> Tensor:
        """Returns the producer row, relative to `start`, of each of `channels` input channels; int64."""
        k = torch.arange(channels)
        return k // (self.width * self.repeat) * self.width + k % self.width

    def apply(self, weights: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        """Returns the producer's tensors with row factors `1 / scale`; `weights` is not changed.

        Args:
            weights: float32 by stored name.
            scale: One factor for each row that feeds the input, `[rows]`.
        """
        changed: dict[str, Tensor] = {}
        stop = self.start + len(scale)
        for name in filter(None, (self.producer, self.bias)):
            value = weights[name].clone()
            part = value[self.start : stop]
            factor = 1.0 / (scale if part.dim() == 1 else scale.unsqueeze(-1))
            shift = 1.0 if self.offset and name == self.producer else 0.0
            value[self.start : stop] = (part + shift) * factor - shift
            changed[name] = value
        return changed


@dataclass(frozen=True, slots=True)
class Input:
    """One input tensor of a block and everything that multiplies by it.

    Attributes:
        name: Stored name of its first consumer; the name of its statistics.
        consumers: Stored names of all matrices `[rows, width]` that it is multiplied with.
        width: Its channels.
        fold: Where a scale of its channels can be taken back, or None.
    """

    name: str
    consumers: tuple[str, ...]
    width: int
    fold: Fold | None = None

    def scale_consumers(self, weights: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        """Returns the consumers with columns multiplied by `scale` `[width]`."""
        return {name: weights[name] * scale for name in self.consumers}


def grouped(inputs: Iterable[Input]) -> list[tuple[Input, ...]]:
    """Returns the inputs in groups that one scale serves: those with the same fold, each of the others alone.

    A norm that feeds a router and its experts is one fold of many inputs: each expert sees other tokens, so each has
    statistics of its own, but the norm can take back one scale only.
    """
    groups: dict[Fold | str, list[Input]] = {}
    for item in inputs:
        groups.setdefault(item.fold or item.name, []).append(item)
    return [tuple(group) for group in groups.values()]


def fold_all(inputs: Iterable[Input], weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the stored tensors that change when each input in `scales` is scaled and its fold taken back.

    Args:
        inputs: Inputs of one block.
        weights: float32 by stored name; not changed.
        scales: By input name, one factor for each *row* of the fold's producer. Inputs that share a fold share the
            scale: the first of them that is named gives it.
    """
    changed: dict[str, Tensor] = {}
    now = ChainMap(changed, dict(weights))
    for group in grouped(inputs):
        fold = group[0].fold
        rows = next((scales[item.name] for item in group if item.name in scales), None)
        if fold is None or rows is None:
            continue
        changed |= fold.apply(now, rows)
        for item in group:
            changed |= item.scale_consumers(now, rows[fold.row_of(item.width)])
    return changed
