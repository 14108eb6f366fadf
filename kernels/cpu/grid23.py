"""Encoders of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S: rows of super-blocks and their bytes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from quantize.kernels.cpu.grids import codebook
from quantize.kernels.cpu.gridscan import LANES, Tables, level, raw_room, raw_tables, room, tables
from quantize.kernels.cpu.gridsearch import (
    ALWAYS,
    ANY_OFF_GRID,
    OFF_GRID,
    SUPER,
    costs,
    mean_square,
    plain_costs,
    positive_scale,
    search,
    take_signs,
)
from quantize.kernels.cpu.loops import compiled
from quantize.kernels.cpu.numeric import to_half
from quantize.kernels.cpu.raw import raw

if TYPE_CHECKING:
    from numpy.typing import NDArray

_XXS2, _XS2, _S2, _XXS3, _S3 = range(5)

_ZERO, _ONE, _TOP_CODE, _UNITS = (np.float32(v) for v in (0, 1, 15, 31))


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
    """What one super-block became; arrays outside, pointers inside."""

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
    return tables(codebook(name), True), rules[name]()


def encode_iq2_xxs(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract. Importance must be there."""
    _run("iq2_xxs", x, importance, out)


def encode_iq2_xs(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract. Importance must be there."""
    _run("iq2_xs", x, importance, out)


def encode_iq2_s(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract."""
    _run("iq2_s", x, importance, out)


def encode_iq3_xxs(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract."""
    _run("iq3_xxs", x, importance, out)


def encode_iq3_s(x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows; ggml.py has the contract."""
    _run("iq3_s", x, importance, out)


def _run(name: str, x: NDArray[np.float32], importance: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Encodes rows as a type, with room of its own."""
    done = _Super(np.zeros(64, np.int64), np.zeros(32, np.int64), np.zeros(16, np.float32), np.zeros(16, np.int64))
    _encode(x, importance, out, *_plan(name), done, room())


@compiled
def _encode(x: Any, importance: Any, out: Any, table: Any, rules: Any, done: Any, room: Any) -> None:
    """Encodes rows of super-blocks."""
    tables, r, numerators = raw_tables(table), raw_room(room), raw(rules.numerators)
    d = _Super(raw(done.index), raw(done.signs), raw(done.scales), raw(done.codes))
    for row in range(x.shape[0]):
        for s in range(x.shape[1] // SUPER):
            start, at = SUPER * s, rules.nbytes * s
            block = raw(x) + row * x.shape[1] + start
            square = mean_square(block, rules.factor)
            most = _ZERO
            for b in range(SUPER // rules.block):
                i = rules.block * b
                if importance.size:
                    costs(block + i, rules.block, raw(importance) + start + i, square, r.weight)
                else:
                    plain_costs(block + i, rules.block, rules.plain_square * square, r.weight)
                most = max(most, _block(block + i, b, tables, rules, numerators, d, r))
            _write(most, rules, d, raw(out) + row * out.shape[1] + at)


@compiled
def _block(x: Any, b: int, table: Any, rules: Any, numerators: Any, done: Any, r: Any) -> Any:
    """Finds points, signs and scale of the b-th block, whose costs stand in `r`; returns the scale, float32."""
    n = rules.block
    signs, index = done.signs + n // 8 * b, done.index + n // table.dim * b
    most = take_signs(x, n, rules.even, r, signs)
    scale = most / rules.largest
    if most >= rules.eps and rules.layout == _XXS2:
        scale = positive_scale(r, n, 4)
        most = scale * np.float32(3)
    elif most < rules.eps:
        most = _ZERO
    if most <= 0:
        for g in range(n // 8):
            signs[g] = 0
        for g in range(n // table.dim):
            index[g] = 0
        done.scales[b] = _ZERO
        return _ZERO
    scale = search(table, r, n, numerators, rules.tried, most, scale, rules.again)
    if scale < 0:
        scale = -scale
        for g in range(n // 8):
            signs[g] ^= 255
    for g in range(n // table.dim):
        index[g] = r.chosen[g]
    done.scales[b] = scale
    return scale


@compiled
def _write(most: Any, rules: Any, done: Any, block: Any) -> None:
    """Writes the bytes of a super-block whose largest scale is `most`."""
    half = np.uint16(0)
    unit = most / _UNITS
    for b in range(SUPER // rules.block):
        done.codes[b] = int(level(_ONE / unit * done.scales[b], _TOP_CODE)) if most > 0 else 0
    if most > 0:
        half = to_half(unit * rules.fudge)
    elif rules.even:
        for g in range(64):
            done.index[g] = 0
            done.signs[g // 2] = 0
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
