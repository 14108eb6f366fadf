"""Loads a GPTQ folder on the CPU, with GPTQModel or with transformers; runs in GPTQModel's environment.

usage: gptq_logits.py LOADER FOLDER IDS.npy OUT

LOADER is gptqmodel or transformers. Writes OUT.npy, the logits of the token rows computed in float32, and OUT.json: the
class of every linear by module name, "kept" for plain ones, and the ids that greedy generation appends to the first
row.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

NEW_TOKENS = 8


def load(loader: str, folder: str) -> Any:
    """Returns the model; both use GPTQModel's kernel in torch, which takes every width. It loads in 16 bits only."""
    if loader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model.float()
    from transformers import AutoModelForCausalLM, GPTQConfig

    settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    config = GPTQConfig(bits=settings["bits"], backend="gptq_torch")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map="cpu", quantization_config=config
    )
    return torch.nn.Module.float(model)  # transformers forbids its own for quantized models


def main(loader: str, folder: str, ids_path: str, out: str) -> None:
    """Writes what the peer makes of FOLDER."""
    ids = torch.from_numpy(np.load(ids_path))
    model = load(loader, folder).eval()
    with torch.inference_mode():
        logits = model(ids).logits.float()
        row = ids[:1]
        longer = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=NEW_TOKENS, do_sample=False)
    kinds = {
        name: "kept" if type(module) is torch.nn.Linear else type(module).__name__
        for name, module in model.named_modules()
        if hasattr(module, "qweight") or isinstance(module, torch.nn.Linear)
    }
    np.save(f"{out}.npy", logits.numpy())
    record = {"linears": kinds, "generated": longer[0, ids.shape[1] :].tolist()}
    Path(f"{out}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
