"""EXL2 folders: mixed bit widths inside every matrix, as exllamav2 writes and loads them.

Per linear of K inputs and N outputs, N rounded up to 32, in G groups of inputs:

    q_weight      int32   [words, N]    codes down the inputs in packed order, one stream of bits per output and group
    q_scale       int32   [G, N / 8]    scale step of each output, 4 bits, lowest first
    q_scale_max   float16 [G]           what the steps are of
    q_groups      int16   [2 G]         bits and first row of q_weight of each group, bits never rising
    q_invperm     int32   [K]           packed position of each input

The widths must not rise: engines count the rows of each width and walk from the widest to the narrowest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.exl2_scheme import EXL2, WIDEST
from quantize.formats import bitstream
from quantize.formats.base import Checkpoint, Piece, TensorInfo
from quantize.formats.container import Extent, read_rows
from quantize.formats.exl2_folder import height, holds_codes, stored_extents
from quantize.formats.folder import (
    FolderFormat,
    PackedCheckpoint,
    is_folder,
    read_json,
    refuse_other_kinds,
    take_quantization,
)
from quantize.kernels.exl2 import WIDTHS, Groups
from quantize.schemes import Plain, QuantizedTensor, Scheme, Shape

_PARTS = (".q_weight", ".q_scale", ".q_scale_max", ".q_groups", ".q_invperm")
_TYPES = (torch.int32, torch.int32, torch.float16, torch.int16, torch.int32)
# Outputs are padded to, and inputs come in, multiples of this.
_RUN = 32
# Steps of eight outputs share a word.
_STEPS = 8
# The version of exllamav2 whose layout this is.
_VERSION = "0.3.2"
# Matrices that exllamav2 takes together: each must be quantized if any is.
_WHOLES = (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"))


def pack_steps(steps: Tensor) -> Tensor:
    """Returns steps uint8 `[groups, N]` as int32 words `[groups, N / 8]`; undone by `unpack_steps`."""
    return bitstream.pack(steps.T, 4).T.contiguous()


def unpack_steps(words: Tensor) -> Tensor:
    """Returns the steps of int32 words `[groups, N / 8]`, uint8 `[groups, N]`."""
    return bitstream.unpack(words.T, 4).T


def pack_codes(codes: Tensor, groups: Groups) -> Tensor:
    """Returns codes uint8 `[K, N]`, rows in packed order, as words; undone by `unpack_codes`.

    Returns:
        int32 `[sum of bits * columns / 32, N]`, the groups below one another.
    """
    parts = torch.split(codes, [columns for _, columns in groups])
    return torch.cat([bitstream.pack(part, bits) for part, (bits, _) in zip(parts, groups, strict=True)])


def unpack_codes(words: Tensor, groups: Groups) -> Tensor:
    """Returns the codes of int32 words, uint8 `[K, N]`, rows in packed order."""
    parts = torch.split(words, [_words(bits, columns) for bits, columns in groups])
    return torch.cat([bitstream.unpack(part, bits) for part, (bits, _) in zip(parts, groups, strict=True)])


def _words(bits: int, columns: int) -> int:
    return bits * columns // bitstream.WORD


class EXL2Checkpoint(PackedCheckpoint):
    """An EXL2 folder; `NAME.q_weight` and its four companions form tensor `NAME.weight`."""

    format = "exl2"
    parts = _PARTS

    def __init__(self, path: Path) -> None:
        # not the base's: that one believes the index
        refuse_other_kinds(path)
        self.path = path
        self.config = read_json(path / "config.json")
        self.quantization = take_quantization(path, self.config)
        stored = stored_extents(path)
        self.dropped = {name: "follows from q_invperm" for name in stored if name.endswith(".q_perm")}
        self.extents = {name: extent for name, extent in stored.items() if name not in self.dropped}
        if not self._coded:
            raise InputError(
                f"{path}: said to be quantized with exl2, but no tensor is", "use the model it was made from"
            )
        if "lm_head" in self._coded.values():  # engines take this head, whatever the config says
            for holder in (self.config, self.config.get("text_config")):
                if isinstance(holder, dict):
                    holder["tie_word_embeddings"] = False

    def _assemble(self) -> dict[str, TensorInfo]:
        """Returns the tensors; a bias has the padding of its matrix, which is cut off."""
        tensors = super()._assemble()
        for module in self._coded.values():
            name = f"{module}.bias"
            if name in tensors:
                info = tensors[name]
                rows = height(self.config, module, info.shape[0]) if info.shape else 0
                tensors[name] = replace(info, shape=(rows,))
        return tensors

    def _info(self, module: str) -> TensorInfo:
        extents = self._extents(module)
        words, steps, maxima, table, order = extents
        count, padded = len(table.shape) and table.shape[0] // 2, words.shape[-1] if words.shape else 0
        right = (
            tuple(extent.dtype for extent in extents) == _TYPES
            and [len(extent.shape) for extent in extents] == [2, 2, 1, 1, 1]
            and table.shape == (2 * count,)
            and count > 0
            and maxima.shape == (count,)
            and steps.shape == (count, padded // _STEPS)
            and padded > 0
            and padded % _RUN == 0
        )
        if not right:
            raise InputError(
                f"{words.file}: the shapes or types of '{module}.q_weight' and its companions do not agree"
            )
        groups = self._groups(module, words, read_rows(table).tolist())
        cols = sum(columns for _, columns in groups)
        if cols != order.shape[0]:
            raise InputError(
                f"{words.file}: the groups of '{module}' have {cols} channels, its q_invperm has {order.shape[0]}",
                "download it again",
            )
        if cols > WIDEST:
            raise InputError(f"{words.file}: '{module}' has {cols} channels, engines read no more than {WIDEST}")
        shape = (height(self.config, module, padded), cols)
        return TensorInfo(f"{module}.weight", shape, EXL2.of_groups(groups), sum(e.nbytes for e in extents))

    def _extents(self, module: str) -> tuple[Extent, ...]:
        try:
            return tuple(self.extents[module + part] for part in _PARTS)
        except KeyError as error:
            raise InputError(f"{self.path}: lacks tensor '{error.args[0]}'", "download it again") from None

    @staticmethod
    def _groups(module: str, words: Extent, table: Sequence[int]) -> list[tuple[int, int]]:
        """Returns bits and columns of each group, from widths and starts as q_groups has them.

        Raises:
            InputError: engines would read something else from them.
        """
        widths, starts = table[::2], table[1::2]
        ends = [*starts[1:], words.shape[0]]
        groups: list[tuple[int, int]] = []
        wrong = ""
        if starts[0] != 0:
            wrong = f"the first group starts at row {starts[0]}"
        elif list(widths) != sorted(widths, reverse=True):
            wrong = "widths rise from one group to the next"
        for number, (bits, start, end) in enumerate(zip(widths, starts, ends, strict=True)):
            if wrong:
                break
            if bits not in WIDTHS:
                wrong = f"group {number} has codes of {bits} bits"
            elif end <= start or (end - start) % bits:
                wrong = f"group {number} of {bits} bits runs from row {start} to {end}"
            else:
                groups.append((bits, (end - start) * bitstream.WORD // bits))
        if wrong:
            raise InputError(f"{words.file}: '{module}.q_groups' is broken: {wrong}", "download it again")
        return groups

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows of a tensor, dequantized to float32 where it is quantized; no padding."""
        coded = self._codes(name, start, stop)
        if coded is not None:
            return coded.dequantize()
        if f"{name.removesuffix('.bias')}.weight" in self._coded:
            rows = self.tensors[name].shape[0]
            stop = rows if stop is None else min(stop, rows)
        return super().read(name, start, stop)

    def _codes(self, name: str, start: int, stop: int | None) -> QuantizedTensor | None:
        """Returns rows of a quantized tensor. They lie across the file, so all is read, but only they are unpacked."""
        module = self._coded.get(name)
        if module is None:
            return None
        info = self.tensors[name]
        scheme, (rows, cols) = info.scheme, info.shape
        assert isinstance(scheme, EXL2)
        stop = rows if stop is None else min(stop, rows)
        words, steps, maxima, _, place = map(read_rows, self._extents(module))
        file = self.file(name)
        order = place.long().argsort()
        if not torch.equal(place[order].long(), torch.arange(cols)):
            raise InputError(f"{file}: '{module}.q_invperm' is no order of {cols} channels", "download it again")
        if not bool(((maxima >= 0) & maxima.isfinite()).all()):
            raise InputError(
                f"{file}: '{module}.q_scale_max' holds negative, infinite or no numbers", "download it again"
            )
        codes = unpack_codes(words[:, start:stop], scheme.groups(cols)).T.contiguous()
        return scheme.coded(codes, unpack_steps(steps)[:, start:stop].T.contiguous(), maxima, order)


