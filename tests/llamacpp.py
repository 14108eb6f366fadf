"""What llama.cpp's own library computes with a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

_PEERS = Path(os.environ.get("QUANTIZE_PEERS", Path(__file__).parents[1] / ".peers"))
FOLDER = Path(os.environ.get("QUANTIZE_LLAMA_CPP", _PEERS / "llamacpp/bin")).absolute()
_SCRIPT = Path(__file__).parent / "peers/scripts/llamacpp_logits.py"

needed = pytest.mark.skipif(
    not (FOLDER / "libllama.so").exists(), reason=f"no libllama.so in {FOLDER}: set QUANTIZE_LLAMA_CPP"
)


def run(path: Path, ids: Sequence[int], kind: str = "logits") -> Tensor:
    """Returns logits `[tokens, vocabulary]`, or hidden states where `kind` is `embeddings`.

    llama.cpp runs in a process of its own: it ends the process on a file that it does not like.
    """
    given, out = path.with_suffix(".ids.json"), path.with_suffix(".npy")
    given.write_text(json.dumps(list(ids)))
    command = [sys.executable, _SCRIPT, FOLDER, path, given, out, kind]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.from_numpy(np.load(out))


def divergence(base: Tensor, other: Tensor) -> float:
    """Mean KL divergence over the tokens, in nats."""
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (base, other))
    return float((p.exp() * (p - q)).sum(-1).mean())
