"""transformers' Trainer over a frozen base: what it saves is the adapter, never the base."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer

from fastpeft.attach import adapters, detach
from fastpeft.groups import param_groups
from fastpeft.io import load_adapter, save_adapter
from fastpeft.methods.full import Full
from fastpeft.methods.full_optimizer import make_optimizer


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold an adapter folder and the Trainer's own state.

    Every other argument is the Trainer's. A plain Trainer works as well, but each of its
    checkpoints holds the whole base again.

    Args:
        adapter_name: which of the model's adapters is trained and saved.
        in_order: take the samples in the dataset's order instead of shuffling them; the dataset
            then decides the order of the whole run, and a resumed one continues it exactly.
        lora_plus_ratio: how many times faster lora_B learns than lora_A (Hayou et al. 2024,
            "LoRA+"); None: one rate. The optimizer is then AdamW.
    """

    def __init__(
        self,
        *args: Any,
        adapter_name: str = "default",
        in_order: bool = False,
        lora_plus_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.adapter_name = adapter_name
        self.in_order = in_order
        self.lora_plus_ratio = lora_plus_ratio
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, AdamW with two learning rates for lora_plus_ratio, or what a
        `Full` names."""
        rate, decay = self.args.learning_rate, self.args.weight_decay
        config = adapters(self.model).get(self.adapter_name)
        if self.optimizer is None and isinstance(config, Full):
            groups = param_groups(self.model, lr=rate, weight_decay=decay)
            self.optimizer = make_optimizer(groups, config, lr=rate, weight_decay=decay)
        elif self.optimizer is None and self.lora_plus_ratio is not None:
            groups = param_groups(self.model, lr=rate, lora_plus_ratio=self.lora_plus_ratio)
            self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay)
        return super().create_optimizer(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir, name=self.adapter_name)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # Called before the optimizer is made, so the parameters may be new objects.
        model = model if model is not None else self.model
        detach(model, self.adapter_name)
        load_adapter(model, resume_from_checkpoint, name=self.adapter_name)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.in_order:
            return SequentialSampler(
                train_dataset if train_dataset is not None else self.train_dataset
            )
        return super()._get_train_sampler(train_dataset)
