"""Round to nearest: each group's grid holds its extremes, each weight takes the nearest point. No data needed."""

from __future__ import annotations

from quantize.methods.base import Block, Prepared, Result, encode
from quantize.parallel import Pool
from quantize.schemes import Scheme


class RTN:
    """The baseline of every other method."""

    name = "rtn"
    summary = "round to nearest; needs no data, takes seconds"
    calibrates = False
    sequential = False
    transforms = False
    tokens_per_column = 0

    def reject(self, scheme: Scheme) -> str | None:
        """Returns None: every grid can round to nearest."""
        return None

    def prepare(self, block: Block, pool: Pool) -> Prepared | None:
        """Returns None: all is done at once."""
        return None

    def quantize(self, block: Block, pool: Pool) -> Result:
        """Returns the nearest grid points of each tensor."""
        return Result({n: encode(scheme, block.weights[n], pool) for n, scheme in block.schemes.items()})
