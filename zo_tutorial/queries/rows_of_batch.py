"""A part of the batch for each worker: what "batch" shares (chapter 12).

The loss is a mean over the rows of the batch, so it is the sum over the workers of (rows here / all rows) times the
mean over the rows here. Each query ends with one number from each worker to all, added up in the order of ranks: equal
bits on all of them, and equal to one worker's loss up to rounding.

Dropout draws the masks of the whole batch and takes those of its rows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zo_tutorial.queries.recording import ARGUMENTS, tensors_in
from zo_tutorial.workers import Workers

TRIED = 16  # rows at which the loss is seen to be a mean


class RowsOfBatch:
    """The rows of this worker.

    A criterion whose loss is no plain mean over the rows has a method of_part(outputs, targets, whole): what some rows
    add to the loss of a batch whose targets are `whole`.
    """

    def __init__(self, workers: Workers):
        self.workers = workers
        self.dtype: torch.dtype | None = None  # of the loss, once it is known

    def once(self, call: Callable, criterion: Callable, as_loss: Callable, inputs: Any, targets: Any) -> tuple:
        """Outputs of the rows of this worker, and the loss of all.

        Raises:
            ValueError: the batch has no rows, or the first batch too few.
            RuntimeError: dropout sees something else than rows.
        """
        rank, size, total = self.workers.rank, self.workers.size, rows_in((inputs, targets))
        rows = range(total * rank // size, total * (rank + 1) // size)
        if len(rows):
            outputs, loss = _partial(call, criterion, as_loss, inputs, targets, rows, total)
            self.dtype = loss.dtype
        elif self.dtype is None:
            raise ValueError(f"the first batch has {total} rows, too few for {size} workers")
        else:
            outputs, loss = None, torch.zeros((), dtype=self.dtype)
        return outputs, self.workers.total(loss)

    def try_parts(
        self, call: Callable, criterion: Callable, as_loss: Callable, inputs: Any, targets: Any, reset: Callable
    ) -> None:
        """See whether the loss of some rows is that of their halves, and whether nothing but dropout draws.

        Raises RuntimeError where it is not.
        """
        total = min(TRIED, rows_in((inputs, targets)))
        inputs, targets = (_rows_of(some, range(total)) for some in (inputs, targets))
        losses = []
        for parts in ([range(total)], [range(total // 2), range(total // 2, total)]):
            losses.append(0.0)
            for rows in filter(len, parts):
                reset()
                losses[-1] += _partial(call, criterion, as_loss, inputs, targets, rows, total, True)[1].item()
        whole, added = losses
        if not abs(whole - added) <= 1e-4 * max(1.0, abs(whole)):
            raise RuntimeError(
                f"share 'batch': the loss of {total} rows is {whole:.6g}, but their halves add up to {added:.6g}: it "
                "is no mean over the rows, as with a batch normalisation in training or with weights of the rows. "
                "Share 'queries', or give the criterion a method of_part"
            )


def rows_in(batch: Any) -> int:
    """Raises ValueError where the tensors of a batch have no common first dimension."""
    sizes = {tensor.shape[:1] for tensor in tensors_in(batch)}
    if len(sizes) != 1 or sizes == {torch.Size()}:
        raise ValueError("share 'batch': all tensors of a batch should have a row for each example")
    return sizes.pop()[0]


def _partial(
    call: Callable,
    criterion: Callable,
    as_loss: Callable,
    inputs: Any,
    targets: Any,
    rows: range,
    total: int,
    watched: bool = False,
) -> tuple:
    """Outputs of some rows, and what they add to the loss of all."""
    part = _rows_of(targets, rows)
    with _MasksOfRows(rows, total, watched):
        outputs = call(_rows_of(inputs, rows))
        if hasattr(criterion, "of_part"):
            return outputs, as_loss(criterion.of_part(outputs, part, targets))
        return outputs, as_loss(criterion(outputs, part)) * (len(rows) / total)


def _rows_of(structure: Any, rows: range) -> Any:
    if isinstance(structure, Tensor):
        return structure[rows.start : rows.stop]
    if isinstance(structure, tuple | list):
        items = [_rows_of(item, rows) for item in structure]
        return type(structure)(*items) if hasattr(structure, "_fields") else type(structure)(items)
    if isinstance(structure, Mapping):
        return {key: _rows_of(value, rows) for key, value in structure.items()}
    return structure


class _MasksOfRows(TorchFunctionMode):
    """Dropout with the masks that the whole batch would get; watched: nothing else may draw."""

    def __init__(self, rows: range, total: int, watched: bool):
        super().__init__()
        self.rows, self.total, self.watched = rows, total, watched

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = dict(zip(ARGUMENTS[F.dropout], args, strict=False)) | kwargs if function is F.dropout else {}
        if named.get("training", True) and named.get("p", 0.5) > 0 and named:
            x = named["input"]
            if len(x) != len(self.rows):
                raise RuntimeError("share 'batch': dropout sees something else than the rows of the batch")
            ones = torch.ones(self.total, *x.shape[1:], dtype=x.dtype, device=x.device)
            factor = F.dropout(ones, named.get("p", 0.5))[self.rows.start : self.rows.stop]
            return x.mul_(factor) if named.get("inplace") else x * factor
        before = torch.get_rng_state() if self.watched else None
        result = function(*args, **kwargs)
        if before is not None and not torch.equal(before, torch.get_rng_state()):
            name = getattr(function, "__name__", function)
            raise RuntimeError(f"share 'batch': {name} draws random numbers; only dropout's can be shared by rows")
        return result
