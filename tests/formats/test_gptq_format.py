"""GPTQ folders: the stream of bits, both versions of zero points, files of others, overrides, broken files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantize
from quantize import formats
from quantize.errors import InputError
from quantize.formats import bitstream, gptq_config
from quantize.formats.gptq import GPTQ, GPTQ_V2
from quantize.schemes import AffineInt, Plain, QuantizedTensor, Scheme

BITS = (2, 3, 4, 8)
BLOCK = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": False,
    "checkpoint_format": "gptq_v2",
}
# The words of a symmetric grid's zero points, version 1 and 2.
GOLDEN_ZEROS = {
    2: ([0x55555555], [0xAAAAAAAA]),
    3: ([0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
    4: ([0x77777777], [0x88888888]),
    8: ([0x7F7F7F7F], [0x80808080]),
}


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """The words of one column as one long number, in numbers without a sign."""
    whole = sum(int(code) << bits * i for i, code in enumerate(codes))
    return np.array([whole >> 32 * w & 0xFFFFFFFF for w in range(len(codes) * bits // 32)], np.uint32)


def streams(codes: Tensor, bits: int) -> np.ndarray:
    return np.stack([stream(column, bits) for column in codes.numpy().T], axis=1)


def coded(rows: int, cols: int, scheme: AffineInt, seed: int = 0, lowest: int = 0) -> QuantizedTensor:
    """Random codes on a grid; zero points from `lowest` on, or the middle where it is symmetric."""
    generator = torch.Generator().manual_seed(seed)
    groups, top = cols // scheme.group(cols), 2**scheme.bits
    zeros = torch.randint(lowest, top, (rows, groups), dtype=torch.uint8, generator=generator)
    arrays = {
        "codes": torch.randint(0, top, (rows, cols), dtype=torch.uint8, generator=generator),
        "scales": torch.rand(rows, groups, generator=generator).half() + 0.01,
        "zeros": torch.full_like(zeros, top // 2) if scheme.symmetric else zeros,
    }
    return QuantizedTensor(scheme, (rows, cols), arrays)


def unsigned(words: Tensor) -> list[int]:
    return [int(word) & 0xFFFFFFFF for word in words.flatten()]


def folder(path: Path, tensors: dict[str, Tensor], **block: Any) -> Path:
    said = {key: value for key, value in (BLOCK | block).items() if value is not ...}
    return tiny.write(path, {"model_type": "llama", "quantization_config": said}, tensors)


def opened(path: Path) -> formats.Checkpoint:
    return formats.find(path).open(path)


# ------------------------------------------------------------------------------------------------------------
# The stream of bits


@given(st.sampled_from([*BITS, 5, 6, 7]), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_pack_and_unpack(bits: int, periods: int, cols: int, seed: int) -> None:
    rows = periods * bitstream.period(bits)
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = bitstream.pack(codes, bits)
    assert (words.dtype, words.shape) == (torch.int32, (rows * bits // 32, cols))
    np.testing.assert_array_equal(words.numpy().view(np.uint32), streams(codes, bits))
    assert torch.equal(bitstream.unpack(words, bits), codes)
    assert torch.equal(bitstream.unpack(bitstream.pack(codes.T.contiguous().T, bits), bits), codes)


@pytest.mark.parametrize(
    ("bits", "row", "words"),
    [
        (2, 15, [0xC0000000]),
        (4, 0, [0xF]),
        (4, 7, [0xF0000000]),
        (8, 3, [0xFF000000]),
        (3, 1, [0x38, 0, 0]),
        (3, 10, [0xC0000000, 0x1, 0]),
        (3, 21, [0, 0x80000000, 0x3]),
        (3, 31, [0, 0, 0xE0000000]),
    ],
)
def test_where_each_code_lies(bits: int, row: int, words: list[int]) -> None:
    codes = torch.zeros(bitstream.period(bits), 1, dtype=torch.uint8)
    codes[row] = 2**bits - 1
    assert unsigned(bitstream.pack(codes, bits)) == words


@pytest.mark.parametrize("bits", BITS)
def test_golden_words_of_symmetric_zero_points(bits: int) -> None:
    tensor = coded(32, 32, AffineInt(bits, 32, symmetric=True))
    for version, target in enumerate((GPTQ, GPTQ_V2)):
        words = unsigned(target.pack("m.weight", tensor)["m.qzeros"])
        golden = GOLDEN_ZEROS[bits][version]
        assert words == golden * (bits // len(golden))


# ------------------------------------------------------------------------------------------------------------
# What we write


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(BITS),
    st.sampled_from([-1, 16, 32, 64]),
    st.booleans(),
    st.sampled_from([GPTQ, GPTQ_V2]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 2**31),
)
def test_arrays_are_those_announced_and_read_back_as_they_were(
    tmp_path: Path, bits: int, group: int, symmetric: bool, target: Any, high: int, wide: int, seed: int
) -> None:
    scheme = AffineInt(bits, group, symmetric)
    tensor = coded(32 * high, 64 * wide, scheme, seed)
    arrays = target.pack("m.weight", tensor)
    announced = {p.name: (p.dtype, p.shape) for p in target.pieces("m.weight", tensor.shape, scheme)}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in arrays.items()} == announced
    np.testing.assert_array_equal(
        arrays["m.qweight"].numpy().view(np.uint32), streams(tensor.arrays["codes"].T.contiguous(), bits)
    )
    size = 64 * wide if group == -1 else group
    assert arrays["m.g_idx"].tolist() == [k // size for k in range(64 * wide)]
    path = tiny.write(
        tmp_path / "m",
        {"quantization_config": target.quantization_config({"m.weight": scheme})},
        arrays | {"norm.weight": torch.ones(2)},
    )
    checkpoint = opened(path)
    found = checkpoint.read_coded("m.weight")
    assert checkpoint.format == "gptq"
    assert found is not None
    assert found.scheme == checkpoint.tensors["m.weight"].scheme == scheme
    assert checkpoint.tensors["m.weight"].nbytes == sum(value.numel() * value.itemsize for value in arrays.values())
    assert found.arrays.keys() == tensor.arrays.keys()
    assert all(torch.equal(found.arrays[key], tensor.arrays[key]) for key in tensor.arrays)
    assert torch.equal(checkpoint.read("m.weight"), tensor.dequantize())
    assert torch.equal(checkpoint.read("m.weight", 5, 29), tensor.dequantize()[5:29])
    assert torch.equal(checkpoint.read("m.weight", 31), tensor.dequantize()[31:])
    assert checkpoint.read_coded("norm.weight") is None
    assert checkpoint.read("norm.weight").tolist() == [1, 1]
    assert checkpoint.file("m.weight") == checkpoint.file("norm.weight") == path / "model.safetensors"


def test_a_file_is_of_one_version() -> None:
    """One tensor that version 1 cannot hold takes the whole file to version 2."""
    mixed: dict[str, Scheme] = {"a.weight": AffineInt(4, 32, symmetric=True), "b.weight": AffineInt(4, 32)}
    symmetric = coded(32, 32, AffineInt(4, 32, symmetric=True))
    for schemes, word, version in (
        (mixed, 0x88888888, "gptq_v2"),
        ({"a.weight": mixed["a.weight"]}, 0x77777777, "gptq"),
    ):
        settled = GPTQ.settled(schemes)
        assert settled.quantization_config(schemes)["checkpoint_format"] == version
        assert GPTQ.quantization_config(schemes)["checkpoint_format"] == version
        assert set(unsigned(settled.pack("a.weight", symmetric)["a.qzeros"])) == {word}
    assert GPTQ_V2.settled(schemes).quantization_config(schemes)["checkpoint_format"] == "gptq_v2"
    assert settled.name == "gptq"


@pytest.mark.parametrize(
    ("scheme", "accepted"),
    [
        *((AffineInt(bits, 128, symmetric), True) for bits in BITS for symmetric in (False, True)),
        *((AffineInt(4, group), True) for group in (-1, 16, 32, 64, 256, 512, 1024)),
        (Plain(torch.bfloat16), True),
        *((AffineInt(bits, 128), False) for bits in (5, 6, 7)),
        (AffineInt(4, 8), False),
        (AffineInt(4, 96), False),
    ],
)
def test_reject(scheme: AffineInt | Plain, accepted: bool) -> None:
    assert (GPTQ.reject(scheme) is None) == (GPTQ_V2.reject(scheme) is None) == accepted


def test_tensors_that_do_not_fit() -> None:
    assert GPTQ.refuse_tensor("m.weight", (64, 96)) is None
    assert GPTQ.refuse_tensor("m.weight", (40, 64)) == "its height 40 is no multiple of 32"
    assert GPTQ.refuse_tensor("m.weight", (64, 72)) == "its width 72 is no multiple of 32"
    assert GPTQ.refuse_tensor("experts.gate_up_proj", (8, 64, 64)) == "its name does not end in .weight"


def test_plain_tensors_are_stored_as_they_are() -> None:
    values = torch.arange(4.0).bfloat16()
    tensor = QuantizedTensor(Plain(torch.bfloat16), (4,), {"values": values})
    assert GPTQ.pack("norm.weight", tensor)["norm.weight"] is values
    (piece,) = GPTQ.pieces("norm.weight", (4,), Plain(torch.bfloat16))
    assert (piece.name, piece.dtype, piece.shape, piece.nbytes) == ("norm.weight", torch.bfloat16, (4,), 8)


# ------------------------------------------------------------------------------------------------------------
# The config and its overrides

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
SYM = AffineInt(4, 64, symmetric=True)


def linears(layers: int = 12, **other: Scheme) -> dict[str, Scheme]:
    """A llama's linears, all on `SYM` but those that `other` names, with underscores for dots in front of a leaf."""
    made: dict[str, Scheme] = {f"model.layers.{i}.{leaf}.weight": SYM for i in range(layers) for leaf in LEAVES}
    return made | {f"{name}.weight": scheme for name, scheme in other.items()}


