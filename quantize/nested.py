"""What nested containers hold: the arguments and results of modules, caches among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from copy import copy, deepcopy
from typing import Any

from torch import Tensor, nn


def flat(value: Any) -> Iterator[Any]:
    """Yields what nested containers hold."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from flat(item)
    else:
        yield value


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields the floating tensors in nested containers."""
    return (item for item in flat(value) if isinstance(item, Tensor) and item.is_floating_point())


def fresh(value: Any) -> Any:
    """Returns `value` with containers, caches and tensors copied: a trial run must not change what a real run sees."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, MutableMapping):
        duplicate = copy(value)
        for key, item in value.items():
            duplicate[key] = fresh(item)
        return duplicate
    if type(value) in (tuple, list):
        return type(value)(fresh(item) for item in value)
    if isinstance(value, nn.Module) or callable(value) or not hasattr(value, "__dict__"):
        return value
    return deepcopy(value)
