"""The work of a run: every tensor of a plan read, checked, cast or coded, and put where the plan wants it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from quantize.checkpoint import refuse_nan, tensor_name
from quantize.errors import InputError
from quantize.formats.base import Checkpoint
from quantize.methods.base import ROWS, Block, Result
from quantize.parallel import Pool, spans
from quantize.planning import Entry, Plan
from quantize.progress import Progress
from quantize.schemes import Plain, QuantizedTensor
from quantize.writer import OutputFolder

# Bytes of a plain tensor copied at a time.
_COPY = 16 * 2**20
# Weights coded at a time by one worker.
_RUN = 2**20
_MATRIX = 2
# The largest half-precision float.
_HALF = 65504.0
# Bytes written between two commits, each of which waits for the disk.
_COMMIT = 64 * 2**20


@dataclass(frozen=True)
class Work:
    """What is to be done, and where it goes.

    Attributes:
        plan: The plan.
        checkpoint: The model under the plan's names.
        output: Where the arrays go.
        allow_nan: Whether NaN and Inf in weights are let through.
        progress: Told how far it is.
    """

    plan: Plan
    checkpoint: Checkpoint
    output: OutputFolder
    allow_nan: bool
    progress: Progress

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """The plan's entries by name."""
        return {entry.name: entry for entry in self.plan.entries}

    def written(self, entries: Sequence[Entry]) -> bool:
        """Returns whether all arrays of these entries are on disk already."""
        pieces = self.plan.format.pieces
        return all(p.name in self.output.done for e in entries for p in pieces(e.name, e.shape, e.scheme))

    def read(self, name: str) -> Tensor:
        """Returns a whole tensor, float32 where floating, checked."""
        value = self.checkpoint.read(name)
        value = value.float() if value.is_floating_point() else value
        self.scan({name: value})
        return value

    def scan(self, weights: Mapping[str, Tensor], start: int = 0) -> None:
        """Refuses NaN and Inf in the source, unless they are let through; the first row is `start`."""
        if not self.allow_nan:
            refuse_nan(self.checkpoint, weights, start)

    # -- plain tensors ---------------------------------------------------------------------------------------------

    def copy(self, left_out: frozenset[str] = frozenset()) -> None:
        """Writes every tensor that stays as it is or is only cast, a run of rows at a time.

        Args:
            left_out: Plain tensors that a method will write itself.
        """
        chosen = [e for e in self.plan.entries if e.name not in left_out and (e.copied or not e.quantized)]
        todo = [e for e in chosen if not self.written([e])]
        for index, entry in enumerate(todo, 1):
            zeroed: list[int] = []
            if entry.quantized:
                self._copy_codes(entry)
            else:
                self.output.put_parts(entry.name, self._plain_parts(entry, zeroed))
            if note := zeroed_note(entry, sum(zeroed)):
                self.output.record(entry.name, {"notes": [note], "errors": {}})
            if index % 32 == 0 or index == len(todo) or entry.count > _COPY:
                self.output.commit()
            self.progress("copying", index, len(todo))

    def _plain_parts(self, entry: Entry, zeroed: list[int]) -> Iterator[Tensor]:
        """Yields a plain tensor in its output dtype, a run of rows at a time, and counts what becomes 0 by the cast."""
        for start, stop in _runs(entry, _COPY // 4):
            part = self.checkpoint.read(entry.name, start, stop)
            self.scan({entry.name: part}, start)
            cast = self.cast(entry, part)
            zeroed.append(count_zeroed(part, cast))
            yield cast

    def _copy_codes(self, entry: Entry) -> None:
        """Writes the codes of a tensor whose grid stays: nothing is rounded a second time."""
        if self.plan.format.single_file:
            self.output.put_parts(entry.name, (self._packed(entry, *run)[entry.name] for run in _runs(entry, _COPY)))
        else:
            self.output.put(self._packed(entry, 0, None))

    def _packed(self, entry: Entry, start: int, stop: int | None) -> dict[str, Tensor]:
        coded = self.checkpoint.read_coded(entry.name, start, stop)
        assert coded is not None
        return self.plan.format.pack(entry.name, coded)

    def cast(self, entry: Entry, value: Tensor) -> Tensor:
        """Returns a plain value in its output dtype.

        Raises:
            InputError: a finite value would become Inf.
        """
        assert isinstance(entry.scheme, Plain)
        if value.dtype == entry.scheme.dtype:
            return value
        value = value.float() if value.dtype.itemsize == 1 else value  # torch cannot compare 8-bit floats
        result = value.to(entry.scheme.dtype)
        if result.is_floating_point() and bool((lost := result.isinf() & value.isfinite()).any()):
            what = f"has {int(lost.sum())} values beyond {entry.scheme}, up to {float(value.abs().max()):g}"
            raise InputError(
                f"{tensor_name(self.checkpoint, entry.name)} {what}",
                f"give it a wider type: --set '{entry.name}=bf16', or take bf16 for all",
            )
        return result

    # -- tensors coded a run of rows at a time ---------------------------------------------------------------------

    def encode(self, pool: Pool, importance: Mapping[str, Tensor]) -> None:
        """Rounds every tensor that gets a grid, for formats in which rows lie one after the other.

        Args:
            pool: Where rows are coded.
            importance: Mean square of each input column by tensor, float32 `[cols]` or `[experts, cols]`.
        """
        todo = [e for e in self.plan.quantized if not e.copied and e.name not in self.output.done]
        fresh = 0
        for index, entry in enumerate(todo, 1):
            sums = [0.0, 0.0]
            work = partial(self._coded_run, entry, importance.get(entry.name))
            self.output.put_parts(entry.name, self._adding(pool.map(work, _runs(entry, _RUN)), sums))
            self.output.record(entry.name, {"notes": [], "errors": {entry.name: sums[0] / max(sums[1], 1e-30)}})
            fresh += sum(p.nbytes for p in self.plan.format.pieces(entry.name, entry.shape, entry.scheme))
            if fresh > _COMMIT or index == len(todo):
                self.output.commit()
                fresh = 0
            self.progress("quantizing", index, len(todo))

    def _coded_run(
        self, entry: Entry, importance: Tensor | None, rows: tuple[int, int]
    ) -> tuple[list[Tensor], float, float]:
        """Returns packed rows, the squared error that rounding made, and the sum of their squares."""
        value = self.checkpoint.read(entry.name, *rows)
        self.scan({entry.name: value}, rows[0])
        matrices = list(value) if value.dim() > _MATRIX else [value]
        packed: list[Tensor] = []
        lost = whole = 0.0
        for index, matrix in enumerate(matrices):
            weight = importance if importance is None or importance.dim() == 1 else importance[rows[0] + index]
            for start, stop in spans(len(matrix), max(1, _RUN // matrix.shape[-1])):
                part = matrix[start:stop].float()
                coded = entry.scheme.encode(part, weight)
                packed.append(self.plan.format.pack(entry.name, coded)[entry.name])
                error, power = float((coded.dequantize() - part).square_().sum()), float(part.square().sum())
                if not error < power / 4:
                    self._refuse_clamped(entry, part, coded)
                lost, whole = lost + error, whole + power
        return packed, lost, whole

    def _refuse_clamped(self, entry: Entry, part: Tensor, coded: QuantizedTensor) -> None:
        """Refuses weights that a block cannot reach, whose scale is a half-precision float; encoders clamp them.

        Raises:
            InputError: naming file and tensor.
        """
        largest, reached = (float(max(-low, high)) for low, high in (part.aminmax(), coded.dequantize().aminmax()))
        if _HALF < largest < math.inf and not reached > largest / 2:
            what = f"has weights up to {largest:g}, too large for {entry.scheme}"
            raise InputError(
                f"{tensor_name(self.checkpoint, entry.name)} {what}",
                f"give it a wider type: --set '{entry.name}=bf16'",
            )

    @staticmethod
    def _adding(runs: Iterator[tuple[list[Tensor], float, float]], sums: list[float]) -> Iterator[Tensor]:
        for packed, lost, whole in runs:
            sums[0] += lost
            sums[1] += whole
            yield from packed

    # -- blocks ----------------------------------------------------------------------------------------------------

    def block(self, name: str, weights: Mapping[str, Tensor]) -> Block:
        """Returns the block made of these stored tensors; those on disk already are left out of its schemes."""
        entries = {e.name: e for e in map(self.entries.get, weights) if e is not None}
        dtypes = {n: e.scheme.dtype if isinstance(e.scheme, Plain) else torch.float32 for n, e in entries.items()}
        return Block(name, weights, dtypes, {n: e.scheme for n, e in entries.items() if e.quantized})

    def store(self, block: Block, result: Result) -> None:
        """Writes all tensors of one block and makes them durable together with the block's record."""
        by_name = {e.name: e for e in map(self.entries.get, block.weights) if e is not None}
        errors: dict[str, float] = {}
        notes = list(result.notes)
        for name, entry in by_name.items():
            if entry.quantized:
                coded = result.coded[name]
                self.output.put(self.plan.format.pack(name, coded))
                lost, whole = squared_error(block, result, name)
                errors[name] = lost / max(whole, 1e-30)
            else:
                value = result.changed.get(name, block.weights[name])
                cast = self.cast(entry, value)
                self.output.put({name: cast})
                if note := zeroed_note(entry, count_zeroed(value, cast)):
                    notes.append(note)
        self.output.record(block.name, {"notes": notes, "errors": errors})
        self.output.commit()

    def records(self) -> dict[str, dict[str, Any]]:
        """Returns what was said of each part, in a fixed order."""
        return dict(sorted(self.output.records.items()))


def _runs(entry: Entry, weights: int) -> list[tuple[int, int]]:
    """Returns runs of the first dimension of about so many weights."""
    length = entry.shape[0] if entry.shape else 1
    return spans(length, max(1, weights // max(1, entry.count // max(1, length))))


def squared_error(block: Block, result: Result, name: str) -> tuple[float, float]:
    """Returns |Q - W|^2 and |W|^2 of a tensor, W being what was rounded: the weight after folds."""
    weight, coded = result.targets.get(name, block.weights[name]), result.coded[name]
    lost = whole = 0.0
    for start, stop in spans(len(weight), ROWS):
        part = weight[start:stop]
        lost += float((coded.rows(start, stop).dequantize() - part).square_().sum())
        whole += float(part.square().sum())
    return lost, whole


def count_zeroed(before: Tensor, after: Tensor) -> int:
    """Returns how many values a cast made zero."""
    if before.dtype == after.dtype or not before.is_floating_point():
        return 0
    before = before.float() if before.dtype.itemsize == 1 else before
    return int(torch.count_nonzero((after == 0) & (before != 0)))  # a sum would make them int64 first


def zeroed_note(entry: Entry, count: int) -> str | None:
    """Returns what the report says of values that a cast made zero, or None."""
    return f"{entry.name}: {count} values too small for {entry.scheme} became 0" if count else None
