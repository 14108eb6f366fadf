"""4-bit floats (E2M1) in pairs, with the block scales of NVFP4 and MXFP4; torch, arguments are never changed.

code    0    1    2    3    4    5    6    7
value   0   0.5   1   1.5   2    3    4    6
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.kernels import fp8

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 6.0
# Weights that share a scale.
NV_BLOCK, MX_BLOCK = 16, 32
# What a global scale maps the greatest weight to: the greatest block scale times the greatest code.
_REACH = fp8.LARGEST * LARGEST
# What an NVFP4 block scale of zero becomes in the peers' files; all codes are zero then.
_NO_SCALE = 0.125
_SIGN = 8
# Bits of a float32 below those that rounding to a power of two looks at: from 1.75 on it goes up.
_HALF_STEP, _MANTISSA = 1 << 21, 23
# Factors on the scale that the search tries, the plain one first; beyond 1 the peak is below the greatest code.
_FACTORS = (1.0, *(0.7 + 0.05 * step for step in range(19) if step != 6))
_SMALLEST = 2.0**-9  # of E4M3
_TWO = 2  # exponent of the greatest power of two among the codes


_TABLE = torch.tensor([*VALUES, *(-value for value in VALUES)])
# Never decreasing, as error feedback wants them, and the code of each.
POINTS = torch.tensor([*(-value for value in VALUES[:0:-1]), *VALUES])
POINT_CODES = torch.tensor([*range(15, 8, -1), *range(8)], dtype=torch.uint8)
# By byte; 255 is NaN.
_POWERS = torch.tensor([*(2.0 ** (byte - 127) for byte in range(255)), torch.nan])


def codes(values: Tensor) -> Tensor:
    """Returns the codes nearest to float32 values, uint8 of their shape; beyond the greatest they saturate.

    The codes below 2 are halves, those from 4 on are two apart: each part is one line of code over value, the steeper
    the smaller, so the least of the three is the code. Rounding a line to even rounds to the even code.
    """
    sizes = values.abs()
    found = (sizes * 2).round_()
    torch.minimum(found, sizes.round().add_(2), out=found)
    torch.minimum(found, sizes.mul_(0.5).round_().add_(4), out=found)
    return found.clamp_(max=len(VALUES) - 1).add_(values < 0, alpha=_SIGN).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """Returns codes `[rows, cols]`, `cols` even, two to a byte: uint8 `[rows, cols / 2]`; undone by `unpack`."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Returns the codes of uint8 `[rows, bytes]` as uint8 `[rows, 2 * bytes]`."""
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns float32 `[rows, cols]`: the codes' values times the scale of their block, float32 `[rows, blocks]`."""
    values = _TABLE.to(codes.device)[codes.int()]
    return (values.reshape(*scale.shape, -1) * scale.unsqueeze(-1)).reshape(codes.shape)


def global_scale(peak: Tensor) -> Tensor:
    """Returns what NVFP4's block scales are multiplied with before they are stored: float32 of the shape of `peak`.

    Args:
        peak: Greatest magnitude of all tensors that share it, float32. Zero gives 1.
    """
    # the peers' two roundings: of the reciprocal, and of the product
    found = fp8.rounded(fp8.rounded(1 / peak.clamp_min(torch.finfo(torch.float32).tiny)) * _REACH)
    return torch.where(found.isfinite(), found, torch.ones_like(found))


def nv_encode(weight: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Returns NVFP4 codes and block scales of a weight.

    Args:
        weight: float32 `[rows, cols]`, `cols` a multiple of 16.
        shared: The global scale, float32 `[]`.

    Returns:
        Codes uint8 `[rows, cols]` and scales float8_e4m3fn `[rows, cols / 16]`.
    """
    blocks = weight.reshape(len(weight), -1, NV_BLOCK)
    local = fp8.rounded(blocks.abs().amax(-1) / LARGEST) * shared
    stored = local.clamp_max(fp8.LARGEST).to(torch.float8_e4m3fn)
    stored = torch.where(stored.float() == 0, torch.full_like(local, _NO_SCALE), stored.float())
    found = codes(blocks / (stored / shared).unsqueeze(-1))
    return found.reshape(weight.shape), stored.to(torch.float8_e4m3fn)


def mx_encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns MXFP4 codes and exponents of a weight float32 `[rows, cols]`, `cols` a multiple of 32.

    Returns:
        Codes uint8 `[rows, cols]` and E8M0 bytes uint8 `[rows, cols / 32]`: the greatest power of two not above the
        block's peak, which counts as the next one from 1.75 times a power on, over that among the codes.
    """
    blocks = weight.reshape(len(weight), -1, MX_BLOCK)
    exponents = (blocks.abs().amax(-1).view(torch.int32) + _HALF_STEP) >> _MANTISSA
    stored = (exponents - _TWO).clamp_(0, 254).to(torch.uint8)
    return codes(blocks / powers(stored).unsqueeze(-1)).reshape(weight.shape), stored


def powers(exponents: Tensor) -> Tensor:
    """Returns 2 ** (byte - 127) as float32 for E8M0 bytes; NaN for 255."""
    return _POWERS.to(exponents.device)[exponents.int()]


def _loss(blocks: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    """Returns the weighted squared error of `blocks` `[rows, block]` on their `scale` `[rows, 1]`: `[rows, 1]`."""
    rounded = _TABLE.to(blocks.device)[codes(blocks / scale).int()] * scale
    return ((rounded - blocks).square() @ importance)[:, None]


def nv_search(blocks: Tensor, importance: Tensor, shared: Tensor) -> Tensor:
    """Returns the best NVFP4 scale that was tried for each block, as stored: the bytes of E4M3, uint8 `[rows, 1]`.

    Args:
        blocks: float32 `[rows, 16]`.
        importance: Cost of a squared error of each column, float32 `[16]`.
        shared: The global scale, float32 `[]`.
    """
    local = fp8.rounded(blocks.abs().amax(-1, keepdim=True) / LARGEST) * shared
    best: Tensor | None = None
    found = torch.zeros_like(local, dtype=torch.uint8)
    for factor in _FACTORS:
        scale = (local * factor).clamp(_SMALLEST, fp8.LARGEST).to(torch.float8_e4m3fn)
        loss = _loss(blocks, scale.float() / shared, importance)
        better = torch.ones_like(loss, dtype=torch.bool) if best is None else loss < best
        best = loss if best is None else torch.where(better, loss, best)
        found = torch.where(better, scale.view(torch.uint8), found)
    return found


def mx_search(blocks: Tensor, importance: Tensor) -> Tensor:
    """Returns the best exponent of three for each block of float32 `[rows, 32]`: uint8 `[rows, 1]`."""
    _, plain = mx_encode(blocks)
    tried = [(plain.int() + step).clamp_(0, 254).to(torch.uint8) for step in (0, -1, 1)]
    losses = torch.stack([_loss(blocks, powers(exponent), importance) for exponent in tried])
    return torch.stack(tried).gather(0, losses.argmin(0, keepdim=True))[0]
