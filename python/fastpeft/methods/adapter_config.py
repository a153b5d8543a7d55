"""Configuration of bottleneck adapters, in the words of the `adapters` library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, refuse

# Name in a configuration (transformers' names of activations) -> name of the operator's.
# gelu_new and gelu_fast spell the tanh approximation with constants rounded differently.
ACTIVATION_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "identity",
    "identity": "identity",
}
INITS = ("bert", "mam_adapter", "houlsby")


@dataclass
class Bottleneck:
    """Bottleneck adapters: small two-layer networks inside the transformer layers. `Bottleneck()`
    is `Bottleneck.pfeiffer()`.

    Attributes:
        reduction_factor: hidden size / bottleneck width D; or {"<layer index>": factor,
            "default": factor}. D is at least 1.
        mh_adapter: after the attention.
        output_adapter: after the feed-forward network.
        cross_adapter: after cross attention.
        non_linearity: relu, gelu, gelu_new, silu (= swish), tanh or linear.
        is_parallel: it reads the residual stream, not the sub-layer's output (He et al. 2022).
        scaling: factor of its output: a number, "learned" (one) or "channel" (one a channel).
        dropout: of its output, in training.
        init_weights: "bert" (normal, 0.02), "mam_adapter" (the second matrix 0: the model starts
            unchanged) or "houlsby" (truncated normal, 0.01). Biases start at 0.
        init_weights_seed: seed which every adapter of every layer starts from.
        ln_before, ln_after: a layer norm of its own before or after it.
        original_ln_before: it reads the sum of sub-layer and residual stream, after the model's own
            norm where one follows the sum; not if is_parallel.
        original_ln_after: its output is added to the residual stream and goes through that norm.
        residual_before_ln: its skip connection starts before original_ln_before (True), after it
            (False), or between sum and norm ("post_add").
        adapter_residual_before_ln: the skip connection ends before ln_after, not after it.
        use_gating: a learned gate (a number a sequence) multiplies its output.
        leave_out: indices of layers without adapters, an encoder's layers counted first.
        base_model_name_or_path: what it was trained on.

    Raises:
        ConfigError: a value out of range, or no place chosen.
    """

    reduction_factor: float | Mapping[str, float] = 16
    mh_adapter: bool = False
    output_adapter: bool = True
    cross_adapter: bool = False
    non_linearity: str = "relu"
    is_parallel: bool = False
    scaling: float | str = 1.0
    dropout: float = 0.0
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    ln_before: bool = False
    ln_after: bool = False
    original_ln_before: bool = True
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    use_gating: bool = False
    leave_out: list[int] = field(default_factory=list)
    base_model_name_or_path: str | None = None

    @classmethod
    def pfeiffer(
        cls, reduction_factor: float | Mapping[str, float] = 16, **more: Any
    ) -> Bottleneck:
        """One adapter a layer, after the feed-forward network, on the summed residual stream
        (Pfeiffer et al. 2021; `seq_bn` of the adapters library).
        """
        return cls(**{"reduction_factor": reduction_factor, **more})

    @classmethod
    def houlsby(cls, reduction_factor: float | Mapping[str, float] = 16, **more: Any) -> Bottleneck:
        """Two adapters a layer, each on a sub-layer's output before it is summed (Houlsby et al.
        2019; `double_seq_bn`).
        """
        preset = {"mh_adapter": True, "non_linearity": "swish", "original_ln_before": False}
        return cls(**{"reduction_factor": reduction_factor, **preset, **more})

    @classmethod
    def parallel(cls, reduction_factor: float | Mapping[str, float] = 2, **more: Any) -> Bottleneck:
        """One adapter a layer, beside the feed-forward network (He et al. 2022; `par_bn`). Starts
        as a no-op.
        """
        preset = {
            "is_parallel": True,
            "original_ln_before": False,
            "scaling": 4.0,
            "init_weights": "mam_adapter",
        }
        return cls(**{"reduction_factor": reduction_factor, **preset, **more})

    @classmethod
    def between_attention_and_ffn(
        cls, reduction_factor: float | Mapping[str, float] = 16, **more: Any
    ) -> Bottleneck:
        """One adapter a layer, on the residual stream between attention and feed-forward network:
        where the usual picture of adapters draws it.
        """
        preset = {"mh_adapter": True, "output_adapter": False, "non_linearity": "gelu"}
        return cls(**{"reduction_factor": reduction_factor, **preset, **more})

    def __post_init__(self) -> None:
        self.leave_out = list(self.leave_out)
        factors = self._factors()
        for word, good, expected in (
            ("reduction_factor", bool(factors) and all(_positive(f) for f in factors), "> 0"),
            (
                "mh_adapter, output_adapter, cross_adapter",
                self.mh_adapter or self.output_adapter or self.cross_adapter,
                "one of them True",
            ),
            (
                "non_linearity",
                str(self.non_linearity).lower() in ACTIVATION_NAMES,
                "one of " + ", ".join(ACTIVATION_NAMES),
            ),
            (
                "scaling",
                self.scaling in ("learned", "channel") or _number(self.scaling),
                "a number, 'learned' or 'channel'",
            ),
            ("dropout", _number(self.dropout) and 0 <= self.dropout < 1, "a number in [0, 1)"),
            ("init_weights", self.init_weights in INITS, "one of " + ", ".join(INITS)),
            (
                "residual_before_ln",
                self.residual_before_ln in (True, False, "post_add"),
                "True, False or 'post_add'",
            ),
            (
                "leave_out",
                all(type(i) is int and i >= 0 for i in self.leave_out),
                "layer indices from 0 on",
            ),
        ):
            if not good:
                got = [getattr(self, w) for w in word.split(", ")]
                raise refuse(
                    ConfigError,
                    word,
                    repr(got[0] if len(got) == 1 else got),
                    expected,
                    "Choose another value.",
                )

    def _factors(self) -> list[Any]:
        if isinstance(self.reduction_factor, Mapping):
            return list(self.reduction_factor.values())
        return [self.reduction_factor]

    def width(self, hidden: int, layer: int) -> int:
        """D of an adapter in layer `layer` of a model of this hidden size.

        Raises:
            ConfigError: a reduction_factor by layers without this one and without a default.
        """
        factor: Any = self.reduction_factor
        if isinstance(factor, Mapping):
            factor = factor.get(str(layer), factor.get("default"))
            if factor is None:
                raise refuse(
                    ConfigError,
                    "reduction_factor",
                    f"none for layer {layer}",
                    "one for each layer, or a 'default'",
                    "Add one.",
                )
        return max(1, int(hidden // factor))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0
