"""Forward passes of the whole model with one block's weights resident.

Every batch runs transformers' own forward in a thread of its own, which stops at the entry of each block. When all
batches stand before a block, its weights are loaded, the batches pass through it, and the weights are dropped. What
crosses from block to block (hidden states, shared keys and values, encoder output, position biases) stays where the
model's own code keeps it, so encoder-decoders, shared-KV and hybrid models need no case of their own.

A thread never holds the interpreter while it waits; at most `threads` of them run at a time.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantize.formats.base import Checkpoint
from quantize.formats.container import buffer_bytes
from quantize.skeleton import Skeleton
from quantize.statistics import Accumulator, Statistics

# Threads only run Python frames and torch calls; the default of 8 MiB counts against a data limit for each batch.
_STACK = 2 * 2**20
# Smaller tensors are not worth a file.
_SPILL_MIN = 2**20
_HEAD_ROWS = 8192

Observe = Callable[["Site", Tensor], None]


class Site(tuple[str, int]):
    """Where a linear map is applied: `(parameter name, index into a stacked parameter or -1)`."""

    __slots__ = ()


class _Abandoned(BaseException):
    """Ends a batch's thread; a BaseException so that no model code swallows it."""


class _Watcher(TorchFunctionMode):
    """Reports the input of every linear map by a known parameter, however the model applies it."""

    def __init__(self, parameters: Mapping[int, tuple[str, Tensor]], observe: Observe) -> None:
        super().__init__()
        self._parameters = parameters
        self._observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            known = self._parameters.get(weight.untyped_storage().data_ptr())
            if known is not None:
                name, whole = known
                index = -1 if whole.dim() < 3 else weight.storage_offset() // whole.stride(0)
                self._observe(Site((name, index)), args[0] if args else kwargs["input"])
        return func(*args, **(kwargs or {}))


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
        self.go.acquire()
        try:
            with torch.no_grad():
                torch.set_num_threads(1)
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

    def load(self, changed: Mapping[str, Tensor] | None = None) -> None:
        """Puts the stored tensors, with those in `changed` exchanged, into the module.

        Args:
            changed: Stored name to float32 tensor; what it does not name is as in `weights`.
        """
        if not self.weights:
            self.weights = {n: self._sweep.read(n) for n in self._sweep.skeleton.stored_names(self.path)}
        values = self.weights if changed is None else {**self.weights, **changed}
        self._loaded = self._sweep.skeleton.fill(self._owns, values.__getitem__)
        for name, value in self._loaded.items():
            _set(self._sweep.skeleton.model, name, value)

    def unload(self) -> None:
        """Drops all weights."""
        for name, value in self._loaded.items():
            _set(self._sweep.skeleton.model, name, torch.empty_like(value, device="meta"))
        self._loaded, self.weights = {}, {}

    def probe(self, observe: Observe) -> list[Tensor]:
        """Runs the probe batch through the block without letting it go on.

        Args:
            observe: Called with each linear map's site and input.

        Returns:
            The floating tensors of the block's output.
        """
        args, kwargs = self._batches[0].call
        forward = self._sweep.originals[self.path]
        with torch.no_grad(), _Watcher(self._watched(), observe):
            return list(_tensors(forward(*_fresh(args), **_fresh(kwargs))))

    def run(self, groups: Mapping[Site, str] | None = None) -> dict[str, Statistics]:
        """Lets all batches pass through the block.

        Args:
            groups: The sites to watch, each with the name under which its statistics are added up.

        Returns:
            The statistics by name; a name whose sites saw no token is missing.
        """
        totals = {name: Accumulator() for name in (groups or {}).values()}
        lock = threading.Lock()
        first = 1 if self._sweep.has_probe else 0

        def observe(batch: int, site: Site, inputs: Tensor) -> None:
            if batch < 0 or groups is None or site not in groups:
                return
            part = Statistics.of(inputs)
            with lock:
                totals[groups[site]].add(batch, part)

        def finished(batch: int) -> None:
            with lock:
                for total in totals.values():
                    total.finish(batch)

        self._sweep.observers[self.path] = (
            (self._watched(), lambda batch: partial(observe, batch - first), lambda batch: finished(batch - first))
            if totals
            else None
        )
        self.passed = True
        self._sweep.release(self._batches)
        return {name: total.total for name, total in totals.items() if total.total is not None}

    def _owns(self, parameter: str) -> bool:
        return parameter.startswith(f"{self.path}.")

    def _watched(self) -> dict[int, tuple[str, Tensor]]:
        return {value.untyped_storage().data_ptr(): (name, value) for name, value in self._loaded.items()}


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
    ) -> None:
        self.skeleton = skeleton
        self.has_probe = probe is not None
        self.events: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self.abandoned = False
        self.originals: dict[str, Callable[..., Any]] = {}
        self.observers: dict[str, Any] = {}
        self._checkpoint = checkpoint
        self._threads = max(1, threads)
        self._keep = keep
        self._spill = _Spill(budget, folder)
        self._lock = threading.RLock()
        self._resident: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        everything = [*([probe] if probe is not None else []), *batches]
        self._batches = [_Batch(self, i, self._inputs(ids)) for i, ids in enumerate(everything)]

    def __enter__(self) -> Sweep:
        self._patch()
        before = threading.stack_size(_STACK)
        try:
            for batch in self._batches:
                batch.start()
        finally:
            threading.stack_size(before)
        self.release(self._batches)
        return self

    def __exit__(self, *_: object) -> None:
        self.abandoned = True
        for batch in self._batches:
            batch.go.release()
        for batch in self._batches:
            batch.join()
        for undo in reversed(self._undo):
            undo()
        self._spill.close()

    def read(self, name: str) -> Tensor:
        """Returns a stored tensor, float32 where it is floating."""
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

    def _patch(self) -> None:
        """Makes the model stop at blocks and at the head, and load everything else when it is first needed."""
        model = self.skeleton.model
        head = self.skeleton.head
        for path in self.skeleton.blocks:
            module = model.get_submodule(path)
            self.originals[path] = module.forward
            self._override(module, partial(self._enter_block, path))
        for path, module in model.named_modules():
            if self.skeleton.block_of(path) is not None or not any(True for _ in module.parameters(recurse=False)):
                continue
            if path == head and isinstance(module, nn.Linear):
                self._override(module, partial(self._run_head, path, module))
            elif isinstance(module, nn.Embedding):
                self._override(module, partial(self._look_up, path, module, module.forward))
            elif any(True for _ in module.children()):
                self._make_resident(path, module)
            else:
                handle = module.register_forward_pre_hook(lambda m, _, path=path: self._make_resident(path, m))
                self._undo.append(handle.remove)

    def _override(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._undo.append(lambda: module.__dict__.pop("forward", None))

    def _enter_block(self, path: str, *args: Any, **kwargs: Any) -> Any:
        batch = threading.current_thread()
        assert isinstance(batch, _Batch)
        batch.call = (args, kwargs)
        with self._spill.parked((args, kwargs)):
            batch.stop_at(path)
        batch.call = ((), {})
        watch = self.observers.get(path)
        if watch is None:
            return self.originals[path](*args, **kwargs)
        watched, observer, finished = watch
        with _Watcher(watched, observer(batch.index)):
            result = self.originals[path](*args, **kwargs)
        finished(batch.index)
        return result

    def _run_head(self, path: str, module: nn.Linear, hidden: Tensor) -> Tensor:
        """Multiplies by the head a run of vocabulary rows at a time, for the kept positions only."""
        batch = threading.current_thread()
        assert isinstance(batch, _Batch)
        batch.stop_at(path)
        name = self._stored(f"{path}.weight")
        hidden = hidden if self._keep is None else hidden[:, self._keep]
        parts = []
        for start in range(0, module.out_features, _HEAD_ROWS):
            rows = self._checkpoint.read(name, start, start + _HEAD_ROWS).float()
            parts.append(hidden @ rows.T)
        logits = torch.cat(parts, -1)
        return logits + self.read(self._stored(f"{path}.bias")) if module.bias is not None else logits

    def _look_up(self, path: str, module: nn.Embedding, forward: Callable[..., Tensor], ids: Tensor) -> Tensor:
        """Runs an embedding with only the rows that `ids` name in memory."""
        rows, compact = torch.unique(ids, return_inverse=True)
        name = self._stored(f"{path}.weight")
        values = torch.cat([self._checkpoint.read(name, r, r + 1) for r in rows.tolist()]).float()
        with self._lock:
            whole, module.weight = module.weight, nn.Parameter(values, requires_grad=False)
            padding, module.padding_idx = module.padding_idx, None
            try:
                return forward(compact)
            finally:
                module.weight, module.padding_idx = whole, padding

    def _make_resident(self, path: str, module: nn.Module) -> None:
        with self._lock:
            if path in self._resident:
                return
            self._resident.add(path)
            own = {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
            for name, value in self.skeleton.fill(own.__contains__, self.read).items():
                _set(self.skeleton.model, name, value)

    def _stored(self, parameter: str) -> str:
        """Returns the stored tensor that is `parameter`, following ties."""
        parameter = parameter if parameter in self.skeleton.conversions else self.skeleton.tied[parameter]
        return self.skeleton.conversions[parameter].names[0]


class _Spill:
    """Keeps the inputs of waiting batches on disk once they exceed a budget."""

    def __init__(self, budget: int, folder: Path | None) -> None:
        self._budget = budget
        self._folder = folder
        self._held = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """Ends use; files vanish with their last handle."""
        self._held = 0

    def parked(self, values: Any) -> _Parked:
        """Returns a context in which the large tensors in `values` may lie on disk instead of in memory."""
        return _Parked(self, [t for t in _tensors(values) if t.numel() * t.element_size() >= _SPILL_MIN])

    def claim(self, nbytes: int) -> bool:
        """Returns whether `nbytes` more may stay in memory, and counts them if so."""
        with self._lock:
            fits = self._held + nbytes <= self._budget
            self._held += nbytes if fits else 0
            return fits

    def release(self, nbytes: int) -> None:
        """Gives back what `claim` counted."""
        with self._lock:
            self._held -= nbytes

    def write(self, tensor: Tensor) -> Any:
        """Moves a tensor's storage to an unnamed file and returns the open file."""
        storage = tensor.untyped_storage()
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 -- closed by `read`
        file.write(_storage_bytes(tensor))
        storage.resize_(0)
        return file

    def read(self, tensor: Tensor, file: Any) -> None:
        """Moves it back."""
        storage = tensor.untyped_storage()
        storage.resize_(file.tell())
        file.seek(0)
        file.readinto(_storage_bytes(tensor))
        file.close()


def _storage_bytes(tensor: Tensor) -> memoryview:
    """Returns a view of all bytes of a tensor's storage."""
    return buffer_bytes(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()))


class _Parked:
    """The context of one waiting batch."""

    def __init__(self, spill: _Spill, tensors: list[Tensor]) -> None:
        self._spill = spill
        unique = {t.untyped_storage().data_ptr(): t for t in tensors if t.device.type == "cpu"}
        self._tensors = list(unique.values())
        self._claimed = 0
        self._files: list[tuple[Tensor, Any]] = []

    def __enter__(self) -> None:
        for tensor in self._tensors:
            nbytes = tensor.untyped_storage().nbytes()
            if self._spill.claim(nbytes):
                self._claimed += nbytes
            else:
                self._files.append((tensor, self._spill.write(tensor)))

    def __exit__(self, *_: object) -> None:
        self._spill.release(self._claimed)
        for tensor, file in self._files:
            self._spill.read(tensor, file)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in place of a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yields the floating tensors in nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _fresh(value: Any) -> Any:
    """Returns `value` with its containers copied, so that a trial run cannot change what the real run will see."""
    if isinstance(value, dict):
        copy = type(value)()
        copy.update({key: _fresh(item) for key, item in value.items()})
        return copy
    if type(value) in (tuple, list):
        return type(value)(_fresh(item) for item in value)
    return value
