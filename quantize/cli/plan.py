"""`quantize plan`."""

from __future__ import annotations

from typing import Any

import click

from quantize.cli import options

_EXAMPLES = """
quantize plan path/or/hub-id --method awq --bits 4
quantize plan Model --method rtn --bits 4 --recipe recipe.yaml
quantize plan Model --method awq --json | jq .tensors
"""


@click.command("plan", cls=options.Command, examples=_EXAMPLES)
@options.RUN
def command(model: str | None, as_json: bool, **settings: Any) -> None:
    """Show what a run would do: schemes, sizes, memory, fallbacks.

    Takes the options of 'quantize run', reads headers only and touches nothing. It ends with the exit code that the
    run would be refused with, if it would be.
    """
    from quantize import api
    from quantize.cli import render

    render.plan(api.plan(model, **settings), as_json)
