"""Importance matrices: from what calibration saw, added up, looked at, and laid beside a model's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.gguf.imatrix import Floats, Importance, ImportanceMatrix
from quantize.schemes import Shape

# Tensors that are looked up or, as a rule, not observed: nobody misses importance for them.
_UNOBSERVED = frozenset(
    {"token_embd.weight", "position_embd.weight", "token_types.weight", "per_layer_token_embd.weight", "output.weight"}
)
_DEFAULT_CHUNK = 512
# An expert that saw fewer tokens than this share of an even split knows its input badly.
_RARE = 0.05
_ACTIVE = 1e-5


class Observed(Protocol):
    """What is needed of a site's statistics."""

    @property
    def count(self) -> int:
        """Tokens seen."""

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2, float32 [columns]."""


# The statistics of a stored tensor: of its input; for a stored stack of experts those of each, None for one that no
# token reached; None where nothing was observed.
SiteOf = Callable[[str], "Observed | Sequence[Observed | None] | None"]


def gather(
    sources: Mapping[str, tuple[str, ...]],
    site_of: SiteOf,
    *,
    shapes: Mapping[str, Shape] | None = None,
    columns: Mapping[str, Tensor] | None = None,
) -> dict[str, Importance]:
    """Returns the importance of GGUF tensors from what was observed at the inputs of their sources.

    A tensor of several sources is a stack, a matrix for each, unless all of them were observed at one input (fused
    query, key and value). Tensors of which nothing was observed are left out.

    Args:
        sources: Stored names that each GGUF tensor is made of, in its order; experts one after the other.
        site_of: Statistics by stored name. Sources that share an input give the same object.
        shapes: Shapes of the GGUF tensors in torch's order. They say how many matrices a stack has, so that several
            sources can make one matrix of it; and what was observed with another number of columns is left out.
        columns: For tensors whose columns are others: column k of the tensor is column `columns[name][k]` of what was
            observed, int64 [columns], or [matrices, columns].
    """
    found: dict[str, Importance] = {}
    for name, names in sources.items():
        seen = [site_of(source) for source in names]
        shape = None if shapes is None else shapes[name]
        stack = _stack(seen, None if shape is None else int(np.prod(shape[:-2], dtype=np.int64)))
        known = next((site for site in stack if site is not None and site.count), None)
        order = None if columns is None else columns.get(name)
        width = 0 if known is None else known.mean_square.numel() if order is None else order.shape[-1]
        if known is None or (shape is not None and width != shape[-1]):
            continue
        counts = np.array([0 if site is None else site.count for site in stack], np.float32)
        sums = np.zeros((len(stack), known.mean_square.numel()), np.float32)
        for row, site in zip(sums, stack, strict=True):
            if site is not None and site.count:
                row[:] = site.mean_square.numpy() * np.float32(site.count)
        if order is not None:
            sums = np.take_along_axis(sums, np.broadcast_to(order.numpy(), (len(sums), width)), axis=1)
        found[name] = Importance(sums, counts)
    return found


def _stack(seen: Sequence[Observed | Sequence[Observed | None] | None], matrices: int | None) -> list[Observed | None]:
    """Returns what was observed for each matrix of a tensor."""
    flat: list[Observed | None] = []
    for site in seen:
        flat.extend(site if isinstance(site, Sequence) else [site])
    if matrices is None:
        return flat[:1] if all(site is flat[0] for site in flat) else flat
    if len(flat) == 1:
        return flat * matrices
    if matrices == 0 or len(flat) % matrices:
        return []
    each = len(flat) // matrices
    groups = [flat[start : start + each] for start in range(0, len(flat), each)]
    return [next((site for site in group if site is not None), None) for group in groups]


def merge(matrices: Sequence[ImportanceMatrix]) -> ImportanceMatrix:
    """Returns one importance matrix for the texts of all: sums and counts are added.

    Older files count pieces of text and not tokens; they are taken for pieces as long as the others'.

    Raises:
        InputError: two of them have an entry of different size.
    """
    size = next((matrix.chunk_size for matrix in matrices if matrix.chunk_size), 0)
    total: dict[str, Importance] = {}
    for matrix in matrices:
        scale = np.float32(size if size and not matrix.chunk_size else 1)
        for name, entry in matrix.entries.items():
            part = Importance(entry.sums * scale, entry.counts * scale)
            total[name] = part if name not in total else _added(name, total[name], part)
    return ImportanceMatrix(
        dict(sorted(total.items())),
        tuple(dict.fromkeys(name for matrix in matrices for name in matrix.datasets)),
        sum(matrix.chunk_count for matrix in matrices),
        size,
    )


def _added(name: str, one: Importance, other: Importance) -> Importance:
    deep = max(one, other, key=lambda entry: len(entry.counts)).sums.shape
    a, b = one.shaped(*deep), other.shaped(*deep)
    if a is None or b is None:
        raise InputError(
            f"'{name}' has {one.sums.size} columns in one importance matrix, {other.sums.size} in another",
            "merge files of one model only",
        )
    return Importance(a.sums + b.sums, a.counts + b.counts)


def select(matrix: ImportanceMatrix, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> ImportanceMatrix:
    """Returns the entries whose names contain any of `include` (all if empty) and none of `exclude`."""
    kept = {
        name: entry
        for name, entry in matrix.entries.items()
        if (not include or any(piece in name for piece in include)) and not any(piece in name for piece in exclude)
    }
    return replace(matrix, entries=kept)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How well the experts of one stack were observed.

    Attributes:
        name: The stack.
        experts: How many there are.
        unseen: Experts that no token reached; they are rounded without importance.
        rare: Experts that saw some tokens, but less than a twentieth of an even share.
    """

    name: str
    experts: int
    unseen: tuple[int, ...]
    rare: tuple[int, ...]


