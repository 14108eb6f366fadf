"""Encoders of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S: rows of super-blocks and their bytes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from quantize.kernels.cpu.grids import codebook
from quantize.kernels.cpu.gridscan import LANES, level
from quantize.kernels.cpu.gridsearch import (
    ALWAYS,
    ANY_OFF_GRID,
    OFF_GRID,
    SUPER,
    Tables,
    mean_square,
    positive_scale,
    scratch,
    search,
    tables,
    take_signs,
)
from quantize.kernels.cpu.numeric import compiled, to_half

if TYPE_CHECKING:
    from numpy.typing import NDArray

_XXS2, _XS2, _S2, _XXS3, _S3 = range(5)

_ZERO, _HALF, _ONE, _TOP_CODE, _UNITS = (np.float32(v) for v in (0, 0.5, 1, 15, 31))


class Rules(NamedTuple):
    """What differs between the types."""

    layout: int  # one of the five above
    nbytes: int  # of a super-block
    block: int  # weights that share a scale
    even: bool  # whether each 8 weights have an even number of minus signs
    factor: np.float32  # of the mean square that evens out the costs
    plain_square: np.float32  # its part in the costs when there is no importance
    eps: np.float32  # a block whose largest weight is below is zero
    largest: np.float32  # odd number of the largest level
    numerators: Any  # float32 [LANES], inverse scales to try, in units of 1 / largest weight
    tried: int  # how many of them
    again: int  # which points are chosen again at the end
    fudge: np.float32  # of the stored scale


class _Super(NamedTuple):
    """What one super-block became."""

    index: Any  # int64 [64]: points
    signs: Any  # int64 [32]: signs of each 8 weights
    scales: Any  # float32 [16]: scales of the blocks
    codes: Any  # int64 [16]: codes of the scales


def _rules(layout: int, nbytes: int, block: int, even: bool, tries: NDArray[np.float32], again: int) -> Rules:
    """Returns the rules of a type, from what cannot be told from its layout."""
    numbers = {_XXS2: (1, 0, 1e-15, 1), _XS2: (1, 0, 1e-15, 1), _S2: (2, 0.25, 1e-8, 0.9875)}
    numbers |= {_XXS3: (2, 0, 1e-8, 1.0125), _S3: (2, 0, 0, 1.033)}
    factor, plain_square, eps, fudge = (np.float32(v) for v in numbers[layout])
    filled = np.append(tries, np.full(LANES - tries.size, tries[-1], np.float32))
    largest = np.float32(5 if layout < _XXS3 else 15)
    return Rules(
        layout, nbytes, block, even, factor, plain_square, eps, largest, filled, tries.size, again, fudge
    )  # fmt: skip


@cache
def _plan(name: str) -> tuple[Tables, Rules]:
    """Returns a type's codebook and rules."""

    def tries(middle: int, step: float, reach: int) -> NDArray[np.float32]:
        return np.float32(middle) + np.arange(-reach, reach + 1).astype(np.float32) * np.float32(step)

    rules = {
        "iq2_xxs": lambda: _rules(_XXS2, 66, 32, True, tries(5, 0.1, 6), ALWAYS),
        "iq2_xs": lambda: _rules(_XS2, 74, 16, True, tries(5, 0.1, 9), OFF_GRID),
        "iq2_s": lambda: _rules(_S2, 82, 16, False, tries(5, 0.1, 9), OFF_GRID),
        "iq3_xxs": lambda: _rules(_XXS3, 98, 32, True, tries(15, 0.2, 15), OFF_GRID),
        "iq3_s": lambda: _rules(_S3, 110, 32, False, tries(15, 0.2, 9), ANY_OFF_GRID),
    }
    return tables(codebook(name)), rules[name]()


