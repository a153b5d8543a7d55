"""Prompt tuning: learned embeddings in front of the text's (Lester et al. 2021).

    inputs_embeds   [ e e e | x x x x x ]   e = E [P, hidden], learned
    attention_mask  [ 1 1 1 | mask      ]
    position_ids    [ 0 1 2 | P + ids   ]
    hidden states   [ - - - | h h h h h ]   the first P are taken off again

So outputs have the shape they have without a prompt, and labels, losses and heads fit as they are
(peft returns P logits more). While generating, the cache carries the prompt: it enters when the
cache is empty, and later calls get a mask and positions that count it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, StateError, refuse
from .method import Method, register_method
from .model_inputs import (
    Arguments,
    add_hooks,
    argument_names,
    check_count,
    check_positions,
    check_virtual_tokens,
    inner_model,
    learned_positions,
    remove_hooks,
    task_type,
)

__all__ = ["Prompt", "PromptStore"]

_STORE = "fastpeft_prompts"  # child of the inner model
_IN_CACHE = "_fastpeft_prompt_tokens"  # on a cache object: how many of its tokens are a prompt's
_WHAT = "Prompt"
STARTS = ("SAMPLE_VOCAB", "RANDOM")


@dataclass
class Prompt:
    """What `fastpeft.attach` needs to add a prompt. Fields are peft's PromptTuningConfig's.

    Attributes:
        num_virtual_tokens: P >= 1.
        prompt_tuning_init: "SAMPLE_VOCAB": the embeddings of tokens drawn at random, the better
            start (held-out loss of SmolLM2-135M at the start and after 15 steps, P = 16: 3.34 and
            2.90; "RANDOM" 3.48 and 2.94; 3.18 without). "RANDOM": normal, with the deviation of
            the model's own embeddings.
        token_dim, num_layers, num_attention_heads: None: those of the model; token_dim must be.
        num_transformer_submodules: 1, or None.
        modules_to_save: names of modules that train as a whole and are stored with the prompt.
        task_type: None: the model's. base_model_name_or_path: kept for the file.

    Raises:
        ConfigError: a value that cannot work.
    """

    num_virtual_tokens: int
    prompt_tuning_init: str = "SAMPLE_VOCAB"
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        if self.prompt_tuning_init not in STARTS:
            raise refuse(
                ConfigError,
                "prompt_tuning_init",
                repr(self.prompt_tuning_init),
                f"one of {STARTS}",
                "To start from a text, copy its embeddings in.",
            )
        if self.num_transformer_submodules not in (None, 1):
            raise refuse(
                ConfigError,
                "num_transformer_submodules",
                repr(self.num_transformer_submodules),
                "1",
                "A prompt for an encoder-decoder is not supported.",
            )


class PromptStore(nn.Module):
    """All prompts of a model; a child of the inner model.

    Attributes:
        adapters: {name: module with prompt_embeddings [P, hidden], float32}.
        active: names of those in use; several follow one another.
        positions: how many positions a learned table has, or None.
        names: positional arguments of the inner model's forward pass.
        cut: how many hidden states the call that runs now has to take off.
    """

    fastpeft_added = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.positions = learned_positions(base)
        self.names = argument_names(base)
        self.cut = 0

    def embeddings(self) -> Tensor:
        """[P, hidden] of the active prompts."""
        return torch.cat([self.adapters[name].prompt_embeddings for name in self.active])


def _before(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
    """Puts the prompt in front, or counts the one in the cache."""
    store: PromptStore = getattr(base, _STORE)
    store.cut = 0
    if not store.active:
        return None
    arguments = Arguments(store.names, args, kwargs)
    named, past = arguments.named, int(arguments.past)
    prompt = store.embeddings()
    count = prompt.shape[0]
    if past:
        _check_cache(arguments.cache, past, count)
    mask = named.get("attention_mask")
    if mask is not None:
        if mask.dim() != 2:
            raise refuse(
                StateError,
                "attention_mask",
                f"{mask.dim()} dimensions",
                "2, [batch, tokens]: a prompt has to be put in front",
                "Pass the 2-D mask; a static cache makes a 4-D one and cannot be used.",
            )
        named["attention_mask"] = F.pad(mask, (count, 0), value=1)
    positions = named.get("position_ids")
    if positions is not None:
        positions = positions + count
        check_positions(positions, arguments.length + past + count, store.positions)
        if not past:
            own = torch.arange(count, device=positions.device).expand(positions.shape[0], -1)
            positions = torch.cat((own, positions), dim=1)
        named["position_ids"] = positions
    elif store.positions is not None:
        total = arguments.length + (past or count)  # the cache counts the prompt
        check_positions(torch.tensor(total - 1), total, store.positions)
    if past:
        return (), named
    text = named.pop("inputs_embeds", None)
    if text is None:
        text = base.get_input_embeddings()(named["input_ids"])
    named["input_ids"] = None
    front = prompt.to(text.device, text.dtype).expand(text.shape[0], -1, -1)
    named["inputs_embeds"] = torch.cat((front, text), dim=1)
    if named.get("token_type_ids") is not None:
        named["token_type_ids"] = F.pad(named["token_type_ids"], (count, 0))
    store.cut = count
    return (), named


def _check_cache(cache: Any, past: int, count: int) -> None:
    """Refuses a cache that does not begin with the active prompt."""
    held = getattr(cache, _IN_CACHE, 0)
    if held != count:
        raise refuse(
            StateError,
            "cache",
            f"{past} tokens that begin with a prompt of {held}",
            f"one that begins with the active prompt of {count}",
            "Start from an empty cache after activate().",
        )


def _after(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Takes the prompt's hidden states off and notes in the cache that it begins with a prompt."""
    store: PromptStore = getattr(base, _STORE)
    count, store.cut = store.cut, 0
    if not count:
        return None
    length = kwargs["inputs_embeds"].shape[1]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == length:
            return value[:, count:]
        if isinstance(value, tuple):
            return tuple(cut(item) for item in value)
        if hasattr(value, "get_seq_length"):
            setattr(value, _IN_CACHE, count)
        return value

    if isinstance(output, tuple):
        return cut(output)
    for key in list(output):
        output[key] = cut(output[key])
    return output


