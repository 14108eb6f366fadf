"""Cutting a model into several GGUF files.

Each part is a whole GGUF file with its own tensors and three keys: `split.no` (u16, from 0), `split.count` (u16) and
`split.tensors.count` (i32, of all parts). The metadata is in the first alone, and the model is opened through it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from quantize.errors import UsageError
from quantize.formats.gguf.layout import Entry, padded
from quantize.formats.gguf.metadata import ALIGNMENT, Kind, Value

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_MOST_PARTS = 65535
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_SIZE = re.compile(r"(\d+)([KMG]?)B?", re.IGNORECASE)


def split(
    tensors: Sequence[Entry],
    *,
    max_bytes: int | None = None,
    max_tensors: int | None = None,
    bare_first: bool = False,
    alignment: int = 32,
) -> list[list[Entry]]:
    """Returns the tensors of each part, in order; one part when there is no limit.

    Args:
        tensors: What is to be cut.
        max_bytes: Most bytes of tensor data in a part, padding counted and headers not, as llama-gguf-split counts;
            a larger tensor gets a part of its own.
        max_tensors: Most tensors in a part.
        bare_first: Whether the first part shall have the metadata and no tensor.
        alignment: Of the files.

    Raises:
        UsageError: a limit below 1, or more parts than the format can count.
    """
    for limit in (max_bytes, max_tensors):
        if limit is not None and limit < 1:
            raise UsageError(f"a part cannot be limited to {limit}", "say 1 or more")
    parts: list[list[Entry]] = [[], []] if bare_first else [[]]
    held = 0
    for entry in tensors:
        size = padded(entry.nbytes, alignment)
        full = max_bytes is not None and held + size > max_bytes
        if parts[-1] and (full or len(parts[-1]) == max_tensors):
            parts.append([])
            held = 0
        parts[-1].append(entry)
        held += size
    if bare_first and not parts[-1]:
        parts.pop()
    if len(parts) > _MOST_PARTS:
        raise UsageError(f"{len(parts)} parts are more than the {_MOST_PARTS} that GGUF can count", "allow larger ones")
    return parts


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


def parse_size(text: str) -> int:
    """Returns the bytes that a limit such as `2G`, `500M` or `4096` stands for; units are decimal, as llama.cpp's.

    Raises:
        UsageError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise UsageError(f"'{text}' is no size", "say a number with K, M or G, such as 2G")
    return int(match[1]) * _UNITS[match[2].upper()]
