"""The options that commands share, spelt once, and the peers' spellings of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from quantize.cli.failures import DEBUG, say

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]

# What other tools call our options: their spelling, and ours in order of preference.
PEERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("--q-bits", "--wbits", "--w-bit", "--w-bits", "--nbits", "--weight-bits"), ("--bits",)),
    **dict.fromkeys(("--groupsize", "--q-group-size", "--w-group-size", "--group"), ("--group-size",)),
    **dict.fromkeys(("--quant-method", "--algorithm", "--algo"), ("--method",)),
    **dict.fromkeys(("--output-format", "--export-format", "--to"), ("--format",)),
    **dict.fromkeys(("--ftype", "--quant-type", "--qtype"), ("--type",)),
    **dict.fromkeys(("--outtype", "--torch-dtype"), ("--dtype",)),
    **dict.fromkeys(
        ("--output", "--output-dir", "--output-path", "--out-dir", "--outdir", "--outfile", "--save-dir", "--save-path",
         "--quant-path", "--mlx-path"),
        ("--out",),
    ),
    **dict.fromkeys(
        ("--nsamples", "--n-samples", "--num-samples", "--num-calibration-samples", "--max-calib-samples"),
        ("--calib-samples",),
    ),
    **dict.fromkeys(
        ("--seqlen", "--seq-len", "--max-seq-length", "--max-sequence-length", "--max-calib-seq-len"),
        ("--calib-length", "--context"),
    ),
    **dict.fromkeys(("--calib-data", "--calib-dataset", "--calibration-dataset"), ("--calib",)),
    "--dataset": ("--calib", "--text"),
    **dict.fromkeys(("--ctx", "--ctx-size", "--n-ctx"), ("--context", "--calib-length")),
    "--ppl-stride": ("--stride",),
    **dict.fromkeys(("--file", "--text-file"), ("--text",)),
    **dict.fromkeys(("--reference", "--base-model", "--ref"), ("--base",)),
    **dict.fromkeys(("--nthreads", "--n-threads", "--jobs"), ("--threads",)),
    **dict.fromkeys(("--lora", "--lora-path"), ("--adapter",)),
    **dict.fromkeys(("--output-tensor-type",), ("--output-type",)),
    **dict.fromkeys(("--token-embedding-type",), ("--embedding-type",)),
    **dict.fromkeys(("--tensor-type-file", "--custom-q"), ("--tensor-type",)),
    **dict.fromkeys(("--split-max-size", "--max-shard-size"), ("--split-size",)),
    **dict.fromkeys(("--allow-requantize",), ("--requantize",)),
    **dict.fromkeys(("--vocab-type", "--pre-tokenizer"), ("--pre",)),
    "--symmetric": ("--sym",),
    **dict.fromkeys(("--damp-percent", "--percdamp", "--dampening-frac"), ("--damping",)),
    "--force": ("--overwrite",),
}  # fmt: skip
# Options elsewhere that are our argument MODEL.
_MODEL_OPTIONS = ("--model", "--model-path", "--hf-path", "--model-name-or-path", "--model-id", "--pretrained-model")


class Command(click.Command):
    """A command that understands the peers' spellings, with a hint, and keeps its examples as written."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        if examples:
            lines = [f"  {line}".rstrip() for line in examples.strip().splitlines()]
            kwargs["epilog"] = "\n".join(["\b", "Examples:", *lines])
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses `args` after spelling them our way."""
        return super().parse_args(ctx, self._respelt(args))

    def _respelt(self, args: Sequence[str]) -> list[str]:
        own = {name for option in self.params for name in (*option.opts, *option.secondary_opts)}
        result: list[str] = []
        for position, word in enumerate(args):
            if word == "--":
                return result + list(args[position:])
            name, equals, value = word.partition("=")
            if not name.startswith("--") or name in own:
                result.append(word)
                continue
            dashed = name.replace("_", "-")
            ours = dashed if dashed in own else next((n for n in PEERS.get(dashed, ()) if n in own), None)
            if ours is not None:
                say(f"note: {name} is spelt {ours} here")
                result.append(ours + equals + value)
            elif dashed in _MODEL_OPTIONS and any(isinstance(p, click.Argument) for p in self.params):
                say(f"note: {name} is not needed here: {self.name} MODEL")
                result += [value] if equals else []
            else:
                result.append(word)
        return result


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def byte_count(value: str) -> int:
    """Returns the bytes that `2GB`, `500MB`, `1.5GiB` or a bare number means."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"'{value}' is no size; write 2GB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def share(value: str) -> float:
    """Returns the share that `2%` or `0.02` means; a bare number above 1 may be meant as either and is refused."""
    match = re.fullmatch(r"(\d*\.?\d+)\s*(%?)", value.strip())
    if match is None:
        raise click.BadParameter(f"'{value}' is no share; write 2% or 0.02")
    number = float(match[1])
    if not match[2] and number > 1:
        raise click.BadParameter(f"'{value}' may mean {value}% or {100 * number:g}%; write it with the sign")
    return number / 100 if match[2] else number


def together(*decorators: Decorator[Any]) -> Decorator[Any]:
    """Returns one decorator for several; help shows them in this order."""

    def apply(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def _only_cpu(ctx: click.Context, param: click.Parameter, value: str) -> None:
    if value.lower() != "cpu":
        raise click.BadParameter(f"'{value}' is not supported yet, only cpu is", ctx, param)


model = click.argument("model", required=False)

json_ = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, alone on stdout.")
debug = click.option(DEBUG, is_flag=True, expose_value=False, help="Show tracebacks and the libraries' warnings.")
threads = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N",
    help="Threads; the result does not depend on it.  [default: all]",
)  # fmt: skip
device = click.option(
    "--device", default="cpu", show_default=True, expose_value=False, callback=_only_cpu, help="Where to compute."
)
assume_tied = click.option("--assume-tied", is_flag=True, help="Take the embedding for a head that is missing.")
adapter = click.option(
    "--adapter", "adapters", multiple=True, metavar="DIR[:SCALE]", help="LoRA to merge on read; repeatable."
)

