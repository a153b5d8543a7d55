"""Methods that change what a transformers model's inner model is called with: its arguments by
name, hooks around its forward pass, what it says of itself.

The inner model (LlamaModel in LlamaForCausalLM) is where token ids become hidden states. Hooks sit
there, so that heads, losses and generate() need not be known. transformers is never imported: the
model brings it along.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, StateError, refuse

# Models whose default positions count the attended tokens instead of all of them.
POSITIONS_BY_MASK = frozenset(("opt",))

# End of a model's class name -> peft's word, without which peft ignores virtual tokens.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_type(model: nn.Module, config: Any) -> str | None:
    """config.task_type, or peft's word for this class of model, or None. For a classifier only if
    its head trains too, which peft takes for granted.
    """
    name = type(model).__name__
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    if task != "CAUSAL_LM" and not config.modules_to_save:
        task = None
    return config.task_type or task


def inner_model(model: nn.Module, what: str) -> nn.Module:
    """The module that turns token ids into hidden states.

    Args:
        model: a transformers model with or without a head.
        what: the method, for the message.

    Raises:
        ConfigError: not a transformers model, an encoder-decoder, or one whose forward pass takes
            no position_ids.
    """
    base = getattr(model, "base_model", None)
    config = getattr(base, "config", None)
    if not isinstance(base, nn.Module) or not hasattr(config, "model_type"):
        raise refuse(
            ConfigError,
            what,
            type(model).__name__,
            "a transformers model",
            "Attach to the model itself, not to a wrapper around it.",
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", 0):
        raise refuse(
            ConfigError,
            what,
            f"{type(model).__name__}, an encoder-decoder (or a decoder with cross-attention)",
            "a decoder-only or encoder-only model",
            "Use LoRA, IA3 or Bottleneck on this model.",
        )
    if config.get_text_config() is not config:
        raise refuse(
            ConfigError,
            what,
            f"{type(model).__name__}, a model made of several",
            "a text model",
            "Attach to its language model.",
        )
    base = _innermost(base)
    if "position_ids" not in argument_names(base):
        raise refuse(
            ConfigError,
            what,
            f"{type(base).__name__}, whose forward pass takes no position_ids",
            "a model that does",
            "Positions cannot be shifted there (ALiBi). Use LoRA, IA3 or Bottleneck.",
        )
    return base


def _innermost(base: nn.Module) -> nn.Module:
    """OPTForCausalLM calls OPTModel's only child itself: hooks have to sit on that one."""
    while True:
        below = [
            child
            for child in base.children()
            if hasattr(child, "get_input_embeddings") and "inputs_embeds" in argument_names(child)
        ]
        if len(below) != 1:
            return base
        base = below[0]


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of the module's forward pass, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


class Arguments:
    """The arguments of one call of the inner model, by name.

    Attributes:
        named: {name: value}; may be changed.
    """

    def __init__(
        self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.named = {**dict(zip(names, args, strict=False)), **kwargs}
        if self.named.get("input_ids") is None and self.named.get("inputs_embeds") is None:
            raise refuse(
                StateError,
                "model inputs",
                f"{sorted(k for k, v in self.named.items() if v is not None)}",
                "input_ids or inputs_embeds among them",
                "Call the model with one of them.",
            )

    @property
    def tokens(self) -> Tensor:
        """input_ids [B, S] or inputs_embeds [B, S, hidden]."""
        ids = self.named.get("input_ids")
        return self.named["inputs_embeds"] if ids is None else ids

    @property
    def length(self) -> int:
        """S, the tokens of this call."""
        return self.tokens.shape[1]

    @property
    def cache(self) -> Any:
        """The key-value cache, or None; it has two names, the older until transformers 5.40."""
        cache = self.named.get("cache")
        return self.named.get("past_key_values") if cache is None else cache

    @property
    def past(self) -> Any:
        """How many tokens the cache holds (an int, or a tensor in a static cache)."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    def positions(self, base: nn.Module) -> Tensor:
        """int64 [B or 1, S]: position_ids as given, else those `base` would number by itself."""
        given = self.named.get("position_ids")
        if given is not None:
            return given
        tokens, past, mask = self.tokens, self.past, self.named.get("attention_mask")
        if base.config.model_type in POSITIONS_BY_MASK and mask is not None and mask.dim() == 2:
            mask = mask.long()
            return (mask.cumsum(1) * mask - 1)[:, -self.length :]
        embeddings = getattr(base, "embeddings", None)
        if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa: pads keep theirs
            if tokens.is_floating_point():
                return embeddings.create_position_ids_from_inputs_embeds(
                    tokens, embeddings.padding_idx
                )
            return embeddings.create_position_ids_from_input_ids(
                tokens, embeddings.padding_idx, past
            )
        return (torch.arange(self.length, device=tokens.device) + past).unsqueeze(0)


def check_count(name: str, value: object) -> None:
    """Refuses what is no integer >= 1.

    Raises:
        ConfigError: see above.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refuse(ConfigError, name, repr(value), "an integer >= 1", "20 is a usual length.")


def learned_positions(base: nn.Module) -> int | None:
    """How many positions a model with a learned table of them has; None where they are computed."""
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = base.get_input_embeddings()
    tables = (m for m in base.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return limit if any(limit <= m.num_embeddings <= limit + 8 for m in tables) else None


def check_virtual_tokens(base: nn.Module, count: int, what: str) -> None:
    """Refuses as many virtual tokens as the model has positions, or more.

    Raises:
        ConfigError: see above.
    """
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is not None and count >= limit:
        raise refuse(
            ConfigError,
            f"{what}, num_virtual_tokens",
            count,
            f"less than the {limit} positions of {type(base).__name__}",
            "Take fewer: tokens need positions too.",
        )


def check_positions(positions: Tensor, upper: int | Tensor, limit: int | None) -> None:
    """Refuses positions a learned table does not have. Reads them only if `upper`, a bound on
    them, may be too high, so that the GPU is not waited for.

    Raises:
        StateError: see above.
    """
    if limit is None or isinstance(upper, Tensor) or upper < limit - 2:
        return
    highest = int(positions.max())
    if highest >= limit:
        raise refuse(
            StateError,
            "position_ids",
            f"position {highest}, virtual tokens included",
            f"less than the model's {limit}",
            "Shorten the text, or train fewer virtual tokens.",
        )


def add_hooks(base: nn.Module, before: Callable, after: Callable, first: bool = False) -> None:
    """Run `before` (arguments) and `after` (output) around the forward pass, both with keyword
    arguments; `first`: before all hooks that are there.
    """
    base.register_forward_pre_hook(before, prepend=first, with_kwargs=True)
    base.register_forward_hook(after, with_kwargs=True)


def remove_hooks(base: nn.Module, before: Callable, after: Callable) -> None:
    """Undo `add_hooks`; in a deep copy too, where no handle would work."""
    for hooks, flags, ours in (
        (base._forward_pre_hooks, base._forward_pre_hooks_with_kwargs, before),
        (base._forward_hooks, base._forward_hooks_with_kwargs, after),
    ):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            flags.pop(key, None)
