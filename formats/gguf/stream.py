"""Making a GGUF file out of tensors that lie in others, a few megabytes in memory at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from quantize.errors import InputError, VerificationError
from quantize.formats.base import Layout
from quantize.formats.container import Extent, write_all
from quantize.formats.gguf.container import Stored, read_part

_CHUNK = 16 * 2**20
# By these a system or file system says that it cannot copy between these two files by itself.
_NO_RANGES = (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.EPERM)


def create(path: Path, place: Layout, mode: int = 0o644) -> int:
    """Returns the descriptor of a new file with its header written and the space for all tensors reserved.

    Raises:
        OSError: as the system reports it; no space, for one.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)
    try:
        os.ftruncate(descriptor, place.size)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            try:
                os.posix_fallocate(descriptor, 0, place.size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        write_all(descriptor, place.header, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def fill(descriptor: int, place: Layout, tensors: Mapping[str, Stored]) -> None:
    """Copies the tensors of a layout, little-endian ones, to their places and waits until they are on disk.

    Raises:
        OSError: as the system reports it.
        InputError: a source ends early.
    """
    for name, (offset, _) in place.where.items():
        stored = tensors[name]
        with stored.extent.file.open("rb", buffering=0) as stream:
            _copy(descriptor, offset, stream.fileno(), stored.extent)
    os.fsync(descriptor)


def check(path: Path, place: Layout) -> None:
    """Reads the header of a finished file back.

    Raises:
        VerificationError: it does not say what its layout does.
    """
    try:
        found = {name: (s.extent.offset, s.extent.nbytes) for name, s in read_part(path).tensors.items()}
    except InputError as error:
        raise VerificationError(f"{path}: does not read back: {error.message}") from error
    if found != place.where:
        raise VerificationError(f"{path}: does not read back as written")


def sync_folder(path: Path) -> None:
    """Waits until the names in the folder of `path` are on disk."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except PermissionError:  # some systems refuse it for folders
        pass
    finally:
        os.close(descriptor)


def _copy(descriptor: int, offset: int, source: int, extent: Extent) -> None:
    """Copies the bytes of an extent, inside the kernel where it can: there file systems may share the blocks."""
    done = _copy_ranges(descriptor, offset, source, extent)
    while done < extent.nbytes:
        data = os.pread(source, min(_CHUNK, extent.nbytes - done), extent.offset + done)
        if not data:
            raise InputError(f"{extent.file}: ends early at byte {extent.offset + done}", "download it again")
        write_all(descriptor, data, offset + done)
        done += len(data)


def _copy_ranges(descriptor: int, offset: int, source: int, extent: Extent) -> int:
    """Returns the bytes that the kernel has copied: all, or those before it would not go on."""
    done = 0
    if not hasattr(os, "copy_file_range"):  # Linux only
        return done
    while done < extent.nbytes:
        try:
            count = os.copy_file_range(source, descriptor, extent.nbytes - done, extent.offset + done, offset + done)
        except OSError as error:
            if error.errno in _NO_RANGES:
                break
            raise
        if not count:
            break
        done += count
    return done
