"""What calibration learns at one input of linears, and how partial results add up.

All figures are means over tokens, so that statistics of different texts merge by their counts. Padding never enters:
rows are packed full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from quantize.ranks import ALONE, Ranks

_PANELS = 4
# Tokens whose squares are held at a time.
_RUN = 256


class Summary(Protocol):
    """What a sweep can gather at a site. A job asks for the kind that it needs: `Statistics` or `Squares`."""

    @staticmethod
    def of(inputs: Tensor) -> Summary:
        """Returns the figures of `inputs` `[..., K]`."""

    def merge(self: S, other: S) -> S:
        """Returns the figures of both texts together; `self` is spent."""

    @staticmethod
    def kept(ranks: Ranks) -> bool:
        """Returns whether what each batch adds is kept until the batches of all ranks can be added up in order."""

    @staticmethod
    def over_all(totals: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
        """Returns what the batches of several ranks added up to, by name; `totals`, accumulators, are spent."""


S = TypeVar("S", bound=Summary)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures of one input of `K` channels over `count` tokens.

    Attributes:
        count: Tokens seen.
        mean_abs: Mean of |x|, float32 `[K]`.
        max_abs: Largest |x|, float32 `[K]`.
        hessian: Mean of x x^T, float32 `[K, K]`. The Hessian of the squared error of a linear's output in its
            weights, up to the factor 2 (Frantar et al. 2022, arXiv 2210.17323). Its diagonal is the mean square,
            llama.cpp's importance.
    """

    count: int
    mean_abs: Tensor
    max_abs: Tensor
    hessian: Tensor

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2, float32 `[K]`."""
        return self.hessian.diagonal()

    @staticmethod
    def of(inputs: Tensor) -> Statistics:
        """Returns the statistics of `inputs` `[..., K]`, computed in float32."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not len(x):
            return Statistics.empty(x.shape[-1])
        magnitude = x.abs()
        return Statistics(len(x), magnitude.mean(0), magnitude.amax(0), gram(x).div_(len(x)))

    @staticmethod
    def empty(width: int) -> Statistics:
        """Returns the statistics of no tokens over `width` channels; the neutral element of `merge`."""
        zeros = torch.zeros(width)
        return Statistics(0, zeros, zeros, torch.zeros(width, width))

    def merge(self, other: Statistics) -> Statistics:
        """Returns the statistics of both texts together, each weighted by its tokens.

        The Hessian of `self` is reused for the result where it owns tokens: treat `self` as spent.
        """
        if not other.count:
            return self
        if not self.count:
            return other
        total = self.count + other.count
        share = other.count / total
        return Statistics(
            total,
            torch.lerp(self.mean_abs, other.mean_abs, share),
            torch.maximum(self.max_abs, other.max_abs),
            self.hessian.lerp_(other.hessian, share),
        )

    @staticmethod
    def kept(ranks: Ranks) -> bool:
        """Returns False: there is no memory for a Hessian of each batch."""
        return False

    @staticmethod
    def over_all(totals: Mapping[str, Accumulator[Statistics]], ranks: Ranks) -> dict[str, Statistics]:
        """Returns the statistics of the ranks' texts together; they differ from those of one rank by rounding."""
        found = {name: total.total for name, total in totals.items() if total.total is not None}
        known = ranks.gather({name: (part.count, len(part.mean_abs)) for name, part in found.items()})
        result: dict[str, Statistics] = {}
        for name in totals:
            seen = [counts[name] for counts in known if name in counts]
            if seen:
                mine = found.pop(name) if name in found else Statistics.empty(seen[0][1])
                result[name] = mine._with_others(sum(count for count, _ in seen), ranks)
        return result

    def _with_others(self, total: int, ranks: Ranks) -> Statistics:
        """Returns these statistics with those of all other ranks, of `total` tokens together; `self` is spent."""
        share = self.count / max(1, total)
        mean_abs, max_abs = self.mean_abs.clone(), self.max_abs.clone()
        ranks.mean_(mean_abs, share)
        ranks.largest_(max_abs)
        ranks.mean_(self.hessian, share)
        return Statistics(total, mean_abs, max_abs, self.hessian)


