"""Every decision of a run, made from headers and config before the first weight is read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantize.anatomy import Anatomy
from quantize.errors import InputError, QuantizeError, ResourceError, UsageError
from quantize.formats.base import Checkpoint, Format, Header, Layout, Piece, TensorInfo
from quantize.methods.base import Method
from quantize.recipe import Rule, first_match
from quantize.schemes import AffineInt, Plain, Scheme, Shape

# Where the group size goes when it does not divide every planned width.
_SMALLER_GROUPS = (128, 64, 32)
SHARD_BYTES = 5_000_000_000
# Interpreter, torch and transformers, measured.
_BASE_BYTES = 450 * 2**20
_SLACK_BYTES = 64 * 2**20
# Times that a block's weights are in memory as float32: as stored, and changed by a method.
_COPIES = 2.0
# Experts stored one by one: as stored, stacked as the model wants them, and on the way there (gate and up twice).
_STACKED_COPIES = 8 / 3
_EXPERT = re.compile(r"\bexperts\.\d+\.")
# A run of rows on its way through an encoder: as stored, as float32, as blocks.
_RUN_BYTES = 24 * 2**20

_NO_HEADER = Header({})


@dataclass(frozen=True, slots=True)
class Entry:
    """What happens to one tensor.

    Attributes:
        name: Stored name.
        shape: Logical shape.
        source: The scheme that it is stored in.
        scheme: The scheme that it gets.
        rule: The named rule that says so.
        asked: The scheme that was asked for, where the shape or the format forbids it; None where it got that.
    """

    name: str
    shape: Shape
    source: Scheme
    scheme: Scheme
    rule: str
    asked: Scheme | None = None

    @property
    def fallback(self) -> bool:
        """Whether something else was asked for."""
        return self.asked is not None

    @property
    def quantized(self) -> bool:
        """Whether it ends on a grid."""
        return not isinstance(self.scheme, Plain)

    @property
    def copied(self) -> bool:
        """Whether its stored codes go over as they are."""
        return self.scheme == self.source

    @property
    def count(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions of a run.

    Attributes:
        format: Where the output goes.
        method: How points are chosen; None for a plain conversion.
        entries: One for each stored tensor, in file order.
        dropped: Stored tensors left out, with the rule.
        files: Arrays of each output file, in order, by file name.
        header: What the headers of the files say beside the arrays.
        notices: What the user should know, one line each.
        peak_bytes: Estimated peak of anonymous memory.
        free_bytes: Free disk space at the output.
        source: Where the source lies.
        out: The output.
        source_bytes: Bytes of all source arrays.
        refusal: What a run would be refused with although the plan stands: an output that exists, a full disk.
    """

    format: Format
    method: Method | None
    entries: tuple[Entry, ...]
    dropped: Mapping[str, str]
    files: Mapping[str, tuple[Piece, ...]]
    header: Mapping[str, Any]
    notices: tuple[str, ...]
    peak_bytes: int
    free_bytes: int
    source: Path
    out: Path
    source_bytes: int
    refusal: QuantizeError | None = None

    @property
    def quantized(self) -> tuple[Entry, ...]:
        """The entries that end on a grid."""
        return tuple(entry for entry in self.entries if entry.quantized)

    @property
    def fallbacks(self) -> tuple[Entry, ...]:
        """The entries that got something else than asked for."""
        return tuple(entry for entry in self.entries if entry.fallback)

    @property
    def fallback_share(self) -> float:
        """Share of the weights that were to lie on a grid and got something else than asked for."""
        substituted = sum(entry.count for entry in self.fallbacks)
        asked = sum(entry.count for entry in self.entries if entry.quantized or entry.fallback)
        return substituted / max(1, asked)

    @property
    def output_bytes(self) -> int:
        """Bytes of all output arrays."""
        return sum(piece.nbytes for pieces in self.files.values() for piece in pieces)

    @property
    def layouts(self) -> dict[str, Layout]:
        """What lies where in each output file."""
        return dict(self.format.layouts(self.files, self.header))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over the whole model."""
        return self.output_bytes * 8 / max(1, sum(entry.count for entry in self.entries))

    @property
    def planned_bits_per_weight(self) -> float:
        """Bits per weight over the whole model if every tensor got what was asked for."""
        bits = self.output_bytes * 8.0
        for entry in self.fallbacks:
            assert entry.asked is not None
            # the scales of a group that does not divide the width are counted in parts
            lost = entry.scheme.bits_per_weight(entry.shape) - entry.asked.bits_per_weight(entry.shape)
            bits -= entry.count * lost
        return bits / max(1, sum(entry.count for entry in self.entries))

    @property
    def linear_bits_per_weight(self) -> float:
        """Stored bits per weight over the quantized tensors only."""
        weights = sum(entry.count for entry in self.quantized)
        bits = sum(entry.count * entry.scheme.bits_per_weight(entry.shape) for entry in self.quantized)
        return bits / max(1, weights)


@dataclass(frozen=True, slots=True)
class Decision:
    """What an allocation gives one tensor.

    Attributes:
        scheme: Its grid or plain type; None to leave it as it is stored.
        rule: Why, in a few words.
        asked: What it would have got if its shape allowed it, where that differs.
    """

    scheme: Scheme | None
    rule: str
    asked: Scheme | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What a plan is asked for.

    Attributes:
        scheme: The grid of the quantizable linears of the blocks; None for a plain conversion.
        method: How points are chosen; None for a plain conversion.
        format: Where the output goes.
        rules: The recipe; the first match wins over `scheme` and `decisions`.
        decisions: What a named mix gives each tensor, in place of `scheme`.
        header: What the headers of the output's files say beside the arrays.
        dtype: What plain floating tensors become; None to keep them as stored.
        fallback: Whether a smaller group or an unquantized tensor may stand in for what was asked.
        samples: Rows of calibration text.
        length: Tokens per row.
        threads: Threads of the run, for the memory estimate.
        activation_budget: Bytes of waiting activations kept in memory.
        shard_bytes: The largest weight file, in bytes, as far as tensors allow.
        gathers: Whether text passes through the model for the mean squares of its inputs alone.
    """

    scheme: Scheme | None
    method: Method | None
    format: Format
    rules: Sequence[Rule] = ()
    decisions: Mapping[str, Decision] | None = None
    header: Header = _NO_HEADER
    dtype: torch.dtype | None = None
    fallback: bool = True
    samples: int = 0
    length: int = 0
    threads: int = 1
    activation_budget: int = 2**31
    shard_bytes: int = SHARD_BYTES
    gathers: bool = False