def _attach(model: nn.Module, config: Prompt, name: str) -> Prompt:
    base = inner_model(model, _WHAT)
    tokens = base.get_input_embeddings().weight.detach()
    width, model_config = tokens.shape[1], base.config
    if config.token_dim not in (None, width):
        raise refuse(
            ConfigError,
            "Prompt, token_dim",
            config.token_dim,
            f"{width}, as {type(base).__name__} has",
            "The prompt was made for another model.",
        )
    check_virtual_tokens(base, config.num_virtual_tokens, _WHAT)
    adapter = nn.Module()
    adapter.prompt_embeddings = nn.Parameter(_start(tokens, config))
    if not hasattr(base, _STORE):
        setattr(base, _STORE, PromptStore(base))
        add_hooks(base, _before, _after, first=True)  # a prefix then sees the prompt as text
    getattr(base, _STORE).adapters[name] = adapter.train(base.training)
    return replace(
        config,
        token_dim=width,
        num_layers=config.num_layers or model_config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads or model_config.num_attention_heads,
        num_transformer_submodules=1,
        task_type=task_type(model, config),
    )


def _start(tokens: Tensor, config: Prompt) -> Tensor:
    """[P, hidden] float32; tokens: the model's embeddings [vocabulary, hidden]."""
    count = config.num_virtual_tokens
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        chosen = torch.randint(tokens.shape[0], (count,), device=tokens.device)
        return tokens[chosen].float()
    start = torch.empty(count, tokens.shape[1], device=tokens.device)
    some = tokens[:: max(1, tokens.shape[0] // 4096)]  # a float copy of all would be large
    return nn.init.normal_(start, std=float(some.float().std()))


def _detach(model: nn.Module, name: str) -> None:
    base = inner_model(model, _WHAT)
    store: PromptStore = getattr(base, _STORE)
    del store.adapters[name]
    store.active = tuple(other for other in store.active if other != name)
    if not store.adapters:
        remove_hooks(base, _before, _after)
        delattr(base, _STORE)


def _activate(model: nn.Module, names: tuple[str, ...]) -> None:
    base = inner_model(model, _WHAT)
    if hasattr(base, _STORE):
        getattr(base, _STORE).active = names


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    store: PromptStore = getattr(inner_model(model, _WHAT), _STORE)
    return {"prompt_embeddings": store.adapters[name].prompt_embeddings}


register_method(Method("prompt", Prompt, "PROMPT_TUNING", _attach, _detach, _activate, _parameters))
