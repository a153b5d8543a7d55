"""Bottleneck adapters: out = residual + scaling * (act(x D^T + b_d) U^T + b_u), inside each layer
(Houlsby et al. 2019; Pfeiffer et al. 2021; He et al. 2022).

h is a sub-layer's output, r the residual stream, N the model's norm of the sum where it has one
(post-norm models; else there is none), A the network, N_b and N_a the norms of ln_before and
ln_after. As the `adapters` library computes it:

    sequential         x = h                    original_ln_before=False
                       x = r + h, then N(x)     original_ln_before=True
                 residual = h                   residual_before_ln=True
                          = x                   residual_before_ln=False
                          = r + h               residual_before_ln="post_add", post-norm only
                      out = N_a(A(N_b(x))) + residual      or N_a(A(N_b(x)) + residual) if
                                                           adapter_residual_before_ln
    parallel          out = N_a(A(N_b(r))) + h
    the layer goes on y = r + out, then N(y)    original_ln_after=True
                      y = out                   original_ln_after=False

    seq_bn, Pfeiffer        pre-norm  y = r + h + A(r + h)      post-norm  N(r + h + A(N(r + h)))
    double_seq_bn, Houlsby  pre-norm  y = r + h + A(h)          post-norm  N(r + h + A(h))
    par_bn, He et al.       pre-norm  y = r + h + A(r)          post-norm  N(r + h + A(r))

r in front of a pre-norm model's FFN is not normed: parallel adapters read the raw stream. Dropout
and gate act on A's output before the residual. Two things are odd in the library (1.3.0) and are
done likewise, for its files were trained so: in a sandwich model (Gemma 2) original_ln_before means
N(r + h) with N the norm of the LAST layer in every layer; and beside Phi's FFN, x = h.

Where the places are: adapter_sites.py. How h is reached: adapter_seats.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, StateError, refuse
from ..functional import bottleneck
from .adapter_config import ACTIVATION_NAMES, Bottleneck
from .adapter_files import FILES
from .adapter_seats import adapted, leave_seats, take_seats
from .adapter_sites import SLOTS, Layer, Site, find_layers, layer_kinds
from .method import Method, register_method
from .rows import Rows

__all__ = ["Bottleneck", "BottleneckAdapter"]

_FLAGS = {"attention": "mh_adapter", "cross": "cross_adapter", "output": "output_adapter"}


class BottleneckAdapter(nn.Module):
    """One adapter at one place.

    Args:
        hidden: K, size of the residual stream.
        width: D, size of the bottleneck.
        config: what it computes.
        joins: see adapter_sites.Site.
        dtype: of its parameters; computation is in the input's dtype.

    Attributes:
        adapter_down: weight [D, K], bias [D]; adapter_up: weight [K, D], bias [K].
        adapter_norm_before, adapter_norm_after: nn.LayerNorm of K, or None.
        gate: nn.Linear(K, 1) or None.
        scaling: a number, or a Parameter [1] ("learned") or [K] ("channel").
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        config: Bottleneck,
        joins: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.joins = joins
        self.activation = ACTIVATION_NAMES[config.non_linearity.lower()]
        self.adapter_norm_before = nn.LayerNorm(hidden, dtype=dtype) if config.ln_before else None
        self.adapter_down = nn.Linear(hidden, width, dtype=dtype)
        self.adapter_up = nn.Linear(width, hidden, dtype=dtype)
        self.adapter_norm_after = nn.LayerNorm(hidden, dtype=dtype) if config.ln_after else None
        self.gate = nn.Linear(hidden, 1, dtype=dtype) if config.use_gating else None
        if isinstance(config.scaling, str):
            size = 1 if config.scaling == "learned" else hidden
            self.scaling: float | nn.Parameter = nn.Parameter(torch.ones(size, dtype=dtype))
        else:
            self.scaling = float(config.scaling)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start that config.init_weights names."""
        down, up = self.adapter_down, self.adapter_up
        with _seeded(self.config.init_weights_seed):
            if self.config.init_weights == "bert":
                for layer in (down, up, self.gate):
                    if layer is not None:
                        nn.init.normal_(layer.weight, std=0.02)
            elif self.config.init_weights == "mam_adapter":
                nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
                nn.init.zeros_(up.weight)
                if self.gate is not None:
                    nn.init.normal_(self.gate.weight, std=0.02)
            else:
                for layer in (down, up):
                    nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        for layer in (down, up, self.gate):
            if layer is not None:
                nn.init.zeros_(layer.bias)

    @property
    def reads_stream(self) -> bool:
        """Whether `step` needs the residual stream."""
        return self.config.is_parallel or (self.config.original_ln_before and self.joins)

    def step(self, h: Tensor, stream: Tensor | None, norm: nn.Module | None) -> Tensor:
        """out of the formulas above.

        Args:
            h: [..., K], a sub-layer's output or that of the adapter before this one.
            stream: r, like h; needed if `reads_stream`.
            norm: N, or None.
        """
        config = self.config
        if config.is_parallel:
            return self(stream, h)
        x = residual = h
        if config.original_ln_before and self.joins:
            x = h + stream
            if norm is not None:
                if config.residual_before_ln == "post_add":
                    residual = x
                x = norm(x)
        if config.residual_before_ln is False:
            residual = x
        return self(x, residual)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + scaling * (act(x D^T + b_d) U^T + b_u) with the norms, gate and dropout of the
        configuration. x and residual: [..., K], any float dtype.
        """
        config = self.config
        scaling, up, up_bias = self.scaling, self.adapter_up.weight, self.adapter_up.bias
        if isinstance(scaling, Tensor):
            # s * (a U^T + b) = a (s U)^T + s b: the operator takes only a number, and K * D
            # products are fewer than M * K
            up, up_bias, scaling = scaling[:, None] * up, scaling * up_bias, 1.0
        inner = x if self.adapter_norm_before is None else _norm(x, self.adapter_norm_before)
        drops = self.training and config.dropout > 0
        alone = drops or self.gate is not None or self.adapter_norm_after is not None
        out = bottleneck(
            inner,
            self.adapter_down.weight,
            self.adapter_down.bias,
            up,
            up_bias,
            self.activation,
            scaling,
            None if alone else residual,
        )
        if not alone:
            return out
        if drops:
            out = F.dropout(out, config.dropout)
        if self.gate is not None:
            out = out * self._gate(x)
        inside = config.adapter_residual_before_ln and not config.is_parallel
        if inside:
            out = out + residual
        if self.adapter_norm_after is not None:
            out = _norm(out, self.adapter_norm_after)
        return out if inside else out + residual

    def _gate(self, x: Tensor) -> Tensor:
        """[B, 1, 1]: the mean over the sequence of a sigmoid."""
        if x.dim() != 3:
            raise refuse(
                StateError,
                "use_gating",
                f"a layer input of {x.dim()} dimensions",
                "[batch, sequence, hidden]",
                "The gate is a mean over a sequence: train this model without use_gating.",
            )
        weight, bias = self.gate.weight.to(x.dtype), self.gate.bias.to(x.dtype)
        return torch.sigmoid(F.linear(x, weight, bias)).mean(dim=1, keepdim=True)

    def extra_repr(self) -> str:
        """D, activation and scaling."""
        scaling = self.config.scaling
        width = self.adapter_down.out_features
        return f"width={width}, activation={self.activation}, scaling={scaling}"


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers from `seed` inside the block; None leaves torch's generator alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _attach(model: nn.Module, config: Bottleneck, adapter: str) -> Bottleneck:
    layers = find_layers(model)
    chosen = _choose(model, layers, config)
    made = [_make(model, layer, site, config) for layer, site in chosen]
    for (layer, site), module in zip(chosen, made, strict=True):
        norm = None
        if layer.row.sandwich:
            norm = layers[-1].modules[site.norm].module  # the library's, see the head of this file
        take_seats(layer, site, norm).adapters[adapter] = module
    return config


