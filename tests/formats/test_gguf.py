"""The GGUF reader, on tiny models written with gguf's own writer and permuted here by hand."""

from __future__ import annotations

import gc
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from quantize.errors import InputError, UsageError
from quantize.formats import find
from quantize.formats.gguf import GGUFFormat
from quantize.formats.gguf.architectures.rope import llama3_rope
from quantize.formats.gguf.container import read_part
from quantize.schemes import GGMLBlock, Plain, parse_scheme

HIDDEN, WIDTH, VOCAB, LAYERS = 32, 64, 48, 2
DTYPES = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
K = "model.layers.1.self_attn.k_proj.weight"


def gguf_name(name: str) -> str:
    stem, leaf = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, stem = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[stem]}.{leaf}"
    return f"{NAMES[stem]}.{leaf}"


def in_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Row by row: the first half of a head goes to its even rows, the second half to its odd rows."""
    size = tensor.shape[0] // heads
    out = torch.empty_like(tensor)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = tensor[head * size + i]
            out[head * size + 2 * i + 1] = tensor[head * size + size // 2 + i]
    return out


def make_tensors(heads: int, kv: int, size: int, dtype: torch.dtype, biases: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A model under transformers' names, its matrices of `dtype`, the rest float32 as in all GGUF files."""
    generator = torch.Generator().manual_seed(heads * 100 + kv * 10 + size)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        linears = {
            "self_attn.q_proj": (heads * size, HIDDEN),
            "self_attn.k_proj": (kv * size, HIDDEN),
            "self_attn.v_proj": (kv * size, HIDDEN),
            "self_attn.o_proj": (HIDDEN, heads * size),
            "mlp.gate_proj": (WIDTH, HIDDEN),
            "mlp.up_proj": (WIDTH, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDTH),
        }
        for name, shape in linears.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if name in biases:
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (HIDDEN,)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value.to(dtype) if value.dim() == 2 else value for name, value in values.items()}


