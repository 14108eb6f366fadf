"""`quantize inspect`."""

from __future__ import annotations

import click

from quantize.cli import options

_EXAMPLES = """
quantize inspect Model-AWQ
quantize inspect model-Q4_K_M.gguf
quantize inspect path/or/hub-id --json | jq .schemes
quantize inspect a.gguf b.gguf --contents
"""


@click.command("inspect", cls=options.Command, examples=_EXAMPLES)
@options.model
@click.argument("other", required=False)
@options.adapter
@click.option("--contents", is_flag=True, help="Compare the bytes of tensors, too; GGUF files only.")
@options.json_
@options.debug
def command(model: str | None, other: str | None, adapters: tuple[str, ...], contents: bool, as_json: bool) -> None:
    """Show what a checkpoint holds, or in what two differ.

    MODEL and OTHER are folders, .gguf files or hub ids; without MODEL, the current folder. Only headers are read.
    --json lists every tensor.
    """
    from quantize import api
    from quantize.cli import render

    if model is not None and other is not None:
        render.difference(api.compare(model, other, contents=contents), as_json)
    else:
        render.contents(api.inspect(model, adapters), as_json)
