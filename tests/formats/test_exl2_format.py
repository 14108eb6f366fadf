"""EXL2 folders: golden arrays, an unpacker of the test's own, whole and broken folders, and the way back to HF."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize import formats
from quantize.errors import InputError
from quantize.exl2_scheme import EXL2
from quantize.formats.exl2 import EXL2Format, pack_codes, unpack_codes
from quantize.kernels.exl2 import WIDTHS
from quantize.schemes import AffineInt, Plain, QuantizedTensor, parse_scheme

FORMAT = EXL2Format()
BLOCK = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0, "head_bits": 6}
MIX = "exl2-6b.05g32-3b.20g64-2b.75g64"
Array = NDArray[Any]


def streams(words: Array, bits: int) -> Array:
    """Codes of one group: each column's words as one long number, whose digits to base 2**bits they are."""
    rows = len(words) * 32 // bits
    codes = np.empty((rows, words.shape[1]), np.int32)
    for column in range(words.shape[1]):
        number = int.from_bytes(words[:, column].astype("<i4").tobytes(), "little")
        for row in range(rows):
            number, codes[row, column] = divmod(number, 2**bits)
    return codes


def unpacked(arrays: dict[str, Tensor], module: str, outputs: int) -> Array:
    """The matrix `[outputs, inputs]` float16 that engines make of the arrays, in numpy's half precision."""
    words, steps, maxima, table, places = (
        arrays[f"{module}.{part}"].numpy() for part in ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
    )
    starts = [*table[1::2].tolist(), len(words)]
    packed = []
    for group, bits in enumerate(table[::2].tolist()):
        codes = streams(words[starts[group] : starts[group + 1]], bits)
        nibbles = np.array([[int(word) % 2**32 // 16**digit % 16 for word in steps[group] for digit in range(8)]])
        unit = maxima[group] * np.float16(1 / 256)
        scale = ((nibbles + 1) ** 2).astype(np.float16) * unit
        packed.append((codes - 2 ** (bits - 1)).astype(np.float16) * scale)
    return np.concatenate(packed)[places].T[:outputs]


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(rows, cols, generator=generator) * (0.2 + torch.rand(cols, generator=generator))


def coded(rows: int, cols: int, text: str = MIX, seed: int = 0) -> QuantizedTensor:
    return parse_scheme(text).encode(weights(rows, cols, seed))


def write(path: Path, tensors: dict[str, Tensor], block: Any = BLOCK, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    value = {"model_type": "llama", **config} | ({"quantization_config": block} if block else {})
    (path / "config.json").write_text(json.dumps(value))
    save_file({name: value.clone() for name, value in tensors.items()}, path / "output.safetensors")
    return path


def opened(path: Path) -> Any:
    found = formats.find(path)
    assert found.name == "exl2"
    return found.open(path)


# ------------------------------------------------------------------------------------------------------------
# Golden arrays


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, "93939393 93939393"),
        (3, "43c67543 7543c675 c67543c6"),
        (4, "61c72d83 e94fa50b 61c72d83 e94fa50b"),
        (5, "79793503 fd560b30 77137249 1bb45871 f668f514"),
        (6, "1748d203 5c2b9a17 38913feb 2789d613 503bdb1b 79950f28"),
        (8, "120d0803 26211c17 3a35302b 4e49443f 625d5853 76716c67 8a85807b 9e99948f"),
    ],
)
def test_golden_words(bits: int, words: str) -> None:
    codes = ((5 * torch.arange(32) + 3) % 2**bits).to(torch.uint8)[:, None]
    packed = pack_codes(codes, [(bits, 32)])
    assert packed.dtype == torch.int32
    assert [word % 2**32 for word in packed[:, 0].tolist()] == [int(word, 16) for word in words.split()]
    assert torch.equal(unpack_codes(packed, [(bits, 32)]), codes)


def golden_layer() -> QuantizedTensor:
    """96 inputs, 32 outputs, groups of 6, 3 and 2 bits, made by formula."""
    k, n, g = torch.arange(96)[:, None], torch.arange(32), torch.arange(3)[:, None]
    widths = torch.tensor([6, 3, 2]).repeat_interleave(32)[:, None]
    codes = ((7 * k + 13 * n + (k * n) % 5) % 2**widths).to(torch.uint8)
    steps = ((3 * n + 5 * g) % 16).to(torch.uint8)
    order = ((35 * torch.arange(96) + 11) % 96).argsort()
    scheme = EXL2.of_groups([(6, 32), (3, 32), (2, 32)])
    return scheme.coded(codes.T, steps.T, torch.tensor([0.02, 0.05, 0.11]).half(), order)


def digest(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_golden_layer(tmp_path: Path) -> None:
    layer = golden_layer()
    arrays = FORMAT.pack("m.weight", layer)
    assert arrays["m.q_groups"].tolist() == [6, 0, 3, 6, 2, 9]
    assert digest(arrays["m.q_weight"]) == "4ed9be407ebaa39b"
    assert digest(arrays["m.q_scale"]) == "5fd259c592544249"
    assert arrays["m.q_invperm"].tolist() == [(35 * i + 11) % 96 for i in range(96)]
    values = opened(write(tmp_path / "m", arrays)).read("m.weight").half()
    assert digest(values.T) == "9bb778b6b0a1cde3"
    assert digest(values) == "d45aed4f64706b80"
    assert float(values.double().sum()) == pytest.approx(-39.71159207820892)
    assert values[:4, 0].tolist() == pytest.approx([-0.00148487, -0.00625229, 0.0344543, 0.1796875], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Arrays


@st.composite
def layers(draw: st.DrawFn) -> QuantizedTensor:
    """Any codes, steps and order in any groups, heights that need padding included."""
    widths = sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4)), reverse=True)
    groups = [(bits, 32 * draw(st.integers(1, 3))) for bits in widths]
    rows, cols = draw(st.integers(1, 40)), sum(size for _, size in groups)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.cat([torch.randint(0, 2**bits, (rows, size), generator=generator) for bits, size in groups], 1)
    steps = torch.randint(0, 16, (rows, len(groups)), dtype=torch.uint8, generator=generator)
    maxima = (torch.rand(len(groups), generator=generator) * draw(st.sampled_from([1e-4, 1e-2, 1.0]))).half()
    order = torch.randperm(cols, generator=generator)
    return EXL2.of_groups(groups).coded(codes.to(torch.uint8), steps, maxima, order)


