"""What an architecture's declaration is made of.

An architecture is a list of rules, each from tensors of a transformers checkpoint to tensors of a GGUF file and
back, and a list of fields, each from keys of config.json to keys of the metadata and back. Patterns hold `{n}` for
the block's number, `{e}` for each expert's; a source pattern that starts with a dot continues the name of the block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from quantize.formats.base import Observed
from quantize.formats.gguf.architectures.operations import GATE_UP, SAME, STACK, Operation
from quantize.formats.gguf.architectures.rope import Rope, parse_rope, read_rope, rope_tensors, write_rope
from quantize.formats.gguf.architectures.settings import (
    CONTEXT,
    FFN,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    KV_HEADS,
    RMS,
    Keys,
    Settings,
)
from quantize.formats.gguf.metadata import Value, u32
from quantize.schemes import Shape

Where = Callable[[Settings, int], bool]


class TwoWay(Protocol):
    """A setting, or several, that both namings hold."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns the metadata that states it, by key after the architecture's name."""

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns the config that states it."""


def always(settings: Settings, block: int) -> bool:
    """Everywhere."""
    return True


def all_blocks(settings: Settings) -> int:
    """Returns the number of all blocks."""
    return settings.blocks


@dataclass(frozen=True, slots=True)
class Form:
    """One way in which checkpoints store what a rule is about.

    Attributes:
        sources: Patterns of the stored names.
        operation: What makes the rule's targets of them.
        where: Models that may have this form; nothing else tells two forms with the same names apart.
    """

    sources: tuple[str, ...]
    operation: Operation = SAME
    where: Where = always


@dataclass(frozen=True, slots=True)
class Rule:
    """From tensors of a checkpoint to tensors of a file.

    Attributes:
        targets: Patterns of the names in the file.
        forms: The ways in which checkpoints store it; the first is what is made of a GGUF file.
        where: The blocks that have it.
        group: Empty when it must be there; else the rules of a group are in all blocks or none. A group called
            as a flag of config.json states that flag.
        count: How many blocks there are to look at.
    """

    targets: tuple[str, ...]
    forms: tuple[Form, ...]
    where: Where = always
    group: str = ""
    count: Callable[[Settings], int] = all_blocks

    @property
    def per_block(self) -> bool:
        """Whether every block has it."""
        return "{n}" in self.targets[0]


def trunk(settings: Settings, block: int) -> bool:
    """In blocks of the model proper."""
    return block < settings.layers


def extra(settings: Settings, block: int) -> bool:
    """In blocks that predict further tokens."""
    return block >= settings.layers


def both(*wheres: Where) -> Where:
    """Returns the blocks that are in all of these."""
    return lambda settings, block: all(where(settings, block) for where in wheres)


def without(where: Where) -> Where:
    """Returns the other blocks."""
    return lambda settings, block: not where(settings, block)


def weight(target: str, source: str, operation: Operation = SAME, where: Where = always) -> Rule:
    """Returns the rule of a module's weight; names are of modules."""
    return Rule((f"{target}.weight",), (Form((f"{source}.weight",), operation),), where)


def bias(target: str, source: str, operation: Operation = SAME, where: Where = always, group: str = "") -> Rule:
    """Returns the rule of a module's bias; names are of modules."""
    return Rule((f"{target}.bias",), (Form((f"{source}.bias",), operation),), where, group)


def block(
    target: str, source: str, operation: Operation = SAME, where: Where = always, biased: str | bool = False
) -> tuple[Rule, ...]:
    """Returns the rules of a module of every block.

    Args:
        target: Its name in the file after the block's number.
        source: Its name in the checkpoint after the block's.
        operation: What is done to it, weight and bias alike.
        where: The blocks that have it.
        biased: Whether it has a bias, or the config's flag that says so.
    """
    target, source = f"blk.{{n}}.{target}", f".{source}"
    rules: tuple[Rule, ...] = (weight(target, source, operation, where),)
    if biased:
        rules += (bias(target, source, operation, where, biased if isinstance(biased, str) else ""),)
    return rules


def outer(embedding: str, norm: str, head: str = "lm_head", operation: Operation = SAME) -> tuple[Rule, ...]:
    """Returns the rules of embedding, last norm and head, from the names of the checkpoint's modules."""
    return (
        weight("token_embd", embedding),
        weight("output_norm", norm, operation),
        Rule(("output.weight",), (Form((f"{head}.weight",)),), group=HEAD),
    )


