"""llm-compressor's AWQ on given token rows; runs in llm-compressor's environment.

usage: llmcompressor_awq.py MODEL IDS.npy GROUP_SIZE DTYPE OUT

AWQModifier and, after it, QuantizationModifier with the W4A16_ASYM scheme at the given group size; lm_head left out;
everything else by default.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_path: str, ids_path: str, group_size: int, dtype: str, out: str) -> None:
    """Quantizes MODEL and saves it to OUT."""
    rows = np.load(ids_path)
    scheme = preset_name_to_scheme("W4A16_ASYM", ["Linear"])
    scheme.weights.group_size = group_size
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}),
        recipe=[AWQModifier(), QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])],
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda self, device=None: self  # it pins every batch, which needs an accelerator
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
