"""Forward passes of the whole model with one block's weights resident.

Every batch runs transformers' own forward in a thread of its own, which stops at the entry of each block. When all
batches stand before a block, its weights are loaded, the batches pass through it, and the weights are dropped. What
crosses from block to block (hidden states, shared keys and values, encoder output, position biases) stays where the
model's own code keeps it, so encoder-decoders, shared-KV and hybrid models need no case of their own.

A thread never holds the interpreter while it waits; at most `threads` of them run at a time. What is large is computed
on as many workers, not on the batches' own threads: the allocator keeps a heap for every thread that ever asked it for
much, and 17 batches of a 135M model then held 1.7 GB instead of 1.0.
"""

from __future__ import annotations

import queue
import threading
from collections import ChainMap, Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, cast, overload

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantize.errors import InputError
from quantize.formats.base import OUTPUT, TURNED, Checkpoint
from quantize.nested import flat, fresh, tensors
from quantize.parallel import one_torch_thread
from quantize.ranks import ALONE, Ranks
from quantize.skeleton import Skeleton, stand_in
from quantize.spill import Spill
from quantize.statistics import Accumulator, S, Statistics, over_all

# Threads only run Python frames and torch calls; the default of 8 MiB counts against a data limit for each batch.
_STACK = 2 * 2**20
_HEAD_ROWS = 8192
_MATMULS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm)

Observe = Callable[["Site", Tensor], None]


class Site(tuple[str, int]):
    """Where a linear map is applied: `(parameter name, index into a stacked parameter or -1)`.

    A name that ends in `TURNED` is the input of `x @ W`, one that ends in `OUTPUT` what the map gives.
    """

    __slots__ = ()


class _Abandoned(BaseException):
    """Ends a batch's thread; a BaseException so that no model code swallows it."""


class _SeenAll(BaseException):
    """Ends a rehearsal: every site that it was for has been reached."""