#: The group of the head, which is there when it is not the embedding.
HEAD = "the head"


def routed(
    source: str,
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    where: Where = always,
    stacked: str | None = None,
) -> tuple[Rule, ...]:
    """Returns the rules of routed experts, stored one by one or stacked with gate over up.

    Args:
        source: What holds the experts, after the block's name.
        names: The matrices of an expert: gate, up, down.
        where: The blocks that have them.
        stacked: What holds the stacks; `source` when None.
    """
    gate, up, down = (f".{source}.{{e}}.{name}.weight" for name in names)
    both_at_once, lowered = (f".{stacked or source}.{name}" for name in ("gate_up_proj", "down_proj"))
    return (
        Rule(
            ("blk.{n}.ffn_gate_exps.weight", "blk.{n}.ffn_up_exps.weight"),
            (Form((gate, up), _STACK_BOTH), Form((both_at_once,), GATE_UP)),
            where,
        ),
        Rule(("blk.{n}.ffn_down_exps.weight",), (Form((down,), STACK), Form((lowered,))), where),
    )


def _stack_both(settings: Settings, tensors: Sequence[Any]) -> Sequence[Any]:
    middle = len(tensors) // 2
    return [STACK.forward(settings, tensors[:middle])[0], STACK.forward(settings, tensors[middle:])[0]]


def _unstack_both(settings: Settings, tensors: Sequence[Any]) -> Sequence[Any]:
    return [*STACK.backward(settings, tensors[:1]), *STACK.backward(settings, tensors[1:])]


_STACK_BOTH = Operation(_stack_both, _unstack_both)


def nothing(settings: Settings) -> dict[str, Value]:
    """Returns no further metadata."""
    return {}


