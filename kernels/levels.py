"""GGML blocks as an error-feedback solver sees them: every weight is `scale * point + offset`.

The functions are torch, run where their arguments are, and never change them. A row has `subs` sub-blocks, each with
one scale and one offset, and `supers` blocks of the file; all tensors keep those of a row side by side. Fields by type:

    q4_0 q5_0 q8_0 iq4_nl    d                  scale = d
    q4_1 q5_1                d, m               scale = d, offset = m
    q3_k q6_k iq4_xs         d, codes           scale = d * codes
    q2_k q4_k q5_k           d, codes, dmin, mins    and offset = -dmin * mins
    mxfp4 nvfp4              codes              scale is a small float of its own

`d`, `m` and `dmin` are float32 with values of float16, `codes` and `mins` int32 within the bits that the file has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantize.kernels import levelbytes
from quantize.kernels.cpu.ggml import BLOCKS

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12)
_LARGEST_HALF = 65504.0


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


@dataclass(frozen=True, slots=True)
class Grid:
    """What is the same for all blocks of a type.

    Attributes:
        sub: Weights that share a scale.
        points: Values of the codes, never decreasing.
        codes: Least and greatest `codes`, for types that have them.
        mins: Whether there are `dmin` and `mins`; these run from 0 to the greatest of `codes`.
    """

    sub: int
    points: tuple[int, ...]
    codes: tuple[int, int] | None = None
    mins: bool = False


GRIDS: dict[str, Grid] = {
    "q4_0": Grid(32, tuple(range(-8, 8))),
    "q4_1": Grid(32, tuple(range(16))),
    "q5_0": Grid(32, tuple(range(-16, 16))),
    "q5_1": Grid(32, tuple(range(32))),
    "q8_0": Grid(32, tuple(range(-128, 128))),
    "q2_k": Grid(16, tuple(range(4)), (0, 15), mins=True),
    "q3_k": Grid(16, tuple(range(-4, 4)), (-32, 31)),
    "q4_k": Grid(32, tuple(range(16)), (0, 63), mins=True),
    "q5_k": Grid(32, tuple(range(32)), (0, 63), mins=True),
    "q6_k": Grid(16, tuple(range(-32, 32)), (-128, 127)),
    "iq4_nl": Grid(32, _IQ4),
    "iq4_xs": Grid(32, _IQ4, (-32, 31)),
    "mxfp4": Grid(32, _FP4, (0, 254)),
    "nvfp4": Grid(16, _FP4, (0, 126)),
}


def split(name: str, blocks: Tensor) -> Levels:
    """Returns the grids of blocks.

    Args:
        name: A type of `GRIDS`.
        blocks: uint8 `[rows, n * bytes]`.

    Raises:
        KeyError: weights of this type are no levels of a scale.
    """
    fields = levelbytes.READERS[name](_apart(name, blocks))
    return _levels(name, {key: value.flatten(1) for key, value in fields.items() if key != "levels"})


def codes(name: str, blocks: Tensor) -> Tensor:
    """Returns the index into `points` of each weight, uint8 `[rows, cols]`; `blocks` as in `split`."""
    fields = levelbytes.READERS[name](_apart(name, blocks))
    return fields["levels"].flatten(1)


def join(name: str, levels: Levels, codes: Tensor) -> Tensor:
    """Returns the blocks of weights `codes`, an index into `levels.points` each: the inverse of `split` and `codes`.

    Args:
        name: A type of `GRIDS`.
        levels: Grids of whole blocks.
        codes: uint8 `[rows, cols]`.

    Returns:
        uint8 `[rows, n * bytes]`.
    """
    rows, block = len(codes), BLOCKS[name]
    count = codes.shape[1] // block.weights
    fields = {key: value.reshape(rows, count, -1) for key, value in levels.state.items()}
    fields["levels"] = codes.reshape(rows, count, block.weights)
    return levelbytes.WRITERS[name](fields).flatten(1)


def values(name: str, levels: Levels, codes: Tensor) -> Tensor:
    """Returns the float32 weights `[rows, cols]` of `codes`, rounded as the decoder rounds."""
    points = levels.points[codes.int()].reshape(*levels.scale.shape, GRIDS[name].sub)
    return (levels.scale.unsqueeze(-1) * points + levels.offset.unsqueeze(-1)).flatten(1)


# Factors on a float scale that lead to the neighbouring grids.
_NEARBY = (0.97, 1.03, 0.93, 1.07)
# Steps of scale code and minimum. The far ones cost little, for the work is in the number of columns.
_STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-2, 0), (2, 0), (0, -2), (0, 2), (-1, -1), (-1, 1), (1, -1), (1, 1),
          (-4, 0), (4, 0))  # fmt: skip


def neighbours(name: str, levels: Levels) -> list[Levels]:
    """Returns other storable grids, every sub-block a step or two away: in scale code and minimum, or by a little.

    Super-scales stay as they are.
    """
    grid, state = GRIDS[name], levels.state
    if not grid.codes:
        moved = [{**state, "d": half(state["d"] * factor)} for factor in _NEARBY]
        if "m" in state:
            step = levels.scale.abs() / 2
            moved += [{**state, "m": half(state["m"] + sign * step)} for sign in (-1, 1)]
        return [_levels(name, each) for each in moved]
    low, high = grid.codes
    found = []
    for code, minimum in (step for step in _STEPS if grid.mins or not step[1]):
        each = {**state, "codes": (state["codes"] + code).clamp(low, high)}
        if grid.mins:
            each["mins"] = (state["mins"] + minimum).clamp(0, high)
        found.append(_levels(name, each))
    return found


def choose(name: str, tried: Sequence[Levels], which: Tensor) -> Levels:
    """Returns the grids in which each sub-block has those of `tried` that int64 `which` `[rows, subs]` says."""
    return _levels(name, chosen(tried, which))


def chosen(tried: Sequence[Levels], which: Tensor) -> dict[str, Tensor]:
    """Returns the fields of `choose`; those that sub-blocks share are the same in all."""
    state = dict(tried[0].state)
    for key, value in state.items():
        if value.shape == which.shape:
            state[key] = torch.stack([each.state[key] for each in tried]).gather(0, which.unsqueeze(0)).squeeze(0)
    return state


def concatenate(name: str, parts: Sequence[Levels]) -> Levels:
    """Returns the grids of neighbouring columns as those of one matrix; at least one part."""
    return _levels(name, {key: torch.cat([part.state[key] for part in parts], 1) for key in parts[0].state})


def half(value: Tensor) -> Tensor:
    """Returns the float16 nearest to each value, as float32; what is beyond becomes the largest, NaN becomes 0."""
    return value.nan_to_num(0.0).clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float()


def _apart(name: str, blocks: Tensor) -> Tensor:
    return blocks.reshape(len(blocks), -1, BLOCKS[name].nbytes)


def _levels(name: str, state: Mapping[str, Tensor]) -> Levels:
    """Returns grids of fields `[rows, subs or supers]`; products are rounded once, as in a decoder."""
    grid = GRIDS[name]
    if name in _FLOATS:
        scale = _floats(name, state["codes"].device)[state["codes"]]
    elif grid.codes:
        scale = _spread(state["d"], state["codes"]) * state["codes"]
    else:
        scale = state["d"]
    if grid.mins:
        offset = -(_spread(state["dmin"], state["mins"]) * state["mins"])
    else:
        offset = state.get("m", torch.zeros_like(scale))
    return Levels(scale, offset, _points(name, scale.device), state)


@cache
def _points(name: str, device: torch.device) -> Tensor:
    return torch.tensor(GRIDS[name].points, dtype=torch.float32, device=device)


def _spread(supers: Tensor, subs: Tensor) -> Tensor:
    """Returns a value of each super-block for each of its sub-blocks."""
    return supers.repeat_interleave(subs.shape[1] // supers.shape[1], 1)


_FLOATS = ("mxfp4", "nvfp4")


@cache
def _floats(name: str, device: torch.device) -> Tensor:
    """Returns the scale that each scale code stands for, float32 `[256]` or `[128]`; halves, as points are doubles."""
    if name == "mxfp4":
        scales = torch.pow(2.0, torch.arange(256, dtype=torch.float64) - 128)
    else:
        code = torch.arange(256, dtype=torch.float64)
        exponent, mantissa = (code // 8) % 16, code % 8
        normal = (1 + mantissa / 8) * torch.pow(2.0, exponent - 8)
        scales = torch.where(exponent == 0, mantissa * 2.0**-10, normal)
        scales[0x7F] = 0
    return scales.float().to(device)
