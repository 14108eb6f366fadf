"""The CRC-32 of bytes that are known in runs only, from those of the runs.

With the checksum of what came before as a start, that of the next bytes is `crc32(data, start)`. For data of one length
it depends on `start` by exclusive-or alone: `crc32(data, start) == crc32(data) ^ shift(start)`, where `shift` is linear
over single bits and the same for all data of that length. Shifts of lengths that are powers of two follow from the one
of a single byte by applying each to itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache

# A run of bytes of an array: where it begins, how many, and their CRC-32.
Run = tuple[int, int, int]


def joined(runs: Iterable[Run], nbytes: int) -> int | None:
    """Returns the CRC-32 of `nbytes` bytes from their runs in any order, or None if these are not exactly they."""
    end = total = 0
    for start, size, crc in sorted(runs):
        if start != end:
            return None
        total = _shifted(total, size) ^ crc
        end += size
    return total if end == nbytes else None


def _shifted(crc: int, size: int) -> int:
    """Returns what a checksum adds to that of `size` bytes after it."""
    power = 0
    while size and crc:
        if size & 1:
            crc = _applied(_shift(power), crc)
        size >>= 1
        power += 1
    return crc


@cache
def _shift(power: int) -> tuple[int, ...]:
    """Returns what each bit of a checksum becomes over `2 ** power` bytes."""
    if not power:
        return tuple(zlib.crc32(b"\0", 1 << bit) ^ zlib.crc32(b"\0") for bit in range(32))
    half = _shift(power - 1)
    return tuple(_applied(half, value) for value in half)


def _applied(shift: tuple[int, ...], crc: int) -> int:
    result = 0
    for bit, value in enumerate(shift):
        if crc >> bit & 1:
            result ^= value
    return result
