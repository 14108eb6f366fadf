#!/usr/bin/env python3
"""Peak memory of `quantize run` must not grow with depth, and must hold under a hard limit.

Writes llama models with random weights to a work folder, quantizes them in child processes, and deletes them again:

- awq: 12 and 48 layers of one width have the same peak within 10 %;
- rtn: 4 and 8 layers of a 7B model's width with a 152k vocabulary stay under 1.2 GB;
- gptq: 2 and 6 layers of that width have the same peak within 5 %, under 6 GB (hours on 2 cores).

The first two also pass under RLIMIT_DATA of 1.2 GB, which counts private writable address space, touched or not.

The tokenizer for the calibrating runs is taken from a model folder. The rtn part needs 12 GB of disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from common import measure, quantize_command, save, show, verdict
from safetensors.torch import save_file

SHARD_BYTES = 2 * 10**9
LIMIT = 1_200_000_000
GPTQ_LIMIT = 6_000_000_000


def llama_config(hidden: int, ffn: int, vocabulary: int, layers: int) -> dict[str, Any]:
    """Returns the config of a llama model with 64-wide heads, four of them sharing keys and values."""
    heads = hidden // 64
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of every tensor of a llama model, in file order."""
    hidden, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{layer}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def write_model(folder: Path, config: Mapping[str, Any], seed: int = 0) -> None:
    """Writes a bfloat16 model with random weights in shards of at most 2 GB."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes(config):
        nbytes = 2 * torch.Size(shape).numel()
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    table: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(shape, generator) for name, shape in members}
        save_file(tensors, folder / file, {"format": "pt"})
        table.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": 2 * sum(torch.Size(s).numel() for _, s in shapes(config))}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Returns weights of a usual size; norms are near 1."""
    value = torch.empty(shape, dtype=torch.bfloat16)
    return value.normal_(1.0 if len(shape) == 1 else 0.0, 0.02, generator=generator)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a model folder's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def compare(
    work: Path, models: Mapping[str, dict[str, Any]], *, bounded: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """Quantizes each model, free and then under RLIMIT_DATA, and returns a row for each; all files are deleted.

    Args:
        work: Where the models go.
        models: Configs by name; "tokenizer" in a config names the folder to take one from.
        bounded: Whether it is run under the limit at all.
        options: Options of `quantize run`.
    """
    rows = []
    for name, config in models.items():
        folder, out = work / name, work / f"{name}-out"
        try:
            tokenizer = config.pop("tokenizer", None)
            write_model(folder, config)
            if tokenizer is not None:
                copy_tokenizer(tokenizer, folder)
            command = quantize_command("run", folder, out=out, eval="none", overwrite=True, **options)
            free = measure(command)
            row = {"model": name, "layers": config["num_hidden_layers"], **free.figures}
            if bounded:
                again = measure(command, data_limit=LIMIT, check=False)
                row |= {"limit_mb": LIMIT / 1e6, "passes_under_limit": again.code == 0}
                if again.code:
                    print(again.output[-2000:])
            rows.append(row)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
    return rows


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for the models; emptied again.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True, help="Model folder with one.")
@click.option("--calib", multiple=True, default=("default",), help="Calibration text for awq.")
@click.option("--threads", default=2, show_default=True)
@click.option("--samples", type=int, help="Calibration rows of 512 tokens.  [default: 16 for awq, 32 for gptq]")
@click.option("--layers", multiple=True, default=(2, 6), show_default=True, help="Depths for gptq.")
@click.option("--only", type=click.Choice(["awq", "rtn", "gptq"]), help="Run one part.")
def main(
    work: Path,
    tokenizer: Path,
    calib: tuple[str, ...],
    threads: int,
    samples: int | None,
    layers: tuple[int, ...],
    only: str | None,
) -> None:
    """Measures and writes results/memory-METHOD.json."""
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    text = {"calib": calib, "calib_samples": samples or 16, "threads": threads}
    if only in (None, "awq"):
        narrow = {f"narrow-{n}": {**llama_config(512, 1408, vocabulary, n), "tokenizer": tokenizer} for n in (12, 48)}
        rows = compare(work, narrow, method="awq", bits=4, **text)
        peaks = [row["peak_mb"] for row in rows]
        report("awq", rows, [verdict("48 layers' peak / 12 layers'", max(peaks) / min(peaks), 1.1)], threads)
    if only in (None, "gptq"):
        wide = {f"wide-{n}": {**llama_config(4096, 11008, vocabulary, n), "tokenizer": tokenizer} for n in layers}
        options = text | {"calib_samples": samples or 32}
        rows = compare(work, wide, bounded=False, method="gptq", bits=4, **options)
        peaks = [row["peak_mb"] for row in rows]
        bars = [verdict(f"peak MB, {row['layers']} layers", row["peak_mb"], GPTQ_LIMIT / 1e6) for row in rows]
        report("gptq", rows, [*bars, verdict("largest peak / smallest", max(peaks) / min(peaks), 1.05)], threads)
    if only in (None, "rtn"):
        wide = {f"wide-{n}": llama_config(4096, 11008, 152_000, n) for n in (4, 8)}
        rows = compare(work, wide, method="rtn", bits=4, threads=threads)
        bars = [verdict(f"peak MB, {row['layers']} layers", row["peak_mb"], LIMIT / 1e6) for row in rows]
        report("rtn", rows, bars, threads)


def report(method: str, rows: list[dict[str, Any]], bars: list[dict[str, Any]], threads: int) -> None:
    """Prints and writes one part."""
    show(f"run --method {method}", rows)
    show("bars", bars)
    save(f"memory-{method}", {"threads": threads, "rows": rows, "bars": bars})


if __name__ == "__main__":
    main()
