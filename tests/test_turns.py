"""Blocks in turns against a plain forward pass of transformers with what is rounded by then in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import forward, load, token_ids
from torch import Tensor, nn

from quantize import spill as spill_module
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError
from quantize.methods.awq_gptq import AWQGPTQ
from quantize.methods.base import Block, Prepared, Result
from quantize.parallel import Pool
from quantize.schemes import AffineInt, Scheme
from quantize.skeleton import Skeleton, convert
from quantize.statistics import Statistics
from quantize.structure import fold_all
from quantize.sweep import Stage, Sweep
from quantize.trace import Structure, trace
from quantize.turns import at_once, in_turns, turns_of

IDS = token_ids()
COARSE = AffineInt(3, 16)
EXPERTS = ("mixtral", "qwen2-moe", "deepseek-v3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = architectures.save(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


@dataclass
class Nearest:
    """A sequential method that rounds coarsely to nearest, and keeps what it was shown.

    Attributes:
        turns: The block of each turn.
        transforms: Whether channels are scaled first.
    """

    turns: list[Block] = field(default_factory=list)
    transforms: bool = False

    name = "nearest"
    summary = ""
    calibrates = sequential = True

    def reject(self, scheme: Scheme) -> str | None:
        return None

    def prepare(self, block: Block, pool: Pool) -> Prepared | None:
        generator = torch.Generator().manual_seed(len(self.turns))
        scales = {
            item.name: torch.empty(item.fold.row_of(item.width).max() + 1).uniform_(0.5, 2.0, generator=generator)
            for item in block.inputs
            if item.fold is not None
        }
        return Prepared(fold_all(block.inputs, block.weights, scales), block.statistics, ("scaled",))

    def quantize(self, block: Block, pool: Pool) -> Result:
        self.turns.append(block)
        coded = {name: scheme.encode(block.weights[name]) for name, scheme in block.schemes.items()}
        return Result(coded, notes=(f"{len(coded)} rounded",))


@dataclass
class Trip:
    """What a pass through a model in turns showed.

    Attributes:
        method: The method, with its turns.
        results: What became of each block.
        logits: After all blocks, all rounded.
        skeleton: The model.
    """

    method: Any
    results: list[Result]
    logits: Tensor
    skeleton: Skeleton


@contextmanager
def sweeping(path: Path, **options: Any) -> Iterator[tuple[Skeleton, Sweep]]:
    checkpoint = open_checkpoint(path)
    skeleton = Skeleton(checkpoint)
    with Sweep(skeleton, checkpoint, list(torch.split(IDS, 1)), **{"threads": 2, "probe": IDS[:1], **options}) as sweep:
        yield skeleton, sweep


def block_of(stage: Stage, structure: Structure, skeleton: Skeleton) -> Block:
    """Returns a stage's block, all linears that groups of 16 divide to be rounded."""
    names = [n for n, value in stage.weights.items() if n in skeleton.linears and COARSE.reject(value.shape) is None]
    dtypes = dict.fromkeys(stage.weights, torch.float32)
    return Block(stage.path, stage.weights, dtypes, dict.fromkeys(names, COARSE), structure.inputs)


def travelled(path: Path, method: Any = None, everyone: bool = False, **options: Any) -> Trip:
    """Returns what a pass with all linears of all blocks rounded showed."""
    method = method or Nearest()
    results: list[Result] = []
    with sweeping(path, **options) as (skeleton, sweep), Pool(1) as pool:
        for stage in sweep.stages():
            structure = trace(stage, skeleton, folds=method.transforms)
            block = block_of(stage, structure, skeleton)
            results.append(in_turns(stage, structure, block, method, pool, lambda _, value: value, everyone))
        logits = torch.cat(list(sweep.logits()))
    return Trip(method, results, logits, skeleton)