def make_plan(checkpoint: Checkpoint, anatomy: Anatomy, request: Request, out: Path) -> Plan:
    """Returns the plan of a run.

    Args:
        checkpoint: The model under the names of the output's format.
        anatomy: Its parts, by the same names.
        request: What is asked for.
        out: The output.

    Raises:
        UsageError: a rule matches nothing, a scheme cannot be held or chosen, or a fallback is needed and refused.
        InputError: a stored tensor has no rule, or no tensor is left to quantize.
    """
    request, notices = _with_group(checkpoint, anatomy, request)
    entries = _entries(checkpoint, anatomy, request)
    _refuse(entries, request)
    schemes = {entry.name: entry.scheme for entry in entries}
    request = replace(request, format=request.format.settled(schemes))
    notices += [*_engine_notices(entries, request.format), *request.format.notices(schemes)]
    notices += _text_notices(entries, request)
    files = _files(entries, request, out.name)
    free = shutil.disk_usage(_existing(out)).free
    plan = Plan(
        format=request.format,
        method=request.method,
        entries=entries,
        dropped=dict(checkpoint.dropped),
        files=files,
        header=request.header.values,
        notices=(*notices, *request.header.notices),
        peak_bytes=0,
        free_bytes=free,
        source=checkpoint.path,
        out=out,
        source_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
    )
    return replace(plan, peak_bytes=_peak(plan, checkpoint, anatomy, request))


