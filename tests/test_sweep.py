"""The block-by-block sweep against plain hooks on the whole model, and its promises on threads, memory and errors."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, forward, load, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantize import spill as spill_module
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError
from quantize.skeleton import Skeleton
from quantize.statistics import Statistics
from quantize.structure import Input
from quantize.sweep import Stage, Sweep
from quantize.trace import trace

IDS = token_ids()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = architectures.save(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


@contextmanager
def sweeping(path: Path, **options: Any) -> Iterator[tuple[Skeleton, Sweep]]:
    checkpoint = open_checkpoint(path)
    skeleton = Skeleton(checkpoint)
    settings = {"threads": 2, "probe": IDS[:1], **options}
    with Sweep(skeleton, checkpoint, list(torch.split(IDS, 1)), **settings) as sweep:
        yield skeleton, sweep


def swept(path: Path, **options: Any) -> tuple[Skeleton, dict[str, tuple[Input, Statistics | None]], Tensor]:
    """Returns the inputs with their statistics by the stored names of their consumers, and the logits."""
    found: dict[str, tuple[Input, Statistics | None]] = {}
    with sweeping(path, **options) as (skeleton, sweep):
        for stage in sweep.stages():
            structure = trace(stage, skeleton, folds=False)
            values = stage.run(structure.sites)
            for item in structure.inputs:
                found |= {name: (item, values.get(item.name)) for name in item.consumers}
        logits = torch.cat(list(sweep.logits()))
    return skeleton, found, logits


def hooked(model: Any) -> tuple[dict[tuple[str, int], list[Tensor]], Tensor]:
    """Returns what plain hooks on the whole model saw, by parameter and expert (-1 for linears), and the logits."""
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def linear(name: str, x: Tensor) -> None:
        seen.setdefault((f"{name}.weight", -1), []).append(x.reshape(-1, x.shape[-1]))

    def experts(name: str, module: Any, hidden: Tensor, chosen: Tensor) -> None:
        for expert in range(len(module.down_proj)):
            x = hidden[(chosen == expert).any(-1)]
            gate, up = nn.functional.linear(x, module.gate_up_proj[expert]).chunk(2, -1)
            seen.setdefault((f"{name}.gate_up_proj", expert), []).append(x)
            seen.setdefault((f"{name}.down_proj", expert), []).append(module.act_fn(gate) * up)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "FalconLinear":
            module.register_forward_pre_hook(lambda _, args, name=name: linear(name, args[0]))
        elif getattr(module, "is_transposed", True) is False:  # a stack of experts
            module.register_forward_pre_hook(lambda m, args, name=name: experts(name, m, *args[:2]))
    return seen, forward(model, IDS)


def site(skeleton: Skeleton, stored: str) -> tuple[str, int]:
    """Returns the parameter that a stored matrix is or goes into, and which expert of it."""
    conversion = skeleton.conversion_of[stored]
    expert = re.search(r"experts\.(\d+)\.", stored)
    return conversion.outputs[0], int(expert[1]) if expert and len(conversion.names) > 1 else -1


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("llama-mha", "llama-mqa")])
def test_statistics_are_those_of_hooks_on_the_whole_model(name: str, folder: Callable[[str], Path]) -> None:
    skeleton, found, logits = swept(folder(name))
    seen, reference = hooked(load(folder(name)))
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4 * float(reference.std()))
    for stored, (_, statistics) in found.items():
        rows = seen.get(site(skeleton, stored), [])
        if not rows or not sum(len(x) for x in rows):
            assert statistics is None or stored not in skeleton.linears
            continue
        x = torch.cat(rows)
        assert statistics is not None
        assert statistics.count == len(x)
        wanted = {"mean_abs": x.abs().mean(0), "max_abs": x.abs().amax(0), "hessian": x.T @ x / len(x)}
        for key, value in wanted.items():
            scale = float(value.abs().mean())
            torch.testing.assert_close(getattr(statistics, key), value, rtol=1e-4, atol=1e-5 * scale)
    # every linear that the model's own code applied is there, but for those of mixed experts stored in one piece
    applied = {stored for stored in skeleton.linears if seen.get(site(skeleton, stored))}
    assert {stored for stored in applied if len(skeleton.conversion_of[stored].outputs) == 1} <= found.keys()


def test_conv1d_and_stacked_experts_pass_through(folder: Callable[[str], Path]) -> None:
    assert swept(folder("gpt2"))[1] == {}
    stored = [name for name in swept(folder("gpt-oss"))[1] if "experts" in name]
    assert stored == []


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3.5"])
def test_same_bits_on_any_number_of_threads(name: str, folder: Callable[[str], Path]) -> None:
    first, *others = [swept(folder(name), threads=threads)[1:] for threads in (1, 2, 3)]
    for found, logits in others:
        assert torch.equal(logits, first[1])
        assert_same(found, first[0])


@pytest.mark.parametrize("name", ["llama", "t5", "gemma3n"])
def test_spilled_inputs_change_nothing(
    name: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = swept(folder(name))[1:]
    written: list[int] = []
    write = spill_module.Spill.write
    monkeypatch.setattr(spill_module, "_WORTH", 0)
    monkeypatch.setattr(spill_module.Spill, "write", lambda self, t: (written.append(t.numel()), write(self, t))[1])
    spilled = swept(folder(name), budget=0, folder=tmp_path)[1:]
    assert written
    assert torch.equal(spilled[1], held[1])
    assert_same(spilled[0], held[0])
    assert list(tmp_path.iterdir()) == []


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, (item, value) in a.items():
        other_item, other = b[name]
        assert item == other_item
        assert (value is None) == (other is None)
        if value is not None:
            assert value.count == other.count
            for key in ("mean_abs", "max_abs", "hessian"):
                assert torch.equal(getattr(value, key), getattr(other, key)), name


def test_one_block_is_resident(folder: Callable[[str], Path]) -> None:
    for name in ("mixtral", "gemma3n", "t5"):
        with sweeping(folder(name)) as (skeleton, sweep):
            for stage in sweep.stages():
                assert {skeleton.block_of(p) for p in resident(skeleton) if skeleton.block_of(p)} == {stage.path}
                stage.run()
                assert not [parameter for parameter in resident(skeleton) if skeleton.block_of(parameter)]
                assert stage.weights
            assert {skeleton.block_of(parameter) for parameter in resident(skeleton)} <= {None}
            embeddings = [n for n, m in skeleton.model.named_modules() if isinstance(m, nn.Embedding)]
            assert not [n for n in embeddings if f"{n}.weight" in resident(skeleton) and skeleton.block_of(n) is None]
        assert not resident(skeleton)


def resident(skeleton: Skeleton) -> set[str]:
    """Returns the parameters that take memory."""
    named = skeleton.model.named_parameters(remove_duplicate=False)
    return {name for name, p in named if p.untyped_storage().nbytes() >= p.numel() * p.element_size() > 4}


def test_leaves_the_caller_as_it_was(folder: Callable[[str], Path]) -> None:
    before, torch_threads, alive = torch.get_rng_state(), torch.get_num_threads(), set(threading.enumerate())
    other: list[int] = []
    torch.set_num_threads(2)
    try:
        swept(folder("llama"), threads=3)
        thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 2
        assert other == [2]
    finally:
        torch.set_num_threads(torch_threads)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(threading.enumerate()) == alive


@pytest.mark.parametrize("budget", [2**31, 0])
def test_may_be_left_early(budget: int, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill_module, "_WORTH", 0)
    alive = set(threading.enumerate())
    with sweeping(folder("t5"), budget=budget) as (skeleton, sweep):
        for stage in sweep.stages():
            if stage.path == "decoder.block.0":
                break
        del stage
    assert set(threading.enumerate()) == alive
    assert not any("forward" in vars(module) for module in skeleton.model.modules())
    assert not any(module._forward_pre_hooks for module in skeleton.model.modules())


@pytest.mark.parametrize("place", ["model.layers.1.mlp", "model.norm", "model.embed_tokens"])
def test_an_exception_in_one_batch_ends_the_sweep(
    place: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(folder("llama"))
    skeleton = Skeleton(checkpoint)
    module = skeleton.model.get_submodule(place)
    own, calls = type(module).forward, []

    def failing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is module:
            calls.append(place)
            if len(calls) == 3:
                raise ZeroDivisionError("the third")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(module), "forward", failing)
    alive = set(threading.enumerate())

    def run() -> None:
        with Sweep(skeleton, checkpoint, list(torch.split(IDS, 1)), threads=2) as sweep:
            for _ in sweep.stages():
                pass
            list(sweep.logits())

    with pytest.raises(ZeroDivisionError, match="the third"):
        run()
    assert set(threading.enumerate()) == alive
    assert not any("forward" in vars(module) for module in skeleton.model.modules())


def test_an_overflow_names_its_block(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = architectures.save("llama", tmp_path / "overflow")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 3e38
    save_file({name: value.clamp(-3e38, 3e38) for name, value in tensors.items()}, path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.layers\.1 gives \d+ NaN or Inf among 1024 values"):
        swept(path)


def test_a_trial_changes_nothing_that_goes_on(folder: Callable[[str], Path]) -> None:
    """A model that hands shared state from block to block sees each block once, whatever was tried there."""

    def logits(tries: int) -> Tensor:
        with sweeping(folder("gemma4")) as (_, sweep):
            for stage in sweep.stages():
                for _ in range(tries):
                    name = next(name for name in stage.weights if name.endswith("v_proj.weight") or "up_proj" in name)
                    stage.load({name: stage.weights[name] * 2})
                    stage.probe()
                stage.load()
                stage.run()
            return torch.cat(list(sweep.logits()))

    assert torch.equal(logits(0), logits(2))


def test_load_exchanges_only_what_is_named(folder: Callable[[str], Path]) -> None:
    with sweeping(folder("qwen3-moe")) as (skeleton, sweep):
        stages = sweep.stages()
        stage = next(stages)
        up = "model.layers.0.mlp.experts.2.up_proj.weight"
        module = skeleton.model.get_submodule("model.layers.0")
        whole = parameters(stage)
        stage.load({up: torch.zeros_like(stage.weights[up])})
        assert not module.mlp.experts.gate_up_proj[2, 32:].any()
        assert torch.equal(module.mlp.experts.gate_up_proj[2, :32], whole["mlp.experts.gate_up_proj"][2, :32])
        stage.load()
        for name, value in parameters(stage).items():
            assert torch.equal(value, whole[name])


def parameters(stage: Stage) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stage.module.named_parameters()}
