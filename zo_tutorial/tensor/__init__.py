"""Linear layers and an embedding whose weight is held in TT or TTM format."""

from zo_tutorial.tensor.embedding import TensorizedEmbedding_module
from zo_tutorial.tensor.layers import TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn

__all__ = [
    "TensorizedEmbedding_module",
    "TensorizedLinear",
    "TensorizedLinear_module",
    "TensorizedLinear_module_tonn",
]
