"""Where the rounded tensors of a block go: under the names that they are stored by, or under a format's own.

A method works on the tensors of the source. A folder format keeps their names; GGUF has others, and moves rows: its
tensors are read from a checkpoint in which the source's tensors lie on their new grids already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import Checkpoint, CheckpointView, NamedView, TensorInfo
from quantize.methods.base import Block, Method, Result
from quantize.planning import Entry
from quantize.schemes import Plain, QuantizedTensor, Scheme
from quantize.work import Work, squared_error


class Placing(Protocol):
    """What becomes of the blocks of a calibrated run."""

    def names(self, stored: Sequence[str]) -> list[str]:
        """Returns those of a block's stored tensors that this run makes; none where nothing of it is quantized."""

    def written(self, stored: Sequence[str]) -> bool:
        """Returns whether everything made of these tensors is on disk already."""

    def block(self, name: str, weights: Mapping[str, Tensor]) -> Block:
        """Returns the block made of these stored tensors, with the schemes that they get."""

    def store(self, block: Block, result: Result) -> None:
        """Writes what a method made of a block, durably."""

    def stored(self, name: str, value: Tensor) -> Tensor:
        """Returns a plain tensor as it will read back, float32 where floating."""

    def read_back(self, stored: Sequence[str]) -> dict[str, Tensor]:
        """Returns the tensors that are on disk already, as they read back, float32 where floating."""


class SameNames:
    """Tensors keep their names.

    Args:
        work: The work of the run.
        reopen: Opens the unfinished output.
    """

    def __init__(self, work: Work, reopen: Callable[[], Checkpoint]) -> None:
        self._work = work
        self._reopen = reopen

    def names(self, stored: Sequence[str]) -> list[str]:
        """Returns all of them, or none."""
        return list(stored) if any(e.quantized for e in self._entries(stored)) else []

    def written(self, stored: Sequence[str]) -> bool:
        """Asks the journal."""
        return self._work.written(self._entries(stored))

    def block(self, name: str, weights: Mapping[str, Tensor]) -> Block:
        """Returns the block with the plan's schemes."""
        return self._work.block(name, weights)

    def store(self, block: Block, result: Result) -> None:
        """Writes all tensors of the block."""
        self._work.store(block, result)

    def stored(self, name: str, value: Tensor) -> Tensor:
        """Returns the value cast as the plan says; what is not floating, or not in the plan, as it is."""
        if name not in self._work.entries or not value.is_floating_point():
            return value
        return self._work.cast(self._work.entries[name], value).float()

    def read_back(self, stored: Sequence[str]) -> dict[str, Tensor]:
        """Reads the output."""
        values = {name: self._output.read(name) for name in stored if name in self._work.entries}
        return {name: value.float() if value.is_floating_point() else value for name, value in values.items()}

    @cached_property
    def _output(self) -> Checkpoint:
        return self._reopen()

    def _entries(self, stored: Sequence[str]) -> list[Entry]:
        return [self._work.entries[name] for name in stored if name in self._work.entries]


