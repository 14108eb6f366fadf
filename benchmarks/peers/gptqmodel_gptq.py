"""GPTQModel's GPTQ on given token rows, on the CPU; runs in GPTQModel's environment.

usage: gptqmodel_gptq.py MODEL IDS.npy BITS GROUP_SIZE DTYPE BATCH OUT

Symmetric, desc_act off, everything else by default: activation-aware group order, true-sequential, damping 0.05.
Prints `seconds per block`, loading and saving not counted.
"""

from __future__ import annotations

import os
import sys
import time

# It starts half as many workers as there are processors, and fails where that is fewer than two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig


def main(model_path: str, ids_path: str, bits: int, group_size: int, dtype: str, batch: int, out: str) -> None:
    """Quantizes MODEL and saves it to OUT."""
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(ids_path)]
    config = QuantizeConfig(bits=bits, group_size=group_size, desc_act=False, device="cpu")
    chosen = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = GPTQModel.load(model_path, config, dtype=chosen)
    start = time.perf_counter()
    model.quantize(rows, batch_size=batch)
    seconds = time.perf_counter() - start
    blocks = model.model.config.num_hidden_layers
    model.save(out)
    print(f"seconds per block: {seconds / blocks:.2f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]), sys.argv[5], int(sys.argv[6]), sys.argv[7])
