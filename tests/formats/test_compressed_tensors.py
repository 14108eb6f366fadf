"""compressed-tensors folders: golden arrays, a reader of the test's own, whole runs, foreign and broken folders."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import quantize
from quantize import formats
from quantize.errors import InputError
from quantize.float_schemes import FP8, MXFP4, NVFP4, Int8Channel, PackedInt, members
from quantize.formats.compressed_config import quantized_by
from quantize.formats.compressed_folder import pack, unpack
from quantize.formats.compressed_tensors import CompressedTensorsFormat
from quantize.schemes import AffineInt, Plain, Scheme, parse_scheme

FORMAT = CompressedTensorsFormat()
LINEAR = "model.layers.0.self_attn.q_proj"
FP4_VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
# The width that a scheme's blocks divide.
STEP = {"nvfp4-a16": 16, "mxfp4-a16": 32, "fp8-block": 128}
SCHEMES = (
    *members(),
    FP8("block", 64, wide=True),
    PackedInt(5, -1),
    PackedInt(3, 32, symmetric=True),
    AffineInt(4, 32),
)


def weight(rows: int, cols: int, seed: int = 0) -> Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.1).bfloat16().float()


def width(scheme: Scheme, least: int) -> int:
    step = STEP.get(str(scheme)) or (scheme.block if scheme.block > 0 else 1)
    return -(-least // step) * step


def bits_of(words: np.ndarray, bits: int, count: int) -> list[int]:
    """Reads codes bit by bit from one stream of words."""
    whole = sum((int(word) % 2**32) << 32 * index for index, word in enumerate(words))
    return [(whole >> bits * index) % 2**bits for index in range(count)]


def values_of(arrays: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> np.ndarray:
    """What arrays of module `m` mean, in plain loops over numpy."""
    rows, cols = shape
    scale = arrays["m.weight_scale"].float().numpy()
    if isinstance(scheme, (NVFP4, MXFP4)):
        packed = arrays["m.weight_packed"].numpy()
        if isinstance(scheme, NVFP4):
            scale = scale / arrays["m.weight_global_scale"].numpy()
        else:
            scale = 2.0 ** (scale - 127)
        nibbles = [[packed[r, c // 2] >> 4 * (c % 2) & 15 for c in range(cols)] for r in range(rows)]
        signed = [[(-1 if n & 8 else 1) * FP4_VALUES[n & 7] for n in row] for row in nibbles]
        return np.array(signed, np.float32) * np.repeat(scale, scheme.block, 1).astype(np.float32)
    if "m.weight" in arrays:
        codes = arrays["m.weight"].float().numpy()
        if isinstance(scheme, FP8) and scheme.granularity == "block":
            scale = np.repeat(np.repeat(scale, scheme.size, 0)[:rows], scheme.size, 1)[:, :cols]
        return codes * scale
    assert isinstance(scheme, AffineInt)
    words = arrays["m.weight_packed"].numpy()
    middle, group = 2 ** (scheme.bits - 1), scheme.group(cols)
    codes = np.array([bits_of(row, scheme.bits, cols) for row in words]) - middle
    zeros = np.zeros_like(scale)
    if not scheme.symmetric:
        stored = arrays["m.weight_zero_point"].numpy()
        zeros = np.array([bits_of(stored[:, g], scheme.bits, rows) for g in range(scale.shape[1])]).T - middle
    return ((codes - np.repeat(zeros, group, 1)) * np.repeat(scale, group, 1)).astype(np.float32)


def folder(path: Path, tensors: dict[str, Tensor], block: dict[str, Any]) -> Path:
    return tiny.write(path, {"model_type": "llama", "quantization_config": block}, tensors)


def block_of(weights: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": []} | changes


def stored(scheme: Scheme, rows: int, cols: int, name: str = LINEAR) -> dict[str, Tensor]:
    return FORMAT.pack(f"{name}.weight", scheme.encode(weight(rows, cols)))


# -- arrays ------------------------------------------------------------------------------------------------------


def test_golden_words() -> None:
    codes = torch.arange(11, dtype=torch.uint8)[:, None]
    assert [word % 2**32 for (word,) in pack(codes, 4).tolist()] == [0x76543210, 0x00000A98]
    threes = torch.tensor([1] * 10 + [6, 5], dtype=torch.uint8)[:, None]
    first = sum(1 << 3 * index for index in range(10)) | (6 & 3) << 30
    assert [word % 2**32 for (word,) in pack(threes, 3).tolist()] == [first, 6 >> 2 | 5 << 1]


@given(st.integers(2, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 2**31))
def test_pack_and_unpack(bits: int, count: int, cols: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count, cols), dtype=torch.uint8, generator=generator)
    words = pack(codes, bits)
    assert words.shape == (-(-count * bits // 32), cols)
    assert torch.equal(unpack(words, bits, count), codes)
    assert bits_of(words[:, 0].numpy(), bits, count) == codes[:, 0].tolist()


@settings(max_examples=30)
@given(st.sampled_from(SCHEMES), st.integers(1, 40), st.integers(1, 150), st.integers(0, 2**31))
def test_arrays_are_those_announced_and_mean_what_the_codes_mean(
    scheme: Scheme, rows: int, least: int, seed: int
) -> None:
    shape = (rows, width(scheme, least))
    coded = scheme.encode(weight(*shape, seed))
    arrays = FORMAT.pack("m.weight", coded)
    announced = {piece.name: (piece.dtype, piece.shape) for piece in FORMAT.pieces("m.weight", shape, scheme)}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in arrays.items()} == announced
    np.testing.assert_allclose(values_of(arrays, scheme, shape), coded.dequantize().numpy(), rtol=1e-6, atol=0)


@settings(max_examples=30)
@given(st.sampled_from(SCHEMES), st.integers(1, 200), st.integers(1, 300), st.data())
def test_folders_are_read_back(scheme: Scheme, rows: int, least: int, data: st.DataObject) -> None:
    shape = (rows, width(scheme, least))
    coded = scheme.encode(weight(*shape))
    block = FORMAT.quantization_config({f"{LINEAR}.weight": scheme})
    with tempfile.TemporaryDirectory() as path:
        checkpoint = formats.find(folder(Path(path) / "m", FORMAT.pack(f"{LINEAR}.weight", coded), block)).open(
            Path(path) / "m"
        )
        (info,) = checkpoint.tensors.values()
        assert (info.name, info.shape) == (f"{LINEAR}.weight", shape)
        assert info.scheme == scheme
        start = data.draw(st.integers(0, rows - 1))
        stop = data.draw(st.integers(start + 1, rows))
        found = checkpoint.read_coded(info.name, start, stop)
        assert found is not None
        assert torch.equal(found.dequantize(), coded.dequantize()[start:stop])
        for key, value in found.arrays.items():
            assert torch.equal(value.view(torch.uint8), coded.arrays[key][start:stop].contiguous().view(torch.uint8))
        assert info.nbytes == sum(piece.nbytes for piece in FORMAT.pieces(info.name, shape, scheme))


# -- config ------------------------------------------------------------------------------------------------------


def test_the_config_of_fp8() -> None:
    made = FORMAT.quantization_config({"a.b.weight": FP8(), "a.router.weight": Plain(torch.bfloat16)})
    assert made == {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
                "output_activations": None,
                "format": "float-quantized",
            }
        },
        "ignore": ["a.router", "lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


@pytest.mark.parametrize(
    ("scheme", "layout", "said", "inputs"),
    [
        ("fp8-tensor", "float-quantized", {"strategy": "tensor"}, "token"),
        ("fp8-block", "float-quantized", {"strategy": "block", "block_structure": [128, 128]}, "group"),
        ("fp8-channel-a16", "naive-quantized", {"strategy": "channel"}, None),
        ("int8-channel", "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, "token"),
        ("int4-g64-sym-bf16", "pack-quantized", {"num_bits": 4, "group_size": 64, "symmetric": True}, None),
        ("int3-row-bf16", "pack-quantized", {"num_bits": 3, "strategy": "channel", "symmetric": False}, None),
        ("nvfp4-a16", "nvfp4-pack-quantized", {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}, None),
        ("mxfp4-a16", "mxfp4-pack-quantized", {"group_size": 32, "scale_dtype": "torch.uint8"}, None),
    ],
)
def test_configs(scheme: str, layout: str, said: dict[str, Any], inputs: str | None) -> None:
    made = FORMAT.quantization_config({"a.weight": parse_scheme(scheme)})
    (group,) = made["config_groups"].values()
    assert made["format"] == group["format"] == layout
    assert said.items() <= group["weights"].items()
    rounded = group["input_activations"]
    assert (rounded and rounded["strategy"]) == inputs
    assert rounded is None or rounded["dynamic"] is True


@given(st.lists(st.sampled_from(["keep", "fp8-channel", "int4-g32-sym-bf16", "nvfp4-a16"]), min_size=14, max_size=14))
def test_the_ignored_and_the_targeted_are_those_that_we_kept_and_made(choices: list[str]) -> None:
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate", "mlp.experts.1.w1",
              "mlp.experts.11.w1")  # fmt: skip
    names = [f"model.layers.{layer}.{leaf}" for layer in (1, 11) for leaf in leaves]
    schemes: dict[str, Scheme] = {
        f"{name}.weight": Plain(torch.bfloat16) if choice == "keep" else parse_scheme(choice)
        for name, choice in zip(names, choices, strict=True)
    }
    coded = {name for name, choice in zip(names, choices, strict=True) if choice != "keep"}
    if not coded:
        return
    made = FORMAT.quantization_config(schemes)
    assert quantized_by(made, [*names, "lm_head"]) == coded
    formats_ = {group["format"] for group in made["config_groups"].values()}
    assert made["format"] == (formats_.pop() if len(formats_) == 1 else "mixed-precision")


def test_what_is_bound_together() -> None:
    names = [f"l.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "e.0.w1", "e.0.w3", "e.0.w2", "q_a_proj")]
    assert FORMAT.bound_together(names) == [tuple(names[:3]), ("l.e.0.w1.weight", "l.e.0.w3.weight")]


def test_notices() -> None:
    def said(plain: torch.dtype, **schemes: str) -> str:
        coded = {f"m.{name}.weight": parse_scheme(scheme) for name, scheme in schemes.items()}
        return "; ".join(FORMAT.notices({**coded, "norm.weight": Plain(plain)}))

    assert said(torch.bfloat16, q_proj="fp8-channel", k_proj="fp8-channel") == ""
    assert "vLLM fuses m.q_proj and m.k_proj" in said(torch.bfloat16, q_proj="fp8-channel", k_proj="fp8-block")
    assert "4 and 8 bits only" in said(torch.bfloat16, up_proj="int3-g32-sym-bf16")
    assert "dequantize=True" in said(torch.bfloat16, up_proj="int4-g32-bf16")
    assert "--dtype bf16" in said(torch.float16, up_proj="fp8-channel")
    assert "lose some of their digits" in said(torch.bfloat16, up_proj="fp8-block-f32")


# -- whole runs --------------------------------------------------------------------------------------------------


def test_fp8_runs(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Tiny")
    report = quantize.run(model, method="fp8", eval="none", out=tmp_path / "out")
    assert (report.method, report.format) == ("rtn", "compressed-tensors")
    made, source = quantize.open(tmp_path / "out"), load_file(model / "model.safetensors")
    coded = {name for name, info in made.tensors.items() if info.scheme == FP8()}
    assert len(coded) == 14
    for name in coded:
        assert torch.equal(made.read(name), FP8().encode(source[name]).dequantize())
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]


def test_tensors_that_are_fused_share_a_global_scale(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Tiny", intermediate_size=640)  # more rows than are coded at a time
    quantize.run(
        model, method="fp8", eval="none", out=tmp_path / "out", set=("*.mlp.*=nvfp4-a16", "*.q_proj=fp8-tensor")
    )
    arrays, source = load_file(tmp_path / "out/model.safetensors"), load_file(model / "model.safetensors")
    for layer in range(tiny.LAYERS):
        stem = f"model.layers.{layer}.mlp"
        gate, up, down = (arrays[f"{stem}.{leaf}_proj.weight_global_scale"] for leaf in ("gate", "up", "down"))
        assert torch.equal(gate, up)
        peak = max(float(source[f"{stem}.{leaf}_proj.weight"].abs().max()) for leaf in ("gate", "up"))
        told = NVFP4(peak).encode(source[f"{stem}.up_proj.weight"])
        assert torch.equal(arrays[f"{stem}.up_proj.weight_packed"], told.arrays["codes"])
        alone = NVFP4().encode(source[f"{stem}.down_proj.weight"])
        assert float(down) == float(alone.arrays["globals"][0])
        query = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(
            quantize.open(tmp_path / "out").read(query), FP8("tensor").encode(source[query]).dequantize()
        )


@pytest.mark.parametrize(("method", "bits"), [("awq", 4), ("gptq", 3)])
def test_calibrated_integers(method: str, bits: int, tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Tiny", tokenizer=True)
    out = tmp_path / "out"
    quantize.run(model, method=method, bits=bits, group_size=32, format="compressed-tensors", out=out, **tiny.QUICK)
    made = quantize.open(out)
    scheme = PackedInt(bits, 32, symmetric=True)
    assert sum(info.scheme == scheme for info in made.tensors.values()) == 14
    found = made.read_coded(f"{LINEAR}.weight")
    assert found is not None
    assert found.arrays["scales"].dtype == torch.bfloat16
    assert bool((found.arrays["scales"] > 0).all())


@pytest.mark.parametrize("scheme", ["nvfp4-a16", "mxfp4-a16"])
def test_calibrated_small_floats(scheme: str, tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Tiny", tokenizer=True)
    out = tmp_path / "out"
    rules = (f"model.layers.*={scheme}",)
    quantize.run(model, method="gptq", format="compressed-tensors", out=out, set=rules, **tiny.QUICK)
    made = quantize.open(out)
    assert sum(str(info.scheme) == scheme for info in made.tensors.values()) == 14
    source = load_file(model / "model.safetensors")[f"{LINEAR}.weight"].float()
    assert float((made.read(f"{LINEAR}.weight") - source).norm() / source.norm()) < 0.3


def test_tiles_that_do_not_fit_become_rows(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Tiny", hidden_size=128, intermediate_size=192)
    quantize.run(model, method="fp8", eval="none", out=tmp_path / "out", set=("model.layers.*=fp8-block",))
    schemes = {name: info.scheme for name, info in quantize.open(tmp_path / "out").tensors.items()}
    assert schemes["model.layers.0.mlp.down_proj.weight"] == FP8()
    assert schemes["model.layers.0.mlp.up_proj.weight"] == FP8("block")


def test_an_fp8_folder_is_a_source(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Tiny")
    quantize.run(model, method="fp8", eval="none", out=tmp_path / "fp8")
    quantize.convert(tmp_path / "fp8", format="hf", out=tmp_path / "plain")
    made, plain = quantize.open(tmp_path / "fp8"), quantize.open(tmp_path / "plain")
    for name, info in plain.tensors.items():
        assert isinstance(info.scheme, Plain)
        assert torch.equal(plain.read(name), made.read(name).bfloat16())


# -- foreign folders ---------------------------------------------------------------------------------------------


def opened(path: Path, tensors: dict[str, Tensor], block: dict[str, Any]) -> Any:
    return formats.find(folder(path / "m", tensors, block)).open(path / "m")


def read_all(path: Path, tensors: dict[str, Tensor], block: dict[str, Any]) -> None:
    checkpoint = opened(path, tensors, block)
    for name in checkpoint.tensors:
        checkpoint.read(name)


@pytest.mark.parametrize("kind", ["f32", "bf16", "powers", "bytes"])
def test_deepseeks_tiles(kind: str, tmp_path: Path) -> None:
    codes = (weight(300, 200) * 100).to(torch.float8_e4m3fn)
    grid = torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    scale = {"f32": grid, "bf16": grid.bfloat16(), "bytes": (120 + grid * 8).to(torch.uint8)}.get(kind)
    if scale is None:
        scale = (120 + grid * 8).to(torch.uint8).view(torch.float8_e8m0fnu)
    block = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    tensors = {f"{LINEAR}.weight": codes, f"{LINEAR}.weight_scale_inv": scale}
    checkpoint = opened(tmp_path, tensors, block)
    (info,) = checkpoint.tensors.values()
    assert info.scheme == FP8("block", wide=kind != "bf16")
    meant = 2.0 ** (scale.view(torch.uint8).float() - 127) if scale.dtype.itemsize == 1 else scale.float()
    whole = codes.float() * meant.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    assert torch.equal(checkpoint.read(info.name), whole)
    assert torch.equal(checkpoint.read(info.name, 100, 260), whole[100:260])


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
def test_one_scale_per_tensor_in_any_form(shape: tuple[int, ...], suffix: str, tmp_path: Path) -> None:
    codes = weight(6, 8).to(torch.float8_e4m3fn)
    block = {"quant_method": "fp8", "activation_scheme": "static"}
    tensors = {
        f"{LINEAR}.weight": codes,
        f"{LINEAR}.{suffix}": torch.full(shape, 0.5),
        f"{LINEAR}.input_scale": torch.ones(()),
    }
    checkpoint = opened(tmp_path, tensors, block)
    assert checkpoint.tensors[f"{LINEAR}.weight"].scheme == FP8("tensor", wide=True)
    assert torch.equal(checkpoint.read(f"{LINEAR}.weight"), codes.float() / 2)
    assert checkpoint.dropped == {f"{LINEAR}.input_scale": "a scale of activations"}


def test_scales_in_float16_make_an_affine_grid(tmp_path: Path) -> None:
    arrays = stored(AffineInt(4, 32, symmetric=True), 8, 64)
    assert arrays[f"{LINEAR}.weight_scale"].dtype == torch.float16
    checkpoint = opened(tmp_path, arrays, FORMAT.quantization_config({f"{LINEAR}.weight": AffineInt(4, 32, True)}))
    assert checkpoint.tensors[f"{LINEAR}.weight"].scheme == AffineInt(4, 32, symmetric=True)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_older_words_hold_whole_codes(bits: int, tmp_path: Path) -> None:
    scheme, rows, cols = PackedInt(bits, 32), 5, 64
    coded = scheme.encode(weight(rows, cols))

    def older(codes: Tensor) -> Tensor:
        each = 32 // bits
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).reshape(len(codes), -1, each)
        return sum(padded[..., i].to(torch.int64) << bits * i for i in range(each)).to(torch.int32)  # type: ignore[union-attr]

    arrays = stored(scheme, rows, cols)
    arrays[f"{LINEAR}.weight_packed"] = older(coded.arrays["codes"])
    arrays[f"{LINEAR}.weight_zero_point"] = older(coded.arrays["zeros"].T).T.contiguous()
    checkpoint = opened(tmp_path, arrays, FORMAT.quantization_config({f"{LINEAR}.weight": scheme}))
    assert torch.equal(checkpoint.read(f"{LINEAR}.weight"), coded.dequantize())


def test_columns_of_a_group_may_lie_apart(tmp_path: Path) -> None:
    scheme = PackedInt(4, 32, symmetric=True)
    coded = scheme.encode(weight(4, 64))
    order = torch.tensor([0, 1] * 32, dtype=torch.int32)
    arrays = stored(scheme, 4, 64) | {f"{LINEAR}.weight_g_idx": order}
    checkpoint = opened(tmp_path, arrays, FORMAT.quantization_config({f"{LINEAR}.weight": scheme}))
    codes, scales = coded.arrays["codes"].float(), coded.arrays["scales"].float()
    assert torch.equal(checkpoint.read(f"{LINEAR}.weight"), (codes - 8) * scales[:, order.long()])
    with pytest.raises(InputError, match="lie apart"):
        FORMAT.pack(f"{LINEAR}.weight", checkpoint.read_coded(f"{LINEAR}.weight"))


def test_int8_forms(tmp_path: Path) -> None:
    arrays = stored(Int8Channel(), 6, 10)
    arrays[f"{LINEAR}.weight_scale"] = arrays[f"{LINEAR}.weight_scale"].flatten()
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    checkpoint = opened(tmp_path, arrays, block_of(weights))
    assert checkpoint.tensors[f"{LINEAR}.weight"].scheme == PackedInt(8, -1, symmetric=True)
    expected = arrays[f"{LINEAR}.weight"].float() * arrays[f"{LINEAR}.weight_scale"].float()[:, None]
    assert torch.equal(checkpoint.read(f"{LINEAR}.weight", 2, 5), expected[2:5])


def test_names_go_before_patterns_before_classes(tmp_path: Path) -> None:
    arrays = stored(PackedInt(4, 32, symmetric=True), 4, 64, "a.b") | stored(
        PackedInt(8, 64, symmetric=True), 4, 64, "a.c"
    )
    four = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    eight = four | {"num_bits": 8, "group_size": 64}
    two = four | {"num_bits": 2}
    groups = {
        "x": {"targets": ["Linear"], "weights": two},
        "y": {"targets": ["re:a\\..*"], "weights": four},
        "z": {"targets": ["a.c"], "weights": eight},
    }
    checkpoint = opened(tmp_path, arrays, block_of(None, config_groups=groups))
    found = {name: str(info.scheme) for name, info in checkpoint.tensors.items()}
    assert found == {"a.b.weight": "int4-g32-sym-bf16", "a.c.weight": "int8-g64-sym-bf16"}


# -- broken folders ----------------------------------------------------------------------------------------------

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
SYM = PackedInt(4, 32, symmetric=True)


@pytest.mark.parametrize(
    ("scheme", "changes", "block", "said"),
    [
        (SYM, {"weight_scale": None}, {}, "lacks tensor"),
        (SYM, {"weight_shape": None}, {}, "weight_shape"),
        (SYM, {"weight_shape": torch.tensor([5, 64])}, {}, "says 5 x 64"),
        (SYM, {"weight_shape": torch.tensor([4, -1])}, {}, "says 4 x -1"),
        (SYM, {"weight_shape": torch.tensor([4, 96])}, {}, "do not go together"),
        (SYM, {"weight_scale": torch.ones(4, 3).bfloat16()}, {}, "do not go together"),
        (SYM, {"weight_scale": torch.ones(3, 2).bfloat16()}, {}, "do not go together"),
        (SYM, {"weight_scale": torch.ones(4, 0).bfloat16()}, {}, "do not go together"),
        (SYM, {"weight_scale": torch.ones(4, 2, dtype=torch.int32)}, {}, "do not go together"),
        (SYM, {"weight_g_idx": torch.full((64,), 2, dtype=torch.int32)}, {}, "names a group"),
        (SYM, {"weight_g_idx": torch.zeros(7, dtype=torch.int32)}, {}, "do not go together"),
        (SYM, {"weight_packed": torch.zeros(4, 8)}, {}, "do not go together"),
        (SYM, {}, block_of(INT4 | {"symmetric": False}), "has no zero points"),
        (SYM, {}, block_of(INT4 | {"num_bits": 3}), "do not go together"),
        (SYM, {}, block_of(INT4 | {"num_bits": "four"}), "do not go together"),
        (SYM, {}, block_of(INT4 | {"group_size": 64}), "do not go together"),
        (PackedInt(4, 32), {"weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)}, {}, "do not go together"),
        (SYM, {}, block_of(INT4, config_groups=[1]), "is no table"),
        (SYM, {}, block_of(INT4, config_groups={"a": 3}), "is no table"),
        (SYM, {}, block_of(INT4, config_groups={"a": {"targets": "Linear"}}), "no list of names"),
        (SYM, {}, block_of(INT4, config_groups={"a": {"targets": ["re:("]}}), "holds the pattern 're:('"),
        (SYM, {}, block_of(INT4, sparsity_config={"format": "sparse-bitmask"}), "sparse weights"),
        (SYM, {}, block_of(INT4, transform_config={"config_groups": {"R1": {}}}), "rotated weights"),
        (FP8(), {"weight_scale": torch.ones(3, 1)}, {}, "do not go together"),
        (FP8(), {"weight_scale": torch.ones(4, 1, dtype=torch.int64)}, {}, "do not go together"),
        (FP8(), {"weight": torch.zeros(4, 64, 1).to(torch.float8_e4m3fn)}, {}, "do not go together"),
        (FP8(), {"weight": torch.zeros(0, 64).to(torch.float8_e4m3fn)}, {}, "do not go together"),
        (NVFP4(), {"weight_global_scale": torch.ones(2)}, {}, "do not go together"),
        (NVFP4(), {"weight_global_scale": None}, {}, "do not go together"),
        (MXFP4(), {"weight_scale": torch.ones(4, 3, dtype=torch.uint8)}, {}, "do not go together"),
        (Int8Channel(), {"weight_scale": torch.ones(4, 5).bfloat16()}, {}, "do not go together"),
        (Int8Channel(), {"weight": None}, {}, "no codes are that"),
    ],
)
def test_broken_folders(
    scheme: Scheme, changes: dict[str, Tensor | None], block: dict[str, Any], said: str, tmp_path: Path
) -> None:
    arrays: dict[str, Tensor | None] = {**stored(scheme, 4, 64)}
    arrays |= {f"{LINEAR}.{part}": value for part, value in changes.items()}
    kept = {name: value for name, value in arrays.items() if value is not None}
    with pytest.raises(InputError) as caught:
        read_all(tmp_path, kept, block or FORMAT.quantization_config({f"{LINEAR}.weight": scheme}))
    assert said in str(caught.value)
    assert caught.value.hint
