"""`quantize convert`."""

from __future__ import annotations

from typing import Any

import click

from quantize.cli import options

_EXAMPLES = """
quantize convert model-Q4_1.gguf --format hf --out Model
quantize convert Model-AWQ --format hf --dtype f16
quantize convert Model --format hf --adapter my-lora:0.5
quantize convert Model --format gguf --dtype f16
quantize convert model-00001-of-00003.gguf --format gguf --out model.gguf
"""


@click.command("convert", cls=options.Command, examples=_EXAMPLES)
@click.argument("model")
@click.option(
    "--format", "--to", "format", default="hf", show_default=True, metavar="NAME", help="Format of the output."
)
@options.OUTPUT
@options.GGUF_OUTPUT
@options.RULES
@options.adapter
@options.assume_tied
@options.threads
@click.option("--dry-run", is_flag=True, help="Show the plan and touch nothing.")
@options.json_
@options.debug
def command(model: str, format: str, dry_run: bool, as_json: bool, **settings: Any) -> None:
    """Write a model in another format without coarser rounding.

    MODEL is a folder, a .gguf file or a hub id. Quantized tensors are dequantized, to bf16 unless --dtype says
    otherwise; plain ones stay bit for bit as they are.
    """
    from quantize import api
    from quantize.cli import render

    if dry_run:
        render.plan(api.plan(model, format=format, **settings), as_json)
        return
    with render.progress() as progress:
        report = api.convert(model, format=format, progress=progress, announce=render.header, **settings)
    render.report(report, as_json)
