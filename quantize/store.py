"""Statistics on disk: one safetensors file, written block by block, tied to the model and text they were made from.

Arrays are `INPUT.hessian`, `INPUT.mean_abs` and `INPUT.max_abs`, float32; the file's metadata holds token counts and
the structure of each block as JSON. The header's room is reserved in advance and filled last, so nothing but one
block is ever in memory; the final name appears by rename.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from quantize.errors import InputError, system_errors
from quantize.formats.base import Piece
from quantize.formats.container import layout, read_header, read_rows, tensor_bytes
from quantize.statistics import Statistics
from quantize.structure import Fold, Input

_KIND = "quantize-statistics"
# Statistics of an unquantized prefix: those of blocks behind quantized ones must never be mixed with them.
_PREFIX = "float"
_ARRAYS = ("hessian", "mean_abs", "max_abs")
# Bytes of header for the whole file and for one matrix, beside eight times its name.
_ROOM = 2**12
_ROOM_OF_ONE = 1000


class StatisticsFile:
    """A statistics file, to be read if it exists and to be recorded if it does not."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._pieces: list[Piece] = []
        self._blocks: dict[str, Any] = {}
        self._file: BinaryIO | None = None

    @property
    def exists(self) -> bool:
        """Whether there is something to read."""
        return self.path.exists()

    def require(self, model: str, text: str) -> None:
        """Checks that an existing file was made from this model and text, or that a new one has a folder.

        Raises:
            InputError: it was not, or is no statistics file, or there is no such folder.
        """
        if not self.exists:
            if not self.path.parent.is_dir():
                raise InputError(f"{self.path}: no such folder", "make it, or name another file")
            return
        metadata = self._stored[1]
        if metadata.get("kind") != _KIND or metadata.get("prefix") != _PREFIX:
            raise InputError(f"{self.path}: no statistics of ours", "name a file that --statistics wrote")
        if metadata.get("model") != model:
            raise InputError(f"{self.path}: statistics of another model", "name another file to gather new ones")
        if metadata.get("text") != text:
            raise InputError(
                f"{self.path}: statistics of another calibration text",
                "repeat its --calib options, or name another file",
            )

    def read(self, block: str) -> tuple[tuple[Input, ...], dict[str, Statistics]]:
        """Returns the inputs of a block and their statistics.

        Raises:
            InputError: the block is not in the file.
        """
        extents, _ = self._stored
        if block not in self._known:
            raise InputError(f"{self.path}: holds nothing on {block}", "gather new statistics in another file")
        inputs, values = [], {}
        try:
            for row in self._known[block]:
                fold = Fold(**row["fold"]) if row["fold"] else None
                item = Input(row["name"], tuple(row["consumers"]), row["width"], fold)
                inputs.append(item)
                if row["count"]:
                    parts = {key: read_rows(extents[f"{item.name}.{key}"]) for key in _ARRAYS}
                    values[item.name] = Statistics(row["count"], parts["mean_abs"], parts["max_abs"], parts["hessian"])
        except (KeyError, TypeError) as error:
            raise self._broken() from error
        return tuple(inputs), values

    @contextmanager
    def recording(self, model: str, text: str, names: Iterable[str]) -> Iterator[None]:
        """A context in which `write` adds blocks; the file gets its name only if the context ends well.

        Args:
            model: Fingerprint of the model.
            text: Hash of the text.
            names: Names of all matrices whose inputs may come; they decide the room for the header.

        Raises:
            InputError: the file cannot be written.
            ResourceError: the disk is full.
        """
        partial = self.path.with_name(f"{self.path.name}.partial")
        room = _ROOM + sum(_ROOM_OF_ONE + 8 * len(name) for name in names)
        room += -room % 8
        with self._system_errors():
            self._file = partial.open("wb")
        try:
            self._file.seek(8 + room)
            yield
            with self._system_errors():
                self._finish(self._file, room, {"kind": _KIND, "model": model, "text": text, "prefix": _PREFIX})
                partial.rename(self.path)
        finally:
            self._file.close()
            self._file = None
            partial.unlink(missing_ok=True)

    def write(self, block: str, inputs: Sequence[Input], values: Mapping[str, Statistics]) -> None:
        """Adds one block; only inside `recording`."""
        assert self._file is not None
        rows = []
        for item in inputs:
            found = values.get(item.name)
            rows.append({**asdict(item), "count": found.count if found else 0})
            if found:
                for key in _ARRAYS:
                    array = getattr(found, key)
                    self._pieces.append(Piece(f"{item.name}.{key}", array.dtype, tuple(array.shape)))
                    with self._system_errors():
                        self._file.write(tensor_bytes(array))
        self._blocks[block] = rows

    def _finish(self, file: BinaryIO, room: int, metadata: Mapping[str, str]) -> None:
        """Writes the header into the room before the arrays, padded with spaces."""
        header = layout(self._pieces, {**metadata, "blocks": json.dumps(self._blocks)}).header
        assert len(header) <= 8 + room, (len(header), room)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header[8:].ljust(room))
        file.flush()
        os.fsync(file.fileno())

    def _system_errors(self) -> AbstractContextManager[None]:
        return system_errors(self.path, "name another file for --statistics")

    @cached_property
    def _stored(self) -> tuple[dict[str, Any], dict[str, str]]:
        return read_header(self.path)

    @cached_property
    def _known(self) -> dict[str, Any]:
        try:
            known: dict[str, Any] = json.loads(self._stored[1]["blocks"])
        except (KeyError, ValueError) as error:
            raise self._broken() from error
        return known

    def _broken(self) -> InputError:
        return InputError(f"{self.path}: its description of the blocks is broken", "gather new statistics")