def write(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    heads: int = 4,
    kv: int = 2,
    size: int = 8,
    arch: str = "llama",
    types: dict[str, Type] | None = None,
    more: Callable[[gguf.GGUFWriter], None] | None = None,
    order: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    split: int = 0,
) -> Path:
    """Writes `tensors` (transformers' names and rows) as a GGUF file; `types` by name for quantized ones."""
    writer = gguf.GGUFWriter(path, arch, endianess=order, split_max_tensors=split)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_file_type(7)
    if more:
        more(writer)
    for name, tensor in tensors.items():
        value = tensor
        if arch == "llama" and ".q_proj." in name:
            value = in_pairs(tensor, heads)
        elif arch == "llama" and ".k_proj." in name:
            value = in_pairs(tensor, kv)
        kind = (types or {}).get(name)
        if kind is None:
            kind = next(k for k, dtype in DTYPES.items() if dtype == tensor.dtype)
        stored = gguf.quantize(value.float().numpy(), kind)
        known = name if name == "rope_freqs.weight" else gguf_name(name)
        writer.add_tensor(known, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf", make_tensors(4, 2, 8, torch.float16))


@pytest.mark.parametrize("kind", DTYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("heads", "kv", "size"),
    [(4, 4, 8), (4, 2, 8), (4, 1, 8), (3, 1, 16)],
    ids=["mha", "gqa", "mqa", "wide-heads"],
)
def test_plain_tensors_come_back_bit_for_bit(tmp_path: Path, heads: int, kv: int, size: int, kind: Type) -> None:
    biases = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    tensors = make_tensors(heads, kv, size, DTYPES[kind], biases)
    checkpoint = GGUFFormat().open(write(tmp_path / "m.gguf", tensors, heads=heads, kv=kv, size=size))
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info, read = checkpoint.tensors[name], checkpoint.read(name)
        assert (info.shape, info.scheme) == (tuple(tensor.shape), Plain(tensor.dtype))
        assert info.nbytes == tensor.nbytes
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name
        assert checkpoint.read_coded(name) is None
    assert checkpoint.quantization == {}
    assert checkpoint.config["attention_bias"] is True
    assert checkpoint.config["dtype"] == str(DTYPES[kind]).removeprefix("torch.")


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_1])
def test_quantized_rows_move_as_blocks(tmp_path: Path, kind: Type) -> None:
    tensors = make_tensors(4, 2, 8, torch.float32)
    types = {name: kind for name, tensor in tensors.items() if tensor.dim() == 2}
    checkpoint = GGUFFormat().open(write(tmp_path / "m.gguf", tensors, types=types))
    for name in types:
        blocks = gguf.quantize(tensors[name].numpy(), kind)  # blocks lie in rows, so no permutation is needed
        expected = torch.from_numpy(gguf.dequantize(blocks, kind))
        coded = checkpoint.read_coded(name)
        assert coded is not None
        assert coded.scheme == checkpoint.tensors[name].scheme == GGMLBlock(kind.name.lower())
        assert np.array_equal(coded.arrays["blocks"].numpy(), blocks)
        assert checkpoint.tensors[name].nbytes == blocks.nbytes
        assert torch.equal(coded.dequantize(), expected)
        assert torch.equal(checkpoint.read(name), expected)
    assert checkpoint.quantization == {"quant_method": "gguf", "file_type": "Q8_0"}
    assert checkpoint.config["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0])
def test_row_ranges(tmp_path: Path, kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_tensors(4, 2, 8, torch.float16)
    types = {name: kind for name, tensor in tensors.items() if tensor.dim() == 2}
    checkpoint = GGUFFormat().open(write(tmp_path / "m.gguf", tensors, types=types))
    whole = {name: checkpoint.read(name) for name in tensors}
    decoded: list[int] = []
    decode = GGMLBlock.decode
    monkeypatch.setattr(GGMLBlock, "decode", lambda self, t: decoded.append(t.shape[0]) or decode(self, t))
    for name in ("model.embed_tokens.weight", K, K.replace("k_proj", "q_proj")):
        for start, stop in [(0, 1), (3, 5), (7, 9), (5, 16), (0, 16), (8, 99), (15, None)]:
            rows = checkpoint.read(name, start, stop)
            assert torch.equal(rows, whole[name][start:stop])
            assert not decoded or decoded[-1] == len(rows)


def test_config_is_what_transformers_takes(tiny: Path) -> None:
    from transformers import AutoConfig

    config = GGUFFormat().open(tiny).config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5  # the decimal, not its float32 neighbour
    made = AutoConfig.for_model(**config)
    assert made.model_type == "llama"
    assert (made.hidden_size, made.intermediate_size, made.vocab_size) == (HIDDEN, WIDTH, VOCAB)
    assert (made.num_hidden_layers, made.num_attention_heads, made.num_key_value_heads) == (LAYERS, 4, 2)
    assert (made.head_dim, made.max_position_embeddings, made.tie_word_embeddings) == (8, 256, True)
    assert made.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (None, None, None)


def test_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    tensors = make_tensors(4, 2, 8, torch.float16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    checkpoint = GGUFFormat().open(write(tmp_path / "m.gguf", tensors))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert torch.equal(checkpoint.read("lm_head.weight"), tensors["lm_head.weight"])


def test_qwen2_is_not_permuted_and_has_its_biases(tmp_path: Path) -> None:
    biases = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    tensors = make_tensors(4, 2, 8, torch.float16, biases)
    checkpoint = GGUFFormat().open(write(tmp_path / "m.gguf", tensors, arch="qwen2"))
    assert checkpoint.config["architectures"] == ["Qwen2ForCausalLM"]
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    del tensors["model.layers.1.self_attn.v_proj.bias"]
    with pytest.raises(InputError, match=r"lacks tensor 'blk\.1\.attn_v\.bias'"):
        GGUFFormat().open(write(tmp_path / "m.gguf", tensors, arch="qwen2"))


def test_qwen3_has_head_norms(tmp_path: Path) -> None:
    tensors = make_tensors(4, 2, 8, torch.bfloat16)
    for layer in range(LAYERS):
        for leaf in ("q_norm", "k_norm"):
            tensors[f"model.layers.{layer}.self_attn.{leaf}.weight"] = torch.full((8,), 1.0 + layer)
    checkpoint = GGUFFormat().open(write(tmp_path / "m.gguf", tensors, arch="qwen3"))
    assert (checkpoint.config["model_type"], checkpoint.config["attention_bias"]) == ("qwen3", False)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_name("Größe")
        writer.add_bool("test.flag", True)
        writer.add_int64("test.negative", -(2**40))
        writer.add_float64("test.double", 0.1)
        writer.add_array("test.short", [1.5, 2.5])
        writer.add_array("test.words", ["a", "", "b c"])
        writer.add_array("test.long", list(range(1000)))
        writer.add_token_list([f"t{i}" for i in range(300)])

    path = write(tmp_path / "m.gguf", make_tensors(4, 2, 8, torch.float16), more=more)
    part, reader = read_part(path), gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        value, expected = part.metadata[key], field.contents()
        if isinstance(value, dict):
            assert value["length"] == len(expected)
        else:
            assert value == pytest.approx(expected, rel=1e-7) if isinstance(value, float) else value == expected
    assert part.metadata["test.long"] == {"type": "int32", "length": 1000}
    assert part.metadata["tokenizer.ggml.tokens"] == {"type": "string", "length": 300}
    offsets = {t.name: (t.data_offset, t.n_bytes) for t in reader.tensors}
    assert {n: (t.extent.offset, t.extent.nbytes) for n, t in part.tensors.items()} == offsets


# --- rope


def scale(writer: gguf.GGUFWriter, kind: str, **keys: float) -> None:
    writer.add_string("llama.rope.scaling.type", kind)
    for key, value in keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.rope.scaling.{key}", value)


def rope_of(
    tmp_path: Path, more: Callable[[gguf.GGUFWriter], None], factors: Tensor | None = None
) -> dict[str, object]:
    tensors = make_tensors(4, 2, 8, torch.float16)
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    checkpoint = GGUFFormat().open(write(tmp_path / "m.gguf", tensors, more=more))
    assert "rope_freqs.weight" not in checkpoint.tensors
    assert list(checkpoint.dropped) == ([] if factors is None else ["rope_freqs.weight"])
    rope: dict[str, object] = checkpoint.config["rope_parameters"]
    older = dict(rope)
    assert checkpoint.config["rope_theta"] == older.pop("rope_theta")
    assert checkpoint.config.get("rope_scaling", {"rope_type": "default"}) == older
    return rope


def test_rope_scaling_keys(tmp_path: Path) -> None:
    linear = rope_of(tmp_path, lambda w: scale(w, "linear", factor=4.0))
    assert linear == {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
    yarn = rope_of(tmp_path, lambda w: scale(w, "yarn", factor=4.0, original_context_length=64, yarn_beta_fast=16.0))
    assert yarn == {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
    }
    assert rope_of(tmp_path, lambda w: scale(w, "none"))["rope_type"] == "default"
    with pytest.raises(InputError, match="'longrope' without 'rope_factors_long"):
        rope_of(tmp_path, lambda w: scale(w, "longrope", factor=4.0))
    with pytest.raises(InputError, match="'yarn' with yarn_log_multiplier cannot be read"):
        rope_of(tmp_path, lambda w: scale(w, "yarn", factor=4.0, yarn_log_multiplier=0.1))


def llama3_divisors(theta: float, size: int, factor: float, low: float, high: float, context: int) -> Tensor:
    """The divisors as Llama 3.1's authors define them, in float32 throughout."""
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    out = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            out.append(torch.tensor(1.0))
        elif wavelength > context / low:
            out.append(torch.tensor(factor))
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return torch.stack(out).float()


@pytest.mark.parametrize(
    ("size", "factor", "context"), [(128, 8.0, 8192), (64, 32.0, 8192), (128, 16.0, 4096), (64, 4.0, 5000)]
)
def test_llama3_rope_is_recovered_exactly(size: int, factor: float, context: int) -> None:
    divisors = llama3_divisors(500000.0, size, factor, 1.0, 4.0, context)
    assert llama3_rope(divisors.tolist(), 500000.0, size) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }


def test_llama3_rope_in_a_file(tmp_path: Path) -> None:
    def none(writer: gguf.GGUFWriter) -> None:
        pass

    found = rope_of(tmp_path, none, llama3_divisors(500000.0, 8, 8.0, 1.0, 4.0, 8192))
    assert (found["rope_type"], found["factor"]) == ("llama3", 8.0)
    assert rope_of(tmp_path, none, torch.ones(4))["rope_type"] == "default"
    with pytest.raises(InputError, match=r"rope_freqs\.weight.*no config\.json states"):
        rope_of(tmp_path, none, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(InputError, match="no config"):
        rope_of(tmp_path, none, llama3_divisors(500000.0, 8, 8.0, 1.0, 4.0, 8192)[:3])


# --- broken and foreign files


def test_truncated_data_names_the_tensor(tiny: Path) -> None:
    data = tiny.read_bytes()
    last = max(read_part(tiny).tensors.items(), key=lambda item: item[1].extent.offset)
    end = last[1].extent.offset + last[1].extent.nbytes
    tiny.write_bytes(data[: end - 1])
    with pytest.raises(InputError, match=f"truncated: tensor '{last[0]}' ends at byte {end} of {end - 1}"):
        GGUFFormat().open(tiny)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"GGUF\x03\0", "truncated: 6 bytes"),
        (b"GGUF\x03\0\0\0\x01\0\0\0", "truncated inside its header"),
        (b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\x01" + b"\0" * 7 + b"\xff" * 8 + b"key", "truncated inside"),
        (b"GGUF\x01\0\0\0" + b"\0" * 16, "of version 1"),
        (b"PK\x03\x04somezip", "no GGUF file: it starts with b'PK"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
        (b"GGUF\x03\0\0\0" + b"\0" * 16, "architecture 'None'.*known are llama, qwen2, qwen2moe"),
    ],
    ids=["empty", "short", "no-counts", "long-key", "version", "magic", "lfs", "no-metadata"],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert find(path).name == "gguf"
    with pytest.raises(InputError, match=message) as caught:
        GGUFFormat().open(path)
    assert str(path) in caught.value.message


def test_big_endian(tmp_path: Path) -> None:
    tensors = make_tensors(4, 2, 8, torch.float16)
    little, big = (
        GGUFFormat().open(write(tmp_path / f"{order.name}.gguf", tensors, order=order)) for order in gguf.GGUFEndian
    )
    assert little.config == big.config
    assert all(torch.equal(little.read(name), big.read(name)) for name in little.tensors)


def test_foreign_files(tmp_path: Path) -> None:
    tensors = make_tensors(4, 2, 8, torch.float16)
    path = tmp_path / "m.gguf"
    with pytest.raises(InputError, match="architecture 'plamo' cannot be read"):
        GGUFFormat().open(write(path, tensors, arch="plamo"))
    with pytest.raises(InputError, match=r"lacks the metadata key 'llama\.expert_used_count'"):
        GGUFFormat().open(write(path, tensors, more=lambda w: w.add_expert_count(8)))
    with pytest.raises(InputError, match="type 'adapter', not a model"):
        GGUFFormat().open(write(path, tensors, more=lambda w: w.add_type("adapter")))
    with pytest.raises(InputError, match="has 16 rows, not 4 heads of 8"):
        GGUFFormat().open(write(path, tensors, kv=4))
    with pytest.raises(InputError, match="No such file"):
        GGUFFormat().open(tmp_path / "absent.gguf")


def test_tensor_list_must_be_the_architectures(tmp_path: Path) -> None:
    tensors, path = make_tensors(4, 2, 8, torch.float16), tmp_path / "m.gguf"
    with pytest.raises(InputError, match=r"'blk\.2\.ffn_up\.weight' is no tensor of .* 'llama' with 2 blocks"):
        GGUFFormat().open(write(path, tensors | {"model.layers.2.mlp.up_proj.weight": tensors[K]}))
    biases = {f"model.layers.{i}.self_attn.{leaf}.bias": 32 for i in range(LAYERS) for leaf in ("q_proj", "o_proj")}
    some = tensors | {name: torch.zeros(rows) for name, rows in biases.items()}
    with pytest.raises(InputError, match=r"lacks tensor 'blk\.0\.attn_k\.bias' and 3 others"):
        GGUFFormat().open(write(path, some))
    norm = {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    with pytest.raises(InputError, match=r"'blk\.0\.attn_q_norm\.weight' is no tensor of .* 'llama'"):
        GGUFFormat().open(write(path, tensors | norm))
    del tensors[K]
    with pytest.raises(InputError, match=r"lacks tensor 'blk\.1\.attn_k\.weight'$"):
        GGUFFormat().open(write(path, tensors))


def test_damaged_headers_end_in_input_errors(tiny: Path) -> None:
    data, chance = tiny.read_bytes(), random.Random(0)
    header = min(t.extent.offset for t in read_part(tiny).tensors.values())
    opened = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(4, header)] = chance.choice([0, 1, 9, 127, 255, chance.randrange(256)])
        tiny.write_bytes(damaged)
        try:
            checkpoint = GGUFFormat().open(tiny)
            for name in checkpoint.tensors:
                checkpoint.read(name)
            opened += 1
        except InputError:
            pass
    assert 0 < opened < 400


# --- folders and parts


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    write(tmp_path / "m.gguf", make_tensors(4, 2, 8, torch.float16), split=8)
    found = sorted(tmp_path.glob("*.gguf"))
    assert [file.name for file in found] == [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_parts_are_one_model(parts: list[Path]) -> None:
    tensors = make_tensors(4, 2, 8, torch.float16)
    for path in (parts[0], parts[2], parts[0].parent):
        assert find(path).name == "gguf"
        checkpoint = GGUFFormat().open(path)
        assert checkpoint.path == path
        assert checkpoint.tensors.keys() == tensors.keys()
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_parts_that_do_not_make_a_model(parts: list[Path]) -> None:
    folder = parts[0].parent
    joined = folder / "joined.gguf"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(InputError, match="parts joined byte-wise"):
        GGUFFormat().open(joined)
    joined.unlink()
    kept = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(InputError, match="does not say that it is part 2 of 3"):
        GGUFFormat().open(parts[0])
    parts[1].unlink()
    with pytest.raises(InputError, match=r"missing m-00002-of-00003\.gguf: 1 of 3 parts"):
        GGUFFormat().open(folder)
    alone = folder / "renamed.gguf"
    alone.write_bytes(kept)
    with pytest.raises(InputError, match="part 2 of 3"):
        GGUFFormat().open(alone)
    with pytest.raises(InputError, match=r"holds 2 GGUF models \(name one of them: m, renamed\.gguf\)"):
        GGUFFormat().open(folder)


def test_sniff(tmp_path: Path, tiny: Path) -> None:
    sniff = GGUFFormat().sniff
    assert sniff(tiny)
    assert sniff(tmp_path)
    other = tmp_path / "blob"
    other.write_bytes(tiny.read_bytes())
    assert sniff(other)
    other.write_bytes(b"something")
    assert not sniff(other)
    assert not sniff(tmp_path / "absent.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert not sniff(tmp_path)


# --- tokenizer


def byte_level(writer: gguf.GGUFWriter, pre: str) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "ĠĠ", "ĠĠĠĠ", "1", "ab", "abc", "<|end|>"]
    tokens = list(dict.fromkeys(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["Ġ Ġ", "ĠĠ ĠĠ", "a b"])
    writer.add_bos_token_id(tokens.index("<|end|>"))
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_eot_token_id(tokens.index("abc"))
    writer.add_chat_template([{"name": "default", "template": "{{ d }}"}, {"name": "tool", "template": "{{ t }}"}])


def tokenizer_of(path: Path, folder: Path) -> object:
    """The tokenizer as transformers reads it beside the config that the file gives."""
    from transformers import AutoTokenizer

    checkpoint = GGUFFormat().open(path)
    for name, file in checkpoint.side_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("pre", "indented", "word"),
    [
        # Digits apart first: the four spaces stay one piece. GPT-2: the last one belongs to the number.
        ("smollm", ["ĠĠĠĠ", "1", "1"], ["ab", "c"]),
        ("gpt-2", ["ĠĠ", "Ġ", "Ġ", "1", "1"], ["ab", "c"]),
        # 'abc' is a token that no merge reaches; Llama 3 takes it whole, and starts with its first token.
        ("llama-bpe", ["ĠĠ", "Ġ", "Ġ", "1", "1"], ["abc"]),
    ],
)
def test_byte_level_tokenizer(tmp_path: Path, pre: str, indented: list[str], word: list[str]) -> None:
    path = write(tmp_path / "m.gguf", make_tensors(4, 2, 8, torch.float16), more=lambda writer: byte_level(writer, pre))
    folder = tmp_path / "folder"
    folder.mkdir()
    tokenizer = tokenizer_of(path, folder)
    assert tokenizer.tokenize("    11") == indented
    assert tokenizer.tokenize("abc") == word
    start = ["<|end|>"] if pre == "llama-bpe" else []
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == start + word
    assert tokenizer.chat_template == {"default": "{{ d }}", "tool": "{{ t }}"}
    ids = json.loads((folder / "generation_config.json").read_text())
    end, turn = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "abc"))
    assert ids == {"bos_token_id": end, "eos_token_id": [end, turn]}
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 256


def test_sentencepiece_tokenizer_keeps_leading_spaces(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁▁", "▁▁▁", "▁a"]
    scores = [0.0] * 259 + [-4.0, -5.0, -1.0, -2.0, -3.0]

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 5)

    path = write(tmp_path / "m.gguf", make_tensors(4, 2, 8, torch.float16), more=more)
    assert GGUFFormat().open(path).config["eos_token_id"] == 2
    folder = tmp_path / "folder"
    folder.mkdir()
    tokenizer = tokenizer_of(path, folder)
    assert tokenizer.tokenize("  ") == ["▁▁▁"]
    assert tokenizer.tokenize("a a") == ["▁a", "▁a"]
    assert tokenizer.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("  aé", add_special_tokens=False)["input_ids"]) == "  aé"


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    tensors = make_tensors(4, 2, 8, torch.float16)
    checkpoint = GGUFFormat().open(write(tmp_path / "m.gguf", tensors, more=lambda w: byte_level(w, "viking")))
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.pre is 'viking'"):
        _ = checkpoint.side_files
    checkpoint = GGUFFormat().open(write(tmp_path / "m.gguf", tensors, more=lambda w: w.add_tokenizer_model("rwkv")))
    with pytest.raises(InputError, match="kind 'rwkv'"):
        _ = checkpoint.side_files


def test_side_files_go_with_the_checkpoint(tiny: Path) -> None:
    checkpoint = GGUFFormat().open(tiny)
    (file,) = checkpoint.side_files.values()
    assert file.name == "generation_config.json"
    assert file.exists()
    del checkpoint
    gc.collect()
    assert not file.parent.exists()


# --- scheme and writer


def test_ggml_block_scheme() -> None:
    for name in ("q4_0", "q8_0", "q4_k", "iq3_xxs", "iq4_nl", "tq1_0", "mxfp4"):
        assert str(parse_scheme(name)) == name
    assert parse_scheme("Q6_K") == GGMLBlock("q6_k")
    scheme = GGMLBlock("q4_k")
    assert (scheme.block, scheme.block_bytes, scheme.unit) == (256, 144, 1)
    assert scheme.bits_per_weight((10, 512)) == 4.5
    assert GGMLBlock("iq2_xs").unit == 8
    assert scheme.reject((10, 512)) is None
    assert scheme.reject((10, 384)) == "its width 384 is no multiple of the block size 256 of q4_k"
    with pytest.raises(UsageError, match="'q9_9' is no GGML type"):
        parse_scheme("q9_9")
