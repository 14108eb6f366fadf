"""Quantizes a folder with llm-compressor's schemes that need no data; runs in llm-compressor's environment.

usage: llmcompressor_quantize.py FOLDER OUT SCHEME...

Each scheme's folder is OUT/SCHEME.
"""

from __future__ import annotations

import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM


def main(folder: str, out: str, *schemes: str) -> None:
    """Writes what llm-compressor makes of FOLDER."""
    for scheme in schemes:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
        model.save_pretrained(f"{out}/{scheme}", save_compressed=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
