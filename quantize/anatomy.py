"""What a plan must know of a model's parts: which tensors are linears of its blocks, and why others are left alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from quantize.errors import InputError
from quantize.formats.base import Checkpoint
from quantize.skeleton import Skeleton

# What the skeleton calls them.
_ENDS = ("copied: embedding", "copied: head")


class Anatomy(Protocol):
    """A model's parts by the names that the plan uses."""

    @property
    def linears(self) -> tuple[str, ...]:
        """The quantizable linears of the blocks."""

    @property
    def ends(self) -> tuple[str, ...]:
        """Embedding and head, as far as they are tensors of their own."""

    def aliases(self, name: str) -> tuple[str, ...]:
        """Returns all names that rules may call a tensor by."""

    def block_of(self, name: str) -> str | None:
        """Returns the block that a tensor lies in, or None."""

    def why_kept(self, name: str) -> str:
        """Returns the named rule under which a tensor is left unquantized.

        Raises:
            InputError: no rule knows it.
        """


@dataclass(frozen=True, slots=True)
class ModuleAnatomy:
    """The parts as transformers' modules tell them; names are those of the checkpoint."""

    skeleton: Skeleton
    checkpoint: Checkpoint

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of the blocks."""
        return tuple(self.skeleton.linears)

    @property
    def ends(self) -> tuple[str, ...]:
        """Tensors of embedding modules and of the head."""
        skeleton = self.skeleton
        others = (n for n in self.checkpoint.tensors if n not in skeleton.linears and n not in skeleton.unused)
        return tuple(name for name in others if skeleton.role(name) in _ENDS)

    def aliases(self, name: str) -> tuple[str, ...]:
        """Returns the stored name and the module's."""
        module = self.skeleton.linears.get(name)
        return (name,) if module is None else (name, module)

    def block_of(self, name: str) -> str | None:
        """Returns the path of the block."""
        return self.skeleton.block_of(self.skeleton.linears.get(name, name))

    def why_kept(self, name: str) -> str:
        """Returns what the tensor is to the model."""
        if name in self.skeleton.linears:
            return "converted"
        if name not in self.skeleton.unused:
            return self.skeleton.role(name)
        if self.skeleton.ignores(name):
            return "copied: not part of the language model in transformers"
        raise InputError(
            f"{self.checkpoint.path}: tensor '{name}' belongs to no module and no rule",
            f"to copy it as it is: --set '{name}=keep'",
        )


@dataclass(frozen=True, slots=True)
class NamedAnatomy:
    """The parts as a format's own names tell them, which need no modules.

    Attributes:
        names: Every tensor of the format, with the stored tensors that it is made of.
    """

    names: Mapping[str, tuple[str, ...]]

    @property
    def linears(self) -> tuple[str, ...]:
        """All tensors: such a format says itself which of them can be quantized."""
        return tuple(self.names)

    @property
    def ends(self) -> tuple[str, ...]:
        """Nothing: they are among the linears."""
        return ()

    def aliases(self, name: str) -> tuple[str, ...]:
        """Returns the format's name and the stored ones."""
        return (name, *self.names[name])

    def block_of(self, name: str) -> str | None:
        """Returns the numbered part of the name that GGUF gives the tensors of a block."""
        found = re.match(r"((enc|dec)\.)?blk\.\d+(?=\.)", name)
        return found[0] if found else None

    def why_kept(self, name: str) -> str:
        """Returns the rule for all that no mix and no recipe speaks of."""
        return "copied"