OUTPUT = together(
    click.option("--out", metavar="PATH", help="The output.  [default: a name here, such as MODEL-AWQ]"),
    click.option("--dtype", metavar="f32|f16|bf16", help="What plain tensors become.  [default: as they are]"),
    click.option("--overwrite", is_flag=True, help="Replace an output that exists, once the new one is complete."),
    click.option("--restart", is_flag=True, help="Drop an unfinished run instead of continuing it."),
    click.option("--allow-nan", is_flag=True, help="Let NaN and Inf in weights through."),
)

GRID = together(
    click.option("--method", metavar="NAME", help="How codes are chosen: awq, rtn, ...; see 'quantize list'."),
    click.option("--bits", type=int, metavar="N", help="Bits of a code.  [default: 4]"),
    click.option(
        "--group-size", type=int, metavar="N", help="Inputs that share a scale; -1 for a whole row.  [default: 128]"
    ),
    click.option(
        "--sym/--no-sym",
        "symmetric",
        default=None,
        help="Fix zero points to the middle, or not.  [default: where the format's engines take nothing else]",
    ),
    click.option("--type", metavar="NAME", help="llama.cpp's name of a type or mix, such as Q4_K_M."),
    click.option("--format", metavar="NAME", help="Format of the output.  [default: the method's own]"),
)

GGUF = together(
    click.option(
        "--imatrix", metavar="auto|FILE|none",
        help="Importance for --type: gathered if types need it or --calib says so, a file, none.  [default: auto]",
    ),
    click.option("--pure", is_flag=True, help="Give every tensor the mix's base type."),
    click.option("--output-type", metavar="TYPE", help="GGUF type of the output matrix."),
    click.option("--embedding-type", metavar="TYPE", help="GGUF type of the token embedding."),
    click.option(
        "--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE|FILE",
        help="GGUF types of tensors, as llama.cpp spells them; a file of such lines, or a GGUF file to take them from.",
    ),
)  # fmt: skip

GGUF_OUTPUT = together(
    click.option("--arch", metavar="NAME", help="GGUF's name of the architecture, for a class that is not known."),
    click.option("--pre", metavar="NAME", help="llama.cpp's name of how the tokenizer splits text."),
    click.option("--ollama", is_flag=True, help="Write a Modelfile for Ollama beside the GGUF file."),
    click.option(
        "--split-size", type=byte_count, metavar="SIZE",
        help="Largest weight file, such as 2GB.  [default: 5GB; one file for GGUF]",
    ),
)  # fmt: skip

RULES = together(
    click.option(
        "--set", multiple=True, metavar="PATTERN=SCHEME",
        help="Scheme of the tensors that match; repeatable, first wins.",
    ),
    click.option(
        "--recipe", metavar="FILE", help="YAML file of such rules, after --set; or a GGUF file whose types to take."
    ),
)  # fmt: skip

CALIBRATION_TEXT = together(
    click.option(
        "--calib", multiple=True, metavar="SOURCE",
        help="Calibration text: a file, hub:NAME, self or default; repeatable.  [default: the bundled text]",
    ),
    click.option("--calib-samples", type=int, default=64, show_default=True, metavar="N", help="Rows of text."),
    click.option("--calib-length", type=int, default=512, show_default=True, metavar="N", help="Tokens of a row."),
    click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of every random choice."),
    click.option(
        "--activation-budget", type=byte_count, default="2GiB", show_default=True, metavar="SIZE",
        help="Waiting activations kept in memory; the rest waits on disk.",
    ),
)  # fmt: skip

ROUNDING = together(
    click.option(
        "--damping", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
        help="gptq: share of the Hessian's mean diagonal added to its diagonal.  [default: 0.01]",
    ),
    click.option(
        "--shrinkage", type=click.FloatRange(0, 1), metavar="SHARE",
        help="gptq: how far the Hessian is drawn towards its diagonal; more for little text.  [default: 0.25]",
    ),
    click.option(
        "--act-order", type=click.Choice(["blocks", "columns", "none"]),
        help="gptq: the neediest groups of columns first, the neediest columns first, or none.  [default: columns]",
    ),
    click.option(
        "--descent", type=click.IntRange(min=0), metavar="N",
        help="gptq: rounds of coordinate descent over grids and codes after the feedback.  [default: 2]",
    ),
    click.option("--all-experts", is_flag=True, help="gptq: let every expert see every token of the calibration text."),
)  # fmt: skip

CALIBRATION = together(
    CALIBRATION_TEXT,
    click.option(
        "--statistics", metavar="FILE", help="Reuse what calibration gathered, or save it if there is no such file.",
    ),
)  # fmt: skip

RUN = together(
    model,
    GRID,
    GGUF,
    OUTPUT,
    GGUF_OUTPUT,
    RULES,
    ROUNDING,
    CALIBRATION,
    click.option(
        "--eval", metavar="SOURCE|default|none",
        help="Text to measure the loss on.  [default: the bundled text if the method calibrates, else none]",
    ),
    adapter,
    click.option("--requantize", is_flag=True, help="Allow a source that is quantized already."),
    assume_tied,
    click.option(
        "--fallback/--no-fallback", default=True, show_default=True,
        help="Let a smaller group or no quantization stand in where a shape forbids what was asked.",
    ),
    click.option("--strict", is_flag=True, help="Make every fallback an error; implies --no-fallback."),
    threads,
    device,
    json_,
    debug,
)  # fmt: skip