class _Rounded(CheckpointView):
    """A checkpoint of which some tensors lie on other grids: those that were put here, for as long as they are."""

    def __init__(self, base: Checkpoint, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(base)
        self.schemes = schemes
        self.coded: dict[str, QuantizedTensor] = {}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors; those to be rounded on their new grids."""
        return {
            name: TensorInfo(name, info.shape, self.schemes.get(name, info.scheme), info.nbytes)
            for name, info in self._base.tensors.items()
        }

    @property
    def dropped(self) -> Mapping[str, str]:
        """The base's."""
        return self._base.dropped

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows of a tensor, as they were rounded."""
        found = self.read_coded(name, start, stop) if name in self.coded else None
        return self._base.read(name, start, stop) if found is None else found.dequantize()

    def read_coded(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns rows of a rounded tensor."""
        found = self.coded.get(name)
        if found is None:
            return self._base.read_coded(name, start, stop)
        return found.rows(start, found.shape[0] if stop is None else stop)

    def file(self, name: str) -> Path:
        """Returns the base's."""
        return self._base.file(name)


class OwnNames:
    """The format has names of its own. Tensors whose grid a stored tensor can have are made here, the others not.

    Args:
        work: The work of the run; its checkpoint is the format's view.
        base: The source.
        make: Returns the format's view of a checkpoint.
        method: The method, which may have no use for some schemes.
        reopen: Opens the unfinished output.
    """

    def __init__(
        self,
        work: Work,
        base: Checkpoint,
        make: Callable[[Checkpoint], NamedView],
        method: Method,
        reopen: Callable[[], Checkpoint],
    ) -> None:
        self._work = work
        self._reopen = reopen
        self._made_of = _made_of(work, method)
        schemes = {n: work.entries[entry].scheme for entry, names in self._made_of.items() for n in names}
        self._rounded = _Rounded(base, schemes)
        self._make = make
        self._view = make(self._rounded)

    @property
    def entries(self) -> Collection[str]:
        """The tensors, by the format's names, that are made here."""
        return self._made_of.keys()

    def names(self, stored: Sequence[str]) -> list[str]:
        """Returns those that a tensor of the format is made of here."""
        return [name for name in stored if name in self._rounded.schemes]

    def written(self, stored: Sequence[str]) -> bool:
        """Asks the journal."""
        return all(entry in self._work.output.done for entry in self._entries(stored))

    def block(self, name: str, weights: Mapping[str, Tensor]) -> Block:
        """Returns the block; what is not made here has no scheme in it."""
        schemes = {n: self._rounded.schemes[n] for n in weights if n in self._rounded.schemes}
        return Block(name, weights, dict.fromkeys(weights, torch.float32), schemes)

    def store(self, block: Block, result: Result) -> None:
        """Writes the format's tensors that are made of the block's."""
        self._rounded.coded = dict(result.coded)
        errors: dict[str, float] = {}
        ranks, entries = self._work.ranks, self._entries(list(block.weights))
        for entry in ranks.share(entries, lambda entry: self._work.entries[entry].count):
            coded = self._view.read_coded(entry)
            assert coded is not None
            self._work.output.put(self._work.plan.format.pack(entry, coded))
            sums = [squared_error(block, result, name) for name in self._made_of[entry]]
            errors[entry] = sum(lost for lost, _ in sums) / max(sum(whole for _, whole in sums), 1e-30)
        self._rounded.coded = {}
        heard = {entry: error for part in ranks.gather(errors) for entry, error in part.items()}
        found = {entry: heard[entry] for entry in entries}
        self._work.output.record(block.name, {"notes": list(result.notes), "errors": found})
        self._work.output.commit()

    def stored(self, name: str, value: Tensor) -> Tensor:
        """Returns the value: methods that change plain tensors do not come here."""
        return value

    def read_back(self, stored: Sequence[str]) -> dict[str, Tensor]:
        """Reads the output, whose reader gives names of transformers again, if not always the source's."""
        return {name: self._output.read(self._named_again[name]).float() for name in self.names(stored)}

    @cached_property
    def _output(self) -> Checkpoint:
        return self._reopen()

    @cached_property
    def _named_again(self) -> dict[str, str]:
        again = self._make(self._output)
        pairs = {entry: (names, again.sources(entry)) for entry, names in self._made_of.items()}
        for entry, (ours, theirs) in pairs.items():
            if len(ours) != len(theirs):
                raise InputError(f"{self._work.output.path}: '{entry}' does not read back in its parts", "--restart")
        return {a: b for ours, theirs in pairs.values() for a, b in zip(ours, theirs, strict=True)}

    def _entries(self, stored: Sequence[str]) -> list[str]:
        here = set(stored)
        return [entry for entry, names in self._made_of.items() if here.issuperset(names)]


def _made_of(work: Work, method: Method) -> dict[str, tuple[str, ...]]:
    """Returns the stored tensors of each of the format's tensors that can be made of rounded ones: rows only move."""
    view = work.checkpoint
    sources: dict[str, tuple[str, ...]] = {}
    users: dict[str, set[Scheme]] = {}
    for entry in work.plan.quantized:
        names = view.sources(entry.name)  # type: ignore[attr-defined]
        for name in names:
            users.setdefault(name, set()).add(entry.scheme)
        plain = isinstance(entry.source, Plain) and view.same_columns(entry.name)  # type: ignore[attr-defined]
        if plain and names and method.reject(entry.scheme) is None:
            sources[entry.name] = names
    return {entry: names for entry, names in sources.items() if all(len(users[name]) == 1 for name in names)}
