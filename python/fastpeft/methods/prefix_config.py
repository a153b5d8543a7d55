"""The options of prefix-tuning, checked when they are set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError, refuse
from .model_inputs import check_count


@dataclass
class Prefix:
    """What `fastpeft.attach` needs to add a prefix. Fields are peft's PrefixTuningConfig's, but for
    `projection` (prefix_projection there).

    Attributes:
        num_virtual_tokens: P >= 1.
        projection: train an MLP that makes the keys and values. The file holds what it made, so a
            loaded prefix has none and trains directly.
        encoder_hidden_size: H, width of the MLP; None: Hkv * D.
        init_weights: what the prefix starts as. Token ids: the keys and values the model has for
            them (repeated or cut to P); those of a fitting text are the best start. None: the same
            for tokens drawn at random. "normal": of deviation 0.02. "zero": all zero, and without
            projection the virtual tokens then stay alike, since they get the same gradient.
            Held-out loss of SmolLM2-135M before any training, P = 16, without prefix 3.18: 3.00
            with a text, 3.25 to 3.34 with random tokens, 4.05 with zeros, 9.67 with deviation 1,
            as peft starts.
        num_layers, num_attention_heads, token_dim: L, Hkv and Hkv * D; None: those of the model. A
            value must be the model's.
        num_transformer_submodules: 1, or None.
        modules_to_save: names of modules that train as a whole and are stored with the prefix.
        task_type: None: the model's ("CAUSAL_LM", ...). base_model_name_or_path: kept for the file.

    Raises:
        ConfigError: a value that cannot work.
    """

    num_virtual_tokens: int
    projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | Sequence[int] | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        for name in ("encoder_hidden_size", "num_layers", "num_attention_heads", "token_dim"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if not isinstance(self.projection, bool):
            raise refuse(
                ConfigError, "projection", repr(self.projection), "True or False", "Pass a bool."
            )
        _check_start(self.init_weights)
        if self.num_transformer_submodules not in (None, 1):
            raise refuse(
                ConfigError,
                "num_transformer_submodules",
                repr(self.num_transformer_submodules),
                "1",
                "A prefix for an encoder-decoder is not supported.",
            )


def _check_start(start: object) -> None:
    if start is None or start in ("zero", "normal"):
        return
    good = isinstance(start, (list, tuple)) and start
    if not good or not all(isinstance(i, int) and not isinstance(i, bool) for i in start):
        raise refuse(
            ConfigError,
            "init_weights",
            repr(start),
            "None, 'zero', 'normal' or a list of token ids",
            "tokenizer(text)['input_ids'] is a good one.",
        )
