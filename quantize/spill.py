"""Tensors that wait: on disk where memory has no room for them."""

from __future__ import annotations

import ctypes
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.nested import tensors

# Smaller tensors are not worth a file.
_WORTH = 2**20


class Spill:
    """Keeps the inputs of waiting batches on disk once they exceed a budget."""

    def __init__(self, budget: int, folder: Path | None, shared: Iterable[Tensor]) -> None:
        self._budget = budget
        self._folder = folder
        self._held = 0
        self._lock = threading.Lock()
        self._shared = {tensor.untyped_storage().data_ptr() for tensor in shared}

    def never(self, tensor: Tensor) -> None:
        """Says that a tensor belongs to the model and not to one batch."""
        self._shared.add(tensor.untyped_storage().data_ptr())

    def parked(self, values: Any) -> Parked:
        """Returns a context in which the large tensors in `values` may lie on disk instead of in memory."""
        unique = {t.untyped_storage().data_ptr(): t for t in tensors(values) if t.device.type == "cpu"}
        own = [tensor for pointer, tensor in unique.items() if pointer not in self._shared]
        movable = [t for t in own if t.untyped_storage().nbytes() >= _WORTH and t.untyped_storage().resizable()]
        return Parked(self, movable)

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
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 -- closed by `Parked`
        file.write(_storage_bytes(tensor))
        storage.resize_(0)
        return file

    def read(self, tensor: Tensor, file: Any) -> None:
        """Moves it back."""
        storage = tensor.untyped_storage()
        storage.resize_(file.tell())
        file.seek(0)
        file.readinto(_storage_bytes(tensor))


def _storage_bytes(tensor: Tensor) -> memoryview:
    """Returns a view of all bytes of a tensor's storage; one by way of numpy would forbid to resize it."""
    storage = tensor.untyped_storage()
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


class Parked:
    """The context of one waiting batch. Left by an exception, what lies on disk is dropped: nobody reads it again."""

    def __init__(self, spill: Spill, tensors: list[Tensor]) -> None:
        self._spill = spill
        self._tensors = tensors
        self._claimed = 0
        self._files: list[tuple[Tensor, Any]] = []

    def __enter__(self) -> None:
        for tensor in self._tensors:
            nbytes = tensor.untyped_storage().nbytes()
            if self._spill.claim(nbytes):
                self._claimed += nbytes
            else:
                self._files.append((tensor, self._spill.write(tensor)))

    def __exit__(self, kind: object, *_: object) -> None:
        self._spill.release(self._claimed)
        for tensor, file in self._files:
            with file:
                if kind is None:
                    self._spill.read(tensor, file)
