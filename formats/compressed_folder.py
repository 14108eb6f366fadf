"""Reading compressed-tensors folders, and DeepSeek's FP8 ones: which arrays form which tensor.

By what stands beside `NAME.weight` or instead of it (rows r, columns c; scales in the model's dtype or float32):

    weight int8 or float8 [r, c]     weight_scale [1], [r, 1], [r, groups] or tiles; weight_scale_inv in DeepSeek's
    weight_packed int32 [r, words]   weight_scale [r, groups], weight_zero_point int32 [words, groups], weight_shape
    weight_packed uint8 [r, c / 2]   weight_scale float8 [r, c / 16] and weight_global_scale [1], or uint8 [r, c / 32]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.float_schemes import BLOCK, CHANNEL, FP8, MXFP4, NVFP4, TENSOR, Int8Channel, PackedInt
from quantize.formats import bitstream
from quantize.formats.base import TensorInfo
from quantize.formats.compressed_config import Group, declared
from quantize.formats.container import Extent, read_rows
from quantize.formats.folder import FolderCheckpoint
from quantize.kernels import fp4
from quantize.schemes import AffineInt, Plain, QuantizedTensor, Scheme

_SCALES = (".weight_scale", ".weight_scale_inv")
_PARTS = (".weight", ".weight_packed", *_SCALES, ".weight_zero_point", ".weight_shape", ".weight_g_idx",
          ".weight_global_scale")  # fmt: skip
# What is kept of inputs, keys and values: found anew where it is needed again.
_ACTIVATIONS = (".input_scale", ".input_zero_point", ".input_global_scale", ".activation_scale", ".output_scale",
                ".k_scale", ".v_scale", ".q_scale")  # fmt: skip
_CODES = (torch.int8, torch.float8_e4m3fn)
_POWERS = (torch.uint8, *((torch.float8_e8m0fnu,) if hasattr(torch, "float8_e8m0fnu") else ()))
_TILES = (128, 64, 32, 256)
_BITS = range(2, 9)
_HINT = "the file or its config is broken: download both again"

Arrays = Callable[[int, int], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class _Coded:
    """A quantized tensor: what the headers say of it, and how rows of its scheme's arrays are read."""

    info: TensorInfo
    arrays: Arrays


