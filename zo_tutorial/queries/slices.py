"""A slice of a layer's output that some coordinates change, while all the rest of the output stands still."""

from functools import cached_property

import torch
from torch import Tensor

from zo_tutorial.queries.parts import same
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

    @cached_property
    def rest(self) -> Tensor:
        """o without what the slice gives to it (C, R)."""
        return self.add(self.layer.o, -self._slice(self.layer.a).unsqueeze(0))[0]

    def _slice(self, z: Tensor) -> Tensor:
        """(rows, R) from (units, R), a copy."""
        part = slice_of(z, self.factors, self.i)  # (left, right, R)
        return part.reshape(-1, part.shape[-1]).clone()

    def behind(self, o: Tensor) -> Tensor:
        """(P,) losses for P outputs."""
        layer = self.layer
        return layer.suffix.losses(o) if layer.head is None else layer.head.losses(o)

    def activated(self, z: Tensor) -> Tensor:
        """φ(z), with a head, for P slices z (P, rows, R), which it may overwrite; else z."""
        return z if self.layer.head is None else self.layer.head.activate(z)

    def outputs(self, a: Tensor) -> Tensor:
        """P outputs o, as the head has them, for P slices φ(z) (P, rows, R); without a head P whole z."""
        layer = self.layer
        if layer.head is not None:
            return self.add(self.rest, a)
        whole = layer.z.repeat(len(a), 1, 1)  # (P, units, R)
        target = slice_of(whole, self.factors, self.i)
        target.copy_(a.view_as(target))
        return whole

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
            layer.o = self.outputs(self.activated(self.z.unsqueeze(0).clone()))[0]
            slice_of(layer.a, self.factors, self.i).copy_(layer.head.activate(self.z.clone()).view_as(target))

    def look(self, sensitivity: Tensor, steps: Tensor) -> Tensor:
        """The changes of the loss when K coordinates with sensitivities (K, rows, R) make steps (S, K): (S, K)."""
        layer = self.layer
        z = torch.addcmul(self.z, steps[..., None, None], sensitivity).flatten(0, 1)  # (S K, rows, R)
        if layer.head is None:
            o, rest = self.outputs(z), layer.z
        else:
            change = layer.head.activate(z).sub_(self._slice(layer.a))
            o, rest = self.add(layer.o, change), layer.o  # (S K, …)
        losses = self.behind(torch.cat([o, rest.unsqueeze(0)]))
        # what moves nothing changes nothing, however a product of matrices rounds in another place
        return (losses[:-1] - losses[-1]).masked_fill_(same(o, rest), 0).view_as(steps)
