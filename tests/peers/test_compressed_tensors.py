"""compressed-tensors folders against llm-compressor, and in transformers with compressed-tensors, on the CPU."""

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
from safetensors.torch import load_file

import quantize
from quantize.schemes import Plain, parse_scheme

PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[2] / ".peers"))
PYTHON = PEERS.absolute() / "llmcompressor/bin/python"
SCRIPTS = Path(__file__).parent / "scripts"
# llm-compressor's schemes that need no data, by ours.
THEIRS = {
    "fp8-channel": "FP8_DYNAMIC",
    "fp8-block": "FP8_BLOCK",
    "int8-channel": "W8A8",
    "int4-g128-sym-bf16": "W4A16",
    "int4-g128-bf16": "W4A16_ASYM",
    "int8-g128-sym-bf16": "W8A16",
    "nvfp4-a16": "NVFP4A16",
    "mxfp4-a16": "MXFP4A16",
}
ALONE = ("fp8-tensor", "fp8-channel-a16", "int3-g32-sym-bf16", "int6-row-sym-bf16")
MIXED = ("model.layers.1.mlp.down_proj=keep", "*.v_proj=int4-g32-sym-bf16", "*.k_proj=nvfp4-a16")
ROUNDED_INPUTS = ("fp8-channel", "fp8-block", "fp8-tensor", "int8-channel")
# Both compute in bfloat16, with other kernels.
_CLOSE = 0.05
# What rounding of inputs may cost: KL divergence in nats for each token, three times what is measured here.
_INPUTS = 0.002

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: run 'make peers' or set QUANTIZE_PEERS"),
]


def run(script: str, *words: object) -> None:
    command = [str(PYTHON), str(SCRIPTS / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(hidden_size=128, intermediate_size=256, initializer_range=0.05)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 512, (2, 32))


@pytest.fixture(scope="module")
def ours(model: Path, ids: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our folder of each scheme, and beside it what transformers make of it."""
    folder = tmp_path_factory.mktemp("ours")
    for scheme in (*THEIRS, *ALONE):
        rules = (f"model.layers.*={scheme}",)
        quantize.run(model, method="fp8", out=folder / scheme, eval="none", set=rules)
    quantize.run(model, method="fp8", out=folder / "mixed", eval="none", set=MIXED)
    np.save(folder / "ids.npy", ids)
    run("compressed_logits.py", folder / "ids.npy", *(folder / name for name in (*THEIRS, *ALONE, "mixed")))
    return folder


@pytest.fixture(scope="module")
def theirs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llm-compressor's folder of each scheme."""
    folder = tmp_path_factory.mktemp("theirs")
    run("llmcompressor_quantize.py", model, folder, *THEIRS.values())
    return folder


@pytest.mark.parametrize("scheme", THEIRS)
def test_codes_and_scales_are_llm_compressors(scheme: str, ours: Path, theirs: Path) -> None:
    mine = load_file(ours / scheme / "model.safetensors")
    other = load_file(theirs / THEIRS[scheme] / "model.safetensors")
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("scheme", THEIRS)
def test_configs_say_the_same(scheme: str, ours: Path, theirs: Path) -> None:
    mine, other = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (ours / scheme, theirs / THEIRS[scheme])
    )
    assert {key: other[key] for key in ("quant_method", "format", "quantization_status", "ignore")} == {
        key: mine[key] for key in ("quant_method", "format", "quantization_status", "ignore")
    }
    (group,), (their,) = mine["config_groups"].values(), other["config_groups"].values()
    for part in ("weights", "input_activations"):
        said = group[part]
        assert said == (None if said is None else {key: their[part][key] for key in said})
    assert group["targets"] == their["targets"]


@pytest.mark.parametrize("scheme", [*THEIRS, *ALONE, "mixed"])
def test_transformers_compute_with_the_weights_that_we_read(scheme: str, ours: Path) -> None:
    checkpoint = quantize.open(ours / scheme)
    for name, value in load_file(ours / f"{scheme}.safetensors").items():
        assert torch.equal(value, checkpoint.read(name).bfloat16()), name


@pytest.mark.parametrize("scheme", [*THEIRS, *ALONE, "mixed"])
def test_transformers_quantize_the_linears_that_we_did(scheme: str, ours: Path) -> None:
    tensors = quantize.open(ours / scheme).tensors
    coded = {name.removesuffix(".weight") for name, info in tensors.items() if not isinstance(info.scheme, Plain)}
    told: dict[str, Any] = json.loads((ours / f"{scheme}.json").read_text())
    assert set(told["quantized"]) == coded
    assert coded < set(told["linears"])
    if scheme != "mixed":
        assert {tensors[f"{name}.weight"].scheme for name in coded} == {parse_scheme(scheme)}


@pytest.mark.parametrize("scheme", [*THEIRS, *ALONE])
def test_logits_are_those_of_our_dequantized_model(scheme: str, ours: Path, ids: np.ndarray) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = quantize.open(ours / scheme)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.config)).bfloat16()
    model.load_state_dict({name: checkpoint.read(name).bfloat16() for name in checkpoint.tensors})
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(ids)).logits.float()
    found = torch.from_numpy(np.load(ours / f"{scheme}.npy"))
    if scheme in ROUNDED_INPUTS:
        base, other = logits.log_softmax(-1), found.log_softmax(-1)
        kl = float((base.exp() * (base - other)).sum(-1).mean())
        assert kl < _INPUTS
    else:
        assert float((found - logits).norm() / logits.norm()) < _CLOSE
