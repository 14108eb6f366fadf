"""Copying a GGUF model into one file, or into parts of limited size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import InputError, UsageError, system_errors
from quantize.formats.base import Layout
from quantize.formats.gguf.container import PART_NAME, Part, Stored, read_parts
from quantize.formats.gguf.header import read_values
from quantize.formats.gguf.layout import Entry, layout
from quantize.formats.gguf.metadata import Value, alignment_of
from quantize.formats.gguf.split import part_names, split, split_metadata
from quantize.formats.gguf.stream import check, create, fill, sync_folder


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What a copy consists of.

    Attributes:
        files: Its files, the one to open first.
        sizes: Their bytes.
        tensors: Number of tensors in all.
    """

    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    tensors: int


def rewrite(
    source: Path,
    out: Path,
    *,
    max_bytes: int | None = None,
    max_tensors: int | None = None,
    bare_first: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Rewritten:
    """Copies the model at `source` to `out`: one file, or parts beside each other when a limit asks for more.

    Metadata is copied with its types, but for the split keys, which are made anew; tensors byte by byte, those of
    big-endian files turned round. All files are made as `.NAME.partial` and renamed when all are complete, the first
    part last: a model opens through it.

    Args:
        source: A file, any part of a split model, or a folder with one model.
        out: The file to be made; of parts the name without the numbers, with or without `.gguf`.
        max_bytes: Most bytes of tensor data in a part (`split`).
        max_tensors: Most tensors in a part.
        bare_first: Whether the first part shall have the metadata and no tensor.
        overwrite: Whether existing files may be replaced; those of the source never are.
        dry_run: Whether nothing shall be written.

    Raises:
        UsageError: a target exists, is the source or is called like one part of several.
        InputError: the source cannot be read, or two parts hold the same tensor.
        ResourceError: the disk is full; nothing is left behind.
        VerificationError: a file does not read back.
    """
    parts = read_parts(source, any_order=True)
    metadata = _metadata(parts)
    tensors = _tensors(parts)
    entries = [Entry(name, stored.shape, stored.scheme) for name, stored in tensors.items()]
    groups = split(
        entries,
        max_bytes=max_bytes,
        max_tensors=max_tensors,
        bare_first=bare_first,
        alignment=alignment_of(metadata),
    )
    keys = split_metadata(metadata, [len(group) for group in groups])
    places = [layout(pairs, group, all_dims=True) for pairs, group in zip(keys, groups, strict=True)]
    targets = _targets(out, len(places))
    for target in targets:
        _check_target(target, [part.file for part in parts], overwrite)
    if not dry_run:
        _write(targets, places, tensors)
    return Rewritten(tuple(targets), tuple(place.size for place in places), len(tensors))


def _metadata(parts: Sequence[Part]) -> dict[str, Value]:
    """Returns the metadata of all parts; where two say different things, the first counts."""
    metadata: dict[str, Value] = {}
    for part in parts:
        metadata |= {key: value for key, value in read_values(part.file).items() if key not in metadata}
    return metadata


def _tensors(parts: Sequence[Part]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for part in parts:
        if twice := sorted(part.tensors.keys() & tensors.keys()):
            raise InputError(f"{part.file}: tensor '{twice[0]}' is held by two parts")
        tensors |= part.tensors
    return tensors


def _targets(out: Path, count: int) -> list[Path]:
    if out.is_dir():
        raise UsageError(f"{out}: is a folder", "name a file in it")
    if PART_NAME.fullmatch(out.name):
        raise UsageError(f"{out}: is the name of a part, not of a model", "leave out the numbers")
    return [out.with_name(name) for name in part_names(out.name.removesuffix(".gguf"), count)]


def _check_target(target: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Refuses a target that exists, and always one that is a file of the source, by whatever name."""
    if not target.exists() and not target.is_symlink():
        return
    if any(target.exists() and target.samefile(source) for source in sources):
        raise UsageError(f"{target}: output and input are the same", "choose another name")
    if not overwrite or target.is_dir():
        raise UsageError(f"{target}: exists already", "say --overwrite, or choose another name")


def _write(targets: Sequence[Path], places: Sequence[Layout], tensors: dict[str, Stored]) -> None:
    """Makes all files, then gives them their names."""
    partial = [target.with_name(f".{target.name}.partial") for target in targets]
    with ExitStack() as stack:
        stack.enter_context(system_errors(targets[0], "choose another place"))
        # First all of them in full size: a disk that is too small shows now.
        descriptors = []
        for path, place in zip(partial, places, strict=True):
            stack.callback(path.unlink, missing_ok=True)
            descriptors.append(create(path, place))
            stack.callback(os.close, descriptors[-1])
        for descriptor, path, place in zip(descriptors, partial, places, strict=True):
            fill(descriptor, place, tensors)
            check(path, place)
        for path, target in reversed(list(zip(partial, targets, strict=True))):
            path.replace(target)
        sync_folder(targets[0])
