"""Our AWQ folders in transformers with GPTQModel, on the CPU, in GPTQModel's own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quantize
from quantize.schemes import Plain
from quantize.skeleton import Skeleton

PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[2] / ".peers"))
PYTHON = PEERS.absolute() / "gptqmodel/bin/python"
SCRIPT = Path(__file__).parent / "scripts/awq_logits.py"
# GPTQModel computes in float16, the reference in float32.
_CLOSE = 1e-2

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: run 'make peers' or set QUANTIZE_PEERS"),
]

# Over the small defaults: all heads of their own and one linear kept; three heads on one, tied, with groups of 64.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "heads": ({"num_key_value_heads": 4}, {"group_size": 32, "set": ("model.layers.1.mlp.down_proj=keep",)}),
    "shared heads": (
        {
            "hidden_size": 192,
            "intermediate_size": 256,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        {"group_size": 64},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def awq_folder(
    request: pytest.FixtureRequest, tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config, options = MODELS[request.param]
    out = tmp_path_factory.mktemp("awq") / "Tiny-AWQ"
    quantize.run(tiny_llama(**config), method="awq", out=out, eval="none", calib_samples=8, calib_length=64, **options)
    return out


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 512, (2, 32))


@pytest.fixture(scope="module")
def peer(awq_folder: Path, ids: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the peer makes of the folder: `logits`, `linears`, `generated`."""
    folder = tmp_path_factory.mktemp("peer")
    np.save(folder / "ids.npy", ids)
    command = [PYTHON, SCRIPT, awq_folder, folder / "ids.npy", folder / "out"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    record: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return {**record, "logits": torch.from_numpy(np.load(folder / "out.npy"))}


def dequantized(folder: Path) -> Any:
    """Returns the model in float32 with the weights that our reader gives."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = quantize.open(folder)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.config))
    state = {name: checkpoint.read(name).float() for name in checkpoint.tensors}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if checkpoint.config["tie_word_embeddings"] else set())
    model.tie_weights()
    return model.eval()


def test_logits_are_those_of_our_dequantized_model(awq_folder: Path, ids: np.ndarray, peer: dict[str, Any]) -> None:
    with torch.no_grad():
        logits = dequantized(awq_folder)(torch.from_numpy(ids)).logits
    assert float((peer["logits"] - logits).norm() / logits.norm()) < _CLOSE


def test_it_keeps_the_linears_that_we_kept(awq_folder: Path, peer: dict[str, Any]) -> None:
    checkpoint = quantize.open(awq_folder)
    skeleton = Skeleton(checkpoint)
    ours = {path for name, path in skeleton.linears.items() if isinstance(checkpoint.tensors[name].scheme, Plain)}
    theirs = {name for name, kind in peer["linears"].items() if kind == "kept"}
    assert theirs == ours | {"lm_head"}
    assert set(peer["linears"]) == set(skeleton.linears.values()) | {"lm_head"}


def test_it_generates(peer: dict[str, Any]) -> None:
    assert len(peer["generated"]) >= 1
    assert all(0 <= token < 512 for token in peer["generated"])
