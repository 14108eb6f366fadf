"""Changing the metadata of a GGUF file.

The data section starts at the first aligned byte behind the header. A new header that ends before the same byte is
written in place; any other makes the tensors move, so the file is copied beside itself and renamed.

In place nothing may be left half-written:

- where all bytes that differ lie in one disk sector, one write replaces them: it happens or does not;
- else old and new header first go to a journal, `.NAME.edit`. After a crash the file holds bytes of both; the next
  edit puts the old header back, and until then `read_part` refuses the file.

A file that has other names (symlink, hard links: a download cache, say) is never changed in place: the name that was
given gets a copy of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize.errors import InputError, UsageError, system_errors, unknown_name
from quantize.formats.base import Layout
from quantize.formats.container import write_all
from quantize.formats.gguf.container import Part, read_part
from quantize.formats.gguf.header import journal_path, read_values
from quantize.formats.gguf.layout import Entry, layout
from quantize.formats.gguf.metadata import Value
from quantize.formats.gguf.split import SPLIT_KEYS
from quantize.formats.gguf.stream import check, create, fill, sync_folder

_SECTOR = 512
_MAGIC = b"quantize edit 1\n"


@dataclass(frozen=True, slots=True)
class Edited:
    """What an edit did, or would do.

    Attributes:
        changed: Keys whose value is another now, or gone; empty when everything was so already.
        in_place: Whether the tensors stayed where they are.
        written: Bytes of the header, or of the file where it was copied; 0 where nothing changed.
    """

    changed: tuple[str, ...]
    in_place: bool
    written: int


def edit(path: Path, put: Mapping[str, Value], remove: Sequence[str] = (), *, dry_run: bool = False) -> Edited:
    """Sets and removes metadata of one file; tensors are neither read nor changed.

    Args:
        path: The file; of a split model the first part.
        put: New values by key; their types may be others than the old ones'.
        remove: Keys to be dropped.
        dry_run: Whether nothing shall be written.

    Raises:
        UsageError: a key to remove is not there, a key is in both lists, or the file is a later part.
        InputError: the file or a new value is broken, or the file is big-endian.
        ResourceError: the disk is full; the file is as it was.
    """
    if twice := sorted(put.keys() & set(remove)):
        raise UsageError(f"metadata key '{twice[0]}' cannot be set and removed at once")
    if dry_run:
        return _plan(read_part(path), put, remove)[0]
    with _locked(path) as descriptor:
        _recover(descriptor, path)
        part = read_part(path)
        edited, place = _plan(part, put, remove)
        if edited.changed and edited.in_place:
            _write_in_place(descriptor, path, os.pread(descriptor, part.start, 0), place.header)
        elif edited.changed:
            _copy(descriptor, part, place)
    return edited


def _plan(part: Part, put: Mapping[str, Value], remove: Sequence[str]) -> tuple[Edited, Layout]:
    """Returns what is to be done, and the file's new layout."""
    file, old = part.file, read_values(part.file)
    if part.big_endian:
        raise InputError(
            f"{file}: a big-endian GGUF file", "make a little-endian one: quantize convert FILE --format gguf"
        )
    if part.metadata.get("split.no") and set(remove).union(put) - set(SPLIT_KEYS):
        raise UsageError(f"{file}: a later part of a split model holds no metadata", "name the first part")
    if absent := [key for key in remove if key not in old]:
        raise unknown_name("metadata key", absent[0], old)
    new = {key: value for key, value in (old | dict(put)).items() if key not in remove}
    entries = [Entry(name, stored.shape, stored.scheme) for name, stored in part.tensors.items()]
    place = layout(new, entries, all_dims=True)
    changed = [key for key in (*put, *remove) if not (key in old and key in new and _same(old[key], new[key]))]
    where = {name: (stored.extent.offset, stored.extent.nbytes) for name, stored in part.tensors.items()}
    # A file without tensors may end right behind its header, where padding has no room.
    fits = len(place.header) == part.start <= file.stat().st_size and where == place.where
    in_place = fits and not file.is_symlink() and file.stat().st_nlink == 1
    written = 0 if not changed else len(place.header) if in_place else place.size
    return Edited(tuple(changed), in_place, written), place


def _same(one: Value, other: Value) -> bool:
    return one.encode() == other.encode()


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A context with the descriptor of the file, locked against other edits."""
    with system_errors(path, "choose a file that can be written"):
        descriptor = os.open(path, os.O_RDWR)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{path}: another edit is at work", "wait for it") from None
            except OSError:
                pass  # a file system without locks
            yield descriptor
        finally:
            os.close(descriptor)


def _write_in_place(descriptor: int, path: Path, old: bytes, new: bytes) -> None:
    """Replaces the header by one of the same length."""
    differing = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    first, last = int(differing[0]), int(differing[-1])
    journal = journal_path(path)
    guarded = first // _SECTOR != last // _SECTOR
    if guarded:
        with journal.open("wb") as stream:
            stream.write(_MAGIC + hashlib.sha256(old + new).digest() + old + new)
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(journal)
    write_all(descriptor, new[first : last + 1], first)
    os.fsync(descriptor)
    if guarded:
        journal.unlink()
        sync_folder(journal)


def _recover(descriptor: int, path: Path) -> None:
    """Puts the old header back where an edit was interrupted; a journal of another file's header is dropped."""
    journal = journal_path(path)
    if not journal.exists():
        return
    raw = journal.read_bytes()
    digest, headers = raw[len(_MAGIC) :][:32], raw[len(_MAGIC) + 32 :]
    # A torn journal means that the header was not touched yet.
    if raw.startswith(_MAGIC) and hashlib.sha256(headers).digest() == digest:
        old, new = headers[: len(headers) // 2], headers[len(headers) // 2 :]
        now = os.pread(descriptor, len(old), 0)
        if now != new and len(now) == len(old) and _mixed(now, old, new):
            write_all(descriptor, old, 0)
            os.fsync(descriptor)
    journal.unlink()
    sync_folder(journal)


def _mixed(now: bytes, old: bytes, new: bytes) -> bool:
    """Returns whether every byte is that of one or the other header."""
    have, first, second = (np.frombuffer(raw, np.uint8) for raw in (now, old, new))
    return bool(np.all((have == first) | (have == second)))


def _copy(descriptor: int, part: Part, place: Layout) -> None:
    """Makes the file anew beside itself, with another header, and gives it its name."""
    partial = part.file.with_name(f".{part.file.name}.partial")
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    try:
        made = create(partial, place)
        try:
            fill(made, place, part.tensors)
            os.fchmod(made, mode)
        finally:
            os.close(made)
        check(partial, place)
        partial.replace(part.file)
        sync_folder(part.file)
    finally:
        partial.unlink(missing_ok=True)
