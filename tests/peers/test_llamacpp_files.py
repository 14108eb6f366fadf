"""Files that `run` and `convert` write, loaded and computed with by llama.cpp's own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_models
import llamacpp
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import quantize
from quantize.formats.gguf.container import read_part
from quantize.formats.gguf.imatrix import Importance, ImportanceMatrix, write_imatrix
from quantize.kernels.cpu.ggml import ENCODERS

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
IDS = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(0)).tolist()
# Mean KL divergence in nats. llama.cpp rounds what enters a quantized matrix to 8 bits, for most types in blocks of
# 256: 0.012 was measured at most. Eight columns of 256 read in another order cost 1.6.
CLOSE = 0.03

pytestmark = [pytest.mark.peer, llamacpp.needed]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are whole super-blocks."""
    return tiny.llama(tmp_path_factory.mktemp("wide") / "Wide", tokenizer=True, **WIDE)


def by_transformers(folder: Path, file: Path) -> Tensor:
    """Logits of the model in a folder with the weights that stand in a file, as we decode them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    held = quantize.open(file)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(held.read(name).float())
        logits: Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


def types(file: Path) -> dict[str, str]:
    return {name: str(stored.scheme) for name, stored in read_part(file).tensors.items()}


def even(file: Path, model: Path, out: Path) -> Path:
    """Writes an importance matrix that weighs all columns alike."""
    plain = quantize.convert(model, format="gguf", out=file).out
    shapes = {name: stored.shape for name, stored in read_part(plain).tensors.items() if len(stored.shape) > 1}
    entries = {
        name: Importance(np.ones((int(np.prod(shape[:-2])), shape[-1]), np.float32), np.ones(1, np.float32))
        for name, shape in shapes.items()
    }
    write_imatrix(out, ImportanceMatrix(entries, ("even",), 1, 1))
    return out


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_block_type_is_read_as_we_read_it(wide: Path, tmp_path: Path, kind: str) -> None:
    importance = even(tmp_path / "plain.gguf", wide, tmp_path / "m.gguf")
    rules = (f"(ffn_up|ffn_gate|attn_q|attn_k)={kind}",)
    options: dict[str, Any] = {"tensor_types": rules, "imatrix": importance, "threads": 1}
    out = quantize.run(wide, type="F16", out=tmp_path / "a.gguf", **options).out
    assert types(out)["blk.0.ffn_up.weight"] == types(out)["blk.1.attn_k.weight"] == kind
    assert llamacpp.divergence(by_transformers(wide, out), llamacpp.run(out, IDS)) < CLOSE


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "Q2_K", "TQ2_0", "IQ4_XS", "MXFP4_MOE", "BF16"])
def test_b14_a_very_small_model(tmp_path: Path, name: str) -> None:
    small = tiny.llama(tmp_path / "Small", tokenizer=True, intermediate_size=172, vocab_size=512)
    out = quantize.run(small, type=name, out=tmp_path / "a.gguf").out
    assert llamacpp.divergence(by_transformers(small, out), llamacpp.run(out, IDS)) < CLOSE


def test_b13_rows_that_no_super_block_divides(tmp_path: Path) -> None:
    odd = tiny.llama(tmp_path / "Odd", tokenizer=True, hidden_size=320, intermediate_size=672, num_attention_heads=5,
                     num_key_value_heads=5)  # fmt: skip
    out = quantize.run(odd, type="Q4_K_M", tensor_types=("attn_q=q4_k",), out=tmp_path / "a.gguf").out
    assert llamacpp.divergence(by_transformers(odd, out), llamacpp.run(out, IDS)) < CLOSE


def test_b48_parts_and_what_is_made_of_them(wide: Path, tmp_path: Path) -> None:
    whole = quantize.run(wide, type="Q8_0", out=tmp_path / "whole.gguf").out
    cut = quantize.run(wide, type="Q8_0", out=tmp_path / "cut.gguf", split_size=600_000)
    first = tmp_path / cut.files[0]
    again = quantize.convert(first, format="gguf", out=tmp_path / "again.gguf", split_size=900_000)
    four = quantize.run(first, type="Q4_0", requantize=True, out=tmp_path / "four.gguf").out
    expected = llamacpp.run(whole, IDS)
    for file in (first, tmp_path / again.files[0]):
        assert torch.equal(llamacpp.run(file, IDS), expected)
    assert llamacpp.divergence(by_transformers(wide, four), llamacpp.run(four, IDS)) < CLOSE


def test_b53_divisors_of_the_rope_in_a_source(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    scaled = tiny.llama(tmp_path / "Scaled", tokenizer=True, rope_theta=5e5, rope_scaling=rope, **WIDE)
    plain = quantize.convert(scaled, format="gguf", out=tmp_path / "plain.gguf").out
    out = quantize.run(plain, type="Q8_0", out=tmp_path / "a.gguf").out
    assert llamacpp.divergence(by_transformers(scaled, out), llamacpp.run(out, IDS)) < CLOSE


def test_b50_head_width_of_the_config(tmp_path: Path) -> None:
    narrow = tiny.llama(tmp_path / "Narrow", tokenizer=True, hidden_size=80, head_dim=16)
    out = quantize.run(narrow, type="F16", out=tmp_path / "a.gguf").out
    assert llamacpp.divergence(by_transformers(narrow, out), llamacpp.run(out, IDS)) < CLOSE


def test_b82_b45_no_opening_token_and_rows_beyond_the_tokens(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "Source", tokenizer=True, vocab_size=333)
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    out = quantize.run(source, type="Q8_0", out=tmp_path / "a.gguf").out
    assert llamacpp.run(out, IDS).shape == (32, 333)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "Source")
    out = quantize.run(source, type="Q8_0", out=tmp_path / "a.gguf").out
    assert llamacpp.divergence(by_transformers(source, out), llamacpp.run(out, IDS)) < CLOSE


def test_b18_experts_of_which_one_was_never_taken(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_experts_per_tok": 1, "vocab_size": tiny.VOCAB}
    folder = gguf_models.save("mixtral", tmp_path / "Experts", **sizes)
    tiny.byte_tokenizer(folder)
    out = quantize.run(folder, type="IQ2_XS", out=tmp_path / "a.gguf", **tiny.QUICK).out
    assert "iq2_xs" in types(out).values()
    assert llamacpp.run(out, IDS).isfinite().all()


def test_b56_quantized_folders(wide: Path, tmp_path: Path) -> None:
    """An AWQ folder, and 4-bit experts beside bf16: norms and biases must be what llama.cpp adds to."""
    coded = quantize.run(wide, method="rtn", bits=4, group_size=64, out=tmp_path / "AWQ").out
    for out in (
        quantize.convert(coded, format="gguf", out=tmp_path / "a.gguf").out,
        quantize.run(coded, type="Q6_K", requantize=True, out=tmp_path / "b.gguf").out,
    ):
        assert llamacpp.divergence(by_transformers(wide, out), llamacpp.run(out, IDS)) < CLOSE
    folder = gguf_models.save("gpt-oss", tmp_path / "Oss", dtype=torch.bfloat16, vocab_size=tiny.VOCAB)
    gguf_models.edit(folder, gguf_models.four_bit_experts())
    tiny.byte_tokenizer(folder)
    out = quantize.convert(folder, format="gguf", out=tmp_path / "oss.gguf").out
    assert llamacpp.run(out, IDS).isfinite().all()


def test_an_edited_file(wide: Path, tmp_path: Path) -> None:
    out = quantize.run(wide, type="Q4_K_M", out=tmp_path / "a.gguf").out
    before = llamacpp.run(out, IDS)
    assert not quantize.edit(out, {"general.description": "long " * 10000}).in_place
    assert torch.equal(llamacpp.run(out, IDS), before)
