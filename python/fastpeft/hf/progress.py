"""A Trainer callback that turns steps into rows, and stops a run that has gone wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from fastpeft.errors import StateError, refuse


class StepCallback(TrainerCallback):
    """Calls `on_row` after every optimizer step.

    Args:
        tokens_per_step: tokens of an optimizer step.
        on_row: receives (step, row); row has loss (nats a token), grad_norm, lr, tokens (so far),
            seconds (of this step, checkpoints not counted), tokens_per_s.
    """

    def __init__(self, tokens_per_step: int, on_row: Callable[[int, dict[str, Any]], None]) -> None:
        self._tokens = tokens_per_step
        self._on_row = on_row
        self._begin = 0.0
        self._checked = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock of a step."""
        self._begin = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Before the first update: refuses a run in which nothing would learn.

        Raises:
            StateError: some trainable parameters got no gradient.
        """
        if self._checked or model is None:
            return
        self._checked = True
        trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        missing = [name for name, parameter in trainable if parameter.grad is None]
        if missing or not trainable:
            raise refuse(
                StateError,
                "gradients",
                f"none for {len(missing)} of {len(trainable)} parameters, such as {missing[:2]}",
                "one for each trainable parameter",
                "Try without gradient checkpointing, or train other target modules.",
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Passes a step's values on. The Trainer has read the loss by now: the GPU has finished.

        Raises:
            StateError: the loss is not finite.
        """
        if not logs or "loss" not in logs:
            return
        seconds = time.perf_counter() - self._begin
        if not math.isfinite(logs["loss"]):
            raise refuse(
                StateError,
                f"loss at step {state.global_step}",
                logs["loss"],
                "a finite number",
                "Try a smaller --lr, --warmup-steps, or --dtype float32.",
            )
        self._on_row(
            state.global_step,
            {
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "lr": logs.get("learning_rate"),
                "tokens": state.global_step * self._tokens,
                "seconds": seconds,
                "tokens_per_s": self._tokens / seconds,
            },
        )
