"""Linear layers whose weight is held in TT or TTM format."""

from zo_tutorial.tensor.layers import TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn

__all__ = ["TensorizedLinear", "TensorizedLinear_module", "TensorizedLinear_module_tonn"]
