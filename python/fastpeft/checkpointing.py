"""Gradients through checkpointed layers when the embeddings are frozen.

Reentrant activation checkpointing gives no gradient to a layer none of whose inputs requires one;
with every base weight frozen the first hidden states do not, and the adapters silently stay as they
are. So the input embeddings' output is made to require a gradient, but only in a training forward
pass with that variant: it costs the input gradient of the first layer, which nothing else needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NEEDED = "_fastpeft_output_needs_grad"


def add_hooks(model: nn.Module) -> None:
    """Watch `model`'s forward pass; once per model, and only if it tells its input embeddings."""
    embeddings = _embeddings(model)
    if embeddings is None or _before_model in model._forward_pre_hooks.values():
        return
    model.register_forward_pre_hook(_before_model)
    embeddings.register_forward_hook(_after_embeddings)


def remove_hooks(model: nn.Module) -> None:
    """Undo `add_hooks`."""
    for module in model.modules():
        for hooks, ours in (
            (module._forward_pre_hooks, _before_model),
            (module._forward_hooks, _after_embeddings),
        ):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
        module.__dict__.pop(_NEEDED, None)


def uses_reentrant_checkpointing(model: nn.Module) -> bool:
    """Whether some layer of a transformers model is checkpointed by torch's reentrant variant (or
    an unknown one).
    """
    for module in model.modules():
        if module.__dict__.get("gradient_checkpointing"):
            function = module.__dict__.get("_gradient_checkpointing_func")
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                return True
    return False


def _embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    if not callable(getter):
        return None
    try:
        found = getter()
    except NotImplementedError:
        return None
    if isinstance(found, nn.Module):
        return getattr(found, "original_module", found)
    return None


def _before_model(model: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling():
        return  # reentrant checkpointing does not compile
    embeddings = _embeddings(model)
    if embeddings is not None:
        needed = model.training and torch.is_grad_enabled() and uses_reentrant_checkpointing(model)
        embeddings.__dict__[_NEEDED] = needed


def _after_embeddings(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if (
        module.__dict__.get(_NEEDED)
        and torch.is_grad_enabled()
        and isinstance(output, Tensor)
        and not output.requires_grad
    ):
        output.requires_grad_(True)
