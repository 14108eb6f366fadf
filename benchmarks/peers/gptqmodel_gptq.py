"""GPTQModel's GPTQ on given token rows, on the CPU; runs in GPTQModel's environment.

usage: gptqmodel_gptq.py MODEL IDS.npy BITS GROUP_SIZE SYMMETRIC DTYPE BATCH OUT

SYMMETRIC is 0 or 1. desc_act is off, everything else by default: activation-aware group order, true-sequential, damping
0.05. float32 is the fastest DTYPE on a CPU, by a half; the size of batches matters little.
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


def main(model: str, ids: str, bits: int, group_size: int, symmetric: bool, dtype: str, batch: int, out: str) -> None:
    """Quantizes MODEL and saves it to OUT."""
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(ids)]
    config = QuantizeConfig(bits=bits, group_size=group_size, sym=symmetric, desc_act=False, device="cpu")
    peer = GPTQModel.load(model, config, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    start = time.perf_counter()
    peer.quantize(rows, batch_size=batch)
    seconds = time.perf_counter() - start
    peer.save(out)
    print(f"seconds per block: {seconds / peer.model.config.num_hidden_layers:.2f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    words = sys.argv[1:]
    main(*words[:2], int(words[2]), int(words[3]), words[4] == "1", words[5], int(words[6]), words[7])
