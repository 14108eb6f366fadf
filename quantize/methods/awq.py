"""AWQ: scale input channels before rounding, clip groups, then round to nearest.

Lin et al. 2023, arXiv 2306.00978. A positive scale s per input channel makes important columns finer on the grid,
`Q(W diag(s)) diag(s)^-1`, and `diag(s)^-1` is folded into what produces the input. Where the authors run the module
for each candidate, the error is computed here from the Hessian H of the input alone: the output's squared error is
`tr((Q - W) H (Q - W)^T)`, summed over the linears that share the input. No scaling is always a candidate and wins
ties, so the result is never worse than rounding to nearest on this measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from quantize.methods.base import ROWS, Block, Prepared, Result, encode
from quantize.parallel import Pool
from quantize.schemes import QuantizedTensor, Scheme, Spanned
from quantize.statistics import Statistics
from quantize.structure import Fold, Input, fold_all, grouped

# Twice as many steps lowered the error of no block that was tried by more than 2 %.
_GRID = 10
# Rows that judge a candidate scale, evenly spread over the consumers, for all rows share the scale. Half as many gave
# errors within 1 %, a quarter up to 5 % larger ones.
_JUDGES = 1024
# Factors on a group's lower and upper extreme, in all pairs: moving the sides apart took off another 7 %.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


class AWQ:
    """Activation-aware scaling and clipping for affine integer grids."""

    name = "awq"
    summary = "channel scales and clipping from activations, then round to nearest; minutes"
    calibrates = True
    sequential = False
    transforms = False
    tokens_per_column = 0

    def reject(self, scheme: Scheme) -> str | None:
        """Returns a reason for grids that span no range: clipping moves its ends."""
        return None if isinstance(scheme, Spanned) else "awq clips affine integer grids only"

    def prepare(self, block: Block, pool: Pool) -> Prepared | None:
        """Returns None: all is done at once."""
        return None

    def quantize(self, block: Block, pool: Pool) -> Result:
        """Returns the block scaled, clipped and rounded."""
        scales, notes = search_scales(block, pool)
        while True:
            coded, changed, worse = _round(block, scales, pool)
            if not worse:
                break
            for name in worse:  # the sampled rows misjudged this one: no scale cannot be worse
                del scales[name]
        lost = sorted(set(block.schemes) - {n for item in block.inputs for n in item.consumers if n in coded})
        for name in lost:
            notes.append(f"{name}: saw no calibration token, rounded to nearest")
            coded[name] = encode(block.schemes[name], changed.get(name, block.weights[name]), pool)
        plain = {name: value for name, value in changed.items() if name not in block.schemes}
        targets = {name: value for name, value in changed.items() if name in block.schemes}
        return Result(coded, plain, targets, tuple(notes))


def search_scales(block: Block, pool: Pool) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the scales of a block's inputs, by input name one factor per producer row, and local fallbacks."""
    scales: dict[str, Tensor] = {}
    notes: list[str] = []
    for group in grouped(block.inputs):
        found = _search(group, block, pool)
        if found.note:
            notes.append(f"{block.name}: {found.note}")
        if found.scale is not None:
            scales |= {item.name: found.scale for item in group}
    return scales, notes


@dataclass(frozen=True, slots=True)
class _Found:
    """A scale per producer row, or None for no scaling, and what went wrong, if anything."""

    scale: Tensor | None
    note: str = ""


def _search(group: Sequence[Input], block: Block, pool: Pool) -> _Found:
    """Returns the best scale of the inputs that share a fold; each counts by its tokens."""
    item, fold = group[0], group[0].fold
    seen = [(other, block.statistics[other.name]) for other in group if other.name in block.statistics]
    consumers = [(name, stats) for other, stats in seen for name in other.consumers if name in block.schemes]
    if fold is None or not consumers:
        return _Found(None)
    statistics = max((stats for _, stats in seen), key=lambda stats: stats.count)
    channels = fold.row_of(item.width)
    judges = [_judges(block.weights[name], len(consumers)) for name, _ in consumers]
    schemes = [block.schemes[name] for name, _ in consumers]

    def loss(rows: Tensor | None) -> float:
        total = 0.0
        for (_, stats), weight, scheme in zip(consumers, judges, schemes, strict=True):
            assert isinstance(scheme, Spanned)
            columns = torch.ones(item.width) if rows is None else rows[channels]
            scaled = weight * columns
            low, high = scheme.extremes(scaled)
            error = scheme.round_trip(scaled, low, high) / columns - weight
            total += stats.count / statistics.count * float(_quadratic(error, stats.hessian).double().sum())
        return total

    candidates = [None, *_candidates(item, statistics, judges, schemes[0])]
    candidates = [c if c is None else _storable(fold, c, block) for c in candidates]
    losses = list(pool.map(loss, candidates))
    finite = [(value, index) for index, value in enumerate(losses) if value == value and value != float("inf")]
    if not finite:
        return _Found(None, f"no finite error for {item.name}, kept unscaled")
    return _Found(candidates[min(finite)[1]])