def honoured(block: dict[str, Any], module: str) -> dict[str, Any] | None:
    """What a reader of `dynamic` makes of a module: None where it is left alone."""
    for pattern, changes in block.get("dynamic", {}).items():
        if re.match(pattern[2:], module):
            return None if pattern.startswith("-:") else {**block, **changes}
    return block


def test_config_block_of_one_grid() -> None:
    block = GPTQ.quantization_config(linears())
    assert block.pop("meta")["quantizer"][0].startswith("quantize:")
    assert block == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }
    assert GPTQ.quantization_config({"a.weight": AffineInt(4, -1)})["group_size"] == -1


def test_other_grids_are_named_with_what_engines_fuse() -> None:
    wide = AffineInt(8, 64, symmetric=True)
    changed = dict.fromkeys(("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"), wide)
    downs: dict[str, Scheme] = {f"model.layers.{i}.mlp.down_proj": AffineInt(8, 64) for i in range(12)}
    block = GPTQ.quantization_config(linears(**changed, **downs))
    assert "modules_in_block_to_quantize" not in block
    found = {name: honoured(block, name) for name in
             ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.gate_up_proj", "model.layers.11.mlp.gate_proj",
              "model.layers.11.mlp.gate_up_proj", "model.layers.7.mlp.down_proj", "model.layers.1.self_attn.qkv_proj",
              "other.model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.x")}  # fmt: skip
    said = [(value["bits"], value["sym"]) for value in found.values() if value]
    assert said == [(8, True), (8, True), (4, True), (4, True), (8, False), (4, True), (4, True), (4, True)]
    assert len(block["dynamic"]) == 4  # all layers' down_proj share one pattern
    assert all(pattern.startswith("+:^") for pattern in block["dynamic"])


