"""A model of which only the first input columns of each linear are rounded, in memory, and its loss.

For models whose widths the 256 weights of llama.cpp's super-blocks do not divide: no file holds such a model, but the
roundings can be compared on it. Inputs are gathered as in a run: block after block, from what is rounded already for
gptq, from the unquantized model for the encoder with importance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantize.calib_data import token_rows
from quantize.formats.gguf.mixes import find_mix
from quantize.methods.base import Block
from quantize.methods.gptq import GPTQ
from quantize.parallel import Pool
from quantize.schemes import parse_scheme
from quantize.statistics import Statistics
from quantize.structure import Input

LENGTH = 512
_SCORED = 256
_HEAD = 128


def losses(
    folder: Path,
    columns: int,
    kind: str,
    way: str,
    calib: Sequence[str],
    rows: int,
    texts: Sequence[Path],
    chunks: int,
) -> dict[str, np.ndarray]:
    """Returns the mean KL divergence of each chunk of each text after rounding.

    Args:
        folder: A llama-like model folder.
        columns: How many input columns of each linear of a block are rounded.
        kind: Name of a mix, for its base type.
        way: "gptq", or "importance" for the type's encoder with the mean squares of the inputs.
        calib: Calibration texts.
        rows: Their rows.
        texts: What loss is measured on.
        chunks: Windows of each, the second half scored.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = {
        text.stem: tokenizer(text.read_text(), return_tensors="pt").input_ids[0][: chunks * LENGTH].view(chunks, -1)
        for text in texts
    }
    with torch.no_grad():
        before = {name: [_hidden(model, ids) for ids in each] for name, each in windows.items()}
        ids = token_rows(calib, tokenizer, rows=rows, length=LENGTH, seed=0).ids
        _round(model, ids, columns, parse_scheme(find_mix(kind).base), way)
        head = model.lm_head
        return {
            name: np.array([_divergence(head(was), head(_hidden(model, ids))) for was, ids in pairs])
            for name, pairs in ((name, zip(before[name], each, strict=True)) for name, each in windows.items())
        }


def _hidden(model: Any, ids: Tensor) -> Tensor:
    return model.model(ids[None]).last_hidden_state[0, _SCORED:-1]


def _divergence(base: Tensor, other: Tensor) -> float:
    total = 0.0
    for p, q in zip(base.split(_HEAD), other.split(_HEAD), strict=True):
        total += float(nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"))
    return total / len(base)


def _round(model: Any, ids: Tensor, columns: int, scheme: Any, way: str) -> None:
    hidden = model.model.embed_tokens(ids)
    place = torch.arange(ids.shape[1])[None]
    rope = model.model.rotary_emb(hidden[:1], place)
    roles = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

    def passed(layer: nn.Module, x: Tensor) -> Tensor:
        out = layer(x[None], attention_mask=None, position_ids=place, position_embeddings=rope)
        return (out[0] if isinstance(out, tuple) else out)[0]

    turns = [roles] if way == "importance" else [(role,) for role in roles]
    with Pool(2) as pool:
        for layer in model.model.layers:
            linears = {name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
            for turn in turns:
                with _watched([linears[role[0]] for role in turn], columns) as seen:
                    out = torch.stack([passed(layer, row) for row in hidden])
                for role, statistics in zip(turn, seen, strict=True):
                    for weight in (linears[name].weight for name in role):
                        weight[:, :columns] = _rounded(weight[:, :columns].contiguous(), statistics, scheme, way, pool)
            # importance is that of the unquantized model; gptq sees what engines will
            hidden = out if way == "importance" else torch.stack([passed(layer, row) for row in hidden])


def _rounded(weight: Tensor, seen: Statistics, scheme: Any, way: str, pool: Pool) -> Tensor:
    if way == "importance":
        return scheme.encode(weight, seen.mean_square.contiguous()).dequantize()
    item = Input("w", ("w",), weight.shape[1])
    block = Block("block", {"w": weight}, {"w": torch.float32}, {"w": scheme}, [item], {"w": seen})
    return GPTQ().quantize(block, pool).coded["w"].dequantize()


@contextmanager
def _watched(linears: Sequence[nn.Linear], columns: int) -> Iterator[list[Statistics]]:
    """Adds up the statistics of the first input columns of some linears."""
    totals = [Statistics.empty(columns) for _ in linears]

    def add(index: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        totals[index] = totals[index].merge(Statistics.of(args[0][..., :columns]))

    handles = [linear.register_forward_pre_hook(partial(add, i)) for i, linear in enumerate(linears)]
    try:
        yield totals
    finally:
        for handle in handles:
            handle.remove()
