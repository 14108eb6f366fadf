"""From tensors under one naming to lazy tensors under the other, by an architecture's rules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantize.errors import InputError
from quantize.formats.gguf.architectures.base import HEAD, Architecture, Form, Rule
from quantize.formats.gguf.architectures.lazy import Lazy
from quantize.formats.gguf.architectures.settings import Settings


@dataclass(frozen=True, slots=True)
class Place:
    """A rule in one block, its patterns filled in.

    Attributes:
        rule: The rule.
        block: The block; 0 for rules outside blocks.
        targets: The names in the file.
        required: Whether the block must have it.
    """

    rule: Rule
    block: int
    targets: tuple[str, ...]
    required: bool


def places(architecture: Architecture, settings: Settings) -> Iterator[Place]:
    """Yields every rule in every block where it may apply: outside blocks first, then block by block."""
    for rule in architecture.rules:
        if not rule.per_block and rule.where(settings, 0):
            yield Place(rule, 0, rule.targets, not rule.group)
    inner = [rule for rule in architecture.rules if rule.per_block]
    for block in range(max([settings.blocks, *(rule.count(settings) for rule in inner)])):
        for rule in inner:
            if block < rule.count(settings) and rule.where(settings, block):
                targets = tuple(target.format(n=block) for target in rule.targets)
                yield Place(rule, block, targets, not rule.group)


def source_names(architecture: Architecture, settings: Settings, form: Form, block: int) -> list[str]:
    """Returns the names of what a form is made of: pattern by pattern, experts in order."""
    stem = architecture.layer if block < settings.layers else architecture.extra_layer or architecture.layer
    names: list[str] = []
    for pattern in form.sources:
        pattern = stem + pattern if pattern.startswith(".") else pattern
        experts = range(settings.experts) if "{e}" in pattern else [0]
        names += [pattern.format(n=block, m=block - settings.layers, e=expert) for expert in experts]
    return names


def forms_of(place: Place, settings: Settings) -> list[Form]:
    """Returns the forms that a model of these settings may have."""
    return [form for form in place.rule.forms if form.where(settings, place.block)]


def count_extra(architecture: Architecture, settings: Settings, names: Mapping[str, object]) -> int:
    """Returns the number of blocks behind the model's own, which predict further tokens, that the file has."""
    if not architecture.extra_layer:
        return 0
    pattern = re.escape(architecture.extra_layer).replace(r"\{m\}", r"(?P<m>\d+)").replace(r"\{n\}", r"(?P<n>\d+)")
    found = [match.groupdict() for name in names if (match := re.match(rf"{pattern}\.", name))]
    numbers = [int(groups["m"]) if "m" in groups else int(groups["n"]) - settings.layers for groups in found]
    return max([number + 1 for number in numbers if number >= 0], default=0)


def forward(architecture: Architecture, settings: Settings, held: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Returns the tensors of a file that is made of a checkpoint's.

    Args:
        architecture: Its declaration.
        settings: The model's settings.
        held: The checkpoint's tensors, under the names that rules have.

    Raises:
        InputError: one is missing, or of a shape that the settings contradict.
    """
    found, missing = dict[str, Lazy](), list[str]()
    listed = list(places(architecture, settings))
    groups = {p.rule.group for p in listed if p.rule.group and _form_of(architecture, settings, p, held)}
    for place in listed:
        names = _form_of(architecture, settings, place, held)
        if names is None:
            if place.required or place.rule.group in groups - {HEAD}:
                missing.append(source_names(architecture, settings, forms_of(place, settings)[0], place.block)[0])
            continue
        form, sources = names
        if absent := [name for name in sources if name not in held]:
            missing += absent
            continue
        made = _turn(settings, form, [held[name] for name in sources], place.targets, sources[0], forward=True)
        found |= zip(place.targets, made, strict=True)
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise InputError(f"{settings.file}: lacks tensor '{missing[0]}'{others}")
    return found


def _form_of(
    architecture: Architecture, settings: Settings, place: Place, held: Mapping[str, Lazy]
) -> tuple[Form, list[str]] | None:
    """Returns the first form whose first tensor is there, and all that it is made of."""
    for form in forms_of(place, settings):
        names = source_names(architecture, settings, form, place.block)
        if names and names[0] in held:
            return form, names
    return None


def backward(architecture: Architecture, settings: Settings, held: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Returns the tensors of a checkpoint that is made of a file's.

    Args:
        architecture: Its declaration.
        settings: The model's settings.
        held: The file's tensors.

    Raises:
        InputError: one is missing, one is too many, or of a shape that the settings contradict.
    """
    found, missing, used = dict[str, Lazy](), list[str](), set[str]()
    listed = list(places(architecture, settings))
    groups = {place.rule.group for place in listed if place.rule.group and place.targets[0] in held}
    for place in listed:
        absent = [name for name in place.targets if name not in held]
        used |= {*place.targets} - {*absent}
        if absent:
            missing += (
                absent if place.required or place.rule.group in groups or len(absent) < len(place.targets) else []
            )
            continue
        form = forms_of(place, settings)[0]
        names = source_names(architecture, settings, form, place.block)
        tensors = [held[name] for name in place.targets]
        made = _turn(settings, form, tensors, tuple(names), place.targets[0], forward=False)
        found |= zip(names, made, strict=True)
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise InputError(f"{settings.file}: lacks tensor '{missing[0]}'{others}")
    if surplus := [name for name in held if name not in used]:
        what = f"no tensor of a model of GGUF architecture '{architecture.name}' with {settings.blocks} blocks"
        raise InputError(f"{settings.file}: '{surplus[0]}' is {what}")
    return found


def _turn(
    settings: Settings, form: Form, tensors: list[Lazy], targets: tuple[str, ...], name: str, *, forward: bool
) -> list[Lazy]:
    """Applies an operation; what its shapes make of no sense is the file's fault."""
    turn = form.operation.forward if forward else form.operation.backward
    try:
        made = list(turn(settings, tensors))
        for tensor in made:
            assert all(size > 0 for size in tensor.shape), tensor.shape
        if len(made) != len(targets):
            raise ValueError(f"makes {len(made)} tensors, not {len(targets)}")
    except (ValueError, IndexError, RuntimeError, AssertionError) as error:
        shape = list(tensors[0].shape)
        reason = str(error).splitlines()[0] if str(error) else "it contradicts the settings"
        raise InputError(f"{settings.file}: '{name}' of shape {shape} does not fit the model: {reason}") from error
    return made
