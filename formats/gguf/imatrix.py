"""Importance matrices as llama.cpp stores them: the mean square of what each column of a weight is multiplied with.

Two formats, told apart by their first bytes. The GGUF one holds for each weight `NAME.in_sum2` float32 {columns,
matrices}, sums of squares, and `NAME.counts` float32 {1, matrices}, tokens, with the keys `imatrix.datasets`,
`imatrix.chunk_count` and `imatrix.chunk_size`. The older one (`.dat`), little-endian:

    i32 entries
    per entry: i32 length, name, i32 calls, i32 n, f32[n] mean square times calls
    i32 chunks, i32 length, name of the text     (may be missing)

It knows neither tokens nor matrices: writing it loses the counts of single experts.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantize.errors import InputError, system_errors
from quantize.formats.gguf.metadata import Value, text, texts, u32

_SUMS, _COUNTS = ".in_sum2", ".counts"
_ALIGNMENT = 32
_LONGEST_NAME = 63
_F32 = 0
_DEFAULT_CHUNK = 512
_RUN = 16
_LEAST = np.float32(1e-6)

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """What is known of the input of one weight, a matrix or a stack of them.

    Attributes:
        sums: Sums of squares over tokens, float32 [matrices, columns].
        counts: Tokens that each matrix saw, float32 [matrices]; from an older file, calls.
    """

    sums: Floats
    counts: Floats

    def means(self) -> Floats:
        """Returns mean squares, float32 [matrices, columns], fit to weigh errors with.

        A matrix that no token reached gets ones. Each run of 16 columns (counted from the row's start) whose means
        are all zero, the smallest unit that has a scale of its own in any type, gets the smallest mean of its row:
        with nothing but zeros to weigh them, some searches round all its weights to zero.
        """
        seen = self.counts > 0
        means = np.ones_like(self.sums)
        np.divide(self.sums, self.counts[:, None], out=means, where=seen[:, None])
        runs = -(-means.shape[1] // _RUN)
        padded = np.zeros((len(means), runs * _RUN), np.float32)
        padded[:, : means.shape[1]] = means
        silent = np.repeat(~padded.reshape(len(means), runs, _RUN).any(-1), _RUN, axis=1)[:, : means.shape[1]]
        if silent.any():
            least = np.min(means, axis=1, where=means > 0, initial=np.inf)
            least = np.maximum(least, _LEAST * means.mean(axis=1))  # products with it must not vanish
            means = np.where(silent, np.where(np.isinf(least), np.float32(1), least)[:, None], means)
        return means

    def shaped(self, matrices: int, columns: int) -> Importance | None:
        """Returns the same for a stack of `matrices` with rows of `columns`; None if the sizes do not agree.

        One count for a whole stack, as older files have it, then stands for every matrix.
        """
        if self.sums.size != matrices * columns or len(self.counts) not in (1, matrices):
            return None
        counts = np.ascontiguousarray(np.broadcast_to(self.counts, (matrices,)))
        return Importance(self.sums.reshape(matrices, columns), counts)


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Importance of a model's weights.

    Attributes:
        entries: By name of the weight, with its `.weight`.
        datasets: The texts that it was made with.
        chunk_count: How many pieces of text.
        chunk_size: Tokens of a piece; 0 where counts are pieces and not tokens, as in an older file.
    """

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Returns the importance matrix in a file of either format.

    Raises:
        InputError: the file is missing, neither of them, truncated, or holds NaN, infinite or negative values.
    """
    with system_errors(path, "give a file that llama-imatrix or 'quantize imatrix' wrote"):
        with path.open("rb") as stream:
            start = stream.read(4)
        matrix = _read_gguf(path) if start == b"GGUF" else _read_older(path, path.read_bytes())
    for name, entry in matrix.entries.items():
        _require_sound(path, name, "sums of squares", entry.sums)
        _require_sound(path, name, "counts", entry.counts)
    return matrix


def _require_sound(path: Path, name: str, what: str, values: Floats) -> None:
    wrong = ~np.isfinite(values) | (values < 0)
    if wrong.any():
        matrix = f" of matrix {np.nonzero(wrong)[0][0]}" if values.ndim > 1 and len(values) > 1 else ""
        raise InputError(
            f"{path}: '{name}' has {int(wrong.sum())} of {wrong.size} {what}{matrix} NaN, infinite or negative",
            "make the importance matrix again; the model may overflow in 16-bit floats",
        )


def _read_gguf(path: Path) -> ImportanceMatrix:
    from quantize.formats.gguf.container import read_part

    part = read_part(path)
    kind = part.metadata.get("general.type")
    halves: dict[str, dict[str, Floats]] = {}
    for stored_name, stored in part.tensors.items():
        name, suffix = next(
            ((stored_name.removesuffix(s), s) for s in (_SUMS, _COUNTS) if stored_name.endswith(s)), (stored_name, "")
        )
        if not suffix or str(stored.scheme) != "f32":
            what = f"tensor '{stored_name}' is none of an importance matrix"
            raise InputError(f"{path}: {what}", "this is a model" if kind != "imatrix" else "make it again")
        halves.setdefault(name, {})[suffix] = stored.read().reshape(-1).numpy()
    if not halves:
        raise InputError(f"{path}: an importance matrix without entries", "give llama-imatrix more text")
    entries: dict[str, Importance] = {}
    for name, half in sorted(halves.items()):
        sums, counts = half.get(_SUMS), half.get(_COUNTS)
        if sums is None or counts is None or sums.size % counts.size:
            raise InputError(f"{path}: sums and counts of '{name}' do not belong together", "make it again")
        entries[name] = Importance(sums.reshape(counts.size, -1), counts)
    datasets = part.metadata.get("imatrix.datasets", [])
    return ImportanceMatrix(
        entries,
        tuple(str(name) for name in datasets) if isinstance(datasets, list) else (),
        _number(part.metadata.get("imatrix.chunk_count")),
        _number(part.metadata.get("imatrix.chunk_size")) or _DEFAULT_CHUNK,
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


class _Older:
    """Walks an older file; every length in it is checked against what is left."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            what = "truncated, or no importance matrix"
            raise InputError(f"{self._path}: {what}", "give a file that llama-imatrix wrote")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    def text(self) -> str:
        return self.take(self.number()).decode(errors="replace")


def _read_older(path: Path, data: bytes) -> ImportanceMatrix:
    walk = _Older(path, data)
    entries: dict[str, Importance] = {}
    for _ in range(max(1, walk.number())):
        name, calls, count = walk.text(), walk.number(), walk.number()
        values = np.frombuffer(walk.take(4 * max(1, count)), "<f4").astype(np.float32)
        entries[name] = Importance(values[None], np.array([max(1, calls)], np.float32))
    chunks = walk.number() if walk.left >= 4 else 0
    datasets = (name,) if walk.left >= 4 and (name := walk.text()) else ()
    return ImportanceMatrix(dict(sorted(entries.items())), datasets, max(0, chunks), 0)


def write_imatrix(path: Path, matrix: ImportanceMatrix, legacy: bool = False) -> None:
    """Writes an importance matrix; the file appears complete or not at all, and replaces an older one.

    Args:
        path: The file.
        matrix: What to write.
        legacy: Whether in the older format, which loses how often each expert was used.

    Raises:
        InputError: nothing to write, or a name too long for llama.cpp.
        ResourceError: the disk is full.
    """
    entries = {name: entry for name, entry in sorted(matrix.entries.items()) if not legacy or entry.counts.any()}
    if not entries:
        raise InputError(f"{path}: no importance to write: no token reached a weight", "give more text")
    parts = _older(matrix, entries) if legacy else _gguf(path, matrix, entries)
    partial = path.with_name(f"{path.name}.partial")
    with system_errors(path, "choose another file"):
        try:
            with partial.open("wb") as stream:
                stream.writelines(parts)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _gguf(path: Path, matrix: ImportanceMatrix, entries: Mapping[str, Importance]) -> Iterable[bytes]:
    """Returns the file's bytes, those that llama-imatrix would write."""
    keys: dict[str, Value] = {
        "general.type": text("imatrix"),
        "imatrix.datasets": texts(matrix.datasets),
        "imatrix.chunk_count": u32(matrix.chunk_count),
        "imatrix.chunk_size": u32(matrix.chunk_size or _DEFAULT_CHUNK),
    }
    arrays: list[tuple[str, Floats]] = []
    for name, entry in entries.items():
        scale = np.float32(1 if matrix.chunk_size else _DEFAULT_CHUNK)
        arrays += [(name + _SUMS, entry.sums * scale), (name + _COUNTS, entry.counts[:, None] * scale)]
    infos, offset = b"", 0
    for name, array in arrays:
        if len(name.encode()) > _LONGEST_NAME:
            raise InputError(f"{path}: '{name}' has {len(name.encode())} bytes, llama.cpp reads {_LONGEST_NAME}")
        shape = [array.shape[1], *array.shape[:1]] if array.shape[0] > 1 else [array.shape[1]]
        infos += _text(name) + struct.pack(f"<I{len(shape)}qiQ", len(shape), *shape, _F32, offset)
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(arrays), len(keys))
    head += b"".join(_text(key) + value.encode() for key, value in keys.items()) + infos
    yield head + bytes(-len(head) % _ALIGNMENT)
    for _, array in arrays:
        yield np.ascontiguousarray(array, "<f4").tobytes() + bytes(-array.nbytes % _ALIGNMENT)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _older(matrix: ImportanceMatrix, entries: Mapping[str, Importance]) -> Iterable[bytes]:
    yield struct.pack("<i", len(entries))
    chunk = matrix.chunk_size or 1
    for name, entry in entries.items():
        calls = -(-int(entry.counts.max()) // chunk)
        seen = entry.counts[:, None] > 0
        means = np.divide(entry.sums, entry.counts[:, None], out=np.ones_like(entry.sums), where=seen)
        encoded = name.encode()
        yield struct.pack(f"<i{len(encoded)}sii", len(encoded), encoded, calls, means.size)
        yield (means * np.float32(calls)).astype("<f4").tobytes()
    dataset = matrix.datasets[-1].encode() if matrix.datasets else b""
    yield struct.pack(f"<ii{len(dataset)}s", matrix.chunk_count, len(dataset), dataset)
