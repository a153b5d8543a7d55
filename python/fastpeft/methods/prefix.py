"""Prefix-tuning: learned keys and values before every attention layer (Li and Liang 2021), with or
without the MLP that makes them while they are trained.

    plain        E [P, 2 L Hkv D]                                        the parameter itself
    projection   E [P, Hkv D] -> Linear(., H) -> tanh -> Linear(., 2 L Hkv D)
    layer l      key = slot 2 l, value = slot 2 l + 1 of E as [P, 2 L, Hkv, D]

Made once a forward pass for all layers, and handed down to them: prefix_attention.py. Text moves
to positions P, P + 1, ...; the keys themselves carry no rotation. Several active prefixes stand
side by side, in the order of their activation.

Checkpointing: torch's non-reentrant variant differentiates the pass itself, so nothing is special.
The reentrant one runs a backward pass of its own for each layer, which would go through the one MLP
L times. So the layers get detached leaves, and `_Gather`, which sits on the input embeddings and
hence comes last in the backward pass, hands their collected gradients to the MLP.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpointing import uses_reentrant_checkpointing
from ..errors import ConfigError, StateError, refuse
from .method import Method, register_method
from .model_inputs import (
    Arguments,
    add_hooks,
    argument_names,
    check_positions,
    check_virtual_tokens,
    inner_model,
    learned_positions,
    remove_hooks,
    task_type,
)
from .prefix_attention import (
    KEYWORD,
    PrefixStates,
    Recorder,
    implementation_with_prefix,
    implementation_without,
)
from .prefix_config import Prefix

__all__ = ["Prefix", "PrefixAdapter"]

_STORE = "fastpeft_prefixes"  # child of the inner model
_WHAT = "Prefix"
START_STD = 0.02


class PrefixAdapter(nn.Module):
    """The parameters of one prefix, float32.

    Args:
        config: with num_layers, num_attention_heads and token_dim filled in.
        start: [P, 2 L Hkv D], what to start as; None: as config.init_weights says.

    Attributes:
        prompt_embeddings: Parameter [P, 2 L Hkv D], or absent with projection.
        embedding: Parameter [P, Hkv D], and transform: the MLP; with projection only.
    """

    def __init__(
        self,
        config: Prefix,
        start: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.heads = config.num_layers, config.num_attention_heads
        self.length, width = config.num_virtual_tokens, 2 * config.num_layers * config.token_dim
        if start is None:
            start = torch.zeros(self.length, width, device=device)
            if config.init_weights != "zero":
                start.normal_(std=START_STD)
        if not config.projection:
            self.prompt_embeddings = nn.Parameter(start)
            return
        hidden = config.encoder_hidden_size
        self.embedding = nn.Parameter(torch.randn(self.length, config.token_dim, device=device))
        self.transform = nn.Sequential(
            nn.Linear(config.token_dim, hidden, device=device),
            nn.Tanh(),
            nn.Linear(hidden, width, device=device),
        )
        self._fit(start)

    @torch.no_grad()
    def _fit(self, start: Tensor) -> None:
        """The last layer that makes `start`: of all that do (H >= P) the smallest."""
        inner, last = self.transform[:2](self.embedding), self.transform[2]
        if start.is_meta:
            return
        last.bias.copy_(start.mean(dim=0))
        last.weight.copy_((torch.linalg.pinv(inner) @ (start - last.bias)).T)

    def projected(self) -> Tensor:
        """[P, 2 L Hkv D]: what the file holds."""
        if hasattr(self, "transform"):
            return self.transform(self.embedding)
        return self.prompt_embeddings

    def forward(self) -> Tensor:
        """[2 L, Hkv, P, D]: keys and values of all layers."""
        flat = self.projected()
        return flat.view(self.length, 2 * self.layers, self.heads, -1).permute(1, 2, 0, 3)


class PrefixStore(nn.Module):
    """All prefixes of a model; a child of the inner model.

    Attributes:
        adapters: {name: PrefixAdapter}.
        active: names of those in use, in order.
        positions: how many positions a learned table has, or None.
        names: positional arguments of the inner model's forward pass.
    """

    fastpeft_added = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.positions = learned_positions(base)
        self.names = argument_names(base)

    def states(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """2 L tensors [Hkv, P, D] of the active prefixes."""
        found = [self.adapters[name]() for name in self.active]
        joined = found[0] if len(found) == 1 else torch.cat(found, dim=2)
        return joined.to(dtype).unbind(0)


class _Gather(torch.autograd.Function):
    """The identity on the input embeddings, which by then holds the gradients of `leaves`, the
    detached copies of `states` that the layers were given.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, leaves: list[Tensor], *states: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gathered = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return gradient, None, *gathered


