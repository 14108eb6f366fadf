"""Loads MLX folders with mlx-lm on the CPU; runs in MLX's environment.

usage: mlx_logits.py IDS.npy FOLDER...

Writes FOLDER.npy beside each folder, the logits of the token rows computed in float32, and FOLDER.json: the bits, group
and mode of every quantized module by path.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model


def main(ids_path: str, *folders: str) -> None:
    """Writes what mlx-lm makes of each folder."""
    ids = mx.array(np.load(ids_path))
    for folder in folders:
        model, _ = load_model(Path(folder))
        modules = {
            name: [module.bits, module.group_size, module.mode]
            for name, module in model.named_modules()
            if hasattr(module, "scales")
        }
        model.set_dtype(mx.float32)  # products in 16 bits are very slow on x86
        np.save(f"{folder}.npy", np.array(model(ids).astype(mx.float32)))
        Path(f"{folder}.json").write_text(json.dumps(modules))


if __name__ == "__main__":
    main(*sys.argv[1:])
