"""The difference between two GGUF models, from their headers."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.formats.container import tensor_bytes
from quantize.formats.gguf.container import Part, Stored, read_parts
from quantize.formats.gguf.header import SHORT, read_values
from quantize.formats.gguf.metadata import Value
from quantize.formats.gguf.split import SPLIT_KEYS

_CHUNK = 16 * 2**20


def compare(a: Path, b: Path, *, contents: bool = False) -> dict[str, Any]:
    """Returns in what the models at `a` and `b` differ, ready for JSON. How they are cut into parts does not count.

    Args:
        a: A file, any part of a split model, or a folder with one model.
        b: Another.
        contents: Whether to compare the bytes of tensors of equal type and shape, too: both are read.

    Returns:
        `models`: of each its path, bytes of all files, tensors, weights, tensor bytes, bits per weight, and bytes of
        each type. `metadata`: `added` and `removed` values by key, and `changed` pairs; a value is its type and its
        data, a long array its length and hash instead. `tensors`: `added` and `removed` types and shapes by name, and
        `changed` pairs. `differing`: names of tensors with other bytes; None when contents were not compared.

    Raises:
        InputError: one of them cannot be read.
    """
    models = [read_parts(path) for path in (a, b)]
    pairs = [_metadata(parts) for parts in models]
    tensors = [{name: s for part in parts for name, s in part.tensors.items()} for parts in models]
    kinds = [{name: {"type": str(s.scheme), "shape": list(s.shape)} for name, s in held.items()} for held in tensors]
    return {
        "models": [_summary(*each) for each in zip((a, b), models, tensors, strict=True)],
        "metadata": _difference(*pairs),
        "tensors": _difference(*kinds),
        "differing": _differing(*tensors) if contents else None,
    }


def show(value: Value) -> dict[str, Any]:
    """Returns a value for JSON: type and data, of an array of more than 256 elements length and SHA-256 instead."""
    if value.array and len(value.data) > SHORT:
        digest = hashlib.sha256(value.encode()).hexdigest()
        return {"type": value.type, "length": len(value.data), "sha256": digest}
    return {"type": value.type, "value": value.data}


def _metadata(parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
    return {key: show(value) for key, value in read_values(parts[0].file).items() if key not in SPLIT_KEYS}


def _summary(path: Path, parts: Sequence[Part], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    types: Counter[str] = Counter()
    for stored in tensors.values():
        types[str(stored.scheme)] += stored.extent.nbytes
    weights, nbytes = sum(math.prod(s.shape) for s in tensors.values()), sum(types.values())
    return {
        "path": str(path),
        "bytes": sum(part.file.stat().st_size for part in parts),
        "tensors": len(tensors),
        "weights": weights,
        "tensor_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / weights if weights else 0.0,
        "types": dict(types.most_common()),
    }


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "added": {key: value for key, value in b.items() if key not in a},
        "removed": {key: value for key, value in a.items() if key not in b},
        "changed": {key: [value, b[key]] for key, value in a.items() if key in b and not _equal(value, b[key])},
    }


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return repr(one) == repr(other)  # by ==, 1 would be 1.0 and NaN no NaN


def _differing(a: Mapping[str, Stored], b: Mapping[str, Stored]) -> list[str]:
    """Returns the tensors of equal type and shape whose bytes are not equal."""
    both = [name for name in a if name in b and (a[name].shape, a[name].scheme) == (b[name].shape, b[name].scheme)]
    return [name for name in both if not _same_bytes(a[name], b[name])]


def _same_bytes(one: Stored, other: Stored) -> bool:
    rows = one.shape[0]
    step = max(1, _CHUNK * rows // one.extent.nbytes) if len(one.shape) > 1 else rows
    for start in range(0, rows, step):
        left, right = (tensor_bytes(stored.read(start, start + step)) for stored in (one, other))
        if left != right:
            return False
    return True
