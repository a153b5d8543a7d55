"""The loss on text that training never sees: every token of it predicted exactly once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigError, refuse


def windows(tokens: Tensor, seq_len: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs (input, target) of at most seq_len tokens; neighbours share one token, so that each
    token but the first is a target once.

    Args:
        tokens: int64 [T], T >= 2.
        seq_len: context of a window.

    Returns:
        [(int64 [L], int64 [L])], L = seq_len but for the last.
    """
    return [
        (tokens[start : start + seq_len][: stop - start], tokens[start + 1 : stop + 1])
        for start in range(0, tokens.numel() - 1, seq_len)
        for stop in [min(start + seq_len, tokens.numel() - 1)]
    ]


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    tokens: Tensor,
    seq_len: int,
    on_window: Callable[[float], None] | None = None,
) -> tuple[float, int]:
    """Mean cross entropy over a whole text, weighted by token.

    Args:
        model: a causal LM of transformers; its training flag is restored afterwards.
        tokens: int64 [T].
        seq_len: context; a window sees nothing of the one before.
        on_window: called after each window with the mean so far.

    Returns:
        (loss in nats a token, number of predicted tokens).

    Raises:
        ConfigError: fewer than two tokens.
    """
    if tokens.numel() < 2:
        raise refuse(
            ConfigError,
            "heldout",
            f"{tokens.numel()} tokens",
            "at least 2",
            "Give a held-out text with content.",
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for inputs, targets in windows(tokens, seq_len):
            logits = model(input_ids=inputs[None].to(device), use_cache=False).logits[0]
            loss = functional.cross_entropy(logits.float(), targets.to(device), reduction="sum")
            total += loss.item()
            count += targets.numel()
            if on_window:
                on_window(total / count)
    finally:
        model.train(was_training)
    return total / count, count