def _choose(model: nn.Module, layers: list[Layer], config: Bottleneck) -> list[tuple[Layer, Site]]:
    """The sites that `config` names; ConfigError if it makes no sense on this model."""
    if not layers:
        kinds = ", ".join(dict.fromkeys(layer_kinds(model))) or "no module list"
        raise refuse(
            ConfigError,
            "model",
            f"no layer of a known kind (it has {kinds})",
            "a row of ROWS in fastpeft/methods/adapter_sites.py that fits",
            "Add a row for this model, or adapt it by LoRA.",
        )
    wrong = [index for index in config.leave_out if index >= len(layers)]
    if wrong:
        raise refuse(
            ConfigError,
            "leave_out",
            str(wrong),
            f"indices below {len(layers)}, the number of layers",
            "Correct the indices.",
        )
    chosen: list[tuple[Layer, Site]] = []
    for slot in (slot for slot in SLOTS if getattr(config, _FLAGS[slot])):
        sites = [(layer, site) for layer in layers if (site := layer.site(slot)) is not None]
        if not sites:
            raise refuse(
                ConfigError, _FLAGS[slot], "True", "False", f"This model has no {slot} for it."
            )
        chosen += [(layer, site) for layer, site in sites if layer.index not in config.leave_out]
    if not chosen:
        raise refuse(
            ConfigError, "leave_out", "every layer", "some layers left", "Leave out fewer layers."
        )
    for layer, site in chosen:
        _check(layer, site, config)
    order = {slot: i for i, slot in enumerate(SLOTS)}
    return sorted(chosen, key=lambda c: (c[0].index, order[_slot(*c)]))