class EXL2Format(FolderFormat):
    """Reader and writer of EXL2 folders."""

    name = "exl2"
    summary = "EXL2, 2 to 8 bits mixed in every matrix: exllamav2, TabbyAPI, Aphrodite"
    one_group = False

    def sniff(self, path: Path) -> bool:
        """Returns whether the folder's config names EXL2, or says nothing and there are its tensors."""
        if not is_folder(path) or not (path / "config.json").is_file():
            return False
        block = take_quantization(path, read_json(path / "config.json"))
        return str(block.get("quant_method")).lower() == "exl2" or (not block and holds_codes(path))

    def open(self, path: Path) -> Checkpoint:
        """Returns the folder as a checkpoint."""
        return EXL2Checkpoint(path)

    def file_names(self, out: str, count: int) -> list[str]:
        """Returns exllamav2's names of the shards."""
        if count == 1:
            return ["output.safetensors"]
        return [f"output-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]

    def reject(self, scheme: Scheme) -> str | None:
        """Returns a reason for grids other than EXL2's."""
        return None if isinstance(scheme, Plain | EXL2) else "EXL2 holds its own grids only"

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns why a matrix cannot be packed, or None."""
        return None if name.endswith(".weight") else "its name does not end in .weight"

    def notices(self, schemes: Mapping[str, Scheme]) -> list[str]:
        """Returns a line if exllamav2 would refuse attentions or feed-forwards that are quantized in part."""
        parts: dict[tuple[str, int], dict[str, Scheme]] = {}
        for name, scheme in schemes.items():
            stem, _, leaf = name.removesuffix(".weight").rpartition(".")
            for kind, leaves in enumerate(_WHOLES):
                if leaf in leaves:
                    parts.setdefault((stem, kind), {})[leaf] = scheme
        torn: list[tuple[str, str]] = []
        for (stem, _), found in parts.items():
            kept = [leaf for leaf, scheme in found.items() if isinstance(scheme, Plain)]
            if 0 < len(kept) < len(found):
                torn.append((stem, kept[0]))
        if not torn:
            return []
        (module, leaf), count = torn[0], len(torn)
        return [f"exllamav2 wants all of {module} quantized or nothing, and {leaf} is not ({count} such parts)"]

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Returns the five arrays of a quantized linear, or the tensor itself."""
        if isinstance(scheme, Plain):
            return [Piece(name, scheme.dtype, shape)]
        assert isinstance(scheme, EXL2)
        (rows, cols), module = shape, name.removesuffix(".weight")
        padded = -(-rows // _RUN) * _RUN
        groups = scheme.groups(cols)
        words = sum(_words(bits, columns) for bits, columns in groups)
        shapes = ((words, padded), (len(groups), padded // _STEPS), (len(groups),), (2 * len(groups),), (cols,))
        return [Piece(module + part, t, s) for part, t, s in zip(_PARTS, _TYPES, shapes, strict=True)]

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the packed arrays, input-major. Outputs that pad are 0 whatever their scale."""
        scheme = coded.scheme
        if isinstance(scheme, Plain):
            return {name: coded.arrays["values"]}
        assert isinstance(scheme, EXL2)
        module, rows, groups = name.removesuffix(".weight"), coded.shape[0], scheme.groups(coded.shape[1])
        maxima, order = coded.arrays["maxima"], coded.arrays["order"]
        assert torch.equal(maxima, maxima[:1].expand_as(maxima)), f"{name}: coded a run of rows at a time"
        codes = _padding(groups, -(-rows // _RUN) * _RUN)
        codes[:, :rows] = coded.arrays["codes"].T
        steps = torch.zeros(len(groups), codes.shape[1], dtype=torch.uint8)
        steps[:, :rows] = coded.arrays["steps"].T
        packed = (
            pack_codes(codes, groups),
            pack_steps(steps),
            maxima[0].contiguous(),
            _table(groups),
            order[0].argsort().to(torch.int32),
        )
        return {module + part: array for part, array in zip(_PARTS, packed, strict=True)}

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Returns the block that exllamav2 writes; it is for people, loaders go by the tensors.

        `bits` are those of the codes, every linear counted alike: heights and widths are not known here.
        """
        bits = {name: scheme.code_bits for name, scheme in schemes.items() if isinstance(scheme, EXL2)}
        head = bits.pop("lm_head.weight", None)
        body = list(bits.values()) or ([] if head is None else [head])
        block = {"quant_method": "exl2", "version": _VERSION, "bits": round(sum(body) / len(body), 2)}
        return block if head is None else block | {"head_bits": round(head)}

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns no groups: every matrix may have widths of its own."""
        return []


def _padding(groups: Groups, rows: int) -> Tensor:
    """Returns codes that mean 0, uint8 `[K, rows]`."""
    middles = [torch.full((columns, rows), 2 ** (bits - 1), dtype=torch.uint8) for bits, columns in groups]
    return torch.cat(middles)


def _table(groups: Groups) -> Tensor:
    """Returns bits and first row of words of each group, int16 `[2 * groups]`."""
    table: list[int] = []
    row = 0
    for bits, columns in groups:
        table += [bits, row]
        row += _words(bits, columns)
    return torch.tensor(table, dtype=torch.int16)