@given(layers())
def test_arrays_are_those_announced(layer: QuantizedTensor) -> None:
    arrays = FORMAT.pack("m.weight", layer)
    announced = {p.name: (p.dtype, p.shape) for p in FORMAT.pieces("m.weight", layer.shape, layer.scheme)}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in arrays.items()} == announced
    assert all(value.is_contiguous() for value in arrays.values())


@settings(max_examples=40)
@given(layers())
def test_arrays_mean_what_the_codes_mean(layer: QuantizedTensor) -> None:
    values = unpacked(FORMAT.pack("m.weight", layer), "m", layer.shape[0])
    np.testing.assert_array_equal(values.astype(np.float32), layer.dequantize().numpy())


@settings(max_examples=40)
@given(layers())
def test_outputs_that_pad_are_nothing(layer: QuantizedTensor) -> None:
    arrays = FORMAT.pack("m.weight", layer)
    padded = arrays["m.q_weight"].shape[1]
    assert padded % 32 == 0
    assert 0 <= padded - layer.shape[0] < 32
    assert not unpacked(arrays, "m", padded)[layer.shape[0] :].any()


@settings(max_examples=40)
@given(layers(), st.data())
def test_a_file_reads_back(
    tmp_path_factory: pytest.TempPathFactory, layer: QuantizedTensor, data: st.DataObject
) -> None:
    rows, cols = layer.shape
    path = tmp_path_factory.mktemp("exl2")
    write(path, FORMAT.pack("lm_head.weight", layer), vocab_size=rows)
    checkpoint = opened(path)
    (info,) = checkpoint.tensors.values()
    assert (info.name, info.shape, info.scheme) == ("lm_head.weight", (rows, cols), layer.scheme)
    assert torch.equal(checkpoint.read("lm_head.weight"), layer.dequantize())
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert torch.equal(checkpoint.read("lm_head.weight", start, stop), layer.dequantize()[start:stop])
    again = FORMAT.pack("lm_head.weight", checkpoint.read_coded("lm_head.weight"))
    assert all(torch.equal(again[name], value) for name, value in FORMAT.pack("lm_head.weight", layer).items())


