"""The structure of a block, found by running it: which linears share an input, and what scales that input.

No table of architectures. The block is run on a small batch once as it is and once for each tensor that could be a
producer, with that tensor's rows scaled by known factors. Where every channel of a linear's input then changes by
exactly one of these factors, the tensor feeds that input, and a scale of the input's channels can be folded into it
(AWQ, Lin et al. 2023, arXiv 2306.00978, section 3). The linears found get their columns scaled back, and the trial is
repeated: a router then decides as before, and its experts' inputs, cut out of the same tensor, show the same factors.
All folds found are then tried together with random scales: the block's output must not change, or they are dropped.

Experts that transformers keeps in one stack are alike: what is found for those that the batch reaches holds for all.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.schemes import Shape
from quantize.skeleton import Skeleton
from quantize.structure import Fold, Input, fold_all, grouped
from quantize.sweep import Site, Stage, Trial

# A channel follows a factor when what is left of it is below this share of its norm: far above float32 noise, far
# below what any wrong guess leaves.
_FOLLOWS = 1e-3
_UNCHANGED = 3e-4
_MATRIX = 2


@dataclass(frozen=True, slots=True)
class Structure:
    """What tracing found in one block.

    Attributes:
        inputs: The block's inputs of linears, in the order of their use.
        sites: Site of one application of each input, by which its statistics are gathered.
    """

    inputs: tuple[Input, ...]
    sites: Mapping[Site, str]


# What blocks of one make have in common: by the names and shapes of their tensors, the fold of each input, by its
# consumers. Names are without the part that is the block's own.
Known = dict[tuple[tuple[str, Shape], ...], dict[tuple[str, ...], Fold | None]]


def trace(stage: Stage, skeleton: Skeleton, known: Known | None = None, *, folds: bool = True) -> Structure:
    """Returns the structure of the stage's block, traced with its probe batch.

    The block's weights are exchanged and put back; the batches do not move.

    Args:
        stage: The block.
        skeleton: The model.
        known: What earlier blocks had; what this one has is added. A block of a known make is searched only if the
            check does not find the known folds sound in it.
        folds: Whether folds are searched at all; without them one run of the probe tells everything.
    """
    base = stage.probe(ask_used=True)
    inputs = _inputs(base, stage, skeleton)
    items = tuple(inputs.values())
    if folds:
        items = _with_folds(stage, inputs, base, skeleton, {} if known is None else known)
        stage.load()
    return Structure(items, {site: item.name for site, item in inputs.items()})


def _with_folds(
    stage: Stage, inputs: Mapping[Site, Input], base: Trial, skeleton: Skeleton, known: Known
) -> tuple[Input, ...]:
    """Returns the inputs with their folds. The module is left with other weights than the stage's."""
    prefix = os.path.commonprefix(list(stage.weights))  # noqa: RUF071 -- cut at a dot in the next line
    own = prefix[: prefix.rfind(".") + 1]
    make = tuple((name.removeprefix(own), tuple(value.shape)) for name, value in stage.weights.items())
    keys = [tuple(name.removeprefix(own) for name in item.consumers) for item in inputs.values()]
    if make in known and known[make].keys() == set(keys):
        hoped = tuple(
            replace(item, fold=_renamed(known[make][key], "", own))
            for item, key in zip(inputs.values(), keys, strict=True)
        )
        if _sound(stage, _without_doubtful(hoped, base, stage, skeleton), base.output) == hoped:
            return hoped
    found = _for_siblings(_folds(stage, inputs, base, skeleton), inputs, base, skeleton)
    items = tuple(replace(item, fold=found.get(site)) for site, item in inputs.items())
    items = _sound(stage, _without_doubtful(items, base, stage, skeleton), base.output)
    known[make] = {key: _renamed(item.fold, own, "") for key, item in zip(keys, items, strict=True)}
    return items


def _renamed(fold: Fold | None, old: str, new: str) -> Fold | None:
    """Returns a fold with another start of its names."""
    if fold is None:
        return None
    bias = None if fold.bias is None else new + fold.bias.removeprefix(old)
    return replace(fold, producer=new + fold.producer.removeprefix(old), bias=bias)


