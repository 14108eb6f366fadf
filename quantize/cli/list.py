"""`quantize list`."""

from __future__ import annotations

import click

from quantize.cli import options

_EXAMPLES = """
quantize list
quantize list --json | jq .combinations
"""


@click.command("list", cls=options.Command, examples=_EXAMPLES)
@options.json_
@options.debug
def command(as_json: bool) -> None:
    """List methods, formats and schemes, and which go together.

    Computed by asking each method and each format, so it holds for those that other packages add as well.
    """
    from quantize import api
    from quantize.cli import render

    render.catalog(api.catalog(), as_json)
