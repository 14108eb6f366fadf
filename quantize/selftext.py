"""Calibration text sampled from the model itself.

Self-generated text calibrates as well as real text and has no licence (Williams et al. 2024, arXiv 2410.17170). The
whole model must fit in memory: sampling token by token would otherwise read all weights for every token.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from quantize.errors import ResourceError, UsageError
from quantize.formats.base import Checkpoint
from quantize.progress import Progress, silent
from quantize.skeleton import Skeleton

SELF = "self"
_ROWS = 16
# Bytes per second that a fast disk gives, for the estimate of what a refused run would take.
_DISK = 1e9


def sample_rows(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    tokenizer: Any,
    *,
    rows: int,
    length: int,
    seed: int,
    progress: Progress = silent,
) -> Tensor:
    """Returns text sampled at temperature 1, int64 `[rows, length]`.

    A row starts with BOS where the tokenizer adds it and then a uniformly random token, so that rows differ.

    Args:
        skeleton: The model; filled for the time of the call and emptied again.
        checkpoint: Where its weights are read from.
        tokenizer: Its tokenizer.
        rows: Rows to sample.
        length: Tokens per row.
        seed: Seed of the sampling; the caller's random state is not touched.
        progress: Told how many tokens of each batch are done.

    Raises:
        ResourceError: the model does not fit in memory; the message estimates the time that it would take.
        UsageError: the model is an encoder-decoder.
    """
    model = skeleton.model
    if model.config.is_encoder_decoder:
        raise UsageError("--calib self needs a decoder-only model", "name a text file")
    _require_memory(skeleton, checkpoint, rows, length)
    names = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    bos = tokenizer.bos_token_id
    start = [bos] if bos is not None and list(tokenizer("a").input_ids)[:1] == [bos] else []

    def read(name: str) -> Tensor:
        value = checkpoint.read(name)
        return value.float() if value.is_floating_point() else value

    skeleton.put(skeleton.fill(lambda _: True, read))
    try:
        parts = []
        for begin in range(0, rows, _ROWS):
            count = min(_ROWS, rows - begin)
            first = torch.randint(0, len(tokenizer), (count, 1), generator=generator)
            ids = torch.cat([torch.tensor([start] * count, dtype=torch.int64).reshape(count, -1), first], 1)
            parts.append(_continue(model, ids, length, generator))
            progress("sampling text", min(begin + _ROWS, rows), rows)
        return torch.cat(parts)
    finally:
        skeleton.put(names)


def _continue(model: Any, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Returns `ids` `[rows, n]` sampled on to `[rows, length]`."""
    cache, step = None, ids
    with torch.no_grad():
        while ids.shape[1] < length:
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            step = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, step], 1)
    return ids


def _require_memory(skeleton: Skeleton, checkpoint: Checkpoint, rows: int, length: int) -> None:
    need = sum(4 * parameter.numel() for parameter in skeleton.model.parameters())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need <= 0.8 * free:
        return
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    hours = stored / _DISK * length * -(-rows // _ROWS) / 3600
    raise ResourceError(
        f"--calib self needs {need / 1e9:.1f} GB for the whole model, {free / 1e9:.1f} GB are free",
        f"reading the weights for every token would take about {hours:.0f} h; use --calib default or a file",
    )
