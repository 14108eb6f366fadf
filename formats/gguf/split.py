"""Cutting a model into several GGUF files.

Each part is a whole GGUF file with its own tensors and three keys: `split.no` (u16, from 0), `split.count` (u16) and
`split.tensors.count` (i32, of all parts). The metadata is in the first alone, and the model is opened through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantize.formats.gguf.metadata import ALIGNMENT, Kind, Value

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def split_metadata(metadata: Mapping[str, Value], counts: Sequence[int]) -> list[dict[str, Value]]:
    """Returns the metadata of each part, its split keys made anew; a single file has none.

    Args:
        metadata: Of the whole model; split keys in it are dropped.
        counts: Number of tensors in each part.
    """
    whole = {key: value for key, value in metadata.items() if key not in SPLIT_KEYS}
    if len(counts) == 1:
        return [whole]
    # Where the data of a part starts hangs on its own alignment key.
    others = {ALIGNMENT: whole[ALIGNMENT]} if ALIGNMENT in whole else {}
    found = []
    for number in range(len(counts)):
        numbers = ((Kind.U16, number), (Kind.U16, len(counts)), (Kind.I32, sum(counts)))
        keys = {key: Value(*value) for key, value in zip(SPLIT_KEYS, numbers, strict=True)}
        found.append((others if number else whole) | keys)
    return found


def part_names(stem: str, count: int) -> list[str]:
    """Returns the file names of a model of `count` parts: `STEM.gguf`, or `STEM-00001-of-00003.gguf` and so on."""
    if count == 1:
        return [f"{stem}.gguf"]
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
