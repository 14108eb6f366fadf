"""A pack-quantized folder of compressed-tensors as a plain float32 one; runs in llm-compressor's environment.

usage: decompress.py FOLDER OUT
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file


def main(folder: Path, out: Path) -> None:
    """Unpacks FOLDER with compressed-tensors' own function and writes OUT, without the quantization block."""
    out.mkdir()
    stored = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    plain = {name: value.float() for name, value in stored.items() if ".weight_" not in name}
    for name in [name for name in stored if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        shape, scale = torch.Size(stored[f"{stem}_shape"].tolist()), stored[f"{stem}_scale"].float()
        codes = unpack_from_int32(stored[name], 4, shape).float()
        zeros = unpack_from_int32(stored[f"{stem}_zero_point"], 4, scale.shape, packed_dim=0).float()
        groups = codes.reshape(*scale.shape, -1)
        plain[stem] = ((groups - zeros[..., None]) * scale[..., None]).reshape(shape).contiguous()
    save_file(plain, out / "model.safetensors", {"format": "pt"})
    for file in folder.glob("*.json"):
        if file.name != "config.json" and "index" not in file.name:
            shutil.copy(file, out)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
