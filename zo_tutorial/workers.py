"""The workers of a run: processes that `torchrun` started, in one process group of `torch.distributed`.

They tell each other losses, never parameters or gradients: what everyone can compute alike, everyone computes. So after
each step all have the same parameters, bit for bit; `check` compares hashes of them. Chapter 12.
"""

import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

SHARES = ("queries", "batch")
OFTEN = 128  # steps


class WorkersError(RuntimeError):
    """The workers do not agree, or one of them cannot go on, and so the others cannot."""


class WorkerLost(WorkersError):
    """Another worker has gone."""


@contextmanager
def joined(device: str) -> Iterator[None]:
    """In the process group that torchrun says, if it started this process as one of several."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    from torch.distributed.distributed_c10d import PrefixStore  # not in all builds of torch
    from torch.distributed.rendezvous import rendezvous

    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # Names of their own for the addresses of each start: torchrun keeps the store, with those of workers that are gone.
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
    yield
    dist.destroy_process_group()  # not where an error came: the others may wait for this one


def rank() -> int:
    """The number of this worker; 0 where there is no other."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def launched() -> str:
    """What tells the processes of one torchrun, restarted or not, from those of another; "" without it."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return "" if run is None else f"{run}, process {os.getppid()} of {platform.node()}"


def restarted() -> bool:
    """Whether torchrun has started this process anew after a worker was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


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

    def told(self, find: Callable[[], bytes]) -> bytes:
        """What the first worker finds, told to all. Where that fails, it raises its error, and the others WorkersError
        with the same message."""
        message, error = b"", None
        if self.rank == 0:
            try:
                message = b"+" + find()
            except Exception as failed:
                message, error = b"-" + str(failed).encode(), failed
        length = int(self.gather(torch.tensor([len(message)]), [1] * self.size)[0])
        numbers = torch.frombuffer(bytearray(message or bytes(length)), dtype=torch.uint8).to(_device())
        dist.broadcast(numbers, 0)
        if error is not None:
            raise error
        message = numbers.cpu().numpy().tobytes()
        if message[:1] == b"-":
            raise WorkersError(message[1:].decode())
        return message[1:]

    def check(self, step: int, known: dict[str, bytes]) -> None:
        """Compare what all workers should know alike, by hashes of 8 bytes each.

        Raises:
            WorkersError: a worker differs from the first; the message names step, what differs and the ranks. All
                workers raise it.
        """
        mine = torch.tensor([_hash("\n".join(known).encode()), *map(_hash, known.values())])
        counts = self.gather(torch.tensor([len(mine)]), [1] * self.size)
        theirs = self.gather(mine, [int(count) for count in counts])
        for k, what in enumerate(["what is trained", *known]):
            ranks = [rank for rank, numbers in enumerate(theirs) if k >= len(numbers) or numbers[k] != theirs[0][k]]
            if ranks:
                raise WorkersError(
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