def test_kept_linears_are_named_both_ways() -> None:
    plain = Plain(torch.bfloat16)
    routers: dict[str, Scheme] = {f"model.layers.{i}.mlp.gate": plain for i in range(12)}
    tower: dict[str, Scheme] = {"vision.layers.0.self_attn.q_proj": plain}
    block = GPTQ.quantization_config(linears(**routers, **tower, **{"model.layers.11.mlp.down_proj": plain}))
    assert set(block["dynamic"]) == {
        r"-:^model\.layers\.11\.mlp\.down_proj$",
        r"-:^model\.layers\.\d+\.mlp\.gate$",
        r"-:^vision\.layers\.\d+\.self_attn\.q_proj$",
    }
    (listed,) = block["modules_in_block_to_quantize"]
    assert {"self_attn.k_proj", "mlp.gate_proj", "layers.1.mlp.down_proj", "0.mlp.down_proj"} <= set(listed)
    kept = [*routers, *tower, "model.layers.11.mlp.down_proj"]
    quantized = [name.removesuffix(".weight") for name in linears() if name != "model.layers.11.mlp.down_proj.weight"]
    for matches in (lambda name, end: name.endswith(end), lambda name, part: part in name):  # transformers, vLLM
        assert not [name for name in kept if any(matches(name, end) for end in listed)]
        assert all(any(matches(name, end) for end in listed) for name in quantized)