@pytest.mark.parametrize("text", ["exl2-2b-g32", "exl2-8b.05g32-4b.10g128-3b.85g128", "exl2-6b.5-5b-g96", MIX])
def test_what_was_rounded_reads_back_bit_for_bit(tmp_path: Path, text: str) -> None:
    layer = coded(40, 352, text)
    arrays = FORMAT.pack("m.weight", layer)
    assert np.array_equal(unpacked(arrays, "m", 40).astype(np.float32), layer.dequantize().numpy())
    read = opened(write(tmp_path / "m", arrays)).read("m.weight")
    assert torch.equal(read[:40], layer.dequantize())


def test_bytes_are_those_of_the_bits() -> None:
    scheme = parse_scheme(MIX)
    nbytes = sum(piece.nbytes for piece in FORMAT.pieces("m.weight", (576, 1536), scheme))
    assert nbytes * 8 == pytest.approx(scheme.bits_per_weight((576, 1536)) * 576 * 1536)


def test_a_matrix_coded_in_runs_of_rows_is_no_matrix() -> None:
    parts = [coded(32, 64, seed=seed) for seed in (0, 1)]
    arrays = {key: torch.cat([part.arrays[key] for part in parts]) for key in parts[0].arrays}
    with pytest.raises(AssertionError, match="a run of rows at a time"):
        FORMAT.pack("m.weight", QuantizedTensor(parts[0].scheme, (64, 64), arrays))


def test_plain_tensors_are_stored_as_they_are() -> None:
    values = torch.arange(4.0).half()
    tensor = QuantizedTensor(Plain(torch.float16), (4,), {"values": values})
    assert FORMAT.pack("norm.weight", tensor)["norm.weight"] is values
    (piece,) = FORMAT.pieces("norm.weight", (4,), Plain(torch.float16))
    assert (piece.name, piece.dtype, piece.shape) == ("norm.weight", torch.float16, (4,))


def test_what_it_holds() -> None:
    assert FORMAT.reject(parse_scheme(MIX)) is None
    assert FORMAT.reject(Plain(torch.float16)) is None
    assert "its own grids" in str(FORMAT.reject(AffineInt(4, 128)))
    assert FORMAT.refuse_tensor("m.weight", (8, 64)) is None
    assert "does not end" in str(FORMAT.refuse_tensor("experts.gate_up_proj", (8, 64)))
    assert FORMAT.bound_together(["m.q_proj.weight", "m.k_proj.weight"]) == []
    assert FORMAT.file_names("Out", 1) == ["output.safetensors"]
    assert FORMAT.file_names("Out", 2) == ["output-00001-of-00002.safetensors", "output-00002-of-00002.safetensors"]


def test_the_block_of_the_config() -> None:
    schemes = {
        "a.q_proj.weight": parse_scheme("exl2-5b.5-4b-g32"),
        "a.k_proj.weight": parse_scheme("exl2-4b-g128"),
        "router.weight": Plain(torch.float16),
    }
    block = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.25}
    assert FORMAT.quantization_config(schemes) == block
    head = {"lm_head.weight": parse_scheme("exl2-8b.15-6b-g128")}
    assert FORMAT.quantization_config(schemes | head) == block | {"head_bits": 6}