class Plain:
    """The whole model as transformers runs it, with hooks on every linear and every stack of experts."""

    def __init__(self, path: Path, everyone: bool = False) -> None:
        self.model = load(path)
        self.checkpoint = open_checkpoint(path)
        self.skeleton = Skeleton(self.checkpoint)
        self.changed: dict[str, Tensor] = {}
        self.everyone = everyone
        self.seen: dict[tuple[str, int], list[Tensor]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args, name=name: self._linear(name, args[0]))
            elif getattr(module, "is_transposed", True) is False:
                module.register_forward_pre_hook(lambda m, args, name=name: self._experts(name, m, *args[:2]))

    def put(self, changed: Mapping[str, Tensor]) -> None:
        """Exchanges stored tensors."""
        self.changed |= changed
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for conversion in {id(c): c for c in (self.skeleton.conversion_of[n] for n in changed)}.values():
            for name, value in convert(conversion, self._read, self.skeleton.model).items():
                parameters[name].data.copy_(value)

    def logits(self) -> Tensor:
        self.seen.clear()
        return forward(self.model, IDS)

    def statistics(self, stored: str) -> Statistics | None:
        """Returns those of what a stored matrix was multiplied with in the last pass."""
        conversion = self.skeleton.conversion_of[stored]
        expert = re.search(r"experts\.(\d+)\.", stored)
        index = int(expert[1]) if expert and len(conversion.names) > 1 else -1
        rows = self.seen.get((conversion.outputs[0], index), [])
        return Statistics.of(torch.cat(rows)) if rows and sum(map(len, rows)) else None

    def _read(self, name: str) -> Tensor:
        return self.changed[name] if name in self.changed else self.checkpoint.read(name).float()

    def _linear(self, name: str, x: Tensor) -> None:
        self.seen.setdefault((f"{name}.weight", -1), []).append(x.reshape(-1, x.shape[-1]).clone())

    def _experts(self, name: str, module: Any, hidden: Tensor, chosen: Tensor) -> None:
        for expert in range(len(module.down_proj)):
            x = hidden if self.everyone else hidden[(chosen == expert).any(-1)]
            gate, up = nn.functional.linear(x, module.gate_up_proj[expert]).chunk(2, -1)
            self.seen.setdefault((f"{name}.gate_up_proj", expert), []).append(x.clone())
            self.seen.setdefault((f"{name}.down_proj", expert), []).append(module.act_fn(gate) * up)


def assert_alike(found: Statistics, wanted: Statistics) -> None:
    assert found.count == wanted.count
    for key in ("mean_abs", "max_abs", "hessian"):
        a, b = getattr(found, key), getattr(wanted, key)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().mean()))


def assert_sequential(trip: Trip, plain: Plain) -> int:
    """Walks through the turns again with a plain model; returns how many inputs had statistics."""
    compared = 0
    for block in trip.method.turns:
        plain.logits()
        for item in block.inputs:
            found = block.statistics.get(item.name)
            for name in block.schemes.keys() & item.consumers:
                wanted = plain.statistics(name)
                assert (found is None) == (wanted is None), name
                if found is not None and wanted is not None:
                    assert_alike(found, wanted)
                    compared += 1
        plain.put({name: scheme.encode(block.weights[name]).dequantize() for name, scheme in block.schemes.items()})
    torch.testing.assert_close(trip.logits, plain.logits(), rtol=1e-3, atol=1e-3 * float(trip.logits.std()))
    return compared


@pytest.mark.parametrize(
    "name", ["llama", "phi3", "gpt-neox", "gemma3n", "t5", "qwen3.5", "mixtral", "deepseek-v3", "zamba2"]
)
def test_every_turn_sees_what_is_rounded_by_then(name: str, folder: Callable[[str], Path]) -> None:
    """Statistics of each turn, and the logits, are those of transformers with the rounded weights put in place."""
    trip = travelled(folder(name))
    assert assert_sequential(trip, Plain(folder(name))) >= len(trip.method.turns)
    blocks = [block.name for block in trip.method.turns]
    assert blocks == sorted(blocks, key=list(dict.fromkeys(blocks)).index)
    assert list(dict.fromkeys(blocks)) == list(trip.skeleton.blocks)


