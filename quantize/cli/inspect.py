"""`quantize inspect`."""

from __future__ import annotations

import click

from quantize.cli import options

_EXAMPLES = """
quantize inspect Model-AWQ
quantize inspect model-Q4_K_M.gguf
quantize inspect path/or/hub-id --json | jq .schemes
"""


@click.command("inspect", cls=options.Command, examples=_EXAMPLES)
@options.model
@options.json_
@options.debug
def command(model: str | None, as_json: bool) -> None:
    """Show what a checkpoint holds: schemes, sizes, metadata.

    MODEL is a folder, a .gguf file or a hub id; without it, the current folder. Only headers are read. --json lists
    every tensor.
    """
    from quantize import api
    from quantize.cli import render

    render.contents(api.inspect(model), as_json)
