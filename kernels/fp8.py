"""Scaled 8-bit floats (E4M3 without infinities), as compressed-tensors files hold them.

Scales are bfloat16: loaders make them so whatever a file has, and codes are chosen against what they will see. The
peers compute in the dtype of the model; for weights that are bfloat16 their results are reproduced bit by bit, others
are divided in float32, which is nearer. All functions are torch and never change their arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0  # of E4M3; torch saturates beyond it, other libraries make it NaN
# What a scale of zero becomes: the peers' choice. All codes are zero then, so any would do.
_NO_SCALE = torch.finfo(torch.bfloat16).eps


def rounded(value: Tensor) -> Tensor:
    """Returns float32 values rounded to bfloat16, as float32."""
    return value.bfloat16().float()


def are_brain(weight: Tensor) -> Tensor:
    """Returns which rows of float32 `[rows, cols]` hold bfloat16 values only: bool `[rows, 1]`."""
    return (weight.contiguous().view(torch.int32) & 0xFFFF == 0).all(-1, keepdim=True)


def as_peers(value: Tensor, brain: Tensor) -> Tensor:
    """Returns `value` rounded to bfloat16 where `brain` (broadcast) says that the peers would."""
    if bool(brain.all()):  # the usual case, and the quicker
        return rounded(value)
    return torch.where(brain, rounded(value), value) if bool(brain.any()) else value


def scales(peaks: Tensor, largest: float) -> Tensor:
    """Returns bfloat16 scales that put `peaks` (float32, not negative) on the code `largest`."""
    found = (peaks / largest).bfloat16()
    return torch.where(found == 0, torch.full_like(found, _NO_SCALE), found)


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """Returns the float8_e4m3fn codes of float32 `weight` `[rows, cols]`; `scale` is what each is divided by."""
    quotient = as_peers(weight / scale.float(), are_brain(weight))
    return quotient.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def block_peaks(weight: Tensor, size: int) -> Tensor:
    """Returns the greatest magnitude of each tile, float32 `[ceil(rows / size), ceil(cols / size)]`.

    Args:
        weight: float32 `[rows, cols]`, at least one of each.
        size: Rows and columns of a tile; those at the edges may be smaller.
    """
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -cols % size, 0, -rows % size))
    return padded.reshape(len(padded) // size, size, -1, size).amax((1, 3))


def spread(grid: Tensor, size: int, shape: tuple[int, int]) -> Tensor:
    """Returns the value of each weight's tile, `[rows, cols]`, of a `[ceil(rows / size), ceil(cols / size)]` grid."""
    return grid.repeat_interleave(size, 0)[: shape[0]].repeat_interleave(size, 1)[:, : shape[1]]
