"""Many tensors that differ from one in a few slices only: held as those slices."""

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """P tensors that differ from a recorded one in some slices along one dimension.

    dim is counted from the end: -1 is the last.
    """

    values: Tensor  # of those slices (P, ..., w, ...)
    dim: int
    slices: Tensor  # their numbers (P, w)
    rest: Tensor  # the recorded tensor (...)

    def whole(self) -> Tensor:
        """(P, ...)."""
        return self.put(self.rest.repeat(len(self.slices), *[1] * self.rest.dim()))

    def put(self, whole: Tensor) -> Tensor:
        """Write the slices into P whole tensors."""
        points = torch.arange(len(whole), device=whole.device)[:, None]
        whole.movedim(self.dim, 1)[points, self.slices] = self.values.movedim(self.dim, 1)
        return whole

    def pick(self, tensor: Tensor) -> Tensor:
        """The same slices of a tensor that all points share, (P, ..., w, ...); itself where it has only one."""
        if tensor.dim() < -self.dim or tensor.shape[self.dim] == 1:
            return tensor
        return tensor.movedim(self.dim, 0)[self.slices].movedim(1, self.dim)


def same(x: Tensor, rest: Tensor) -> Tensor:
    """Which of P tensors (P, ...) are equal to another one, or each to its own, to the last bit (P,)."""
    return (x == rest).reshape(len(x), -1).all(1)


Moved = Tensor | Part  # a recorded tensor as it is at P points: (P, ...)


def whole(x: Moved) -> Tensor:
    return x.whole() if isinstance(x, Part) else x
