"""GGUF files of every architecture in llama.cpp's own library, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gguf_models
import llamacpp
import pytest
import torch
from torch import Tensor

from quantize.formats.folder import FolderCheckpoint
from quantize.formats.gguf.view import GGUFView

TOKENS = 32
# Mean KL divergence in nats: F32 shows a wrong formula (1e-12 where no GELU is: llama.cpp looks that up in a table of
# half-precision floats), F16 the rounding of activations, the others that of weights, which may choose other experts.
LIMITS = {"F32": 2e-6, "F16": 1e-5, "BF16": 2e-3, "Q8_0": 0.1}

pytestmark = [pytest.mark.peer, llamacpp.needed]


def token_ids() -> list[int]:
    """The prompt: ids that are no special tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, gguf_models.VOCABULARY, (TOKENS,), generator=generator).tolist()


def expected(model: Any, ids: list[int]) -> Tensor:
    """What transformers computes: logits `[tokens, vocabulary]`, or hidden states where there is no head."""
    batch = torch.tensor([ids])
    more = {"decoder_input_ids": batch} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(input_ids=batch, use_cache=False, **more)
    found: Tensor = out.logits[0] if hasattr(out, "logits") else out.last_hidden_state[0]
    return found.float()


@pytest.mark.parametrize("name", gguf_models.MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gguf_models.load(name, gguf_models.save(name, tmp_path / "model"))
    view = GGUFView(FolderCheckpoint(tmp_path / "model"))
    ids = token_ids()
    base = expected(model, ids)
    kind = "logits" if base.shape[-1] == gguf_models.VOCABULARY else "embeddings"
    measured = {}
    for label in LIMITS:
        path = gguf_models.write_gguf(view, tmp_path / f"{label}.gguf", gguf.GGMLQuantizationType[label])
        found = llamacpp.run(path, ids, kind)
        if kind == "embeddings":  # no distribution: the share of the states' power that differs
            measured[label] = float((found - base).double().square().sum() / base.double().square().sum())
        else:
            measured[label] = llamacpp.divergence(base, found)
    spread = float(base.std(-1).mean())
    row = f"{name:20} spread {spread:5.2f}  " + "  ".join(f"{k} {v:.1e}" for k, v in measured.items())
    with capsys.disabled():
        print(f"\n{row}", end="")
    assert {k for k, v in measured.items() if v > LIMITS[k]} == set(), row


def test_four_bit_experts(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = gguf_models.save("gpt-oss", tmp_path / "model")
    changes = gguf_models.four_bit_experts()
    plain = {
        stem: convert_moe_packed_tensors(changes[f"{stem}_blocks"], changes[f"{stem}_scales"], dtype=torch.float32)
        for stem in (name for name, values in changes.items() if values is None)
    }
    gguf_models.edit(folder, plain)
    base = expected(gguf_models.load("gpt-oss", folder), token_ids())
    view = GGUFView(gguf_models.edit(folder, changes))
    path = gguf_models.write_gguf(view, tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    # llama.cpp rounds what enters these matrices to 8 bits.
    assert llamacpp.divergence(base, llamacpp.run(path, token_ids())) < 1e-3


def test_blocks_for_further_tokens_change_nothing(tmp_path: Path) -> None:
    folder = gguf_models.save("qwen35", tmp_path / "model")
    base = expected(gguf_models.load("qwen35", folder), token_ids())
    view = GGUFView(gguf_models.edit(folder, gguf_models.further_block(folder)))
    path = gguf_models.write_gguf(view, tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    assert llamacpp.divergence(base, llamacpp.run(path, token_ids())) < LIMITS["F32"]
