"""Our MLX codes, scales and folders against MLX and mlx-lm on the CPU, in their own environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import quantize
from quantize.checkpoint import open_checkpoint
from quantize.formats.mlx import unpack
from quantize.formats.mlx_names import module
from quantize.kernels import mlx
from quantize.mlx_schemes import MLXAffine, MLXFloat
from quantize.skeleton import Skeleton

PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[2] / ".peers"))
PYTHON = PEERS.absolute() / "mlx/bin/python"
SCRIPTS = Path(__file__).parent / "scripts"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: run 'make peers' or set QUANTIZE_PEERS"),
]


def peer(script: str, *arguments: object) -> None:
    """Runs a script in MLX's environment."""
    done = subprocess.run(
        [PYTHON, SCRIPTS / script, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def samples() -> dict[str, torch.Tensor]:
    """Random, heavy-tailed and awkward rows of 256 columns."""
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(24, 256, generator=generator)
    heavy = normal / torch.rand(24, 256, generator=generator).clamp_min(1e-3)
    ramp = (torch.arange(256, dtype=torch.float32) - 10) / 16
    edge = torch.stack(
        [
            torch.zeros(256),
            torch.full((256,), 0.3),
            torch.full((256,), -0.3),
            ramp,
            -ramp,
            ramp.abs() + 0.5,
            -ramp.abs() - 0.5,
            (torch.arange(256) % 16).float(),  # ties of 4 bits and fewer
            (torch.arange(256) % 16).float() - 7.5,
            torch.where(torch.arange(256) % 32 == 5, 1000.0, 1e-3),
            normal[0].sign() * 0.125,
            normal[1].round(),
            torch.cat([torch.zeros(128), normal[2][:128]]),
            (torch.arange(256) % 2).float() * 2 - 1,
            torch.where(torch.arange(256) % 7 == 0, -0.0, 1.0),
            torch.where(torch.arange(256) % 64 == 1, -1.0, 0.0),
        ]
    )
    return {"normal": normal * 0.02, "wide": normal * 50, "heavy": heavy * 0.01, "edge": edge, "small": normal * 1e-4}


def asked(modes: list[tuple[str, int, int]]) -> dict[str, np.ndarray]:
    """Returns every sample in every dtype for each (mode, bits, group), by the script's names."""
    return {
        f"{label}|{name}|{group}|{bits}|{mode}": value.to(dtype).float().numpy()
        for mode, bits, group in modes
        for label, value in samples().items()
        for name, dtype in DTYPES.items()
    }


def answers(cases: dict[str, np.ndarray], folder: Path) -> dict[str, torch.Tensor]:
    np.savez(folder / "in.npz", **cases)
    peer("mlx_quantize.py", folder / "in.npz", folder / "out.npz")
    return {name: torch.from_numpy(value) for name, value in np.load(folder / "out.npz").items()}


def same(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Compares bit for bit, and shows the first difference."""
    left, right = (
        v.contiguous().view(torch.int32) if v.dtype == torch.float32 else v.to(torch.int32) for v in (ours, theirs)
    )
    wrong = (left != right).nonzero()
    assert not len(wrong), f"{what}: {len(wrong)} differ, first {wrong[0].tolist()}: {ours[tuple(wrong[0])]}"


def test_affine_grids_are_those_of_mlx(tmp_path: Path) -> None:
    cases = asked([("affine", bits, group) for bits in BITS for group in GROUPS])
    found = answers(cases, tmp_path)
    for name, array in cases.items():
        _, dtype, group, bits, _ = name.split("|")
        codes, scales, biases = mlx.affine(torch.from_numpy(array), int(bits), int(group))
        scales, biases = (v.to(DTYPES[dtype]) for v in (scales, biases))
        same(codes, unpack(found[f"{name}/words"].view(torch.int32), int(bits)), f"{name} codes")
        same(scales.float(), found[f"{name}/scales"], f"{name} scales")
        same(biases.float(), found[f"{name}/biases"], f"{name} biases")
        values = mlx.affine_values(codes, scales, biases)
        # MLX rounds product and sum to the type of the scales
        step = scales.float().abs().amax() * 2 ** int(bits) + biases.float().abs().amax()
        assert (values - found[f"{name}/values"]).abs().max() <= 2 * torch.finfo(DTYPES[dtype]).eps * step, name


def test_float_modes_are_those_of_mlx(tmp_path: Path) -> None:
    cases = asked([(name, mode.bits, mode.group) for name, mode in mlx.MODES.items()])
    found = answers(cases, tmp_path)
    for name, array in cases.items():
        _, dtype, _, bits, mode = name.split("|")
        codes, scales = mlx.float_encode(torch.from_numpy(array), mode, DTYPES[dtype])
        same(scales, found[f"{name}/scales"], f"{name} scales")
        same(codes, unpack(found[f"{name}/words"].view(torch.int32), int(bits)), f"{name} codes")
        same(mlx.float_values(codes, scales, mode) + 0.0, found[f"{name}/values"] + 0.0, f"{name} values")


# Options of a run, and the architecture of `gguf_models`.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"bits": 4, "group_size": 64}),
    "llama, tied, 3 bits": ("llama-mha", {"bits": 3, "group_size": 32}),
    "llama3": ("llama3", {"bits": 8, "group_size": 64}),
    "llama, yarn": ("llama-yarn", {"bits": 5, "group_size": 64}),
    "llama, linear": ("llama-linear", {"bits": 6, "group_size": 32}),
    "llama, 2 bits, a head of 8 and a kept matrix": (
        "llama",
        {"bits": 2, "group_size": 32, "set": ("lm_head=mlx8-g64", "*.0.mlp.up_proj=keep", "*.1.mlp.*=mlx-mxfp4")},
    ),
    "llama, mxfp8, half precision": ("llama", {"set": ("*=mlx-mxfp8",), "dtype": "f16"}),
    "llama, nvfp4": ("llama", {"set": ("*=mlx-nvfp4",)}),
    "mistral": ("mistral", {"bits": 4}),
    "mixtral": ("mixtral", {"bits": 4, "group_size": 32, "split_size": 20_000}),
    "qwen2": ("qwen2", {"bits": 4}),
    "qwen2_moe": ("qwen2moe", {"bits": 6, "group_size": 32}),
    "qwen3": ("qwen3", {"bits": 4}),
    "qwen3_moe": ("qwen3moe", {"bits": 4, "group_size": 32}),
    "gemma": ("gemma", {"bits": 4}),
    "gemma2": ("gemma2", {"bits": 4}),
    "gemma3": ("gemma3", {"bits": 4}),
    "gemma3, another pattern": ("gemma3-own-pattern", {"bits": 4}),
    "phi3": ("phi3", {"bits": 4}),
    "starcoder2": ("starcoder2", {"bits": 4}),
}
# mlx-lm's mixtral knows no heads of another size, its gemma2 no sliding window.
CHANGES: dict[str, dict[str, Any]] = {"mixtral": {"head_dim": 16}, "gemma2": {"sliding_window": 64}}
# Of the range of the logits; both compute in float32, gelu with another approximation.
_CLOSE = 5e-4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every output in a folder of its own, with mlx-lm's logits beside it."""
    root = tmp_path_factory.mktemp("mlx")
    np.save(root / "ids.npy", np.arange(5, 69).reshape(2, 32) * 3 % 250)
    folders = []
    for number, (architecture, options) in enumerate(RUNS.values()):
        changes = CHANGES.get(architecture, {})
        source = gguf_models.save(architecture, root / f"source{number}", dtype=torch.bfloat16, **changes)
        quantize.run(source, out=root / str(number), method="rtn", format="mlx", threads=1, **options)
        folders.append(root / str(number))
    peer("mlx_logits.py", root / "ids.npy", *folders)
    return root


@pytest.mark.parametrize("name", RUNS)
def test_logits_are_those_of_our_dequantized_model(made: Path, name: str) -> None:
    folder = made / str(list(RUNS).index(name))
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(checkpoint)
    plain = made / f"{folder.name}-plain"
    quantize.convert(folder, format="hf", dtype="f32", out=plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(np.load(made / "ids.npy"))).logits
    found = torch.from_numpy(np.load(f"{folder}.npy"))
    assert float((found - expected).abs().max() / (expected.max() - expected.min())) < _CLOSE
    loaded = json.loads(Path(f"{folder}.json").read_text())
    ours = {}
    for tensor, info in checkpoint.tensors.items():
        if isinstance(info.scheme, MLXAffine | MLXFloat):
            mode = info.scheme.mode if isinstance(info.scheme, MLXFloat) else "affine"
            ours[module(tensor)] = [info.scheme.bits, info.scheme.group_size, mode]
    assert loaded == ours
    assert skeleton.head_tied or "lm_head" in ours
