"""A slice of a layer's output that some coordinates change, while all the rest of the output stands still."""

import torch
from torch import Tensor

from zo_tutorial.queries.sensitivity import slice_of
from zo_tutorial.queries.suffix import CachedLayer

TINY = 1e-3  # within which an activation is taken for linear


class Slice:
    """The i-th slice of a layer's output z.

    Args:
        layer: the layer where it stands.
        factors: z is viewed as `(*factors, R)`, and the slice lies along the second one.
    """

    def __init__(self, layer: CachedLayer, factors: tuple[int, int, int], i: int):
        self.layer, self.factors, self.i = layer, factors, i
        self.z = self._slice(layer.z)  # (rows, R)
        if layer.head is not None:
            # o = W φ(z) + b, of which only W_slice φ(z_slice) changes
            self.add = layer.head.part(factors, i)
            self.rest = self.add(layer.o, -self._slice(layer.a).unsqueeze(0))[0]  # (C, R)

    def _slice(self, z: Tensor) -> Tensor:
        """(rows, R) from (units, R), a copy."""
        part = slice_of(z, self.factors, self.i)  # (left, right, R)
        return part.reshape(-1, part.shape[-1]).clone()

    def losses(self, z: Tensor) -> Tensor:
        """(P,) losses for P slices z (P, rows, R), which it may overwrite."""
        layer = self.layer
        if layer.head is None:
            whole = layer.z.repeat(len(z), 1, 1)  # (P, units, R)
            target = slice_of(whole, self.factors, self.i)
            target.copy_(z.view_as(target))
            return layer.suffix.losses(whole)
        return layer.head.losses(self.outputs(z))

    def outputs(self, z: Tensor) -> Tensor:
        """P outputs o, as the head has them, for P slices z (P, rows, R), which it may overwrite."""
        assert self.layer.head is not None
        return self.add(self.rest, self.layer.head.activate(z))

    def slope(self) -> Tensor | None:
        """About dL/dz of the slice (rows, R), in front of a cross-entropy; None elsewhere."""
        head, cross_entropy = self.layer.head, self.layer.suffix.cross_entropy
        if head is None or cross_entropy is None:
            return None
        sides = head.activate(torch.stack([self.z, self.z - TINY, self.z + TINY]))
        slopes = cross_entropy.slopes(self.add(self.rest, sides[:1])[0])
        return head.back(self.factors, self.i, slopes) * ((sides[2] - sides[1]) / (2 * TINY))

    def leave(self) -> None:
        """Tell the layer where the slice has come to."""
        layer = self.layer
        target = slice_of(layer.z, self.factors, self.i)
        target.copy_(self.z.view_as(target))
        if layer.head is not None:
            layer.o = self.outputs(self.z.unsqueeze(0).clone())[0]
            slice_of(layer.a, self.factors, self.i).copy_(layer.head.activate(self.z.clone()).view_as(target))

    def look(self, sensitivity: Tensor, steps: Tensor) -> Tensor:
        """The changes of the loss when K coordinates with sensitivities (K, rows, R) make steps (S, K): (S, K)."""
        z = self.z.new_empty(steps.numel() + 1, *self.z.shape)
        torch.addcmul(self.z, steps[..., None, None], sensitivity, out=z[:-1].view(*steps.shape, *self.z.shape))
        z[-1] = self.z
        losses = self.losses(z)
        return (losses[:-1] - losses[-1]).view_as(steps)
