"""llama.cpp's named mixes as the decisions of a plan, and the importance that they ask for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize import methods
from quantize.errors import InputError, UsageError
from quantize.formats.base import Checkpoint, Format, Header, NamedView
from quantize.formats.gguf.imatrix import ImportanceMatrix, read_imatrix
from quantize.formats.gguf.mixes import MIXES, Choice, Facts, Mix, choose, lacking_importance
from quantize.formats.gguf.overrides import Override, from_gguf, parse_tensor_types, parse_type, unmatched
from quantize.imatrix import coverage, match
from quantize.kernels.cpu.ggml import USES_IMPORTANCE
from quantize.planning import Decision
from quantize.presets import Choice as Preset
from quantize.schemes import GGMLBlock, Plain, Scheme, parse_scheme
from quantize.settings import Settings

_BY_DTYPE = {torch.float32: MIXES["F32"], torch.float16: MIXES["F16"], torch.bfloat16: MIXES["BF16"]}
_NAMED = 3
_MATRIX = 2
# A GGUF source is refused as a whole unless its rounding again is asked for.
_OWN = "gguf"
AUTO, NONE = "auto", "none"


@dataclass
class Mixing:
    """One mix over one model.

    Attributes:
        mix: The mix.
        decisions: What each tensor gets.
        header: The metadata of the file.
        gathers: Whether text must be passed through the model to learn the importance of its input columns.
        means: Mean square of each input column by tensor, as far as it is known: float32 `[cols]`, or
            `[experts, cols]`.
        save: File for what is gathered, or None.
        notes: What the user should know of the importance, one line each.
    """

    mix: Mix
    decisions: Mapping[str, Decision]
    header: Header
    gathers: bool
    means: Mapping[str, Tensor] = field(default_factory=dict)
    save: Path | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(
        target: Format, preset: Preset | None, view: NamedView, settings: Settings, dtype: torch.dtype | None
    ) -> Mixing:
        """Returns what the settings make of a model under GGUF names.

        Raises:
            QuantizeError: what they ask for cannot be.
        """
        mix = preset.mix if preset is not None and preset.mix is not None else plain_mix(view, dtype)
        asked = str(settings.imatrix or AUTO)
        file = Path(asked).expanduser() if asked not in (AUTO, NONE) else None
        matrix = read_imatrix(file) if file is not None and file.exists() else None
        metadata = view.metadata()
        held: dict[str, Decision] = {}
        if preset is None and not settings.dtype:
            held = {name: Decision(None, "as stored") for name in held_already(view, target)}
        decisions = decide(view, metadata, mix, settings, importance=matrix is not None or file is not None) | held
        # a text that is named shall be used, whether the types need it or would only gain by it; a method that
        # calibrates uses it in its own way
        gains = bool(settings.calib and gaining(decisions)) and not (preset and methods.named(preset.method).calibrates)
        wanted = file is not None or bool(needy(decisions, mix)) or gains
        gathers = matrix is None and asked != NONE and wanted
        if gathers and file is None:
            decisions = decide(view, metadata, mix, settings, importance=True) | held
        result = Mixing(mix, decisions, Header({}), gathers, save=file if gathers else None)
        same = len(held) == len(decisions) and metadata.get("general.file_type")
        options: dict[str, Any] = {"file_type": same.data if same else mix.file_type, "pre": settings.pre}
        schemes = [decision.scheme or view.tensors[name].scheme for name, decision in decisions.items()]
        options["quantized"] = any(not isinstance(scheme, Plain) for scheme in schemes)
        if matrix is not None:
            assert file is not None
            result.means = result.accept(matrix, view)
            options["imatrix"] = (file.name, matrix.datasets[:1], len(result.means), matrix.chunk_count)
        elif gathers:
            sources = settings.calib or ("default",)
            names = [Path(source).name if Path(source).exists() else source for source in sources]
            options["imatrix"] = ("quantize", names[:1], None, settings.calib_samples)
        elif not gathers:
            require_importance(decisions, mix, (), "let it be gathered: --imatrix auto, or name a file")
        header = target.header(view, options)
        result.header = replace(header, notices=(*header.notices, *_partly_taken(settings, view)))
        return result

    def accept(self, matrix: ImportanceMatrix, view: Checkpoint) -> Mapping[str, Tensor]:
        """Returns the importance of each tensor from a matrix, and keeps it.

        Raises:
            InputError: the matrix is of another model, or lacks a tensor whose type needs importance.
        """
        coded = {n: view.tensors[n].shape for n, d in self.decisions.items() if isinstance(d.scheme, GGMLBlock)}
        laid = match(matrix, coded)
        require_importance(self.decisions, self.mix, laid.found, "use a matrix of this model, or another type for them")
        self.means = {
            name: torch.from_numpy(entry.means() if len(coded[name]) > _MATRIX else entry.means()[0])
            for name, entry in laid.found.items()
        }
        self.notes = _notes(laid.missing, matrix)
        return self.means


def _notes(missing: Sequence[str], matrix: ImportanceMatrix) -> tuple[str, ...]:
    """Returns a line on tensors without importance, and one on each stack with experts that no token reached."""
    notes = [f"no importance for {len(missing)} tensors, such as {missing[0]}: rounded without"] if missing else []
    for stack in coverage(matrix):
        if stack.unseen:
            experts = ", ".join(map(str, stack.unseen))
            notes.append(f"{stack.name}: no token reached {len(stack.unseen)} of {stack.experts} experts: {experts}")
    return tuple(notes)


def held_already(view: Checkpoint, target: Format) -> list[str]:
    """Returns the tensors that a conversion leaves as they are: all of a GGUF file that is quantized, and codes of
    other sources that GGUF holds.
    """
    coded = [name for name, info in view.tensors.items() if not isinstance(info.scheme, Plain)]
    if view.format == _OWN:
        return list(view.tensors) if coded else []
    return [name for name in coded if target.reject(view.tensors[name].scheme) is None]


def plain_mix(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Mix:
    """Returns the mix of one float type that a conversion without rounding means.

    Args:
        checkpoint: The source; without `dtype` the type that most of its plain weights have.
        dtype: The type asked for.
    """
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if isinstance(info.scheme, Plain) and len(info.shape) > 1:
            sizes[info.scheme.dtype] = sizes.get(info.scheme.dtype, 0) + info.nbytes
    found = dtype or max(sizes, key=sizes.__getitem__, default=torch.bfloat16)
    return _BY_DTYPE.get(found, MIXES["BF16"])


def read_overrides(settings: Settings) -> list[Override]:
    """Returns the rules in llama.cpp's syntax: files of them, GGUF files whose types are taken over, or rules as such.

    Raises:
        InputError: a file cannot be read.
        UsageError: a rule is none.
    """
    rules: list[Override] = []
    sources = [str(settings.recipe)] if is_gguf(settings.recipe) else []
    for source in (*settings.tensor_types, *sources):
        path = Path(source).expanduser()
        if is_gguf(path):
            from quantize.formats.gguf.container import read_parts

            for part in read_parts(path):
                rules += from_gguf({name: str(stored.scheme) for name, stored in part.tensors.items()})
        elif path.is_file():
            try:
                rules += parse_tensor_types(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{path}: {error}") from error
        else:
            rules += parse_tensor_types(source)
    return rules


def _partly_taken(settings: Settings, view: Checkpoint) -> list[str]:
    """Returns a line on the tensors whose types a GGUF file should have given and does not.

    Raises:
        UsageError: it has none of the model's tensors.
    """
    named = {rule.pattern for rule in read_overrides(settings) if rule.exact}
    lacking = [name for name in view.tensors if name not in named]
    if not named or not lacking:
        return []
    if len(lacking) == len(view.tensors):
        raise UsageError("the GGUF file to take types from has no tensor of this model", "name one of the same model")
    return [
        f"{len(lacking)} tensors such as {lacking[0]} are not in the file whose types are taken: as the mix has them"
    ]


def is_gguf(path: str | Path | None) -> bool:
    """Returns whether a recipe is a GGUF file, whose types are to be taken over."""
    return path is not None and Path(path).suffix == ".gguf"


def decide(
    view: NamedView, header: Mapping[str, Any], mix: Mix, settings: Settings, importance: bool
) -> dict[str, Decision]:
    """Returns what a mix gives each tensor of a model under GGUF names.

    Args:
        view: The model.
        header: Its metadata.
        mix: The mix.
        settings: Overrides of it.
        importance: Whether importance of the input columns will be at hand.

    Raises:
        UsageError: an override matches nothing, or names a type that cannot be.
    """
    rules = read_overrides(settings)
    if (lost := unmatched([rule for rule in rules if not rule.exact], view.tensors)) and rules:
        raise UsageError(f"--tensor-type '{lost[0]}' matches no tensor", f"names look like {next(iter(view.tensors))}")
    choices = choose(
        mix,
        {name: info.shape for name, info in view.tensors.items()},
        facts(header),
        importance=importance,
        pure=settings.pure,
        output=parse_type(settings.output_type) if settings.output_type else None,
        embedding=parse_type(settings.embedding_type) if settings.embedding_type else None,
        overrides=rules,
        blind=frozenset(unread(view, header)),
    )
    return {name: _decision(view, name, choice, settings.requantize) for name, choice in choices.items()}


def _decision(view: NamedView, name: str, choice: Choice, requantize: bool) -> Decision:
    source: Scheme = view.tensors[name].scheme
    if isinstance(source, GGMLBlock) and view.format != _OWN and not requantize:
        return Decision(None, f"{source} in the source: its codes go over as they are")
    if choice.type is not None:
        asked = parse_scheme(choice.wanted) if choice.wanted else None
        return Decision(parse_scheme(choice.type), choice.rule, asked)
    floating = isinstance(source, Plain) and source.dtype.is_floating_point
    if floating and view.required_float(name):
        return Decision(Plain(torch.float32), choice.rule)
    return Decision(None, choice.rule)


def needy(decisions: Mapping[str, Decision], mix: Mix, covered: Collection[str] = ()) -> list[str]:
    """Returns the tensors whose type needs importance and that are not in `covered`."""
    choices = {n: Choice(str(d.scheme) if d.scheme is not None else None, d.rule) for n, d in decisions.items()}
    return lacking_importance(choices, mix, covered)


def gaining(decisions: Mapping[str, Decision]) -> bool:
    """Returns whether any tensor gets a type that weighs errors by importance."""
    return any(isinstance(d.scheme, GGMLBlock) and d.scheme.type in USES_IMPORTANCE for d in decisions.values())


def require_importance(decisions: Mapping[str, Decision], mix: Mix, covered: Collection[str], hint: str) -> None:
    """Refuses types that need importance which is not there.

    Raises:
        InputError: naming tensors.
    """
    if lacking := needy(decisions, mix, covered):
        more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
        names = ", ".join(lacking[:_NAMED])
        raise InputError(f"{decisions[lacking[0]].scheme} needs importance, which is lacking for {names}{more}", hint)


def facts(header: Mapping[str, Any]) -> Facts:
    """Returns what the rules of mixes ask of a model, from its metadata."""
    arch = header["general.architecture"].data

    def number(key: str) -> int:
        value = header.get(f"{arch}.{key}")
        if value is None:
            return 0
        return int(next((n for n in value.data if n), 0) if value.array else value.data)

    heads = number("attention.head_count")
    return Facts(arch, number("block_count"), heads, number("attention.head_count_kv") or heads, number("expert_count"))


def unread(view: Checkpoint, header: Mapping[str, Any]) -> list[str]:
    """Returns the tensors that no text reaches: extra prediction layers, and embeddings of each layer."""
    arch = header["general.architecture"].data
    extra = header.get(f"{arch}.nextn_predict_layers")
    first = facts(header).layers - (int(extra.data) if extra is not None else 0)
    names = [n for n in view.tensors if (m := re.match(r"blk\.(\d+)\.", n)) and int(m[1]) >= first]
    return [*names, *(n for n in view.tensors if n.startswith("per_layer_token_embd"))]
