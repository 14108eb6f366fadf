"""AWQ, then GPTQ: channel scales first, error feedback on the scaled weights.

AWQ chooses its scales for rounding to nearest. Error feedback makes up for part of what they would gain, so each is
kept only if the loss after feedback falls as well, on a sample of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.methods.awq import AWQ, columns_of, search_scales
from quantize.methods.base import Block, Prepared, Result
from quantize.methods.feedback import loss
from quantize.methods.gptq import GPTQ
from quantize.parallel import Pool
from quantize.schemes import Scheme
from quantize.statistics import Statistics
from quantize.structure import Input, fold_all, grouped

# Rows of each input's consumers that judge a scale, and the inputs that do so where many share it (experts).
_JUDGES = 256
_MOST = 4
# What is left of the loss must be less than this: text that was not seen gains less.
_GAIN = 0.95


@dataclass(frozen=True, slots=True)
class AWQGPTQ(GPTQ):
    """GPTQ on weights whose input channels AWQ has scaled; the options are GPTQ's."""

    name = "awq+gptq"
    summary = "channel scales of awq, then the error feedback of gptq; minutes"
    transforms = True

    def reject(self, scheme: Scheme) -> str | None:
        """Returns a reason for grids that one of the two has no use for."""
        return AWQ().reject(scheme) or GPTQ.reject(self, scheme)

    def prepare(self, block: Block, pool: Pool) -> Prepared | None:
        """Returns the block with scaled channels, each scale taken back where the input comes from."""
        found, notes = search_scales(block, pool)
        scales = self._worth(found, block, pool)
        statistics = dict(block.statistics)
        for item in block.inputs:
            if item.name in scales and item.name in statistics:
                statistics[item.name] = _scaled(statistics[item.name], columns_of(item, scales))
        return Prepared(fold_all(block.inputs, block.weights, scales), statistics, tuple(notes))

    def quantize(self, block: Block, pool: Pool) -> Result:
        """Returns the prepared block with error feedback."""
        return GPTQ.quantize(self, block, pool)

    def _worth(self, scales: Mapping[str, Tensor], block: Block, pool: Pool) -> dict[str, Tensor]:
        """Returns the scales that lower the loss after error feedback."""
        kept: dict[str, Tensor] = {}
        for group in grouped(block.inputs):
            seen = [item for item in group if item.name in scales and item.name in block.statistics]
            judges = sorted(seen, key=lambda item: -block.statistics[item.name].count)[:_MOST]
            trials = [(item, columns) for item in judges for columns in (None, columns_of(item, scales))]
            losses = list(pool.map(lambda trial: self._trial(*trial, block), trials))
            if judges and sum(losses[1::2]) < _GAIN * sum(losses[::2]):
                kept |= {item.name: scales[item.name] for item in group if item.name in scales}
        return kept

    def _trial(self, item: Input, columns: Tensor | None, block: Block) -> float:
        """Returns the loss of a sample of an input's consumers after error feedback, by tokens."""
        names = [name for name in item.consumers if name in block.schemes]
        if not names:
            return 0.0
        statistics, scheme = block.statistics[item.name], block.schemes[names[0]]
        rows = _sample([block.weights[name] for name in names])
        if columns is not None:
            statistics, rows = _scaled(statistics, columns), rows * columns
        curvature = self.curvature(statistics, scheme)
        error = self.feed_back(rows, curvature, scheme).dequantize() - rows
        return statistics.count * float(loss(error, curvature.hessian).double().sum())


def _sample(weights: Sequence[Tensor]) -> Tensor:
    """Returns evenly spread rows of some matrices."""
    step = max(1, sum(map(len, weights)) // _JUDGES)
    return torch.cat([weight[::step] for weight in weights])


def _scaled(statistics: Statistics, columns: Tensor) -> Statistics:
    """Returns what is seen of an input whose channels are divided by `columns`."""
    return replace(
        statistics,
        mean_abs=statistics.mean_abs / columns,
        max_abs=statistics.max_abs / columns,
        hessian=statistics.hessian / torch.outer(columns, columns),
    )
