"""Opening a source model wherever it is: a folder, a file, or a repository on the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize import formats
from quantize.errors import InputError, UsageError
from quantize.formats.base import Checkpoint
from quantize.rewrites import merge_adapters
from quantize.schemes import Plain

# What is not downloaded: the same weights in other forms, and folders of other exports.
_IGNORED = ["*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.npz", "*.onnx*", "*.ot", "*.tflite",
            "*.zip", "*.tar*", "*.mlpackage/*", "consolidated*", "original/*", "onnx/*", "openvino/*"]  # fmt: skip
_HUB = "hub:"


def open_checkpoint(model: str | Path | None, adapters: tuple[str, ...] = ()) -> Checkpoint:
    """Returns the checkpoint that `model` names, with adapters merged on read.

    Args:
        model: A folder, a .gguf file, or a hub id `OWNER/NAME[@REVISION]`; `hub:` before it makes it one even if there
            is such a folder. None for the current folder.
        adapters: LoRA folders, `DIR` or `DIR:SCALE`.

    Raises:
        InputError: there is no such model, or it is broken or unreadable.
    """
    path = locate(model)
    checkpoint = formats.find(path).open(path)
    return merge_adapters(checkpoint, adapters) if adapters else checkpoint


def locate(model: str | Path | None) -> Path:
    """Returns the local path of a model, downloading it from the hub if that is where it is.

    Raises:
        UsageError: nothing was named and the current folder holds no model.
        InputError: it exists neither here nor on the hub.
    """
    if model is None:
        here = Path.cwd()
        if any(candidate.sniff(here) for candidate in formats.FORMATS.values()):
            return here
        raise UsageError(
            "no model named, and the current folder holds none",
            "name a folder, a .gguf file or a hub id: quantize run MODEL --method awq --bits 4",
        )
    text = str(model)
    if text.startswith(_HUB):
        return _download(text.removeprefix(_HUB))
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # ~nobody
        raise InputError(f"{text}: no such file or folder") from error
    if path.exists():
        return path
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or not text.strip("/"):
        raise InputError(f"{text}: no such file or folder")
    return _download(text)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, ignore_patterns=_IGNORED))
    except GatedRepoError as error:
        raise InputError(
            f"{name}: gated on the hub", "accept its terms there, then set HF_TOKEN or run 'hf auth login'"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{name}: neither a local path nor a model on the hub", "a private one needs HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(f"{name}: no such path, and not in the hub cache while the hub is out of reach") from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{name}: the hub did not deliver it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Returns whether any tensor of the source lies on a grid already."""
    return any(not isinstance(info.scheme, Plain) for info in checkpoint.tensors.values())


def tensor_name(checkpoint: Checkpoint, name: str, index: int = 0) -> str:
    """Returns a tensor as messages call it: its file, its name, and what the source calls it or its matrix `index`."""
    origin = getattr(checkpoint, "origin", None)
    if origin is None:
        return f"{checkpoint.file(name)}: tensor '{name}'"
    file, source = origin(name, index)
    return f"{file}: tensor '{name}' (of '{source}')"


def refuse_nan(checkpoint: Checkpoint, weights: Mapping[str, Tensor], start: int = 0) -> None:
    """Looks for NaN and Inf in what was read.

    Args:
        checkpoint: Where it was read from.
        weights: Tensors, or runs of their first dimension.
        start: Where the runs start.

    Raises:
        InputError: there is some; file, tensor, place and number are named.
    """
    for name, value in weights.items():
        if not _finite(value):
            bad = (~value.float().isfinite()).nonzero()
            first = bad[0].tolist()
            place = [first[0] + start, *first[1:]] if first else "its only value"
            named = tensor_name(checkpoint, name, first[0] + start if first else 0)
            raise InputError(
                f"{named} holds {len(bad)} NaN or Inf, first at {place}",
                "download it again; --allow-nan lets it through",
            )


def _finite(value: Tensor) -> bool:
    """Returns whether no element is NaN or Inf, by the extremes: NaN shows in both, and no mask of all is made."""
    if not value.is_floating_point() or not value.numel():
        return True
    value = value.float() if value.dtype.itemsize == 1 else value
    return all(bool(extreme.isfinite()) for extreme in value.aminmax())


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns a hash of the config, the headers and a row of every tensor: enough to tell two models apart."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    for _, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{info.name} {info.shape} {info.scheme}\n".encode())
        sample = checkpoint.read(info.name, 0, 1) if info.shape else checkpoint.read(info.name)
        digest.update(sample.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what a checkpoint holds as plain values: the content of `quantize inspect`."""
    schemes: dict[str, dict[str, float]] = {}
    weights = nbytes = 0
    for info in checkpoint.tensors.values():
        count = int(torch.Size(info.shape).numel())
        row = schemes.setdefault(str(info.scheme), {"tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += count
        row["bytes"] += info.nbytes
        weights += count
        nbytes += info.nbytes
    for row in schemes.values():
        row["bits_per_weight"] = round(row["bytes"] * 8 / max(1, row["weights"]), 4)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architectures": checkpoint.config.get("architectures"),
        "model_type": checkpoint.config.get("model_type"),
        "quantization": checkpoint.quantization,
        "metadata": getattr(checkpoint, "metadata", {}),
        "tensors": len(checkpoint.tensors),
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": round(nbytes * 8 / max(1, weights), 4),
        "schemes": schemes,
        # those of a GGUF file are built from its header, the tokenizer included, which takes long and may fail
        "side_files": [] if checkpoint.format == "gguf" else sorted(checkpoint.side_files),
        "dropped": dict(checkpoint.dropped),
        "each": [
            {"name": i.name, "shape": list(i.shape), "scheme": str(i.scheme), "bytes": i.nbytes}
            for i in checkpoint.tensors.values()
        ],
    }


def compare(a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    """Returns in what the headers of two checkpoints differ, in the form of `quantize.formats.gguf.compare`."""
    described = [describe(checkpoint) for checkpoint in (a, b)]
    kinds = [
        {row["name"]: {"type": row["scheme"], "shape": row["shape"]} for row in each["each"]} for each in described
    ]
    models = [
        {
            "path": each["path"],
            "bytes": each["bytes"],
            "tensors": each["tensors"],
            "weights": each["weights"],
            "tensor_bytes": each["bytes"],
            "bits_per_weight": each["bits_per_weight"],
            "types": {name: row["bytes"] for name, row in each["schemes"].items()},
        }
        for each in described
    ]
    configs = [{key: {"value": value} for key, value in checkpoint.config.items()} for checkpoint in (a, b)]
    return {"models": models, "metadata": _difference(*configs), "tensors": _difference(*kinds), "differing": None}


def _difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {
        "added": {key: value for key, value in b.items() if key not in a},
        "removed": {key: value for key, value in a.items() if key not in b},
        "changed": {key: [a[key], b[key]] for key in a if key in b and a[key] != b[key]},
    }
