"""A GGUF model under its own names, as a source of another GGUF file: metadata, tokenizer and order stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from quantize.formats.base import TURNED, CheckpointView, Observed, TensorInfo
from quantize.formats.gguf.architectures.lazy import SAME
from quantize.formats.gguf.checkpoint import GGUFCheckpoint
from quantize.formats.gguf.header import read_values
from quantize.formats.gguf.metadata import Value
from quantize.formats.gguf.split import SPLIT_KEYS
from quantize.schemes import Plain, QuantizedTensor


class StoredView(CheckpointView):
    """What a GGUF file holds, as it holds it."""

    dropped: Mapping[str, str] = {}

    def __init__(self, checkpoint: GGUFCheckpoint) -> None:
        super().__init__(checkpoint)
        self._checkpoint = checkpoint
        self._stored = checkpoint.stored
        self.tensors = {n: TensorInfo(n, s.shape, s.scheme, s.extent.nbytes) for n, s in self._stored.items()}

    def metadata(self) -> dict[str, Value]:
        """Returns its metadata without what splitting put there."""
        values = read_values(self._checkpoint.first_file)
        return {key: value for key, value in values.items() if key not in SPLIT_KEYS}

    def sources(self, name: str) -> tuple[str, ...]:
        """Returns what transformers calls a tensor."""
        return self._checkpoint.names_of(name)

    def same_columns(self, name: str) -> bool:
        """Returns whether input columns are those of the sources."""
        return self._checkpoint.columns_of(name) is SAME

    def observed(self, name: str) -> Observed | None:
        """Returns where a text shows what a tensor's columns are multiplied with."""
        if (fed := self._checkpoint.architecture.observed(self._checkpoint.settings, name)) is not None:
            return fed
        found = self._checkpoint.columns_of(name)
        if found is None:
            return None
        # what transformers has in the other order, seen from here
        order = None if found.order is None else found.order.argsort()
        return Observed(self.sources(name), TURNED if found.turned else "", order)

    def required_float(self, name: str) -> bool:
        """Returns False: what the file holds is what engines took."""
        return False

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows: in their own dtype when plain, decoded to float32 when not."""
        coded = self.read_coded(name, start, stop)
        return self._stored[name].read(start, stop) if coded is None else coded.dequantize()

    def read_coded(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns the blocks of rows, or None for a plain tensor."""
        stored = self._stored[name]
        if isinstance(stored.scheme, Plain):
            return None
        blocks = stored.read(start, stop)
        return QuantizedTensor(stored.scheme, (len(blocks), *stored.shape[1:]), {"blocks": blocks})

    def file(self, name: str) -> Path:
        """Returns the part that holds a tensor."""
        return self._stored[name].extent.file
