"""What of an EXL2 folder is not its quantized tensors: which files count, and what its config says of heights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.formats.container import Extent, read_header
from quantize.formats.folder import INDEX, read_extents, read_json

_CODES = ".q_weight"
# Engines pad outputs to a multiple of this.
_RUN = 32
_SHARD = re.compile(r"output-\d{5}-of-(\d{5})\.safetensors")


def stale_index(path: Path) -> bool:
    """Returns whether a folder's index is of another model's shards: exllamav2 copies that of the model it reads."""
    if not (path / INDEX).is_file():
        return False
    table = read_json(path / INDEX).get("weight_map")
    return isinstance(table, dict) and not any(name.endswith(_CODES) for name in table)


def holds_codes(path: Path) -> bool:
    """Returns whether any file of a folder has codes of EXL2, by the headers; broken files have none."""
    try:
        return any(name.endswith(_CODES) for file in path.glob("*.safetensors") for name in read_header(file)[0])
    except InputError:
        return False


def stored_extents(path: Path) -> Mapping[str, Extent]:
    """Returns every stored array of a folder.

    Raises:
        InputError: a file is missing or broken, or two hold the same tensor.
    """
    if not stale_index(path):
        return read_extents(path)
    files = sorted(path.glob("*.safetensors"))
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if shards and len(shards) < int(shards[0][1]):
        raise InputError(f"{path}: holds {len(shards)} of {int(shards[0][1])} shards", "download the missing files")
    extents: dict[str, Extent] = {}
    for file in files:
        found = read_header(file)[0]
        if twice := next(iter(found.keys() & extents.keys()), None):
            raise InputError(
                f"{file}: tensor '{twice}' is in {extents[twice].file.name} as well",
                "leave only the files that belong together",
            )
        extents |= found
    return extents


def height(config: Mapping[str, Any], module: str, padded: int) -> int:
    """Returns the outputs of a linear that has `padded` of them in the file: those that the config says, if it does.

    Args:
        config: The model's.
        module: Name of the linear.
        padded: A multiple of 32.
    """
    for holder in (config.get("text_config"), config):
        if isinstance(holder, Mapping):
            for said in _heights(holder, module.rpartition(".")[2]):
                if -(-said // _RUN) * _RUN == padded:
                    return said
    return padded


def _heights(config: Mapping[str, Any], leaf: str) -> list[int]:
    """Returns the heights that a config gives linears of a name; several where it has experts of their own width."""

    def number(key: str) -> int:
        value = config.get(key)
        return value if isinstance(value, int) else 0

    heads = number("num_attention_heads")
    size = number("head_dim") or (number("hidden_size") // heads if heads else 0)
    if leaf == "lm_head":
        found = [number("vocab_size")]
    elif leaf == "q_proj":
        found = [size * heads]
    elif leaf in ("k_proj", "v_proj"):
        found = [size * (number("num_key_value_heads") or heads)]
    elif leaf in ("o_proj", "down_proj", "w2"):
        found = [number("hidden_size")]
    elif leaf in ("gate_proj", "up_proj", "w1", "w3"):
        found = [number("intermediate_size"), number("moe_intermediate_size")]
    else:
        found = []
    return [height for height in found if height > 0]
