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
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize.kernels.cpu import kept

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE = 8  # candidates that are scored together
_CHUNK = 512  # lists that are made at once

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
    """Returns a codebook; made once on a machine (a tenth of a second, and as much to import where it comes from).

    Args:
        name: `iq2_xxs`, `iq2_xs`, `iq2_s`, `iq3_xxs`, `iq3_s`, or `iq1` for IQ1_S and IQ1_M.
    """
    contents = kept.read(f"{name}.npz")
    if contents is not None:
        with np.load(BytesIO(contents)) as arrays:
            return Codebook(**arrays)
    made, file = _made(name), BytesIO()
    np.savez(file, **made)  # type: ignore[arg-type]
    kept.write(f"{name}.npz", file.getvalue())
    return Codebook(**made)


def _made(name: str) -> dict[str, NDArray[Any]]:
    """Returns the fields of a codebook."""
    values, points, base, distances = _published(name)
    where, first, names = _candidates(points, base, distances)
    levels = points[names].reshape(-1, TILE, points.shape[1]).transpose(0, 2, 1).reshape(-1)
    return {"values": values, "points": points, "where": where, "first": first, "levels": levels, "names": names}


def _published(name: str) -> tuple[NDArray[np.float32], NDArray[np.int8], int, int]:
    """Returns the values and levels of a codebook's points, levels per weight and distances per list."""
    import gguf.quants

    kind, base, distances = _GRIDS[name]
    source: Any = getattr(gguf.quants, kind)
    source.init_grid()
    values = np.ascontiguousarray(source.grid.reshape(source.grid_shape), np.float32)
    points = np.searchsorted(np.asarray(source.grid_map), values).astype(np.int8)
    return values, points, base, distances


def _candidates(
    points: NDArray[np.int8], base: int, distances: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint16]]:
    """Returns `where`, `first` and `names` of a codebook."""
    count, weights = points.shape
    places = base ** np.arange(weights)
    where = np.full(base**weights, -1, np.int32)
    where[points.astype(np.int64) @ places] = np.arange(count)
    keys = np.flatnonzero(where < 0)
    where[keys] = -1 - np.arange(keys.size)
    names, tiles = [], np.zeros(keys.size + 1, np.int32)
    for start in range(0, keys.size, _CHUNK):
        levels = keys[start : start + _CHUNK, None] // places % base
        distance = _square_distances(levels, points)
        limit = _smallest(distance, distances)
        rows, found = np.nonzero(distance <= limit[:, None])
        found = found[np.lexsort((found, distance[rows, found], rows))]
        sizes = np.bincount(rows, minlength=len(levels))
        filled = -(-sizes // TILE) * TILE
        tiles[start + 1 : start + 1 + len(levels)] = filled // TILE
        # Position in a list, no further than its last candidate, plus where the list starts.
        within = np.arange(filled.sum()) - np.repeat(np.cumsum(filled) - filled, filled)
        at = np.minimum(within, np.repeat(sizes - 1, filled)) + np.repeat(np.cumsum(sizes) - sizes, filled)
        names.append(found[at].astype(np.uint16))
    return where, np.cumsum(tiles, dtype=np.int32), np.concatenate(names)


def _square_distances(levels: NDArray[np.int64], points: NDArray[np.int8]) -> NDArray[np.float32]:
    """Returns the squared distances [levels, points]; float32 is exact for them and has a fast product."""
    a, b = levels.astype(np.float32), points.astype(np.float32)
    distance: NDArray[np.float32] = (a * a).sum(1)[:, None] - 2 * (a @ b.T) + (b * b).sum(1)
    return distance


def _smallest(distance: NDArray[np.float32], distinct: int) -> NDArray[np.float32]:
    """Returns the largest of the `distinct` smallest different numbers of each row."""
    limit: NDArray[np.float32] = distance.min(1)
    for _ in range(distinct - 1):
        further = np.where(distance > limit[:, None], distance, np.inf).min(1)
        limit = np.where(np.isfinite(further), further, limit)
    return limit
