"""A transformers config as declarations ask it, whatever its age and spelling, and GGUF metadata likewise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.formats.gguf.architectures.defaults import assumed
from quantize.formats.gguf.metadata import Value, f32, flag, flags, integers, u32

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "n_kv_heads")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Where a model of text and more keeps what is said of text.
_TEXT = ("text_config", "llm_config", "language_config")


def _first(held: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((held[name] for name in names if held.get(name) is not None), None)


@dataclass(frozen=True)
class Settings:
    """The settings of a model of text.

    Attributes:
        root: The whole config.
        file: Where it is from, for messages.
        mtp: The number of blocks that predict further tokens, behind the others.
        keys: The metadata that the config was made of; then it says all, and nothing is assumed.
    """

    root: Mapping[str, Any]
    file: Path
    mtp: int = 0
    keys: Keys | None = None

    @cached_property
    def own(self) -> Mapping[str, Any]:
        """What the config says: of text where it tells text apart, else of all."""
        inner: Mapping[str, Any] = next((self.root[key] for key in _TEXT if isinstance(self.root.get(key), dict)), {})
        return {**self.root, **inner}

    @property
    def nested(self) -> bool:
        """Whether the model is of more than text."""
        return any(isinstance(self.root.get(key), dict) for key in _TEXT)

    @cached_property
    def filled(self) -> Mapping[str, Any]:
        """The same with what transformers assumes where a config is silent; as it is when the kind is unknown."""
        if self.keys is not None:
            return self.own
        if (known := assumed(self.own)) is not None:
            return known
        from transformers import CONFIG_MAPPING

        kind = self.own.get("model_type")
        if kind not in CONFIG_MAPPING:
            return self.own
        try:
            made: dict[str, Any] = CONFIG_MAPPING[kind](**deepcopy(dict(self.own))).to_dict()  # it changes what it gets
        except Exception:  # whatever an odd config makes the library raise; a key that is needed is asked for by name
            return self.own
        return made

    def get(self, *names: str, default: Any = None) -> Any:
        """Returns the first of these keys that is set, or else the kind's default for one of them."""
        if (found := _first(self.own, names)) is not None:
            return found
        if self.own.get(names[0], ...) is None:
            return default  # said to be none, not forgotten
        found = _first(self.filled, names)
        return default if found is None else found

    def need(self, *names: str) -> Any:
        """Returns the first of these keys that is set.

        Raises:
            InputError: none is.
        """
        found = self.get(*names)
        if found is None:
            raise InputError(f"{self.file}: config.json does not say '{names[0]}'")
        return found

    @cached_property
    def layers(self) -> int:
        """The number of blocks, without those that predict further tokens."""
        return int(self.need(*_LAYERS))

    @property
    def blocks(self) -> int:
        """The number of all blocks."""
        return self.layers + self.mtp

    @cached_property
    def hidden(self) -> int:
        """The width of the hidden state."""
        return int(self.need("hidden_size", "n_embd", "d_model"))

    @cached_property
    def heads(self) -> int:
        """The number of query heads."""
        return int(self.need(*_HEADS))

    @cached_property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return int(self.get(*_KV_HEADS, default=self.heads))

    @cached_property
    def head_dim(self) -> int:
        """The width of a head: as the config says it, else an equal part of the hidden state."""
        return int(self.own.get("head_dim") or self.get("d_kv", "head_dim", default=self.hidden // self.heads))

    @cached_property
    def experts(self) -> int:
        """The number of routed experts, 0 in a dense model."""
        return int(self.get(*_EXPERTS, default=0))

    @property
    def layer_types(self) -> list[str]:
        """What each block attends by, without those that predict further tokens."""
        return list(self.need("layer_types"))

    def refuse(self, what: str, hint: str = "") -> InputError:
        """Returns the error for a setting that llama.cpp has no way to follow."""
        return InputError(f"{self.file}: {what}, which llama.cpp's loader of this architecture cannot do", hint)

    def require(self, name: str, *allowed: Any) -> None:
        """Refuses a setting that llama.cpp takes for granted to be otherwise.

        Raises:
            InputError: `name` is set, and none of `allowed`.
        """
        found = self.get(name)
        if found is not None and found not in allowed:
            raise self.refuse(f"config.json has '{name}' {found!r}")


@dataclass(frozen=True)
class Keys:
    """The metadata of one GGUF file, as declarations ask it."""

    file: Path
    prefix: str
    metadata: Mapping[str, Any]

    def raw(self, key: str) -> Any:
        """Returns a value as it is, or None."""
        return self.metadata.get(f"{self.prefix}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        """Returns a whole number, or `default` when the key is absent.

        Raises:
            InputError: it is absent without a default, is no whole number, or differs between layers.
        """
        found = self.number(key, default)
        if not isinstance(found, int):
            raise InputError(f"{self.file}: '{self.prefix}.{key}' is no whole number")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a number, or `default` when the key is absent.

        Raises:
            InputError: it is absent without a default, is no number, or differs between layers.
        """
        found = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(found, list) and len(set(found)) == 1:
            found = found[0]
        if found is None:
            raise InputError(f"{self.file}: lacks the metadata key '{self.prefix}.{key}'")
        if not isinstance(found, int | float):
            what = "differs between layers, which cannot be read" if isinstance(found, list) else "is no number"
            raise InputError(f"{self.file}: '{self.prefix}.{key}' {what}")
        return found

    def list(self, key: str, count: int) -> list[Any]:
        """Returns one value per block: an array, or one number for all.

        Raises:
            InputError: it is absent or an array of another length.
        """
        found = self.raw(key)
        found = found if isinstance(found, list) else [found] * count
        if len(found) != count or not all(isinstance(value, int | float) for value in found):
            raise InputError(f"{self.file}: '{self.prefix}.{key}' is no list of {count} numbers")
        return found


@dataclass(frozen=True, slots=True)
class Field:
    """A setting that both namings hold as one value.

    Attributes:
        key: Its metadata key after the architecture's name.
        names: Its names in config.json; the first is written back.
        kind: What makes the metadata value: `u32`, `f32`, `flag`.
        default: What a file without the key means; None when it must be there.
        optional: Whether config.json may lack it; then the key is not written.
    """

    key: str
    names: tuple[str, ...]
    kind: Callable[[Any], Value] = u32
    default: Any = None
    optional: bool = False

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns the metadata that states the setting."""
        found = settings.get(*self.names) if self.optional else settings.need(*self.names)
        return {} if found is None else {self.key: self.kind(found)}

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns the config that states the setting."""
        if self.kind is flag:
            found: Any = bool(keys.number(self.key, self.default))
        else:
            absent = keys.raw(self.key) is None
            if absent and self.default is None and self.optional:
                return {}
            found = (keys.whole if self.kind is u32 else keys.number)(self.key, self.default)
        return {self.names[0]: found}


CONTEXT = Field("context_length", ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"))
HIDDEN = Field("embedding_length", ("hidden_size", "n_embd", "d_model"))
FFN = Field("feed_forward_length", ("intermediate_size", "n_inner"))
HEADS = Field("attention.head_count", _HEADS)
RMS = Field("attention.layer_norm_rms_epsilon", ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"), f32)
LAYER_NORM = Field("attention.layer_norm_epsilon", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), f32)
EXPERTS_USED = Field("expert_used_count", ("num_experts_per_tok", "top_k_experts", "num_experts_per_token"))
EXPERT_FFN = Field("expert_feed_forward_length", ("moe_intermediate_size",))


def experts(name: str) -> Field:
    """Returns the number of experts, as `name` in config.json."""
    return Field("expert_count", (name, *(other for other in _EXPERTS if other != name)))


@dataclass(frozen=True, slots=True)
class _KVHeads:
    """The number of key and value heads, which is that of the query when nothing is said."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns the number."""
        return {"attention.head_count_kv": u32(settings.kv_heads)}

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns the number."""
        return {"num_key_value_heads": keys.whole("attention.head_count_kv", keys.whole(HEADS.key))}


@dataclass(frozen=True, slots=True)
class _HeadSize:
    """The width of a head, always said."""

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns both widths, which are one."""
        return {f"attention.{part}_length": u32(settings.head_dim) for part in ("key", "value")}

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns the width.

        Raises:
            InputError: keys and values differ in width.
        """
        size = keys.whole("attention.key_length", keys.whole(HIDDEN.key) // max(keys.whole(HEADS.key), 1))
        if keys.whole("attention.value_length", size) != size:
            what = f"'{keys.prefix}.attention.value_length' differs from the head size {size}, which cannot be read"
            raise InputError(f"{keys.file}: {what}")
        return {"head_dim": size}


KV_HEADS, HEAD_SIZE = _KVHeads(), _HeadSize()


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks that look through a sliding window, and those that do not.

    Attributes:
        every: Every so-manieth block sees all, where the file does not list them.
    """

    every: int

    def usual(self, block: int) -> bool:
        """Returns whether a block looks through the window where nothing is said."""
        return block % self.every < self.every - 1

    def write(self, settings: Settings) -> dict[str, Value]:
        """Returns the window, and a list of the blocks where they are not the usual ones."""
        sliding = [kind != "full_attention" for kind in settings.layer_types]
        if not any(sliding):
            return {}
        keys = {"attention.sliding_window": u32(settings.need("sliding_window"))}
        if sliding != [self.usual(block) for block in range(len(sliding))]:
            keys["attention.sliding_window_pattern"] = flags(sliding)
        return keys

    def read(self, keys: Keys) -> dict[str, Any]:
        """Returns the window and what each block is."""
        layers = keys.whole("block_count")
        window = keys.whole("attention.sliding_window", 0)
        sliding = [bool(window) and self.usual(block) for block in range(layers)]
        if window and keys.raw("attention.sliding_window_pattern") is not None:
            sliding = [bool(value) for value in keys.list("attention.sliding_window_pattern", layers)]
        kinds = ["sliding_attention" if looks else "full_attention" for looks in sliding]
        return {"layer_types": kinds} | ({"sliding_window": window} if window else {})


def per_block(values: list[int]) -> Value:
    """Returns one number per block, as one number where they are all the same."""
    return u32(values[0]) if len(set(values)) == 1 else integers(values)