def test_the_turns_of_a_llama(folder: Callable[[str], Path]) -> None:
    trip = travelled(folder("llama"))
    leaves = [tuple(name.split(".")[-2] for name in block.schemes) for block in trip.method.turns]
    assert leaves == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)] * 2
    assert [result.notes for result in trip.results] == [tuple(f"{n} rounded" for n in (3, 1, 2, 1))] * 2


def test_experts_of_a_layer_take_one_turn(folder: Callable[[str], Path]) -> None:
    trip = travelled(folder("mixtral"))
    counts = [len(block.schemes) for block in trip.method.turns]
    assert counts == [3, 1, 8, 4] * 2


@pytest.mark.parametrize("name", EXPERTS)
def test_every_expert_sees_every_token_where_asked(name: str, folder: Callable[[str], Path]) -> None:
    """All of them count all tokens, of which each still goes on with the experts that its router chose."""
    trip = travelled(folder(name), everyone=True)
    experts = [
        (item.name, block.statistics[item.name].count)
        for block in trip.method.turns
        for item in block.inputs
        if re.search(r"experts\.\d+\.", item.name)
    ]
    assert len(experts) >= 8
    assert {count for _, count in experts} == {IDS.numel()}
    assert_sequential(trip, Plain(folder(name), everyone=True))


@pytest.mark.parametrize("name", ["gemma3n", "t5", "mixtral"])
def test_rehearsals_leave_the_batches_alone(name: str, folder: Callable[[str], Path]) -> None:
    """A block rehearsed many times passes on what one passed once does, on any number of threads, spilled or not."""

    def logits(rehearsals: int, **options: Any) -> tuple[Tensor, list[dict[str, Statistics]]]:
        found = []
        with sweeping(folder(name), **options) as (skeleton, sweep):
            for stage in sweep.stages():
                structure = trace(stage, skeleton, folds=False)
                for turn in range(rehearsals):
                    sites = turns_of(structure)[turn % len(turns_of(structure))]
                    found.append(stage.rehearse(sites, Statistics))
            return torch.cat(list(sweep.logits())), found

    once = logits(0)[0]
    first, statistics = logits(3, threads=1)
    again, others = logits(3, threads=3)
    assert torch.equal(first, once)
    assert torch.equal(again, once)
    for one, other in zip(statistics, others, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value.hessian, other[key].hessian) for key, value in one.items())