def test_parts_that_exllamav2_takes_whole() -> None:
    grid, plain = parse_scheme(MIX), Plain(torch.float16)
    whole = {f"l.0.self_attn.{leaf}_proj.weight": grid for leaf in "qkvo"}
    whole |= {f"l.0.mlp.{leaf}_proj.weight": plain for leaf in ("gate", "up", "down")}
    assert FORMAT.notices(whole) == []
    (line,) = FORMAT.notices(whole | {"l.0.self_attn.o_proj.weight": plain})
    assert line == "exllamav2 wants all of l.0.self_attn quantized or nothing, and o_proj is not (1 such parts)"
    two = {"l.0.mlp.up_proj.weight": plain, "l.0.mlp.down_proj.weight": grid, "l.0.mlp.gate.weight": plain}
    assert FORMAT.notices(two) == [
        "exllamav2 wants all of l.0.mlp quantized or nothing, and up_proj is not (1 such parts)"
    ]


# ------------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_that_does_not_say_what_it_is(tmp_path: Path) -> None:
    layer = coded(32, 64)
    checkpoint = opened(write(tmp_path / "m", FORMAT.pack("m.weight", layer), block=None))
    assert torch.equal(checkpoint.read("m.weight"), layer.dequantize())


def test_plain_folders_are_not_taken(tmp_path: Path) -> None:
    assert formats.find(tiny.llama(tmp_path / "m")).name == "hf"
    broken = write(tmp_path / "b", {"m.weight": torch.ones(2)}, block=None)
    (broken / "output.safetensors").write_bytes(b"no")
    assert formats.find(broken).name == "hf"


