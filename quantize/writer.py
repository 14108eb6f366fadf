"""The output folder: header first, arrays at their offsets in any order, a journal, and the final name by rename.

Work goes to `<out>.partial/`. `journal.jsonl` holds one line with the fingerprint of model, data and settings and then
one line for each array that is safely on disk, with its checksum. A run with the same fingerprint continues there.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from quantize.errors import InputError, ResourceError, UsageError, VerificationError, resource_error
from quantize.formats.base import Piece
from quantize.formats.container import layout, tensor_bytes, write_all

JOURNAL = "journal.jsonl"
_READ = 16 * 2**20


def partial_path(out: Path) -> Path:
    """Returns the folder in which an output is made."""
    return out.with_name(f"{out.name}.partial")


def check_target(out: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """Refuses an output path that exists, that is or holds an input, or that holds what no model folder holds.

    Raises:
        UsageError: naming the path and the way out.
    """
    for source in sources:
        same = out.exists() and source.exists() and out.samefile(source)  # hard links, too
        if same or out.resolve() == source.resolve():
            raise UsageError(f"{out}: output and input are the same", "choose another --out")
        if out.resolve() in source.resolve().parents:
            raise UsageError(f"{out}: the input {source} lies inside it", "choose another --out")
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"{out}: exists already", "say --overwrite, or choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise UsageError(f"{out}: holds no model, so it is not replaced", "choose another --out")


class OutputFolder:
    """One output in the making.

    Args:
        out: The final folder.
        files: Arrays of each safetensors file, in order.
        fingerprint: Hash of everything that decides the bytes.
        restart: Whether to drop an unfinished run instead of continuing it.
    """

    def __init__(self, out: Path, files: Mapping[str, tuple[Piece, ...]], fingerprint: str, restart: bool) -> None:
        self.out = out
        self.path = partial_path(out)
        self.records: dict[str, dict[str, Any]] = {}
        self._files = files
        self._where: dict[str, tuple[str, int, int]] = {}
        self._sums: dict[str, int] = {}
        self._fresh: list[str] = []
        self._fresh_records: list[str] = []
        self._open: dict[str, int] = {}
        if restart and self.path.exists():
            self._require_ours()
            shutil.rmtree(self.path)
        found = self._resume(fingerprint)
        self._journal: TextIO | None = None
        try:
            self._begin(None if found else fingerprint)
        except BaseException:
            self.close() if found else self.discard()
            raise
        self._drop_broken()

    def _begin(self, fingerprint: str | None) -> None:
        """Makes the files and reserves their space; a new journal opens with the fingerprint."""
        with self._system_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            self._journal = (self.path / JOURNAL).open("a", encoding="utf-8")
            for name, pieces in self._files.items():
                self._lay_out(name, pieces)
            if fingerprint is not None:
                self._note({"fingerprint": fingerprint})
                self._sync_journal()

    @staticmethod
    def reserved_bytes(out: Path) -> int:
        """Returns the bytes that an unfinished run of `out` holds on disk already."""
        folder = partial_path(out)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0

    @property
    def done(self) -> frozenset[str]:
        """Arrays that are safely on disk."""
        return frozenset(self._sums) - frozenset(self._fresh)

    def put(self, arrays: Mapping[str, Tensor]) -> None:
        """Writes whole arrays; they count as done after `commit`."""
        for name, tensor in arrays.items():
            self.put_parts(name, [tensor])

    def put_parts(self, name: str, parts: Iterable[Tensor]) -> None:
        """Writes one array given as consecutive runs of rows."""
        file, offset, nbytes = self._where[name]
        start, total = offset, 0
        with self._system_errors():
            for part in parts:
                data = tensor_bytes(part)
                total = zlib.crc32(data, total)
                write_all(self._open[file], data, offset)
                offset += len(data)
        assert offset - start == nbytes, (name, offset - start, nbytes)
        self._sums[name] = total
        self._fresh.append(name)

    def commit(self) -> None:
        """Makes what was put since the last commit survive a crash: data first, then the journal's word."""
        with self._system_errors():
            for file in {self._where[name][0] for name in self._fresh}:
                os.fdatasync(self._open[file])
            for name in self._fresh:
                self._note({"done": name, "crc32": self._sums[name]})
            for name in self._fresh_records:
                self._note({"record": name, "value": self.records[name]})
            self._sync_journal()
        self._fresh.clear()
        self._fresh_records.clear()

    def record(self, name: str, value: Mapping[str, Any]) -> None:
        """Keeps what the report will say of a part; it is as durable as the arrays of the next `commit`."""
        self.records[name] = dict(value)
        self._fresh_records.append(name)

    def write_side_files(self, copied: Mapping[str, Path], written: Mapping[str, str]) -> None:
        """Puts the files that are no weights; `written` gives texts by name and wins over `copied`."""
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
        total = sum(piece.nbytes for pieces in self._files.values() for piece in pieces)
        table = {piece.name: file for file, pieces in self._files.items() for piece in pieces}
        value = {"metadata": {"total_size": total}, "weight_map": table}
        return json.dumps(value, indent=2, sort_keys=True) + "\n"

    def verify(self) -> None:
        """Reads every array back and compares its checksum.

        Raises:
            VerificationError: one is missing or differs.
        """
        for name, (file, offset, nbytes) in self._where.items():
            if name not in self._sums:
                raise VerificationError(f"{self.path / file}: tensor '{name}' was never written")
            if self._checksum(file, offset, nbytes) != self._sums[name]:
                raise VerificationError(f"{self.path / file}: tensor '{name}' does not read back as written")

    def publish(self, overwrite: bool) -> None:
        """Gives the folder its final name; an older one is replaced only now."""
        with self._system_errors():
            for file in self.path.rglob("*"):
                if file.is_file():
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
        self.close()
        old = self.out.with_name(f"{self.out.name}.replaced")
        if overwrite and self.out.exists():
            self.out.rename(old)
        self.path.rename(self.out)
        # Only now: a run that is killed before the rename must find its journal again.
        (self.out / JOURNAL).unlink()
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old.exists():
            old.unlink()
        folder = os.open(self.out.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def close(self) -> None:
        """Closes all files; what is on disk stays."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        if self._journal is not None:
            self._journal.close()

    def discard(self) -> None:
        """Closes and removes the unfinished folder."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def _require_ours(self) -> None:
        if any(self.path.iterdir()) and not (self.path / JOURNAL).is_file():
            raise UsageError(f"{self.path}: exists and is not ours", "move it away")

    def _resume(self, fingerprint: str) -> bool:
        """Reads the journal of an unfinished run; returns whether there is one to continue."""
        if not self.path.exists():
            return False
        self._require_ours()
        journal = self.path / JOURNAL
        if not journal.is_file():
            return False
        lines = journal.read_bytes().split(b"\n")
        if lines[-1]:  # killed while writing the last line
            whole = len(b"\n".join(lines[:-1])) + (len(lines) > 1)
            os.truncate(journal, whole)
        found = False
        for line in lines[:-1]:
            entry = json.loads(line)
            if "fingerprint" in entry:
                found = True
                if entry["fingerprint"] != fingerprint:
                    raise InputError(
                        f"{self.path}: an unfinished run with other settings, text or model",
                        "say --restart to drop it",
                    )
            elif "record" in entry:
                self.records[entry["record"]] = entry["value"]
            else:
                self._sums[entry["done"]] = entry["crc32"]
        return found

    def _lay_out(self, name: str, pieces: tuple[Piece, ...]) -> None:
        """Writes the header and reserves the space of all arrays, so that a full disk shows now."""
        header, offsets, size = layout(pieces, {"format": "pt"})
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o644)
        self._open[name] = descriptor
        os.posix_fallocate(descriptor, 0, size)
        write_all(descriptor, header, 0)
        for piece in pieces:
            self._where[piece.name] = (name, offsets[piece.name], piece.nbytes)

    def _drop_broken(self) -> None:
        """Forgets arrays whose bytes on disk are not those that the journal speaks of."""
        for name, crc in list(self._sums.items()):
            where = self._where.get(name)
            if where is None or self._checksum(*where) != crc:
                del self._sums[name]

    def _checksum(self, file: str, offset: int, nbytes: int) -> int:
        total, done = 0, 0
        while done < nbytes:
            data = os.pread(self._open[file], min(_READ, nbytes - done), offset + done)
            if not data:
                return -1
            total = zlib.crc32(data, total)
            done += len(data)
        return total

    def _note(self, entry: Mapping[str, object]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(entry) + "\n")

    def _sync_journal(self) -> None:
        assert self._journal is not None
        self._journal.flush()
        os.fsync(self._journal.fileno())

    @contextmanager
    def _system_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if full := resource_error(error):
                raise ResourceError(f"{self.path}: {error.strerror or error}", full.hint) from error
            raise InputError(f"{self.path}: {error.strerror or error}", "choose another --out") from error
