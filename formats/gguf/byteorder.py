"""The multi-byte numbers inside GGML's blocks, which lie the other way round in big-endian files.

A big-endian machine writes every number of a block in its own order: scales, and the words that hold packed bits
where llama.cpp reads them as words. Bytes that are read one by one stay.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Type -> (offset, bytes of a number, how many side by side).
_NUMBERS: dict[str, tuple[tuple[int, int, int], ...]] = {
    **dict.fromkeys(("q1_0", "q2_0", "q4_0", "q8_0", "iq4_nl", "iq2_s", "iq3_s"), ((0, 2, 1),)),
    **dict.fromkeys(("q4_1", "q4_k", "q5_k", "iq4_xs"), ((0, 2, 2),)),
    "q5_0": ((0, 2, 1), (2, 4, 1)),
    "q5_1": ((0, 2, 2), (4, 4, 1)),
    "q2_k": ((80, 2, 2),),
    "q3_k": ((108, 2, 1),),
    "q6_k": ((208, 2, 1),),
    "tq1_0": ((52, 2, 1),),
    "tq2_0": ((64, 2, 1),),
    "iq2_xs": ((0, 2, 33),),
    "iq3_xxs": ((0, 2, 1), (66, 4, 8)),
    "iq1_s": ((0, 2, 1), (34, 2, 8)),
    "iq1_m": ((48, 2, 4),),
    "mxfp4": (),
    "nvfp4": (),
}  # iq2_xxs is left out: llama.cpp writes its indices as words and reads them as bytes


def can_swap(name: str) -> bool:
    """Returns whether blocks of a GGML type are known in big-endian order."""
    return name in _NUMBERS


def swap_blocks(name: str, blocks: NDArray[np.uint8]) -> None:
    """Turns the numbers inside blocks round, in place.

    Args:
        name: GGML type in lower case, one that `can_swap`.
        blocks: uint8 `[blocks, bytes of a block]`, C-contiguous.
    """
    for offset, size, count in _NUMBERS[name]:
        numbers = blocks[:, offset : offset + size * count].reshape(len(blocks), count, size)
        blocks[:, offset : offset + size * count] = numbers[:, :, ::-1].reshape(len(blocks), -1)
