"""`quantize edit`."""

from __future__ import annotations

import click

from quantize.cli import options

_EXAMPLES = """
quantize edit model.gguf --put general.name='My model' --put tokenizer.ggml.add_bos_token=false
quantize edit model.gguf --put tokenizer.chat_template=@template.jinja
quantize edit model.gguf --put llama.rope.freq_base=f32:500000 --remove general.url --dry-run
"""


@click.command("edit", cls=options.Command, examples=_EXAMPLES)
@click.argument("model", metavar="FILE")
@click.option(
    "--put", multiple=True, metavar="KEY=VALUE", help="Set a value; TYPE:VALUE and @FILE are understood; repeatable."
)
@click.option("--remove", multiple=True, metavar="KEY", help="Drop a key; repeatable.")
@click.option("--dry-run", is_flag=True, help="Say what would change and touch nothing.")
@options.json_
@options.debug
def command(model: str, put: tuple[str, ...], remove: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Change the metadata of a GGUF file; tensors stay as they are.

    A value keeps the type of the one that is there; a new key takes TYPE:VALUE (u32, i32, f32, bool, text, ...; arrays
    as [u32]:[1, 2]) or the type that the value looks like. The file is changed in place where the new header has room,
    else copied; either way a crash leaves it whole.
    """
    from quantize import api
    from quantize.cli import render

    values: dict[str, str] = {}
    for rule in put:
        key, equals, value = rule.partition("=")
        if not equals or not key:
            raise click.UsageError(f"'{rule}' is no KEY=VALUE")
        values[key] = value
    if not values and not remove:
        raise click.UsageError("nothing to do: say --put KEY=VALUE or --remove KEY")
    render.edited(api.edit(model, values, remove, dry_run=dry_run), dry_run, as_json)
