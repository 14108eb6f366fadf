"""GGUF files, read only: what llama.cpp, Ollama and LM Studio load.

One file, or the parts `NAME-00001-of-0000N.gguf` of one model. A part is: the magic `GGUF`, u32 version, u64
counts of tensors and of metadata pairs; the pairs; per tensor its name, dimensions (fastest first, unlike
torch's), GGML type and offset; then the data, aligned. Everything is little-endian.

The header is walked here and not by the gguf package's reader, which makes array objects of every token and
merge (4 seconds and 180 MB for 49k tokens) and names no tensor in errors. Block sizes and decoding are the
package's.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import shutil
import struct
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.formats.base import Checkpoint, Piece, TensorInfo
from quantize.formats.container import Extent, read_rows
from quantize.formats.folder import is_folder
from quantize.schemes import GGMLBlock, Plain, QuantizedTensor, Scheme, Shape

# ------------------------------------------------------------------------------------------------------------
# Architectures: what GGUF names and orders differently from transformers


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    **dict(zip(("attn_q", "attn_k", "attn_v", "attn_output"), _ATTENTION, strict=True)),
    "ffn_norm": "post_attention_layernorm",
    **dict(zip(("ffn_gate", "ffn_up", "ffn_down"), _MLP, strict=True)),
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# GGUF key after the architecture's name, and its name in config.json.
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}
# Factors that llama.cpp multiplies into the rotary frequencies; config.json holds their parameters instead.
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one dense decoder architecture of GGUF maps to transformers.

    Attributes:
        model_type: Its `model_type` in config.json.
        model_class: Its class for causal language modelling.
        block: Modules of a block, GGUF to transformers.
        biases: Modules of a block with a bias, by the config's flag for them; those under "" always.
        permuted: Whether the rows of q and k are stored in rotary pairs instead of halves.
    """

    model_type: str
    model_class: str
    block: Mapping[str, str]
    biases: Mapping[str, Sequence[str]]
    permuted: bool = False

    def rename(self, name: str) -> str | None:
        """Returns the transformers name of a tensor, or None when the architecture has no such tensor."""
        module, _, leaf = name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        if match and match[2] in self.block:
            module = f"model.layers.{int(match[1])}.{self.block[match[2]]}"
        else:
            module = _OUTER.get(module, "")
        return f"{module}.{leaf}" if module and leaf in ("weight", "bias") else None

    def names(self, config: Mapping[str, Any]) -> set[str]:
        """Returns the transformers names of all tensors that a model of `config` has."""
        outer = [module for module in _OUTER.values() if module != "lm_head" or not config["tie_word_embeddings"]]
        biased = {leaf for flag, leaves in self.biases.items() if config.get(flag, not flag) for leaf in leaves}
        layers = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
        weights = [f"{layer}.{leaf}" for layer in layers for leaf in self.block.values()]
        biases = {f"{layer}.{leaf}.bias" for layer in layers for leaf in biased}
        return biases | {f"{module}.weight" for module in (*outer, *weights)}


ARCHITECTURES = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _BLOCK, {"attention_bias": _ATTENTION, "mlp_bias": _MLP}, permuted=True
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _BLOCK, {"": _ATTENTION[:3]}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _BLOCK | _HEAD_NORMS, {"attention_bias": _ATTENTION}),
}