def require_space(plan: Plan, already: int = 0) -> None:
    """Refuses a run whose output does not fit on the disk.

    Args:
        plan: The plan.
        already: Bytes that an interrupted run has reserved.

    Raises:
        ResourceError: too little is free.
    """
    need = plan.output_bytes - already
    if need > plan.free_bytes:
        raise ResourceError(
            f"the output needs {need / 1e9:.2f} GB, {plan.free_bytes / 1e9:.2f} GB are free",
            "free some space or write elsewhere with --out",
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _with_group(checkpoint: Checkpoint, anatomy: Anatomy, request: Request) -> tuple[Request, list[str]]:
    """Lowers the group size of the whole file where the format has only one and it does not divide every width."""
    scheme = request.scheme
    if not isinstance(scheme, AffineInt) or scheme.group_size == -1 or not request.format.one_group:
        return request, []
    widths: dict[int, str] = {}
    for name in anatomy.linears:
        shape = checkpoint.tensors[name].shape
        if len(shape) == 2 and first_match(request.rules, anatomy.aliases(name)) is None:
            widths.setdefault(shape[-1], name)
    bad = [width for width in widths if width % scheme.group_size]
    if not bad:
        return request, []
    # What no smaller group divides either is kept, and must not lower the group of everything else.
    smallest = min(_SMALLER_GROUPS[-1], scheme.group_size)
    fitting = [width for width in widths if width % smallest == 0]
    choices = [g for g in (scheme.group_size, *_SMALLER_GROUPS) if g <= scheme.group_size]
    group = next((g for g in choices if not any(width % g for width in fitting)), smallest)
    first = next((width for width in bad if width in fitting), bad[0])
    reason = f"{scheme.group_size} does not divide the width {first} of {widths[first]}"
    if not request.fallback:
        smaller = f"say --group-size {group}" if group < scheme.group_size else "keep it by a rule"
        raise UsageError(f"group size {reason}", f"{smaller}, or allow fallbacks")
    if group == scheme.group_size:
        return request, []
    lowered = replace(scheme, group_size=group)
    return replace(request, scheme=lowered), [f"group size {group} for the whole file: {reason}"]


def _entries(checkpoint: Checkpoint, anatomy: Anatomy, request: Request) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    used: set[int] = set()
    ends = frozenset(anatomy.ends if request.format.ends else ())
    linears = frozenset(anatomy.linears) | ends
    for info in checkpoint.tensors.values():
        names = anatomy.aliases(info.name)
        index = first_match(request.rules, names)
        used.update(i for i, rule in enumerate(request.rules) if rule.matches(names))
        if index is not None:
            entries.append(_by_rule(info, request.rules[index], anatomy, info.name in linears, request))
        elif request.decisions is not None:
            entries.append(_decided(info, request.decisions[info.name], request))
        elif info.name in linears and request.scheme is not None:
            what = "embedding or head" if info.name in ends else "linear of a block"
            entries.append(_fit(info, request.scheme, what, request))
        else:
            entries.append(_kept(info, anatomy.why_kept(info.name), request))
    unmatched = [rule for i, rule in enumerate(request.rules) if i not in used]
    if unmatched:
        rule = unmatched[0]
        example = next(iter((*anatomy.linears, *checkpoint.tensors))).removesuffix(".weight")
        raise UsageError(f"{rule.origin}: pattern '{rule.pattern}' matches no tensor", f"names look like {example}")
    return tuple(entries)


def _decided(info: TensorInfo, decision: Decision, request: Request) -> Entry:
    """Returns the entry of a tensor as a mix has it."""
    if decision.asked is not None and not request.fallback:
        raise UsageError(
            f"{info.name} cannot be {decision.asked}: {decision.asked.reject(info.shape)}",
            f"allow {decision.scheme or 'it to be kept'} to stand in, or choose its type with --set",
        )
    scheme = info.scheme if decision.scheme is None else decision.scheme
    return Entry(info.name, info.shape, info.scheme, scheme, decision.rule, decision.asked)


def _by_rule(info: TensorInfo, rule: Rule, anatomy: Anatomy, linear: bool, request: Request) -> Entry:
    origin = f"{rule.origin}: {rule.pattern}"
    if rule.scheme is None:
        return _kept(info, origin, replace(request, dtype=None))
    if rule.wide and request.decisions is not None and (why := request.format.refuse_tensor(info.name, info.shape)):
        # a pattern over a whole block does not mean its norms
        return _decided(info, replace(request.decisions[info.name], rule=f"{origin} asks for more, but {why}"), request)
    if isinstance(rule.scheme, Plain):
        if not rule.scheme.holds_weights:
            raise UsageError(f"{origin}: {rule.scheme} cannot hold weights", "choose f32, f16, bf16 or keep")
        return _kept(info, origin, replace(request, dtype=rule.scheme.dtype))
    if not linear:
        if rule.wide:
            anatomy.why_kept(info.name)  # a pattern must not hide a tensor that nobody knows
            return _kept(info, f"{origin} asks for more, but it is no linear of a block", request)
        raise UsageError(f"{origin}: {info.name} is no linear of a block", "only those can be quantized")
    return _fit(info, rule.scheme, origin, request)


def _fit(info: TensorInfo, scheme: Scheme, rule: str, request: Request) -> Entry:
    """Returns the entry of a tensor that shall lie on `scheme`, or on what stands in where it cannot."""
    stored = info.scheme.dtype if isinstance(info.scheme, Plain) else torch.bfloat16
    scheme = request.format.adapted(scheme, request.dtype or stored)
    refused = request.format.refuse_tensor(info.name, info.shape)
    reason = scheme.reject(info.shape) or refused
    if reason is None:
        return Entry(info.name, info.shape, info.scheme, scheme, rule)
    if not request.fallback:
        raise UsageError(f"{info.name} cannot be {scheme}: {reason}", "allow fallbacks, or keep it by a rule")
    other = None if refused else request.format.stand_in(scheme, info.shape)
    if other is not None:
        return Entry(info.name, info.shape, info.scheme, other, f"{rule}; {other} because {reason}", scheme)
    return replace(_kept(info, f"kept: {reason}", request), asked=scheme)


def _kept(info: TensorInfo, rule: str, request: Request) -> Entry:
    """Returns the entry of a tensor that stays off the grid: as stored, or cast where the run asks for a dtype."""
    if isinstance(info.scheme, Plain):
        floating = info.scheme.dtype.is_floating_point
        scheme: Scheme = Plain(request.dtype) if request.dtype is not None and floating else info.scheme
    elif request.dtype is None and request.format.reject(info.scheme) is None and request.decisions is not None:
        scheme = info.scheme  # the format holds its codes as they are
    else:
        scheme = Plain(request.dtype or torch.bfloat16)
    return Entry(info.name, info.shape, info.scheme, scheme, rule)


def _refuse(entries: Sequence[Entry], request: Request) -> None:
    """Refuses schemes that format or method cannot do, and plans that quantize nothing."""
    for entry in entries:
        if not entry.quantized:
            continue
        reason = request.format.reject(entry.scheme)
        if reason is None and request.method is not None:
            reason = request.method.reject(entry.scheme)
        if reason is not None:
            raise UsageError(f"{entry.name} cannot be {entry.scheme}: {reason}", "see 'quantize list'")
    if request.scheme is not None and not any(entry.quantized for entry in entries):
        raise InputError("no tensor of this model can be quantized as asked", "see 'quantize run --dry-run'")
    groups = {e.scheme.group_size for e in entries if isinstance(e.scheme, AffineInt)}
    if request.format.one_group and len(groups) > 1:
        raise UsageError(
            f"format {request.format.name} has one group size for the whole file, not {sorted(groups)}",
            "give all rules the same group size",
        )


def _text_notices(entries: Sequence[Entry], request: Request) -> list[str]:
    """Returns a line on calibration text that is short for the widest matrix."""
    wanted = request.method.tokens_per_column if request.method is not None else 0
    width = max((entry.shape[-1] for entry in entries if entry.quantized and not entry.copied), default=0)
    tokens = request.samples * request.length
    if tokens >= wanted * width:
        return []
    assert request.method is not None
    rows = -(-wanted * width // request.length)
    return [
        f"{tokens} tokens of calibration text are few for inputs of {width} channels: {request.method.name} trusts"
        f" them less; --calib-samples {rows} would be enough"
    ]


def _engine_notices(entries: Sequence[Entry], target: Format) -> list[str]:
    """Returns a notice for each kind of fused linears that would end half quantized."""
    quantized = {entry.name for entry in entries if entry.quantized}
    mixed = [
        group
        for group in target.bound_together([entry.name for entry in entries])
        if len({name in quantized for name in group}) > 1
    ]
    if not mixed:
        return []
    return [f"vLLM fuses {' and '.join(mixed[0])} and wants them alike ({len(mixed)} such groups)"]


def _files(entries: Sequence[Entry], request: Request, out: str) -> dict[str, tuple[Piece, ...]]:
    """Returns the arrays of each weight file; tensors stay in order and whole."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for entry in entries:
        pieces = request.format.pieces(entry.name, entry.shape, entry.scheme)
        nbytes = sum(piece.nbytes for piece in pieces)
        if size and size + nbytes > request.shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += pieces
        size += nbytes
    names = request.format.file_names(out, len(shards))
    return {name: tuple(shard) for name, shard in zip(names, shards, strict=True)}


def _peak(plan: Plan, checkpoint: Checkpoint, anatomy: Anatomy, request: Request) -> int:
    """Returns the estimated peak of anonymous memory, in bytes."""
    calibrates = request.gathers or (request.method is not None and request.method.calibrates)
    if calibrates:
        return sweep_peak(checkpoint, anatomy, [entry.name for entry in plan.quantized], request)
    if request.format.by_rows:
        return _BASE_BYTES + (request.threads + 2) * _RUN_BYTES
    largest = max((entry.count for entry in plan.quantized), default=0)
    return _BASE_BYTES + 10 * largest + _SLACK_BYTES


def sweep_peak(checkpoint: Checkpoint, anatomy: Anatomy, watched: Collection[str], request: Request) -> int:
    """Returns the estimated peak of anonymous memory while text passes through a model, in bytes.

    Args:
        checkpoint: The model under the names that `anatomy` has.
        anatomy: Its parts.
        watched: The tensors whose inputs are looked at.
        request: Text, threads, and what is gathered.
    """
    held: dict[str, float] = {}
    inputs: dict[str, dict[tuple[str, int], int]] = {}
    chosen = frozenset(watched)
    for name, info in checkpoint.tensors.items():
        block = anatomy.block_of(name)
        if block is None:
            continue
        copies = _STACKED_COPIES if any(map(_EXPERT.search, anatomy.aliases(name))) else _COPIES
        held[block] = held.get(block, 0) + copies * 4 * int(torch.Size(info.shape).numel())
        if name in chosen:
            # matrices of one module often share an input (q, k and v; gate and up), those of a stack never do
            module = name.removesuffix(".weight").rpartition(".")[0]
            inputs.setdefault(block, {})[module, info.shape[-1]] = int(torch.Size(info.shape[:-2]).numel())
    sizes = (sum(4 * count * width * width for (_, width), count in each.items()) for each in inputs.values())
    hessians = 0 if request.gathers else max(sizes, default=0)
    widest = max((width for each in inputs.values() for _, width in each), default=0)
    text = checkpoint.config.get("text_config") or checkpoint.config
    hidden: int = text.get("hidden_size", widest)
    waiting = min(request.activation_budget, 4 * hidden * request.samples * request.length)
    passing = request.threads * 4 * widest * 6 * max(request.length, 2048)
    weights = int(max(held.values(), default=0))
    return _BASE_BYTES + weights + (request.threads + 1) * hessians + waiting + passing + _SLACK_BYTES


def describe(plan: Plan) -> dict[str, Any]:
    """Returns the plan as plain values, for JSON and tables."""
    refusal = plan.refusal
    return {
        "source": str(plan.source),
        "out": str(plan.out),
        "format": plan.format.name,
        "method": plan.method.name if plan.method else None,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "planned_bits_per_weight": round(plan.planned_bits_per_weight, 4),
        "linear_bits_per_weight": round(plan.linear_bits_per_weight, 4),
        "fallback_share": round(plan.fallback_share, 4),
        "peak_bytes": plan.peak_bytes,
        "free_bytes": plan.free_bytes,
        "notices": list(plan.notices),
        "refusal": {"message": refusal.message, "exit_code": refusal.exit_code} if refusal else None,
        "dropped": dict(plan.dropped),
        "tensors": [
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "from": str(entry.source),
                "to": str(entry.scheme),
                "rule": entry.rule,
                "fallback": entry.fallback,
            }
            for entry in plan.entries
        ],
    }