def test_an_index_of_the_model_that_it_was_made_from_is_ignored(tmp_path: Path) -> None:
    layer = coded(32, 64)
    path = write(tmp_path / "m", FORMAT.pack("m.weight", layer) | {"norm.weight": torch.ones(3)})
    index = {"weight_map": {"m.weight": "model-00001-of-00002.safetensors", "norm.weight": "model.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = opened(path)
    assert set(checkpoint.tensors) == {"m.weight", "norm.weight"}
    assert torch.equal(checkpoint.read("m.weight"), layer.dequantize())
    assert checkpoint.side_files == {}
    save_file({"norm.weight": torch.ones(3)}, path / "more.safetensors")
    with pytest.raises(InputError, match=r"'norm\.weight' is in more\.safetensors as well"):
        opened(path)
    (path / "more.safetensors").unlink()
    (path / "output.safetensors").rename(path / "output-00001-of-00003.safetensors")
    with pytest.raises(InputError, match="holds 1 of 3 shards"):
        opened(path)


def test_an_old_file_with_both_orders(tmp_path: Path) -> None:
    layer = coded(32, 64)
    order = {"m.q_perm": torch.arange(64, dtype=torch.int32)}
    checkpoint = opened(write(tmp_path / "m", FORMAT.pack("m.weight", layer) | order))
    assert checkpoint.dropped == {"m.q_perm": "follows from q_invperm"}
    assert torch.equal(checkpoint.read("m.weight"), layer.dequantize())


def test_padding_is_cut_where_the_config_says_how_high_a_matrix_is(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 100,
              "moe_intermediate_size": 40, "vocab_size": 70}  # fmt: skip
    heights = {"lm_head": 70, "a.q_proj": 64, "a.k_proj": 16, "b.up_proj": 100, "e.0.up_proj": 40, "b.down_proj": 64}
    layers = {module: coded(rows, 64) for module, rows in heights.items()}
    arrays: dict[str, Tensor] = {"a.k_proj.bias": torch.arange(32.0).half()}
    for module, layer in layers.items():
        arrays |= FORMAT.pack(f"{module}.weight", layer)
    for number, said in enumerate((config, {"text_config": config})):
        checkpoint = opened(write(tmp_path / str(number), arrays, **said))
        for module, layer in layers.items():
            assert torch.equal(checkpoint.read(f"{module}.weight"), layer.dequantize()), module
        assert checkpoint.tensors["a.k_proj.bias"].shape == (16,)
        assert checkpoint.read("a.k_proj.bias").tolist() == list(range(16))
        assert checkpoint.read("a.k_proj.bias", 4, 20).tolist() == list(range(4, 16))
    checkpoint = opened(write(tmp_path / "odd", arrays, hidden_size=64))
    assert checkpoint.tensors["a.k_proj.weight"].shape == (32, 64)


def test_a_head_of_its_own_unties(tmp_path: Path) -> None:
    arrays = FORMAT.pack("lm_head.weight", coded(32, 64))
    checkpoint = opened(write(tmp_path / "m", arrays, tie_word_embeddings=True))
    assert checkpoint.config["tie_word_embeddings"] is False
    arrays = FORMAT.pack("m.weight", coded(32, 64))
    assert opened(write(tmp_path / "n", arrays, tie_word_embeddings=True)).config["tie_word_embeddings"] is True


def spoilt(arrays: dict[str, Tensor], part: str, place: int, value: float) -> dict[str, Tensor]:
    changed = arrays[f"m.{part}"].clone()
    changed.view(-1)[place] = value
    return arrays | {f"m.{part}": changed}


@pytest.mark.parametrize(
    ("part", "place", "value", "said"),
    [
        ("q_groups", 1, 1, "the first group starts at row 1"),
        ("q_groups", 0, 7, "group 0 has codes of 7 bits"),
        ("q_groups", 4, 4, "widths rise"),
        ("q_groups", 3, 5, "group 0 of 6 bits runs from row 0 to 5"),
        ("q_groups", 2, 2, "the groups of 'm' have 192 channels, its q_invperm has 160"),
        ("q_groups", 5, 6, "group 1 of 3 bits runs from row 6 to 6"),
        ("q_groups", 3, -6, "group 0 of 6 bits runs from row 0 to -6"),
        ("q_invperm", 0, 7, "no order of 160 channels"),
        ("q_invperm", 3, 160, "no order of 160 channels"),
        ("q_invperm", 3, -1, "no order of 160 channels"),
        ("q_scale_max", 1, float("nan"), "holds negative, infinite or no numbers"),
        ("q_scale_max", 0, float("inf"), "holds negative, infinite or no numbers"),
        ("q_scale_max", 2, -1.0, "holds negative, infinite or no numbers"),
    ],
)
def test_broken_values(tmp_path: Path, part: str, place: int, value: float, said: str) -> None:
    arrays = FORMAT.pack("m.weight", coded(32, 160))
    assert arrays["m.q_groups"].tolist() == [6, 0, 3, 6, 2, 12]
    with pytest.raises(InputError) as caught:
        opened(write(tmp_path / "m", spoilt(arrays, part, place, value))).read("m.weight")
    assert said in caught.value.message
    assert str(tmp_path / "m") in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"q_weight": torch.zeros(16, 40, dtype=torch.int32)},
        {"q_weight": torch.zeros(16, 32)},
        {"q_weight": torch.zeros(16, dtype=torch.int32)},
        {"q_weight": torch.zeros((), dtype=torch.int32)},
        {"q_weight": torch.zeros(16, 0, dtype=torch.int32)},
        {"q_scale": torch.zeros(3, 5, dtype=torch.int32)},
        {"q_scale": torch.zeros(2, 4, dtype=torch.int32)},
        {"q_scale_max": torch.zeros(2, dtype=torch.float16)},
        {"q_scale_max": torch.zeros(3)},
        {"q_groups": torch.zeros(5, dtype=torch.int16)},
        {"q_groups": torch.zeros(0, dtype=torch.int16)},
        {"q_groups": torch.zeros(6, dtype=torch.int32)},
        {"q_invperm": torch.zeros(160, dtype=torch.int16)},
        {"q_invperm": torch.zeros(1, 160, dtype=torch.int32)},
    ],
)
def test_parts_that_do_not_agree(tmp_path: Path, change: dict[str, Tensor]) -> None:
    arrays = FORMAT.pack("m.weight", coded(32, 160)) | {f"m.{part}": value for part, value in change.items()}
    with pytest.raises(InputError, match=r"the shapes or types of 'm\.q_weight' and its companions do not agree"):
        _ = opened(write(tmp_path / "m", arrays)).tensors


