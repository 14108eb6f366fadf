"""The work of a run: every tensor of a plan read, checked, cast or coded, and put where the plan wants it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from quantize.ranks import ALONE, Dealer, Ranks
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
# Tensors that each of several ranks makes between two commits, on average: enough that their sizes even out.
_ROUND = 8


@dataclass(frozen=True)
class Work:
    """What is to be done, and where it goes.

    Attributes:
        plan: The plan.
        checkpoint: The model under the plan's names.
        output: Where the arrays go.
        allow_nan: Whether NaN and Inf in weights are let through.
        progress: Told how far it is.
        ranks: Those that do it together: they deal the tensors, and runs of rows where those are large.
    """

    plan: Plan
    checkpoint: Checkpoint
    output: OutputFolder
    allow_nan: bool
    progress: Progress
    ranks: Ranks = ALONE

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
        dealer = self.ranks.dealer()
        zeroed: dict[str, int] = {}
        for index, entry in enumerate(todo, 1):
            if not entry.quantized:
                for run in _dealt(entry, _COPY // 4, dealer):
                    self._put_plain(entry, run, zeroed)
            elif self.plan.format.single_file:
                for run in _dealt(entry, _COPY, dealer):
                    self._put_run(entry, run, self._packed(entry, *run))
            elif dealer.mine(entry.count):
                self.output.put(self._packed(entry, 0, None))
            if index % 32 == 0 or index == len(todo) or entry.count > _COPY:
                self._commit_copies(zeroed)
            self.progress("copying", index, len(todo))

    def _put_run(self, entry: Entry, run: tuple[int, int], *parts: Mapping[str, Tensor]) -> None:
        """Writes rows of a tensor in whose arrays rows lie one after the other."""
        for piece in self.plan.format.pieces(entry.name, entry.shape, entry.scheme):
            start = piece.nbytes * run[0] // max(1, _length(entry))
            self.output.put_parts(piece.name, [part[piece.name] for part in parts], start)

    def _commit_copies(self, zeroed: dict[str, int]) -> None:
        """Makes what was copied durable, with what all ranks have to say of it."""
        total: dict[str, int] = {}
        for counts in self.ranks.gather(zeroed):
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
        for name, count in total.items():
            if note := zeroed_note(self.entries[name], count):
                self.output.record(name, {"notes": [note], "errors": {}})
        zeroed.clear()
        self.output.commit()

    def _put_plain(self, entry: Entry, run: tuple[int, int], zeroed: dict[str, int]) -> None:
        (piece,) = self.plan.format.pieces(entry.name, entry.shape, entry.scheme)
        self._put_run(entry, run, {piece.name: self._plain(entry, run, zeroed)})

    def _plain(self, entry: Entry, run: tuple[int, int], zeroed: dict[str, int]) -> Tensor:
        """Returns rows of a plain tensor in its output dtype, and counts what becomes 0 by the cast."""
        part = self.checkpoint.read(entry.name, *run)
        self.scan({entry.name: part}, run[0])
        cast = self.cast(entry, part)
        zeroed[entry.name] = zeroed.get(entry.name, 0) + count_zeroed(part, cast)
        return cast

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
        todo = [e for e in self.plan.quantized if not e.copied and not self.written([e])]
        dealer = self.ranks.dealer()
        fresh = 0
        sums: dict[str, dict[int, tuple[float, float]]] = {}
        for index, entry in enumerate(todo, 1):
            mine = _dealt(entry, _RUN, dealer)
            sums[entry.name] = {}
            work = partial(self._coded_run, entry, importance.get(entry.name))
            for run, (packed, lost, whole) in zip(mine, pool.map(work, mine), strict=True):
                self._put_run(entry, run, *packed)
                sums[entry.name][run[0]] = lost, whole
            fresh += sum(p.nbytes for p in self.plan.format.pieces(entry.name, entry.shape, entry.scheme))
            if fresh > _COMMIT * self.ranks.count or index == len(todo):
                self._commit_codes(sums)
                fresh = 0
            self.progress("quantizing", index, len(todo))

    def _commit_codes(self, sums: dict[str, dict[int, tuple[float, float]]]) -> None:
        """Makes what was coded durable, with the errors; each run's sums are added in the order of the rows."""
        gathered = self.ranks.gather(sums)
        for name in sums:
            lost = whole = 0.0
            for _, run in sorted(pair for part in gathered for pair in part[name].items()):
                lost, whole = lost + run[0], whole + run[1]
            self.output.record(name, {"notes": [], "errors": {name: lost / max(whole, 1e-30)}})
        sums.clear()
        self.output.commit()

    def _coded_run(
        self, entry: Entry, importance: Tensor | None, rows: tuple[int, int]
    ) -> tuple[list[dict[str, Tensor]], float, float]:
        """Returns packed rows, the squared error that rounding made, and the sum of their squares."""
        value = self.checkpoint.read(entry.name, *rows)
        self.scan({entry.name: value}, rows[0])
        matrices = list(value) if value.dim() > _MATRIX else [value]
        packed: list[dict[str, Tensor]] = []
        lost = whole = 0.0
        for index, matrix in enumerate(matrices):
            weight = importance if importance is None or importance.dim() == 1 else importance[rows[0] + index]
            for start, stop in spans(len(matrix), max(1, _RUN // matrix.shape[-1])):
                part = matrix[start:stop].float()
                coded = entry.scheme.encode(part, weight)
                packed.append(self.plan.format.pack(entry.name, coded))
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

    # -- blocks ----------------------------------------------------------------------------------------------------

    def block(self, name: str, weights: Mapping[str, Tensor]) -> Block:
        """Returns the block made of these stored tensors; those on disk already are left out of its schemes."""
        entries = {e.name: e for e in map(self.entries.get, weights) if e is not None}
        dtypes = {n: e.scheme.dtype if isinstance(e.scheme, Plain) else torch.float32 for n, e in entries.items()}
        return Block(name, weights, dtypes, {n: e.scheme for n, e in entries.items() if e.quantized})

    def store(self, block: Block, result: Result) -> None:
        """Writes all tensors of one block, which all ranks hold, durably together with the block's record."""
        entries = [e for e in map(self.entries.get, block.weights) if e is not None]
        said: dict[str, float | str | None] = {}
        for entry in self.ranks.share(entries, lambda entry: entry.count):
            said[entry.name] = self._store_one(block, result, entry)
        heard = {name: value for part in self.ranks.gather(said) for name, value in part.items()}
        self._record(block.name, result.notes, {entry.name: heard[entry.name] for entry in entries})
        self.output.commit()

    def make_each(self, entries: Sequence[Entry], make: Callable[[Block], Result]) -> None:
        """Makes and writes tensors that need no statistics, each on its own."""
        done = 0
        for some in self.ranks.rounds(entries, _ROUND):
            said: dict[str, tuple[tuple[str, ...], float | str | None]] = {}
            for entry in self.ranks.share(some, lambda entry: entry.count):
                block = self.block(entry.name, {entry.name: self.read(entry.name)})
                result = make(block)
                said[entry.name] = result.notes, self._store_one(block, result, entry)
                del block, result  # they would wait in memory while the next ones are read
            heard = {name: value for part in self.ranks.gather(said) for name, value in part.items()}
            for entry in some:
                notes, value = heard[entry.name]
                self._record(entry.name, notes, {entry.name: value})
            self.output.commit()
            done += len(some)
            self.progress("quantizing", done, len(entries))

    def _store_one(self, block: Block, result: Result, entry: Entry) -> float | str | None:
        """Writes one tensor of a block; returns the error of rounding, or what there is to say of a plain one."""
        if entry.quantized:
            self.output.put(self.plan.format.pack(entry.name, result.coded[entry.name]))
            lost, whole = squared_error(block, result, entry.name)
            return lost / max(whole, 1e-30)
        value = result.changed.get(entry.name, block.weights[entry.name])
        cast = self.cast(entry, value)
        (piece,) = self.plan.format.pieces(entry.name, entry.shape, entry.scheme)
        self.output.put({piece.name: cast})
        return zeroed_note(entry, count_zeroed(value, cast))

    def _record(self, name: str, notes: Sequence[str], said: Mapping[str, float | str | None]) -> None:
        """Keeps what there is to say of a block."""
        zeroed = [value for value in said.values() if isinstance(value, str)]
        errors = {tensor: value for tensor, value in said.items() if isinstance(value, float)}
        self.output.record(name, {"notes": [*notes, *zeroed], "errors": errors})

    def records(self) -> dict[str, dict[str, Any]]:
        """Returns what was said of each part, in a fixed order."""
        return dict(sorted(self.output.records.items()))


def _length(entry: Entry) -> int:
    return entry.shape[0] if entry.shape else 1


def _runs(entry: Entry, weights: int) -> list[tuple[int, int]]:
    """Returns runs of the first dimension of about so many weights; one, if empty, where there is none."""
    length = _length(entry)
    return spans(length, max(1, weights // max(1, entry.count // max(1, length)))) or [(0, 0)]


def _dealt(entry: Entry, weights: int, dealer: Dealer) -> list[tuple[int, int]]:
    """Returns those runs that this rank gets."""
    row = entry.count / max(1, _length(entry))
    return [run for run in _runs(entry, weights) if dealer.mine(1 + row * (run[1] - run[0]))]


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
