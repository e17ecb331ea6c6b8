"""The two zeroth-order optimisers: random directions (`ZO_SGD_mask`) and coordinates (`ZO_SCD_mask`)."""

from zo_tutorial.optimizer.coordinates import ZO_SCD_mask
from zo_tutorial.optimizer.directions import ZO_SGD_mask

__all__ = ["ZO_SCD_mask", "ZO_SGD_mask"]
