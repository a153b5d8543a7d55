"""The options of LoRA: peft's words, peft's meanings, checked when they are set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ..errors import AdapterError, ConfigError, refuse
from .lora_init import is_mode

INIT_MODES = (True, False, "gaussian", "pissa", "pissa_niter_<n>", "olora", "loftq")
BIAS_MODES = ("none", "all", "lora_only")


def check_rank(r: object, what: str = "r") -> int:
    """Refuses a rank that is no integer >= 1.

    Raises:
        ConfigError: see above.
    """
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise refuse(ConfigError, what, repr(r), "an integer >= 1", "8 or 16 are usual ranks.")
    return r


def check_scale(lora_alpha: object, lora_dropout: object, init_lora_weights: object) -> None:
    """Refuses an alpha that is no positive number, a dropout outside [0, 1), an unknown init mode.

    Raises:
        ConfigError: see above.
    """
    _check_alpha(lora_alpha, "lora_alpha")
    if not _is_number(lora_dropout) or not 0.0 <= lora_dropout < 1.0:  # type: ignore[operator]
        raise refuse(
            ConfigError, "lora_dropout", repr(lora_dropout), "a number in [0, 1)", "0.05 is usual."
        )
    if init_lora_weights not in INIT_MODES[:3] and not is_mode(init_lora_weights):
        raise refuse(
            ConfigError,
            "init_lora_weights",
            repr(init_lora_weights),
            f"one of {INIT_MODES}",
            "True starts with the base's output.",
        )


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Factor of a low-rank branch: lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_dora(use_dora: bool, lora_bias: bool) -> None:
    """Refuses DoRA with a bias in B: a direction has none.

    Raises:
        ConfigError: see above.
    """
    if use_dora and lora_bias:
        raise refuse(
            ConfigError,
            "lora_bias",
            "True with use_dora=True",
            "one of the two",
            "DoRA scales the rows of a weight; peft refuses this pair too.",
        )


def check_name(name: object) -> str:
    """Refuses adapter names that would break module paths or files.

    Raises:
        AdapterError: no string, empty, with "." or a path separator, or a name nn.ModuleDict needs
            itself.
    """
    bad = (
        not isinstance(name, str)
        or not name
        or any(c in name for c in "./\\\0")
        or hasattr(nn.ModuleDict, name)
        or name == "training"
    )
    if bad:
        raise refuse(
            AdapterError,
            "name",
            repr(name),
            'a non-empty word without ".", "/" and "\\" that is no attribute of nn.ModuleDict',
            "Names become parts of module paths and folders; take something like 'poems'.",
        )
    return name  # type: ignore[return-value]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_alpha(value: object, what: str) -> None:
    if not _is_number(value) or not 0.0 < value < float("inf"):  # type: ignore[operator]
        raise refuse(
            ConfigError, what, repr(value), "a positive number", "16 or 32 are usual values."
        )


@dataclass
class LoRA:
    """What `fastpeft.attach` needs to add LoRA adapters to a model. Field names and meanings are
    peft's LoraConfig's.

    Attributes:
        r: rank >= 1.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        target_modules: names, suffixes, one regular expression, "all-linear", or None for the query
            and value projections of known model families.
        lora_dropout: in [0, 1), on the input of the low-rank branch.
        use_rslora: rank-stabilised scaling.
        use_dora: a learned magnitude per output feature, see lora_dora.py.
        init_lora_weights: True, "gaussian" or False, see LoRAAdapter; "pissa", "pissa_niter_<n>",
            "olora", "loftq", see lora_init.py.
        bias: which of the base's biases train. peft's "all" and "lora_only" are known words, but
            attach takes "none" alone: the base stays as it is, so that it can come back.
        rank_pattern, alpha_pattern: {name or regular expression: value} that override r and
            lora_alpha per module.
        exclude_modules: names or one regular expression that are left out.
        layers_to_transform: indices of the layers to adapt; None for all.
        layers_pattern: name of the list of layers, where it is not a usual one.
        modules_to_save: names of modules that train as a whole and are stored with the adapter.
        lora_bias: give B a bias.
        task_type, base_model_name_or_path: kept for the file.

    Raises:
        ConfigError: a value that cannot work.
    """

    # What target_modules may name beside linear layers.
    other_targets: ClassVar[tuple[type, ...]] = (nn.Embedding,)

    r: int = 8
    lora_alpha: float = 16
    target_modules: Sequence[str] | str | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    lora_bias: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_rank(self.r)
        check_scale(self.lora_alpha, self.lora_dropout, self.init_lora_weights)
        if self.bias not in BIAS_MODES:
            raise refuse(
                ConfigError, "bias", repr(self.bias), f"one of {BIAS_MODES}", "'none' is usual."
            )
        for flag in ("use_rslora", "use_dora", "lora_bias"):
            if not isinstance(getattr(self, flag), bool):
                raise refuse(
                    ConfigError, flag, repr(getattr(self, flag)), "True or False", "Pass a bool."
                )
        check_dora(self.use_dora, self.lora_bias)
        _check_pattern("rank_pattern", self.rank_pattern, check_rank)
        _check_pattern("alpha_pattern", self.alpha_pattern, _check_alpha)
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            _check_names(name, getattr(self, name), text_allowed=name != "modules_to_save")
        _check_layers(self.layers_to_transform)


def _check_pattern(what: str, pattern: object, check: Any) -> None:
    if not isinstance(pattern, Mapping) or not all(isinstance(k, str) for k in pattern):
        raise refuse(
            ConfigError, what, repr(pattern), "{name or regular expression: value}", "Pass a dict."
        )
    for key, value in pattern.items():
        check(value, f"{what}[{key!r}]")


def _check_names(what: str, value: object, text_allowed: bool) -> None:
    if value is None or (text_allowed and isinstance(value, str) and value):
        return
    is_list = isinstance(value, (list, tuple, set, frozenset))
    if not is_list or not value or not all(isinstance(v, str) and v for v in value):
        kinds = "a list of names" + (", or one text" if text_allowed else "")
        raise refuse(ConfigError, what, repr(value), f"{kinds}, or None", "Name the modules.")


def _check_layers(value: object) -> None:
    items = value if isinstance(value, (list, tuple, set, range)) else [value]
    if value is not None and not all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in items
    ):
        raise refuse(
            ConfigError,
            "layers_to_transform",
            repr(value),
            "indices >= 0, or None",
            "Count from 0.",
        )
