"""Train neural networks without back-propagation: zeroth-order optimisation, lottery tickets, tensor layers."""

from zo_tutorial.models import MNIST_CNN, MNIST_FC, MNIST_TT, MNIST_TTM, Encoder
from zo_tutorial.optimizer import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.pruning import grasp
from zo_tutorial.tensor import TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn
from zo_tutorial.viz import explore

__all__ = [
    "MNIST_CNN",
    "MNIST_FC",
    "MNIST_TT",
    "MNIST_TTM",
    "Encoder",
    "TensorizedLinear",
    "TensorizedLinear_module",
    "TensorizedLinear_module_tonn",
    "ZO_SCD_mask",
    "ZO_SGD_mask",
    "explore",
    "grasp",
]
