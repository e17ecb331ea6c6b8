"""Small nets of every supported layer type, in float64, for the contract suites; and a machine without network."""

import os
import socket

import pytest
import torch
from torch import nn

from zo_tutorial import TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn

# Two workers with two threads each would fight over two cores. Notebook kernels inherit the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

SHAPE = [[2, 3], [3, 2]]  # 6 -> 6
LAYERS = {
    "nn.Linear": lambda: nn.Linear(6, 6),
    "nn.Conv2d": lambda: nn.Sequential(nn.Unflatten(-1, (1, 2, 3)), nn.Conv2d(1, 2, 2, padding=(1, 0)), nn.Flatten()),
    "TensorizedLinear": lambda: TensorizedLinear([2, 3], [3, 2], 2),
    "TensorizedLinear_module": lambda: TensorizedLinear_module(6, 6, shape=SHAPE, max_rank=2),
    "TensorizedLinear_module as TT": lambda: TensorizedLinear_module(
        6, 6, shape=SHAPE, tensor_type="TensorTrain", max_rank=2
    ),
    "TensorizedLinear_module_tonn": lambda: TensorizedLinear_module_tonn(6, 6, shape=SHAPE, max_rank=2),
}


def make_net(kind: str, dropout: float = 0.0) -> nn.Sequential:
    """A layer of one kind, a buffer, dropout if asked for, and a dense head: same weights at each call."""
    torch.manual_seed(1)
    layer = LAYERS[kind]()
    width = layer(torch.zeros(1, 6)).shape[1]
    net = nn.Sequential(layer, nn.Tanh(), nn.BatchNorm1d(width), nn.Dropout(dropout), nn.Linear(width, 3))
    return net.double().train()


class Decides(nn.Module):
    """vmap cannot run it, and a recording cannot follow it: a value decides in Python."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        z = self.linear(x)
        return z * 2 if z.sum().item() > 0 else z


@pytest.fixture(params=LAYERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def batch() -> tuple:
    """Inputs (8, 6) and classes (8,)."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randint(3, (8,), generator=generator)


@pytest.fixture
def offline(monkeypatch):
    """No data folder but the ones that a test names, and no network: the proxy is a closed port of this machine."""
    monkeypatch.delenv("ZO_TUTORIAL_DATA", raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, proxy)
        monkeypatch.setenv(name.upper(), proxy)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
