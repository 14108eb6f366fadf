"""Encoders of Q2_K to Q6_K: super-blocks of 256 weights in sub-blocks of 16 or 32 with scales (and offsets) each.

First all sub-blocks go through the searches, 64 at a time. Then each super-block is finished by itself: its scales are
rounded, its levels chosen once more for the rounded scales, and packed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu import packing
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.offsets import scan_offset
from quantize.kernels.cpu.scales import search_scales, search_signed_scales
from quantize.kernels.cpu.signed import refine_signed, scan_refined, scan_signed
from quantize.kernels.cpu.tiles import (
    LANES,
    ONE,
    TINY,
    ZERO,
    level,
    load,
    mean_squares,
    nearest,
    parts,
    room_for_results,
    workspace,
)

_SUPER = 256
_NONE = np.zeros(0, np.float32)
# First, step and number of the candidates of the search, by bits of a level.
_PLANS = {2: (-0.5, 0.1, 15), 4: (-1, 0.1, 20), 5: (-0.5, 0.1, 15)}
_WEIGHTED_PLAN = (-0.9, 0.05, 36)


def encode_q2_k(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q2_K."""
    _encode_offset(x, importance, out, 2)


def encode_q3_k(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q3_K."""
    space, pending, room = workspace(), np.zeros(LANES, np.int64), _room()
    for part, to in parts(x, out):
        found = room_for_results(part.size // 16)
        if importance.size:
            scan_signed(part, importance, _variance(part, 2), _SUPER, 16, np.float32(4), space, found)
        else:
            scan_refined(part, pending, space, found[0])
        _finish_q3_k(part, importance.size > 0, found, to, space, *room)


def encode_q4_k(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q4_K."""
    _encode_offset(x, importance, out, 4)


def encode_q5_k(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q5_K."""
    _encode_offset(x, importance, out, 5)


def encode_q6_k(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q6_K; importance itself is the weight in the search."""
    space, (packed, _, _, units) = workspace(), _room()
    for part, to in parts(x, out):
        found = room_for_results(part.size // 16)
        scan_signed(part, importance, _NONE, _SUPER, 16, np.float32(32), space, found)
        _finish_q6_k(part, found, to, packed, units)


def _encode_offset(x: Any, importance: Any, out: Any, bits: int) -> None:
    """Encodes to Q2_K, Q4_K or Q5_K."""
    space, (packed, codes, offsets, _) = workspace(), _room()
    plan = np.array(_WEIGHTED_PLAN if importance.size else _PLANS[bits], np.float32)
    for part, to in parts(x, out):
        variance = _variance(part, 1 if bits == 2 else 2) if importance.size else _NONE
        found = room_for_results(part.size // (16 if bits == 2 else 32))
        scan_offset(part, importance, variance, _SUPER, bits, plan, space, found)
        _finish_offset(part, importance.size > 0, found, to, bits, packed, codes, offsets)


def _variance(x: Any, factor: int) -> Any:
    """Returns factor times the mean square of each super-block."""
    variance = np.empty(x.size // _SUPER, np.float32)
    mean_squares(x, _SUPER, np.float32(factor), variance)
    return variance


def _room() -> tuple[Any, ...]:
    """Returns room for the levels of a super-block, its codes, its offsets, and its rounded scales."""
    return np.empty(_SUPER, np.uint8), np.empty(16, np.uint8), np.empty(16, np.uint8), np.empty(16, np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Q2_K, Q4_K, Q5_K: y = d * code * level - dmin * offset


@compiled
def _finish_offset(
    x: Any, weighted: bool, found: Any, out: Any, bits: int, packed: Any, codes: Any, offsets: Any
) -> None:
    """Rounds scales and offsets, chooses levels and packs.

    Args:
        x: float32, flat.
        weighted: Whether there is importance.
        found: What `scan_offset` found; lows change their sign.
        out: uint8, flat.
        bits: Bits of a level.
        packed: See `_room`, as for `codes` and `offsets`.
        codes: See `packed`.
        offsets: See `packed`.
    """
    length, per, top = (16, 16, np.float32(15)) if bits == 2 else (32, 8, np.float32(63))
    nbytes = 84 if bits == 2 else 16 + 32 * bits
    highest = np.float32((1 << bits) - 1)
    for b in range(x.size // _SUPER):
        at, first, block = b * nbytes, b * per, x[b * _SUPER : (b + 1) * _SUPER]
        scales, lows = found[0][first : first + per], found[2][first : first + per]
        for j in range(per):
            lows[j] = -lows[j]
        if weighted:
            sums = found[4][first : first + per]
            d, dmin = search_scales(scales, sums, per, top, codes), search_scales(lows, sums, per, top, offsets)
        else:
            d, dmin = _round_positive(scales, per, top, codes), _round_positive(lows, per, top, offsets)
        if bits == 2:
            for j in range(per):
                out[at + j] = codes[j] | (offsets[j] << 4)
                codes[j], offsets[j] = out[at + j] & 15, out[at + j] >> 4
            d, dmin = packing.put_half(d, out, at + 80), packing.put_half(dmin, out, at + 82)
        else:
            if bits == 5:  # llama.cpp limits wrapped codes here, and does not for Q4_K
                for j in range(per):
                    codes[j], offsets[j] = min(codes[j], 63), min(offsets[j], 63)
            d, dmin = packing.put_half(d, out, at), packing.put_half(dmin, out, at + 2)
            packing.pack_scale_pairs(codes, offsets, out, at + 4)
        _choose_offset(block, found, first, length, d, dmin, codes, offsets, highest, packed)
        if bits == 2:
            packing.pack_pairs(packed, out, at + 16)
        else:
            if bits == 5:
                packing.pack_bit_planes(packed, 4, out, at + 16)
            for i in range(4):
                packing.pack_nibbles(packed[64 * i : 64 * i + 64], 32, out, at + nbytes - 128 + 32 * i)


@compiled
def _round_positive(values: Any, count: int, top: Any, codes: Any) -> Any:
    """Sets codes 0 .. top of values for the unit max / top, and returns the unit."""
    largest = ZERO
    for i in range(count):
        largest = values[i] if values[i] > largest else largest
    inverse = top / largest if largest > ZERO else ZERO
    for i in range(count):
        code = np.int32(nearest(inverse * values[i])) & 255
        codes[i] = code if top == 15 else min(code, 63)
    return largest / top


@compiled
def _choose_offset(
    x: Any, found: Any, first: int, length: int, d: Any, dmin: Any, codes: Any, offsets: Any, top: Any, packed: Any
) -> None:
    """Sets the levels of a super-block for its rounded scales; where one is 0 the search's levels stay."""
    for j in range(_SUPER // length):
        part, levels = x[j * length : (j + 1) * length], packed[j * length : (j + 1) * length]
        scale, low = d * np.float32(codes[j]), dmin * np.float32(offsets[j])
        if scale != ZERO:
            for i in range(length):
                levels[i] = np.int32(level((part[i] + low) / scale, ZERO, top))
        else:
            inverse, base = found[1][first + j], found[3][first + j]
            for i in range(length):
                levels[i] = np.int32(level(inverse * (part[i] - base), ZERO, top))


# ---------------------------------------------------------------------------------------------------------------------
# Q3_K, Q6_K: y = d * code * level


@compiled
def _finish_q3_k(
    x: Any, weighted: bool, found: Any, out: Any, space: Any, packed: Any, codes: Any, _: Any, units: Any
) -> None:
    """Rounds scales, chooses levels and packs; arguments as for `_finish_offset`."""
    tile, weights, work, levels, _, state, _ = space
    top = np.float32(4)
    for b in range(x.size // _SUPER):
        at, first, block = 110 * b, 16 * b, x[b * _SUPER : (b + 1) * _SUPER]
        scales = found[0][first : first + 16]
        if weighted:
            d = search_signed_scales(scales, found[4][first : first + 16], 16, np.float32(32), codes)
        else:
            d = _round_signed(scales, codes)
        d = packing.put_half(d, out, at + 108)
        packing.pack_signed_scales(codes, out, at + 96)
        for j in range(16):
            units[j] = d * np.float32(np.int32(codes[j]) - 32)
        whole = _choose_signed(block, units, found[1][first : first + 16], top, packed)
        if not whole and not weighted:
            load(block, 0, 16, 16, _SUPER, tile)
            refine_signed(tile, weights, work, levels, 16, top, state)
            for j in range(16):
                if units[j] == ZERO:
                    for i in range(16):
                        packed[16 * j + i] = np.int32(levels[LANES * i + j] + top)
        packing.pack_bit_planes(packed, 2, out, at)
        packing.pack_pairs(packed, out, at + 32)


@compiled
def _round_signed(scales: Any, codes: Any) -> Any:
    """Sets codes 0 .. 63 of 16 scales, 32 for zero, the largest at 0, and returns the unit; all 0 if all are zero."""
    largest = ZERO
    for j in range(16):
        largest = scales[j] if abs(scales[j]) > abs(largest) else largest
        codes[j] = 0
    if largest == ZERO:
        return ZERO
    inverse = np.float32(-32) / largest
    for j in range(16):
        codes[j] = np.int32(level(inverse * scales[j], np.float32(-32), np.float32(31))) + 32
    return ONE / inverse


@compiled
def _choose_signed(x: Any, scales: Any, inverses: Any, top: Any, packed: Any) -> bool:
    """Sets the levels of a super-block for its rounded scales.

    Args:
        x: float32 [256].
        scales: float32 [16].
        inverses: float32 [16]: where a scale is 0, levels are those of x * inverse, the search's; 0 if that is 0 too.
        top: Levels on one side, float32.
        packed: uint8 [256]; receives level + top.

    Returns:
        Whether no scale is 0.
    """
    low, high, whole = -top, top - ONE, True
    for j in range(16):
        whole &= scales[j] != ZERO
        for i in range(16):
            packed[16 * j + i] = np.int32(level(x[16 * j + i] / scales[j], low, high) + top)
    if not whole:
        for j in range(16):
            if scales[j] == ZERO:
                for i in range(16):
                    q = np.int32(level(x[16 * j + i] * inverses[j], low, high) + top)
                    packed[16 * j + i] = q if inverses[j] != ZERO else 0
    return whole


@compiled
def _finish_q6_k(x: Any, found: Any, out: Any, packed: Any, units: Any) -> None:
    """Rounds scales, chooses levels and packs; arguments as for `_finish_offset`."""
    for b in range(x.size // _SUPER):
        at, first, largest = 210 * b, 16 * b, ZERO
        scales = found[0][first : first + 16]
        for j in range(16):
            largest = scales[j] if abs(scales[j]) > abs(largest) else largest
        if abs(largest) < TINY:
            out[at : at + 210] = 0
            continue
        inverse = np.float32(-128) / largest
        d = packing.put_half(ONE / inverse, out, at + 208)
        for j in range(16):
            code = min(np.int32(nearest(inverse * scales[j])), np.int32(127))
            code = ((code + 128) & 255) - 128  # a signed byte
            out[at + 192 + j] = code & 255
            units[j] = d * np.float32(code)
        _choose_signed(x[b * _SUPER : (b + 1) * _SUPER], units, found[1][first : first + 16], np.float32(32), packed)
        packing.pack_sixes(packed, out, at)