def test_spilled_batches_can_be_rehearsed(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = travelled(folder("gemma3n"))
    monkeypatch.setattr(spill_module, "_WORTH", 0)
    spilled = travelled(folder("gemma3n"), budget=0, folder=tmp_path)
    assert torch.equal(spilled.logits, held.logits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_prepared_blocks_are_rounded_from_their_new_weights(name: str, folder: Callable[[str], Path]) -> None:
    """Folds first: every turn sees scaled inputs, and the targets are what was rounded."""
    method = Nearest(transforms=True)
    trip = travelled(folder(name), method)
    plain = Plain(folder(name))
    by_block = dict(zip(trip.skeleton.blocks, trip.results, strict=True))
    entered: set[str] = set()
    for block in method.turns:
        result = by_block[block.name]
        if block.name not in entered:
            entered.add(block.name)
            assert result.notes[0] == "scaled"
            assert result.targets
            before = plain.logits()
            plain.put({**result.changed, **result.targets})
            now = plain.logits()
            torch.testing.assert_close(now, before, rtol=1e-3, atol=1e-3 * float(before.std()))
        plain.logits()
        for item in block.inputs:
            if item.name in block.statistics:
                wanted = plain.statistics(item.consumers[0])
                assert wanted is not None
                assert_alike(block.statistics[item.name], wanted)
        for matrix, scheme in block.schemes.items():
            target = result.targets.get(matrix, open_checkpoint(folder(name)).read(matrix).float())
            assert torch.equal(block.weights[matrix], target)
            assert torch.equal(result.coded[matrix].dequantize(), scheme.encode(target).dequantize())
        plain.put({matrix: result.coded[matrix].dequantize() for matrix in block.schemes})
    torch.testing.assert_close(trip.logits, plain.logits(), rtol=1e-3, atol=1e-3 * float(trip.logits.std()))


def test_what_is_stored_otherwise_is_passed_on_as_it_reads_back(folder: Callable[[str], Path]) -> None:
    """Norms that a fold changed go to the next turn rounded as the output holds them."""
    method = Nearest(transforms=True)
    with sweeping(folder("llama")) as (skeleton, sweep), Pool(1) as pool:
        stages = sweep.stages()
        stage = next(stages)
        structure = trace(stage, skeleton)
        block = block_of(stage, structure, skeleton)
        result = in_turns(stage, structure, block, method, pool, lambda _, value: value.bfloat16().float())
        loaded = {name: skeleton.model.get_parameter(name) for name in (*result.changed, *result.coded)}
    assert any("layernorm" in name for name in result.changed)
    for name, value in result.changed.items():
        assert torch.equal(value, value.bfloat16().float())
        assert torch.equal(loaded[name], value)
    for name, coded in result.coded.items():
        assert torch.equal(loaded[name], coded.dequantize())


def test_what_no_input_reaches_is_rounded_at_the_end(folder: Callable[[str], Path]) -> None:
    """A matrix with a grid that the block's run never came by."""
    method = Nearest()
    with sweeping(folder("llama")) as (skeleton, sweep), Pool(1) as pool:
        stages = sweep.stages()
        stage = next(stages)
        structure = trace(stage, skeleton, folds=False)
        lost = structure.inputs[-1]
        sites = {site: name for site, name in structure.sites.items() if name != lost.name}
        known = type(structure)(structure.inputs[:-1], sites)
        block = block_of(stage, known, skeleton)
        result = in_turns(stage, known, block, method, pool, lambda _, value: value)
    assert result.coded.keys() == block.schemes.keys()
    assert set(method.turns[-1].schemes) == set(lost.consumers)
    assert not method.turns[-1].statistics


def test_kept_matrices_take_no_turn(folder: Callable[[str], Path]) -> None:
    method = Nearest()
    with sweeping(folder("llama")) as (skeleton, sweep), Pool(1) as pool:
        stages = sweep.stages()
        stage = next(stages)
        structure = trace(stage, skeleton, folds=False)
        names = [name for name in stage.weights if name.endswith(("k_proj.weight", "down_proj.weight"))]
        block = Block(stage.path, stage.weights, {}, dict.fromkeys(names, COARSE), structure.inputs)
        result = in_turns(stage, structure, block, method, pool, lambda _, value: value)
    assert [list(turn.schemes) for turn in method.turns] == [[name] for name in sorted(names, reverse=True)]
    assert result.coded.keys() == set(names)


def test_nan_after_rounding_ends_the_run(folder: Callable[[str], Path]) -> None:
    with sweeping(folder("llama")) as (_, sweep):
        stages = sweep.stages()
        stage = next(stages)
        name = next(name for name in stage.weights if name.endswith("q_proj.weight"))
        stage.load({name: torch.full_like(stage.weights[name], torch.inf)})
        with pytest.raises(InputError, match="NaN or Inf"):
            next(stages)


def test_at_once_is_the_method_on_the_prepared_block(folder: Callable[[str], Path]) -> None:
    """With statistics that are there already: `prepare`, then `quantize` on what it made."""
    with sweeping(folder("llama")) as (skeleton, sweep), Pool(1) as pool:
        stages = sweep.stages()
        stage = next(stages)
        structure = trace(stage, skeleton)
        values = stage.run(structure.sites)
        block = replace(block_of(stage, structure, skeleton), statistics=values)
        result = at_once(block, AWQGPTQ(), pool)
        prepared = AWQGPTQ().prepare(block, pool)
    assert prepared is not None
    names = block.schemes.keys()
    assert result.coded.keys() == names
    assert result.targets.keys() == names & prepared.changed.keys()
    assert result.changed.keys() == prepared.changed.keys() - names
    assert all(
        torch.equal(value, prepared.changed[name]) for name, value in (*result.targets.items(), *result.changed.items())
    )
