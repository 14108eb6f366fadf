"""Several workers that make one output together, and what a process is on its own: a group of one.

`torchrun --nproc-per-node N -m quantize run ...` starts N of them, on one machine or on several that share the disk.
The exchanges of a group of one do nothing, so that nobody asks whether there are others.

All members call the same functions of the group in the same order, and hold equal values afterwards. Every exchange
begins with a word on whether all are well. A member that fails says so at the exchange that the others come to next,
and all of them end with its error; one that is killed breaks the connection, which ends the others as well.
"""

from __future__ import annotations

import io
import os
import pickle
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantize import errors
from quantize.errors import QuantizeError, ResourceError, UsageError, resource_error
from quantize.parallel import Pool, default_threads, spans

T = TypeVar("T")
R = TypeVar("R")

# How long a member waits for the slowest: the others may be at one block of a large model, or at its evaluation.
_PATIENCE = timedelta(days=2)
# Rows of a chunk below which sending it costs more than it saves.
_FEWEST_ROWS = 32
# Pieces that a worker computes between two exchanges, for each of its threads.
_AHEAD = 2


class Dealer:
    """Deals work: each piece goes to the member that has the least so far, the first of them where several have.

    Args:
        index: Which member this is.
        count: How many there are.
    """

    def __init__(self, index: int, count: int) -> None:
        self._index = index
        self._loads = [0.0] * count

    def mine(self, weight: float) -> bool:
        """Returns whether this member gets the next piece, which takes about `weight`."""
        taker = self._loads.index(min(self._loads))
        self._loads[taker] += weight
        return taker == self._index


class Ranks:
    """A process on its own.

    Attributes:
        index: Which member of the group this is, from 0.
        count: How many there are.
        threads: Threads for each of them where nobody said how many.
    """

    index = 0
    count = 1

    @property
    def threads(self) -> int:
        """The processors that this process may use."""
        return default_threads()

    @property
    def first(self) -> bool:
        """Whether this is the member that speaks, and that owns what there is only one of."""
        return self.index == 0

    def gather(self, value: T) -> list[T]:
        """Returns the values of all members, by index."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """Returns what the first member makes; the others wait for it."""
        return make()

    def agree(self) -> None:
        """Waits until all members are here."""

    def mean_(self, tensor: Tensor, share: float) -> None:
        """Replaces a tensor by the sum of all members', each times its `share`; in one order, equal bits for all."""

    def largest_(self, tensor: Tensor) -> None:
        """Replaces a tensor by the largest of all members', element by element."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context that all members leave alike: an error of one ends the others with that error."""
        yield

    def spread(self, pool: Pool) -> Pool:
        """Returns a pool whose work is done on the pools of all members; its results are there for all."""
        return pool

    def dealer(self) -> Dealer:
        """Returns a dealer; the same calls in the same order give every member its part."""
        return Dealer(self.index, self.count)

    def share(self, items: Iterable[T], weight: Callable[[T], float]) -> list[T]:
        """Returns the items that this member gets: the heaviest are dealt first."""
        items = list(items)
        order = sorted(range(len(items)), key=lambda number: -weight(items[number]))
        dealer = self.dealer()
        mine = {number for number in order if dealer.mine(weight(items[number]))}
        return [item for number, item in enumerate(items) if number in mine]

    def rounds(self, items: Sequence[T], each: int) -> Iterator[Sequence[T]]:
        """Yields runs of items between which all meet: one by one for a process on its own, else `each` per member."""
        step = 1 if self.count == 1 else each * self.count
        for start, stop in spans(len(items), step):
            yield items[start:stop]


ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way to the other members."""

    kind: str
    message: str
    hint: str
    trace: str

    @staticmethod
    def of(error: Exception) -> _Failure:
        known = error if isinstance(error, QuantizeError) else resource_error(error)
        trace = "".join(traceback.format_exception(error))
        if known is not None:
            return _Failure(type(known).__name__, known.message, known.hint, trace)
        return _Failure("", f"{type(error).__name__}: {error}", "", trace)

    def error(self, index: int) -> Exception:
        """Returns the error for the others; one that is no fault of the user's keeps where it came from."""
        kind = getattr(errors, self.kind, None) if self.kind else None
        if isinstance(kind, type) and issubclass(kind, QuantizeError):
            return kind(self.message, self.hint)
        unknown = RuntimeError(f"worker {index}: {self.message}")
        unknown.add_note(self.trace)
        return unknown