def coverage(matrix: ImportanceMatrix) -> list[Coverage]:
    """Returns the coverage of every stack of experts."""
    rows: list[Coverage] = []
    for name, entry in matrix.entries.items():
        if len(entry.counts) > 1:
            few = entry.counts < _RARE * entry.counts.mean()
            unseen, rare = np.nonzero(entry.counts == 0)[0], np.nonzero(few & (entry.counts > 0))[0]
            rows.append(Coverage(name, len(entry.counts), tuple(unseen.tolist()), tuple(rare.tolist())))
    return rows


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one entry over the mean squares of its columns, those of unreached experts left out.

    Attributes:
        name: The weight.
        layer: Its layer, -1 for one outside.
        columns: How many figures there are.
        total: Their sum.
        low: The smallest.
        high: The largest.
        mean: Their mean.
        deviation: Their standard deviation.
        active: Share of those above 1e-5.
        entropy: Of their shares of the sum, in bits.
        evenness: Entropy by its largest possible value, 0 to 1.
        outliers: Share of those more than one deviation above the mean.
        likeness: Cosine to the same weight one layer before; None if there is none.
    """

    name: str
    layer: int
    columns: int
    total: float
    low: float
    high: float
    mean: float
    deviation: float
    active: float
    entropy: float
    evenness: float
    outliers: float
    likeness: float | None


_LAYER = re.compile(r"blk\.(\d+)\.")


def statistics(matrix: ImportanceMatrix) -> list[Row]:
    """Returns a row for every entry that saw tokens, by name: the figures of llama-imatrix --show-statistics."""
    return [
        _row(name, entry, matrix.entries.get(_before(name)))
        for name, entry in matrix.entries.items()
        if entry.counts.any()
    ]


def _before(name: str) -> str:
    """Returns the name of the same weight one layer before; of none, one that no weight has."""
    found = _LAYER.search(name)
    return "" if found is None else f"{name[: found.start(1)]}{int(found[1]) - 1}{name[found.end(1) :]}"


def _row(name: str, entry: Importance, before: Importance | None) -> Row:
    seen = entry.counts > 0
    values = (entry.sums[seen] / entry.counts[seen, None]).astype(np.float64).ravel()
    total, mean, deviation = float(values.sum()), float(values.mean()), float(values.std())
    shares = values[values > 0] / total if total > 0 else values[:0]
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
    found = _LAYER.search(name)
    return Row(
        name=name,
        layer=int(found[1]) if found else -1,
        columns=values.size,
        total=total,
        low=float(values.min()),
        high=float(values.max()),
        mean=mean,
        deviation=deviation,
        active=float((values > _ACTIVE).mean()),
        entropy=entropy,
        evenness=entropy / float(np.log2(values.size)) if values.size > 1 else 1.0,
        outliers=float((values > mean + deviation).mean()) if deviation > 0 else 0.0,
        likeness=None if before is None else _cosine(entry.sums, before.sums),
    )


def _cosine(a: Floats, b: Floats) -> float | None:
    if a.size != b.size:
        return None
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / length if length > 0 else None


@dataclass(frozen=True, slots=True)
class Match:
    """An importance matrix laid beside a model.

    Attributes:
        found: Importance by the model's tensor names, each of its tensor's shape.
        missing: The model's tensors without importance; those that are looked up, and the head, are not counted.
        unused: Entries that no tensor of the model took.
    """

    found: dict[str, Importance]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


# Weights with the same input, by parts of names: a file that has one of them serves the others.
_SAME_INPUT = (
    (".attn_q.", ".attn_k.", ".attn_v.", ".attn_qkv."),
    (".ffn_up.", ".ffn_gate.", ".ffn_gate_up."),
    (".ffn_up_exps.", ".ffn_gate_exps.", ".ffn_gate_up_exps."),
)
_STACK = re.compile(r"(.*\.ffn_\w+)_exps(\.weight)")
_ONE = re.compile(r"(.*\.ffn_\w+)\.(\d+)(\.weight)")


def match(matrix: ImportanceMatrix, tensors: Mapping[str, Shape], path: object = "the importance matrix") -> Match:
    """Returns the importance of a model's tensors.

    Names may differ as they do between versions of llama.cpp: experts one by one or stacked, and fused matrices.

    Args:
        matrix: The importance matrix.
        tensors: Shapes in torch's order of the tensors that importance is wanted for.
        path: What to call it in errors.

    Raises:
        InputError: no tensor is matched at all, or an entry has another size than its tensor.
    """
    found: dict[str, Importance] = {}
    used: set[str] = set()
    for name, shape in tensors.items():
        names, entry = _entry(matrix, name, shape)
        if entry is None:
            continue
        used.update(names)
        shaped = entry.shaped(int(np.prod(shape[:-2], dtype=np.int64)), shape[-1])
        if shaped is not None:
            found[name] = shaped
        elif name not in _UNOBSERVED:
            what = f"'{names[0]}' has {entry.sums.size} values, the model's {name} {list(shape)} needs "
            what += f"{int(np.prod(shape[:-2], dtype=np.int64)) * shape[-1]}"
            raise InputError(f"{path}: {what}", "it belongs to another model")
    wanted = [name for name in tensors if name not in _UNOBSERVED]
    if wanted and not any(name in found for name in wanted):
        has = next(iter(matrix.entries), "nothing")
        what = f"none of the model's {len(wanted)} tensors matched: the file has '{has}', the model '{wanted[0]}'"
        raise InputError(f"{path}: {what}", "it belongs to another model")
    missing = tuple(name for name in wanted if name not in found)
    return Match(found, missing, tuple(name for name in matrix.entries if name not in used))


def _entry(matrix: ImportanceMatrix, name: str, shape: Shape) -> tuple[list[str], Importance | None]:
    """Returns the names of the entries that serve a tensor, and their importance as one."""
    for alias in _aliases(name):
        if alias in matrix.entries:
            return [alias], matrix.entries[alias]
        if (stack := _STACK.fullmatch(alias)) is not None and len(shape) > 2:
            names = [f"{stack[1]}.{expert}{stack[2]}" for expert in range(shape[0])]
            if any(each in matrix.entries for each in names):
                return [each for each in names if each in matrix.entries], _joined(matrix, names, shape[-1])
        if (one := _ONE.fullmatch(alias)) is not None:
            stacked = matrix.entries.get(f"{one[1]}_exps{one[3]}")
            if stacked is not None and (part := _slice(stacked, int(one[2]), shape[-1])) is not None:
                return [f"{one[1]}_exps{one[3]}"], part
    return [], None


def _aliases(name: str) -> Iterable[str]:
    """Yields a name, then those of weights that have the same input."""
    yield name
    for group in _SAME_INPUT:
        for piece in group:
            if piece in name:
                yield from (name.replace(piece, other) for other in group if other != piece)


def _joined(matrix: ImportanceMatrix, names: Sequence[str], columns: int) -> Importance:
    """Returns experts stored one by one as a stack; those that the file lacks were not seen."""
    sums, counts = np.zeros((len(names), columns), np.float32), np.zeros(len(names), np.float32)
    for place, name in enumerate(names):
        part = matrix.entries.get(name)
        shaped = None if part is None else part.shaped(1, columns)
        if shaped is not None:
            sums[place], counts[place] = shaped.sums[0], shaped.counts[0]
    return Importance(sums, counts)


def _slice(stacked: Importance, expert: int, columns: int) -> Importance | None:
    """Returns one expert of a stack."""
    if stacked.sums.size % columns or not 0 <= expert < stacked.sums.size // columns:
        return None
    whole = stacked.shaped(stacked.sums.size // columns, columns)
    return None if whole is None else Importance(whole.sums[expert : expert + 1], whole.counts[expert : expert + 1])
