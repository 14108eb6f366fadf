"""`quantize imatrix`."""

from __future__ import annotations

from typing import Any

import click

from quantize.cli import options

_EXAMPLES = """
quantize imatrix path/or/hub-id --calib notes.txt --calib chats.jsonl
quantize imatrix Model --out Model.imatrix.gguf --dry-run
quantize imatrix Model.imatrix.gguf
quantize imatrix one.gguf two.dat --out both.gguf
"""


@click.command("imatrix", cls=options.Command, examples=_EXAMPLES)
@click.argument("sources", nargs=-1, metavar="[MODEL | FILE...]")
@click.option("--out", metavar="FILE", help="The importance matrix.  [default for a model: NAME.imatrix.gguf]")
@click.option("--legacy", is_flag=True, help="Write llama.cpp's older format, which knows no single experts.")
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@click.option("--dry-run", is_flag=True, help="Say what would be gathered or merged and touch nothing.")
@options.CALIBRATION_TEXT
@click.option("--arch", metavar="NAME", help="GGUF's name of the architecture, for a class that is not known.")
@options.adapter
@options.assume_tied
@options.threads
@options.json_
@options.debug
def command(
    sources: tuple[str, ...],
    out: str | None,
    legacy: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Gather, merge or show an importance matrix: what llama.cpp's types weigh their errors by.

    With a MODEL (folder, .gguf file or hub id; without it the current folder) the matrix is gathered block by block,
    so the model need not fit in memory; experts are counted one by one. With FILEs of such matrices, in either format
    of llama.cpp's, they are merged into --out, or shown.
    """
    from quantize import api
    from quantize.cli import render

    if sources and api.is_importance(sources[0]):
        matrix = api.merge_importance(sources, out=out, legacy=legacy, overwrite=overwrite, dry_run=dry_run)
    elif len(sources) > 1:
        raise click.UsageError("several sources are merged, and a model is none of them: name importance matrices")
    else:
        model = sources[0] if sources else None
        out = out or api.importance_name(model)
        if dry_run:
            render.outlook(api.plan_importance(model, out=out, overwrite=overwrite, **settings), out, as_json)
            return
        with render.progress() as progress:
            matrix = api.importance(model, out=out, legacy=legacy, overwrite=overwrite, progress=progress, **settings)
    render.importance(matrix, out, as_json)