@dataclass(frozen=True, slots=True)
class _Watch(Generic[S]):
    """What is gathered while batches pass through a block.

    Attributes:
        parameters: The block's parameters by name.
        groups: The sites, each with the name under which its statistics are added up.
        needs: What is gathered.
        totals: By those names.
        lead: Batches ahead of the first that counts.
        rehearsal: Whether the batches go no further than the last of the sites, and then stand before the block again.
        everyone: Whether every expert sees every token.
        to_end: Whether a rehearsal goes through the whole block: sites may be come by again.
    """

    parameters: Mapping[str, Tensor]
    groups: Mapping[Site, str]
    needs: type[S]
    totals: Mapping[str, Accumulator[S]]
    lead: int
    rehearsal: bool
    everyone: bool = False
    to_end: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def watcher(self, index: int) -> _Watcher:
        """Returns the mode that observes one batch."""
        left = set(self.totals)

        def observe(site: Site, inputs: Tensor) -> None:
            if index < self.lead or site not in self.groups:
                return
            name = self.groups[site]
            part = cast(S, self.needs.of(inputs))
            with self.lock:
                self.totals[name].add(index - self.lead, part)
            left.discard(name)
            if self.rehearsal and not left and not self.to_end:
                raise _SeenAll

        return _Watcher(self.parameters, observe)

    def finish(self, index: int) -> None:
        """Says that a batch has passed."""
        with self.lock:
            for total in self.totals.values():
                total.finish(index - self.lead)

    def found(self, ranks: Ranks) -> dict[str, S]:
        """Returns the statistics of all ranks' batches by name; a name whose sites saw no token is missing."""
        return over_all(self.totals, self.needs, ranks)


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial run of a block showed.

    Attributes:
        calls: Site and input of every linear map, in order. The inputs are kept alive, so that equal addresses mean
            the same tensor.
        used: Names of the block's parameters that took part in any computation; empty if nobody asked.
        output: The floating tensors of the block's result, and of what it left in its arguments for later blocks.
    """

    calls: list[tuple[Site, Tensor]]
    used: set[str]
    output: list[Tensor]


class _Watcher(TorchFunctionMode):
    """Reports the input of every linear map by a known parameter, however the model applies it."""

    def __init__(self, parameters: Mapping[str, Tensor], observe: Observe, used: set[str] | None = None) -> None:
        super().__init__()
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, value in parameters.items():
            self._by_storage.setdefault(value.untyped_storage().data_ptr(), []).append((name, value))
        self._observe = observe
        self._used = used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = (*args, *(kwargs or {}).values())
        product = func is nn.functional.linear or func in _MATMULS or func is torch.addmm
        sites = self._sites(func, *operands[func is torch.addmm :][:2]) if product else []
        for site, x in sites:
            self._observe(site, x)
        if self._used is not None and getattr(func, "__name__", "") != "__get__":
            owners = (self._owner(value) for value in flat((args, kwargs)) if isinstance(value, Tensor))
            self._used.update(owner[0] for owner in owners if owner is not None)
        result = func(*args, **(kwargs or {}))
        for site, _ in sites:
            if func is nn.functional.linear and site[1] < 0:
                self._observe(Site((site[0] + OUTPUT, -1)), result)
        return result

    def _sites(self, func: Any, inputs: Tensor, weight: Tensor) -> list[tuple[Site, Tensor]]:
        """Returns the sites of a product with a known parameter or with matrices of it, each with its input."""
        if weight.dim() < 2:
            return []
        linear = func is nn.functional.linear
        for matrix, mark in [(weight, "")] if linear else [(weight.mT, ""), (weight, TURNED)]:
            known = self._owner(matrix)
            # a cut view is no map whose input has the columns of the parameter, or its rows where it is turned
            if known is None or not matrix.is_contiguous():
                continue
            name, whole = known
            if matrix.shape == whole.shape[-2:]:
                offset = matrix.storage_offset() - whole.storage_offset()
                return [(Site((name + mark, -1 if whole.dim() < 3 else offset // whole.stride(0))), inputs)]
            if matrix.shape == whole.shape and inputs.dim() == whole.dim():
                # every token is in every expert's input: zeros where it was not sent there
                return [(Site((name + mark, number)), x[x.any(-1)]) for number, x in enumerate(inputs)]
        return []

    def _owner(self, view: Tensor) -> tuple[str, Tensor] | None:
        """Returns the parameter that a tensor is a view of; some that were split from one tensor share its storage."""
        for name, whole in self._by_storage.get(view.untyped_storage().data_ptr(), ()):
            if 0 <= view.storage_offset() - whole.storage_offset() < whole.numel():
                return name, whole
        return None


class _Everyone(TorchFunctionMode):
    """Lets routers choose all experts: they choose with `topk` over as many values as there are experts."""

    def __init__(self, counts: frozenset[int]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.topk, Tensor.topk):
            values, *rest = args
            if values.shape[-1] in self._counts and kwargs.get("dim", rest[1] if len(rest) > 1 else -1) in (
                -1,
                values.dim() - 1,
            ):
                kwargs.pop("k", None)
                return func(values, values.shape[-1], *rest[1:], **kwargs)
        return func(*args, **kwargs)


class _Paging(TorchFunctionMode):
    """Reads embeddings and the head from disk as they are used: only the rows looked up, or a run at a time."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        paged = self._sweep.paged
        found = [paged[id(value)] for value in args if id(value) in paged]
        if not found:
            return func(*args, **kwargs)
        name, _ = found[0]
        if func is nn.functional.embedding:
            return self._sweep.look_up(name, args[0])
        if func is nn.functional.linear:
            return self._sweep.run_head(name, args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
        if getattr(func, "__name__", "") == "__get__" and not isinstance(result := func(*args, **kwargs), Tensor):
            return result  # its device, its shape
        return func(*(self._sweep.whole(value) for value in args), **kwargs)


class _Batch(threading.Thread):
    """One batch on its way through the model."""

    def __init__(self, sweep: Sweep, index: int, inputs: dict[str, Tensor]) -> None:
        super().__init__(name=f"batch-{index}", daemon=True)
        self.index = index
        self.at: str | None = None
        self.call: tuple[Any, Any] = ((), {})
        self.result: Any = None
        self.error: BaseException | None = None
        self.go = threading.Semaphore(0)
        self._sweep = sweep
        self._inputs = inputs

    def run(self) -> None:
        try:
            self._wait()
            torch.set_num_threads(1)
            with torch.no_grad(), _Paging(self._sweep):
                self.result = self._sweep.skeleton.model(**self._inputs).logits
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self.at = None
        self._sweep.events.put(self)

    def stop_at(self, place: str) -> None:
        """Waits before `place` until the sweep lets this batch go on."""
        self.at = place
        self._sweep.events.put(self)
        self._wait()

    def _wait(self) -> None:
        self.go.acquire()
        if self._sweep.abandoned:
            raise _Abandoned


class Stage:
    """One block with its weights loaded, and the batches standing before it.

    Attributes:
        path: Module path of the block.
        module: The block.
        weights: Its stored tensors by stored name, floating ones as float32.
    """

    def __init__(self, sweep: Sweep, path: str, batches: Sequence[_Batch]) -> None:
        self.path = path
        self.module = sweep.skeleton.model.get_submodule(path)
        self.weights: dict[str, Tensor] = {}
        self.passed = False
        self._sweep = sweep
        self._batches = batches
        self._loaded: dict[str, Tensor] = {}
        self._changed: set[str] = set()
        self._repeated: set[Site] = set()

    def load(self, changed: Mapping[str, Tensor] | None = None) -> None:
        """Puts the stored tensors, with those in `changed` exchanged, into the module.

        Args:
            changed: Stored name to float32 tensor; what it does not name is as in `weights`.
        """
        skeleton = self._sweep.skeleton
        values = ChainMap(dict(changed or {}), self.weights)
        if not self.weights:
            self.weights |= {name: self._sweep.read(name) for name in skeleton.stored_names(self.path)}
            stale = {name for name in skeleton.parameters if self._owns(name)}
        else:
            names = self._changed | set(values.maps[0])
            stale = {o for name in names for o in skeleton.conversion_of[name].outputs if o in self._loaded}
            stale |= {alias for alias, source in skeleton.tied.items() if source in stale and alias in self._loaded}
        self._changed = set(values.maps[0])
        # freed before their successors are made
        skeleton.put({name: stand_in(self._loaded.pop(name).shape) for name in stale & set(self._loaded)})
        loaded = skeleton.fill(stale.__contains__, lambda n: values[n] if n in values else self._sweep.read(n))
        skeleton.put(loaded)
        self._loaded |= loaded

    def settle(self, changed: Mapping[str, Tensor]) -> None:
        """Loads tensors as `load` does, and lets later blocks that have some of them too see what they became."""
        self.load(changed)
        self._sweep.settled |= {name: value for name, value in changed.items() if name in self._sweep.shared}

    def unload(self) -> None:
        """Drops all weights."""
        self._empty()
        self.weights = {}

    def _empty(self) -> None:
        """Drops the module's own weights, which for experts are a second copy of the stored ones."""
        self._sweep.skeleton.put({name: stand_in(value.shape) for name, value in self._loaded.items()})
        self._loaded = {}

    def probe(self, ask_used: bool = False) -> Trial:
        """Runs the probe batch through the block without letting it go on, and without touching what it carries."""
        args, kwargs = fresh(self._batches[0].call)
        calls: list[tuple[Site, Tensor]] = []
        used: set[str] = set()
        watcher = _Watcher(self._loaded, lambda site, x: calls.append((site, x)), used if ask_used else None)
        with torch.no_grad(), _Paging(self._sweep), watcher:
            result = self._sweep.originals[self.path](*args, **kwargs)
        self._repeated |= {site for site, count in Counter(site for site, _ in calls).items() if count > 1}
        return Trial(calls, used, list(tensors((result, args, kwargs))))

    @overload
    def run(self, groups: Mapping[Site, str] | None = None) -> dict[str, Statistics]: ...
    @overload
    def run(self, groups: Mapping[Site, str], needs: type[S]) -> dict[str, S]: ...
    def run(self, groups: Mapping[Site, str] | None = None, needs: Any = Statistics) -> dict[str, Any]:
        """Lets all batches pass through the block, and empties the module; `weights` stay.

        Args:
            groups: The sites to watch, each with the name under which its statistics are added up.
            needs: What is gathered there: `Statistics`, or `Squares`, which take much less memory and time.

        Returns:
            The statistics by name; a name whose sites saw no token is missing.
        """
        watch = self._watch(groups or {}, needs, rehearsal=False)
        self.passed = True
        try:
            self._let_pass(watch)
        finally:
            self._empty()
        return watch.found(self._sweep.ranks)

    def rehearse(self, groups: Mapping[Site, str], needs: type[S], everyone: bool = False) -> dict[str, S]:
        """Passes all batches through the block as it is loaded, only as far as the last of some sites, and back.

        Where a probe came by one of them more than once, they go to the end.

        Args:
            groups: The sites to watch, each with the name under which its statistics are added up.
            needs: What is gathered there.
            everyone: Whether every expert sees every token.

        Returns:
            The statistics by name; a name whose sites saw no token is missing.
        """
        to_end = not self._repeated.isdisjoint(groups)
        watch = replace(self._watch(groups, needs, rehearsal=True), everyone=everyone, to_end=to_end)
        self._let_pass(watch)
        return watch.found(self._sweep.ranks)

    def _watch(self, groups: Mapping[Site, str], needs: type[S], rehearsal: bool) -> _Watch[S]:
        keep = needs.kept(self._sweep.ranks)
        totals: dict[str, Accumulator[S]] = {name: Accumulator(keep) for name in groups.values()}
        return _Watch(self._loaded, groups, needs, totals, 1 if self._sweep.has_probe else 0, rehearsal)

    def _let_pass(self, watch: _Watch[Any]) -> None:
        if watch.groups or watch.rehearsal:
            self._sweep.watches[self.path] = watch
        try:
            self._sweep.release(self._batches)
        finally:
            self._sweep.watches.pop(self.path, None)  # it holds the block's weights and statistics

    def _owns(self, parameter: str) -> bool:
        return parameter.startswith(f"{self.path}.")


class Sweep:
    """The forward passes of all batches; a context manager.

    Args:
        skeleton: The model.
        checkpoint: Where its weights are read from.
        batches: Token ids, int64 `[rows, length]` each.
        threads: Batches that run at a time.
        probe: Token ids `[1, length]` of a small extra batch that goes ahead of the others and that `Stage.probe`
            uses; it never enters statistics.
        keep: The positions whose logits are wanted from the head; None for all.
        budget: Bytes of block inputs kept in memory; what exceeds it waits in `folder`.
        folder: Where to spill; the system's temporary folder when None.
        ranks: Those that pass other batches of the same text through the same model; statistics are those of all.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoint: Checkpoint,
        batches: Sequence[Tensor],
        *,
        threads: int,
        probe: Tensor | None = None,
        keep: slice | None = None,
        budget: int = 2**31,
        folder: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.skeleton = skeleton
        self.ranks = ranks
        self.has_probe = probe is not None
        self.events: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self.abandoned = False
        self.originals: dict[str, Callable[..., Any]] = {}
        self.watches: dict[str, _Watch[Any]] = {}
        self.paged: dict[int, tuple[str, Tensor]] = {}
        # tensors of blocks that other blocks use too, and those of them that were rounded already
        sources = (skeleton.source_of[name] for name in skeleton.tied.values() if name in skeleton.source_of)
        self.shared = {name for source in sources for name in source.names if skeleton.block_of(source.target)}
        self.settled: dict[str, Tensor] = {}
        self._checkpoint = checkpoint
        self._threads = max(1, threads)
        self._keep = keep
        self._spill = Spill(budget, folder, skeleton.model.buffers())
        self._lock = threading.RLock()
        self._resident: set[str] = set()
        self._whole: dict[str, Tensor] = {}
        self._undo = ExitStack()
        self._workers: ThreadPoolExecutor | None = None
        everything = [*([probe] if probe is not None else []), *batches]
        self._batches = [_Batch(self, i, self._inputs(ids)) for i, ids in enumerate(everything)]

    def __enter__(self) -> Sweep:
        try:
            self._undo.enter_context(one_torch_thread())
            self._workers = self._undo.enter_context(
                ThreadPoolExecutor(self._threads, "sweep", torch.set_num_threads, (1,))
            )
            self._patch()
            before = threading.stack_size(_STACK)
            try:
                for batch in self._batches:
                    batch.start()
            finally:
                threading.stack_size(before)
            self.release(self._batches)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.abandoned = True
        for batch in self._batches:
            batch.go.release()
        for batch in self._batches:
            if batch.ident is not None:
                batch.join()
        self._undo.close()

    def read(self, name: str) -> Tensor:
        """Returns a stored tensor, float32 where it is floating."""
        if name in self.settled:
            return self.settled[name]
        value = self._checkpoint.read(name)
        return value.float() if value.is_floating_point() else value

    def stages(self) -> Iterator[Stage]:
        """Yields each block in the order in which the model enters them, its weights loaded.

        A stage that the consumer did not `run` is run without watching. Weights are dropped afterwards.
        """
        while (place := self._batches[0].at) is not None and place in self.originals:
            stage = Stage(self, place, [batch for batch in self._batches if batch.at == place])
            stage.load()
            try:
                yield stage
                if not stage.passed:
                    stage.run()
            finally:
                stage.unload()

    def logits(self) -> Iterator[Tensor]:
        """Yields each batch's logits at the kept positions, `[rows, positions, vocab]`, after all blocks."""
        for batch in self._batches[self.has_probe :]:
            if batch.at is not None:
                self.release([batch])
            result, batch.result = batch.result, None
            yield result

    def release(self, batches: Sequence[_Batch]) -> None:
        """Lets `batches` run, in order and `threads` at a time, until each stops again or ends."""
        waiting, running = deque(batches), 0
        failed: BaseException | None = None
        while waiting or running:
            while waiting and running < self._threads and failed is None:
                waiting.popleft().go.release()
                running += 1
            if not running:
                break
            batch = self.events.get()
            running -= 1
            failed = failed or batch.error
        if failed is not None:
            raise failed

    def _inputs(self, ids: Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.skeleton.model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        return inputs

    def look_up(self, name: str, ids: Tensor) -> Tensor:
        """Returns the rows of a stored embedding that `ids` name, float32."""
        rows, compact = torch.unique(ids, return_inverse=True)
        values = torch.cat([self._checkpoint.read(name, row, row + 1) for row in rows.tolist()])
        return values.float()[compact]

    def whole(self, value: Any) -> Any:
        """Returns a value as it is, or the matrix that it stands in for, which stays in memory from then on."""
        with self._lock:
            name, _ = self.paged.get(id(value), ("", None))
            if name and name not in self._whole:
                self._whole[name] = self.read(name)
                self._spill.never(self._whole[name])
            return self._whole.get(name, value)

    def run_head(self, name: str, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """Multiplies by the stored head a run of vocabulary rows at a time, for the kept positions only."""
        batch = threading.current_thread()
        assert isinstance(batch, _Batch)
        batch.stop_at("head")
        hidden = hidden if self._keep is None else hidden[:, self._keep]
        starts = range(0, self._checkpoint.tensors[name].shape[0], _HEAD_ROWS)
        read = self._checkpoint.read
        logits: Tensor = self._compute(
            lambda: torch.cat([hidden @ read(name, start, start + _HEAD_ROWS).float().T for start in starts], -1)
        )
        return logits if bias is None else logits + bias

    def _patch(self) -> None:
        """Makes the model stop at blocks, page embeddings and head, and load everything else when first needed."""
        model, skeleton = self.skeleton.model, self.skeleton
        for path in skeleton.blocks:
            module = model.get_submodule(path)
            self.originals[path] = module.forward
            module.forward = partial(self._enter_block, path)
            self._undo.callback(module.__dict__.pop, "forward")
        own: dict[str, set[str]] = {}
        for parameter in skeleton.parameters:
            if skeleton.block_of(parameter) is None:
                own.setdefault(parameter.rpartition(".")[0], set()).add(parameter)
        for path, module in model.named_modules():
            matrix = f"{path}.weight"
            if skeleton.block_of(path) is None and (isinstance(module, nn.Embedding) or path == skeleton.head):
                name = skeleton.whole(matrix)
                if name is not None:
                    self.paged[id(module.weight)] = (name, module.weight)
                    own.get(path, set()).discard(matrix)
            names = own.get(path)
            if names and any(True for _ in module.children()):
                self._make_resident(path, names)
            elif names:
                hook = partial(self._make_resident, path, names)
                self._undo.callback(module.register_forward_pre_hook(hook).remove)

    def _enter_block(self, path: str, *args: Any, **kwargs: Any) -> Any:
        batch = threading.current_thread()
        assert isinstance(batch, _Batch)
        batch.call = (args, kwargs)
        lead = self.has_probe and batch.index == 0
        while True:
            # the probe's are small, and `Stage.probe` reads them while the batch waits
            with self._spill.parked(() if lead else (args, kwargs)):
                batch.stop_at(path)
            watch = self.watches.get(path)
            if watch is None or not watch.rehearsal:
                break
            if not lead:
                self._rehearse(path, watch, batch)
        batch.call = ((), {})
        forward = partial(self.originals[path], *args, **kwargs)
        if watch is None:
            result = self._compute(forward)
        else:
            result = self._compute(forward, watch.watcher(batch.index))
            watch.finish(batch.index)
        self._require_finite(path, next(tensors(result), None))
        return result

    def _rehearse(self, path: str, watch: _Watch[Any], batch: _Batch) -> None:
        args, kwargs = fresh(batch.call)
        modes: list[TorchFunctionMode] = [watch.watcher(batch.index)]
        if watch.everyone:
            modes.append(_Everyone(self.skeleton.expert_counts))
        with suppress(_SeenAll):
            self._compute(partial(self.originals[path], *args, **kwargs), *modes)
        watch.finish(batch.index)

    def _compute(self, function: Callable[[], Any], *modes: AbstractContextManager[Any]) -> Any:
        """Returns `function()`, run on a worker with the context of this thread."""

        def run() -> Any:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(_Paging(self))
                for mode in modes:
                    stack.enter_context(mode)
                return function()

        assert self._workers is not None
        return self._workers.submit(copy_context().run, run).result()

    def _require_finite(self, path: str, hidden: Tensor | None) -> None:
        if hidden is not None and not bool(hidden.isfinite().all()):
            count = int((~hidden.isfinite()).sum())
            raise InputError(
                f"{self._checkpoint.path}: {path} gives {count} NaN or Inf among {hidden.numel()} values",
                "no statistics or perplexity can be had; the weights of this or an earlier block are too large",
            )

    def _make_resident(self, path: str, names: set[str], *_: Any) -> None:
        with self._lock:
            if path in self._resident:
                return
            self._resident.add(path)
            values = self.skeleton.fill(names.__contains__, self.read)
            self.skeleton.put(values)
            self._undo.callback(self.skeleton.put, {name: stand_in(value.shape) for name, value in values.items()})
            for value in values.values():
                self._spill.never(value)
