"""Expert weights that a model keeps as parameters [experts, ..., ...] and no linear layers: found,
so that they can be reported.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from fastpeft.errors import caller_level
from fastpeft.patterns import ALL_LINEAR, is_target, places

# Their weights have three dimensions and more, too.
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{plain name: parameter} of three or more dimensions, outside convolutions."""
    return {
        f"{place.name}.{key}": parameter
        for place in places(model)
        if not isinstance(place.module, _CONVOLUTIONS)
        for key, parameter in place.module._parameters.items()
        if parameter is not None and parameter.dim() >= 3
    }


def warn_experts(model: nn.Module, config: Any) -> None:
    """A warning if `config` means expert weights too: by a name or pattern, or as "all-linear"."""
    wanted = expert_parameters(model)
    if config.target_modules != ALL_LINEAR:
        wanted = {name: p for name, p in wanted.items() if is_target(config, name)}
    if wanted:
        count = sum(parameter.numel() for parameter in wanted.values())
        message = (
            f"target_modules: {len(wanted)} expert weights ({', '.join([*wanted][:2])}, ...; "
            f"{count:,} numbers) get no adapter and stay frozen: they are 3-D parameters, not "
            "linear layers, and not supported. The linear layers train."
        )
        warnings.warn(message, stacklevel=caller_level())
