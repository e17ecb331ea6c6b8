"""Several workers for a test: processes of `torch.multiprocessing` in one process group of gloo."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_workers(size: int, work: Callable, folder: Path, *arguments: Any) -> list:
    """What `work(*arguments)` returns in each of so many workers, by rank; the text of its error where it fails."""
    context = multiprocessing.get_context("spawn")
    tasks = [(work, arguments, rank, size, str(folder)) for rank in range(size)]
    processes = [context.Process(target=_worker, args=task) for task in tasks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a worker hangs"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _worker(work: Callable, arguments: tuple, rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        answer = work(*arguments)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    torch.save(answer, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