def _judges(weight: Tensor, consumers: int) -> Tensor:
    """Returns evenly spread rows of one of `consumers` matrices."""
    step = max(1, len(weight) * consumers // _JUDGES)
    return weight[::step]


def _candidates(item: Input, statistics: Statistics, judges: list[Tensor], scheme: Scheme) -> Iterator[Tensor]:
    """Yields scales per producer row: the paper's `x^r` and AutoAWQ's `x^r / w^(1-r)`, r from 0 to 1."""
    assert item.fold is not None
    assert isinstance(scheme, Spanned)
    x = _by_row(statistics.mean_abs, item.fold)
    parts = torch.cat([weight.abs().reshape(len(weight), -1, scheme.group(item.width)) for weight in judges])
    w = _by_row((parts / (parts.amax(-1, keepdim=True) + 1e-6)).flatten(-2).mean(0), item.fold)
    for step in range(_GRID + 1):
        r = step / _GRID
        for scale in (x.pow(r), x.pow(r) / (w.pow(1 - r) + 1e-4)):
            scale = scale.clamp_min(1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            yield torch.where(scale.isfinite() & (scale > 0), scale, 1.0)


def _by_row(values: Tensor, fold: Fold) -> Tensor:
    """Returns the mean of channel `values` `[width]` over the channels that each producer row feeds."""
    rows = fold.row_of(len(values))
    count = int(rows.max()) + 1
    return torch.zeros(count).index_add_(0, rows, values) / torch.bincount(rows, minlength=count)


def _storable(fold: Fold, scale: Tensor, block: Block) -> Tensor:
    """Returns the scale that the producer, rounded to the dtype it is stored in, really takes back.

    A norm's gain in bfloat16 carries 8 bits: the consumers are scaled by what it became, not by what was meant.
    """
    weight = block.weights[fold.producer]
    if weight.dim() != 1 or fold.producer in block.schemes:
        return scale
    shift = 1.0 if fold.offset else 0.0
    before = weight[fold.start : fold.start + len(scale)] + shift
    new = fold.apply(block.weights, scale)[fold.producer][fold.start : fold.start + len(scale)]
    after = new.to(block.dtypes[fold.producer]).float() + shift
    exact = before / after
    return torch.where((after != 0) & (before != 0) & exact.isfinite(), exact, scale)


def _round(
    block: Block, scales: Mapping[str, Tensor], pool: Pool
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor], list[str]]:
    """Returns coded tensors, folded tensors, and the inputs by whose scales an error exceeds rounding to nearest."""
    changed = fold_all(block.inputs, block.weights, scales)
    coded: dict[str, QuantizedTensor] = {}
    worse: list[str] = []
    for group in grouped(block.inputs):
        before = after = 0.0
        changers = _changers(group, block, scales)
        for item in group:
            statistics = block.statistics.get(item.name)
            if statistics is None:
                continue
            columns = columns_of(item, scales)
            hessian = statistics.hessian / torch.outer(columns, columns)
            for name in (n for n in item.consumers if n in block.schemes):
                weight = changed.get(name, block.weights[name])
                coded[name], row_loss = _clip(weight, hessian, block.schemes[name], pool)
                rows = _row_factors(name, block, scales)
                after += statistics.count * float((row_loss * rows.square()).double().sum())
                if changers:
                    loss = _nearest_loss(block.weights[name], statistics.hessian, block.schemes[name], pool)
                    before += statistics.count * loss
        if changers and not after <= before:
            worse += [name for name in changers if name not in worse]
    return coded, changed, worse


def _changers(group: Sequence[Input], block: Block, scales: Mapping[str, Tensor]) -> list[str]:
    """Returns the inputs whose scales changed the matrices of a group: its own, or else those that its rows took back.

    Rows divided by a scale round as before, but for the float16 scales of groups that become very small.
    """
    consumers = {name for item in group for name in item.consumers}
    rest = [item.name for item in block.inputs if item.fold is not None and item.fold.producer in consumers]
    return [item.name for item in group if item.name in scales] or [name for name in rest if name in scales]


def columns_of(item: Input, scales: Mapping[str, Tensor]) -> Tensor:
    """Returns the scale of each channel of an input."""
    if item.fold is None or item.name not in scales:
        return torch.ones(item.width)
    return scales[item.name][item.fold.row_of(item.width)]


def _row_factors(name: str, block: Block, scales: Mapping[str, Tensor]) -> Tensor:
    """Returns by what each row of a tensor was divided when it took another input's scale back."""
    factors = torch.ones(len(block.weights[name]))
    for item, *_ in grouped(block.inputs):
        if item.fold is not None and item.fold.producer == name and item.name in scales:
            scale = scales[item.name]
            factors[item.fold.start : item.fold.start + len(scale)] *= scale
    return factors


def _clip(weight: Tensor, hessian: Tensor, scheme: Scheme, pool: Pool) -> tuple[QuantizedTensor, Tensor]:
    """Returns `weight` rounded with each group's extremes shrunk where that lowers the error, and each row's error.

    Groups choose by the diagonal blocks of the Hessian, `[group, group]` each; a row keeps its choices only if its
    whole error, all of the Hessian counted, falls.
    """
    assert isinstance(scheme, Spanned)
    group = scheme.group(weight.shape[-1])
    count = weight.shape[-1] // group
    blocks = torch.stack([hessian[i * group : (i + 1) * group, i * group : (i + 1) * group] for i in range(count)])

    def chunk(span: tuple[int, int]) -> tuple[QuantizedTensor, Tensor]:
        part = weight[span[0] : span[1]]
        low, high = scheme.extremes(part)

        def group_error(lo: Tensor, hi: Tensor) -> Tensor:
            error = scheme.round_trip(part, lo, hi) - part
            columns = error.reshape(len(part), count, group).transpose(0, 1)  # [count, rows, group]
            return torch.einsum("grk,grk->rg", columns @ blocks, columns)

        best, factor_low, factor_high = group_error(low, high), torch.ones_like(low), torch.ones_like(high)
        for f_low, f_high in product(_SHRINK, repeat=2):
            error = group_error(low * f_low, high * f_high)
            better = error < best
            best = torch.where(better, error, best)
            factor_low = torch.where(better, f_low, factor_low)
            factor_high = torch.where(better, f_high, factor_high)
        plain = _row_errors(part, low, high, scheme, hessian)
        clipped = _row_errors(part, low * factor_low, high * factor_high, scheme, hessian)
        keep = (clipped < plain).unsqueeze(-1)
        low = torch.where(keep, low * factor_low, low)
        high = torch.where(keep, high * factor_high, high)
        return scheme.encode_within(part, low, high), torch.minimum(plain, clipped)

    parts = list(pool.map(chunk, pool.spans(len(weight), ROWS)))
    arrays = {key: torch.cat([coded.arrays[key] for coded, _ in parts]) for key in parts[0][0].arrays}
    return QuantizedTensor(scheme, tuple(weight.shape), arrays), torch.cat([error for _, error in parts])


def _row_errors(weight: Tensor, low: Tensor, high: Tensor, scheme: Spanned, hessian: Tensor) -> Tensor:
    return _quadratic(scheme.round_trip(weight, low, high) - weight, hessian)


def _nearest_loss(weight: Tensor, hessian: Tensor, scheme: Scheme, pool: Pool) -> float:
    """Returns the error of rounding to nearest without scale or clipping."""
    assert isinstance(scheme, Spanned)

    def chunk(span: tuple[int, int]) -> float:
        part = weight[span[0] : span[1]]
        low, high = scheme.extremes(part)
        return float(_row_errors(part, low, high, scheme, hessian).double().sum())

    return sum(pool.map(chunk, pool.spans(len(weight), ROWS)))


def _quadratic(error: Tensor, hessian: Tensor) -> Tensor:
    """Returns e H e^T of each row e; `[rows]`."""
    return (error @ hessian).mul_(error).sum(-1)
