"""Loads folders with transformers and compressed-tensors on the CPU; runs in llm-compressor's environment.

usage: compressed_logits.py IDS.npy FOLDER...

Writes beside each FOLDER what it makes of it: FOLDER.json, its linears and those that it takes for quantized;
FOLDER.npy, the logits of the token rows, with rounded inputs where the folder says so; FOLDER.safetensors, the weights
that it computes with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def main(ids_path: str, *folders: str) -> None:
    """Writes what the peer makes of each folder."""
    ids = torch.from_numpy(np.load(ids_path))
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu").eval()
        named = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        quantized = [name for name, module in named if getattr(module, "quantization_scheme", None) is not None]
        Path(f"{folder}.json").write_text(json.dumps({"quantized": quantized, "linears": [name for name, _ in named]}))
        with torch.inference_mode():
            np.save(f"{folder}.npy", model(ids).logits.float().numpy())
        plain = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map="cpu",
            quantization_config=CompressedTensorsConfig(dequantize=True),
        )
        weights = {name: value.contiguous() for name, value in plain.state_dict().items() if name.endswith(".weight")}
        save_file(weights, f"{folder}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
