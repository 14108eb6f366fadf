"""GPTQ checkpoints: what AutoGPTQ and GPTQModel write and transformers, vLLM and SGLang read.

Per linear of K inputs and N outputs, with `bits` 2, 3, 4 or 8: `qweight` int32 `[K * bits / 32, N]`, codes as one
stream of bits down the inputs; `qzeros` int32 `[groups, N * bits / 32]`, zero points as one stream along the outputs;
`scales` float16 `[groups, N]`; `g_idx` int32 `[K]`, the group of each input. The matrix is stored input-major.

There are two versions. Version 1, `gptq`, holds each zero point less 1 and so cannot hold 0; every engine reads it.
Version 2, `gptq_v2`, holds them as they are. We write version 1 where all tensors are symmetric, and version 2 as soon
as one is not, or where it is asked for by name. The config always says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.formats import bitstream, gptq_config
from quantize.formats.base import Checkpoint, Piece, TensorInfo
from quantize.formats.container import Extent, read_rows
from quantize.formats.folder import FolderFormat, PackedCheckpoint, is_folder, read_json
from quantize.formats.fused import fused_tensors
from quantize.formats.gptq_config import BITS, V1, V2, Declared
from quantize.schemes import AffineInt, Plain, QuantizedTensor, Scheme, Shape

_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
# GPTQModel packs and unpacks no other heights and widths.
_MULTIPLE = 32


class GPTQCheckpoint(PackedCheckpoint):
    """A GPTQ folder; `NAME.qweight`, `NAME.qzeros`, `NAME.scales` and `NAME.g_idx` form tensor `NAME.weight`."""

    format = "gptq"
    parts = _PARTS

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.quantization = gptq_config.find_block(path, read_json(path / "config.json"))
        self._declared: Declared = gptq_config.declared(path, self.quantization)
        if not self._coded:
            raise InputError(
                f"{path}: said to be quantized with gptq, but no tensor is", "use the model it was made from"
            )

    def _info(self, module: str) -> TensorInfo:
        try:
            words, zeros, scales = (self.extents[module + part] for part in _PARTS[:3])
        except KeyError as error:
            raise InputError(f"{self.path}: lacks tensor '{error.args[0]}'") from None
        order = self.extents.get(f"{module}.g_idx")
        settings = self._declared.of(module)
        if not len(words.shape) == len(zeros.shape) == len(scales.shape) == 2 or not scales.dtype.is_floating_point:
            raise self._disagreement(words, module)
        groups, rows = scales.shape
        bits = zeros.shape[1] * bitstream.WORD // rows if rows else 0
        if bits not in BITS or zeros.shape != (groups, rows * bits // bitstream.WORD) or not groups:
            raise self._disagreement(words, module)
        cols = words.shape[0] * bitstream.WORD // bits
        shapes = words.shape == (cols * bits // bitstream.WORD, rows) and (order is None or order.shape == (cols,))
        if not shapes or (words.dtype, zeros.dtype) != (torch.int32, torch.int32):
            raise self._disagreement(words, module)
        said = settings.get("bits", bits)
        if said != bits:
            raise self._contradiction(words, f"'{module}' has codes of {bits} bits", said)
        group = self._group(words, module, cols, groups, settings.get("group_size"))
        if order is None and settings.get("desc_act"):
            raise InputError(f"{words.file}: lacks tensor '{module}.g_idx', the order of its columns (desc_act)")
        nbytes = words.nbytes + zeros.nbytes + scales.nbytes + (order.nbytes if order else 0)
        scheme = AffineInt(bits, group, bool(settings.get("sym", False)))
        return TensorInfo(f"{module}.weight", (rows, cols), scheme, nbytes)

    def _group(self, words: Extent, module: str, cols: int, groups: int, said: Any) -> int:
        """Returns the group size that the shapes and the config agree on; the last group may be shorter."""
        if said is None:
            said = -1 if groups == 1 else -(-cols // groups)
        if not isinstance(said, int) or said == 0 or groups != (1 if said < 0 else -(-cols // said)):
            found = f"'{module}' has {groups} groups in {cols} columns"
            raise self._contradiction(words, found, f"groups of {said}")
        return max(said, -1)

    @staticmethod
    def _contradiction(words: Extent, found: str, said: Any) -> InputError:
        return InputError(
            f"{words.file}: {found}, its config says {said}", "the file or its config is broken: download both again"
        )

    @staticmethod
    def _disagreement(words: Extent, module: str) -> InputError:
        return InputError(f"{words.file}: the shapes or types of '{module}.qweight', qzeros and scales do not agree")

    def _codes(self, name: str, start: int, stop: int | None) -> QuantizedTensor | None:
        """Returns rows of a quantized tensor. They lie across the file, so all is read, but only they are unpacked."""
        module = self._coded.get(name)
        if module is None:
            return None
        info = self.tensors[name]
        scheme, (rows, cols) = info.scheme, info.shape
        assert isinstance(scheme, AffineInt)
        stop = rows if stop is None else min(stop, rows)
        words, scales = (read_rows(self.extents[module + part]) for part in (".qweight", ".scales"))
        arrays = {
            "codes": bitstream.unpack(words[:, start:stop], scheme.bits).T.contiguous(),
            "scales": scales[:, start:stop].T.contiguous(),
            "zeros": self._zeros(module, scheme)[start:stop].contiguous(),
        }
        groups = self._groups(module, scheme.group(cols), cols)
        if groups is not None:
            arrays["groups"] = groups.expand(stop - start, cols)
        return QuantizedTensor(scheme, (stop - start, cols), arrays)

    def _groups(self, module: str, size: int, cols: int) -> Tensor | None:
        """Returns the group of each column, int64 `[cols]`, or None where groups are whole and in order."""
        plain = torch.arange(cols) // size
        extent = self.extents.get(f"{module}.g_idx")
        order = plain if extent is None else read_rows(extent).long()
        if not order.any():  # written by tools that fill it in when they load
            order = plain
        if int(order.min()) < 0 or int(order.max()) > int(plain[-1]):
            file = self.extents[f"{module}.qweight"].file
            raise InputError(f"{file}: '{module}.g_idx' names a group that '{module}.scales' does not hold")
        return None if cols % size == 0 and torch.equal(order, plain) else order

    def _zeros(self, module: str, scheme: AffineInt) -> Tensor:
        """Returns the zero codes of all rows, uint8 `[rows, groups]`.

        Raises:
            InputError: version 1 and what is stored do not go together.
        """
        extent = self.extents[f"{module}.qzeros"]
        words = read_rows(extent).T
        stored = bitstream.unpack(words, scheme.bits)
        if scheme.symmetric:
            return self._symmetric(extent.file, module, scheme.bits, stored)
        if self._declared.version == V2:
            return stored
        if self._declared.borrowed and scheme.bits != 3:
            # 1 was taken from all fields of a word at once: adding it at once undoes what they borrowed
            return bitstream.unpack(words + bitstream.fields(1, scheme.bits), scheme.bits)
        if not self._declared.borrowed and _damaged(words, scheme.bits):
            raise InputError(
                f"{extent.file}: '{module}.qzeros' has lost zero points: its packer stored 0 - 1 over their neighbours",
                "use the model it was made from",
            )
        return (stored + 1).bitwise_and_(2**scheme.bits - 1)

    def _symmetric(self, file: Path, module: str, bits: int, stored: Tensor) -> Tensor:
        """Returns the middle code for all groups, if what is stored is that in the version that the config says."""
        middle = 2 ** (bits - 1)
        least, most = (int(value) for value in stored.aminmax())
        version = {middle - 1: V1, middle: V2}.get(least) if least == most else None
        if version is None or self._declared.version not in (None, version):
            told = self._declared.version or "sym"
            found = f"{least}" if least == most else f"{least} to {most}"
            raise InputError(
                f"{file}: '{module}.qzeros' holds {found}, which its config ({told}, sym) contradicts",
                f"if engines read it well, set checkpoint_format to {version}" if version else "download it again",
            )
        return torch.full_like(stored, middle)


def _damaged(words: Tensor, bits: int) -> bool:
    """Returns whether the two highest fields of a word are all ones: what -1 leaves when it is put over a word whole.

    A single one may be an honest zero point of 0 in the highest field, which loses nothing.
    """
    return bool((words >> (bitstream.WORD - 2 * bits) == -1).any())


class GPTQFormat(FolderFormat):
    """Reader and writer of GPTQ folders.

    Args:
        name: What `--format` calls it.
        summary: Which engines load it.
        version: The version to write; None for the first, or the second where a tensor needs it.
    """

    one_group = True
    config_copies = ("quantize_config.json",)

    def __init__(self, name: str, summary: str, version: str | None = None) -> None:
        self.name = name
        self.summary = summary
        self._version = version

    def sniff(self, path: Path) -> bool:
        """Returns whether the folder's config names GPTQ; files of both versions are the first's."""
        if self.name != V1 or not is_folder(path) or not (path / "config.json").is_file():
            return False
        said = gptq_config.find_block(path, read_json(path / "config.json")).get("quant_method")
        return str(said).lower() in ("gptq", "marlin", "bitblas")

    def open(self, path: Path) -> Checkpoint:
        """Returns the folder as a checkpoint."""
        return GPTQCheckpoint(path)

    def settled(self, schemes: Mapping[str, Scheme]) -> Self:
        """Returns the format with the version that a file of such tensors needs."""
        return type(self)(self.name, self.summary, self._version_for(schemes))

    def notices(self, schemes: Mapping[str, Scheme]) -> list[str]:
        """Returns what engines cannot do with a file of such tensors, one line each."""
        return gptq_config.notices(schemes)

    def reject(self, scheme: Scheme) -> str | None:
        """Returns a reason for grids other than affine ones of 2, 3, 4 and 8 bits."""
        if isinstance(scheme, Plain):
            return None
        if type(scheme) is not AffineInt or scheme.bits not in BITS:
            return "GPTQ holds integers of 2, 3, 4 and 8 bits only"
        if scheme.group_size not in _GROUPS:
            return "GPTQ readers take group sizes 16, 32, 64, 128, 256, 512, 1024 and -1"
        return None

    def pieces(self, name: str, shape: Shape, scheme: Scheme) -> list[Piece]:
        """Returns qweight, qzeros, scales and g_idx of a quantized linear, or the tensor itself."""
        if isinstance(scheme, Plain):
            return [Piece(name, scheme.dtype, shape)]
        assert isinstance(scheme, AffineInt)
        (rows, cols), module = shape, name.removesuffix(".weight")
        groups = cols // scheme.group(cols)
        return [
            Piece(f"{module}.qweight", torch.int32, (cols * scheme.bits // bitstream.WORD, rows)),
            Piece(f"{module}.qzeros", torch.int32, (groups, rows * scheme.bits // bitstream.WORD)),
            Piece(f"{module}.scales", torch.float16, (groups, rows)),
            Piece(f"{module}.g_idx", torch.int32, (cols,)),
        ]

    def refuse_tensor(self, name: str, shape: Shape) -> str | None:
        """Returns why a matrix cannot be packed, or None: 32 codes fill whole words at every width."""
        if not name.endswith(".weight"):
            return "its name does not end in .weight"
        for what, size in zip(("height", "width"), shape, strict=False):
            if size % _MULTIPLE:
                return f"its {what} {size} is no multiple of {_MULTIPLE}"
        return None

    def pack(self, name: str, coded: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the packed arrays, input-major."""
        scheme = coded.scheme
        if isinstance(scheme, Plain):
            return {name: coded.arrays["values"]}
        assert isinstance(scheme, AffineInt)
        assert "groups" not in coded.arrays
        module, cols = name.removesuffix(".weight"), coded.shape[1]
        zeros = coded.arrays["zeros"]
        if self._version_for({name: scheme}) == V1:
            zeros = zeros - 1  # only of symmetric grids, whose zero is the middle
        return {
            f"{module}.qweight": bitstream.pack(coded.arrays["codes"].T, scheme.bits),
            f"{module}.qzeros": bitstream.pack(zeros, scheme.bits).T.contiguous(),
            f"{module}.scales": coded.arrays["scales"].T.to(torch.float16).contiguous(),
            f"{module}.g_idx": torch.arange(cols, dtype=torch.int32) // scheme.group(cols),
        }

    def quantization_config(self, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
        """Returns the block that transformers, vLLM, SGLang and GPTQModel read."""
        return gptq_config.block(schemes, self._version_for(schemes))

    def bound_together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns vLLM's fused linears: q/k/v and gate/up of one parent must be all quantized or all not."""
        return fused_tensors(names)

    def _version_for(self, schemes: Mapping[str, Scheme]) -> str:
        return self._version or (V2 if gptq_config.needs_true_zeros(schemes.values()) else V1)


GPTQ = GPTQFormat(V1, "GPTQ, 2, 3, 4, 8 bits: vLLM, SGLang (4, 8 bits symmetric), transformers with GPTQModel")
GPTQ_V2 = GPTQFormat(V2, "GPTQ with true zero points (version 2) always: GPTQModel, transformers, older vLLM", V2)
