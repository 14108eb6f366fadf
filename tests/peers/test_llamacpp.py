"""`evaluate` against llama.cpp's own llama-perplexity, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
from torch import Tensor

import quantize
from quantize.calib_data import read_text

PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[2] / ".peers"))
PROGRAM = Path(os.environ.get("QUANTIZE_LLAMA_CPP", PEERS / "llamacpp/bin")).absolute() / "llama-perplexity"
CONTEXT, CHUNKS = 128, 8
# llama.cpp keeps keys and values in float16.
_CLOSE = 2e-3

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PROGRAM.exists(), reason=f"no {PROGRAM}: run 'make peers' or set QUANTIZE_LLAMA_CPP"),
]


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Returns rows in llama.cpp's order: the two halves of each head by turns."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], bos: bool) -> Path:
    """Writes a float32 llama with a tokenizer of one token per byte, one merge, and the begin and end tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*bytes_to_unicode().values(), "Ġt", "<s>", "</s>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["Ġ t"])  # llama.cpp refuses a file without any
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_add_bos_token(bos)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, value in tensors.items():
        part = name.split(".")[-2]
        value = in_pairs(value, heads[part]) if part in heads else value
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "with BOS"])
def test_perplexity_is_that_of_llama_perplexity(tmp_path: Path, bos: bool) -> None:
    config = tiny.llama_config(vocab_size=259)
    tensors = tiny.values(tiny.llama_shapes(config), dtype=torch.float32)
    model = write_gguf(tmp_path / "tiny.gguf", config, tensors, bos)
    text = tmp_path / "text.txt"
    text.write_text(read_text("default:eval", limit=2 * CONTEXT * CHUNKS), encoding="utf-8")
    command = [PROGRAM, "-m", model, "-f", text, "-c", CONTEXT, "--chunks", CHUNKS]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    assert found is not None, done.stderr[-2000:]
    ours = quantize.evaluate(model, text=str(text), context=CONTEXT, chunks=CHUNKS)
    assert ours.protocol["bos_added"] == bos
    assert ours.perplexity == pytest.approx(float(found[1]), rel=_CLOSE)
