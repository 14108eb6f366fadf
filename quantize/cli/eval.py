"""`quantize eval`."""

from __future__ import annotations

from typing import Any

import click

from quantize.cli import options

_EXAMPLES = """
quantize eval Model-AWQ
quantize eval Model-AWQ --base Model --text wiki.test.raw --chunks 40
quantize eval Model-AWQ --base Model --max-ppl-increase 2% --min-top1 90%
"""


@click.command("eval", cls=options.Command, examples=_EXAMPLES)
@click.argument("model")
@click.option("--base", metavar="MODEL", help="What it is compared with; without it, perplexity alone.")
@click.option("--text", default="default:eval", show_default=True, metavar="SOURCE", help="A text file or hub:NAME.")
@click.option(
    "--protocol", "definition", default="llamacpp", show_default=True, metavar="NAME",
    help="What perplexity means: llamacpp (second half of each chunk), gptq (all of it) or sliding (the last stride).",
)  # fmt: skip
@click.option("--context", type=int, default=512, show_default=True, metavar="N", help="Tokens of a window.")
@click.option("--stride", type=int, metavar="N", help="Tokens between windows' starts.  [default: the protocol's own]")
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Windows to score at most.  [default: all]")
@click.option(
    "--max-ppl-increase", type=options.share, metavar="SHARE",
    help="Fail if perplexity is more than this above the base's: 2% or 0.02.",
)  # fmt: skip
@click.option(
    "--max-kld", type=click.FloatRange(min=0), metavar="NATS", help="Fail if the mean KL divergence is larger."
)
@click.option("--min-top1", type=options.share, metavar="SHARE", help="Fail if top-1 agreement is less: 90% or 0.9.")
@click.option("--conclusive", is_flag=True, help="Fail with exit code 6 if a 95 % interval reaches across a limit.")
@options.adapter
@options.assume_tied
@options.threads
@options.device
@options.json_
@options.debug
def command(
    model: str,
    base: str | None,
    max_ppl_increase: float | None,
    max_kld: float | None,
    min_top1: float | None,
    conclusive: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure a model's quality, and pass or fail it against limits.

    MODEL is whatever 'quantize run' reads or writes; it runs block by block and need not fit in memory. A limit that
    is exceeded ends in exit code 5, with --conclusive one that cannot be told apart from the figure in 6.
    """
    limits = {"max_ppl_increase": max_ppl_increase, "max_kld": max_kld, "min_top1": min_top1}
    if base is None and any(limit is not None for limit in limits.values()):
        raise click.UsageError("a limit needs a base to compare with: name it with --base")
    from quantize import api
    from quantize.cli import render

    with render.progress() as progress:
        result = api.evaluate(model, base, progress=progress, **settings)
    render.evaluation(result, as_json)
    result.gate(**limits, conclusive=conclusive)