# ------------------------------------------------------------------------------------------------------------
# The container


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a part: logical shape in torch's order, grid, and bytes.

    `extent` is of the dtype when plain; of uint8 `[rows, bytes of a row]` when quantized.
    """

    shape: Shape
    scheme: Scheme
    extent: Extent


@dataclass(frozen=True, slots=True)
class Part:
    """The header of one file. Arrays of more than 256 values are left at their type and length."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64,
          24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_ARRAY = 256
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class _Header:
    """Walks a header. Lengths in it come from the file, so each step is checked against the file's size."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.position = file, data, 0

    def skip(self, count: int) -> int:
        """Passes over `count` bytes and returns where they start."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise InputError(f"{self.file}: truncated inside its header", "download it again")
        return start

    def take(self, code: str) -> Any:
        """Returns the next numbers, as `struct` spells them: one bare, several in a tuple."""
        code = f"<{code}"
        values = struct.unpack_from(code, self.data, self.skip(struct.calcsize(code)))
        return values[0] if len(values) == 1 else values

    def text(self) -> str:
        """Returns the next string."""
        start = self.skip(self.take("Q"))
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.file}: its header holds a string that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """Returns the next metadata value of type `kind`."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise InputError(f"{self.file}: its header holds a value of the unknown type {kind}")
        number = self.take(_SCALARS[kind])
        # The shortest decimal of a float32: 1e-05 as the config had it, not 9.999999747378752e-06.
        return float(str(np.float32(number))) if _SCALARS[kind] == "f" else number

    def array(self) -> Any:
        """Returns a short array as a list, of a long one its type and length."""
        kind, count = self.take("IQ")
        if kind != _STRING and kind not in _SCALARS:
            raise InputError(f"{self.file}: its header holds an array of the unknown type {kind}")
        if count <= _LONGEST_ARRAY:
            return [self.value(kind) for _ in range(count)]
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.take("Q"))
            return {"type": "string", "length": count}
        self.skip(count * struct.calcsize(_SCALARS[kind]))
        return {"type": np.dtype(_SCALARS[kind]).name, "length": count}


def read_part(file: Path) -> Part:
    """Returns the header of one GGUF file; no tensor data is read.

    Raises:
        InputError: the file is missing, no GGUF file, of an unreadable version, truncated, or several joined.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if start.startswith(b"version"):
                raise InputError(f"{file}: a git-lfs pointer, not the model", "fetch it with 'git lfs pull'")
            if len(start) < 8 and b"GGUF".startswith(start[:4]):
                raise InputError(f"{file}: truncated: {len(start)} bytes", "download it again")
            if start[:4] != b"GGUF":
                raise InputError(f"{file}: no GGUF file: it starts with {start[:4]!r}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_header(_Header(file, data))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error


def _read_header(header: _Header) -> Part:
    file = header.file
    _, version, tensor_count, pair_count = header.take("IIQQ")
    if version not in (2, 3):
        what = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise InputError(f"{file}: a GGUF file {what}", "little-endian ones of version 2 and 3 can be read")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = header.text()
        if key in metadata:
            raise InputError(f"{file}: its header holds the key '{key}' twice")
        metadata[key] = header.value(header.take("I"))
    entries: dict[str, tuple[Shape, int, int]] = {}
    for _ in range(tensor_count):
        name, dims = header.text(), header.take("I")
        if name in entries or not 1 <= dims <= 4:
            raise InputError(f"{file}: tensor '{name}' is listed twice, or has {dims} dimensions")
        shape = tuple(header.take("Q") for _ in range(dims))[::-1]
        kind, offset = header.take("IQ")
        entries[name] = (shape, kind, offset)

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{file}: general.alignment is {alignment}, no power of two")
    begin, size, end = -(-header.position // alignment) * alignment, len(header.data), header.position
    tensors: dict[str, Stored] = {}
    for name, (shape, kind, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        tensors[name] = stored = _stored(file, name, shape, kind, begin + offset)
        end = max(end, begin + offset + stored.extent.nbytes)
        if end > size:
            what = f"truncated: tensor '{name}' ends at byte {end} of {size}"
            raise InputError(f"{file}: {what}", "download it again")
    padded = -(-end // alignment) * alignment
    if b"GGUF" in (header.data[end : end + 4], header.data[padded : padded + 4]):
        raise InputError(
            f"{file}: parts joined byte-wise: a second GGUF header starts at byte {end}",
            "keep the parts as they are and name the first, or join them with llama-gguf-split --merge",
        )
    return Part(file, metadata, tensors)


def _stored(file: Path, name: str, shape: Shape, kind: int, offset: int) -> Stored:
    """Returns one checked tensor entry; its range in the file is checked by the caller."""
    from gguf import GGMLQuantizationType

    count = math.prod(shape)
    if count == 0:
        raise InputError(f"{file}: tensor '{name}' is empty: {list(shape)}")
    if kind in _PLAIN:
        dtype = _PLAIN[kind]
        return Stored(shape, Plain(dtype), Extent(file, dtype, shape, offset, count * dtype.itemsize))
    try:
        scheme = GGMLBlock(GGMLQuantizationType(kind).name.lower())
    except ValueError:
        raise InputError(
            f"{file}: tensor '{name}' has the unknown GGML type {kind}", "pip install -U gguf may know it"
        ) from None
    if reason := scheme.reject(shape):
        raise InputError(f"{file}: tensor '{name}': {reason}")
    width = shape[-1] // scheme.block * scheme.block_bytes
    extent = Extent(file, torch.uint8, (*shape[:-1], width), offset, count // shape[-1] * width)
    return Stored(shape, scheme, extent)


def part_files(path: Path) -> list[Path]:
    """Returns the files of the model at `path`: a file, any part of a split one, or a folder with one model.

    Raises:
        InputError: a part is missing, or the folder holds no model or several.
    """
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        stems = sorted({match["stem"] if (match := _PART_NAME.fullmatch(f.name)) else f.name for f in files})
        if len(stems) != 1:
            hint = f"name one of them: {', '.join(stems[:5])}"
            raise InputError(f"{path}: holds {len(stems)} GGUF models", hint)
        path = files[0]
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    files = [path.with_name(f"{match['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    if missing := [file.name for file in files if not file.exists()]:
        what = f"missing {', '.join(missing[:5])}: {len(missing)} of {count} parts"
        raise InputError(f"{path}: {what}", "download the missing files")
    return files or [path]


def read_parts(path: Path) -> list[Part]:
    """Returns the headers of all parts of the model at `path`, the one with the metadata first.

    Raises:
        InputError: a file cannot be read, or the parts do not belong together.
    """
    parts = [read_part(file) for file in part_files(path)]
    numbers = [[p.metadata.get(f"split.{key}") for key in ("no", "count")] for p in parts]
    (number, count), file = numbers[0], parts[0].file
    if len(parts) == 1 and isinstance(number, int) and isinstance(count, int) and count > 1:
        name = f"NAME-{number + 1:05}-of-{count:05}.gguf"
        raise InputError(f"{file}: part {number + 1} of {count}", f"name it {name}, beside the other parts")
    for index, found in enumerate(numbers if len(parts) > 1 else []):
        if found != [index, len(parts)]:
            what = f"its header does not say that it is part {index + 1} of {len(parts)}"
            raise InputError(f"{parts[index].file}: {what}")
    held, total = sum(len(p.tensors) for p in parts), parts[0].metadata.get("split.tensors.count")
    if len(parts) > 1 and total not in (None, held):
        what = f"its {count} parts hold {held} of {total} tensors"
        raise InputError(f"{file}: {what}", "download them again")
    return parts


# ------------------------------------------------------------------------------------------------------------
# Metadata to config.json


@dataclass(frozen=True, slots=True)
class _Keys:
    """The metadata keys of one architecture."""

    file: Path
    prefix: str
    metadata: Mapping[str, Any]

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
            what = "differs between layers, which cannot be read yet" if isinstance(found, list) else "is no number"
            raise InputError(f"{self.file}: '{self.prefix}.{key}' {what}")
        return found


def find_architecture(first: Part) -> Architecture:
    """Returns the architecture that the header names.

    Raises:
        InputError: it is no model, or of an architecture that cannot be read.
    """
    file, metadata = first.file, first.metadata
    kind, name = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind != "model":
        raise InputError(f"{file}: a GGUF file of type '{kind}', not a model")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{file}: GGUF architecture '{name}' cannot be read yet", f"known are {known}")
    if metadata.get(f"{name}.expert_count"):
        raise InputError(f"{file}: a mixture of experts of GGUF architecture '{name}' cannot be read yet")
    return ARCHITECTURES[name]


def read_config(first: Part, tensors: Mapping[str, Stored], factors: Stored | None) -> dict[str, Any]:
    """Returns the transformers config of a model.

    Args:
        first: The header that holds its metadata.
        tensors: Its tensors by transformers name.
        factors: Its divisors of the rotary frequencies, if it has any.

    Raises:
        InputError: the architecture or one of its options is unknown, or a key is missing.
    """
    architecture, metadata = find_architecture(first), first.metadata
    keys = _Keys(first.file, metadata["general.architecture"], metadata)
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
    }
    config |= {ours: keys.whole(theirs) for theirs, ours in _KEYS.items()}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = keys.whole("attention.head_count_kv", heads)
    config["head_dim"] = head_dim = keys.whole("attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.whole(key, head_dim) != head_dim:
            what = f"'{keys.prefix}.{key}' differs from the head size {head_dim}, which cannot be read yet"
            raise InputError(f"{first.file}: {what}")
    config["rms_norm_eps"] = keys.number("attention.layer_norm_rms_epsilon")
    config["hidden_act"] = "silu"
    if "model.embed_tokens.weight" not in tensors:
        raise InputError(f"{first.file}: lacks tensor 'token_embd.weight'")
    config["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    for flag, leaves in architecture.biases.items():
        if flag:
            config[flag] = f"model.layers.0.{leaves[0]}.bias" in tensors
    config |= _rope(keys, head_dim, config["max_position_embeddings"], factors)
    # A sentencepiece vocabulary that names no ids has llama.cpp's; a byte-level one has none.
    ids = {"bos": 1, "eos": 2} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        config[f"{ours}_token_id"] = metadata.get(f"tokenizer.ggml.{theirs}_token_id", ids.get(ours))
    return config | {"dtype": _dtype_name(tensors)}


def _dtype_name(tensors: Mapping[str, Stored]) -> str:
    """Returns the dtype to compute in; norms are float32 in every file and only count when all else is."""
    schemes = {stored.scheme for stored in tensors.values()}
    if Plain(torch.bfloat16) in schemes or any(isinstance(scheme, GGMLBlock) for scheme in schemes):
        return "bfloat16"
    return "float16" if Plain(torch.float16) in schemes else "float32"


def _rope(keys: _Keys, head_dim: int, context: int, factors: Stored | None) -> dict[str, Any]:
    """Returns the rotary settings, under transformers 5's one key and the two that older readers know."""
    theta, start = keys.number("rope.freq_base", 10000.0), f"{keys.prefix}.rope.scaling."
    scaling = {k.removeprefix(start): v for k, v in keys.metadata.items() if k.startswith(start)}
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    kind = scaling.get("type", "none" if factor in (0, 1) else "linear")
    # What only GGUF can state must be neutral; `finetuned` tells of the past and changes nothing.
    neutral = {"yarn_ext_factor": (1, -1), "yarn_attn_factor": (1,), "attn_factor": (1,)}
    known = {"type", "factor", "finetuned", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"}
    odd = sorted(k for k, v in scaling.items() if k not in known and v not in neutral.get(k, ()))
    if kind not in ("none", "linear", "yarn") or odd:
        what = f"rope scaling '{kind}'" + (f" with {', '.join(odd)}" if odd else "")
        raise InputError(f"{keys.file}: {what} cannot be read yet")
    found: dict[str, Any] = {}
    if kind == "yarn":
        found = {"rope_type": "yarn", "factor": factor}
        found["original_max_position_embeddings"] = scaling.get("original_context_length", context)
        found |= {k: scaling[f"yarn_{k}"] for k in ("beta_fast", "beta_slow") if f"yarn_{k}" in scaling}
    elif kind == "linear" and factor not in (0, 1):
        found = {"rope_type": "linear", "factor": factor}
    values = [] if factors is None else [float(str(v)) for v in read_rows(factors.extent).float().numpy()]
    if any(value != 1 for value in values):
        llama3 = llama3_rope(values, theta, head_dim)
        if llama3 is None or found:
            what = f"'{_ROPE_FACTORS}' scales the rotary frequencies in a way that no config.json states"
            raise InputError(f"{keys.file}: {what}", "use the model it was made from")
        found = llama3
    older = {"rope_theta": theta} | ({"rope_scaling": found} if found else {})
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | found} | older


def llama3_rope(factors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any] | None:
    """Returns the 'llama3' parameters that make exactly these divisors of the rotary frequencies, or None.

    Only the ratios of the two limits and the original context show in the divisors, so the limits are taken
    as the 1 and 4 of all published models. Then the last divisor is the factor, each one between gives the
    context, and the whole list, computed anew, must agree to float32's precision.
    """
    low, high, factor = 1.0, 4.0, factors[-1]
    # How often each frequency turns per position.
    turns = [theta ** (-2 * i / head_dim) / (2 * math.pi) for i in range(len(factors))]
    if len(factors) != head_dim // 2 or factor <= 1:
        return None

    def divisor(turn: float, context: int) -> float:
        smooth = min(max((context * turn - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - smooth) / factor + smooth)

    contexts = {8192}
    for value, turn in zip(factors, turns, strict=True):
        if 1 < value < factor:
            smooth = (1 / value - 1 / factor) / (1 - 1 / factor)
            contexts.add(round((smooth * (high - low) + low) / turn))
    for context in sorted(contexts):
        made = [divisor(turn, context) for turn in turns]
        if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(made, factors, strict=True)):
            found = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
            }
            return found | {"original_max_position_embeddings": context}
    return None


# ------------------------------------------------------------------------------------------------------------
# Tokenizer


# How a byte-level vocabulary splits text, by `tokenizer.ggml.pre`. transformers knows the expressions of the
# first three sets and splits by GPT-2's for every other name, so names outside all these sets are refused.
_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
           "jina-v5-nano"}  # fmt: skip
_WHOLE_PIECES = _LLAMA3 | {"tekken"}  # a piece that is itself a token is not merged up to it
_MERGED = {"dbrx", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"}
_DIGITS_APART = {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"}
_LIKE_GPT2 = {"gpt-2", "phi-2", "olmo", "jais", "trillion", "exaone4", "gigachat", "a.x-4.0", "mellum"}
_SPLITS = _WHOLE_PIECES | _MERGED | _DIGITS_APART | _LIKE_GPT2
# What the tokenizer that transformers builds says of this load and not of the model.
_LOAD_KEYS = ("is_local", "local_files_only", "name_or_path", "vocab_file", "added_tokens_decoder", "backend")


def save_tokenizer(part: Part, folder: Path) -> None:
    """Writes the tokenizer that a header describes as Hugging Face files; nothing when it describes none.

    Raises:
        InputError: its kind, or its way of splitting text, is not known.
    """
    metadata = part.metadata
    kind = metadata.get("tokenizer.ggml.model")
    pre = str(metadata.get("tokenizer.ggml.pre")) if kind == "gpt2" else ""  # of no meaning to the other kind
    if kind in (None, "none", "no_vocab"):
        return
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{part.file}: its tokenizer is of kind '{kind}', which cannot be read yet")
    if kind == "gpt2" and pre not in _SPLITS:
        what = f"tokenizer.ggml.pre is '{pre}': how it splits text is not known"
        raise InputError(f"{part.file}: {what}", "use the model it was made from")
    from transformers import PreTrainedTokenizerFast

    try:
        # Not AutoTokenizer, which reads the whole header once more, slowly, to find an architecture we know.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(part.file.parent), gguf_file=part.file.name, local_files_only=True
        )
    except Exception as error:  # whatever a broken vocabulary makes the libraries raise
        raise InputError(f"{part.file}: its tokenizer cannot be rebuilt: {error}") from error
    spaced = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    _set_splitting(tokenizer.backend_tokenizer, kind, pre, spaced)
    if pre in _LLAMA3:  # llama.cpp's default for these
        tokenizer.add_bos_token = bool(metadata.get("tokenizer.ggml.add_bos_token", True))
    start = "tokenizer.chat_template."
    templates = {k.removeprefix(start): v for k, v in metadata.items() if k.startswith(start)}
    if templates:
        tokenizer.chat_template = templates | {"default": metadata.get("tokenizer.chat_template", "")}
    tokenizer.save_pretrained(folder)
    _tidy(folder / "tokenizer_config.json", metadata)


def _set_splitting(backend: Any, kind: str, pre: str, spaced: bool) -> None:
    """Makes a tokenizer split as llama.cpp does, where transformers' reading of GGUF does not.

    Args:
        backend: The `tokenizers.Tokenizer`, changed in place.
        kind: `llama` (sentencepiece) or `gpt2` (byte-level).
        pre: The header's name for how a byte-level vocabulary splits.
        spaced: Whether a sentencepiece vocabulary puts a space in front of the text.
    """
    from tokenizers import decoders, normalizers, pre_tokenizers

    if kind == "llama":
        # Every space becomes its mark, one more goes in front, and nothing is split before merging.
        prefix = [normalizers.Prepend("▁")] if spaced else []
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        strip = [decoders.Strip(" ", 1, 0)] if spaced else []
        marks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*marks, *strip])
    elif pre in _DIGITS_APART:
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.model.ignore_merges = pre in _WHOLE_PIECES


def _tidy(file: Path, metadata: Mapping[str, Any]) -> None:
    """Rewrites a tokenizer config: nothing of this load, and a class that older readers know too."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in _LOAD_KEYS}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if context := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        config["model_max_length"] = context
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# Checkpoint and format


class GGUFCheckpoint:
    """A GGUF model under transformers' names, shapes and row order."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = read_parts(path)
        self._first = parts[0]
        self.metadata: dict[str, Any] = self._first.metadata
        self._architecture = find_architecture(self._first)
        self._stored: dict[str, Stored] = {}
        self.dropped: dict[str, str] = {}
        factors = None
        for part in parts:
            for name, stored in part.tensors.items():
                if name == _ROPE_FACTORS:
                    self.dropped[name], factors = "the config states what makes it", stored
                    continue
                renamed = self._architecture.rename(name)
                if renamed is None or renamed in self._stored:
                    kind = self.metadata["general.architecture"]
                    what = "is held by two parts" if renamed else f"is none of architecture '{kind}'"
                    raise InputError(f"{part.file}: tensor '{name}' {what}")
                self._stored[renamed] = stored
        self.config = read_config(self._first, self._stored, factors)
        self._check_names()

    def _check_names(self) -> None:
        """Refuses a file that lacks a tensor of its architecture, or has one too many."""
        expected = self._architecture.names(self.config)
        if missing := sorted(expected - self._stored.keys()):
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise InputError(f"{self.path}: lacks tensor '{missing[0]}'{others}")
        if surplus := sorted(self._stored.keys() - expected):
            layers = self.config["num_hidden_layers"]
            raise InputError(f"{self.path}: a model of {layers} layers has no tensor '{surplus[0]}'")
        for name in self._stored:
            self._heads(name)

    def _heads(self, name: str) -> int:
        """Returns the number of heads whose rows are stored in pairs, or 0 for tensors stored as they are."""
        leaf = name.split(".")[-2] if self._architecture.permuted else ""
        key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(leaf)
        if key is None:
            return 0
        heads: int = self.config[key]
        rows, head_dim = self._stored[name].shape[0], self.config["head_dim"]
        if rows != heads * head_dim or head_dim % 2:
            raise InputError(f"{self.path}: '{name}' has {rows} rows, not {heads} heads of {head_dim}")
        return heads

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All logical tensors, in file order."""
        return {n: TensorInfo(n, s.shape, s.scheme, s.extent.nbytes) for n, s in self._stored.items()}

    @property
    def quantization(self) -> dict[str, Any]:
        """The file type that the header names, when any tensor is quantized."""
        if not any(isinstance(stored.scheme, GGMLBlock) for stored in self._stored.values()):
            return {}
        from gguf import LlamaFileType

        number = self.metadata.get("general.file_type")
        names = [kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType if kind == number]
        return {"quant_method": "gguf", "file_type": names[0] if names else number}

    @cached_property
    def side_files(self) -> Mapping[str, Path]:
        """Tokenizer and generation config, built from the metadata in a temporary folder of this object."""
        folder = Path(tempfile.mkdtemp(prefix="quantize-gguf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        save_tokenizer(self._first, folder)
        (folder / "generation_config.json").write_text(json.dumps(self._generation(), indent=2) + "\n")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file for file in files}

    def _generation(self) -> dict[str, Any]:
        """Returns the ids that generation starts, pads and ends with; turns and messages may have theirs."""
        ends = [self.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eot", "eom")]
        ends = list(dict.fromkeys(end for end in (self.config["eos_token_id"], *ends) if end is not None))
        ids = {"bos_token_id": self.config["bos_token_id"], "pad_token_id": self.config["pad_token_id"]}
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
        return {key: value for key, value in ids.items() if value is not None}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows of a tensor: in its own dtype when plain, decoded to float32 when not."""
        stored = self._stored[name]
        rows = self._read_rows(name, start, stop)
        if isinstance(stored.scheme, Plain):
            return rows
        shape = (rows.shape[0], *stored.shape[1:])
        return QuantizedTensor(stored.scheme, shape, {"blocks": rows}).dequantize()

    def file(self, name: str) -> Path:
        """Returns the part that holds a tensor."""
        return self._stored[name].extent.file

    def read_coded(self, name: str) -> QuantizedTensor | None:
        """Returns the blocks of a quantized tensor, or None for a plain one."""
        stored = self._stored[name]
        if isinstance(stored.scheme, Plain):
            return None
        return QuantizedTensor(stored.scheme, stored.shape, {"blocks": self._read_rows(name, 0, None)})

    def _read_rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Returns rows as they are coded, in transformers' order.

        Within a head of size d, row `half * d/2 + i` is stored as row `2 * i + half`. Only the heads that the
        range touches are read, and blocks are moved before anything decodes them.
        """
        stored, heads = self._stored[name], self._heads(name)
        if not heads:
            return read_rows(stored.extent, start, stop)
        size = stored.shape[0] // heads
        stop = stored.shape[0] if stop is None else min(stop, stored.shape[0])
        wanted = torch.arange(start, stop)
        head, row = wanted // size, wanted % size
        first = start // size * size
        held = read_rows(stored.extent, first, -(-stop // size) * size)
        return held[head * size + row % (size // 2) * 2 + row // (size // 2) - first]


class GGUFFormat:
    """Reader of GGUF files."""

    name = "gguf"
    summary = "GGUF: llama.cpp, Ollama, LM Studio; read only so far"
    one_group = False

    def sniff(self, path: Path) -> bool:
        """Returns whether `path` is a file that is GGUF or called so, or a folder with such files only.

        A broken file of that name and a folder of several models are claimed too: `open` says what is wrong.
        """
        if path.is_dir():
            return not is_folder(path) and any(path.glob("*.gguf"))
        if path.suffix == ".gguf" or not path.is_file():
            return path.is_file()
        try:
            with path.open("rb") as stream:
                return stream.read(4) == b"GGUF"
        except OSError:
            return False

    def open(self, path: Path) -> Checkpoint:
        """Returns the model at `path` as a checkpoint."""
        return GGUFCheckpoint(path)

    def reject(self, scheme: Scheme) -> str | None:
        """Returns the reason why nothing can be written yet."""
        return "GGUF cannot be written yet"

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns None: `reject` refuses everything already."""
        return None

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Raises InputError: there is no writer yet."""
        raise InputError("GGUF cannot be written yet")

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Raises InputError: there is no writer yet."""
        raise InputError("GGUF cannot be written yet")

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Raises InputError: there is no writer yet."""
        raise InputError("GGUF cannot be written yet")

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns no groups: every tensor of a GGUF file may have its own type."""
        return []
