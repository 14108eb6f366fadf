#!/usr/bin/env python3
"""Peak memory of a 7B-shaped model on its way to a GGUF type: under 1.5 GB, and it holds under a hard limit.

Writes a bfloat16 llama model of a 7B's widths (13.5 GB with all 32 layers), quantizes it in a child process, then
again under RLIMIT_DATA of 1.5 GB, which counts private writable address space, touched or not, and deletes all. The
weights are random; every layer holds the same ones, so that writing takes seconds.

A trial with fewer layers tells most: `--layers 4 --layers 8` also prints what 32 layers would take if each further
layer took as much as those between the two did.

    python benchmarks/gguf_memory.py --work FOLDER [--layers 32] [--type Q4_K_M]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from common import measure, quantize_command, save, show, verdict
from memory import llama_config, shapes
from safetensors.torch import save_file

LIMIT = 1_500_000_000
LAYERS = 32
_FIRST = "model.layers.0."


def config_of(layers: int) -> dict[str, Any]:
    """Returns the config of a 7B llama: 32 heads of 128, none sharing keys and values."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    return {**llama_config(4096, 11008, 32_000, layers), **heads}


def write_model(folder: Path, config: Mapping[str, Any]) -> int:
    """Writes a model whose layers are all alike, a file for each and one for the rest; returns its bytes."""
    generator = torch.Generator().manual_seed(0)
    one: dict[str, torch.Tensor] = {}
    for name, shape in shapes({**config, "num_hidden_layers": 1}):
        mean = 1.0 if len(shape) == 1 else 0.0
        one[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(mean, 0.02, generator=generator)
    parts = [{name: value for name, value in one.items() if not name.startswith(_FIRST)}]
    for index in range(config["num_hidden_layers"]):
        here = f"model.layers.{index}."
        parts.append({here + name.removeprefix(_FIRST): value for name, value in one.items() if name not in parts[0]})
    table: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        table.update(dict.fromkeys(part, file))
    size = sum(value.nbytes for part in parts for value in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return size


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Writes a byte-level tokenizer of `vocabulary` tokens: three special ones, all bytes, and pairs of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: vocabulary - len(special) - len(letters)]
    tokens = [*special, *letters, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    unknown, begin, end = special
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end)
    fast.save_pretrained(folder)


def quantize(layers: int, kind: str, threads: int, work: Path | None) -> dict[str, Any]:
    """Quantizes a model of some layers, free and under the limit, and returns a row; all files are deleted."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder, out = Path(name) / f"wide-{layers}", Path(name) / "out.gguf"
        folder.mkdir()
        config = config_of(layers)
        size = write_model(folder, config)
        write_tokenizer(folder, config["vocab_size"])
        options = {"type": kind, "imatrix": "none", "eval": "none", "threads": threads}
        command = quantize_command("run", folder, out=out, overwrite=True, **options)
        free = measure(command)
        row = {"layers": layers, "source_gb": round(size / 1e9, 2), **free.figures}
        row |= {"out_gb": round(out.stat().st_size / 1e9, 2)}
        bounded = measure(command, data_limit=LIMIT, check=False)
        if bounded.code:
            print(bounded.output[-2000:])
        return row | {"limit_mb": LIMIT / 1e6, "passes_under_limit": bounded.code == 0}


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the bars: each measured peak, and what they promise for all layers where none had as many."""
    bars = [verdict(f"peak MB, {row['layers']} layers", row["peak_mb"], LIMIT / 1e6) for row in rows]
    bars += [
        verdict(f"fails under the limit, {row['layers']} layers", not row["passes_under_limit"], 0) for row in rows
    ]
    least, most = (pick(rows, key=lambda row: row["layers"]) for pick in (min, max))
    if least["layers"] < most["layers"] < LAYERS:
        each = (most["peak_mb"] - least["peak_mb"]) / (most["layers"] - least["layers"])
        peak = most["peak_mb"] + max(0.0, each) * (LAYERS - most["layers"])
        bars.append(verdict(f"peak MB, {LAYERS} layers, extrapolated", peak, LIMIT / 1e6))
    return bars


@click.command(help=__doc__)
@click.option("--layers", multiple=True, type=int, default=(LAYERS,), help="Layers; repeat it for several models.")
@click.option("--type", "kind", default="Q4_K_M", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the models; a temporary one else.")
def main(layers: tuple[int, ...], kind: str, threads: int, work: Path | None) -> None:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    rows = [quantize(count, kind, threads, work) for count in layers]
    bars = judge(rows)
    if max(layers) < LAYERS:
        print(f"A trial: {LAYERS} layers were not measured.")
    show(f"run --type {kind}, {threads} threads", rows)
    show("bars", bars)
    print(save("gguf-memory", {"type": kind, "threads": threads, "rows": rows, "bars": bars}))


if __name__ == "__main__":
    main()
