"""Codes of a few bits as one stream of bits in 32-bit words, lowest bits first, down the rows of a matrix.

Value i of a column takes bits `bits * i` and up of the column's stream. Widths that divide 32 never straddle words; of
3-bit codes each 32 fill three words exactly:

    word 0  | 0 | 1 | 2 | ... | 9 |10.      value 10: its two low bits end word 0, its high bit begins word 1
    word 1  .|11 |12 | ... | 20 |21.        value 21: its low bit ends word 1, its two high bits begin word 2
    word 2  ..|22 |23 | ... | 31 |
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

WORD = 32


def period(bits: int) -> int:
    """Returns after how many values the stream is at the start of a word again: 16, 32, 8, 4 for 2, 3, 4, 8 bits."""
    return WORD // gcd(WORD, bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns codes as words; undone by `unpack`.

    Args:
        codes: uint8 `[rows, cols]`, values below `2**bits`, `rows` a multiple of `period(bits)`.
        bits: Width of a code.

    Returns:
        int32 `[rows * bits / 32, cols]`.
    """
    each = period(bits)
    runs = codes.reshape(-1, each, codes.shape[1])
    words = torch.zeros(len(runs), each * bits // WORD, codes.shape[1], dtype=torch.int32)
    for i in range(each):
        word, shift = divmod(i * bits, WORD)
        value = runs[:, i].to(torch.int32)
        words[:, word] |= value << shift  # bit 31 is the sign: it wraps as it should
        if shift + bits > WORD:
            words[:, word + 1] |= value >> (WORD - shift)
    return words.flatten(0, 1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Returns the codes of int32 words `[rows * bits / 32, cols]` as uint8 `[rows, cols]`."""
    each = period(bits)
    runs = words.reshape(-1, each * bits // WORD, words.shape[1])
    codes = torch.empty(len(runs), each, words.shape[1], dtype=torch.uint8)
    for i in range(each):
        word, shift = divmod(i * bits, WORD)
        low = min(bits, WORD - shift)
        value = (runs[:, word] >> shift) & 2**low - 1  # the shift is arithmetic: the mask drops the sign
        if low < bits:
            value |= (runs[:, word + 1] & 2 ** (bits - low) - 1) << low
        codes[:, i] = value
    return codes.flatten(0, 1)


def fields(value: int, bits: int) -> Tensor:
    """Returns the words of one period in which every code is `value`, int32 `[period * bits / 32, 1]`."""
    return pack(torch.full((period(bits), 1), value, dtype=torch.uint8), bits)