def test_expert_stacks_are_asked_about_as_one() -> None:
    leaves = ("gate_proj", "up_proj", "down_proj")
    wide = AffineInt(8, 64, symmetric=True)
    experts: dict[str, Scheme] = {
        f"model.layers.{i}.mlp.experts.{e}.{leaf}": (SYM, wide)[i] for i in (0, 1) for e in range(3) for leaf in leaves
    }
    router: dict[str, Scheme] = {"model.layers.0.mlp.gate": Plain(torch.bfloat16)}
    schemes = linears(2, **experts, **router)
    block = GPTQ.quantization_config(schemes)
    for name, bits in (("model.layers.0.mlp.experts", 4), ("model.layers.1.mlp.experts", 8)):
        said = honoured(block, name)
        assert said is not None
        assert said["bits"] == bits
        assert all((honoured(block, f"{name}.2.{leaf}") or {})["bits"] == bits for leaf in leaves)
    assert set(block["modules_in_block_to_quantize"][0]) == {*LEAVES, *leaves}


@pytest.mark.parametrize(
    ("schemes", "said"),
    [
        (linears(), None),
        (linears(2, **{"model.layers.0.mlp.down_proj": AffineInt(8, 64, True)}), "transformers reads one grid"),
        (linears(2, **{"model.layers.0.mlp.up_proj": AffineInt(8, 64, True)}), "vLLM fuses model.layers.0.mlp.gate_"),
        ({"a.weight": AffineInt(3, 64, True)}, "--sym only"),
        ({"a.weight": AffineInt(4, 64)}, "--sym only"),
        ({"a.weight": AffineInt(4, 256, True)}, "fast kernels"),
        ({"a.weight": Plain(torch.float16)}, None),
    ],
)
def test_what_engines_cannot_do_is_said(schemes: dict[str, Scheme], said: str | None) -> None:
    found = GPTQ.notices(schemes)
    assert any(said in line for line in found) if said else not found


# ------------------------------------------------------------------------------------------------------------
# Files of others


def ordered(bits: int = 4, version: str = "gptq_v2") -> tuple[dict[str, Tensor], Tensor]:
    """A layer as act-order leaves it, and its values: the group of a column is the one that g_idx names."""
    rows, cols, group = 32, 96, 32
    tensor = coded(rows, cols, AffineInt(bits, group), seed=3, lowest=1)
    order = torch.arange(cols)[torch.randperm(cols, generator=torch.Generator().manual_seed(1))] // group
    stored = tensor.arrays["zeros"] - int(version == "gptq")
    arrays = {
        "m.qweight": bitstream.pack(tensor.arrays["codes"].T, bits),
        "m.qzeros": bitstream.pack(stored, bits).T.contiguous(),
        "m.scales": tensor.arrays["scales"].T.contiguous(),
        "m.g_idx": order.int(),
    }
    values = torch.empty(rows, cols)
    for k in range(cols):
        g = int(order[k])
        off = tensor.arrays["codes"][:, k].float() - tensor.arrays["zeros"][:, g].float()
        values[:, k] = off * tensor.arrays["scales"][:, g].float()
    return arrays, values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_act_order(tmp_path: Path, bits: int, version: str) -> None:
    arrays, values = ordered(bits, version)
    checkpoint = opened(folder(tmp_path / "m", arrays, bits=bits, desc_act=True, checkpoint_format=version))
    assert torch.equal(checkpoint.read("m.weight"), values)
    assert torch.equal(checkpoint.read("m.weight", 3, 20), values[3:20])
    found = checkpoint.read_coded("m.weight")
    assert found is not None
    assert torch.equal(found.rows(3, 20).dequantize(), values[3:20])


