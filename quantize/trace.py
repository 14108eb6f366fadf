"""The structure of a block, found by running it: which linears share an input, and what scales that input.

No table of architectures. The block is run on a small batch once as it is and once for each tensor that could be a
producer, with that tensor's rows scaled by known factors. Where every channel of a linear's input then changes by
exactly one of these factors, the tensor feeds that input, and a scale of the input's channels can be folded into it
(AWQ, Lin et al. 2023, arXiv 2306.00978, section 3). All folds found are then tried together with random scales: the
block's output must not change, or they are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.skeleton import Skeleton
from quantize.structure import Fold, Input, fold_all
from quantize.sweep import Site, Stage

# A channel follows a factor when what is left of it is below this share of its norm: far above float32 noise, far
# below what any wrong guess leaves.
_FOLLOWS = 1e-3
_UNCHANGED = 3e-4


@dataclass(frozen=True, slots=True)
class Structure:
    """What tracing found in one block.

    Attributes:
        inputs: The block's inputs of linears, in the order of their use.
        sites: Site of one application of each input, by which its statistics are gathered.
    """

    inputs: tuple[Input, ...]
    sites: Mapping[Site, str]


def trace(stage: Stage, skeleton: Skeleton) -> Structure:
    """Returns the structure of the stage's block, traced with its probe batch.

    The block's weights are exchanged and put back; the batches do not move.
    """
    calls, output = _run(stage)
    inputs, sites, positions = _group(calls, stage, skeleton)
    structure = Structure(_with_folds(stage, inputs, positions, calls, skeleton), sites)
    stage.load()
    kept = _sound(stage, structure.inputs, output)
    stage.load()
    return Structure(kept, sites)


def _run(stage: Stage) -> tuple[list[tuple[Site, Tensor]], list[Tensor]]:
    """Returns every linear application with its input, in order, and the block's output.

    The inputs are kept alive meanwhile, so that equal addresses mean the same tensor.
    """
    calls: list[tuple[Site, Tensor]] = []
    output = stage.probe(lambda site, x: calls.append((site, x)))
    return calls, output


def _group(
    calls: Sequence[tuple[Site, Tensor]], stage: Stage, skeleton: Skeleton
) -> tuple[list[Input], dict[Site, str], list[int]]:
    """Returns the inputs, the site that stands for each, and the position of that site in `calls`."""
    consumers: dict[tuple[int, int], list[str]] = {}
    first: dict[tuple[int, int], int] = {}
    seen: set[str] = set()
    for position, (site, x) in enumerate(calls):
        names = _stored(site, skeleton)
        if not names or names[0] in seen or x.shape[-1] != stage.weights[names[0]].shape[-1]:
            continue
        seen.update(names)
        key = (x.data_ptr(), x.numel())
        first.setdefault(key, position)
        consumers.setdefault(key, []).extend(names)
    inputs = [Input(names[0], tuple(names), calls[first[key]][1].shape[-1]) for key, names in consumers.items()]
    sites = {calls[first[key]][0]: names[0] for key, names in consumers.items()}
    return inputs, sites, [first[key] for key in consumers]


def _stored(site: Site, skeleton: Skeleton) -> tuple[str, ...]:
    """Returns the stored matrices that are multiplied at a site; none where transformers mixes them otherwise."""
    parameter, index = site
    conversion = next((c for c in skeleton.conversions.values() if parameter in c.outputs), None)
    if conversion is None:
        return ()
    if index < 0:
        return conversion.names if len(conversion.names) == 1 == len(conversion.outputs) else ()
    stacked = [names for names in conversion.sources.values() if len(names) > index]
    return tuple(names[index] for names in stacked) if len(stacked) == len(conversion.sources) else ()


def _candidates(stage: Stage, widths: set[int]) -> Iterator[tuple[str, str | None, int, int]]:
    """Yields `(weight, bias, start, rows)` of the tensors whose rows could feed an input."""
    heads = _head_repeats(stage)
    possible = widths | {width // repeat for width in widths for repeat in heads if width % repeat == 0}
    for name, weight in stage.weights.items():
        if not name.endswith(".weight") or weight.dim() not in (1, 2):
            continue
        bias = name.removesuffix("weight") + "bias"
        present = bias if bias in stage.weights else None
        count = weight.shape[0]
        if count in possible:
            yield name, present, 0, count
        if weight.dim() == 2:  # the last rows of a fused matrix: values after queries and keys, up after gate
            yield from ((name, present, count - rows, rows) for rows in sorted(possible) if count > rows >= count // 8)


def _head_repeats(stage: Stage) -> set[int]:
    """Returns how many query heads can share a key-value head: 1, and what the attention modules say."""
    stated = {getattr(module, "num_key_value_groups", 1) for module in stage.module.modules()}
    return {1} | {repeat for repeat in stated if isinstance(repeat, int) and repeat > 1}


def _with_folds(
    stage: Stage,
    inputs: list[Input],
    positions: list[int],
    calls: Sequence[tuple[Site, Tensor]],
    skeleton: Skeleton,
) -> tuple[Input, ...]:
    """Returns the inputs with the folds that single trials suggest; norms are preferred to linears."""
    found: dict[str, Fold] = {}
    base = [calls[position][1].float() for position in positions]
    order = sorted(_candidates(stage, {item.width for item in inputs}), key=lambda c: (stage.weights[c[0]].dim(), c[2]))
    repeats = _head_repeats(stage)
    generator = torch.Generator().manual_seed(0)
    for name, bias, start, rows in order:
        if all(item.name in found for item in inputs):
            break
        factors = torch.empty(rows).uniform_(0.5, 2.0, generator=generator)
        for offset in (False, True) if stage.weights[name].dim() == 1 else (False,):
            draft = Fold(name, bias, offset, start, rows, 1)
            stage.load(draft.apply(stage.weights, 1.0 / factors))
            changed, _ = _run(stage)
            if [site for site, _ in changed] != [site for site, _ in calls]:
                continue
            for item, x, position in zip(inputs, base, positions, strict=True):
                if item.name not in found and name not in item.consumers:
                    fold = _explains(draft, factors, x, changed[position][1].float(), repeats, skeleton)
                    if fold is not None:
                        found[item.name] = fold
    return tuple(replace(item, fold=found.get(item.name)) for item in inputs)


def _explains(
    draft: Fold, factors: Tensor, before: Tensor, after: Tensor, repeats: set[int], skeleton: Skeleton
) -> Fold | None:
    """Returns the fold under which `after` is `before` with its channels scaled by `factors`, or None."""
    x, y = before.flatten(0, -2), after.flatten(0, -2)
    width, rows = x.shape[-1], len(factors)
    if width % rows or width // rows not in repeats:
        return None
    repeat = width // rows
    head = getattr(skeleton.model.config.get_text_config(), "head_dim", None)
    runs = [rows] if repeat == 1 else [d for d in (head, *range(rows, 0, -1)) if d and rows % d == 0]
    norm = x.norm(dim=0)
    if not bool((norm > 0).any()):
        return None
    for run in runs:
        fold = replace(draft, width=run, repeat=repeat)
        left = (y - x * factors[fold.row_of(width)]).norm(dim=0)
        if bool((left <= _FOLLOWS * norm).all()):
            return fold
    return None


def _sound(stage: Stage, inputs: tuple[Input, ...], output: list[Tensor]) -> tuple[Input, ...]:
    """Returns the inputs without the folds that change the block's output under random scales."""
    generator = torch.Generator().manual_seed(1)
    scales = {
        item.name: torch.empty(int(item.fold.row_of(item.width).max()) + 1).uniform_(0.5, 2.0, generator=generator)
        for item in inputs
        if item.fold is not None
    }
    if not scales or unchanged(stage, inputs, scales, output):
        return inputs
    good = {name for name, scale in scales.items() if unchanged(stage, inputs, {name: scale}, output)}
    return tuple(item if item.name in good else replace(item, fold=None) for item in inputs)


def unchanged(stage: Stage, inputs: Iterable[Input], scales: Mapping[str, Tensor], output: Sequence[Tensor]) -> bool:
    """Returns whether the block's output on the probe stays `output` when the inputs in `scales` are folded.

    The folded weights stay loaded in the module.
    """
    stage.load(fold_all(inputs, stage.weights, scales))
    _, folded = _run(stage)
    return all(_same(a, b) for a, b in zip(output, folded, strict=True))


def _same(before: Tensor, after: Tensor) -> bool:
    """Compares channel by channel: one huge channel must not hide a change in the others."""
    a, b = before.float().flatten(0, -2), after.float().flatten(0, -2)
    scale = a.norm(dim=0)
    floor = scale.square().mean().sqrt() * 1e-2
    return bool(((b - a).norm(dim=0) <= _UNCHANGED * (scale + floor)).all())
