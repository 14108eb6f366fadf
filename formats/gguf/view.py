"""A model under GGUF's names, shapes and row order, for the writer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import TURNED, Checkpoint, CheckpointView, Observed, TensorInfo
from quantize.formats.gguf import architectures
from quantize.formats.gguf.architectures.assemble import count_extra, forms_of, forward, places, source_names
from quantize.formats.gguf.architectures.base import HEAD
from quantize.formats.gguf.architectures.lazy import Constant, Lazy, Leaf
from quantize.formats.gguf.architectures.rope import read_rope, rope_notices
from quantize.formats.gguf.architectures.settings import Settings
from quantize.formats.gguf.general import general_metadata, pooling
from quantize.formats.gguf.metadata import Value, text, u32
from quantize.schemes import Plain, QuantizedTensor

_TOWER = "vision tower: belongs in an mmproj file, which is not written"
# Names of everything that is no language model.
_TOWERS = re.compile(
    r"(^|\.)(vision_\w+|visual|multi_modal_projector|multimodal_projector|mm_projector|audio_\w+|embed_vision"
    r"|embed_audio|image_newline|vision|patch_merger|connector)(\.|$)"
)
_MTP = "predicts further tokens: llama.cpp has no place for it in this architecture"
_TIED = "the head is the embedding"
# Buffers that some checkpoints hold and every engine computes.
_BUFFERS = re.compile(r"(rotary_emb|rotary_pos_emb)\.inv_freq$|\.masked_bias$|(^|\.)position_ids$")
# Matrices that llama.cpp wants in float32, by what their names end in.
_FLOAT = re.compile(
    r"(_norm|\.ffn_gate_inp|\.ffn_gate_inp_shexp|position_embd|token_types|\.ssm_conv1d(_[qkv])?|\.shortconv\.conv"
    r"|\.time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)|\.altup_(correct|predict)_coef|\.indexer\.proj)\.weight$"
)


class GGUFView(CheckpointView):
    """A checkpoint as a GGUF file holds it.

    Args:
        checkpoint: The source, under transformers' names.
        arch: What GGUF calls the architecture, to take the model as that whatever its class.
        assume_tied: Whether a missing head is the embedding.

    Raises:
        InputError: the class is unknown, a tensor is missing or has no place, or the config says what llama.cpp
            cannot follow.
    """

    def __init__(self, checkpoint: Checkpoint, arch: str | None = None, assume_tied: bool = False) -> None:
        super().__init__(checkpoint)
        self._assume_tied = assume_tied
        self.architecture = architectures.of_config(checkpoint.config, checkpoint.path, arch)
        self.dropped: dict[str, str] = dict(checkpoint.dropped)
        settings = Settings(checkpoint.config, checkpoint.path)
        stored = self._language(settings)
        self.settings = Settings(checkpoint.config, checkpoint.path, count_extra(self.architecture, settings, stored))
        self._theirs = self._named(stored)
        held: dict[str, Lazy] = {ours: Leaf(checkpoint, theirs) for ours, theirs in self._theirs.items()}
        held = self._without_head(held)
        self._made = forward(self.architecture, self.settings, held)
        self._place_head(held)
        self._refuse_unlisted(held)
        self._metadata = self.architecture.metadata(self.settings)
        self._refuse_integers()
        computed = {name: Constant(values) for name, values in self.architecture.made(self.settings).items()}
        self._made = self._ordered({**computed, **self._made})

    def _language(self, settings: Settings) -> dict[str, str]:
        """Returns the stored names of the language model by their name without what wraps it; drops the rest."""
        found: dict[str, str] = {}
        wrapped = settings.nested
        for name in self._base.tensors:
            if _BUFFERS.search(name):
                self.dropped[name] = "a buffer that engines compute"
            elif wrapped and _TOWERS.search(name):
                self.dropped[name] = _TOWER
            else:
                found[re.sub(r"(language_model|text_model)\.", "", name)] = name
        return found

    def _named(self, stored: Mapping[str, str]) -> dict[str, str]:
        """Returns the stored names by the names that rules have, which may differ by a prefix."""
        settings, prefix = self.settings, self.architecture.prefix
        known = {
            name
            for place in places(self.architecture, settings)
            for form in forms_of(place, settings)
            for name in source_names(self.architecture, settings, form, place.block)
        }
        return {
            next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in known), name): theirs
            for name, theirs in stored.items()
        }

    def _without_head(self, held: dict[str, Lazy]) -> dict[str, Lazy]:
        """Returns the tensors without a head that is the embedding.

        Raises:
            InputError: a head of its own is missing, or has no place.
        """
        head = self._source(HEAD)
        if head is None:
            return held
        tied = bool(self._base.config.get("tie_word_embeddings") or self.settings.get("tie_word_embeddings"))
        if head in held and (tied or self.architecture.head_tied):
            if not tied:
                what = "has a head of its own, for which llama.cpp has no place in this architecture"
                raise InputError(f"{self._base.path}: {what}")
            self.dropped[held[head].sources[0]] = _TIED
            return {name: tensor for name, tensor in held.items() if name != head}
        bare = str((self._base.config.get("architectures") or [""])[0]).endswith("Model")
        if head not in held and not (tied or bare or self._assume_tied):
            raise InputError(
                f"{self._base.path}: lacks tensor '{head}', and config.json does not tie the head to the embedding",
                "if it is, say --assume-tied",
            )
        return held

    def _source(self, group: str) -> str | None:
        rules = [rule for rule in self.architecture.rules if rule.group == group]
        return rules[0].forms[0].sources[0] if rules else None

    def _place_head(self, held: Mapping[str, Lazy]) -> None:
        """Writes the embedding once more where llama.cpp wants a head and the model has none."""
        if self.architecture.head_required and "output.weight" not in self._made:
            self._made["output.weight"] = self._made["token_embd.weight"]

    def _refuse_unlisted(self, held: Mapping[str, Lazy]) -> None:
        """Drops what rules leave out.

        Raises:
            InputError: a tensor is neither used nor left out.
        """
        used = {name for tensor in self._made.values() for name in tensor.sources}
        layer = re.escape(self.architecture.layer).replace(r"\{n\}", r"(\d+)")
        for name, tensor in held.items():
            stored = tensor.sources[0]
            if stored in used:
                continue
            reason = next((why for what, why in self.architecture.drops.items() if re.search(what, name)), None)
            behind = re.match(rf"{layer}\.", name)
            if reason is None and (name.startswith("mtp.") or (behind and int(behind[1]) >= self.settings.blocks)):
                reason = _MTP
            if reason is None:
                what = f"tensor '{stored}' has no place in GGUF architecture '{self.architecture.name}'"
                raise InputError(f"{self._base.path}: {what}", "--arch names another architecture")
            self.dropped[stored] = reason

    def _refuse_integers(self) -> None:
        """Refuses whole numbers where weights belong.

        Raises:
            InputError: naming the tensor.
        """
        for name, tensor in self._made.items():
            if isinstance(tensor.scheme, Plain) and not tensor.scheme.dtype.is_floating_point:
                file, source = self.origin(name)
                what = f"tensor '{source}' holds {tensor.scheme}, no weights: packed codes of an unknown kind"
                raise InputError(f"{file}: {what}", "use the model that it was made from")

    @staticmethod
    def _ordered(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
        """Returns the tensors with what comes after the blocks at the end."""
        last = [name for name in tensors if name.startswith("output")]
        return {name: tensors[name] for name in (*(n for n in tensors if n not in last), *last)}

    @property
    def notices(self) -> list[str]:
        """What the user should know: what is not written, and what llama.cpp does otherwise than transformers."""
        towers = sum(reason == _TOWER for reason in self.dropped.values())
        found = [f"the text model only: {towers} tensors of its other parts belong in an mmproj file"] if towers else []
        if self.architecture.rotated is not None:
            found += rope_notices(read_rope(self.settings))
        window = self.settings.own.get("sliding_window")
        looks = self.settings.own.get("use_sliding_window", True) and "attention.sliding_window" not in self._metadata
        if window and (looks or self.architecture.name == "phi3"):
            found.append(f"llama.cpp attends to everything here, the model to the last {window} tokens")
        return found

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors of the file, in its order."""
        return {name: TensorInfo(name, t.shape, t.scheme, t.nbytes) for name, t in self._made.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns values `start` to `stop` of a tensor's first dimension."""
        return self._made[name].read(start, stop)

    def read_coded(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns the same on the tensor's own grid, or None when it is plain."""
        return self._made[name].coded(start, stop)

    def file(self, name: str) -> Path:
        """Returns the file that holds a tensor's first source."""
        sources = self._made[name].sources
        return self._base.file(sources[0]) if sources else self._base.path

    def origin(self, name: str, index: int = 0) -> tuple[Path, str]:
        """Returns file and stored name of what a tensor is made of: of a stack, that of its matrix `index`."""
        sources = self._made[name].sources
        if not sources:
            return self._base.path, name
        source = sources[index if len(sources) == self._made[name].shape[0] else 0]
        return self._base.file(source), source

    def sources(self, name: str) -> tuple[str, ...]:
        """Returns the stored tensors that one is made of, experts in order; none for a computed one."""
        return self._made[name].sources

    def same_columns(self, name: str) -> bool:
        """Returns whether a tensor's input columns are those of its sources, so that statistics of them hold."""
        return self._made[name].same_columns

    def observed(self, name: str) -> Observed | None:
        """Returns where a text shows what a tensor's columns are multiplied with."""
        if (fed := self.architecture.observed(self.settings, name)) is not None:
            return replace(fed, names=tuple(self._theirs[ours] for ours in fed.names))
        found = {self._made[name].columns_of(source) for source in self._made[name].sources}
        columns = found.pop() if len(found) == 1 else None
        if columns is None:
            return None
        return Observed(self.sources(name), TURNED if columns.turned else "", columns.order)

    def required_float(self, name: str) -> bool:
        """Returns whether llama.cpp wants a tensor in float32: vectors, norms, routers, convolutions and the like."""
        return len(self._made[name].shape) < 2 or not name.endswith(".weight") or bool(_FLOAT.search(name))

    def metadata(self) -> dict[str, Value]:
        """Returns the header's metadata, but for the tokenizer and what quantization adds."""
        name = self.architecture.name
        sizes = {n: math.prod(t.shape) for n, t in self._made.items()}
        own = self._metadata | {"vocab_size": u32(self._made["token_embd.weight"].shape[0])}
        return {
            "general.architecture": text(name),
            "general.type": text("model"),
            **general_metadata(self._base, sizes, self.settings.experts),
            **pooling(self._base, name),
            **{key if key.startswith("tokenizer.") else f"{name}.{key}": value for key, value in own.items()},
        }