def test_a_last_group_that_is_shorter(tmp_path: Path) -> None:
    tensor = coded(32, 96, AffineInt(4, 32))
    arrays = GPTQ_V2.pack("m.weight", tensor)
    arrays["m.g_idx"] = torch.arange(96, dtype=torch.int32) // 64
    arrays |= {name: arrays[name][:2].contiguous() for name in ("m.scales", "m.qzeros")}
    scales, zeros = (tensor.arrays[key][:, :2].float().repeat_interleave(64, 1)[:, :96] for key in ("scales", "zeros"))
    expected = (tensor.arrays["codes"].float() - zeros) * scales
    for without in (False, True):
        arrays = {name: value for name, value in arrays.items() if not (without and name == "m.g_idx")}
        checkpoint = opened(folder(tmp_path / str(without), arrays, group_size=64))
        assert torch.equal(checkpoint.read("m.weight"), expected)


@pytest.mark.parametrize("order", [None, torch.zeros(64, dtype=torch.int32)])
def test_no_order_stored_is_the_plain_order(tmp_path: Path, order: Tensor | None) -> None:
    tensor = coded(32, 64, AffineInt(4, 32))
    arrays = {name: value for name, value in GPTQ_V2.pack("m.weight", tensor).items() if name != "m.g_idx"}
    arrays |= {} if order is None else {"m.g_idx": order}
    assert torch.equal(opened(folder(tmp_path / "m", arrays)).read("m.weight"), tensor.dequantize())


def test_the_version_is_told_by_the_zero_points_of_symmetric_files(tmp_path: Path) -> None:
    tensor = coded(32, 32, AffineInt(4, 32, symmetric=True))
    for target in (GPTQ, GPTQ_V2):
        arrays = target.pack("m.weight", tensor)
        path = folder(tmp_path / target.name, arrays, sym=True, checkpoint_format=...)
        assert torch.equal(opened(path).read("m.weight"), tensor.dequantize())
        other = "gptq" if target is GPTQ_V2 else "gptq_v2"
        path = folder(tmp_path / f"not-{target.name}", arrays, sym=True, checkpoint_format=other)
        with pytest.raises(InputError, match="contradicts") as caught:
            opened(path).read("m.weight")
        assert f"set checkpoint_format to {target.name}" in str(caught.value.hint)
    arrays["m.qzeros"][0, 0] = 0x77777778
    with pytest.raises(InputError, match="7 to 8"):
        opened(folder(tmp_path / "both", arrays, sym=True)).read("m.weight")


def version_1(zeros: list[int], how: str) -> Tensor:
    """The words of one group of zero points, 4 bits, as different packers store them less 1."""
    words = []
    for first in range(0, len(zeros), 8):
        eight = zeros[first : first + 8]
        if how == "constant":  # 1 taken from all fields of the word at once
            word = sum(zero << 4 * j for j, zero in enumerate(eight)) - 0x11111111
        else:  # each field less 1 put over the word: -1 covers all that is above it
            word = 0
            for j, zero in enumerate(eight):
                word |= ((zero - 1) & (0xF if how == "masked" else 0xFFFFFFFF)) << 4 * j
        words.append(word & 0xFFFFFFFF)
    return torch.from_numpy(np.array([words], np.uint32).view(np.int32))


ONES = [1] * 24


