"""Where bottleneck adapters sit: ROWS, one row a kind of transformer layer, and nothing else that
knows a model.

A layer adds the output h of a sub-layer (attention, feed-forward network, cross attention) to the
residual stream r. A `Site` names, by paths inside the layer, the module whose first input is r, the
module whose output is h, and the norm that follows the sum where there is one:

    pre-norm   y = r + h           Llama, GPT-2, T5, OPT, ...
    post-norm  y = norm(r + h)     BERT, DistilBERT, BART, ...
    sandwich   y = r + norm(h)     Gemma 2 and 3

The model goes on doing its sum; methods/adapter_seats.py puts the adapter in front of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..patterns import Place, places

SLOTS = ("attention", "cross", "output")


@dataclass(frozen=True)
class Site:
    """One place for an adapter, by paths inside the layer.

    stream: module whose first input is the residual stream r.
    tap: module whose output (the first, if it is a tuple) is h.
    key: where the `adapters` library keeps it: `<layer>.<key>.<adapter name>.adapter_up.weight`.
    norm: the norm of r + h in a post-norm model; in a sandwich the norm of h.
    joins: False where h is not added to r alone (attention and FFN side by side): the library
        computes original_ln_before without r there.
    """

    stream: str
    tap: str
    key: str
    norm: str | None = None
    joins: bool = True

    @property
    def paths(self) -> tuple[str, ...]:
        """All modules it names."""
        return (self.stream, self.tap, *([self.norm] if self.norm else []))


@dataclass(frozen=True)
class Row:
    """One kind of layer. The first row that fits a module is taken; it fits if the class name does
    and the layer has all modules of the attention and the output site.

    attention, output: its sites.
    cross: the site of cross attention, in the layers that have its modules.
    kind: regular expression for the class name.
    needs: more modules it has.
    lacks: modules or attributes it does not have: with them its sum would be another one.
    when: (attribute, value) it has.
    sandwich: the norms stand between h and the sum.
    """

    attention: Site
    output: Site
    cross: Site | None = None
    kind: str = r".*"
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    when: tuple[str, Any] | None = None
    sandwich: bool = False


_ATTENTION = "attention_adapters.adapters"
_CROSS = "cross_attention_adapters.adapters"
_OUTPUT = "output_adapters.adapters"
# Another norm, or a factor, between h and the sum.
_OTHER_SUM = ("post_self_attn_layernorm", "post_feedforward_layernorm", "residual_multiplier")

_BART_PRE = (
    Site("self_attn_layer_norm", "self_attn", _ATTENTION),
    Site("final_layer_norm", "fc2", _OUTPUT),
    Site("encoder_attn_layer_norm", "encoder_attn", _CROSS),
)
_BART_POST = (
    Site("self_attn", "self_attn", _ATTENTION, "self_attn_layer_norm"),
    Site("fc1", "fc2", _OUTPUT, "final_layer_norm"),
    Site("encoder_attn", "encoder_attn", _CROSS, "encoder_attn_layer_norm"),
)


def _t5(index: int) -> Site:
    part = f"layer.{index}"
    return Site(f"{part}.layer_norm", f"{part}.dropout", f"{part}.adapters")


ROWS: tuple[Row, ...] = (
    Row(  # Gemma 2 and 3
        Site("input_layernorm", "self_attn", _ATTENTION, "post_attention_layernorm"),
        Site("pre_feedforward_layernorm", "mlp", _OUTPUT, "post_feedforward_layernorm"),
        lacks=("residual_multiplier",),
        sandwich=True,
    ),
    Row(  # Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma, SmolLM, ...
        Site("input_layernorm", "self_attn", _ATTENTION),
        Site("post_attention_layernorm", "mlp", _OUTPUT),
        lacks=_OTHER_SUM,
    ),
    Row(  # Phi, Cohere: attention and FFN side by side, on one norm
        Site("input_layernorm", "self_attn", _ATTENTION),
        Site("input_layernorm", "mlp", _OUTPUT, joins=False),
        lacks=(*_OTHER_SUM, "post_attention_layernorm"),
    ),
    Row(
        Site("ln_1", "attn", _ATTENTION),
        Site("ln_2", "mlp", _OUTPUT),
        kind="GPT(2|BigCode|Neo)Block",
    ),
    Row(  # BERT, RoBERTa, ELECTRA, DeBERTa, MiniLM, ...
        Site(
            "attention",
            "attention.output.dropout",
            "attention.output.adapters",
            "attention.output.LayerNorm",
        ),
        Site("intermediate", "output.dropout", "output.adapters", "output.LayerNorm"),
        lacks=("crossattention",),
    ),
    Row(  # DistilBERT
        Site("attention", "attention", _ATTENTION, "sa_layer_norm"),
        Site("ffn", "ffn", _OUTPUT, "output_layer_norm"),
    ),
    Row(  # T5 decoder
        _t5(0),
        _t5(2),
        _t5(1),
        needs=("layer.0.SelfAttention", "layer.1.EncDecAttention", "layer.2.DenseReluDense"),
    ),
    Row(_t5(0), _t5(1), needs=("layer.0.SelfAttention", "layer.1.DenseReluDense")),  # T5 encoder
    Row(
        *_BART_PRE,
        kind="(MBart|Whisper|M2M100|Pegasus|PegasusX|Blenderbot|XGLM|BioGpt)(En|De)coderLayer",
    ),
    Row(*_BART_PRE, kind="OPTDecoderLayer", when=("do_layer_norm_before", True)),
    Row(*_BART_POST, kind="(Bart|PLBart|Marian|BlenderbotSmall|OPT)(En|De)coderLayer"),
)


@dataclass(frozen=True)
class Layer:
    """A layer of a model that a row fits.

    index: its number, counted through the whole model, an encoder's layers first.
    name: its plain name.
    row: the row.
    modules: {path inside the layer: Place}.
    """

    index: int
    name: str
    row: Row
    modules: Mapping[str, Place]

    def site(self, slot: str) -> Site | None:
        """The site of a slot of SLOTS, or None where the layer has none."""
        site: Site | None = getattr(self.row, slot)
        return site if site is not None and all(p in self.modules for p in site.paths) else None


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers of `model` that some row fits, in model order. Adapters on it do not matter."""
    every = {place.name: place for place in places(model)}
    inside: dict[str, dict[str, Place]] = {}
    for name, place in every.items():
        parts = name.split(".")
        for cut in range(1, len(parts)):
            inside.setdefault(".".join(parts[:cut]), {})[".".join(parts[cut:])] = place
    found: list[Layer] = []
    for name, place in every.items():
        row = _row_of(place.module, inside.get(name, {}))
        if row is not None:
            found.append(Layer(len(found), name, row, inside[name]))
    return found


def _row_of(module: nn.Module, inside: Mapping[str, Place]) -> Row | None:
    if "weight" in module._parameters or not inside:
        return None
    for row in ROWS:
        if (
            re.fullmatch(row.kind, type(module).__name__)
            and all(path in inside for site in (row.attention, row.output) for path in site.paths)
            and all(path in inside for path in row.needs)
            and not any(word in inside or hasattr(module, word) for word in row.lacks)
            and (row.when is None or getattr(module, row.when[0], None) == row.when[1])
        ):
            return row
    return None


def layer_kinds(model: nn.Module) -> Iterator[str]:
    """Class names of what stands in the model's module lists: what an error can show."""
    for place in places(model):
        if isinstance(place.module, nn.ModuleList) and len(place.module):
            yield type(place.module[0]).__name__