def nothing_back(keys: Keys, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns no further config."""
    return {}


def any_settings(settings: Settings) -> None:
    """Refuses nothing."""


def whole_head(settings: Settings, rope: Rope) -> int:
    """Returns the part of a head that turns: `partial` of it, all where nothing is said."""
    return int(settings.head_dim * (1.0 if rope.partial is None else rope.partial))


@dataclass(frozen=True)
class Architecture:
    """How one architecture of GGUF maps to transformers.

    Attributes:
        name: What the file calls it.
        model_type: Its `model_type` in config.json.
        model_class: Its class for causal language modelling, which is written back.
        rules: Its tensors.
        fields: Its settings.
        layer: What checkpoints call block `{n}`.
        extra_layer: What they call block `{m}` of those that predict further tokens; that of a block when empty.
        classes: Further classes that are the same model.
        model_types: Further model types that are the same model.
        prefix: What names may lack in front, or have.
        rotated: How much of a head turns, or None without rotary positions.
        more: Metadata that no field states.
        back: Config that no field states, from metadata and the shapes of the file's tensors.
        rope: The metadata of rotary positions.
        parse_rope: The config of rotary positions.
        tensors: Tensors that are computed, by name.
        check: Refuses settings that llama.cpp's loader cannot follow.
        drops: Stored names (regular expressions) that are left out, each with the rule that says so.
        head_required: Whether llama.cpp wants a head where the embedding serves as one.
        head_tied: Whether it has no place for a head that is not the embedding.
        claims: Whether a file of this name is this model, where several go by the name.
        fed: Where a text shows what a tensor of GGUF's is multiplied with, where no stored tensor has its input: what
            follows the block in the name of a stored one, and of what it gives the channels.
    """

    name: str
    model_type: str
    model_class: str
    rules: tuple[Rule, ...]
    fields: tuple[TwoWay, ...]
    layer: str = "model.layers.{n}"
    extra_layer: str = ""
    classes: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    prefix: str = "model."
    rotated: Callable[[Settings, Rope], int] | None = whole_head
    more: Callable[[Settings], dict[str, Value]] = nothing
    back: Callable[[Keys, Mapping[str, Shape]], dict[str, Any]] = nothing_back
    rope: Callable[[Settings, Rope], dict[str, Value]] = write_rope
    parse_rope: Callable[[Keys, int, int, Mapping[str, Sequence[float]]], dict[str, Any]] = parse_rope
    tensors: Callable[[Settings], dict[str, Tensor]] | None = None
    check: Callable[[Settings], None] = any_settings
    drops: Mapping[str, str] = field(default_factory=dict)
    head_required: bool = False
    head_tied: bool = False
    claims: Callable[[Keys], bool] = lambda keys: True
    fed: Callable[[Settings, str], Observed | None] = lambda settings, name: None

    def observed(self, settings: Settings, name: str) -> Observed | None:
        """Returns where a text shows what a tensor is multiplied with, where no stored tensor has its input."""
        block = re.match(r"blk\.(\d+)\.", name)
        found = None if block is None else self.fed(settings, name)
        if found is None or block is None:
            return None
        return replace(found, names=tuple(self.layer.format(n=block[1]) + end for end in found.names))

    def metadata(self, settings: Settings) -> dict[str, Value]:
        """Returns the metadata under the architecture's name, without that name.

        Raises:
            InputError: config.json lacks a setting, or says what llama.cpp cannot follow.
        """
        self.check(settings)
        found: dict[str, Value] = {"block_count": u32(settings.blocks)}
        if settings.mtp:
            found["nextn_predict_layers"] = u32(settings.mtp)
        for setting in self.fields:
            found |= setting.write(settings)
        if self.rotated is not None:
            rope = read_rope(settings)
            found |= self.rope(settings, rope)
            found["rope.dimension_count"] = u32(self.rotated(settings, rope))
        return found | self.more(settings)

    def made(self, settings: Settings) -> dict[str, Tensor]:
        """Returns the tensors that no checkpoint stores, float32."""
        if self.tensors is not None:
            return self.tensors(settings)
        if self.rotated is None:
            return {}
        rope = read_rope(settings)
        return rope_tensors(settings, rope, self.rotated(settings, rope))

    def config(self, keys: Keys, shapes: Mapping[str, Shape], factors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """Returns the transformers config that metadata states.

        Args:
            keys: The metadata.
            shapes: The shapes of the file's tensors, by name in the file.
            factors: The values of its tensors of rotary factors.

        Raises:
            InputError: a key is missing or states what no config does.
        """
        config: dict[str, Any] = {"architectures": [self.model_class], "model_type": self.model_type}
        config["num_hidden_layers"] = keys.whole("block_count") - keys.whole("nextn_predict_layers", 0)
        for setting in self.fields:
            config |= setting.read(keys)
        if self.rotated is not None:
            size = config.get("head_dim") or config["hidden_size"] // max(config["num_attention_heads"], 1)
            rotated = keys.whole("rope.dimension_count", size)
            config |= self.parse_rope(keys, rotated, keys.whole(CONTEXT.key), factors)
            if rotated != size:
                config["partial_rotary_factor"] = rotated / size
                config["rope_parameters"]["partial_rotary_factor"] = rotated / size
        return config | self.back(keys, shapes)


#: The settings of nearly every decoder.
DECODER: tuple[TwoWay, ...] = (CONTEXT, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_SIZE, RMS)

_PROJECTIONS = (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_output", "o_proj"))


def attention(
    biased: str | bool = False,
    operations: Mapping[str, Operation] | None = None,
    where: Where = always,
    biased_output: str | bool | None = None,
) -> tuple[Rule, ...]:
    """Returns the rules of the four projections of attention, and of the biases of those that have any."""
    made = operations or {}
    last = biased if biased_output is None else biased_output
    return tuple(
        rule
        for target, name in _PROJECTIONS
        for rule in block(
            target, f"self_attn.{name}", made.get(name, SAME), where, last if name == "o_proj" else biased
        )
    )


def head_norms(operation: Operation = SAME, where: Where = always) -> tuple[Rule, ...]:
    """Returns the rules of the norms of each head's queries and keys."""
    return (
        *block("attn_q_norm", "self_attn.q_norm", operation, where),
        *block("attn_k_norm", "self_attn.k_norm", operation, where),
    )


def mlp(source: str = "mlp", where: Where = always, biased: str | bool = False, target: str = "") -> tuple[Rule, ...]:
    """Returns the rules of gate, up and down; `target` is what the file's names end in, as `_shexp`."""
    return tuple(
        rule
        for name in ("gate", "up", "down")
        for rule in block(f"ffn_{name}{target}", f"{source}.{name}_proj", SAME, where, biased)
    )