@pytest.mark.parametrize(
    ("how", "zeros", "meta", "fails"),
    [
        ("constant", [0, 3, 0, 0, 15, 1, 0, 0, *ONES], {"quantizer": ["gptqmodel:2.0.0"]}, False),
        ("masked", [3, 0, 5, 15, 1, 2, 9, 0, *ONES], {}, False),
        ("covering", [3, 4, 5, 15, 1, 2, 9, 0, *ONES], {}, False),
        ("covering", [3, 4, 0, 15, 1, 2, 9, 8, *ONES], {}, True),
        ("covering", [3, 4, 5, 15, 1, 2, 0, 8, *ONES], None, True),
    ],
)
def test_zero_points_of_0_in_version_1(tmp_path: Path, how: str, zeros: list[int], meta: Any, fails: bool) -> None:
    tensor = coded(32, 32, AffineInt(4, 32))
    arrays = GPTQ_V2.pack("m.weight", tensor) | {"m.qzeros": version_1(zeros, how)}
    checkpoint = opened(folder(tmp_path / "m", arrays, checkpoint_format="gptq", meta=meta))
    if fails:
        with pytest.raises(InputError, match="has lost zero points"):
            checkpoint.read("m.weight")
        return
    expected = QuantizedTensor(
        tensor.scheme, tensor.shape, {**tensor.arrays, "zeros": torch.tensor(zeros, dtype=torch.uint8)[:, None]}
    )
    assert torch.equal(checkpoint.read("m.weight"), expected.dequantize())


def test_overrides_of_single_modules(tmp_path: Path) -> None:
    narrow, wide = coded(32, 64, AffineInt(4, 32)), coded(32, 64, AffineInt(8, 64), seed=1)
    arrays = GPTQ_V2.pack("a.b.weight", narrow) | GPTQ_V2.pack("a.c.weight", wide) | {"a.d.weight": torch.ones(2, 2)}
    rules = {"-:a\\.d": {}, "+:a\\.c$": {"bits": 8, "group_size": 64}, ".*": {}}
    checkpoint = opened(folder(tmp_path / "m", arrays, dynamic=rules))
    found = {name: str(info.scheme) for name, info in checkpoint.tensors.items()}
    assert found == {"a.b.weight": "int4-g32", "a.c.weight": "int8-g64", "a.d.weight": "f32"}
    assert torch.equal(checkpoint.read("a.c.weight"), wide.dequantize())
    assert torch.equal(checkpoint.read("a.b.weight"), narrow.dequantize())


@pytest.mark.parametrize("named", [True, False])
def test_the_block_in_a_file_of_its_own(tmp_path: Path, named: bool) -> None:
    tensor = coded(32, 64, AffineInt(4, 32))
    path = tiny.write(tmp_path / "m", {}, GPTQ_V2.pack("m.weight", tensor))
    block = {key: value for key, value in BLOCK.items() if named or key != "quant_method"}
    (path / "quantize_config.json").write_text(json.dumps(block))
    checkpoint = opened(path)
    assert checkpoint.format == "gptq"
    assert torch.equal(checkpoint.read("m.weight"), tensor.dequantize())
    assert checkpoint.side_files == {}


def test_what_the_config_leaves_out_is_told_by_the_shapes(tmp_path: Path) -> None:
    tensor = coded(32, 64, AffineInt(3, 32))
    path = folder(tmp_path / "m", GPTQ_V2.pack("m.weight", tensor), bits=..., group_size=..., sym=..., desc_act=...)
    (info,) = opened(path).tensors.values()
    assert str(info.scheme) == "int3-g32"
    assert torch.equal(opened(path).read("m.weight"), tensor.dequantize())


