"""The only place that says `torch.ops.fastpeft`: typed wrappers, fakes and autograd, one module a
stem.

Importing it loads the native library (LibraryError if that fails). No nn.Module here; formats are
plain integers.
"""

from . import bottleneck, launch, lora, qlinear, quant

__all__ = ["bottleneck", "launch", "lora", "qlinear", "quant"]
