"""AWQ checkpoints: golden words and files, an unpacker of the test's own, and foreign and broken folders."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize import formats
from quantize.errors import InputError
from quantize.formats.awq import AWQFormat, pack, unpack
from quantize.schemes import AffineInt, Plain, QuantizedTensor

FORMAT = AWQFormat()
BLOCK = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
# Column j of eight lies in nibble PLACE[j].
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)


def unpacked(words: np.ndarray) -> np.ndarray:
    """Reads nibble by nibble, in numbers without a sign."""
    rows, count = words.shape
    codes = np.zeros((rows, count * 8), np.int64)
    for r in range(rows):
        for c in range(count):
            word = int(words[r, c]) % 2**32
            for j in range(8):
                codes[r, 8 * c + j] = word // 16 ** PLACE[j] % 16
    return codes


def dequantized(arrays: dict[str, np.ndarray], module: str, group: int) -> np.ndarray:
    codes = unpacked(arrays[f"{module}.qweight"])
    zeros = np.repeat(unpacked(arrays[f"{module}.qzeros"]), group, 0)
    scales = np.repeat(arrays[f"{module}.scales"].astype(np.float32), group, 0)
    return ((codes - zeros).astype(np.float32) * scales).T


def coded(rows: int, cols: int, group: int, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else cols // group
    arrays = {
        "codes": torch.randint(0, 16, (rows, cols), dtype=torch.uint8, generator=generator),
        "scales": torch.rand(rows, groups, generator=generator).half() + 0.01,
        "zeros": torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator),
    }
    return QuantizedTensor(AffineInt(4, group), (rows, cols), arrays)


def folder(path: Path, tensors: dict[str, Tensor], **block: Any) -> Path:
    settings_ = {key: value for key, value in (BLOCK | block).items() if value is not ...}
    return tiny.write(path, {"model_type": "llama", "quantization_config": settings_}, tensors)


# ------------------------------------------------------------------------------------------------------------
# Packing


def test_golden_words() -> None:
    columns = torch.arange(16, dtype=torch.uint8) % 8
    words = pack(columns.repeat(3, 1))
    assert words.dtype == torch.int32
    assert words.tolist() == [[0x75316420, 0x75316420]] * 3
    assert unpack(words).tolist() == [columns.tolist()] * 3


@pytest.mark.parametrize(
    ("column", "word"),
    [(0, 0xF), (1, 0xF0000), (2, 0xF0), (3, 0xF00000), (4, 0xF00), (5, 0xF000000), (6, 0xF000), (7, 0xF0000000)],
)
def test_where_each_column_lies(column: int, word: int) -> None:
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    codes[0, column] = 15
    assert pack(codes).item() & 0xFFFFFFFF == word


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_pack_and_unpack(rows: int, words: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, 8 * words), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes)
    assert packed.shape == (rows, words)
    assert torch.equal(unpack(packed), codes)
    np.testing.assert_array_equal(unpacked(packed.numpy()), codes.numpy())


@given(st.sampled_from([-1, 16, 32, 64]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_arrays_are_those_announced_and_mean_what_the_codes_mean(group: int, high: int, wide: int, seed: int) -> None:
    tensor = coded(8 * high, 64 * wide, group, seed)
    arrays = FORMAT.pack("m.weight", tensor)
    announced = {
        piece.name: (piece.dtype, piece.shape) for piece in FORMAT.pieces("m.weight", tensor.shape, tensor.scheme)
    }
    assert {name: (value.dtype, tuple(value.shape)) for name, value in arrays.items()} == announced
    plain = {name: value.numpy() for name, value in arrays.items()}
    values = dequantized(plain, "m", 64 * wide if group == -1 else group)
    np.testing.assert_array_equal(values, tensor.dequantize().numpy())


def test_symmetric_grids_store_the_middle_as_zero() -> None:
    tensor = AffineInt(4, 32, symmetric=True).encode(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)))
    assert (FORMAT.pack("m.weight", tensor)["m.qzeros"].numpy().view(np.uint32) == 0x88888888).all()


def test_plain_tensors_are_stored_as_they_are() -> None:
    values = torch.arange(4.0).bfloat16()
    tensor = QuantizedTensor(Plain(torch.bfloat16), (4,), {"values": values})
    assert FORMAT.pack("norm.weight", tensor)["norm.weight"] is values
    (piece,) = FORMAT.pieces("norm.weight", (4,), Plain(torch.bfloat16))
    assert (piece.name, piece.dtype, piece.shape, piece.nbytes) == ("norm.weight", torch.bfloat16, (4,), 8)


# ------------------------------------------------------------------------------------------------------------
# Whole folders


def golden(path: Path) -> Path:
    """A checkpoint written by hand, byte by byte: one linear of 16 inputs and 8 outputs in one group, and a norm.

    Every row holds the codes 0 to 7 for outputs 0 to 7, the zeros are 7 - n, the scales (n + 1) / 2.
    """
    path.mkdir()
    qweight = struct.pack("<I", 0x75316420) * 16
    qzeros = struct.pack("<I", 0x02461357)  # 7-n: column j in nibble PLACE[j]
    scales = struct.pack("<8e", *(0.5 * (n + 1) for n in range(8)))
    norm = bytes.fromhex("803f 0040")  # bfloat16 1.0, 2.0
    parts = [
        ("m.qweight", "I32", [16, 1], qweight),
        ("m.qzeros", "I32", [1, 1], qzeros),
        ("m.scales", "F16", [1, 8], scales),
        ("norm.weight", "BF16", [2], norm),
    ]
    header, end = {}, 0
    for name, code, shape, data in parts:
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in parts)
    (path / "model.safetensors").write_bytes(content)
    (path / "config.json").write_text(json.dumps({"quantization_config": BLOCK | {"group_size": -1}}))
    return path


def test_golden_checkpoint(tmp_path: Path) -> None:
    checkpoint = formats.find(golden(tmp_path / "m")).open(tmp_path / "m")
    assert checkpoint.format == "awq"
    assert [(i.name, i.shape, str(i.scheme), i.nbytes) for i in checkpoint.tensors.values()] == [
        ("m.weight", (8, 16), "int4-row", 64 + 4 + 16),
        ("norm.weight", (2,), "bf16", 4),
    ]
    expected = [[(n - (7 - n)) * 0.5 * (n + 1)] * 16 for n in range(8)]
    assert checkpoint.read("m.weight").tolist() == expected
    assert checkpoint.read("m.weight", 3, 6).tolist() == expected[3:6]
    assert checkpoint.read("norm.weight").tolist() == [1, 2]
    found = checkpoint.read_coded("m.weight")
    assert found is not None
    assert found.arrays["codes"].tolist() == [[n] * 16 for n in range(8)]
    assert found.arrays["zeros"].tolist() == [[7 - n] for n in range(8)]
    assert checkpoint.read_coded("norm.weight") is None
    assert checkpoint.file("m.weight") == checkpoint.file("norm.weight") == tmp_path / "m" / "model.safetensors"


def test_golden_arrays_are_what_we_write(tmp_path: Path) -> None:
    checkpoint = formats.find(golden(tmp_path / "m")).open(tmp_path / "m")
    found = checkpoint.read_coded("m.weight")
    assert found is not None
    written = b"".join(value.numpy().tobytes() for value in FORMAT.pack("m.weight", found).values())
    assert len(written) == 64 + 4 + 16
    assert (tmp_path / "m" / "model.safetensors").read_bytes().endswith(written + bytes.fromhex("803f 0040"))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([-1, 16, 32]), st.integers(0, 40), st.integers(0, 40))
def test_rows_of_a_quantized_tensor(tmp_path: Path, group: int, start: int, stop: int) -> None:
    tensor = coded(40, 32, group, seed=5)
    path = folder(tmp_path / f"g{group}", FORMAT.pack("m.weight", tensor), group_size=group)
    checkpoint = formats.find(path).open(path)
    whole = checkpoint.read_coded("m.weight")
    assert whole is not None
    assert whole.scheme == tensor.scheme
    assert all(torch.equal(whole.arrays[key], tensor.arrays[key]) for key in tensor.arrays)
    if start < stop:
        assert torch.equal(checkpoint.read("m.weight", start, stop), tensor.dequantize()[start:stop])
    assert torch.equal(checkpoint.read("m.weight", start), tensor.dequantize()[start:])


@pytest.mark.parametrize(
    "block",
    [
        {"bits": ..., "group_size": ..., "w_bit": 4, "q_group_size": 32, "version": "GEMM"},
        {"version": ..., "format": "gemm", "checkpoint_format": "gemm"},
        {"version": None, "modules_to_not_convert": None},
        {"version": ..., "bits": 4},
    ],
)
def test_spellings_of_other_writers(tmp_path: Path, block: dict[str, Any]) -> None:
    path = folder(tmp_path / "m", FORMAT.pack("m.weight", coded(8, 64, 32)), **block)
    (info,) = formats.find(path).open(path).tensors.values()
    assert (info.name, str(info.scheme)) == ("m.weight", "int4-g32")


def test_the_block_in_a_file_of_its_own_or_in_the_text_config(tmp_path: Path) -> None:
    tensor = coded(8, 64, 32)
    one = tiny.write(tmp_path / "one", {}, FORMAT.pack("m.weight", tensor))
    (one / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 32, "zero_point": True}))
    two = tiny.write(tmp_path / "two", {"text_config": {"quantization_config": BLOCK}}, FORMAT.pack("m.weight", tensor))
    for path in (one, two):
        checkpoint = formats.find(path).open(path)
        assert checkpoint.format == "awq"
        assert torch.equal(checkpoint.read("m.weight"), tensor.dequantize())
        assert "quantization_config" not in json.dumps(checkpoint.config)
        assert checkpoint.side_files == {}


def test_scales_in_bfloat16_and_a_bias(tmp_path: Path) -> None:
    tensor = coded(8, 64, 32)
    arrays = FORMAT.pack("m.weight", tensor) | {"m.bias": torch.arange(8.0).half()}
    arrays["m.scales"] = arrays["m.scales"].bfloat16()
    path = folder(tmp_path / "m", arrays)
    checkpoint = formats.find(path).open(path)
    assert checkpoint.read("m.bias").tolist() == list(range(8))
    scales = tensor.arrays["scales"].bfloat16().float().repeat_interleave(32, 1)
    zeros = tensor.arrays["zeros"].float().repeat_interleave(32, 1)
    assert torch.equal(checkpoint.read("m.weight"), (tensor.arrays["codes"].float() - zeros) * scales)
    found = checkpoint.read_coded("m.weight")
    assert found is not None
    announced = [piece.dtype for piece in FORMAT.pieces("m.weight", (8, 64), found.scheme)]
    assert [value.dtype for value in FORMAT.pack("m.weight", found).values()] == announced


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"version": "gemv"}, "version 'gemv'"),
        ({"version": "GEMV_FAST"}, "version 'gemv_fast'"),
        ({"version": "marlin"}, "version 'marlin'"),
        ({"bits": 8}, "8 bits"),
        ({"bits": ..., "w_bit": 3}, "3 bits"),
        ({"group_size": 64}, "'m' has groups of 32, config.json says 64"),
        ({"group_size": -1}, "'m' has groups of 32, config.json says -1"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, block: dict[str, Any], said: str) -> None:
    path = folder(tmp_path / "m", FORMAT.pack("m.weight", coded(8, 64, 32)), **block)
    with pytest.raises(InputError, match=said) as caught:
        _ = formats.find(path).open(path).tensors
    assert caught.value.hint
    assert str(path) in caught.value.message


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_part_that_is_missing(tmp_path: Path, part: str) -> None:
    arrays = FORMAT.pack("m.weight", coded(8, 64, 32))
    del arrays[f"m.{part}"]
    path = folder(tmp_path / "m", arrays)
    with pytest.raises(InputError, match=f"lacks tensor 'm.{part}'"):
        _ = formats.find(path).open(path).tensors


@pytest.mark.parametrize(
    "change",
    [
        {"m.qweight": torch.zeros(64, 2, dtype=torch.int32)},
        {"m.qweight": torch.zeros(63, 1, dtype=torch.int32)},
        {"m.qweight": torch.zeros(64, dtype=torch.int32)},
        {"m.qweight": torch.zeros(64, 1, dtype=torch.int16)},
        {"m.qweight": torch.zeros(8, 1, dtype=torch.int32)},
        {"m.qzeros": torch.zeros(1, 1, dtype=torch.int32)},
        {"m.qzeros": torch.zeros(2, 1)},
        {"m.scales": torch.zeros(2, 7)},
        {"m.scales": torch.zeros(0, 8)},
        {"m.scales": torch.zeros(2, 8, dtype=torch.int32)},
        {"m.scales": torch.zeros(())},
    ],
)
def test_parts_that_do_not_agree(tmp_path: Path, change: dict[str, Tensor]) -> None:
    path = folder(tmp_path / "m", FORMAT.pack("m.weight", coded(8, 64, 32)) | change)
    with pytest.raises(InputError, match=r"'m\.qweight', qzeros and scales do not agree"):
        _ = formats.find(path).open(path).tensors


# ------------------------------------------------------------------------------------------------------------
# What the format accepts, and what it says in the config


@pytest.mark.parametrize(
    ("scheme", "accepted"),
    [
        *((AffineInt(4, group), True) for group in (-1, 16, 32, 64, 128)),
        (AffineInt(4, 128, symmetric=True), True),
        (Plain(torch.bfloat16), True),
        (AffineInt(4, 256), False),
        (AffineInt(4, 8), False),
        (AffineInt(3, 128), False),
        (AffineInt(8, 128), False),
    ],
)
def test_reject(scheme: AffineInt | Plain, accepted: bool) -> None:
    assert (FORMAT.reject(scheme) is None) == accepted


def test_tensors_that_do_not_fit() -> None:
    assert FORMAT.refuse_tensor("m.weight", (56, 72)) is None
    assert FORMAT.refuse_tensor("m.weight", (57, 72)) == "its height 57 is no multiple of 8"
    assert FORMAT.refuse_tensor("experts.gate_up_proj", (8, 8)) == "its name does not end in .weight"


def test_config_block() -> None:
    schemes = {"b.weight": AffineInt(4, 64), "a.weight": AffineInt(4, 64)}
    block = FORMAT.quantization_config(schemes)
    assert block == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    kept = {"z.gate.weight": Plain(torch.bfloat16), "c.weight": Plain(torch.float16)}
    assert FORMAT.quantization_config(schemes | kept)["modules_to_not_convert"] == ["c", "z.gate"]
    assert FORMAT.quantization_config({"a.weight": AffineInt(4, -1)})["group_size"] == -1


def test_config_block_is_what_transformers_reads() -> None:
    from transformers import AwqConfig

    block = FORMAT.quantization_config({"a.weight": AffineInt(4, 64), "b.weight": Plain(torch.float16)})
    read = AwqConfig.from_dict(block)
    assert (read.bits, read.group_size, read.zero_point) == (4, 64, True)
    assert str(getattr(read.format, "value", read.format)) == "gemm"
    assert read.modules_to_not_convert == ["b"]


def test_linears_that_an_engine_fuses() -> None:
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"l.0.x.{leaf}.weight" for leaf in leaves] + ["l.1.x.q_proj.weight", "l.2.x.gate_proj.bias"]
    assert FORMAT.bound_together(names) == [
        ("l.0.x.q_proj.weight", "l.0.x.k_proj.weight", "l.0.x.v_proj.weight"),
        ("l.0.x.gate_proj.weight", "l.0.x.up_proj.weight"),
    ]