class _Group(Ranks):
    """A process among others, connected by torch.distributed."""

    def __init__(self, index: int, count: int, neighbours: int) -> None:
        self.index = index
        self.count = count
        self.told = False
        self._neighbours = neighbours
        self._depth = 0
        self._broken = False

    @property
    def threads(self) -> int:
        """An even part of the processors."""
        return max(1, default_threads() // self._neighbours)

    def gather(self, value: T) -> list[T]:
        """Returns the values of all members; tensors keep their bits."""
        return [_loads(data) for data in self._exchange("gather", _dumps(value))]

    def from_first(self, make: Callable[[], T]) -> T:
        """Returns what the first member makes."""
        data = self._exchange("from first", _dumps(make()) if self.first else b"")[0]
        value: T = _loads(data)
        return value

    def agree(self) -> None:
        """Waits for all."""
        self._exchange("agree", b"")

    def mean_(self, tensor: Tensor, share: float) -> None:
        """Sums over the members in the order that gloo has for this size, the same in every run."""
        self._exchange("mean", b"")
        self._distributed(lambda d: d.all_reduce(tensor.mul_(share)))

    def largest_(self, tensor: Tensor) -> None:
        """Takes the largest."""
        self._exchange("largest", b"")
        self._distributed(lambda d: d.all_reduce(tensor, op=d.ReduceOp.MAX))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tells the others of an error, once, and waits for them at the end of the outermost context."""
        if self._depth == 0:
            self.told = False
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self.agree()
        except Exception as error:
            if not (self.told or self._broken):
                self._tell(error)
            raise
        finally:
            self._depth -= 1

    def spread(self, pool: Pool) -> Pool:
        """Returns a pool over all members."""
        return SharedPool(pool, self, max(self.gather(pool.threads)))

    def _tell(self, error: Exception) -> None:
        """Takes part in the exchange that the others come to, with an error for a value."""
        self.told = True
        try:
            self._exchange("failed", _dumps(_Failure.of(error)), failed=True)
        except ResourceError:
            self.told = False  # nobody was there to hear it

    def _exchange(self, kind: str, payload: bytes, failed: bool = False) -> list[bytes]:
        """Returns the payloads of all members.

        Raises:
            QuantizeError: another member failed; the error is the one of the lowest index.
            ResourceError: another member has gone.
        """
        heads = self._all_gather(torch.tensor([failed, len(payload), zlib.crc32(kind.encode())]))
        sizes = [int(head[1]) for head in heads]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        if payload:
            padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        parts = self._all_gather(padded) if max(sizes) else [padded] * self.count
        payloads = [part[:size].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]
        if failed:
            return payloads
        for index, head in enumerate(heads):
            if head[0]:
                self.told = True
                failure: _Failure = _loads(payloads[index])
                raise failure.error(index)
        assert all(int(head[2]) == int(heads[0][2]) for head in heads), f"workers disagree at '{kind}'"
        return payloads

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        self._distributed(lambda d: d.all_gather(parts, tensor))
        return parts

    def _distributed(self, call: Callable[[Any], object]) -> None:
        import torch.distributed

        try:
            call(torch.distributed)
        except RuntimeError as error:
            self._broken = True
            raise ResourceError("another worker has ended", "its own message tells why") from error


class SharedPool(Pool):
    """A pool whose items are computed by all members, every one of which goes through the same items.

    Args:
        pool: Where this member computes its part.
        ranks: The group.
        threads: The most threads that a member has; each computes pieces for so many between two exchanges.
    """

    def __init__(self, pool: Pool, ranks: Ranks, threads: int = 1) -> None:
        self.threads = threads
        self._pool = pool
        self._ranks = ranks

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yields `function(item)` in order, some items of every member ahead of the consumer."""
        items = list(items)
        count = self._ranks.count
        if len(items) < count:  # nothing is gained: who has none would only wait
            yield from self._pool.map(function, items)
            return
        for start, stop in spans(len(items), count * self.threads * _AHEAD):
            mine = range(start + self._ranks.index, stop, count)
            made = self._ranks.gather(list(self._pool.map(function, (items[number] for number in mine))))
            for number in range(stop - start):
                yield made[number % count][number // count]

    def spans(self, total: int, size: int) -> list[tuple[int, int]]:
        """Returns chunks of at most `size`, as many for each member."""
        count = self._ranks.count
        chunks = -(-total // size)
        chunks += -chunks % count
        return spans(total, min(size, max(_FEWEST_ROWS, -(-total // max(1, chunks)))))


def workers() -> tuple[int, int]:
    """Returns which worker this is, and of how many, as torchrun says it; `(0, 1)` for a process on its own."""
    index, count = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if index is None or count is None or not index.isdecimal() or not count.isdecimal() or int(count) < 2:
        return 0, 1
    return int(index), int(count)


def ours() -> Ranks:
    """Returns the group of this process, and connects it the first time.

    Raises:
        UsageError: there are several workers, and this torch cannot connect them.
        ResourceError: they do not find each other.
    """
    index, count = workers()
    return ALONE if count == 1 else _connected(index, count)


def first_knows() -> bool:
    """Returns whether the first worker knows of the error that ended the last work of this one, and will say it."""
    index, count = workers()
    return index > 0 and bool(_connected.cache_info().currsize) and _connected(index, count).told


@cache
def _connected(index: int, count: int) -> _Group:
    import torch.distributed as distributed

    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise UsageError("several workers need a torch with torch.distributed and gloo", "run without torchrun")
    try:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(f"the {count} workers cannot be connected: {reason}", "start them with torchrun") from error
    neighbours = os.environ.get("LOCAL_WORLD_SIZE", "")
    return _Group(index, count, int(neighbours) if neighbours.isdecimal() else count)


class _Pickler(pickle.Pickler):
    """Pickles tensors by their values alone: of a view, torch would send all that it is a view of."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return _tensor, (value.dtype, tuple(value.shape), data)
        return NotImplemented


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], data: bytes) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


def _dumps(value: object) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def _loads(data: bytes) -> Any:
    return pickle.loads(data)
