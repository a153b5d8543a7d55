"""Optimizers for full fine-tuning, and the memory they cost.

    bytes a parameter          weights   gradients   states          master
    adamw, float32 weights        4          4       4 + 4             -
    adamw, 16 bits                2          2       4 + 4             4
    the same without master       2          2       2 + 2             -
    adamw_8bit, 16 bits           2          2       1 + 1, + 8/256    -

The states of a 16-bit weight with a float32 master are float32, for they belong to the master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, refuse

OPTIMIZERS = ("adamw", "adamw_8bit")
# bitsandbytes keeps the states of smaller tensors in float32 (min_8bit_size), and two float32
# scales for every 256 elements of the others.
_SMALL_8BIT, _BLOCK_8BIT = 4096, 256


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) that adds its steps to float32 copies of 16-bit weights
    and rounds them into the weights; float32 weights are stepped themselves. torch's fused kernel
    does the arithmetic.

    Args:
        groups: parameters or groups, as for torch.optim.AdamW.
        lr, betas, eps, weight_decay: as there.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.masters = [[_master(p) for p in group["params"]] for group in self.param_groups]
        self.inner = torch.optim.AdamW(
            [
                {**_options(group), "params": masters}
                for group, masters in zip(self.param_groups, self.masters, strict=True)
            ],
            fused=True,
        )

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        for group, masters in zip(self.param_groups, self.masters, strict=True):
            yield from zip(group["params"], masters, strict=True)

    def _pass_options(self) -> None:
        """A scheduler sets lr in our groups."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update(_options(group))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pass_options()
        for parameter, master in self._pairs():
            if master is not parameter:
                gradient = parameter.grad
                master.grad = None if gradient is None else gradient.float()
        self.inner.step()
        for parameter, master in self._pairs():
            if master is not parameter and master.grad is not None:
                parameter.copy_(master)
                master.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, and the masters."""
        self._pass_options()
        kept = [m for p, m in self._pairs() if m is not p]
        return {"inner": self.inner.state_dict(), "masters": kept}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores states, masters and the weights rounded from them."""
        self.inner.load_state_dict(state_dict["inner"])
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({key: inner[key] for key in _options(group)})
        kept = [(p, m) for p, m in self._pairs() if m is not p]
        for (parameter, master), saved in zip(kept, state_dict["masters"], strict=True):
            master.copy_(saved)
            parameter.copy_(master)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_()


def make_optimizer(groups: Iterable[Any], config: Any, **options: Any) -> torch.optim.Optimizer:
    """The optimizer a `Full` names.

    Args:
        groups: for example fastpeft.param_groups(model, lr).
        config: a Full.
        options: lr, betas, eps, weight_decay.

    Raises:
        ConfigError: "adamw_8bit" without bitsandbytes.
    """
    if config.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise refuse(
                ConfigError,
                "optimizer",
                "'adamw_8bit' without bitsandbytes",
                "it installed",
                "pip install bitsandbytes, or take optimizer='adamw'.",
            ) from error
        return AdamW8bit(groups, **options)
    if config.float32_master is False:
        return torch.optim.AdamW(groups, fused=True, **options)
    return MasterAdamW(groups, **options)


def memory_plan(model: nn.Module, config: Any) -> dict[str, int]:
    """Bytes that full fine-tuning takes beside activations.

    Args:
        model: dense. Its parameters are counted once, tied or not; buffers are not counted.
        config: a Full.

    Returns:
        {"weights", "gradients", "optimizer states", "master weights": bytes on the device,
        "snapshot": bytes in host memory}.
    """
    plan = dict.fromkeys(
        ("weights", "gradients", "optimizer states", "master weights", "snapshot"), 0
    )
    for parameter in model.parameters():
        count, size = parameter.numel(), parameter.element_size()
        has_master = config.optimizer == "adamw" and config.float32_master is not False
        plan["weights"] += count * size
        plan["gradients"] += count * size
        if config.optimizer == "adamw_8bit":
            plan["optimizer states"] += (
                8 * count if count < _SMALL_8BIT else 2 * count + 8 * -(-count // _BLOCK_8BIT)
            )
        elif has_master:
            plan["optimizer states"] += 8 * count
            plan["master weights"] += 4 * count if size < 4 else 0
        else:
            plan["optimizer states"] += 2 * size * count
        plan["snapshot"] += count * size if config.snapshot else 0
    return plan