def _slot(layer: Layer, site: Site) -> str:
    return next(slot for slot in SLOTS if getattr(layer.row, slot) is site)


def _check(layer: Layer, site: Site, config: Bottleneck) -> None:
    """Refuses what has no meaning at this site."""
    sequential = config.original_ln_before and not config.is_parallel
    for word, bad, why in (
        (
            "residual_before_ln",
            config.residual_before_ln == "post_add" and sequential and site.norm is None,
            "this model has no norm behind the sum",
        ),
        (
            "original_ln_after",
            not config.original_ln_after and (layer.row.sandwich or not site.joins),
            "this model's sum cannot be left out",
        ),
    ):
        if bad:
            raise refuse(
                ConfigError,
                f"{word} at '{layer.name}'",
                repr(getattr(config, word)),
                "another value",
                f"For {why}.",
            )


def _make(model: nn.Module, layer: Layer, site: Site, config: Bottleneck) -> BottleneckAdapter:
    """An adapter for a site, on the device of the layer's norm; float32."""
    beside = layer.modules[site.norm or site.stream].module
    weight = getattr(beside, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        weight = next(p for p in layer.modules[site.stream].module.parameters())
        hidden = int(model.config.hidden_size)
    else:
        hidden = weight.shape[0]
    adapter = BottleneckAdapter(hidden, config.width(hidden, layer.index), config, site.joins)
    return adapter.to(weight.device).train(beside.training)


def _detach(model: nn.Module, adapter: str) -> None:
    for _, seat in adapted(model, adapter):
        seat.set_active(tuple(name for name in seat.active if name != adapter))
        del seat.adapters[adapter]
    leave_seats(model)


def _activate(model: nn.Module, names: tuple[str, ...]) -> None:
    for _, seat in adapted(model):
        seat.set_active(tuple(name for name in names if name in seat.adapters))


def _mix(model: nn.Module, rows: Rows | None) -> None:
    for _, seat in adapted(model):
        seat.set_rows(rows)


def _parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {
        f"{place.name}.{key}": parameter
        for place, seat in adapted(model, adapter)
        for key, parameter in seat.adapters[adapter].named_parameters()
    }


register_method(
    Method(
        "bottleneck",
        Bottleneck,
        "BOTTLENECK",
        _attach,
        _detach,
        _activate,
        _parameters,
        mix=_mix,
        files=FILES,
    )
)