@dataclass(frozen=True, slots=True)
class Squares:
    """The little of `Statistics` that an importance matrix needs: for the Hessian's memory and time it has no use.

    Attributes:
        count: Tokens seen.
        mean_square: Mean of x^2, float32 `[K]`.
    """

    count: int
    mean_square: Tensor

    @staticmethod
    def of(inputs: Tensor) -> Squares:
        """Returns the mean squares of `inputs` `[..., K]`, computed in float32."""
        x = inputs.detach().reshape(-1, inputs.shape[-1])
        total = torch.zeros(x.shape[-1])
        for run in torch.split(x, _RUN):
            total += run.float().square().sum(0)
        return Squares(len(x), total.div_(max(1, len(x))))

    def merge(self, other: Squares) -> Squares:
        """Returns the mean squares of both texts together, each weighted by its tokens."""
        total = self.count + other.count
        if not total:
            return self
        return Squares(total, torch.lerp(self.mean_square, other.mean_square, other.count / total))

    @staticmethod
    def kept(ranks: Ranks) -> bool:
        """Returns whether there are several ranks: then they add up in the order of one, to the same bits."""
        return ranks.count > 1

    @staticmethod
    def over_all(totals: Mapping[str, Accumulator[Squares]], ranks: Ranks) -> dict[str, Squares]:
        """Returns the mean squares of the ranks' texts together, the same bits as of one rank."""
        found = ranks.gather({name: total.parts for name, total in totals.items()})
        result: dict[str, Squares] = {}
        for name in totals:
            # batch b of the text is the b // count-th of rank b % count; parts of one batch stay in their order
            parts = [(batch * ranks.count + rank, p) for rank, by in enumerate(found) for batch, p in by[name]]
            for _, part in sorted(parts, key=lambda pair: pair[0]):
                result[name] = result[name].merge(part) if name in result else part
        return result


def gram(x: Tensor) -> Tensor:
    """Returns x^T x of float32 `[tokens, K]`, computed as panels of its upper triangle (a third less work)."""
    width = x.shape[1]
    panel = max(64, -(-width // _PANELS))
    result = torch.empty(width, width, device=x.device)
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        product = x[:, start:stop].T @ x[:, start:]
        result[start:stop, start:] = product
        result[stop:, start:stop] = product[:, stop - start :].T
    return result


class Accumulator(Generic[S]):
    """Adds up statistics in batch order, whatever order the batches' threads come in.

    The lowest unfinished batch adds at once; those ahead of it wait here until it is done.

    Args:
        keep: Whether the parts are kept, in this order with the numbers of their batches, and not added up.
    """

    def __init__(self, keep: bool = False) -> None:
        self.total: S | None = None
        self.parts: list[tuple[int, S]] = []
        self._keep = keep
        self._next = 0
        self._waiting: dict[int, list[S]] = {}
        self._finished: set[int] = set()

    def add(self, batch: int, part: S) -> None:
        """Adds a part seen by `batch`; the caller holds the lock that guards this object."""
        if self._keep:
            self.parts.append((batch, part))
        elif batch == self._next:
            self._merge(part)
        else:
            self._waiting.setdefault(batch, []).append(part)

    def finish(self, batch: int) -> None:
        """Says that `batch` adds no more; the caller holds the lock that guards this object."""
        self._finished.add(batch)
        while self._next in self._finished:
            self._finished.discard(self._next)
            self._next += 1
            for part in self._waiting.pop(self._next, ()):
                self._merge(part)

    def _merge(self, part: S) -> None:
        self.total = part if self.total is None else self.total.merge(part)


def over_all(totals: Mapping[str, Accumulator[S]], needs: type[S], ranks: Ranks = ALONE) -> dict[str, S]:
    """Returns what was added up, by name, over the batches of all ranks; a name that saw no token is missing."""
    if ranks.count > 1:
        return needs.over_all(totals, ranks)
    return {name: total.total for name, total in totals.items() if total.total is not None}
