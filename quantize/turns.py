"""One block of a sequential method: gather, round, and let what follows see what was rounded.

Inside a block the inputs come in turns, in the order of their use: queries, keys and values; the output of attention;
gate and up; down. For each turn the batches pass through the block as it is by then, only as far as the inputs of that
turn. Once all is rounded they pass on, so that the next block sees them as an engine will.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantize.methods.base import Block, Method, Prepared, Result
from quantize.parallel import Pool
from quantize.schemes import QuantizedTensor
from quantize.statistics import Statistics
from quantize.structure import Input
from quantize.sweep import Site, Stage
from quantize.trace import Structure

# The number of an expert in a stored name, `experts.3.` or `experts.expert_3.`.
_EXPERT = re.compile(r"(experts\.[^.\d]*)\d+(?=\.)")


def turns_of(structure: Structure) -> list[dict[Site, str]]:
    """Returns the sites of a block in turns: those of one role together, as are those of one layer's experts.

    Only the expert's own number does not count: `w1` and `w2` are no one role.
    """
    turns: dict[str, dict[Site, str]] = {}
    for site, name in structure.sites.items():
        turns.setdefault(_EXPERT.sub(r"\1", name), {})[site] = name
    return list(turns.values())


def in_turns(
    stage: Stage,
    structure: Structure,
    block: Block,
    method: Method,
    pool: Pool,
    stored: Callable[[str, Tensor], Tensor],
    everyone: bool = False,
) -> Result:
    """Returns what a sequential method makes of a block. The rounded weights are left loaded in the module.

    Args:
        stage: The block, its weights loaded and the batches before it.
        structure: Its inputs and their sites.
        block: Its weights and schemes.
        method: The method.
        pool: Where it works.
        stored: Gives a plain tensor, by name and new value, as it will read back from the output, float32.
        everyone: Whether every expert sees every token while inputs are gathered; the batches then pass on with those
            that the router chose.
    """
    prepared = None
    if method.transforms:
        prepared = method.prepare(_with_statistics(block, stage, structure.inputs, structure.sites, everyone), pool)
    prepared = prepared or Prepared({}, {})
    coded: dict[str, QuantizedTensor] = {}
    notes = list(prepared.notes)
    plain = {n: stored(n, value) for n, value in prepared.changed.items() if n not in block.schemes}
    weights = {**block.weights, **prepared.changed, **plain}
    loaded = {name: weights[name] for name in prepared.changed}
    for sites in turns_of(structure):
        names = set(sites.values())
        inputs = [item for item in structure.inputs if item.name in names]
        mine = {n: block.schemes[n] for item in inputs for n in item.consumers if n in block.schemes}
        if not mine:
            continue
        if loaded:
            stage.load(loaded)
        part = Block(block.name, weights, block.dtypes, mine)
        result = method.quantize(_with_statistics(part, stage, inputs, sites, everyone), pool)
        coded |= result.coded
        notes += result.notes
        loaded |= {name: value.dequantize() for name, value in result.coded.items()}
    rest = {name: scheme for name, scheme in block.schemes.items() if name not in coded}
    if rest:
        result = method.quantize(Block(block.name, weights, block.dtypes, rest), pool)
        coded |= result.coded
        notes += result.notes
        loaded |= {name: value.dequantize() for name, value in result.coded.items()}
    # what stays plain passes on as it reads back too: a run that goes on after a kill has nothing else
    kept = {n: stored(n, value) for n, value in weights.items() if n not in block.schemes and n not in plain}
    loaded |= {name: value for name, value in kept.items() if not torch.equal(value, weights[name])}
    stage.settle(loaded)
    targets = {name: weights[name] for name in prepared.changed if name in block.schemes}
    return Result(coded, plain, targets, tuple(notes))


def at_once(block: Block, method: Method, pool: Pool) -> Result:
    """Returns what a method makes of a block whose statistics are all there."""
    prepared = method.prepare(block, pool)
    if prepared is None:
        return method.quantize(block, pool)
    weights = {**block.weights, **prepared.changed}
    result = method.quantize(replace(block, weights=weights, statistics=prepared.statistics), pool)
    plain = {name: value for name, value in prepared.changed.items() if name not in block.schemes}
    targets = {name: value for name, value in prepared.changed.items() if name in block.schemes}
    return Result(result.coded, {**plain, **result.changed}, targets, (*prepared.notes, *result.notes))


def _with_statistics(
    block: Block, stage: Stage, inputs: Sequence[Input], sites: Mapping[Site, str], everyone: bool
) -> Block:
    """Returns a block with the statistics of some of its inputs, gathered from what is loaded."""
    return replace(block, inputs=tuple(inputs), statistics=stage.rehearse(sites, Statistics, everyone))
