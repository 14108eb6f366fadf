"""The model as transformers defines it, without weights: its blocks, its linears, and which stored tensors feed them.

The only place that knows transformers. Names differ between the files and the modules (version 5 renames, stacks and
splits at load); transformers' own conversion rules are run here on shapes alone to learn the mapping, and later on
values to fill one block at a time.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import InputError
from quantize.formats.base import Checkpoint

# A linear with one of these names, or with one output per expert, decides on routing: engines keep it unquantized.
_ROUTERS = ("router", "gate", "shared_expert_gate", "shared_experts_gate")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MAX_NAMED = 3
_MATRIX = 2
# Parts of larger models that a language model class does not build: copied, never lost.
_OTHER_PARTS = (r"(^|\.)mtp\.", r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector)\.")


@dataclass(frozen=True, slots=True)
class Conversion:
    """Stored tensors that transformers turns into parameters.

    Attributes:
        target: Name of the (first) parameter that the rule produces.
        sources: Stored names by the rule's source pattern, in the order that the rule expects.
        outputs: Names of all parameters produced.
        rule: transformers' converter, or None where the one tensor is the one parameter.
    """

    target: str
    sources: Mapping[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    rule: Any

    @property
    def names(self) -> tuple[str, ...]:
        """All stored names, in order."""
        return tuple(name for group in self.sources.values() for name in group)


class Skeleton:
    """A transformers model without weights and its links to the tensors of a checkpoint.

    Attributes:
        model: The module tree; parameters only have shapes, buffers are real.
        blocks: Module paths of the repeated blocks, in definition order.
        conversions: How stored tensors become parameters, by first parameter name.
        unused: Stored tensors that no parameter takes (multi-token-prediction heads and the like).
    """

    def __init__(self, checkpoint: Checkpoint, assume_tied: bool = False) -> None:
        self.model = _build(checkpoint, assume_tied)
        self.blocks = tuple(_blocks(self.model))
        self.conversions, self.unused = _map_names(self.model, checkpoint)
        self._require_all(checkpoint, assume_tied)

    @cached_property
    def linears(self) -> Mapping[str, str]:
        """Stored names of the quantizable matrices, each with the module that multiplies by it."""
        modules = dict(self.model.named_modules())
        found: dict[str, str] = {}
        for conversion in self.conversions.values():
            for output in conversion.outputs:
                path, _, leaf = output.rpartition(".")
                module = modules.get(path)
                if self.block_of(path) is None or not self._multiplies(module, path, leaf):
                    continue
                found.update((name, path) for name in conversion.names)
        return found

    def block_of(self, path: str) -> str | None:
        """Returns the block that a module or parameter path lies in, or None."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            if (prefix := ".".join(parts[:end])) in self._block_set:
                return prefix
        return None

    def fill(self, wanted: Callable[[str], bool], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Returns the parameters and persistent buffers whose names are wanted, by name.

        Args:
            wanted: Whether a parameter name is wanted.
            read: Gives a stored tensor by name.
        """
        values: dict[str, Tensor] = {}
        sources = {self.tied[name] for name in self.tied if wanted(name)}
        for conversion in self.conversions.values():
            if any(wanted(name) or name in sources for name in conversion.outputs):
                values |= convert(conversion, read, self.model)
        values |= {name: values[source] for name, source in self.tied.items() if source in values}
        return {name: value for name, value in values.items() if wanted(name)}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Puts tensors in place of parameters or buffers, by name; matrices tied to one of them follow."""
        tied = {name: values[other] for name, other in self.tied.items() if other in values}
        for name, value in {**values, **tied}.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value

    def stored_names(self, path: str) -> tuple[str, ...]:
        """Returns the stored tensors that parameters under a module path are made of, in file order."""
        prefix = f"{path}."
        return tuple(
            name
            for conversion in self.conversions.values()
            if any(output.startswith(prefix) for output in conversion.outputs)
            for name in conversion.names
        )

    def role(self, name: str) -> str:
        """Returns what a stored tensor that is no quantizable linear is to the model, as the name of a rule."""
        output = self.conversion_of[name].outputs[0]
        path, _, leaf = output.rpartition(".")
        module = self.model.get_submodule(path)
        if isinstance(module, nn.Embedding):
            return "copied: embedding"
        if path == self.head:
            return "copied: head"
        if self.block_of(path) is None:
            return "copied: outside the blocks"
        if leaf in module._buffers:
            return "copied: buffer"
        value = module._parameters[leaf]
        assert value is not None
        if self._routes(path, value):
            return "copied: router"
        return "copied: norm, bias or other vector" if value.dim() < _MATRIX else "copied: no plain linear"

    def ignores(self, name: str) -> bool:
        """Returns whether a tensor without a module is known: transformers lists it, or it is of another tower."""
        listed = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or []
        return any(re.search(pattern, name) for pattern in (*listed, *_OTHER_PARTS)) or self._past_last_block(name)

    def _past_last_block(self, name: str) -> bool:
        """Multi-token-prediction layers are stored as blocks after the last one."""
        found = re.search(r"\blayers\.(\d+)\.", name)
        count = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        return found is not None and count is not None and int(found[1]) >= count

    @cached_property
    def conversion_of(self) -> Mapping[str, Conversion]:
        """The conversion that each stored tensor goes into."""
        return {name: conversion for conversion in self.conversions.values() for name in conversion.names}

    @cached_property
    def source_of(self) -> Mapping[str, Conversion]:
        """The conversion that each parameter comes from."""
        return {output: conversion for conversion in self.conversions.values() for output in conversion.outputs}

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters and buffers that stored tensors fill, ties included."""
        return (*self.source_of, *(alias for alias, source in self.tied.items() if source in self.source_of))

    def whole(self, parameter: str) -> str | None:
        """Returns the stored tensor that is this parameter unchanged, following ties; None if there is none."""
        parameter = parameter if parameter in self.source_of else self.tied.get(parameter, parameter)
        conversion = self.source_of.get(parameter)
        return conversion.names[0] if conversion is not None and conversion.rule is None else None

    @cached_property
    def head(self) -> str | None:
        """Module path of the output embedding, or None."""
        wanted = self.model.get_output_embeddings()
        return next((path for path, module in self.model.named_modules() if module is wanted), None)

    @property
    def head_tied(self) -> bool:
        """Whether the head multiplies by the embedding's matrix."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", ...)

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Parameter names that share another parameter's matrix, with the name of that other one."""
        first: dict[int, str] = {}
        shared: dict[str, str] = {}
        loaded = {output for conversion in self.conversions.values() for output in conversion.outputs}
        named = list(self.model.named_parameters(remove_duplicate=False))
        for name, parameter in sorted(named, key=lambda item: item[0] not in loaded):
            if id(parameter) in first:
                shared[name] = first[id(parameter)]
            else:
                first[id(parameter)] = name
        return shared

    @cached_property
    def _block_set(self) -> frozenset[str]:
        return frozenset(self.blocks)

    def _multiplies(self, module: nn.Module | None, path: str, leaf: str) -> bool:
        if isinstance(module, nn.Linear):
            return leaf == "weight" and not self._routes(path, module.weight)
        stacked = getattr(module, leaf, None)
        return "experts" in path.split(".") and isinstance(stacked, Tensor) and stacked.dim() == 3

    @cached_property
    def expert_counts(self) -> frozenset[int]:
        """How many experts a layer has, as the config says; empty where there are none."""
        config = self.model.config.get_text_config()
        found = {getattr(config, key, None) for key in _EXPERT_COUNTS}
        return frozenset(count for count in found if isinstance(count, int) and count > 1)

    def _routes(self, path: str, weight: Tensor) -> bool:
        """Returns whether a parameter of a module is a matrix that decides on routing."""
        named = path.rpartition(".")[2] in _ROUTERS
        return weight.dim() == _MATRIX and (named or weight.shape[0] == 1 or weight.shape[0] in self.expert_counts)

    def _require_all(self, checkpoint: Checkpoint, assume_tied: bool) -> None:
        have = {output for conversion in self.conversions.values() for output in conversion.outputs}
        ignored = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or []
        missing = [
            name
            for name, _ in self.model.named_parameters(remove_duplicate=False)
            if name not in have and self.tied.get(name) not in have and not any(i in name for i in ignored)
        ]
        missing = [name for name in missing if name not in self.tied.values() or name not in self.tied]
        if not missing:
            return
        head = f"{self.head}.weight" if self.head else ""
        if head in missing and not assume_tied:
            raise InputError(
                f"{checkpoint.path}: '{head}' is missing, yet tie_word_embeddings is false in its config",
                "if the head shares the embedding's matrix, say --assume-tied",
            )
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        names = ", ".join(f"'{name}'" for name in missing[:_MAX_NAMED])
        raise InputError(f"{checkpoint.path}: missing tensors: {names}{more}", "the download is incomplete")


def convert(conversion: Conversion, read: Callable[[str], Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters that `conversion` makes from stored tensors."""
    if conversion.rule is None:
        return {conversion.target: read(conversion.names[0])}
    rule = deepcopy(conversion.rule)
    for pattern, names in conversion.sources.items():
        for name in names:
            rule.add_tensor(conversion.target, name, pattern, read(name))
    made: dict[str, Any] = rule.convert(conversion.target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def stand_in(shape: Sequence[int]) -> Tensor:
    """Returns a tensor of a shape that takes no memory: NaN throughout, so that using what is not loaded shows."""
    return torch.full((), torch.nan).expand(shape)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own notices away from our terminal while a model or tokenizer is built."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _build(checkpoint: Checkpoint, assume_tied: bool) -> Any:
    """Returns the model, its buffers real and initialised, its parameters stood in for."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    values = PreTrainedConfig._decode_special_floats(dict(checkpoint.config))
    if assume_tied:
        values["tie_word_embeddings"] = True
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise InputError(
            f"{checkpoint.path}: unknown architecture: model_type '{kind}' in config.json",
            f"transformers {transformers.__version__} does not define it",
        )
    names = values.get("architectures") or []
    classes = [getattr(transformers, name, None) for name in names]
    if names and classes[0] is None:
        raise InputError(
            f"{checkpoint.path}: unknown architecture '{names[0]}'",
            f"transformers {transformers.__version__} does not define it",
        )
    # no random number of the caller's is used up, and none of theirs gets in
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            config = CONFIG_MAPPING[kind].from_dict(values)
            # one linear call per expert, so that each expert's input can be told apart
            config._experts_implementation = "eager"
            cls: Any = classes[0] if classes else _default_class(config)
            with torch.device("meta"):
                model = cls._from_config(config, dtype=torch.float32)
        except (TypeError, ValueError, AttributeError, KeyError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{checkpoint.path}: config.json does not make a model: {reason}") from error
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        model.initialize_weights()
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fresh = known.setdefault(id(value), nn.Parameter(stand_in(value.shape), requires_grad=False))
                module._parameters[name] = fresh
                known[id(fresh)] = fresh
    return model.eval()


def _default_class(config: Any) -> Any:
    """Returns the causal language model class of a config that names no architecture."""
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise InputError(
            f"config.json names no architectures and model_type '{config.model_type}' has no language model"
        )
    return mapping[type(config)]


def _blocks(model: Any) -> Iterator[str]:
    """Yields the paths of the repeated blocks: members of outermost module lists that are no plain layers.

    Those of towers for images or sound are none of ours: a submodel belongs to the language model if its config is of
    the same kind as the whole model's or as the text config in it.
    """
    config = model.config
    kinds = {type(config), *(type(config.get_text_config(**part)) for part in ({"decoder": True}, {"encoder": True}))}
    towers = [
        path
        for path, module in model.named_modules()
        if path and hasattr(module, "config_class") and type(module.config) not in kinds
    ]
    lists: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in (*lists, *towers)):
            continue
        if all(any(True for _ in member.children()) for member in module) and len(module):
            lists.append(path)
            yield from (f"{path}.{index}" for index in range(len(module)))


def _map_names(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, Conversion], tuple[str, ...]]:
    """Returns the conversions by target and the stored names that no parameter takes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    grouped: dict[str, dict[str, list[str]]] = {}
    used: dict[str, Any] = {}
    unused: list[str] = []
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            unused.append(name)
            continue
        used[target] = by_pattern[pattern] if pattern is not None else None
        grouped.setdefault(target, {}).setdefault(pattern or name, []).append(name)

    def on_meta(name: str) -> Tensor:
        return torch.empty(checkpoint.tensors[name].shape, device="meta")

    conversions: dict[str, Conversion] = {}
    for target, sources in grouped.items():
        frozen = {pattern: tuple(names) for pattern, names in sources.items()}
        draft = Conversion(target, frozen, (target,), used[target])
        made = convert(draft, on_meta, model)
        for output, value in made.items():
            if output in state and value.shape != state[output].shape:
                raise InputError(
                    f"{checkpoint.path}: tensor '{draft.names[0]}' makes shape {list(value.shape)} "
                    f"where config.json means {list(state[output].shape)}"
                )
        conversions[target] = Conversion(target, frozen, tuple(made), used[target])
    return conversions, tuple(unused)
