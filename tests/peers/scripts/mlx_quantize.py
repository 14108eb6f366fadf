"""Quantizes arrays with MLX: `mlx_quantize.py IN.npz OUT.npz`.

Names in IN are `label|dtype|group|bits|mode`, values float32. OUT has `name/words`, `name/scales`, `name/values` (what
`mx.dequantize` gives, in float32) and `name/biases` for each, floats as float32.
"""

import sys

import mlx.core as mx
import numpy as np

found = {}
for name, array in np.load(sys.argv[1]).items():
    _, dtype, group, bits, mode = name.split("|")
    weight = mx.array(array).astype(getattr(mx, dtype))
    words, scales, *biases = mx.quantize(weight, group_size=int(group), bits=int(bits), mode=mode)
    values = mx.dequantize(words, scales, *biases, group_size=int(group), bits=int(bits), mode=mode, dtype=mx.float32)
    found[f"{name}/words"] = np.array(words)
    found[f"{name}/scales"] = np.array(scales if mode != "affine" else scales.astype(mx.float32))
    found[f"{name}/values"] = np.array(values.astype(mx.float32))
    if biases:
        found[f"{name}/biases"] = np.array(biases[0].astype(mx.float32))
np.savez(sys.argv[2], **found)
