"""Hugging Face folders: which files make the model, what is carried over, and what a folder is that holds no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from quantize import formats
from quantize.errors import InputError
from quantize.formats.base import Checkpoint
from quantize.formats.folder import INDEX, FolderCheckpoint, read_json

A, B = torch.ones(2, 3), torch.zeros(4, dtype=torch.bfloat16)


def open_(path: Path) -> Checkpoint:
    return formats.find(path).open(path)


def refused(path: Path, *said: str) -> InputError:
    with pytest.raises(InputError) as caught:
        _ = open_(path).tensors
    for part in said:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def small(folder: Path, **config: Any) -> Path:
    return tiny.write(folder, {"model_type": "llama"} | config, {"a": A, "b": B})


def save(folder: Path, file: str, **tensors: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file)


def write_index(folder: Path, table: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))


# ------------------------------------------------------------------------------------------------------------
# Weights


def test_one_file(tmp_path: Path) -> None:
    checkpoint = open_(small(tmp_path / "m"))
    assert checkpoint.format == "hf"
    assert {name: (info.shape, str(info.scheme), info.nbytes) for name, info in checkpoint.tensors.items()} == {
        "a": ((2, 3), "f32", 24),
        "b": ((4,), "bf16", 8),
    }
    assert torch.equal(checkpoint.read("a"), A)
    assert checkpoint.read("b").dtype == torch.bfloat16
    assert checkpoint.read("a", 1, 2).shape == (1, 3)
    assert checkpoint.read_coded("a") is None
    assert checkpoint.file("a") == tmp_path / "m" / "model.safetensors"
    assert checkpoint.quantization == {}


def test_shards(tmp_path: Path) -> None:
    checkpoint = open_(tiny.llama(tmp_path / "m", shards=3))
    whole = tiny.values(tiny.llama_shapes(tiny.llama_config()))
    assert checkpoint.tensors.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(checkpoint.read(name), value)


@pytest.mark.parametrize("name", ["weights.safetensors", "llama.safetensors", "Model FP16 (final).safetensors"])
def test_one_file_of_another_name(tmp_path: Path, name: str) -> None:
    folder = small(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / name)
    assert set(open_(folder).tensors) == {"a", "b"}


def test_the_plain_name_wins_over_variants(tmp_path: Path) -> None:
    folder = small(tmp_path / "m")
    save(folder, "model.fp16.safetensors", a=A.half(), b=B)
    save(folder, "adapter_model.safetensors", c=A)
    save(folder, "consolidated.safetensors", d=A)
    assert set(open_(folder).tensors) == {"a", "b"}
    assert open_(folder).read("a").dtype == torch.float32


def test_files_without_an_index_add_up(tmp_path: Path) -> None:
    folder = small(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save(folder, "consolidated.safetensors", d=A)
    error = refused(folder, "holds 1 of 2 shards")
    assert error.hint == "download the missing files"
    save(folder, "model-00002-of-00002.safetensors", c=A)
    assert set(open_(folder).tensors) == {"a", "b", "c"}


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = small(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save(folder, "two.safetensors", a=A)
    refused(folder, "two.safetensors", "'a'", "one.safetensors")


def test_the_index_says_which_shard_counts(tmp_path: Path) -> None:
    folder = small(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "y.safetensors")
    save(folder, "x.safetensors", a=7 * A)
    save(folder, "z.safetensors", a=9 * A)
    write_index(folder, {"a": "x.safetensors", "b": "y.safetensors"})
    assert torch.equal(open_(folder).read("a"), 7 * A)


def test_a_tensor_that_the_index_forgets_is_not_lost(tmp_path: Path) -> None:
    folder = small(tmp_path / "m")
    write_index(folder, {"a": "model.safetensors"})
    assert set(open_(folder).tensors) == {"a", "b"}


def test_a_missing_shard_is_named_before_its_tensors(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "m", shards=2)
    table = read_json(folder / INDEX)["weight_map"]
    table |= {f"mtp.{i}.weight": "mtp.safetensors" for i in range(12)}
    write_index(folder, table)
    error = refused(folder)
    assert error.message == f"{folder}: missing mtp.safetensors, named by {INDEX}: 12 of {len(table)} tensors"
    (folder / "model-00001-of-00002.safetensors").unlink()
    error = refused(folder)
    assert "missing model-00001-of-00002.safetensors, mtp.safetensors, named" in error.message


def test_a_shard_that_lacks_what_the_index_promises(tmp_path: Path) -> None:
    folder = small(tmp_path / "m")
    write_index(folder, {"a": "model.safetensors", "c": "model.safetensors"})
    refused(folder, str(folder / "model.safetensors"), "'c'", INDEX)


@pytest.mark.parametrize("table", [None, [], "model.safetensors", 3])
def test_an_index_without_a_map(tmp_path: Path, table: object) -> None:
    folder = small(tmp_path / "m")
    write_index(folder, table)
    refused(folder, INDEX, "weight_map")


@pytest.mark.parametrize("file", [None, 3, ["x"], "../m/model.safetensors", "/etc/passwd"])
def test_an_index_that_names_no_file_of_the_folder(tmp_path: Path, file: object) -> None:
    folder = small(tmp_path / "m")
    write_index(folder, {"a": file})
    refused(folder, INDEX, "no file of this folder")


def test_a_hub_snapshot_of_links(tmp_path: Path) -> None:
    plain, cache = tiny.llama(tmp_path / "plain", shards=2), tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / ("0" * 40)
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    linked, copied = open_(snapshot), open_(plain)
    assert linked.tensors == copied.tensors
    assert all(torch.equal(linked.read(name), copied.read(name)) for name in copied.tensors)
    gone = (snapshot / "model-00002-of-00002.safetensors").resolve()
    gone.unlink()
    refused(snapshot, "missing model-00002-of-00002.safetensors")


# ------------------------------------------------------------------------------------------------------------
# Folders that hold no model


def test_a_lora_folder_says_what_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    save(folder, "adapter_model.safetensors", a=A)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    error = refused(folder, "a LoRA adapter, not a model")
    assert error.hint == f"quantize its base: quantize run org/base --adapter {folder}"
    # some trainers leave the base's config beside it
    (folder / "config.json").write_text("{}")
    refused(folder, "a LoRA adapter, not a model")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").touch()
    refused(folder, "a LoRA adapter, not a model")


def test_a_merged_model_may_keep_its_adapter(tmp_path: Path) -> None:
    folder = small(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    save(folder, "adapter_model.safetensors", c=A)
    assert set(open_(folder).tensors) == {"a", "b"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    error = refused(tmp_path, "only pickled weights")
    assert "safetensors" in error.hint


def test_other_folders(tmp_path: Path) -> None:
    refused(tmp_path, "no model that can be read")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "holds no weights")
    save(tmp_path, "model.safetensors")
    refused(tmp_path, "hold no tensors")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "holds no config.json")


def test_a_single_weights_file(tmp_path: Path) -> None:
    small(tmp_path / "m")
    refused(tmp_path / "m" / "model.safetensors", "one file of weights", f"name its folder: {tmp_path / 'm'}")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\udcff", "[" * 100_000])
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    folder = small(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, "config.json")


# ------------------------------------------------------------------------------------------------------------
# Buffers, ties, quantization blocks


def test_buffers_are_dropped_by_rule_and_counted(tmp_path: Path) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": A,
        "rotary_pos_emb.inv_freq": A,
        "inv_freq": A,
        "h.0.attn.masked_bias": A,
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "embeddings.position_ids": torch.arange(4).unsqueeze(0),
    }
    kept = {"h.1.attn.bias": torch.ones(4), "model.freq.weight": A, "encoder.position_ids_embedding.weight": A}
    checkpoint = open_(tiny.write(tmp_path / "m", {}, {**buffers, **kept}))
    assert set(checkpoint.tensors) == set(kept)
    assert dict(checkpoint.dropped) == dict.fromkeys(buffers, "a buffer that engines compute")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": False}}, None),
        ({"text_config": None}, None),
        ({}, None),
    ],
)
def test_a_tie_that_only_the_text_config_names(tmp_path: Path, config: dict[str, Any], expected: bool | None) -> None:
    assert open_(small(tmp_path / "m", **config)).config.get("tie_word_embeddings") == expected


BLOCK = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": BLOCK},
        {"text_config": {"quantization_config": BLOCK}},
        {"compression_config": BLOCK},
        {"quantization_config": {}, "text_config": {"quantization_config": BLOCK}},
    ],
)
def test_what_is_quantized_in_a_way_that_we_cannot_read_is_named(tmp_path: Path, config: dict[str, Any]) -> None:
    error = refused(small(tmp_path / "m", **config), "already quantized with bitsandbytes")
    assert error.hint == "use the model it was made from"


@pytest.mark.parametrize("block", [None, {}, [], "awq"])
def test_an_empty_block_is_no_quantization(tmp_path: Path, block: object) -> None:
    checkpoint = open_(small(tmp_path / "m", quantization_config=block, text_config={"quantization_config": None}))
    assert checkpoint.quantization == {}
    assert checkpoint.config == {"model_type": "llama", "text_config": {}}


def test_packed_tensors_without_a_block(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "m", {}, {"a.qweight": torch.zeros(2, 2, dtype=torch.int32)})
    refused(folder, "'a.qweight' is quantized, but config.json does not say how")


# ------------------------------------------------------------------------------------------------------------
# Side files


def test_every_other_file_is_carried(tmp_path: Path) -> None:
    folder = small(tmp_path / "m")
    carried = [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
        *("tokenizer.model", "spiece.model", "added_tokens.json", "chat_template.jinja", "generation_config.json"),
        *("preprocessor_config.json", "processor_config.json", "modeling_custom.py", "configuration_custom.py"),
        *("README.md", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "params.json", "qwen.tiktoken"),
        *("additional_chat_templates/tools.jinja", "additional_chat_templates/rag/deep.jinja"),
        *("1_Pooling/config.json", "figures/benchmark.png", "Ünïcode näme.txt"),
    ]
    left = [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json.bin", "training_args.bin"),
        *("tf_model.h5", "flax_model.msgpack", "model.onnx", "model.onnx_data", "rust_model.ot", "x.gguf", "x.ckpt"),
        *("optimizer.pt", "consolidated.00.pth", ".gitattributes", ".cache/huggingface/x.lock", "weights.npz"),
        *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "__pycache__/modeling_custom.pyc"),
        *("onnx/model.onnx", "onnx/config.json", "checkpoint-5/optimizer.pt", "checkpoint-5/trainer_state.json"),
        *("m-AWQ/model.safetensors", "m-AWQ/config.json", "figures/.DS_Store"),
    ]
    for name in (*carried, *left):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "quant_config.json").write_text("{}")
    (folder / "loop").symlink_to(folder)
    found = FolderCheckpoint(folder).side_files
    assert sorted(found) == sorted(carried)
    assert all(found[name] == folder / name for name in carried)


def test_layers_of_sentence_transformers_are_parts_of_the_model(tmp_path: Path) -> None:
    folder = small(tmp_path / "m")
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    expected = {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert set(open_(folder).side_files) == expected
    (folder / "modules.json").write_text("[{}]")
    with pytest.raises(InputError, match=r"modules\.json: no list of modules"):
        _ = open_(folder).side_files
