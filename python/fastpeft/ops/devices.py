"""One device for all tensors of a call.

The kernels check it, but a call with a tensor on meta never comes to them: the fake answers, and
where x has memory the answer would be memory that nobody wrote.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError, refuse


def check_one_device(**tensors: Tensor | None) -> None:
    """For the fakes: every tensor is where the first one is.

    Raises:
        ConfigError: another one is elsewhere.
    """
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise refuse(
                ConfigError,
                name,
                f"a tensor on {tensor.device}",
                f"{first.device} like {first_name}",
                "Load the weights, or move all tensors to one device.",
            )
