"""Speed of the GGML encoders against llama.cpp's `ggml_quantize_chunk`, and whether the bytes are the same.

Both run in this process, in one thread, by turns, on the same weights; the figure of each is the median. Identity is
also checked on unusual blocks, on importance with zeros, and on the weights of a model if one is given.

    python benchmarks/encoders.py --library llama.cpp/build/bin [--types q4_k,q6_k] [--model FOLDER]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
from common import save, show, verdict

from quantize.kernels.cpu import ggml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import ggml_cases as cases

SECONDS = 0.15  # a measurement takes about that long
# Least ratio to llama.cpp: (plain, with importance).
BARS = {
    **dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"), (3.0, 3.0)),
    **dict.fromkeys(("iq4_nl", "iq4_xs"), (4.0, 4.0)),
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), (2.0, 2.0)),
    **dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"), (0.8, 1.0)),
}


def once(encode: Callable[..., Any], name: str, x: Any, weights: Any) -> float:
    """Returns seconds of one call, in time of this thread: what else the machine does counts less so."""
    start = time.thread_time()
    encode(name, x, weights)
    return time.thread_time() - start


def speeds(theirs: cases.Encoder, name: str, weighted: bool, repeats: int) -> tuple[float, float]:
    """Returns million weights per second: ours and theirs."""
    cols = 4096
    x, weights = cases.heavy_tailed(64, cols), cases.importance(cols) if weighted else None
    encoders = (ggml.encode, theirs)
    times: tuple[list[float], list[float]] = ([], [])
    rows = []
    for encode in encoders:  # as many rows as fill the time
        once(encode, name, x[:4], weights)
        rows.append(max(1, min(64, int(4 * SECONDS / max(once(encode, name, x[:4], weights), 1e-6)))))
    for _ in range(repeats):
        for encode, count, taken in zip(encoders, rows, times, strict=True):
            calls = max(1, int(SECONDS / max(once(encode, name, x[:count], weights), 1e-6) / 4))
            taken.append(sum(once(encode, name, x[:count], weights) for _ in range(calls)) / (calls * count))
    return cols / median(times[0]) / 1e6, cols / median(times[1]) / 1e6


def checks(weighted: bool, real: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields the inputs on which the bytes are compared."""
    for cols, seed in ((512, 1), (2048, 2)):
        weights = cases.importance(cols, seed) if weighted else None
        yield cases.heavy_tailed(24, cols, seed), weights
        yield cases.edges(cols), weights
        if weights is not None:
            yield cases.heavy_tailed(24, cols, seed), cases.with_zeros(weights)
            yield cases.edges(cols), cases.with_zeros(weights)
    for x in real:
        yield x, cases.importance(x.shape[1]) if weighted else None


def different(theirs: cases.Encoder, name: str, weighted: bool, real: list[Any]) -> tuple[int, int]:
    """Returns how many blocks differ, and of how many."""
    block, bad, count = ggml.BLOCKS[name], 0, 0
    for x, weights in checks(weighted, real):
        if x.shape[1] % block.weights == 0:
            ours, other = (f(name, x, weights).reshape(-1, block.nbytes) for f in (ggml.encode, theirs))
            bad += int((ours != other).any(1).sum())
            count += len(ours)
    return bad, count


def real_weights(model: Path, limit: int) -> list[Any]:
    """Returns up to `limit` rows of each of a model's matrices of even width, as float32."""
    from safetensors import safe_open

    found: list[Any] = []
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            matrices = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]  # noqa: SIM118
            found.extend(file.get_slice(name)[:limit].float().numpy() for name in matrices)
    return found


def first_use(names: list[str]) -> float:
    """Returns seconds to make the encoders ready, compiled or loaded."""
    start = time.perf_counter()
    ggml.warm(names)
    return time.perf_counter() - start


@click.command()
@click.option("--library", type=click.Path(path_type=Path), default=cases.LLAMA_CPP, help="Folder of libggml-base.so.")
@click.option("--types", default=",".join(ggml.ENCODERS), help="Types, by commas.")
@click.option(
    "--model", type=click.Path(path_type=Path), help="Folder with safetensors whose weights are compared too."
)
@click.option("--rows", default=32, help="Rows of each of the model's matrices.")
@click.option("--repeats", default=7)
def main(library: Path, types: str, model: Path | None, rows: int, repeats: int) -> None:
    """Measures, prints and saves `results/encoders.json`."""
    names = types.split(",")
    ready = first_use(names)
    theirs, real = cases.library(library.absolute() / cases.LIBRARY.name), real_weights(model, rows) if model else []
    results, bars = [], []
    for name, weighted in cases.modes(iter(names)):
        ours, other = speeds(theirs, name, weighted, repeats)
        bad, blocks = different(theirs, name, weighted, real)
        results.append(
            {
                "type": name,
                "weights": "importance" if weighted else "plain",
                "ours, Mw/s": round(ours, 2),
                "llama.cpp, Mw/s": round(other, 2),
                "ratio": round(ours / other, 2),
                "identical": bad == 0,
                "blocks": blocks,
            }
        )
        show(name, results[-1:])
        bar = BARS.get(name, (1.0, 1.0))[weighted]
        bars.append(
            verdict(f"{name}, {'importance' if weighted else 'plain'}: part of {bar}", bar / (ours / other), 1.0)
        )
        bars[-1]["holds"] = bars[-1]["holds"] and bad == 0
    show("Encoders, one thread", results)
    show("Bars", [bar for bar in bars if not bar["holds"]] or [{"bar": "all", "holds": True}])
    if names == list(ggml.ENCODERS):
        print(save("encoders", {"seconds to be ready": round(ready, 2), "encoders": results, "bars": bars}))


if __name__ == "__main__":
    main()
