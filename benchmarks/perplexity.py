#!/usr/bin/env python3
"""`evaluate` against llama-perplexity: the same GGUF, text and chunks must give the same perplexity.

llama.cpp's converter makes the F32 and BF16 files from a Hugging Face folder (or `llama-quantize` makes them from a
quantized GGUF, where the converter does not know the tokenizer), `llama-quantize` the Q8_0 and Q4_1 ones.
On these llama.cpp rounds activations too, so a wider bar applies.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import click
from common import Failed, measure, save, show, verdict

import quantize

BARS = {"F32": 0.002, "BF16": 0.002, "Q8_0": 0.01, "Q4_1": 0.01}


def make_files(source: Path, llama: Path, converter: Path | None, work: Path) -> dict[str, Path]:
    """Returns a GGUF of each type, made by llama.cpp's own tools.

    Args:
        source: A Hugging Face folder, or a GGUF.
        llama: Folder of llama.cpp's programs.
        converter: Its convert_hf_to_gguf.py, for a folder; torch, transformers and sentencepiece are all it needs.
        work: Where the files go.
    """
    files = {name: work / f"{name}.gguf" for name in BARS}
    for name in ("F32", "BF16"):
        if converter is not None:
            measure([sys.executable, converter, source, "--outtype", name.lower(), "--outfile", files[name]])
        else:
            measure([llama / "llama-quantize", "--allow-requantize", source, files[name], name])
    for name in ("Q8_0", "Q4_1"):
        measure([llama / "llama-quantize", files["F32"], files[name], name])
    return files


def llama_perplexity(llama: Path, model: Path, text: Path, context: int, chunks: int) -> float:
    """Returns llama.cpp's figure.

    Raises:
        Failed: it prints none.
    """
    program = llama / "llama-perplexity"
    usage = measure([program, "-m", model, "-f", text, "-c", str(context), "--chunks", str(chunks)])
    found = re.search(r"Final estimate: PPL = ([\d.]+)", usage.output)
    if found is None:
        raise Failed(f"{program.name} printed no estimate:\n{usage.output[-2000:]}")
    return float(found[1])


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--llama", type=click.Path(exists=True, path_type=Path), required=True, help="llama.cpp's programs.")
@click.option("--converter", type=click.Path(exists=True, path_type=Path), help="llama.cpp's convert_hf_to_gguf.py.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--context", default=512, show_default=True)
@click.option("--chunks", default=20, show_default=True)
@click.option("--work", type=click.Path(exists=True, path_type=Path), help="Folder for files; a temporary one else.")
def main(
    source: Path,
    llama: Path,
    converter: Path | None,
    text: Path,
    context: int,
    chunks: int,
    work: Path | None,
) -> None:
    """Evaluates SOURCE, a model folder or a quantized GGUF, by both programs; writes results/perplexity.json."""
    if source.is_dir() != (converter is not None):
        raise click.UsageError("a folder needs --converter, a GGUF takes none")
    rows, bars = [], []
    with tempfile.TemporaryDirectory(dir=work) as folder:
        files = make_files(source, llama, converter, Path(folder))
        for name, file in files.items():
            theirs = llama_perplexity(llama, file, text, context, chunks)
            ours = quantize.evaluate(file, text=str(text), context=context, chunks=chunks).perplexity
            rows.append({"type": name, "ours": ours, "llama.cpp": theirs, "ratio": ours / theirs})
            bars.append(verdict(f"{name}: |ratio - 1|", abs(ours / theirs - 1), BARS[name]))
    show(f"perplexity of {source.name}, {chunks} chunks of {context} of {text.name}", rows)
    show("bars", bars)
    save("perplexity", {"model": source.name, "text": text.name, "context": context, "chunks": chunks}
         | {"rows": rows, "bars": bars})  # fmt: skip


if __name__ == "__main__":
    main()
