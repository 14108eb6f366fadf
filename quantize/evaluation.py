"""Perplexity of a model, and how far it is from a base: KL divergence, top-1 agreement, paired difference.

Model and base run block by block up to their heads and wait there; their logits then meet one batch at a time, in full
float32 precision. Intervals are over chunks, not tokens: neighbouring tokens share a document, and treating them as
independent halves the honest interval.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize.calib_data import read_text
from quantize.errors import InconclusiveError, InputError, QualityError, UsageError, unknown_name
from quantize.formats.base import Checkpoint
from quantize.parallel import one_torch_thread
from quantize.progress import Progress, silent
from quantize.ranks import ALONE, Ranks
from quantize.skeleton import Skeleton
from quantize.sweep import Sweep
from quantize.tokenizer import load_tokenizer, require_rows

DEFAULT_TEXT = "default:eval"
_DRAWS = 2000
# Tokens in one forward pass.
_BATCH_TOKENS = 2048
# Characters read for each token wanted: no tokenizer makes longer tokens on average.
_CHARS_PER_TOKEN = 12


@dataclass(frozen=True, slots=True)
class Protocol:
    """What exactly a perplexity is of: numbers under different protocols must never be compared.

    Attributes:
        name: The definition's name.
        context: Tokens in a window.
        stride: Tokens from one window's start to the next.
        scored: Positions of a window whose next token counts: from this one to the last but one.
        bos: "chunk" puts BOS in place of each window's first token if the tokenizer adds BOS; "text" leaves the one
            that the tokenizer puts before the whole text; "none" removes even that.
    """

    name: str
    context: int
    stride: int
    scored: int
    bos: str

    def describe(self) -> str:
        """Returns the definition in words."""
        return (
            f"{self.name}: windows of {self.context} every {self.stride}, scored from position {self.scored}, "
            f"BOS {self.bos}"
        )


# llama.cpp: tools/perplexity. gptq: the datautils of IST-DASLab/gptq. sliding: the transformers documentation.
_DEFINITIONS: dict[str, Callable[[int, int | None], Protocol]] = {
    "llamacpp": lambda n, stride: Protocol("llamacpp", n, stride or n, n // 2, "chunk"),
    "gptq": lambda n, stride: Protocol("gptq", n, stride or n, 0, "text"),
    "sliding": lambda n, stride: Protocol("sliding", n, stride or n // 2, n - (stride or n // 2) - 1, "text"),
}


def protocol(name: str = "llamacpp", context: int = 512, stride: int | None = None) -> Protocol:
    """Returns a definition of perplexity.

    Args:
        name: `llamacpp` (second half of each chunk), `gptq` (all of it) or `sliding` (the last `stride`).
        context: Tokens in a window.
        stride: Tokens between windows' starts; None for the definition's own.

    Raises:
        UsageError: the name is unknown or a number makes no window.
    """
    if name not in _DEFINITIONS:
        raise unknown_name("protocol", name, _DEFINITIONS)
    if context < 8 or (stride is not None and not 0 < stride <= context):
        raise UsageError(f"context {context} with stride {stride} makes no windows", "try --context 512")
    return _DEFINITIONS[name](context, stride)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        model: The evaluated model as the user named it.
        base: The base, or None.
        protocol: The definition, the text's and the token ids' hashes, and the counts.
        chunks: Sums of each chunk: tokens, nll, and against a base base_nll, kld, same_top.
        kld_tokens: KL divergence of every scored token, or empty.
    """

    model: str
    base: str | None
    protocol: Mapping[str, Any]
    chunks: Mapping[str, np.ndarray]
    kld_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood of the scored tokens."""
        return float(np.exp(self.chunks["nll"].sum() / self.chunks["tokens"].sum()))

    @property
    def base_perplexity(self) -> float:
        """The same of the base."""
        return float(np.exp(self.chunks["base_nll"].sum() / self.chunks["tokens"].sum()))

    @property
    def kl_divergence(self) -> float:
        """Mean over tokens of KL(base || model), in nats."""
        return float(self.chunks["kld"].sum() / self.chunks["tokens"].sum())

    @property
    def top1_agreement(self) -> float:
        """Share of tokens at which both find the same token most likely."""
        return float(self.chunks["same_top"].sum() / self.chunks["tokens"].sum())

    def interval(self, figure: Callable[[Mapping[str, np.ndarray]], np.ndarray]) -> dict[str, float]:
        """Returns mean and 95 % interval of a ratio of sums, by a seeded bootstrap over chunks.

        Args:
            figure: Takes the chunk sums, each `[..., chunks]`, and returns the figure of each draw.
        """
        count = len(self.chunks["tokens"])
        mean = float(figure({k: v[None] for k, v in self.chunks.items()})[0])
        if count < 2:
            return {"mean": mean, "low": float("nan"), "high": float("nan")}
        picks = np.random.default_rng(0).integers(0, count, (_DRAWS, count))
        drawn = figure({key: value[picks] for key, value in self.chunks.items()})
        low, high = np.quantile(drawn, (0.025, 0.975))
        return {"mean": mean, "low": float(low), "high": float(high)}

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        value: dict[str, Any] = {
            "model": self.model,
            "protocol": dict(self.protocol),
            "perplexity": self.perplexity,
            "ln_ppl": self.interval(lambda c: c["nll"].sum(-1) / c["tokens"].sum(-1)),
            "chunks": {key: array.tolist() for key, array in self.chunks.items()},
        }
        if self.base is None:
            return value
        quantiles = np.quantile(self.kld_tokens, (0.5, 0.99, 0.999, 1.0))
        value |= {
            "base": {"model": self.base, "perplexity": self.base_perplexity},
            "ln_ppl_difference": self.interval(lambda c: (c["nll"] - c["base_nll"]).sum(-1) / c["tokens"].sum(-1)),
            "kl_divergence": self.interval(lambda c: c["kld"].sum(-1) / c["tokens"].sum(-1)),
            "kld_quantiles": dict(zip(("p50", "p99", "p99.9", "max"), quantiles.tolist(), strict=True)),
            "top1_agreement": self.interval(lambda c: c["same_top"].sum(-1) / c["tokens"].sum(-1)),
        }
        return value

    def gate(
        self,
        max_ppl_increase: float | None = None,
        max_kld: float | None = None,
        min_top1: float | None = None,
        conclusive: bool = False,
    ) -> None:
        """Checks limits.

        Args:
            max_ppl_increase: Largest allowed relative increase of perplexity over the base, 0.02 for 2 %.
            max_kld: Largest allowed mean KL divergence.
            min_top1: Smallest allowed share of equal most likely tokens.
            conclusive: Whether a 95 % interval that reaches across a limit is an error as well.

        Raises:
            UsageError: there is a limit but no base.
            QualityError: a limit is exceeded; the first one is named.
            InconclusiveError: none is, but the text is too short to be sure.
        """
        limits = (max_ppl_increase, max_kld, min_top1)
        if self.base is None:
            if limits != (None, None, None):
                raise UsageError("a limit needs a base to compare with", "name it with --base")
            return
        increase = self.perplexity / self.base_perplexity - 1
        if max_ppl_increase is not None and not increase <= max_ppl_increase:
            raise QualityError(f"{self.model}: perplexity is {100 * increase:.2f} % above the base's, "
                               f"the limit is {100 * max_ppl_increase:.2f} %")  # fmt: skip
        if max_kld is not None and not self.kl_divergence <= max_kld:
            raise QualityError(f"{self.model}: KL divergence {self.kl_divergence:.5f} exceeds the limit {max_kld}")
        if min_top1 is not None and not self.top1_agreement >= min_top1:
            raise QualityError(f"{self.model}: top-1 agreement {self.top1_agreement:.4f} is under the limit {min_top1}")
        if conclusive:
            self._require_conclusive(*limits)

    def _require_conclusive(
        self, max_ppl_increase: float | None, max_kld: float | None, min_top1: float | None
    ) -> None:
        """Refuses limits that lie within the 95 % interval of what was measured."""
        figures = self.to_dict()
        increase = {key: math.expm1(value) for key, value in figures["ln_ppl_difference"].items()}
        for name, limit, interval, worst in (
            ("the increase of perplexity", max_ppl_increase, increase, "high"),
            ("KL divergence", max_kld, figures["kl_divergence"], "high"),
            ("top-1 agreement", min_top1, figures["top1_agreement"], "low"),
        ):
            if limit is None:
                continue
            sure = interval[worst] <= limit if worst == "high" else interval[worst] >= limit
            if not sure:  # also where one chunk gives no interval
                raise InconclusiveError(
                    f"{self.model}: {name} is {interval['mean']:.5f}, but its 95 % interval "
                    f"[{interval['low']:.5f}, {interval['high']:.5f}] reaches across the limit {limit}",
                    "measure on more text: raise --chunks",
                )


def evaluate_checkpoints(
    model: Checkpoint,
    base: Checkpoint | None,
    *,
    names: tuple[str, str | None],
    text: str = DEFAULT_TEXT,
    definition: Protocol | None = None,
    chunks: int | None = None,
    threads: int | None = None,
    assume_tied: bool = False,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Returns the evaluation of `model`, and against `base` if given.

    Args:
        model: The model.
        base: What it is compared with.
        names: How the user called them.
        text: A text source.
        definition: What perplexity means here; llama.cpp's by default.
        chunks: Windows to score at most; None for all.
        threads: Threads; None for all processors.
        assume_tied: Whether a missing head is the embedding.
        progress: Told how far it is.
        ranks: Those that share the windows; all get the same figures.

    Raises:
        InputError: text or a model cannot be used, or the tokenizers differ.
        QualityError: logits are not finite.
    """
    definition = definition or protocol()
    windows, record = _windows(model, text, definition, chunks)
    if base is not None:
        other, _ = _windows(base, text, definition, chunks)
        if other.shape != windows.shape or not bool((other == windows).all()):
            raise InputError(
                f"{names[0]} and {names[1]} split the text into different tokens", "their perplexities do not compare"
            )
    batches = list(torch.split(windows, max(1, _BATCH_TOKENS // definition.context)))
    keep = slice(definition.scored, definition.context - 1)
    mine = range(ranks.index, len(batches), ranks.count)
    scored: dict[int, dict[str, Tensor]] = {}
    with one_torch_thread(), ExitStack() as stack:
        runs = []
        for checkpoint, name in ((model, names[0]), (base, names[1])):
            if checkpoint is None or not mine:
                continue
            skeleton = Skeleton(checkpoint, assume_tied)
            require_rows(windows, skeleton, checkpoint)
            some = [batches[index] for index in mine]
            sweep = stack.enter_context(Sweep(skeleton, checkpoint, some, threads=threads or ranks.threads, keep=keep))
            for index, _ in enumerate(sweep.stages(), 1):
                progress(f"evaluating {name}", index, len(skeleton.blocks))
            runs.append(sweep.logits())
        for done, index in enumerate(mine, 1):
            targets = batches[index][:, 1:][:, keep]
            scored[index] = _score(next(runs[0]), next(runs[1]) if base is not None else None, targets)
            progress("comparing", done, len(mine))
    scored = {index: result for part in ranks.gather(scored) for index, result in part.items()}
    merged = {key: torch.cat([scored[i][key] for i in range(len(batches))]).numpy() for key in scored[0]}
    tokens = np.full(len(windows), windows[:, 1:][:, keep].shape[1])
    sums = {"tokens": tokens, **{key: value.sum(-1) for key, value in merged.items()}}
    if not all(np.isfinite(value).all() for value in sums.values()):
        bad = int(np.flatnonzero(~np.isfinite(sums["nll"]))[0]) if not np.isfinite(sums["nll"]).all() else 0
        raise QualityError(f"{names[0]}: its logits are not finite in chunk {bad}")
    record |= {"scored_tokens": int(tokens.sum()), "torch": torch.__version__}
    return Evaluation(names[0], names[1], record, sums, merged.get("kld", np.zeros((0, 0))).reshape(-1))


def require_windows(checkpoint: Checkpoint, text: str, chunks: int | None) -> None:
    """Checks that a text can be evaluated on with the default definition.

    Raises:
        InputError: the text or the tokenizer cannot be used, or it makes no window.
    """
    _windows(checkpoint, text, protocol(), chunks)


def _score(logits: Tensor, base: Tensor | None, targets: Tensor) -> dict[str, Tensor]:
    """Returns per-token figures `[rows, positions]`, float64, of one batch of logits `[rows, positions, vocab]`."""
    target = targets.unsqueeze(-1)
    log_p = logits.float().log_softmax(-1)
    result = {"nll": -log_p.gather(-1, target).squeeze(-1).double()}
    if base is not None:
        log_q = base.float().log_softmax(-1)
        result["base_nll"] = -log_q.gather(-1, target).squeeze(-1).double()
        result["kld"] = (log_q.exp() * (log_q - log_p)).sum(-1, dtype=torch.float64)
        result["same_top"] = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    return result


def _windows(
    checkpoint: Checkpoint, text: str, definition: Protocol, chunks: int | None
) -> tuple[Tensor, dict[str, Any]]:
    """Returns the windows of token ids, int64 `[chunks, context]`, and the record of what they are."""
    limit = None
    if chunks is not None:
        limit = _CHARS_PER_TOKEN * (definition.context + chunks * definition.stride)
    content = read_text(text, limit=limit)
    tokenizer = load_tokenizer(checkpoint)
    ids = list(tokenizer(content, verbose=False).input_ids)
    adds_bos = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    if definition.bos == "none" and adds_bos:
        ids = ids[1:]
    starts = range(0, len(ids) - definition.context + 1, definition.stride)[:chunks]
    if not len(starts):
        raise InputError(
            f"{text}: {len(ids)} tokens make no window of {definition.context}", "give more text or lower --context"
        )
    windows = torch.tensor([ids[start : start + definition.context] for start in starts])
    if definition.bos == "chunk" and adds_bos:
        windows[:, 0] = tokenizer.bos_token_id
    vocabulary = max(int(i.shape[0]) for i in checkpoint.tensors.values() if len(i.shape) == 2)
    if int(windows.max()) >= vocabulary:
        raise InputError(f"{checkpoint.path}: its tokenizer gives id {int(windows.max())}, beyond the embedding's rows")
    record = {
        **asdict(definition),
        "definition": definition.describe(),
        "text": text,
        "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "ids_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "chunks": len(windows),
        "bos_added": adds_bos,
        "dtype": "float32",
    }
    return windows, record
