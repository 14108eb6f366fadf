"""What error feedback leaves is mended: codes one column at a time, grids one sub-block at a time.

Coordinate descent on e H e^T, e being one row's error. With g = H e at hand, moving column j by d changes the loss by
`2 d g_j + d^2 H_jj`, so the best code is the one nearest to `q_j - g_j / H_jj` while all others stay. For each
sub-block the neighbouring storable grids are tried, its codes rounded anew on each by the same rule, column after
column; the exact change of the loss decides. What does not lower it is left as it was, so the loss never rises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.kernels.cpu.descent import search
from quantize.kernels.levels import Levels
from quantize.schemes import Levelled

# Columns between two updates of the gradient of all others.
_RUN = 32
# The widest sub-block whose grid is searched: the work grows with its square. Wider ones have only their codes mended.
_WIDEST = 256


@dataclass(slots=True)
class Rounded:
    """Rows in the making.

    Attributes:
        codes: Indices into the points, uint8 `[rows, K]`.
        levels: The grids of each block of columns, in order.
    """

    codes: Tensor
    levels: list[Levels]


def descend(weight: Tensor, hessian: Tensor, scheme: Levelled, rounded: Rounded, rounds: int) -> Rounded:
    """Returns rows whose loss is not larger: mended `rounds` times.

    Args:
        weight: float32 `[rows, K]`; not changed.
        hessian: float32 `[K, K]`, positive definite; not changed.
        scheme: The grid.
        rounded: The rows so far; used up.
        rounds: Each goes over all columns once. Two take off most of what can be had.
    """
    state = _State(weight, hessian, scheme, rounded)
    for _ in range(rounds):
        state.mend_codes() if state.sub > _WIDEST else state.mend_grids()
    return Rounded(state.codes.T.contiguous(), state.levels)


class _State:
    """Columns first: each is contiguous. `gradient` is H (Q - W)^T, `[K, rows]`, true whenever a method returns."""

    def __init__(self, weight: Tensor, hessian: Tensor, scheme: Levelled, rounded: Rounded) -> None:
        self.scheme, self.hessian = scheme, hessian
        self.levels = rounded.levels
        self.codes = rounded.codes.T.contiguous()
        self.points = self.levels[0].points
        self.uniform = bool((self.points.diff() == 1).all())
        self.middles = (self.points[1:] + self.points[:-1]) / 2
        self.block = len(self.codes) // len(self.levels)
        self.sub = self.block // self.levels[0].scale.shape[1]
        self.values = torch.empty(self.codes.shape, device=weight.device)
        for start in range(0, len(self.codes), self.sub):
            part = slice(start, start + self.sub)
            scale, offset = self._grid(start)
            self.values[part] = self.points[self.codes[part].int()] * scale + offset
        self.gradient = hessian @ (self.values - weight.T)

    def mend_codes(self) -> None:
        """Gives each column in turn the best codes while all others stay."""
        width = len(self.codes)
        inverse = 1.0 / self.hessian.diagonal()
        for start in range(0, width, _RUN):
            stop = min(start + _RUN, width)
            inner = self.hessian[start:stop, start:stop]
            gradient = self.gradient[start:stop]
            before = self.values[start:stop].clone()
            for i in range(stop - start):
                scale, offset = self._grid(start + i)
                wanted = (self.values[start + i] - gradient[i] * inverse[start + i]).sub_(offset)
                wanted.div_(torch.where(scale == 0, 1, scale))  # any code is as good there
                self.codes[start + i], points = self._nearest(wanted)
                value = points.mul_(scale).add_(offset)
                gradient.addr_(inner[i], value - self.values[start + i])
                self.values[start + i] = value
            change = self.values[start:stop] - before
            self.gradient[:start].addmm_(self.hessian[:start, start:stop], change)
            self.gradient[stop:].addmm_(self.hessian[stop:, start:stop], change)

    def mend_grids(self) -> None:
        """Gives each sub-block in turn the best of its grid and the neighbouring ones, and new codes with it."""
        for index, levels in enumerate(self.levels):
            tried = [levels, *self.scheme.neighbours(levels)]
            scale, offset = (torch.stack([getattr(each, key) for each in tried]) for key in ("scale", "offset"))
            chosen = torch.zeros(levels.scale.shape, dtype=torch.int64, device=scale.device)
            for column in range(scale.shape[2]):
                start = index * self.block + column * self.sub
                chosen[:, column] = self._choose(start, scale[:, :, column], offset[:, :, column])
            self.levels[index] = self.scheme.choose(tried, chosen)

    def _choose(self, start: int, scale: Tensor, offset: Tensor) -> Tensor:
        """Moves a sub-block to the best of some grids `[n, rows]`, and returns which; 0 is the one it has."""
        part = slice(start, start + self.sub)
        inner, old = self.hessian[part, part], self.values[part]
        if _compiled(self.uniform, scale):
            return self._choose_fast(part, scale, offset)
        tries, rows = scale.shape
        shape = (self.sub, tries, rows)
        gradient = self.gradient[part, None].expand(shape).contiguous().view(self.sub, -1)
        moves = torch.empty(shape, device=scale.device)
        codes = torch.empty(shape, dtype=torch.uint8, device=scale.device)
        usable = torch.where(scale == 0, 1, scale)
        rise = torch.zeros_like(scale)
        for i in range(self.sub):
            slope = gradient[i].view(tries, rows)
            wanted = (old[i] - slope / inner[i, i]).sub(offset).div_(usable)
            codes[i], points = self._nearest(wanted)
            move = points.mul_(scale).add_(offset).sub_(old[i])
            rise += move * (2 * slope + inner[i, i] * move)
            moves[i] = move
            if i + 1 < self.sub:
                gradient[i + 1 :].addr_(inner[i, i + 1 :], move.flatten())
        lowest, best = rise.min(0)
        falls = lowest < 0
        best = torch.where(falls, best, 0)
        place = best.expand(self.sub, 1, rows)
        change = torch.where(falls, moves.gather(1, place).squeeze(1), 0)
        self.codes[part] = torch.where(falls, codes.gather(1, place).squeeze(1), self.codes[part])
        self.values[part] += change
        self.gradient.addmm_(self.hessian[:, part], change)
        return best

    def _choose_fast(self, part: slice, scale: Tensor, offset: Tensor) -> Tensor:
        """Does the same with a compiled loop, which exists for processors and evenly spaced points."""
        best, moves = search(
            self.hessian[part, part].contiguous().numpy(),
            self.values[part].numpy(),
            self.gradient[part].numpy(),
            scale.contiguous().numpy(),
            offset.contiguous().numpy(),
            float(self.points[0]),
            len(self.points) - 1,
            self.codes[part].numpy(),
        )
        change = torch.from_numpy(moves)
        self.values[part] += change
        self.gradient.addmm_(self.hessian[:, part], change)
        return torch.from_numpy(best)

    def _nearest(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the code of the point nearest to each value, and the point; `wanted` may be used up."""
        if self.uniform:
            code = wanted.sub_(self.points[0]).round_().clamp_(0, len(self.points) - 1)
            return code, code + self.points[0]
        code = torch.bucketize(wanted, self.middles)
        return code, self.points[code]

    def _grid(self, column: int) -> tuple[Tensor, Tensor]:
        levels, sub = self.levels[column // self.block], column % self.block // self.sub
        return levels.scale[:, sub], levels.offset[:, sub]


def _compiled(uniform: bool, values: Tensor) -> bool:
    """Returns whether there is a compiled loop for the points and the device."""
    return uniform and values.device.type == "cpu"
