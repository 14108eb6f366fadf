"""MLX folders: packing by golden words and by an unpacker of its own, layout, config, reader, whole runs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantize
from quantize import formats
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError, UsageError
from quantize.formats import mlx_config, mlx_names
from quantize.formats.mlx import pack, unpack
from quantize.mlx_schemes import MLXAffine, MLXFloat
from quantize.schemes import Levelled, Plain, parse_scheme

SLIDING, FULL = "sliding_attention", "full_attention"
# Codes 5 i mod 2^bits, i = 0 to 31, as `mx.dequantize` reads them.
GOLDEN = {
    2: "E4E4E4E4 E4E4E4E4",
    3: "A878CEA8 CEA878CE 78CEA878",
    4: "3E94FA50 B61C72D8 3E94FA50 B61C72D8",
    5: "B347A8A0 CBC9A81F EAB05983 B89B924F DDA2C38B",
    6: "543CA140 2B688DE6 2C607CDF 647DA550 2F78CEEA 6D644C1C",
    8: "0F0A0500 231E1914 37322D28 4B46413C 5F5A5550 736E6964 87827D78 9B96918C",
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words(bits: int) -> None:
    codes = (torch.arange(32) * 5 % 2**bits).to(torch.uint8)[None]
    words = pack(codes, bits)
    assert " ".join(f"{word & 0xFFFFFFFF:08X}" for word in words[0].tolist()) == GOLDEN[bits]
    assert torch.equal(unpack(words, bits), codes)


def test_golden_group() -> None:
    weight = (torch.arange(32, dtype=torch.float32) - 10) / 16
    scheme = MLXAffine(4, 32, torch.float32)
    arrays = formats.named("mlx").pack("a.weight", scheme.encode(weight[None]))
    assert [f"{word:08X}" for word in arrays["a.weight"][0].tolist()] == [
        "BCCDDEEF",
        "8899AAAB",
        "44556677",
        "00112233",
    ]
    assert arrays["a.biases"].item() == 1.3125


def plain_unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Reads a row as one stream of bits; shares no code with ours."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(*words.shape[:-1], -1, bits)
    return (codes * (1 << np.arange(bits))).sum(-1)


@given(st.sampled_from(sorted(GOLDEN)), st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
def test_packing_is_a_stream_of_bits(bits: int, rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, groups * 32), generator=generator, dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (rows, groups * bits)
    assert np.array_equal(plain_unpack(words.numpy(), bits), codes.numpy())
    assert torch.equal(unpack(words, bits), codes)


# -- schemes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["mlx4-g64", "mlx3-g32-f16", "mlx8-g128-f32", "mlx-mxfp4", "mlx-nvfp4-f16"])
def test_spelling(text: str) -> None:
    scheme = parse_scheme(text)
    assert str(scheme) == text
    assert isinstance(scheme, Levelled)


@pytest.mark.parametrize("text", ["mlx7-g64", "mlx1-g64", "mlx4-g16", "mlx4-g256"])
def test_grids_that_mlx_lacks(text: str) -> None:
    with pytest.raises(UsageError, match="MLX has no"):
        parse_scheme(text)


@pytest.mark.parametrize("text", ["mlx2-g32", "mlx5-g64-f16", "mlx-mxfp4", "mlx-mxfp8", "mlx-nvfp4"])
def test_levels_are_what_decodes(text: str) -> None:
    """Codes on fitted, chosen and neighbouring levels read back as `scale * point + offset`."""
    scheme = parse_scheme(text)
    assert isinstance(scheme, Levelled)
    weight = torch.randn(7, 2 * scheme.block, generator=torch.Generator().manual_seed(3))
    parts = [scheme.fit(weight[:, i : i + scheme.block]) for i in (0, scheme.block)]
    tried = [parts[1], *scheme.neighbours(parts[1])]
    which = torch.arange(7)[:, None] % len(tried)
    parts[1] = scheme.choose(tried, which)
    codes = torch.randint(0, len(parts[0].points), weight.shape, generator=torch.Generator().manual_seed(4))
    scale, offset = (
        torch.cat([getattr(part, key) for part in parts], 1).repeat_interleave(scheme.block, 1)
        for key in ("scale", "offset")
    )
    coded = scheme.assemble(codes.to(torch.uint8), parts)
    assert torch.allclose(coded.dequantize(), parts[0].points[codes] * scale + offset, rtol=1e-6, atol=1e-6)
    assert coded.rows(2, 5).dequantize().shape == (3, weight.shape[1])


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [(MLXAffine(4, 64), 4.5), (MLXAffine(4, 32), 5.0), (MLXAffine(4, 128), 4.25), (MLXAffine(4, 64, torch.float32), 5),
     (MLXFloat("mxfp4"), 4.25), (MLXFloat("mxfp8"), 8.25), (MLXFloat("nvfp4"), 4.5)],
)  # fmt: skip
def test_bits_per_weight_are_those_of_the_pieces(scheme: Any, bits: float) -> None:
    assert scheme.bits_per_weight((64, 256)) == bits
    pieces = formats.named("mlx").pieces("a.weight", (64, 256), scheme)
    assert sum(piece.nbytes for piece in pieces) * 8 == bits * 64 * 256
    arrays = formats.named("mlx").pack("a.weight", scheme.encode(torch.randn(64, 256)))
    assert {p.name: (p.dtype, p.shape) for p in pieces} == {n: (a.dtype, tuple(a.shape)) for n, a in arrays.items()}


# -- whole runs --------------------------------------------------------------------------------------------------------

TEXT = " ".join(f"word {i} of {i * i % 97}" for i in range(2500))


def run(source: Path, out: Path, **options: Any) -> Path:
    return quantize.run(
        source, out=out, **{"method": "rtn", "format": "mlx", "threads": 1, "eval": "none"} | options
    ).out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama") / "Tiny", tokenizer=True)


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    return run(model, model.with_name("rtn"))


def test_folder(model: Path, folder: Path) -> None:
    """Embedding and head are quantized, norms are as they were, and words mean what the reader says."""
    stored, source = load_file(folder / "model.safetensors"), load_file(model / "model.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == set(source)
    for name, value in source.items():
        if value.dim() == 1:
            assert torch.equal(stored[name], value)
            continue
        stem = name.removesuffix(".weight")
        words, scales, biases = (stored[f"{stem}.{leaf}"] for leaf in ("weight", "scales", "biases"))
        assert (words.dtype, scales.dtype, biases.dtype) == (torch.uint32, torch.bfloat16, torch.bfloat16)
        codes = torch.from_numpy(plain_unpack(words.view(torch.int32).numpy(), 4)).float()
        groups = codes.unflatten(-1, (-1, 64)) * scales.float()[..., None] + biases.float()[..., None]
        assert torch.equal(checkpoint.read(name), groups.flatten(-2))
        assert torch.equal(checkpoint.read(name, 3, 9), groups.flatten(-2)[3:9])
        assert (groups.flatten(-2) - value.float()).square().mean() < 0.03 * value.float().square().mean()


def test_config_and_card(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    block = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config["quantization"] == config["quantization_config"] == block
    assert config["tie_word_embeddings"] is False
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert "library_name: mlx\n" in (folder / "README.md").read_text()


def test_default_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert quantize.run(model, method="rtn", format="mlx", bits=3, threads=1).out.name == "Tiny-3bit"


def test_overrides(model: Path, tmp_path: Path) -> None:
    rules = ("lm_head=mlx6-g32", "model.layers.0.mlp.*=keep", "*.1.mlp.up_proj=mlx-mxfp4")
    out = run(model, tmp_path / "Out", bits=3, group_size=128, set=rules)
    block = json.loads((out / "config.json").read_text())["quantization"]
    stem = "model.layers"
    assert {key: value for key, value in block.items() if "." not in key and key != "lm_head"} == {
        "group_size": 64, "bits": 3, "mode": "affine",
    }  # fmt: skip
    assert block["lm_head"] == {"group_size": 32, "bits": 6, "mode": "affine"}
    assert block[f"{stem}.1.mlp.up_proj"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert block[f"{stem}.1.mlp.down_proj"] == {"group_size": 128, "bits": 3, "mode": "affine"}  # 128 wide
    assert [block[f"{stem}.0.mlp.{leaf}_proj"] for leaf in ("gate", "up", "down")] == [False] * 3
    held = {name: str(info.scheme) for name, info in open_checkpoint(out).tensors.items()}
    assert held["model.layers.0.mlp.up_proj.weight"] == "bf16"
    assert held["model.layers.1.mlp.up_proj.weight"] == "mlx-mxfp4"
    assert held["lm_head.weight"] == "mlx6-g32"
    with pytest.raises(UsageError, match="width 64 is no multiple"):
        run(model, tmp_path / "None", group_size=128, fallback=False)


@pytest.mark.parametrize(("dtype", "kind"), [("f16", torch.float16), ("f32", torch.float32)])
def test_scales_have_the_models_type(model: Path, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    out = run(model, tmp_path / "Out", dtype=dtype)
    stored = load_file(out / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {kind, torch.uint32}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(kind).removeprefix("torch.")


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
def test_calibrated_methods_round_onto_the_grid(model: Path, folder: Path, tmp_path: Path, method: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = run(model, tmp_path / "Out", method=method, calib=(str(text),), calib_samples=16, calib_length=64)
    ours, nearest = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == nearest.keys()
    same = {name for name in ours if torch.equal(ours[name], nearest[name])}
    changed = {name for name in ours if name not in same and not name.endswith("norm.weight")}
    assert ("model.layers.1.input_layernorm.weight" in same) == (method == "gptq")
    assert {name.rpartition(".")[0] for name in changed} == {
        name.rpartition(".")[0] for name in ours if ".layers." in name and name.endswith(".scales")
    }


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3moe"])
def test_experts_are_stacked(tmp_path: Path, architecture: str) -> None:
    """In one array each, in one file whatever the limit; read back one by one."""
    source = gguf_models.save(architecture, tmp_path / "Source", dtype=torch.bfloat16)
    out = run(source, tmp_path / "Out", group_size=32, split_size=30_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert not list(out.glob("*@*"))
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {name: value for file in files for name, value in load_file(file).items()}
    assert index.keys() == stored.keys()
    before, after = open_checkpoint(source), open_checkpoint(out)
    assert set(before.tensors) == set(after.tensors)
    stem = "model.layers.0." + ("block_sparse_moe" if architecture == "mixtral" else "mlp")
    down = stored[f"{stem}.switch_mlp.down_proj.weight"]
    assert down.shape[0] == 4
    names = ("w1", "w3", "w2") if architecture == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for leaf in names:
        for expert in range(4):
            name = f"{stem}.experts.{expert}.{leaf}.weight"
            expected = MLXAffine(4, 32).encode(before.read(name)).dequantize()
            assert torch.equal(after.read(name), expected)
            assert torch.equal(after.read(name, 1, 4), expected[1:4])
    config = json.loads((out / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 4
    assert config["quantization"].get(f"{stem}.gate") is False  # the router stays as it is
    with pytest.raises(UsageError, match="give all experts of a projection one scheme"):
        run(source, tmp_path / "None", set=(f"{stem}.experts.1.{names[0]}=mlx8-g64",))


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    source = gguf_models.save("gpt2", tmp_path / "Source")
    with pytest.raises(InputError, match="'gpt2' cannot be written for MLX yet"):
        run(source, tmp_path / "Out")


def test_threads_do_not_matter(model: Path, folder: Path, tmp_path: Path) -> None:
    assert tiny.contents(run(model, tmp_path / folder.name, threads=2)) == tiny.contents(folder)


# -- names and config --------------------------------------------------------------------------------------------------


def test_names_of_experts() -> None:
    name = "model.layers.3.block_sparse_moe.experts.11.w3.weight"
    assert mlx_names.place(name, "scales") == "model.layers.3.block_sparse_moe.switch_mlp.up_proj.scales@11"
    assert mlx_names.expert("model.layers.3.block_sparse_moe.switch_mlp.up_proj.weight", 11) == name
    assert mlx_names.place("model.layers.3.self_attn.q_proj.bias") == "model.layers.3.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
        (
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
        ),
        (
            {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_positions_are_told_where_mlx_looks(rope: dict[str, Any], expected: dict[str, Any]) -> None:
    config = mlx_config.configured({"rope_parameters": rope}, {})
    assert config == {"rope_parameters": rope, **expected}
    older = {"rope_theta": 7.0, "num_local_experts": 2, "dtype": "float16"}
    assert mlx_config.configured(older, {}) == {**older, "num_experts": 2, "torch_dtype": "float16"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": False}, ""),
        ({"model_type": "llama"}, ""),
        ({"model_type": "gemma2", "sliding_window": 8}, "the model to the last 8 tokens"),
        ({"model_type": "mistral", "sliding_window": 8}, "the model to the last 8 tokens"),
        ({"model_type": "gemma3_text", "sliding_window": 8, "layer_types": [SLIDING, FULL] * 2}, ""),
        ({"model_type": "gemma3_text", "sliding_window": 8, "layer_types": [SLIDING, FULL, FULL]}, "one layer in 2"),
    ],
)
def test_what_mlx_does_otherwise_is_said(config: dict[str, Any], said: str) -> None:
    found = mlx_config.notices(config)
    assert (said in found[0]) if said else not found
    if FULL in config.get("layer_types", ()):
        assert mlx_config.configured(config, {})["sliding_window_pattern"] == 2


# -- folders of others -------------------------------------------------------------------------------------------------


def edited(folder: Path, into: Path, block: Any, drop: str = "", **arrays: torch.Tensor) -> Path:
    into.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization")
    (into / "config.json").write_text(json.dumps(config | block))
    stored = {n: v for n, v in load_file(folder / "model.safetensors").items() if n != drop}
    save_file(stored | arrays, into / "model.safetensors")
    return into


def test_headers_without_padding_are_read(folder: Path, tmp_path: Path) -> None:
    """As mlx writes them: the data starts at any byte."""
    raw = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + length].rstrip() + b" "
    header += b" " * ((8 + len(header)) % 8 == 0)
    copy = edited(folder, tmp_path / "Copy", {"quantization": {"group_size": 64, "bits": 4}})
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(open_checkpoint(copy).read(name), open_checkpoint(folder).read(name))


@pytest.mark.parametrize(
    "block",
    [
        {"group_size": 64, "bits": 4},  # no mode: affine
        {"group_size": 64, "bits": 4, "lm_head": {"group_size": None, "bits": None, "mode": "affine"}},
        {"group_size": 64, "bits": 4, "lm_head": True},
    ],
)
def test_blocks_of_others(folder: Path, tmp_path: Path, block: dict[str, Any]) -> None:
    copy = edited(folder, tmp_path / "Copy", {"quantization": block})
    assert {str(info.scheme) for info in open_checkpoint(copy).tensors.values()} == {"mlx4-g64", "bf16"}


@pytest.mark.parametrize(
    ("block", "drop", "said"),
    [
        ({"group_size": 64, "bits": 4}, "lm_head.biases", "lacks tensor 'lm_head.biases'"),
        ({"group_size": 64, "bits": 8}, "", "config says 8 bits in groups of 64"),
        ({"group_size": 64, "bits": 7}, "", "MLX has no grids of 7 bits"),
        ({"group_size": 64, "bits": 4, "mode": "mxfp9"}, "", "unknown mode 'mxfp9'"),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "", "says mode mxfp4"),
        ({"group_size": 128, "bits": 4}, "", "groups of 128"),
        ({"group_size": 64, "bits": "four"}, "", "says mode affine, four bits"),
    ],
)
def test_broken_folders(folder: Path, tmp_path: Path, block: dict[str, Any], drop: str, said: str) -> None:
    copy = edited(folder, tmp_path / "Copy", {"quantization": block}, drop)
    with pytest.raises(InputError) as caught:
        _ = open_checkpoint(copy).tensors
    assert said in str(caught.value)


def test_stacks_of_something_else_are_refused(folder: Path, tmp_path: Path) -> None:
    block = {"quantization": {"group_size": 64, "bits": 4}}
    copy = edited(folder, tmp_path / "Copy", block, **{"conv.weight": torch.zeros(2, 3, 4)})
    with pytest.raises(InputError, match=r"'conv\.weight' is a stack of no experts"):
        _ = open_checkpoint(copy).tensors


def test_conversion_gives_what_was_read(folder: Path, tmp_path: Path) -> None:
    quantize.convert(folder, format="hf", dtype="f32", out=tmp_path / "Plain")
    plain, source = load_file(tmp_path / "Plain/model.safetensors"), open_checkpoint(folder)
    for name, info in source.tensors.items():
        assert torch.equal(plain[name], source.read(name).float())
        assert isinstance(info.scheme, Plain | MLXAffine)
    config = json.loads((tmp_path / "Plain/config.json").read_text())
    assert "quantization" not in config
    assert "quantization_config" not in config
