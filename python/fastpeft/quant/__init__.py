"""Weight formats: NF4, FP4 (read), int8. A format is a module here plus its import below."""

from . import int8, nf4  # each registers its formats
from .format import FORMATS, QuantFormat, get_format
from .linear import Linear4bit, Linear8bit
from .tensor import QuantizedTensor, quantize_tensor

__all__ = [
    "FORMATS",
    "Linear4bit",
    "Linear8bit",
    "QuantFormat",
    "QuantizedTensor",
    "get_format",
    "int8",
    "nf4",
    "quantize_tensor",
]
