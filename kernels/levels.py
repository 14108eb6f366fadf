"""GGML blocks as an error-feedback solver sees them: every weight is `scale * point + offset`.

The functions are torch, run where their arguments are, and never change them. A row has `subs` sub-blocks, each with
one scale and one offset, and `supers` blocks of the file; all tensors keep those of a row side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """The grids of some rows.

    Attributes:
        scale: float32 `[rows, subs]`, of either sign, 0 where a sub-block is constant.
        offset: float32 `[rows, subs]`.
        points: float32 `[n]`, never decreasing; a code is an index into it.
        state: The fields that a file has, by name; scale and offset follow from them.
    """

    scale: Tensor
    offset: Tensor
    points: Tensor
    state: Mapping[str, Tensor]