def _inputs(base: Trial, stage: Stage, skeleton: Skeleton) -> dict[Site, Input]:
    """Returns the inputs by the site that stands for each: the first of those where the same tensor is used."""
    first: dict[tuple[int, int, int], Site] = {}
    consumers: dict[Site, list[str]] = {}
    widths: dict[Site, int] = {}
    place: dict[str, Site] = {}
    mixed: set[str] = set()
    seen: set[Site] = set()
    for site, x in base.calls:
        names = _multiplied(site, stage, skeleton)
        if not names or site in seen or x.shape[-1] != stage.weights[names[0]].shape[-1]:
            continue
        seen.add(site)
        # an address alone would not show that the tensor was changed in place meanwhile
        representative = first.setdefault((x.data_ptr(), x.numel(), x._version), site)
        widths[representative] = x.shape[-1]
        # one stored matrix of which the model makes several must have one input
        mixed.update(name for name in names if place.setdefault(name, representative) != representative)
        consumers.setdefault(representative, []).extend(n for n in names if n not in consumers[representative])
    inputs = {
        site: Input(known[0], tuple(known), widths[site])
        for site, names in consumers.items()
        if (known := [name for name in names if name not in mixed])
    }
    return inputs | _unreached(inputs, seen, base, stage, skeleton)


def _unreached(
    inputs: Mapping[Site, Input], seen: set[Site], base: Trial, stage: Stage, skeleton: Skeleton
) -> dict[Site, Input]:
    """Returns the inputs of experts that the probe batch was not routed to: of a reached stack, or linears alone."""
    more: dict[Site, Input] = {}
    for (parameter, index), item in inputs.items():
        for other in range(_stack_size(parameter, skeleton)) if index >= 0 else ():
            site = Site((parameter, other))
            names = _multiplied(site, stage, skeleton)
            if names and site not in seen and site not in more:
                more[site] = Input(names[0], names, item.width)
    for name, weight in stage.weights.items():
        parameter = skeleton.conversion_of[name].target
        if name in skeleton.linears and weight.dim() == _MATRIX and parameter not in base.used:
            site = Site((parameter, -1))
            if _multiplied(site, stage, skeleton) == (name,):
                more[site] = Input(name, (name,), weight.shape[-1])
    return more


def _multiplied(site: Site, stage: Stage, skeleton: Skeleton) -> tuple[str, ...]:
    """Returns the stored matrices that are multiplied at a site; none where transformers makes it in another way."""
    parameter, index = site
    conversion = skeleton.source_of.get(parameter)
    if conversion is None:  # a matrix that another block has too
        return ()
    if index < 0:
        plain = all(stage.weights[name].dim() == _MATRIX for name in conversion.names)
        return conversion.names if plain else ()
    return tuple(names[index] for names in conversion.sources.values()) if _stack_size(parameter, skeleton) else ()


def _stack_size(parameter: str, skeleton: Skeleton) -> int:
    """Returns how many experts a stacked parameter is made of; 0 where they are not stored one by one."""
    conversion = skeleton.source_of[parameter]
    if conversion.rule is None or len(conversion.outputs) > 1:
        return 0
    counts = {len(names) for names in conversion.sources.values()}
    count = skeleton.model.get_parameter(parameter).shape[0]
    return count if counts == {count} else 0


