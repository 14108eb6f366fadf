"""The output: header first, arrays at their offsets in any order, a journal, and the final name by rename.

An output is a folder, or one file (with its parts and its report beside it), as the format wants it. Work goes to
`<out>.partial/`. The journal there holds one line with the fingerprint of model, data and settings and
then one line for each array that is safely on disk, with its checksum. A run with the same fingerprint continues there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Set
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.checksums import Run, joined
from quantize.errors import InputError, ResourceError, UsageError, VerificationError, system_errors
from quantize.formats.base import Layout
from quantize.formats.container import tensor_bytes, write_all
from quantize.ranks import ALONE, Ranks

# The report in an output: a folder with it is ours, and it lists the files that we put there.
REPORT = "quantize.json"
# Hidden, as side files never are.
JOURNAL = ".quantize-journal"
_START = b'{"fingerprint": "'
_READ = 16 * 2**20
_SPARES = 100


def partial_path(out: Path) -> Path:
    """Returns the folder in which an output is made."""
    return out.with_name(f"{out.name}.partial")


def check_target(out: Path, sources: Iterable[Path], overwrite: bool, files: Iterable[str] = ()) -> None:
    """Refuses an output path that exists, that is or holds an input, or that holds anything that is not ours.

    Args:
        out: The output.
        sources: All inputs.
        overwrite: Whether an older output may be replaced.
        files: Names of the files that stand beside each other as the output; empty where it is a folder.

    Raises:
        UsageError: naming the path and the way out.
    """
    for source in sources:
        same = out.exists() and source.exists() and out.samefile(source)  # hard links, too
        if same or out.resolve() == source.resolve():
            raise UsageError(f"{out}: output and input are the same", "choose another --out")
        if out.resolve() in source.resolve().parents:
            raise UsageError(f"{out}: the input {source} lies inside it", "choose another --out")
    if files:
        _check_files([out.with_name(name) for name in files], list(sources), overwrite)
        return
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"{out}: exists already", "say --overwrite, or choose another --out")
    foreign = _foreign(out)
    if foreign is not None:
        raise UsageError(
            f"{out}: holds {foreign}, which quantize did not write", "move it away, or choose another --out"
        )


def _check_files(outs: Iterable[Path], sources: Iterable[Path], overwrite: bool) -> None:
    for out in outs:
        if out.is_dir():
            raise UsageError(f"{out}: is a folder", "name the file with --out")
        if not out.exists() and not out.is_symlink():
            continue
        if any(source.is_file() and out.exists() and out.samefile(source) for source in sources):
            raise UsageError(f"{out}: output and input are the same", "choose another --out")
        if not overwrite:
            raise UsageError(f"{out}: exists already", "say --overwrite, or choose another --out")


def _foreign(out: Path) -> str | None:
    """Returns something at `out` that no run of ours put there, or None."""
    if not out.is_dir():
        return "a file" if out.exists() else None
    found = sorted(file.relative_to(out).as_posix() for file in out.rglob("*") if not file.is_dir())
    try:
        ours = {JOURNAL, *json.loads((out / REPORT).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    return next((name for name in found if name not in ours), None)


def tidy(out: Path) -> None:
    """Ends what a run that was killed while it gave `out` its name left behind: its journal, the older output."""
    _move_rest(out)
    journal = out / JOURNAL
    if not journal.is_file():
        return
    for entry in _entries(journal.read_bytes()):
        name = entry.get("replaced")
        if name in _spares(out):  # a journal that came with someone's folder must not name anything else
            _remove(out.with_name(name))
    journal.unlink()


def _move_rest(out: Path) -> None:
    """Gives the files of a complete output of several files the names that a killed run had begun to give."""
    folder = partial_path(out)
    journal = folder / JOURNAL
    if not journal.is_file():
        return
    for entry in _entries(journal.read_bytes()):
        if isinstance(entry.get("moving"), list):
            for name in (Path(str(name)).name for name in entry["moving"]):
                if (folder / name).is_file():
                    (folder / name).replace(out.with_name(name))
            shutil.rmtree(folder)


def _spares(out: Path) -> list[str]:
    """Returns the names that an older output may get while it is replaced."""
    return [f"{out.name}.replaced", *(f"{out.name}.replaced-{number}" for number in range(2, _SPARES))]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _entries(content: bytes) -> list[dict[str, Any]]:
    """Returns the whole lines of a journal up to the first that is none: a kill tears the last line."""
    entries: list[dict[str, Any]] = []
    for line in content.split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


class OutputFolder:
    """One output in the making.

    Args:
        out: The final folder, or the final (first) file.
        files: What lies where in each weight file, by file name.
        fingerprint: Hash of everything that decides the bytes.
        restart: Whether to drop an unfinished run instead of continuing it.
        loose: Whether the output is its files, side by side in the folder of `out`, and no folder of its own.
        ranks: Those that fill it together: all put arrays or runs of their rows, the first does everything else.

    Raises:
        UsageError: `<out>.partial` is not ours, or another run is at work in it.
        InputError: it is of a run with another fingerprint.
        ResourceError: the disk is full; nothing is left behind then, but what an earlier run had done.
    """

    def __init__(
        self,
        out: Path,
        files: Mapping[str, Layout],
        fingerprint: str,
        restart: bool,
        loose: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.out = out
        self._ranks = ranks
        self._loose = loose
        self.path = partial_path(out)
        self.records: dict[str, dict[str, Any]] = {}
        self._files = files
        self._where: dict[str, tuple[str, int, int]] = {}
        self._sums: dict[str, int] = {}
        self._done: set[str] = set()
        self._fresh: dict[str, list[Run]] = {}
        self._fresh_records: dict[str, None] = {}
        self._open: dict[str, int] = {}
        self._journal = -1
        if ranks.first:
            self._take(fingerprint, restart)
        self._sums, self.records = ranks.from_first(lambda: (self._sums, self.records))
        if not ranks.first:
            self._join()

    def _take(self, fingerprint: str, restart: bool) -> None:
        """Makes the unfinished folder ours: one to continue, or a new one with its files laid out."""
        with self._system_errors():
            self._journal = self._claim()
        found = False
        try:
            with self._system_errors():
                found = not restart and self._resume(fingerprint)
                if not found:
                    self._begin(fingerprint)
                for name, layout in self._files.items():
                    self._lay_out(name, layout)
                self._drop_broken()
        except ResourceError:
            self.close() if found else self.discard()
            raise
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        """Opens the files that the first rank has laid out."""
        with self._system_errors():
            for name, layout in self._files.items():
                self._open[name] = os.open(self.path / name, os.O_RDWR)
                self._know(name, layout)
        self._done |= self._sums.keys()

    @staticmethod
    def reserved_bytes(out: Path) -> int:
        """Returns the bytes that an unfinished run of `out` holds on disk already."""
        folder = partial_path(out)
        return sum(f.stat().st_blocks * 512 for f in folder.iterdir() if f.is_file()) if folder.is_dir() else 0

    @property
    def done(self) -> Set[str]:
        """Arrays that are safely on disk."""
        return self._done

    def put(self, arrays: Mapping[str, Tensor]) -> None:
        """Writes whole arrays; they count as done after `commit`."""
        for name, tensor in arrays.items():
            self.put_parts(name, [tensor])

    def put_parts(self, name: str, parts: Iterable[Tensor], start: int = 0) -> None:
        """Writes consecutive runs of rows of an array, from its byte `start` on; all of it must come before `commit`.

        What a rank puts of one array comes in the order of its bytes.
        """
        file, offset, nbytes = self._where[name]
        runs = self._fresh.setdefault(name, [])
        end, total = start, 0
        if runs and sum(runs[-1][:2]) == start:
            start, _, total = runs.pop()
        for part in parts:
            data = tensor_bytes(part)
            assert end + len(data) <= nbytes, (name, end + len(data), nbytes)
            total = zlib.crc32(data, total)
            with self._system_errors():
                write_all(self._open[file], data, offset + end)
            end += len(data)
        runs.append((start, end - start, total))

    def commit(self) -> None:
        """Makes what all ranks put since the last commit survive a crash: data first, then the journal's word."""
        with self._system_errors():
            for file in {self._where[name][0] for name in self._fresh}:
                _sync_data(self._open[file])
        fresh: dict[str, list[Run]] = {}
        for put in self._ranks.gather(self._fresh):
            for name, runs in put.items():
                fresh.setdefault(name, []).extend(runs)
        for name, runs in fresh.items():
            total = joined(runs, self._where[name][2])
            assert total is not None, (name, self._where[name], runs)
            self._sums[name] = total
        if self._ranks.first:
            # records first: an array that counts as done is not made again, nor is what was said of it
            notes = [{"record": name, "value": self.records[name]} for name in self._fresh_records]
            with self._system_errors():
                self._note(*notes, *({"done": name, "crc32": self._sums[name]} for name in fresh))
        self._done |= fresh.keys()
        self._fresh.clear()
        self._fresh_records.clear()

    def record(self, name: str, value: Mapping[str, Any]) -> None:
        """Keeps what the report will say of a part; it is as durable as the arrays of the next `commit`.

        All ranks say the same.
        """
        self.records[name] = dict(value)
        self._fresh_records[name] = None

    def write_side_files(self, copied: Mapping[str, Path], written: Mapping[str, str]) -> None:
        """Puts the files that are no weights; `written` gives texts by name and wins over `copied`."""
        if self._ranks.first:
            self._write_side_files(copied, written)
        self._ranks.agree()

    def _write_side_files(self, copied: Mapping[str, Path], written: Mapping[str, str]) -> None:
        with self._system_errors():
            for name, source in copied.items():
                if name not in written:
                    target = self.path / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
            for name, text in written.items():
                (self.path / name).write_text(text, encoding="utf-8")

    def index(self) -> str | None:
        """Returns the text of the shard index, or None when there is one file."""
        if len(self._files) == 1:
            return None
        total = sum(nbytes for layout in self._files.values() for _, nbytes in layout.where.values())
        table = {name: file for file, layout in self._files.items() for name in layout.arrays or layout.where}
        value = {"metadata": {"total_size": total}, "weight_map": table}
        return json.dumps(value, indent=2, sort_keys=True) + "\n"

    def verify(self) -> None:
        """Reads every array back and compares its checksum.

        Raises:
            VerificationError: one is missing or differs.
        """
        for name, (file, offset, nbytes) in self._ranks.share(self._where.items(), lambda item: item[1][2]):
            if name not in self._sums:
                raise VerificationError(f"{self.path / file}: tensor '{name}' was never written")
            if self._checksum(file, offset, nbytes) != self._sums[name]:
                raise VerificationError(f"{self.path / file}: tensor '{name}' does not read back as written")

    def publish(self, overwrite: bool) -> None:
        """Gives the folder its final name; an older one is replaced only now.

        Raises:
            ResourceError: something else has taken the name, or the disk fails; the finished work stays.
        """
        self._ranks.agree()  # nobody reads any more
        if not self._ranks.first:
            self.close()
            return
        with self._system_errors():
            for file in (*self.path.rglob("*"), self.path):
                if file.is_file() or file.is_dir():
                    _sync(file)
        try:
            if self._loose:
                self._move_files()
            else:
                if overwrite and (self.out.exists() or self.out.is_symlink()):
                    self._set_aside()
                self.path.rename(self.out)
            _sync(self.out.parent)
        except OSError as error:
            raise ResourceError(
                f"{self.out}: {error.strerror or error}", "move away what is there, then repeat the command"
            ) from error
        # Only now: a run that is killed before the rename must find its journal again.
        tidy(self.out)
        self.close()

    def close(self) -> None:
        """Closes all files; what is on disk stays."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def discard(self) -> None:
        """Closes and removes the unfinished folder."""
        if self._ranks.first:
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def _move_files(self) -> None:
        """Gives every file its final name, the one that engines open last; the journal lets the next run end this."""
        names = sorted(file.name for file in self.path.iterdir() if not file.name.startswith("."))
        names.sort(key=lambda name: name == self.out.name)
        self._note({"moving": names})
        for name in names:
            (self.path / name).replace(self.out.with_name(name))
        shutil.rmtree(self.path)

    def _set_aside(self) -> None:
        """Gives an older output another name, which the journal knows: the next run removes it if this one cannot."""
        old = next(path for name in _spares(self.out) if not (path := self.out.with_name(name)).exists())
        self._note({"replaced": old.name})
        self.out.rename(old)

    def _claim(self) -> int:
        """Opens the journal of `<out>.partial`, which must be ours, and locks it against other runs."""
        journal = self.path / JOURNAL
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: is no folder", "move it away")
        if self.path.exists() and any(self.path.iterdir()):
            content = journal.read_bytes()[: len(_START)] if journal.is_file() else None
            if content is None or not _START.startswith(content):
                raise UsageError(f"{self.path}: exists and is not ours", "move it away")
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"{self.path}: another run is at work there", "wait for it, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        return descriptor

    def _begin(self, fingerprint: str) -> None:
        """Drops what an unfinished run has left and opens a new journal."""
        for entry in self.path.iterdir():
            if entry.name != JOURNAL:
                _remove(entry)
        self.records.clear()
        self._sums.clear()
        os.ftruncate(self._journal, 0)
        self._note({"fingerprint": fingerprint})

    def _resume(self, fingerprint: str) -> bool:
        """Reads the journal of an unfinished run; returns whether there is one to continue."""
        content = (self.path / JOURNAL).read_bytes()
        entries = _entries(content)
        lines = content.split(b"\n")
        os.ftruncate(self._journal, sum(len(line) + 1 for line in lines[: len(entries)]))
        if not entries:
            return False
        if entries[0].get("fingerprint") != fingerprint:
            raise InputError(
                f"{self.path}: an unfinished run with other settings, text or model", "say --restart to drop it"
            )
        for entry in entries[1:]:
            if "record" in entry:
                self.records[entry["record"]] = entry["value"]
            elif "done" in entry:
                self._sums[entry["done"]] = entry["crc32"]
        return True

    def _lay_out(self, name: str, layout: Layout) -> None:
        """Writes the header and reserves the space of all arrays, so that a full disk shows now."""
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o644)
        self._open[name] = descriptor
        _reserve(descriptor, layout.size)
        write_all(descriptor, layout.header, 0)
        self._know(name, layout)

    def _know(self, name: str, layout: Layout) -> None:
        self._where.update((array, (name, offset, nbytes)) for array, (offset, nbytes) in layout.where.items())

    def _drop_broken(self) -> None:
        """Forgets arrays whose bytes on disk are not those that the journal speaks of."""
        for name, crc in list(self._sums.items()):
            where = self._where.get(name)
            if where is None or self._checksum(*where) != crc:
                del self._sums[name]
        self._done |= self._sums.keys()

    def _checksum(self, file: str, offset: int, nbytes: int) -> int:
        total, done = 0, 0
        while done < nbytes:
            data = os.pread(self._open[file], min(_READ, nbytes - done), offset + done)
            if not data:
                return -1
            total = zlib.crc32(data, total)
            done += len(data)
        return total

    def _note(self, *entries: Mapping[str, object]) -> None:
        """Adds lines to the journal and waits until they are on disk."""
        _append(self._journal, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
        os.fsync(self._journal)

    def _system_errors(self) -> AbstractContextManager[None]:
        return system_errors(self.path, "choose another --out")


def _append(descriptor: int, data: bytes) -> None:
    """Appends all of `data` to a file opened for appending."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _reserve(descriptor: int, size: int) -> None:
    """Gives a file its size and, where the file system can, its space."""
    os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _sync_data(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)


def _sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(PermissionError):  # some systems refuse it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
