"""Our GPTQ folders in GPTQModel and in transformers, on the CPU, in GPTQModel's own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import quantize
from quantize.schemes import Plain
from quantize.skeleton import Skeleton

PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[2] / ".peers"))
PYTHON = PEERS.absolute() / "gptqmodel/bin/python"
SCRIPT = Path(__file__).parent / "scripts/gptq_logits.py"
# Of the range of the logits; both sides compute in float32.
_CLOSE = 1e-3

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: run 'make peers' or set QUANTIZE_PEERS"),
]

GPTQMODEL, TRANSFORMERS = "gptqmodel", "transformers"


class Case(NamedTuple):
    """One output: the options of the run, the loaders that read it, and the model if it is not the tiny llama."""

    options: dict[str, Any]
    loaders: tuple[str, ...] = (GPTQMODEL, TRANSFORMERS)
    experts: bool = False


CASES = {
    "4 bits": Case({"bits": 4, "symmetric": True, "format": "gptq"}),
    "4 bits, version 2": Case({"bits": 4, "symmetric": True, "format": "gptq_v2"}),
    "4 bits, zero points": Case({"bits": 4, "symmetric": False, "format": "gptq"}),
    "2 bits": Case({"bits": 2, "group_size": 16}),
    "3 bits": Case({"bits": 3}),
    "3 bits, symmetric": Case({"bits": 3, "symmetric": True, "group_size": 64}),
    "8 bits, a row": Case({"bits": 8, "group_size": -1}),
    "kept": Case(
        {"bits": 4, "symmetric": True, "format": "gptq",
         "set": ("model.layers.1.mlp.down_proj=keep", "model.layers.0.self_attn.*=keep")}
    ),
    "mixed": Case(
        {"bits": 4, "symmetric": True, "format": "gptq",
         "set": ("model.layers.1.mlp.down_proj=int8-g32-sym", "model.layers.0.mlp.*=int3-g32")},
        (GPTQMODEL,),
    ),
    "experts": Case({"bits": 4, "symmetric": True, "format": "gptq"}, (GPTQMODEL,), experts=True),
}  # fmt: skip


def tiny_experts(folder: Path) -> Path:
    """Writes a Qwen3 with four experts a layer, in the names of its checkpoints."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny_llama(num_key_value_heads=4)
    out = tmp_path_factory.mktemp("gptq") / "Tiny-GPTQ"
    if case.experts:
        source = tiny_experts(out.with_name("experts"))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).write_bytes((tiny_llama(num_key_value_heads=4) / name).read_bytes())
    quantize.run(source, method="rtn", out=out, eval="none", **({"group_size": 32} | case.options))
    return out


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 512, (2, 32))


@pytest.fixture(scope="module")
def expected(folder: Path, ids: np.ndarray) -> torch.Tensor:
    """The logits of the model in float32 with the weights that our reader gives."""
    from transformers import AutoModelForCausalLM

    plain = folder.with_name("plain")
    quantize.convert(folder, format="hf", dtype="f32", out=plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.from_numpy(ids)).logits
    return logits


def ask(loader: str, folder: Path, ids: np.ndarray) -> subprocess.CompletedProcess[str]:
    """Runs a peer, which leaves what it makes of the folder beside it."""
    work = folder.parent
    np.save(work / "ids.npy", ids)
    command = [PYTHON, SCRIPT, loader, folder, work / "ids.npy", work / loader]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=work)


@pytest.mark.parametrize("loader", [GPTQMODEL, TRANSFORMERS])
def test_logits_are_those_of_our_dequantized_model(
    loader: str, case: Case, folder: Path, ids: np.ndarray, expected: torch.Tensor
) -> None:
    if loader not in case.loaders:
        pytest.skip(f"{loader} does not read this kind")
    done = ask(loader, folder, ids)
    assert done.returncode == 0, done.stderr[-3000:]
    logits = torch.from_numpy(np.load(folder.with_name(f"{loader}.npy")))
    assert float((logits - expected).abs().max() / (expected.max() - expected.min())) < _CLOSE
    record = json.loads(folder.with_name(f"{loader}.json").read_text())
    assert all(0 <= token < 512 for token in record["generated"])
    checkpoint = quantize.open(folder)
    if case.experts:  # the names of modules are the peer's own there
        assert sum(kind != "kept" for kind in record["linears"].values()) == 2 * (4 + 3 * 4)
        return
    skeleton = Skeleton(checkpoint)
    kept = {path for name, path in skeleton.linears.items() if isinstance(checkpoint.tensors[name].scheme, Plain)}
    assert {name for name, kind in record["linears"].items() if kind == "kept"} == kept | {"lm_head"}


def test_transformers_refuses_several_grids_as_our_notice_says(folder: Path, case: Case, ids: np.ndarray) -> None:
    if case is not CASES["mixed"]:
        pytest.skip("one grid")
    assert any(
        "transformers reads one grid" in note for note in json.loads((folder / "quantize.json").read_text())["notes"]
    )
    assert ask(TRANSFORMERS, folder, ids).returncode != 0
