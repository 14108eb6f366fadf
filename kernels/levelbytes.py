"""Fields of GGML blocks in torch: bytes to whole numbers and halves, and back.

A reader takes uint8 `[rows, n, bytes]` and gives fields `[rows, n, k]`: `levels` uint8, an index into the type's
points for each weight; `d`, `m`, `dmin` float32; `codes`, `mins` int32. A writer is its inverse. Bits that belong to
no field do not exist, so both directions are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Fields = dict[str, Tensor]

# Where the FP4 code of the file stands among the points in order: codes 8 to 15 are the negatives of 0 to 7.
_FP4_PLACES = (8, 9, 10, 11, 12, 13, 14, 15, 7, 6, 5, 4, 3, 2, 1, 0)


def _halves(blocks: Tensor, at: int) -> Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _half_bytes(value: Tensor) -> Tensor:
    return value.half().view(torch.uint8)


def _shifts(blocks: Tensor, count: int, width: int) -> Tensor:
    """Returns shifts `[count, 1]`: 0, width, 2 * width, ..."""
    return torch.arange(0, count * width, width, dtype=torch.uint8, device=blocks.device).unsqueeze(1)


def _unpack(packed: Tensor, run: int, width: int, fields: int) -> Tensor:
    """Returns numbers of `width` bits: each run of bytes holds `fields` runs of numbers, the lowest bits first."""
    parts = packed.reshape(*packed.shape[:-1], -1, 1, run) >> _shifts(packed, fields, width)
    return (parts & (1 << width) - 1).flatten(-3)


def _pack(numbers: Tensor, run: int, width: int, fields: int) -> Tensor:
    """Undoes `_unpack`; bits of the numbers beyond `width` must be 0."""
    parts = numbers.reshape(*numbers.shape[:-1], -1, fields, run) << _shifts(numbers, fields, width)
    return parts.sum(-2, dtype=torch.uint8).flatten(-2)


_nibbles = partial(_unpack, width=4, fields=2)
_pack_nibbles = partial(_pack, width=4, fields=2)


def _read_legacy(blocks: Tensor, width: int, offset: bool) -> Fields:
    """Reads Q4_0, Q4_1, Q5_0 and Q5_1."""
    fields = {"d": _halves(blocks, 0)}
    if offset:
        fields["m"] = _halves(blocks, 2)
    levels = _nibbles(blocks[..., -16:], 16)
    if width == 5:
        levels = levels | _unpack(blocks[..., -20:-16], 1, 1, 8) << 4
    return {**fields, "levels": levels}


def _write_legacy(fields: Fields, width: int, offset: bool) -> Tensor:
    levels = fields["levels"]
    parts = [_half_bytes(fields["d"])]
    if offset:
        parts.append(_half_bytes(fields["m"]))
    if width == 5:
        parts.append(_pack(levels >> 4, 1, 1, 8))
    return torch.cat([*parts, _pack_nibbles(levels & 15, 16)], -1)


def _read_q8_0(blocks: Tensor) -> Fields:
    return {"d": _halves(blocks, 0), "levels": blocks[..., 2:] ^ 128}


def _write_q8_0(fields: Fields) -> Tensor:
    return torch.cat([_half_bytes(fields["d"]), fields["levels"] ^ 128], -1)


def _read_q2_k(blocks: Tensor) -> Fields:
    return {
        "d": _halves(blocks, 80),
        "dmin": _halves(blocks, 82),
        "codes": (blocks[..., :16] & 15).int(),
        "mins": (blocks[..., :16] >> 4).int(),
        "levels": _unpack(blocks[..., 16:80], 32, 2, 4),
    }


def _write_q2_k(fields: Fields) -> Tensor:
    scales = (fields["codes"] | fields["mins"] << 4).to(torch.uint8)
    halves = [_half_bytes(fields[key]) for key in ("d", "dmin")]
    return torch.cat([scales, _pack(fields["levels"], 32, 2, 4), *halves], -1)


def _read_q3_k(blocks: Tensor) -> Fields:
    scales = blocks[..., 96:108]
    codes = _nibbles(scales[..., :8], 8) | _unpack(scales[..., 8:], 4, 2, 4) << 4
    levels = _unpack(blocks[..., 32:96], 32, 2, 4) | _unpack(blocks[..., :32], 32, 1, 8) << 2
    return {"d": _halves(blocks, 108), "codes": codes.int() - 32, "levels": levels}


def _write_q3_k(fields: Fields) -> Tensor:
    codes, levels = (fields["codes"] + 32).to(torch.uint8), fields["levels"]
    scales = [_pack_nibbles(codes & 15, 8), _pack(codes >> 4, 4, 2, 4)]
    return torch.cat([_pack(levels >> 2, 32, 1, 8), _pack(levels & 3, 32, 2, 4), *scales, _half_bytes(fields["d"])], -1)


def _read_q45_k(blocks: Tensor, width: int) -> Fields:
    """Reads Q4_K and Q5_K: see `packing.pack_scale_pairs` for the 12 bytes of 6-bit pairs."""
    first, second, third = (blocks[..., at : at + 4] for at in (4, 8, 12))
    levels = _nibbles(blocks[..., -128:], 32)
    if width == 5:
        levels = levels | _unpack(blocks[..., 16:48], 32, 1, 8) << 4
    return {
        "d": _halves(blocks, 0),
        "dmin": _halves(blocks, 2),
        "codes": torch.cat([first & 63, third & 15 | first >> 6 << 4], -1).int(),
        "mins": torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1).int(),
        "levels": levels,
    }


def _write_q45_k(fields: Fields, width: int) -> Tensor:
    codes, mins = (fields[key].to(torch.uint8) for key in ("codes", "mins"))
    parts = [_half_bytes(fields["d"]), _half_bytes(fields["dmin"])]
    parts += [numbers[..., :4] | numbers[..., 4:] >> 4 << 6 for numbers in (codes, mins)]
    parts.append(codes[..., 4:] & 15 | (mins[..., 4:] & 15) << 4)
    if width == 5:
        parts.append(_pack(fields["levels"] >> 4, 32, 1, 8))
    return torch.cat([*parts, _pack_nibbles(fields["levels"] & 15, 32)], -1)


def _read_q6_k(blocks: Tensor) -> Fields:
    low, high = _nibbles(blocks[..., :128], 64), _unpack(blocks[..., 128:192], 32, 2, 4)
    return {
        "d": _halves(blocks, 208),
        "codes": blocks[..., 192:208].contiguous().view(torch.int8).int(),
        "levels": low | high << 4,
    }


def _write_q6_k(fields: Fields) -> Tensor:
    levels, codes = fields["levels"], fields["codes"].to(torch.int8).view(torch.uint8)
    return torch.cat(
        [_pack_nibbles(levels & 15, 64), _pack(levels >> 4, 32, 2, 4), codes, _half_bytes(fields["d"])], -1
    )


def _read_iq4_nl(blocks: Tensor) -> Fields:
    return {"d": _halves(blocks, 0), "levels": _nibbles(blocks[..., 2:], 16)}


def _write_iq4_nl(fields: Fields) -> Tensor:
    return torch.cat([_half_bytes(fields["d"]), _pack_nibbles(fields["levels"], 16)], -1)


def _read_iq4_xs(blocks: Tensor) -> Fields:
    codes = _nibbles(blocks[..., 4:8], 1) | _unpack(blocks[..., 2:4], 1, 2, 4) << 4
    return {"d": _halves(blocks, 0), "codes": codes.int() - 32, "levels": _nibbles(blocks[..., 8:], 16)}


def _write_iq4_xs(fields: Fields) -> Tensor:
    codes = (fields["codes"] + 32).to(torch.uint8)
    scales = [_pack(codes >> 4, 1, 2, 4), _pack_nibbles(codes & 15, 1)]
    return torch.cat([_half_bytes(fields["d"]), *scales, _pack_nibbles(fields["levels"], 16)], -1)


def _read_fp4(blocks: Tensor, scales: int, run: int) -> Fields:
    """Reads MXFP4 and NVFP4, which open with one byte for each scale."""
    places = torch.tensor(_FP4_PLACES, dtype=torch.uint8, device=blocks.device)
    levels = places[_nibbles(blocks[..., scales:], run).int()]
    return {"codes": blocks[..., :scales].int(), "levels": levels}


def _write_fp4(fields: Fields, scales: int, run: int) -> Tensor:
    codes = torch.tensor(_FP4_PLACES, device=fields["levels"].device).argsort().to(torch.uint8)
    return torch.cat([fields["codes"].to(torch.uint8), _pack_nibbles(codes[fields["levels"].int()], run)], -1)


READERS: dict[str, Callable[[Tensor], Fields]] = {
    "q4_0": partial(_read_legacy, width=4, offset=False),
    "q4_1": partial(_read_legacy, width=4, offset=True),
    "q5_0": partial(_read_legacy, width=5, offset=False),
    "q5_1": partial(_read_legacy, width=5, offset=True),
    "q8_0": _read_q8_0,
    "q2_k": _read_q2_k,
    "q3_k": _read_q3_k,
    "q4_k": partial(_read_q45_k, width=4),
    "q5_k": partial(_read_q45_k, width=5),
    "q6_k": _read_q6_k,
    "iq4_nl": _read_iq4_nl,
    "iq4_xs": _read_iq4_xs,
    "mxfp4": partial(_read_fp4, scales=1, run=16),
    "nvfp4": partial(_read_fp4, scales=4, run=8),
}

WRITERS: dict[str, Callable[[Fields], Tensor]] = {
    "q4_0": partial(_write_legacy, width=4, offset=False),
    "q4_1": partial(_write_legacy, width=4, offset=True),
    "q5_0": partial(_write_legacy, width=5, offset=False),
    "q5_1": partial(_write_legacy, width=5, offset=True),
    "q8_0": _write_q8_0,
    "q2_k": _write_q2_k,
    "q3_k": _write_q3_k,
    "q4_k": partial(_write_q45_k, width=4),
    "q5_k": partial(_write_q45_k, width=5),
    "q6_k": _write_q6_k,
    "iq4_nl": _write_iq4_nl,
    "iq4_xs": _write_iq4_xs,
    "mxfp4": partial(_write_fp4, scales=1, run=16),
    "nvfp4": partial(_write_fp4, scales=4, run=8),
}