def test_an_order_of_other_length(tmp_path: Path) -> None:
    arrays = FORMAT.pack("m.weight", coded(32, 160)) | {"m.q_invperm": torch.arange(128, dtype=torch.int32)}
    with pytest.raises(InputError, match="have 160 channels, its q_invperm has 128"):
        _ = opened(write(tmp_path / "m", arrays)).tensors


def test_more_channels_than_engines_read(tmp_path: Path) -> None:
    arrays = FORMAT.pack("m.weight", coded(32, 160)) | {
        "m.q_weight": torch.zeros(6 + 3 + 2 * 2049, 32, dtype=torch.int32),
        "m.q_groups": torch.tensor([6, 0, 3, 6, 2, 9], dtype=torch.int16),
        "m.q_invperm": torch.arange(65_632, dtype=torch.int32),
    }
    with pytest.raises(InputError, match="has 65632 channels"):
        _ = opened(write(tmp_path / "m", arrays)).tensors


@pytest.mark.parametrize("part", ["q_scale", "q_scale_max", "q_groups", "q_invperm"])
def test_a_part_that_is_missing(tmp_path: Path, part: str) -> None:
    arrays = FORMAT.pack("m.weight", coded(32, 64))
    del arrays[f"m.{part}"]
    with pytest.raises(InputError, match=rf"lacks tensor 'm\.{part}'"):
        _ = opened(write(tmp_path / "m", arrays)).tensors


def test_a_plain_model_that_is_said_to_be_quantized(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tensor is"):
        opened(write(tmp_path / "m", {"m.weight": torch.ones(32, 32)}))


# ------------------------------------------------------------------------------------------------------------
# The way back


@pytest.fixture
def model(tiny_llama: Callable[..., Path], tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A tied llama in EXL2 with a head of its own and an index that is stale; and what each matrix decodes to."""
    source = tiny_llama(tie_word_embeddings=True, intermediate_size=160)
    plain = load_file(source / "model.safetensors")
    arrays: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, weight in (plain | {"lm_head.weight": plain["model.embed_tokens.weight"]}).items():
        if not name.endswith("_proj.weight") and name != "lm_head.weight":
            arrays[name] = weight.half()
            continue
        packed = FORMAT.pack(name, parse_scheme("exl2-6b.25-4b-g32").encode(weight))
        values[name] = torch.from_numpy(unpacked(packed, name.removesuffix(".weight"), len(weight)).copy())
        arrays |= packed
    path = Path(shutil.copytree(source, tmp_path / "Tiny-exl2"))
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text())
    write(path, arrays, **config)
    index = {"metadata": {}, "weight_map": dict.fromkeys(plain, "model.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path, values


def test_converting_to_hf(cli: Callable[..., Any], model: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, values = model
    result = cli("convert", path, "--format", "hf", "--dtype", "f16", "--out", tmp_path / "Back")
    assert result.exit_code == 0, result.stderr
    found = load_file(tmp_path / "Back" / "model.safetensors")
    for name, value in values.items():
        assert torch.equal(found[name], value), name
    config = json.loads((tmp_path / "Back" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is False
    assert not (tmp_path / "Back" / "model.safetensors.index.json").exists()
    assert (tmp_path / "Back" / "tokenizer.json").is_file()


def test_inspect_tells_the_grids(cli: Callable[..., Any], model: tuple[Path, dict[str, Tensor]]) -> None:
    result = cli("inspect", model[0], "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["format"] == "exl2"
    assert told["quantization"]["quant_method"] == "exl2"
    assert any(scheme.startswith("exl2-6b") for scheme in told["schemes"])
