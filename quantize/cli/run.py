"""`quantize run`."""

from __future__ import annotations

from typing import Any

import click

from quantize.cli import options

_EXAMPLES = """
quantize run path/or/hub-id --method awq --bits 4
quantize run Model --method rtn --bits 4 --group-size 64 --set '*.down_proj=keep'
quantize run Model --method awq --calib chats.jsonl --calib hub:NAME --out Model-AWQ
quantize run Model --method awq --dry-run
quantize run Model --type Q4_K_M
quantize run Model --type IQ3_XXS --calib notes.txt --imatrix model.imatrix.gguf
"""


@click.command("run", cls=options.Command, examples=_EXAMPLES)
@options.RUN
@click.option("--dry-run", is_flag=True, help="Show the plan and touch nothing.")
def command(model: str | None, dry_run: bool, as_json: bool, **settings: Any) -> None:
    """Quantize a model: any method to any format that holds it.

    MODEL is a folder, a .gguf file or a hub id; without it, the current folder if that holds a model. An interrupted
    run continues when the same command is given again, and ends in the same bytes.
    """
    from quantize import api
    from quantize.cli import render

    if dry_run:
        render.plan(api.plan(model, **settings), as_json)
        return
    with render.progress() as progress:
        report = api.run(model, progress=progress, announce=render.header, **settings)
    render.report(report, as_json)