class CompressedCheckpoint(FolderCheckpoint):
    """A folder whose config names compressed-tensors, or fp8."""

    format = "compressed-tensors"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._refuse_others()
        self._declared = declared(path, self.quantization)
        activations = [name for name in self.extents if name.endswith(_ACTIVATIONS)]
        self.dropped |= dict.fromkeys(activations, "a scale of activations")
        self.extents = {name: extent for name, extent in self.extents.items() if name not in self.dropped}
        if not self._modules:
            method = self.quantization.get("quant_method")
            raise InputError(f"{path}: said to be {method}, but no codes are that", "use the model it was made from")

    def _refuse_others(self) -> None:
        """Refuses what changes the meaning of weights and is not read here."""
        sparse, turned = self.quantization.get("sparsity_config"), self.quantization.get("transform_config")
        if isinstance(sparse, dict) and sparse.get("format") not in (None, "dense"):
            raise InputError(f"{self.path}: sparse weights cannot be read", "use the model it was made from")
        if isinstance(turned, dict) and turned.get("config_groups"):
            raise InputError(f"{self.path}: rotated weights cannot be read", "use the model it was made from")

    @cached_property
    def _modules(self) -> Mapping[str, str]:
        """Tensor name to module name, for the quantized ones."""
        found: dict[str, str] = {}
        for name, extent in self.extents.items():
            module, _, part = name.rpartition(".")
            if part == "weight_packed" or (part == "weight" and extent.dtype in _CODES):
                found[f"{module}.weight"] = module
        return found

    @cached_property
    def _coded(self) -> dict[str, _Coded]:
        return {name: self._recognised(module) for name, module in self._modules.items()}

    def _assemble(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for name, extent in self.extents.items():
            stem, dot, part = name.rpartition(".")
            logical = f"{stem}.weight"
            if logical not in self._modules or dot + part not in _PARTS:
                tensors[name] = TensorInfo(name, extent.shape, Plain(extent.dtype), extent.nbytes)
            elif part in ("weight", "weight_packed"):
                tensors[logical] = self._coded[logical].info
        return tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows of a tensor, dequantized to float32 where it is quantized."""
        coded = self.read_coded(name, start, stop)
        return super().read(name, start, stop) if coded is None else coded.dequantize()

    def read_coded(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor | None:
        """Returns the codes of rows of a quantized tensor, or None for a plain one."""
        if name not in self._modules:
            return None
        found = self._coded[name]
        rows, cols = found.info.shape
        stop = rows if stop is None else min(stop, rows)
        return QuantizedTensor(found.info.scheme, (stop - start, cols), found.arrays(start, stop))

    def file(self, name: str) -> Path:
        """Returns the shard that holds the tensor, or its codes."""
        module = self._modules.get(name)
        return (self.extents[name] if module is None else self._codes_of(module)).file

    # -- one module --------------------------------------------------------------------------------------------------

    def _codes_of(self, module: str) -> Extent:
        packed = self.extents.get(f"{module}.weight_packed")
        return self.extents[f"{module}.weight"] if packed is None else packed

    def _recognised(self, module: str) -> _Coded:
        """Returns how a module is stored, from its arrays' types and shapes, which the config must not contradict."""
        codes, group = self._codes_of(module), self._declared.of(module)
        scale = next((self.extents[module + part] for part in _SCALES if module + part in self.extents), None)
        if scale is None:
            raise InputError(f"{self.path}: lacks tensor '{module}.weight_scale'", "download it again")
        if len(codes.shape) != 2 or not min(codes.shape):
            raise self._disagreement(codes, module)
        packed = f"{module}.weight_packed" in self.extents
        read = {
            (True, torch.int32): self._packed_ints,
            (True, torch.uint8): self._fp4,
            (False, torch.int8): self._ints,
            (False, torch.float8_e4m3fn): self._fp8,
        }.get((packed, codes.dtype))
        if read is None:
            raise self._disagreement(codes, module)
        scheme, cols, arrays = read(module, codes, scale, group)
        parts = (self.extents.get(module + part) for part in _PARTS)
        nbytes = sum(extent.nbytes for extent in parts if extent is not None)
        return _Coded(TensorInfo(f"{module}.weight", (codes.shape[0], cols), scheme, nbytes), arrays)

    def _disagreement(self, codes: Extent, module: str) -> InputError:
        found = ", ".join(
            f"{part[1:]} {str(extent.dtype).removeprefix('torch.')} {list(extent.shape)}"
            for part in _PARTS
            if (extent := self.extents.get(module + part)) is not None
        )
        return InputError(f"{codes.file}: the arrays of '{module}' do not go together: {found}", _HINT)

    def _fp8(self, module: str, codes: Extent, scale: Extent, group: Group) -> tuple[Scheme, int, Arrays]:
        rows, cols = codes.shape
        powers = scale.dtype in _POWERS
        if not powers and not scale.dtype.is_floating_point:
            raise self._disagreement(codes, module)
        wide = scale.dtype != torch.bfloat16
        strategy = group.weights.get("strategy")
        size = _tile(codes.shape, scale.shape, group)
        if scale.shape in ((), (1,)):
            scheme = FP8(TENSOR, wide=wide, activations=group.activations)
        elif scale.shape in ((rows, 1), (rows,)) and strategy != BLOCK:
            scheme = FP8(CHANNEL, wide=wide, activations=group.activations)
        elif size is not None:
            scheme = FP8(BLOCK, size, wide, group.activations)
        else:
            raise self._disagreement(codes, module)

        def arrays(start: int, stop: int) -> dict[str, Tensor]:
            if scheme.granularity == TENSOR:
                grid = read_rows(scale).reshape(1, 1).repeat(stop - start, 1)
            elif scheme.granularity == CHANNEL:
                grid = read_rows(scale, start, stop).reshape(-1, 1)
            else:
                tiles = read_rows(scale, start // scheme.size, -(-stop // scheme.size))
                grid = tiles.repeat_interleave(scheme.size, 0)[start % scheme.size :][: stop - start]
            grid = _from_powers(grid) if powers else grid
            grid = (grid.float() if wide else grid).contiguous()
            return {"values": read_rows(codes, start, stop), "scales": grid}

        return scheme, cols, arrays

    def _fp4(self, module: str, codes: Extent, scale: Extent, group: Group) -> tuple[Scheme, int, Arrays]:
        rows, cols = codes.shape[0], codes.shape[1] * 2
        shared = self.extents.get(f"{module}.weight_global_scale")
        scheme: Scheme
        if shared is not None:
            scheme, dtypes = NVFP4(), (torch.float8_e4m3fn,)
            right = shared.shape in ((), (1,)) and shared.dtype == torch.float32
        else:
            scheme, dtypes, right = MXFP4(), _POWERS, True
        if not right or scale.dtype not in dtypes or scale.shape != (rows, cols // scheme.block) or cols % scheme.block:
            raise self._disagreement(codes, module)

        def arrays(start: int, stop: int) -> dict[str, Tensor]:
            scales = read_rows(scale, start, stop)
            found = {"codes": read_rows(codes, start, stop)}
            if shared is None:
                return found | {"scales": scales.view(torch.uint8)}
            return found | {
                "scales": scales,
                "globals": read_rows(shared).reshape(1, 1).repeat(stop - start, 1),
            }

        return scheme, cols, arrays

    def _ints(self, module: str, codes: Extent, scale: Extent, group: Group) -> tuple[Scheme, int, Arrays]:
        rows, cols = codes.shape
        bits = _bits(group, 8)
        flat = scale.shape in ((), (1,))
        groups = 1 if flat or len(scale.shape) == 1 else scale.shape[-1]
        zeros = self.extents.get(f"{module}.weight_zero_point")
        right = flat or scale.shape in ((rows,), (rows, groups))
        if not right or not bits or (zeros is not None and zeros.shape != scale.shape):
            raise self._disagreement(codes, module)
        scheme = self._affine(module, codes, scale, group, bits, (cols, groups, zeros is None))
        middle = 2 ** (scheme.bits - 1)

        def spread(extent: Extent, start: int, stop: int) -> Tensor:
            if flat:
                return read_rows(extent).reshape(1, 1).repeat(stop - start, 1)
            return read_rows(extent, start, stop).reshape(stop - start, groups)

        def arrays(start: int, stop: int) -> dict[str, Tensor]:
            values = read_rows(codes, start, stop).int() + middle
            scales = spread(scale, start, stop)
            offsets = torch.full_like(scales, middle) if zeros is None else spread(zeros, start, stop).int() + middle
            return {"codes": values.to(torch.uint8), "scales": scales, "zeros": offsets.to(torch.uint8)}

        return scheme, cols, arrays

    def _packed_ints(self, module: str, codes: Extent, scale: Extent, group: Group) -> tuple[Scheme, int, Arrays]:
        rows, words = codes.shape
        if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1]:
            raise self._disagreement(codes, module)
        cols = self._columns(module, codes, rows)
        bits = _bits(group, next((bits for bits in _BITS if _words(cols, bits) == words), 0))
        if not bits or words not in (_words(cols, bits), _words_apart(cols, bits)):
            raise self._disagreement(codes, module)
        straddles = words == _words(cols, bits)
        zeros = self.extents.get(f"{module}.weight_zero_point")
        high = _words(rows, bits) if straddles else _words_apart(rows, bits)
        if zeros is not None and (zeros.dtype, zeros.shape) != (torch.int32, (high, scale.shape[1])):
            raise self._disagreement(codes, module)
        order = self.extents.get(f"{module}.weight_g_idx")
        if order is not None and order.shape != (cols,):
            raise self._disagreement(codes, module)
        scheme = self._affine(module, codes, scale, group, bits, (cols, scale.shape[1], zeros is None))

        def arrays(start: int, stop: int) -> dict[str, Tensor]:
            scales = read_rows(scale, start, stop)
            if zeros is None:
                offsets = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
            else:
                offsets = unpack(read_rows(zeros), bits, rows, straddles)[start:stop].contiguous()
            values = unpack(read_rows(codes, start, stop).T, bits, cols, straddles).T.contiguous()
            found = {"codes": values, "scales": scales, "zeros": offsets}
            groups = None if order is None else self._groups(module, order, scheme.group(cols), scale.shape[1])
            return found if groups is None else found | {"groups": groups.expand(stop - start, cols)}

        return scheme, cols, arrays

    def _columns(self, module: str, codes: Extent, rows: int) -> int:
        """Returns the width that `weight_shape` says: packed words do not tell it."""
        extent = self.extents.get(f"{module}.weight_shape")
        if extent is None:
            raise InputError(f"{self.path}: lacks tensor '{module}.weight_shape'", "download it again")
        if extent.shape != (2,) or extent.dtype not in (torch.int64, torch.int32):
            raise self._disagreement(codes, module)
        said, cols = (int(value) for value in read_rows(extent))
        if said != rows or not 0 < cols <= codes.shape[1] * bitstream.WORD:
            raise InputError(f"{codes.file}: '{module}.weight_shape' says {said} x {cols}, its codes differ", _HINT)
        return cols

    def _affine(
        self, module: str, codes: Extent, scale: Extent, group: Group, bits: int, found: tuple[int, int, bool]
    ) -> AffineInt:
        """Returns the grid of integers; `found` are columns, groups, and whether there are no zero points."""
        cols, groups, symmetric = found
        said = group.weights.get("group_size")
        size = -1 if groups == 1 and said in (None, -1) else -(-cols // groups)
        if not scale.dtype.is_floating_point or cols % groups or (said not in (None, -1) and said != size):
            raise self._disagreement(codes, module)
        if bool(group.weights.get("symmetric", symmetric)) != symmetric:
            what = "has no zero points" if symmetric else "has zero points"
            raise InputError(f"{codes.file}: '{module}' {what}, which its config contradicts", _HINT)
        if scale.dtype != torch.bfloat16:
            return AffineInt(bits, size, symmetric)
        if group.activations and codes.dtype == torch.int8 and (bits, size, symmetric) == (8, -1, True):
            return Int8Channel()
        return PackedInt(bits, size, symmetric)

    def _groups(self, module: str, extent: Extent, size: int, count: int) -> Tensor | None:
        """Returns the group of each column, int64 `[cols]`, or None where groups are in order."""
        order = read_rows(extent).long()
        plain = torch.arange(len(order)) // size
        if torch.equal(order, plain) or bool((order == -1).all()):  # -1: never filled in
            return None
        if int(order.min()) < 0 or int(order.max()) >= count:
            raise InputError(f"{extent.file}: '{module}.weight_g_idx' names a group that there is not", _HINT)
        return order


def _bits(group: Group, usual: int) -> int:
    """Returns the width of codes that a group says, or else the usual one; 0 for what is none."""
    said = group.weights.get("num_bits")
    said = usual if said is None else said
    return said if isinstance(said, int) and said in _BITS else 0


def _tile(codes: tuple[int, ...], grid: tuple[int, ...], group: Group) -> int | None:
    """Returns the size of square tiles of which a matrix has as many as its grid of scales, or None."""
    said = group.weights.get("block_structure")
    sizes = [size for size in said if isinstance(size, int) and size > 0] if isinstance(said, list) else []
    for size in (*sizes, *_TILES):
        if grid == tuple(-(-side // size) for side in codes):
            return size
    return None


def _from_powers(grid: Tensor) -> Tensor:
    """Returns E8M0 exponents as float32."""
    return fp4.powers(grid.view(torch.uint8))


def _words(count: int, bits: int) -> int:
    return -(-count * bits // bitstream.WORD)


def _words_apart(count: int, bits: int) -> int:
    """Returns the words that older files have: no code is in two."""
    return -(-count // (bitstream.WORD // bits))


def unpack(words: Tensor, bits: int, count: int, straddles: bool = True) -> Tensor:
    """Returns the first `count` codes down int32 words `[words, cols]`, uint8 `[count, cols]`.

    Args:
        words: Lowest bits first.
        bits: Width of a code.
        count: How many there are.
        straddles: Whether codes go on from word to word without a gap.
    """
    if not straddles:
        each = bitstream.WORD // bits
        shifts = torch.arange(each, dtype=torch.int32)[None, :, None] * bits
        apart: Tensor = (words[:, None] >> shifts) & 2**bits - 1
        return apart.to(torch.uint8).flatten(0, 1)[:count]
    run = bitstream.period(bits) * bits // bitstream.WORD
    whole = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % run))
    return bitstream.unpack(whole, bits)[:count]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns codes uint8 `[count, cols]` as int32 words down the columns, the last one filled up with zeros."""
    count = len(codes)
    whole = torch.nn.functional.pad(codes, (0, 0, 0, -count % bitstream.period(bits)))
    return bitstream.pack(whole, bits)[: _words(count, bits)]
