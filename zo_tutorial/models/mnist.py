"""The MNIST classifiers: dense, convolutional, TTM and TT.

All take images (B, 784) or (B, 1, 28, 28), normalised, and return logits (B, 10). All weights start with variance
2 / fan_in (Kaiming's for ReLU), all biases at zero. `generator` fixes the initial weights; None is
torch's global generator.
"""

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from zo_tutorial.tensor import TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn
from zo_tutorial.tensor.formats import whole_numbers

Sizes = Sequence[int]
PIXELS = 28 * 28
IN, HIDDEN, OUT = (4, 7, 7, 4), (4, 4, 4, 4), (1, 5, 2, 1)  # factors of 784, of 256 hidden units, of 10
CLASSES = 10
TTM_LAYERS = {
    "TensorizedLinear_module": TensorizedLinear_module,
    "TensorizedLinear_module_tonn": TensorizedLinear_module_tonn,
}


class _TwoLayers(nn.Module):
    """logits = fc2(relu(fc1(x))), the map of the three fully connected models."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, images: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(images.flatten(1))))  # (B, 10)


class MNIST_FC(_TwoLayers):
    """Dense 784–hidden–10 without biases: 203,264 parameters with hidden = 256.

    Args:
        hidden: the number of hidden units.
        pool: side of the squares of pixels whose mean is one input, a divisor of 28: (28 / pool)² inputs. With 2 and 64
            hidden units 13,184 parameters, with 4 and 25 units 1,475.

    Raises:
        ValueError: pool is no divisor of 28.
    """

    def __init__(self, hidden: int = 256, pool: int = 1, *, generator: Generator | None = None):
        if pool < 1 or 28 % pool:
            raise ValueError(f"pool must be a divisor of 28, not {pool}")
        inputs = (28 // pool) ** 2
        fc1 = _kaiming(nn.utils.skip_init(nn.Linear, inputs, hidden, bias=False), generator)
        fc2 = _kaiming(nn.utils.skip_init(nn.Linear, hidden, CLASSES, bias=False), generator)
        super().__init__(fc1, fc2)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        if self.pool > 1:
            images = F.avg_pool2d(images.reshape(len(images), 1, 28, 28), self.pool)  # (B, 1, 28/pool, 28/pool)
        return super().forward(images)


class MNIST_TTM(_TwoLayers):
    """784–256–10 with both weights in TTM format: 1,504 parameters.

    With factors (7, 4, 4, 7), (8, 4, 4, 8), (1, 5, 2, 1), max_rank 6 and biases it is a 784–1024–10 net of 3,962
    parameters.

    Args:
        in_factors: p factors of 784.
        hidden_factors: p factors of the hidden width.
        out_factors: p factors of 10.
        max_rank: bound for the ranks of both layers.
        bias: whether both layers have a bias.
        layer: 'TensorizedLinear_module', or 'TensorizedLinear_module_tonn' for the photonic form of the same map.

    Raises:
        ValueError: unknown layer, or factors that do not fit.
    """

    def __init__(
        self, in_factors: Sizes = IN, hidden_factors: Sizes = HIDDEN, out_factors: Sizes = OUT,
        max_rank: int = 4, bias: bool = False, layer: str = "TensorizedLinear_module", *,
        generator: Generator | None = None,
    ):  # fmt: skip
        if layer not in TTM_LAYERS:
            raise ValueError(f"layer: {layer!r} is unknown; choose from {', '.join(TTM_LAYERS)}")
        hidden, make = prod(whole_numbers(hidden_factors)), TTM_LAYERS[layer]
        super().__init__(
            make(PIXELS, hidden, bias, [in_factors, hidden_factors], max_rank=max_rank, generator=generator),
            make(hidden, CLASSES, bias, [hidden_factors, out_factors], max_rank=max_rank, generator=generator),
        )


class MNIST_TT(_TwoLayers):
    """784–256–10 with both weights in TT format, rank 20 lowered to the attainable: 10,685 parameters.

    Arguments and errors are those of `MNIST_TTM`.
    """

    def __init__(
        self, in_factors: Sizes = IN, hidden_factors: Sizes = HIDDEN, out_factors: Sizes = OUT,
        max_rank: int = 20, bias: bool = False, *, generator: Generator | None = None,
    ):  # fmt: skip
        super().__init__(
            TensorizedLinear(in_factors, hidden_factors, max_rank, bias, generator=generator),
            TensorizedLinear(hidden_factors, out_factors, max_rank, bias, generator=generator),
        )


class MNIST_CNN(nn.Module):
    """Convolutions of stride 2 with ReLU, 28 → 12 → 6 → 3 pixels wide, then a linear layer.

    4,278 parameters and 77 thousand multiply-adds an image with the default widths: the strides do the work of pooling
    and keep a query cheap. Without the third convolution most weights lie in or right before the linear layer.

    Args:
        widths: the number of channels after each of the two or three convolutions.

    Raises:
        ValueError: neither two nor three widths.
    """

    def __init__(self, widths: Sequence[int] = (8, 12, 16), *, generator: Generator | None = None):
        super().__init__()
        if len(widths) not in (2, 3):
            raise ValueError(f"widths must be two or three numbers of channels, not {widths}")
        a, b, *more = widths
        self.conv1 = _kaiming(nn.utils.skip_init(nn.Conv2d, 1, a, 5, stride=2), generator)
        self.conv2 = _kaiming(nn.utils.skip_init(nn.Conv2d, a, b, 3, stride=2, padding=1), generator)
        features = 6 * 6 * b
        if more:
            self.conv3 = _kaiming(nn.utils.skip_init(nn.Conv2d, b, *more, 3, stride=2, padding=1), generator)
            features = 3 * 3 * more[0]
        self.fc = _kaiming(nn.utils.skip_init(nn.Linear, features, CLASSES), generator)

    def forward(self, images: Tensor) -> Tensor:
        x = images.reshape(len(images), 1, 28, 28)
        *convolutions, last = self.children()
        for conv in convolutions:
            x = F.relu(conv(x))  # (B, width, 12, 12), then 6, then 3
        return last(x.flatten(1))  # (B, 10)


def _kaiming(layer: nn.Linear | nn.Conv2d, generator: Generator | None) -> nn.Linear | nn.Conv2d:
    """Weight ~ N(0, 2 / fan_in), bias 0."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