def _candidates(stage: Stage, skeleton: Skeleton, widths: set[int]) -> Iterator[tuple[tuple[str, ...], Fold]]:
    """Yields what could feed an input: stored names and the fold of the first of them, norms before matrices.

    Several names are the experts of one stack, all to be scaled in one trial.
    """
    repeats = _head_repeats(stage)
    possible = widths | {width // repeat for width in widths for repeat in repeats if width % repeat == 0}
    alike = dict.fromkeys(
        names if _stack_size(conversion.target, skeleton) else (name,)
        for name in stage.weights
        for conversion in (skeleton.conversion_of[name],)
        for names in conversion.sources.values()
        if name in names
    )
    found: list[tuple[tuple[str, ...], Fold]] = []
    for names in alike:
        weight = stage.weights[names[0]]
        if not names[0].endswith(".weight") or weight.dim() not in (1, _MATRIX):
            continue
        bias = names[0].removesuffix("weight") + "bias"
        draft = Fold(names[0], bias if bias in stage.weights else None, False, 0, 0, 1)
        count = weight.shape[0]
        if weight.dim() == 1:
            found += [(names, replace(draft, offset=offset)) for offset in (False, True) if count in widths]
        else:  # also the last rows of a fused matrix: values after queries and keys, up after gate
            starts = {count - rows for rows in possible if count >= rows >= count // 8}
            found += [(names, replace(draft, start=start)) for start in sorted(starts)]
    yield from sorted(found, key=lambda item: (stage.weights[item[0][0]].dim(), item[1].start > 0))


def _stated(stage: Stage, attribute: str) -> set[int]:
    """Returns the numbers that modules of the block state under a name."""
    values = {getattr(module, attribute, None) for module in stage.module.modules()}
    return {value for value in values if isinstance(value, int) and value > 0}


def _head_repeats(stage: Stage) -> set[int]:
    """Returns how many query heads can share a key-value head: 1, and what the attention modules say."""
    return {1} | _stated(stage, "num_key_value_groups")


def _folds(stage: Stage, inputs: Mapping[Site, Input], base: Trial, skeleton: Skeleton) -> dict[Site, Fold]:
    """Returns the folds that trials of single candidates suggest, by the inputs' sites."""
    found: dict[Site, Fold] = {}
    before = {site: x for site, x in _first_calls(base).items() if site in inputs}
    generator = torch.Generator().manual_seed(0)
    for names, draft in _candidates(stage, skeleton, {item.width for item in inputs.values()}):
        if len(found) == len(before):
            break
        rows = len(stage.weights[draft.producer]) - draft.start
        left = {inputs[site].width for site in before if site not in found}
        if any(fold.producer in names for fold in found.values()) or not left & _fed(rows, stage):
            continue
        factors = torch.empty(rows).uniform_(0.5, 2.0, generator=generator)
        fed: dict[Site, Fold] = {}
        while True:
            stage.load(_scaled(names, draft, 1.0 / factors, {inputs[site]: fold for site, fold in fed.items()}, stage))
            after = _first_calls(stage.probe())
            new: dict[Site, Fold] = {}
            for site, x in before.items():
                if site not in found and site not in fed and not set(names) & set(inputs[site].consumers):
                    fold = _explains(draft, factors, x, after.get(site), stage)
                    if fold is not None and len(names) > 1:  # each expert's own producer is its neighbour in the stack
                        fold = replace(fold, producer=names[site[1]]) if 0 <= site[1] < len(names) else None
                    if fold is not None:
                        new[site] = fold
            fed |= new
            if not new or len(found) + len(fed) == len(before):
                break
        found |= fed
    return found


def _fed(rows: int, stage: Stage) -> set[int]:
    """Returns the widths of inputs that some rows could feed."""
    return {rows * repeat for repeat in _head_repeats(stage)}


def _first_calls(trial: Trial) -> dict[Site, Tensor]:
    calls: dict[Site, Tensor] = {}
    for site, x in trial.calls:
        calls.setdefault(site, x)
    return calls


def _scaled(
    names: Sequence[str], draft: Fold, scale: Tensor, fed: Mapping[Input, Fold], stage: Stage
) -> dict[str, Tensor]:
    """Returns the tensors of a trial: candidates with rows divided by `scale`, what they feed with columns times it."""
    changed: dict[str, Tensor] = {}
    now = ChainMap(changed, stage.weights)
    for name in names:
        changed |= replace(draft, producer=name).apply(now, scale)
    for item, fold in fed.items():
        changed |= item.scale_consumers(now, scale[fold.row_of(item.width)])
    return changed


def _explains(draft: Fold, factors: Tensor, before: Tensor, after: Tensor | None, stage: Stage) -> Fold | None:
    """Returns the fold under which `after` is `before` with its channels scaled by `factors`, or None."""
    width, rows = before.shape[-1], len(factors)
    if after is None or after.shape != before.shape or width not in _fed(rows, stage):
        return None
    x, y = _rows(before), _rows(after)
    repeat = width // rows
    heads = (*_stated(stage, "head_dim"), *range(rows, 0, -1))
    runs = [rows] if repeat == 1 else [size for size in heads if rows % size == 0]
    norm = x.norm(dim=0)
    if torch.equal(x, y):
        return None
    for run in runs:
        fold = replace(draft, width=run, repeat=repeat)
        left = (y - x * factors[fold.row_of(width)]).norm(dim=0)
        if bool((left <= _FOLLOWS * norm).all()):
            return fold
    return None


def _for_siblings(
    found: Mapping[Site, Fold], inputs: Mapping[Site, Input], base: Trial, skeleton: Skeleton
) -> dict[Site, Fold]:
    """Returns the folds, with what all reached experts of a stack have given to the others; if they differ, to none."""
    reached = {site for site, _ in base.calls}
    result = dict(found)
    for parameter in dict.fromkeys(parameter for parameter, index in inputs if index >= 0):
        sites = [site for site in inputs if site[0] == parameter]
        rules = {_rule(found.get(site), site[1], skeleton) for site in sites if site in reached}
        rule = rules.pop() if len(rules) == 1 else None
        if rule is None:
            lost = {found[site] for site in sites if site in found}
            result = {site: fold for site, fold in result.items() if fold not in lost}
        else:
            fold, names = rule
            result |= {site: replace(fold, producer=names[site[1]]) if names else fold for site in sites}
    return result


def _rule(fold: Fold | None, index: int, skeleton: Skeleton) -> tuple[Fold, tuple[str, ...]] | None:
    """Returns a fold as one for all experts of a stack: with the stored names of their producers, or with none."""
    if fold is None:
        return None
    stacks = skeleton.conversion_of[fold.producer].sources.values()
    names = next((names for names in stacks if len(names) > index and names[index] == fold.producer), ())
    return (replace(fold, producer=names[0]), names) if len(names) > 1 else (fold, ())


def _without_doubtful(items: Iterable[Input], base: Trial, stage: Stage, skeleton: Skeleton) -> tuple[Input, ...]:
    """Returns the inputs without the folds that no run of this block on this batch can prove.

    Those that could also feed a matrix which the batch never came by, and those of tensors that other blocks use too.
    """
    unused = {name for name in stage.weights if not base.used.intersection(skeleton.conversion_of[name].outputs)}
    widths = {size for name in unused if stage.weights[name].dim() > 1 for size in stage.weights[name].shape}
    tied = (skeleton.source_of[source] for source in skeleton.tied.values() if source in skeleton.source_of)
    shared = {name for conversion in tied for name in conversion.names}
    return tuple(
        replace(item, fold=None)
        if item.width in widths or (item.fold and shared.intersection((*item.consumers, item.fold.producer)))
        else item
        for item in items
    )


def _sound(stage: Stage, inputs: tuple[Input, ...], output: Sequence[Tensor]) -> tuple[Input, ...]:
    """Returns the inputs without the folds that change the block's output under random scales."""
    generator = torch.Generator().manual_seed(1)
    scales: dict[str, Tensor] = {}
    for group in grouped(inputs):
        if (fold := group[0].fold) is not None:
            rows = int(fold.row_of(group[0].width).max()) + 1
            scales[group[0].name] = torch.empty(rows).uniform_(0.5, 2.0, generator=generator)
    if not scales or _unchanged(stage, inputs, scales, output):
        return inputs
    good = {name for name, scale in scales.items() if _unchanged(stage, inputs, {name: scale}, output)}
    kept = {group[0].fold for group in grouped(inputs) if group[0].name in good}
    inputs = tuple(item if item.fold in kept else replace(item, fold=None) for item in inputs)
    if _unchanged(stage, inputs, {name: scales[name] for name in good}, output):
        return inputs
    return tuple(replace(item, fold=None) for item in inputs)


def _unchanged(stage: Stage, inputs: Iterable[Input], scales: Mapping[str, Tensor], output: Sequence[Tensor]) -> bool:
    """Returns whether the block's output on the probe stays `output` when the inputs in `scales` are folded.

    The folded weights stay loaded in the module.
    """
    stage.load(fold_all(inputs, stage.weights, scales))
    return all(_same(a, b) for a, b in zip(output, stage.probe().output, strict=True))


def _same(before: Tensor, after: Tensor) -> bool:
    """Compares channel by channel: one huge channel must not hide a change in the others."""
    a, b = _rows(before), _rows(after)
    scale = a.norm(dim=0)
    floor = scale.square().mean().sqrt() * 1e-2
    return bool(((b - a).norm(dim=0) <= _UNCHANGED * (scale + floor)).all())


def _rows(value: Tensor) -> Tensor:
    return value.float().reshape(-1, value.shape[-1] if value.dim() else 1)
