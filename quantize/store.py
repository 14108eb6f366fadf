"""Statistics on disk: one safetensors file, written block by block, tied to the model and text they were made from.

Arrays are `INPUT.hessian`, `INPUT.mean_abs` and `INPUT.max_abs`, float32; the file's metadata holds token counts and
the structure of each block as JSON. The header's room is reserved in advance and filled last, so nothing but one
block is ever in memory; the final name appears by rename.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from quantize.errors import InputError
from quantize.formats.base import Piece
from quantize.formats.container import layout, read_header, read_rows, tensor_bytes
from quantize.statistics import Statistics
from quantize.structure import Fold, Input

_KIND = "quantize-statistics"
# Statistics of an unquantized prefix: those of blocks behind quantized ones must never be mixed with them.
_PREFIX = "float"
_ARRAYS = ("hessian", "mean_abs", "max_abs")
_HEADER_ROOM = 2**22


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
        """Checks that an existing file was made from this model and text.

        Raises:
            InputError: it was not, or is no statistics file.
        """
        if not self.exists:
            return
        metadata = self._stored[1]
        if metadata.get("kind") != _KIND:
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
        for row in self._known[block]:
            fold = Fold(**row["fold"]) if row["fold"] else None
            item = Input(row["name"], tuple(row["consumers"]), row["width"], fold)
            inputs.append(item)
            if row["count"]:
                parts = {key: read_rows(extents[f"{item.name}.{key}"]) for key in _ARRAYS}
                values[item.name] = Statistics(row["count"], parts["mean_abs"], parts["max_abs"], parts["hessian"])
        return tuple(inputs), values

    @contextmanager
    def recording(self, model: str, text: str) -> Iterator[None]:
        """A context in which `write` adds blocks; the file gets its name only if the context ends well."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            with partial.open("wb") as file:
                self._file = file
                file.seek(8 + _HEADER_ROOM)
                yield
                metadata = {
                    "kind": _KIND,
                    "model": model,
                    "text": text,
                    "prefix": _PREFIX,
                    "blocks": json.dumps(self._blocks),
                }
                header, _, _ = layout(self._pieces, metadata)
                padded = header[8:].ljust(_HEADER_ROOM)
                if len(padded) > _HEADER_ROOM:
                    raise InputError(f"{self.path}: too many inputs for one statistics file")
                file.seek(0)
                file.write(_HEADER_ROOM.to_bytes(8, "little") + padded)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.path)
        finally:
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
                    self._file.write(tensor_bytes(array))
        self._blocks[block] = rows

    @cached_property
    def _stored(self) -> tuple[dict[str, Any], dict[str, str]]:
        return read_header(self.path)

    @cached_property
    def _known(self) -> dict[str, Any]:
        known: dict[str, Any] = json.loads(self._stored[1]["blocks"])
        return known
