"""AWQ, then GPTQ: channel scales first, error feedback on the scaled weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantize.methods.awq import AWQ, columns_of, search_scales
from quantize.methods.base import Block, Prepared, Result
from quantize.methods.gptq import GPTQ
from quantize.parallel import Pool
from quantize.schemes import Scheme
from quantize.structure import fold_all


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
        scales, notes = search_scales(block, pool)
        statistics = dict(block.statistics)
        for item in block.inputs:
            if item.name in scales and item.name in statistics:
                seen, columns = statistics[item.name], columns_of(item, scales)
                statistics[item.name] = replace(
                    seen,
                    mean_abs=seen.mean_abs / columns,
                    max_abs=seen.max_abs / columns,
                    hessian=seen.hessian / torch.outer(columns, columns),
                )
        return Prepared(fold_all(block.inputs, block.weights, scales), statistics, tuple(notes))

    def quantize(self, block: Block, pool: Pool) -> Result:
        """Returns the prepared block with error feedback."""
        return GPTQ.quantize(self, block, pool)
