"""transformers' Conv1D (GPT-2), a linear layer that stores its weight [in, out], as nn.Linear."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, told by name and members, so that transformers need not be imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


class TransposedLinear(nn.Module):
    """A Conv1D with the face of nn.Linear: weight [out, in] (a view), bias, in_features,
    out_features.

    The Conv1D itself is kept, so that it can take its place again.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.in_features, self.out_features = conv.weight.shape
        self.training = conv.training

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], a view of the Conv1D's weight."""
        return self.conv.weight.t()

    @property
    def bias(self) -> Tensor | None:
        """[out_features] or None."""
        return self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight, self.bias)