def encode_iq2_xxs(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract. Importance must be there."""
    _encode(x, importance, out, *_plan("iq2_xxs"))


def encode_iq2_xs(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract. Importance must be there."""
    _encode(x, importance, out, *_plan("iq2_xs"))


def encode_iq2_s(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract."""
    _encode(x, importance, out, *_plan("iq2_s"))


def encode_iq3_xxs(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract."""
    _encode(x, importance, out, *_plan("iq3_xxs"))


def encode_iq3_s(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract."""
    _encode(x, importance, out, *_plan("iq3_s"))


@compiled
def _encode(x: Any, importance: Any, out: Any, table: Any, rules: Any) -> None:
    """Encodes rows of super-blocks."""
    room = scratch()
    done = _Super(np.empty(64, np.int64), np.empty(32, np.int64), np.empty(16, np.float32), np.empty(16, np.int64))
    weight, root, size = np.empty(32, np.float32), np.empty(32, np.float32), np.empty(32, np.float32)
    for r in range(x.shape[0]):
        for start in range(0, x.shape[1], SUPER):
            most = _blocks(x[r], start, importance, table, rules, weight, root, size, done, room)
            at = start // SUPER * rules.nbytes
            _write(most, rules, done, out[r, at : at + rules.nbytes])


@compiled
def _blocks(
    x: Any, start: int, importance: Any, table: Any, rules: Any, weight: Any, root: Any, size: Any, done: Any, room: Any
) -> Any:  # fmt: skip
    """Fills `done` with points, signs and scales of one super-block; returns its largest scale, float32."""
    n = rules.block
    square = mean_square(x, start, rules.factor)
    done.index[:] = 0
    done.signs[:] = 0
    most_scale = _ZERO
    for b in range(SUPER // n):
        at = start + n * b
        _costs(x, at, n, importance, square, rules.plain_square, weight, root)
        signs = done.signs[n // 8 * b : n // 8 * (b + 1)]
        take_signs(x, at, n, rules.even, weight, size, signs)
        most = size[0]
        for i in range(1, n):
            most = max(most, size[i])
        done.scales[b] = 0
        scale = most / rules.largest
        if most >= rules.eps and rules.layout == _XXS2:
            scale = positive_scale(size, n, 4, weight)
            most = scale * np.float32(3)
        elif most < rules.eps:
            most = _ZERO
        if most <= 0:
            signs[:] = 0
            continue
        scale = search(
            table, weight, root, size, n, rules.numerators, rules.tried, most, scale, rules.again, room
        )  # fmt: skip
        if scale < 0:
            scale = -scale
            for g in range(n // 8):
                signs[g] ^= 255
        for g in range(n // table.dim):
            done.index[n // table.dim * b + g] = room.chosen[g]
        done.scales[b] = scale
        most_scale = max(most_scale, scale)
    return most_scale


@compiled
def _costs(x: Any, at: int, n: int, importance: Any, square: Any, plain: Any, weight: Any, root: Any) -> None:
    """Writes what errors of a block's weights cost, and the square roots."""
    if importance.size:
        for i in range(n):
            weight[i] = importance[at + i] * np.sqrt(square + x[at + i] * x[at + i])
    elif plain > 0:
        for i in range(n):
            weight[i] = plain * square + x[at + i] * x[at + i]
    else:
        for i in range(n):
            weight[i] = x[at + i] * x[at + i]
    for i in range(n):
        root[i] = np.sqrt(weight[i])


@compiled
def _write(most: Any, rules: Any, done: Any, block: Any) -> None:
    """Writes the bytes of a super-block whose largest scale is `most`."""
    done.codes[:] = 0
    half = np.uint16(0)
    if most > 0:
        unit = most / _UNITS
        inverse = _ONE / unit
        for b in range(SUPER // rules.block):
            done.codes[b] = np.int64(level(inverse * done.scales[b], _TOP_CODE))
        half = to_half(unit * rules.fudge)
    elif rules.even:
        done.index[:] = 0
        done.signs[:] = 0
    block[0], block[1] = half & 255, half >> 8
    if rules.layout == _XXS2:
        _write_xxs2(done.index, done.signs, done.codes, block)
    elif rules.layout == _XS2:
        _write_xs2(done.index, done.signs, done.codes, block)
    elif rules.layout == _S2:
        _write_s2(done.index, done.signs, done.codes, block)
    elif rules.layout == _XXS3:
        _write_xxs3(done.index, done.signs, done.codes, block)
    else:
        _write_s3(done.index, done.signs, done.codes, block)


@compiled
def _write_word(word: int, block: Any, at: int) -> None:
    """Writes 32 bits, the lowest byte first."""
    for i in range(4):
        block[at + i] = (word >> (8 * i)) & 255


@compiled
def _signs_and_code(signs: Any, b: int, code: int) -> int:
    """Returns the word of a 32-weight block: 7 bits of signs for each 8 weights, the scale's code on top."""
    word = code << 28
    for g in range(4):
        word |= (signs[4 * b + g] & 127) << (7 * g)
    return word


@compiled
def _write_xxs2(index: Any, signs: Any, codes: Any, block: Any) -> None:
    """2..65: per 32 weights four indices, then the word of signs and scale."""
    for b in range(8):
        for g in range(4):
            block[2 + 8 * b + g] = index[4 * b + g]
        _write_word(_signs_and_code(signs, b, codes[b]), block, 6 + 8 * b)


@compiled
def _write_xs2(index: Any, signs: Any, codes: Any, block: Any) -> None:
    """2..65: per 8 weights 9 bits of index, 7 of signs; 66..73: two scales each."""
    for g in range(32):
        word = index[g] | (signs[g] & 127) << 9
        block[2 + 2 * g], block[3 + 2 * g] = word & 255, word >> 8
    for b in range(8):
        block[66 + b] = codes[2 * b] | codes[2 * b + 1] << 4


@compiled
def _write_s2(index: Any, signs: Any, codes: Any, block: Any) -> None:
    """2..33: low bytes of the indices; 34..65: signs; 66..73: four times the bits above; 74..81: two scales each."""
    for g in range(32):
        block[2 + g], block[34 + g] = index[g] & 255, signs[g] & 255
    for b in range(8):
        high = 0
        for g in range(4):
            high |= index[4 * b + g] >> 8 << 2 * g
        block[66 + b], block[74 + b] = high, codes[2 * b] | codes[2 * b + 1] << 4


@compiled
def _write_xxs3(index: Any, signs: Any, codes: Any, block: Any) -> None:
    """2..65: indices; 66..97: per 32 weights the word of signs and scale."""
    for g in range(64):
        block[2 + g] = index[g]
    for b in range(8):
        _write_word(_signs_and_code(signs, b, codes[b]), block, 66 + 4 * b)


@compiled
def _write_s3(index: Any, signs: Any, codes: Any, block: Any) -> None:
    """2..65: low bytes of the indices; 66..73: eight times the bit above; 74..105: signs; 106..109: two scales each."""
    for b in range(8):
        high = 0
        for g in range(8):
            block[2 + 8 * b + g] = index[8 * b + g] & 255
            high |= index[8 * b + g] >> 8 << g
        block[66 + b] = high
    for g in range(32):
        block[74 + g] = signs[g] & 255
    for b in range(4):
        block[106 + b] = codes[2 * b] | codes[2 * b + 1] << 4
