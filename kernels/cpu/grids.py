"""The codebooks of llama.cpp's grid types, and for each point off a grid the grid points to choose from.

A group of 8 (or 4) weights is coded by the index of a codebook point. A search rounds the group to *levels*
0, 1, 2 (or 0..7) first; their *key* is the number that has them as digits, the first weight's digit the lowest. If
that point is in the codebook it is taken. Otherwise the candidates are all codebook points at the few smallest
distances, ordered by distance and index, and whichever fits the weights best is taken, the first of equals.

The points themselves come from the `gguf` package, where they are published as data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize.kernels.cpu.numeric import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE = 8  # candidates that are scored together

# The class in gguf.quants, levels per weight, and how many distinct distances make the candidate list.
_GRIDS = {
    "iq2_xxs": ("IQ2_XXS", 3, 2),
    "iq2_xs": ("IQ2_XS", 3, 2),
    "iq2_s": ("IQ2_S", 3, 1),
    "iq1": ("IQ1_S", 3, 3),
    "iq3_xxs": ("IQ3_XXS", 8, 2),
    "iq3_s": ("IQ3_S", 8, 3),
}


@dataclass(frozen=True, slots=True)
class Codebook:
    """One codebook, and the candidates of every point that is not in it.

    Candidates of one point lie in tiles of 8. A tile of `levels` holds the first weight's level of its eight
    candidates, then the second's, and so on. The last tile of a point is filled up with copies of the last candidate,
    which never win because the first of equals does.
    """

    values: NDArray[np.float32]  # [points, weights]: what a decoder multiplies by the scale
    points: NDArray[np.int8]  # [points, weights]: levels
    where: NDArray[np.int32]  # [keys]: index of the point; or -1 - n for the n-th list of candidates
    first: NDArray[np.int32]  # [lists + 1]: first tile of each list
    levels: NDArray[np.int8]  # [tiles * weights * 8]
    names: NDArray[np.uint16]  # [tiles * 8]: index of each candidate


@cache
def codebook(name: str) -> Codebook:
    """Returns a codebook, made on first use (a few hundredths of a second).

    Args:
        name: `iq2_xxs`, `iq2_xs`, `iq2_s`, `iq3_xxs`, `iq3_s`, or `iq1` for IQ1_S and IQ1_M.
    """
    values, points, base, distances = _published(name)
    keys = base ** points.shape[1]
    where, first, total = _lists(points, base, keys, distances)
    levels = np.zeros(total * TILE * points.shape[1], np.int8)
    names = np.zeros(total * TILE, np.uint16)
    _fill(points, base, distances, where, first, levels, names)
    return Codebook(values, points, where, first, levels, names)


def _published(name: str) -> tuple[NDArray[np.float32], NDArray[np.int8], int, int]:
    """Returns the values and levels of a codebook's points, levels per weight and distances per list."""
    import gguf.quants

    kind, base, distances = _GRIDS[name]
    source: Any = getattr(gguf.quants, kind)
    source.init_grid()
    values = np.ascontiguousarray(source.grid.reshape(source.grid_shape), np.float32)
    points = np.searchsorted(np.asarray(source.grid_map), values).astype(np.int8)
    return values, points, base, distances


@compiled
def _distances(points: Any, base: int, key: int, out: Any) -> None:
    """Writes the squared distance of a key's point to every codebook point; neighbouring levels are 2 apart."""
    out[:] = 0
    rest = key
    for i in range(points.shape[1]):
        level = rest % base
        rest //= base
        for j in range(points.shape[0]):
            step = points[j, i] - level
            out[j] += np.int32(4 * step * step)


@compiled
def _limit(distance: Any, distinct: int) -> tuple[int, int]:
    """Returns the largest of the `distinct` smallest different distances, and how many points are within it."""
    limit = -1
    for _ in range(distinct):
        nearest = 1 << 30
        for j in range(distance.size):
            if limit < distance[j] < nearest:
                nearest = distance[j]
        if nearest == 1 << 30:
            break
        limit = nearest
    return limit, np.sum(distance <= limit)


@compiled
def _lists(points: Any, base: int, keys: int, distinct: int) -> tuple[Any, Any, int]:
    """Returns `where` and `first` of a codebook, and the number of tiles."""
    where = np.full(keys, -1, np.int32)
    for n in range(points.shape[0]):
        key = 0
        for i in range(points.shape[1]):
            key = key * base + points[n, points.shape[1] - 1 - i]
        where[key] = n
    first = np.zeros(keys - points.shape[0] + 1, np.int32)
    distance = np.empty(points.shape[0], np.int32)
    lists = 0
    for key in range(keys):
        if where[key] < 0:
            _distances(points, base, key, distance)
            count = _limit(distance, distinct)[1]
            where[key] = -1 - lists
            first[lists + 1] = first[lists] + (count + TILE - 1) // TILE
            lists += 1
    return where, first, first[lists]


@compiled
def _fill(points: Any, base: int, distinct: int, where: Any, first: Any, levels: Any, names: Any) -> None:
    """Writes the candidates of every list: by distance, then by index."""
    weights = points.shape[1]
    distance = np.empty(points.shape[0], np.int32)
    for key in range(where.size):
        if where[key] >= 0:
            continue
        _distances(points, base, key, distance)
        limit = _limit(distance, distinct)[0]
        at, end = first[-1 - where[key]] * TILE, first[-where[key]] * TILE
        nearest = -1
        while nearest < limit:
            following = limit
            for j in range(distance.size):
                if nearest < distance[j] < following:
                    following = distance[j]
            nearest = following
            for j in range(distance.size):
                if distance[j] == nearest:
                    names[at] = j
                    at += 1
        while at < end:
            names[at] = names[at - 1]
            at += 1
        for tile in range(first[-1 - where[key]], first[-where[key]]):
            for i in range(weights):
                for j in range(TILE):
                    levels[(tile * weights + i) * TILE + j] = points[names[tile * TILE + j], i]
