"""Loads an AWQ folder with transformers and GPTQModel on the CPU; runs in GPTQModel's environment.

usage: awq_logits.py FOLDER IDS.npy OUT

Writes OUT.npy, the logits of the token rows, and OUT.json: the class of every linear by module name, "kept" for plain
ones, and the ids that greedy generation appends to the first row.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

NEW_TOKENS = 8


def main(folder: str, ids_path: str, out: str) -> None:
    """Writes what the peer makes of FOLDER."""
    ids = torch.from_numpy(np.load(ids_path))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu").eval()
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
