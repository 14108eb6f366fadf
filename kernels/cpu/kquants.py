"""Encoders of Q2_K to Q6_K: super-blocks of 256 weights in sub-blocks of 16 or 32 with scales (and offsets) each.

The sub-blocks go through the lane searches 64 at a time, that is 4 or 8 super-blocks. Then each super-block is
finished by itself: its scales are rounded, its levels chosen once more for the rounded scales, and packed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.kernels.cpu import packing, search
from quantize.kernels.cpu.lean import lean
from quantize.kernels.cpu.search import BASE, INVERSE, LANES, LOW, SCALE, STATE, TINY, WEIGHT, level, nearest

_SUPER = 256
_BATCH = 64 * _SUPER
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


def encode_q2_k(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q2_K."""
    _encode_offset(x.reshape(-1), importance, out.reshape(-1), 2, search.workspace(), _bytes())


def encode_q3_k(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q3_K."""
    batch = np.zeros((3, _BATCH // 16), np.float32), np.empty(LANES, np.int64)
    _encode_q3_k(x.reshape(-1), importance, out.reshape(-1), search.workspace(), _bytes(), *batch)


def encode_q4_k(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q4_K."""
    _encode_offset(x.reshape(-1), importance, out.reshape(-1), 4, search.workspace(), _bytes())


def encode_q5_k(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q5_K."""
    _encode_offset(x.reshape(-1), importance, out.reshape(-1), 5, search.workspace(), _bytes())


def encode_q6_k(x: Any, importance: Any, out: Any) -> None:
    """Encodes rows to Q6_K."""
    _encode_q6_k(x.reshape(-1), importance, out.reshape(-1), search.workspace(), _bytes())


def _bytes() -> Any:
    """Returns room for the levels of a super-block, two times 16 codes, and 16 float32."""
    return np.empty(_SUPER, np.uint8), np.empty(16, np.uint8), np.empty(16, np.uint8), np.empty(64, np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Q2_K, Q4_K, Q5_K: y = d * code * level - dmin * offset


@lean
def _encode_offset(x: Any, importance: Any, out: Any, bits: int, space: Any, room: Any) -> None:
    """Encodes flat rows.

    Args:
        x: float32, rows of `importance.size` weights.
        importance: float32 [cols], or empty.
        out: uint8, flat.
        bits: Bits of a level.
        space: `search.workspace()`.
        room: `_bytes()`.
    """
    tile, weights, levels, _, _, state, variance = space
    packed, codes, offsets, _ = room
    length = 16 if bits == 2 else 32
    nbytes = 84 if bits == 2 else 16 + 32 * bits
    per = _SUPER // length
    for start in range(0, x.size, LANES * length):
        count = min(LANES, (x.size - start) // length)
        search.load(x, start, count, length, x.size, tile)
        if importance.size > 0:
            search.load(importance, start, count, length, importance.size, weights)
            _variances(x, start, count, length, _ONE if bits == 2 else _TWO, variance)
            search.weigh_importance(tile, length, weights, variance)
        _search_offset(tile, weights, levels, bits, importance.size > 0, state)
        for b in range(count // per):
            at = (start // _SUPER + b) * nbytes
            block, lane = x[start + b * _SUPER : start + (b + 1) * _SUPER], b * per
            if bits == 2:
                d, dmin = _round_scales(state, lane, per, np.float32(15), importance.size > 0, codes, offsets)
                for j in range(per):
                    out[at + j] = codes[j] | (offsets[j] << 4)
                    codes[j], offsets[j] = out[at + j] & 15, out[at + j] >> 4
                d, dmin = packing.put_half(d, out, at + 80), packing.put_half(dmin, out, at + 82)
                _choose_offset(block, state, lane, length, d, dmin, codes, offsets, np.float32(3), packed)
                packing.pack_pairs(packed, out, at + 16)
            else:
                d, dmin = _round_scales(state, lane, per, np.float32(63), importance.size > 0, codes, offsets)
                d, dmin = packing.put_half(d, out, at), packing.put_half(dmin, out, at + 2)
                if bits == 5:  # llama.cpp limits wrapped codes here, and does not for Q4_K
                    for j in range(8):
                        codes[j], offsets[j] = min(codes[j], 63), min(offsets[j], 63)
                packing.pack_scale_pairs(codes, offsets, out, at + 4)
                top = np.float32((1 << bits) - 1)
                _choose_offset(block, state, lane, length, d, dmin, codes, offsets, top, packed)
                if bits == 5:
                    packing.pack_bit_planes(packed, 4, out, at + 16)
                for i in range(4):
                    packing.pack_nibbles(packed[64 * i :], 32, out, at + nbytes - 128 + 32 * i)


@lean
def _variances(x: Any, start: int, count: int, length: int, factor: Any, variance: Any) -> None:
    """Sets each lane's variance: factor times the mean square of its super-block."""
    per = _SUPER // length
    for b in range(count // per):
        total = _ZERO
        for v in x[start + b * _SUPER : start + (b + 1) * _SUPER]:
            total += v * v
        variance[b * per : (b + 1) * per] = factor * total / np.float32(_SUPER)


@lean
def _search_offset(tile: Any, weights: Any, levels: Any, bits: int, weighted: bool, state: Any) -> None:
    """Runs the search with the weights and candidates that llama.cpp has for the type; LOW becomes the offset."""
    length, top = 16 if bits == 2 else 32, np.float32((1 << bits) - 1)
    first, step, steps = np.float32(-0.5), np.float32(0.1), 15
    if weighted:
        first, step, steps = np.float32(-0.9), np.float32(0.05), 36
    elif bits == 2:
        search.weigh_size(tile, length, weights)
    else:
        search.weigh_spread(tile, length, weights, state)
        if bits == 4:
            first, steps = np.float32(-1), 20
    absolute = bits == 2 and not weighted
    search.search_offset(tile, weights, levels, length, top, first, step, steps, absolute, state)
    for k in range(LANES):
        state[LOW + k] = -state[LOW + k]


@lean
def _round_scales(state: Any, lane: int, per: int, top: Any, weighted: bool, codes: Any, offsets: Any) -> Any:
    """Sets codes and offsets of a super-block and returns their units."""
    scales, lows = state[SCALE + lane : SCALE + lane + per], state[LOW + lane : LOW + lane + per]
    if weighted:
        weight = state[WEIGHT + lane : WEIGHT + lane + per]
        d = search.search_scales(scales, weight, per, top, codes)
        return d, search.search_scales(lows, weight, per, top, offsets)
    return _round_positive(scales, per, top, codes), _round_positive(lows, per, top, offsets)


@lean
def _round_positive(values: Any, count: int, top: Any, codes: Any) -> Any:
    """Sets codes 0 .. top of values for the unit max / top, and returns the unit."""
    largest = _ZERO
    for i in range(count):
        largest = values[i] if values[i] > largest else largest
    inverse = top / largest if largest > _ZERO else _ZERO
    for i in range(count):
        code = np.int32(nearest(inverse * values[i])) & 255
        codes[i] = code if top == 15 else min(code, 63)
    return largest / top


@lean
def _choose_offset(
    x: Any, state: Any, lane: int, length: int, d: Any, dmin: Any, codes: Any, offsets: Any, top: Any, packed: Any
) -> None:
    """Sets the levels of a super-block for its rounded scales; where one is 0 the search's levels stay."""
    for j in range(_SUPER // length):
        part, levels = x[j * length : (j + 1) * length], packed[j * length : (j + 1) * length]
        scale, low = d * np.float32(codes[j]), dmin * np.float32(offsets[j])
        if scale != _ZERO:
            for i in range(length):
                levels[i] = np.int32(level((part[i] + low) / scale, _ZERO, top))
        else:
            inverse, base = state[INVERSE + lane + j], state[BASE + lane + j]
            for i in range(length):
                levels[i] = np.int32(level(inverse * (part[i] - base), _ZERO, top))


# ---------------------------------------------------------------------------------------------------------------------
# Q3_K, Q6_K: y = d * code * level


@lean
def _encode_q3_k(x: Any, importance: Any, out: Any, space: Any, room: Any, batch: Any, pending: Any) -> None:
    weighted = importance.size > 0
    tile, weights, work, levels, waiting, state, variance = space
    packed, codes, _, raw = room
    units, scales, sums, inverses = raw.view(np.float32), batch[0], batch[1], batch[2]
    for start in range(0, x.size, _BATCH):
        part = x[start : start + _BATCH]
        if weighted:
            for first in range(0, part.size, LANES * 16):
                count, lane = min(LANES, (part.size - first) // 16), first // 16
                search.load(part, first, count, 16, part.size, tile)
                search.load(importance, start + first, count, 16, importance.size, weights)
                _variances(part, first, count, 16, _TWO, variance)
                search.weigh_importance(tile, 16, weights, variance)
                search.sum_weights(weights, 16, state)
                search.search_signed(tile, weights, work, 16, np.float32(4), state)
                for k in range(count):
                    scales[lane + k], sums[lane + k] = state[SCALE + k], state[WEIGHT + k]
                    inverses[lane + k] = state[INVERSE + k]
        else:
            _refine_batch(part, tile, waiting, pending, weights, work, levels, state, scales)
        for b in range(part.size // _SUPER):
            at, lane, block = (start // _SUPER + b) * 110, 16 * b, part[b * _SUPER : (b + 1) * _SUPER]
            if weighted:
                d = search.search_signed_scales(
                    scales[lane : lane + 16], sums[lane : lane + 16], 16, np.float32(32), codes
                )
            else:
                d = _round_signed(scales[lane : lane + 16], codes)
            d = packing.put_half(d, out, at + 108)
            packing.pack_signed_scales(codes, out, at + 96)
            for j in range(16):
                units[j] = d * np.float32(np.int32(codes[j]) - 32)
            if not _choose_signed(block, units, inverses[lane : lane + 16], np.float32(4), packed) and not weighted:
                search.load(block, 0, 16, 16, _SUPER, tile)
                search.refine_signed(tile, weights, work, levels, 16, np.float32(4), state)
                for j in range(16):
                    if units[j] == _ZERO:
                        for i in range(16):
                            packed[16 * j + i] = np.int32(levels[LANES * i + j] + np.float32(4))
            packing.pack_bit_planes(packed, 2, out, at)
            packing.pack_pairs(packed, out, at + 32)


@lean
def _refine_batch(
    x: Any, tile: Any, waiting: Any, pending: Any, weights: Any, work: Any, levels: Any, state: Any, scales: Any
) -> None:
    """Sets the scales of all sub-blocks of a batch; those that are not settled at once wait until they fill a tile.

    Args:
        x: float32, flat.
        tile: Tile to work in, as are `waiting`, `weights`, `work` and `levels`.
        waiting: See `tile`.
        pending: int64 [64] to work in: which sub-blocks wait.
        weights: See `tile`.
        work: See `tile`.
        levels: See `tile`.
        state: To work in.
        scales: float32, one for each sub-block; overwritten.
    """
    queued = 0
    for first in range(0, x.size, LANES * 16):
        count = min(LANES, (x.size - first) // 16)
        search.load(x, first, count, 16, x.size, tile)
        search.settle_signed(tile, 16, np.float32(4), state)
        for k in range(count):
            scales[first // 16 + k] = state[SCALE + k]
            if state[WEIGHT + k] > _ZERO:
                pending[queued] = first // 16 + k
                queued += 1
                if queued == LANES:
                    # `state` is still needed for the lanes that follow.
                    _refine_waiting(x, pending, queued, waiting, weights, work, levels, state[STATE:], scales)
                    queued = 0
    if queued > 0:
        _refine_waiting(x, pending, queued, waiting, weights, work, levels, state[STATE:], scales)


@lean
def _refine_waiting(
    x: Any, pending: Any, count: int, tile: Any, weights: Any, work: Any, levels: Any, state: Any, scales: Any
) -> None:
    for k in range(LANES):
        first = 16 * pending[min(k, count - 1)]
        values = x[first : first + 16]
        for i in range(16):
            tile[i * LANES + k] = values[i]
    search.refine_signed(tile, weights, work, levels, 16, np.float32(4), state)
    for k in range(count):
        scales[pending[k]] = state[SCALE + k]


@lean
def _round_signed(scales: Any, codes: Any) -> Any:
    """Sets codes 0 .. 63 of 16 scales, 32 for zero, the largest at 0, and returns the unit; all 0 if all are zero."""
    largest = _ZERO
    for j in range(16):
        largest = scales[j] if abs(scales[j]) > abs(largest) else largest
        codes[j] = 0
    if largest == _ZERO:
        return _ZERO
    inverse = np.float32(-32) / largest
    for j in range(16):
        codes[j] = np.int32(level(inverse * scales[j], np.float32(-32), np.float32(31))) + 32
    return _ONE / inverse


@lean
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
    low, high, whole = -top, top - _ONE, True
    for j in range(16):
        whole &= scales[j] != _ZERO
        for i in range(16):
            packed[16 * j + i] = np.int32(level(x[16 * j + i] / scales[j], low, high) + top)
    if not whole:
        for j in range(16):
            if scales[j] == _ZERO:
                for i in range(16):
                    q = np.int32(level(x[16 * j + i] * inverses[j], low, high) + top)
                    packed[16 * j + i] = q if inverses[j] != _ZERO else 0
    return whole


@lean
def _encode_q6_k(x: Any, importance: Any, out: Any, space: Any, room: Any) -> None:
    tile, weights, work, _, _, state, _ = space
    packed, _, _, raw = room
    units, top = raw.view(np.float32), np.float32(32)
    for start in range(0, x.size, LANES * 16):
        count = min(LANES, (x.size - start) // 16)
        search.load(x, start, count, 16, x.size, tile)
        if importance.size > 0:
            search.load(importance, start, count, 16, importance.size, weights)
        else:
            search.weigh_square(tile, 16, weights)
        search.search_signed(tile, weights, work, 16, top, state)
        for b in range(count // 16):
            at, lane, largest = (start // _SUPER + b) * 210, 16 * b, _ZERO
            scales = state[SCALE + lane : SCALE + lane + 16]
            for j in range(16):
                largest = scales[j] if abs(scales[j]) > abs(largest) else largest
            if abs(largest) < TINY:
                out[at : at + 210] = 0
                continue
            inverse = np.float32(-128) / largest
            d = packing.put_half(_ONE / inverse, out, at + 208)
            for j in range(16):
                code = min(np.int32(nearest(inverse * scales[j])), np.int32(127))
                code = ((code + 128) & 255) - 128  # a signed byte
                out[at + 192 + j] = code & 255
                units[j] = d * np.float32(code)
            block = x[start + b * _SUPER : start + (b + 1) * _SUPER]
            _choose_signed(block, units, state[INVERSE + lane : INVERSE + lane + 16], top, packed)
            packing.pack_sixes(packed, out, at)
