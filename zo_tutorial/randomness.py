"""The global random generators: seeded for a while, and put back as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomState:
    """The states of all global generators that a model may draw from: torch's, numpy's, Python's."""

    def __init__(self):
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.numpy: Any = np.random.get_state()
        self.python = random.getstate()

    def __eq__(self, other):
        return (
            torch.equal(self.torch, other.torch)
            and all(map(torch.equal, self.cuda, other.cuda))
            and self.numpy[2] == other.numpy[2]
            and np.array_equal(self.numpy[1], other.numpy[1])
            and self.python == other.python
        )

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def seed_everything(seed: int) -> None:
    """Seed all global generators."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it all draws follow from the seed; the global generators come out as they went in."""
    state = RandomState()
    seed_everything(seed)
    try:
        yield
    finally:
        state.restore()