def _before(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
    """Shifts the positions and hands the prefix to the layers."""
    store: PrefixStore = getattr(base, _STORE)
    if not store.active or isinstance(kwargs.get(KEYWORD), Recorder):
        return None
    arguments = Arguments(store.names, args, kwargs)
    named = arguments.named
    tokens = base.get_input_embeddings().weight
    kind = tokens.device.type
    autocast = torch.is_autocast_enabled(kind)
    states = store.states(torch.get_autocast_dtype(kind) if autocast else tokens.dtype)
    length = states[0].shape[1]
    positions = arguments.positions(base) + length
    check_positions(positions, arguments.length + arguments.past + length, store.positions)
    if states[0].requires_grad and base.training and uses_reentrant_checkpointing(base):
        leaves = [state.detach().requires_grad_() for state in states]
        hidden = named.get("inputs_embeds")
        if hidden is None:
            hidden = base.get_input_embeddings()(named.pop("input_ids"))
        named["inputs_embeds"] = _Gather.apply(hidden, leaves, *states)
        states = tuple(leaves)
    named["position_ids"] = positions
    named[KEYWORD] = PrefixStates(states)
    return (), named


def _after(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Every layer must have taken its part: a prefix that does nothing is an error."""
    given = kwargs.get(KEYWORD)
    if not isinstance(given, PrefixStates) or torch.compiler.is_compiling():
        return
    layers = len(given.states) // 2
    dropping = base.training and getattr(base.config, "layerdrop", 0)
    if len(given.used) < layers and not dropping:
        raise refuse(
            StateError,
            "prefix",
            f"used by layers {sorted(given.used)}, attention {base.config._attn_implementation!r}",
            f"all {layers} layers, attention with a prefix",
            "Did the attention implementation change since attach, perhaps through another model "
            "that shares this config object? Call fastpeft.activate(model, name) again.",
        )


def _check_model(model: nn.Module) -> nn.Module:
    """The inner model, after refusing architectures in which a prefix is not defined."""
    base = inner_model(model, _WHAT)
    config = base.config
    kinds = {
        kind
        for field in ("layer_types", "layers_block_type", "attention_layers")
        for kind in (getattr(config, field, None) or ())
    }
    odd = kinds - {"full_attention", "attention", "global"}
    window = getattr(config, "sliding_window", None)
    if not kinds and window is not None and getattr(config, "use_sliding_window", True):
        odd = {f"sliding_attention (sliding_window={window})"}
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    latent = getattr(config, "kv_lora_rank", None)
    for got, advice in (
        (
            f"layers of kind {', '.join(sorted(map(str, odd)))}" if odd else None,
            "Set config.sliding_window = None before loading if your texts fit in the window; or "
            "use LoRA.",
        ),
        (f"{shared} layers that share keys and values" if shared else None, "Use LoRA."),
        (f"latent keys (kv_lora_rank={latent})" if latent else None, "Use LoRA."),
        (
            None
            if getattr(base, "_supports_attention_backend", False)
            else "an attention that cannot be exchanged",
            "Use LoRA, or a newer transformers.",
        ),
        (
            None if getattr(config, "num_attention_heads", None) else "no attention heads",
            "Use LoRA.",
        ),
    ):
        if got is not None:
            raise refuse(
                ConfigError,
                f"Prefix for {type(base).__name__}",
                got,
                "full attention with keys of its own in every layer",
                advice,
            )
    return base


def _resolve(base: nn.Module, config: Prefix, task: str | None) -> Prefix:
    """The config with its sizes filled in, after checking that they fit."""
    model = base.config
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    for name, own in (
        ("num_layers", model.num_hidden_layers),
        ("num_attention_heads", heads),
        ("token_dim", heads * size),
    ):
        given = getattr(config, name)
        if given is not None and given != own:
            raise refuse(
                ConfigError,
                f"Prefix, {name}",
                given,
                f"{own}, as {type(base).__name__} has (heads: those of keys and values)",
                "The prefix was made for another model.",
            )
    check_virtual_tokens(base, config.num_virtual_tokens, _WHAT)
    return replace(
        config,
        num_layers=model.num_hidden_layers,
        num_attention_heads=heads,
        token_dim=heads * size,
        num_transformer_submodules=1,
        encoder_hidden_size=config.encoder_hidden_size or heads * size,
        task_type=task,
    )


def _attach(model: nn.Module, config: Prefix, name: str) -> Prefix:
    base = _check_model(model)
    config = _resolve(base, config, task_type(model, config))
    implementation_with_prefix(implementation_without(base.config._attn_implementation))
    device = base.get_input_embeddings().weight.device
    adapter = PrefixAdapter(config, _start(base, config), device)
    if not hasattr(base, _STORE):
        setattr(base, _STORE, PrefixStore(base))
        add_hooks(base, _before, _after)
    store: PrefixStore = getattr(base, _STORE)
    store.adapters[name] = adapter.train(base.training)
    return replace(config, init_weights=None)  # it has begun


@torch.no_grad()
def _start(base: nn.Module, config: Prefix) -> Tensor | None:
    """[P, 2 L Hkv D]: the model's own keys and values for the tokens to start from, or None.

    Raises:
        ConfigError: a layer has none, or others than the config tells; a token id out of range.
    """
    tokens = base.get_input_embeddings().weight
    if isinstance(config.init_weights, str) or tokens.is_meta:
        return None
    length, vocabulary = config.num_virtual_tokens, tokens.shape[0]
    if config.init_weights is None:
        ids = torch.randint(vocabulary, (length,))
    else:
        given = torch.tensor(config.init_weights)
        ids = given.repeat(-(-length // len(given)))[:length]
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise refuse(
                ConfigError,
                "Prefix, init_weights",
                f"token ids {int(ids.min())} to {int(ids.max())}",
                f"0 to {vocabulary - 1}",
                "Take the model's own tokenizer.",
            )
    found = _record(base, ids.to(tokens.device))
    states = [state for layer in sorted(found) for state in found[layer]]
    expected = (1, config.num_attention_heads, config.token_dim // config.num_attention_heads)
    shapes = {(s.shape[0], s.shape[1], s.shape[3]) for s in states}
    if sorted(found) != list(range(config.num_layers)) or shapes != {expected}:
        raise refuse(
            ConfigError,
            f"Prefix for {type(base).__name__}",
            f"keys in layers {sorted(found)}, (batch, heads, size) {sorted(shapes)}",
            f"{expected} in each of {config.num_layers} layers, as its config says",
            "This architecture is not supported. Use LoRA.",
        )
    stacked = torch.cat([state[:, :, -length:].to(tokens.device) for state in states])
    return stacked.permute(2, 0, 1, 3).reshape(length, -1).float()


def _record(base: nn.Module, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (key, value)} of one pass over ids [S], without dropout."""
    recorder, current = Recorder(), base.config._attn_implementation
    training = [module for module in base.modules() if module.training]
    base.eval()
    base.set_attn_implementation(implementation_with_prefix(implementation_without(current)))
    try:
        base(input_ids=ids.unsqueeze(0), **{KEYWORD: recorder})
    finally:
        base.set_attn_implementation(current)
        for module in training:
            module.training = True
    return recorder.found


def _detach(model: nn.Module, name: str) -> None:
    base = inner_model(model, _WHAT)
    store: PrefixStore = getattr(base, _STORE)
    del store.adapters[name]
    if name in store.active:
        _set_active(base, store, tuple(n for n in store.active if n != name))
    if not store.adapters:
        remove_hooks(base, _before, _after)
        delattr(base, _STORE)


def _activate(model: nn.Module, names: tuple[str, ...]) -> None:
    base = inner_model(model, _WHAT)
    if hasattr(base, _STORE):
        _set_active(base, getattr(base, _STORE), names)


def _set_active(base: nn.Module, store: PrefixStore, names: tuple[str, ...]) -> None:
    """The attention implementation is ours exactly while a prefix is active: the bare base runs its
    own code.
    """
    current = base.config._attn_implementation
    wanted = implementation_without(current)
    if names:
        wanted = implementation_with_prefix(wanted)
    if current != wanted:
        base.set_attn_implementation(wanted)
    store.active = names


def _adapter(model: nn.Module, name: str) -> PrefixAdapter:
    return getattr(inner_model(model, _WHAT), _STORE).adapters[name]


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return dict(_adapter(model, name).named_parameters())


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    adapter = _adapter(model, name)
    with torch.no_grad():
        return {"prompt_embeddings": adapter.projected()}


register_method(
    Method("prefix", Prefix, "PREFIX_TUNING", _attach, _detach, _activate, _parameters, _tensors)
)
