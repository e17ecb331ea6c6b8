"""The networks of the book: MNIST classifiers, the encoder and its rival; in `analogue` a simulated chip."""

from zo_tutorial.models.encoder import Encoder
from zo_tutorial.models.mnist import MNIST_CNN, MNIST_FC, MNIST_TT, MNIST_TTM, TTM_LAYERS
from zo_tutorial.models.window import Window

__all__ = ["MNIST_CNN", "MNIST_FC", "MNIST_TT", "MNIST_TTM", "TTM_LAYERS", "Encoder", "Window"]