# ------------------------------------------------------------------------------------------------------------
# Broken files, and those that cannot be read


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"checkpoint_format": "marlin"}, "layout 'marlin': repacked for one GPU kernel"),
        ({"is_marlin_format": True}, "layout 'marlin'"),
        ({"quant_method": "marlin", "checkpoint_format": ...}, "layout 'marlin'"),
        ({"checkpoint_format": "bitblas"}, "layout 'bitblas'"),
        ({"checkpoint_format": "gptq_p"}, "layout 'gptq_p': GPTQModel's planes of bits"),
        ({"checkpoint_format": ..., "format": "ipex"}, "layout 'ipex'"),
        ({"pack_dtype": "int16"}, "packed in int16"),
        ({"bits": 8}, "'m' has codes of 4 bits, its config says 8"),
        ({"group_size": 64}, "'m' has 2 groups in 64 columns, its config says groups of 64"),
        ({"group_size": -1}, "'m' has 2 groups in 64 columns, its config says groups of -1"),
        ({"dynamic": {"+:(": {}}}, "'dynamic' holds the pattern"),
        ({"dynamic": [1]}, "'dynamic' is no table"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, block: dict[str, Any], said: str) -> None:
    path = folder(tmp_path / "m", GPTQ_V2.pack("m.weight", coded(32, 64, AffineInt(4, 32))), **block)
    with pytest.raises(InputError) as caught:
        _ = opened(path).tensors
    assert said in caught.value.message
    assert caught.value.hint
    assert str(path) in caught.value.message


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
def test_a_part_that_is_missing(tmp_path: Path, part: str) -> None:
    arrays = GPTQ_V2.pack("m.weight", coded(32, 64, AffineInt(4, 32)))
    del arrays[f"m.{part}"]
    path = folder(tmp_path / "m", arrays, desc_act=True)
    with pytest.raises(InputError, match=rf"lacks tensor 'm\.{part}'"):
        _ = opened(path).tensors


def test_a_group_that_is_not_there(tmp_path: Path) -> None:
    arrays = GPTQ_V2.pack("m.weight", coded(32, 64, AffineInt(4, 32)))
    arrays["m.g_idx"][5] = 2
    with pytest.raises(InputError, match="names a group"):
        opened(folder(tmp_path / "m", arrays)).read("m.weight")


def test_a_plain_model_that_is_said_to_be_quantized(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {"m.weight": torch.ones(32, 32)})
    with pytest.raises(InputError, match="no tensor is"):
        opened(path)


@pytest.mark.parametrize(
    "change",
    [
        {"m.qweight": torch.zeros(8, 31, dtype=torch.int32)},
        {"m.qweight": torch.zeros(7, 32, dtype=torch.int32)},
        {"m.qweight": torch.zeros(64, dtype=torch.int32)},
        {"m.qweight": torch.zeros(8, 32, dtype=torch.int16)},
        {"m.qzeros": torch.zeros(1, 4, dtype=torch.int32)},
        {"m.qzeros": torch.zeros(2, 5, dtype=torch.int32)},
        {"m.qzeros": torch.zeros(2, 4)},
        {"m.scales": torch.zeros(2, 31)},
        {"m.scales": torch.zeros(0, 32)},
        {"m.scales": torch.zeros(2, 0)},
        {"m.scales": torch.zeros(2, 32, dtype=torch.int32)},
        {"m.scales": torch.zeros(())},
        {"m.g_idx": torch.zeros(63, dtype=torch.int32)},
    ],
)
def test_parts_that_do_not_agree(tmp_path: Path, change: dict[str, Tensor]) -> None:
    arrays = GPTQ_V2.pack("m.weight", coded(32, 64, AffineInt(4, 32))) | change
    with pytest.raises(InputError, match=r"'m\.qweight', qzeros and scales do not agree"):
        _ = opened(folder(tmp_path / "m", arrays)).tensors


def test_linears_that_an_engine_fuses() -> None:
    names = [*linears(1), "l.1.x.q_proj.weight", "l.2.x.gate_proj.bias"]
    assert GPTQ.bound_together(names) == [
        tuple(f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkv"),
        tuple(f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("gate", "up")),
    ]
    assert gptq_config.needs_true_zeros([AffineInt(4, 64)])


def test_older_loaders_find_the_block_in_a_file_of_its_own(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "Model", tokenizer=True)
    report = quantize.run(model, method="rtn", bits=8, group_size=32, out=tmp_path / "Out")
    inside = json.loads((tmp_path / "Out/config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "Out/quantize_config.json").read_text()) == inside
    assert "quantize_config.json" in report.files
    quantize.convert(tmp_path / "Out", out=tmp_path / "Back")
    assert not (tmp_path / "Back/quantize_config.json").exists()
