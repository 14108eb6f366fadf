"""The grid of EXL2: groups of input channels of different bit widths, the neediest channels on the widest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from quantize.errors import UsageError
from quantize.kernels import exl2
from quantize.kernels.exl2 import WIDTHS
from quantize.schemes import QuantizedTensor, Shape

# A part as it is spelt: width, share, group size where it is not that of all, which stands at the end.
_PART = re.compile(r"-(\d)b(?:\.(\d{1,4}))?(?:g(\d+))?")
_WHOLE = 10_000
# Codes of 32 channels fill whole words at every width, and engines read channels in runs of 32.
_RUN = 32
# Engines hold the order of channels in 16 bits.
WIDEST = 65_536


@dataclass(frozen=True, slots=True)
class Part:
    """A share of the channels.

    Attributes:
        bits: Width of their codes: 2, 3, 4, 5, 6 or 8.
        share: How many of the channels, in ten-thousandths; rounded up to whole groups.
        group: Channels that share scales, a multiple of 32.
    """

    bits: int
    share: int
    group: int


@dataclass(frozen=True, slots=True)
class EXL2:
    """Groups of channels in falling need and width: the first part takes its share of them, then the next, and so on.

    Arrays of a coded tensor of shape `[rows, cols]`, `groups` being their number, all in packed order:
    `codes` uint8 `[rows, cols]`; `steps` uint8 `[rows, groups]`, 0 to 15; `maxima` float16 `[rows, groups]` and
    `order` int64 `[rows, cols]`, the column at each packed position: the same in every row (one row expanded).
    `quantize.kernels.exl2` says what they mean.

    Rows share the maxima, so a matrix is coded whole, never a run of rows at a time.

    Attributes:
        parts: In falling width; their shares make up a whole.
    """

    parts: tuple[Part, ...]

    unit = 1

    def __post_init__(self) -> None:
        bits = [part.bits for part in self.parts]
        if not bits or any(width not in WIDTHS for width in bits):
            raise UsageError(f"EXL2 has no codes of {bits} bits", "choose from 2, 3, 4, 5, 6, 8")
        if bits != sorted(bits, reverse=True):
            raise UsageError(f"EXL2 has its widths in falling order, not {bits}", "name the widest first")
        for part in self.parts:
            if part.group < _RUN or part.group % _RUN:
                raise UsageError(f"{part.group} is no group size of EXL2", "choose 32, 64 or 128")
        shares = [part.share for part in self.parts]
        if min(shares) <= 0 or sum(shares) != _WHOLE:
            said = " + ".join(f"{share / _WHOLE:g}" for share in shares)
            raise UsageError(f"the shares of EXL2's widths are {said}, which is not 1", "leave out the last one's")

    def __str__(self) -> str:
        alike = len({part.group for part in self.parts}) == 1
        texts = [f"{part.bits}b{_spelt(part.share)}{'' if alike else f'g{part.group}'}" for part in self.parts]
        return "-".join(["exl2", *texts, *([f"g{self.parts[0].group}"] if alike else [])])

    @classmethod
    def of_groups(cls, groups: exl2.Groups) -> EXL2:
        """Returns the scheme that cuts a matrix into just these groups; all but the last of a run are of one size.

        Args:
            groups: Bits and channels of each, a multiple of 32, in falling width; not more than `WIDEST` channels.
        """
        cols = sum(columns for _, columns in groups)
        runs = [(bits, size, len(list(same))) for (bits, size), same in groupby(groups)]
        if len(runs) > 1 and runs[-1][0] == runs[-2][0] and runs[-1][1] < runs[-2][1] and runs[-1][2] == 1:
            runs[-2:] = [(*runs[-2][:2], runs[-2][2] + 1)]  # the last group is what was left
        parts: list[Part] = []
        left = _WHOLE
        for bits, size, count in runs[:-1]:
            share = _share(size * (count - 1), size * count, cols)
            parts.append(Part(bits, share, size))
            left -= share
        return cls((*parts, Part(runs[-1][0], left, runs[-1][1])))

    @property
    def code_bits(self) -> float:
        """Bits of a code on average, scales and all else left out."""
        return sum(part.bits * part.share for part in self.parts) / _WHOLE

    @property
    def block(self) -> int:
        """Channels of the smallest group."""
        return min(part.group for part in self.parts)

    def groups(self, cols: int) -> list[tuple[int, int]]:
        """Returns bits and channels of each group of a matrix of `cols` columns, in packed order."""
        return list(self._groups(cols))

    def _groups(self, cols: int) -> Iterator[tuple[int, int]]:
        left = cols
        for number, part in enumerate(self.parts, 1):
            # shares are rounded up, so nothing may be left for the last part
            share = left * _WHOLE if number == len(self.parts) else min(cols * part.share, left * _WHOLE)
            for _ in range(-(-share // (_WHOLE * part.group))):
                size = min(part.group, left)
                left -= size
                yield part.bits, size

    def bits_per_weight(self, shape: Shape) -> float:
        """Returns all bits of the five arrays of a tensor of `shape`, the padding of its height left out."""
        rows, cols = shape[-2:]
        groups = self.groups(cols)
        codes = sum(bits * columns for bits, columns in groups) * rows
        # of a group: maximum 16, width and start 32, a step of 4 bits for each row; of a channel: its place
        return (codes + len(groups) * (16 + 32 + 4 * rows) + 32 * cols) / (rows * cols)

    def reject(self, shape: Shape) -> str | None:
        """Returns a reason for tensors that are no matrices or whose width is no multiple of 32 or beyond 65536."""
        if len(shape) != 2:
            return f"{len(shape)}-dimensional, not a matrix"
        if not shape[0] or not shape[1] or shape[1] % _RUN:
            return f"its width {shape[1]} is no multiple of {_RUN}" if shape[1] % _RUN else "it is empty"
        return f"its width {shape[1]} is beyond {WIDEST}" if shape[1] > WIDEST else None

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns a whole matrix `[rows, cols]` rounded to nearest, its most important columns on the widest grids.

        Without importance, columns come by their mean square.
        """
        need = weight.float().square().mean(0) if importance is None else importance
        return self.encode_in_order(weight, by_need(need), importance)

    def encode_in_order(self, weight: Tensor, order: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Returns a whole matrix rounded to nearest with its columns packed in some order.

        Args:
            weight: Float `[rows, cols]`.
            order: The column at each position, int64 `[cols]`.
            importance: Cost of a squared error of each column, float32 `[cols]`.
        """
        columns = weight.float().T[order].T
        costs = None if importance is None else importance.float()[order]
        codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
        steps: list[Tensor] = []
        maxima: list[Tensor] = []
        start = 0
        for bits, size in self.groups(weight.shape[1]):
            part = slice(start, start + size)
            here = columns[:, part].contiguous()
            step, maximum = exl2.fit(here, bits, None if costs is None else costs[part])
            scale = exl2.scales(step[:, None], maximum)[:, 0].float()
            codes[:, part] = exl2.round_to_codes(here, scale, bits)
            steps.append(step)
            maxima.append(maximum)
            start += size
        return self.coded(codes, torch.stack(steps, 1), torch.stack(maxima), order)

    def coded(self, codes: Tensor, steps: Tensor, maxima: Tensor, order: Tensor) -> QuantizedTensor:
        """Returns the coded tensor of arrays in packed order.

        Args:
            codes: uint8 `[rows, cols]`.
            steps: uint8 `[rows, groups]`.
            maxima: float16 `[groups]`.
            order: int64 `[cols]`.
        """
        arrays = {
            "codes": codes,
            "steps": steps,
            "maxima": maxima.expand(len(codes), -1),
            "order": order.expand(len(codes), -1),
        }
        return QuantizedTensor(self, tuple(codes.shape), arrays)

    def decode(self, coded: QuantizedTensor) -> Tensor:
        """Returns the values as engines compute them, float32 `[rows, cols]`, columns in the tensor's own order."""
        codes, steps, maxima, order = (coded.arrays[key] for key in ("codes", "steps", "maxima", "order"))
        values = exl2.dequantize(codes, exl2.scales(steps, maxima), self.groups(coded.shape[1]))
        if not len(values):
            return values
        return values[:, order[0].argsort()]


def by_need(need: Tensor) -> Tensor:
    """Returns columns by falling need, int64; of equals the first comes first."""
    return torch.sort(need, descending=True, stable=True).indices


def parse(text: str) -> EXL2:
    """Returns the scheme spelt `text`, as `parse_scheme` hands it on; the last part's share may be left out.

    Raises:
        UsageError: there is no such grid.
    """
    body, _, common = text.partition("-g")
    found = _PART.findall(body)
    shares = [int(f"{share:0<4}") if share else 0 for _, share, _ in found]
    if not shares[-1]:
        shares[-1] = _WHOLE - sum(shares)
    sizes = [int(own or common or 0) for _, _, own in found]
    if not all(sizes) or (common and any(own for _, _, own in found)):
        raise UsageError(
            f"'{text}' says no or two group sizes", "write exl2-5b.10-4b.90-g32 or exl2-8b.05g32-4b.95g128"
        )
    return EXL2(
        tuple(Part(int(bits), share, size) for (bits, _, _), share, size in zip(found, shares, sizes, strict=True))
    )


def _spelt(share: int) -> str:
    """Returns a share such as `.10`, with two digits or more; nothing for a whole."""
    if share == _WHOLE:
        return ""
    digits = f"{share:04}"
    return f".{digits[:2]}{digits[2:].rstrip('0')}"


def _share(above: int, most: int, cols: int) -> int:
    """Returns the greatest share with few digits of which `above < cols * share <= most` is true."""
    for digit in (100, 10, 1):
        share = most * _WHOLE // cols // digit * digit
        if share * cols > above * _WHOLE:
            return share
    raise AssertionError((above, most, cols))  # a group is 1/2048 of the widest matrix or more
