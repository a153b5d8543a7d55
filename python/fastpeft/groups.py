"""Parameter groups for any torch optimizer, with LoRA+ rates."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastpeft.attach import state_of
from fastpeft.errors import ConfigError, StateError, refuse

# Matrices whose learning rate LoRA+ raises, by part of the name.
_LORA_B = ("lora_B", "lora_embedding_B")


def param_groups(
    model: nn.Module, lr: float, lora_plus_ratio: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable parameters as groups for a torch optimizer.

    Args:
        model: with something trainable in it.
        lr: learning rate.
        lora_plus_ratio: LoRA+ (Hayou et al. 2024): B matrices learn at lr * ratio; 16 is a usual
            value. None: all alike.
        weight_decay: for matrices; vectors (biases, norms) get none.

    Returns:
        Dicts with params, lr, weight_decay and name ("matrices", "lora_B", "vectors"); empty groups
        are left out.

    Raises:
        ConfigError: lr, ratio or decay out of range, or a ratio without any LoRA; StateError:
        nothing trains, or an adapter is merged.
    """
    for word, value, good in (
        ("lr", lr, lr > 0),
        ("lora_plus_ratio", lora_plus_ratio, lora_plus_ratio is None or lora_plus_ratio > 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
    ):
        if not good:
            raise refuse(
                ConfigError, word, repr(value), "a positive number", "Choose another value."
            )
    state = state_of(model)
    if state is not None and state.merged is not None:
        raise refuse(
            StateError,
            f"adapter '{state.merged}'",
            "merged into the base, so nothing trains",
            "an unmerged model",
            "Call unmerge(model) before training.",
        )
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "lora_B": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            groups["vectors"].append(parameter)
        elif lora_plus_ratio is not None and any(part in _LORA_B for part in name.split(".")):
            groups["lora_B"].append(parameter)
        else:
            groups["matrices"].append(parameter)
    if not any(groups.values()):
        raise refuse(
            StateError,
            "model",
            "no trainable parameter",
            "some",
            "attach() an adapter, or activate() one.",
        )
    if lora_plus_ratio is not None and not groups["lora_B"]:
        raise refuse(
            ConfigError,
            "lora_plus_ratio",
            repr(lora_plus_ratio),
            "None, for no LoRA trains",
            "Leave it out.",
        )
    rates = {"matrices": lr, "lora_B": lr * (lora_plus_ratio or 1.0), "vectors": lr}
    decays = {"matrices": weight_decay, "lora_B": weight_decay, "vectors": 0.0}
    return [
        {"params": found, "lr": rates[kind], "weight_decay": decays[kind], "name": kind}
        for kind, found in groups.items()
        if found
    ]
