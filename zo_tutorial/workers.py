"""The workers of a run: processes that `torchrun` started, in one process group of `torch.distributed`.

They tell each other losses, never parameters or gradients: what everyone can compute alike, everyone computes. So after
each step all have the same parameters, bit for bit; `check` compares hashes of them. Chapter 12.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SHARES = ("queries", "batch")
OFTEN = 128  # steps


class WorkerLost(RuntimeError):
    """A worker has gone, so that the others cannot go on."""


def is_due(step: int) -> bool:
    """Whether the workers compare notes in this step: the 1st, 2nd, 4th, …, and then once in `OFTEN`."""
    return step % OFTEN == 0 or step & (step - 1) == 0


class Workers:
    """This worker and the others.

    Attributes:
        rank, size: the number of this worker, from 0, and of all.
        bytes_sent: what all workers together have told each other about losses (bytes). Each one's part is padded to
            the longest on its way; that is not counted.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.bytes_sent = dist.get_rank(), dist.get_world_size(), 0

    @classmethod
    def present(cls) -> "Workers | None":
        """Those of the initialised process group; None where there is none, or of one worker only."""
        initialised = dist.is_available() and dist.is_initialized()
        return cls() if initialised and dist.get_world_size() > 1 else None

    def gather(self, mine: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """The numbers of every worker, by rank: (lengths[rank],) each, on the device of this worker's own.

        Args:
            mine: (lengths[self.rank],), of one type on all workers.

        Raises:
            WorkerLost: one of the others has gone.
        """
        padded = mine.new_zeros(max(lengths), device=_device())
        padded[: len(mine)] = mine
        theirs = [torch.empty_like(padded) for _ in lengths]
        try:
            dist.all_gather(theirs, padded)
        except RuntimeError as error:  # gloo's and nccl's
            reason = str(error).partition("\n")[0]
            raise WorkerLost(f"worker {self.rank} of {self.size}: another worker has gone ({reason})") from error
        return [part[:length].to(mine.device) for part, length in zip(theirs, lengths, strict=True)]

    def total(self, mine: Tensor) -> Tensor:
        """The sum of a number over all workers (), the same bits for all: it is added up in the order of ranks."""
        self.bytes_sent += self.size * mine.element_size()
        total = mine.new_zeros(())
        for part in self.gather(mine.reshape(1), [1] * self.size):
            total = total + part[0]
        return total

    def check(self, step: int, known: dict[str, bytes]) -> None:
        """Compare what all workers should know alike, by hashes of 8 bytes each.

        Raises:
            RuntimeError: a worker differs from the first; the message names step, what differs and the ranks. All
                workers raise it.
        """
        mine = torch.tensor([_hash("\n".join(known).encode()), *map(_hash, known.values())])
        counts = self.gather(torch.tensor([len(mine)]), [1] * self.size)
        theirs = self.gather(mine, [int(count) for count in counts])
        for k, what in enumerate(["what is trained", *known]):
            ranks = [rank for rank, numbers in enumerate(theirs) if k >= len(numbers) or numbers[k] != theirs[0][k]]
            if ranks:
                raise RuntimeError(
                    f"the workers do not agree at step {step}: {what} of rank {', '.join(map(str, ranks))} is not that "
                    "of rank 0"
                )


def _device() -> torch.device:
    """Where messages must lie: nccl takes those of a GPU only."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def numbers_of(tensor: Tensor) -> bytes:
    """The bits of a tensor."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
