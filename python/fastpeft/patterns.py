"""Which modules of a model an adapter goes to: names, suffixes, a regular expression, or
"all-linear".

The words mean what peft's mean (target_modules, exclude_modules, layers_to_transform,
layers_pattern, rank_pattern, alpha_pattern, modules_to_save). Models are rows of DEFAULT_TARGETS,
never code.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastpeft.errors import ConfigError, caller_level, refuse
from fastpeft.transposed import TransposedLinear, is_conv1d

ALL_LINEAR = "all-linear"

# Query and value projection (Hu et al. 2021, "LoRA", section 7.1), by the model_type of a
# transformers config.
_Q_V = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama", "llama4", "llama4_text", "mistral", "mixtral", "qwen2", "qwen2_moe"), _Q_V
    ),
    **dict.fromkeys(
        ("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "gemma3_text", "phi"), _Q_V
    ),
    **dict.fromkeys(
        ("opt", "bart", "gptj", "gpt_neo", "stablelm", "smollm3", "olmo", "olmo2"), _Q_V
    ),
    **dict.fromkeys(("cohere", "granite", "starcoder2", "whisper", "m2m_100", "pegasus"), _Q_V),
    **dict.fromkeys(("cohere2", "glm", "glm4", "granitemoe", "gpt_oss", "phimoe", "olmoe"), _Q_V),
    **dict.fromkeys(("ministral", "exaone4", "nemotron", "olmo3", "arcee", "helium"), _Q_V),
    **dict.fromkeys(("ernie4_5", "seed_oss", "hunyuan_v1_dense", "lfm2", "biogpt"), _Q_V),
    **dict.fromkeys(("xglm", "mbart", "marian", "blenderbot", "modernbert-decoder"), _Q_V),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _QUERY_VALUE),
    "vit": (*_QUERY_VALUE, *_Q_V),  # transformers renamed them: those that are there count
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon", "persimmon"), ("query_key_value",)),
    **dict.fromkeys(("t5", "mt5", "umt5"), ("q", "v")),
    **dict.fromkeys(("phi3", "codegen"), ("qkv_proj",)),
    "distilbert": ("q_lin", "v_lin"),
    "deberta-v2": ("query_proj", "value_proj"),
    "mpt": ("Wqkv",),
}
CLASSIFIER_NAMES = (
    "classifier",
    "score",
)  # heads that peft trains and saves for classification tasks
CLASSIFICATION_TASKS = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True)
class Place:
    """Where a module of the bare model sits now.

    name: its plain name, as in the model without adapters.
    chain: (parent, attribute, module) from the outermost wrapper down to the module itself.
    """

    name: str
    chain: tuple[tuple[nn.Module, str, nn.Module], ...]

    @property
    def module(self) -> nn.Module:
        """The bare module, whatever is wrapped around it."""
        last = self.chain[-1][2]
        return last.conv if isinstance(last, TransposedLinear) else last

    def wrapper(self, kind: type) -> nn.Module | None:
        """The wrapper of class `kind` around the module, or None."""
        return next((m for _, _, m in self.chain[:-1] if isinstance(m, kind)), None)

    def put(self, new: nn.Module) -> None:
        """Set `new` where the bare module sits."""
        parent, attribute, _ = self.chain[-1]
        setattr(parent, attribute, new)

    def unwrap(self, kind: type) -> None:
        """Take the wrapper of class `kind` out; what it wraps takes its seat again."""
        for (parent, attribute, module), (_, _, inner) in zip(
            self.chain, self.chain[1:], strict=False
        ):
            if isinstance(module, kind):
                # only another wrapper may keep a TransposedLinear: it cannot do without
                bare = inner is self.chain[-1][2] and not hasattr(type(parent), "fastpeft_wraps")
                setattr(parent, attribute, self.module if bare else inner)
                return


def places(model: nn.Module) -> Iterator[Place]:
    """Every module below `model` once, in registration order, under its plain name.

    Wrappers (class attribute `fastpeft_wraps`) are walked through; what they add is not shown, nor
    is what adapters put beside the model's own modules (class attribute `fastpeft_added`).
    """
    yield from _places_below(model, "", {model})


def _places_below(parent: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[Place]:
    for attribute, module in list(parent._modules.items()):
        if module is None or module in seen or hasattr(type(module), "fastpeft_added"):
            continue
        seen.add(module)
        chain = [(parent, attribute, module)]
        while (wrapped := getattr(type(chain[-1][2]), "fastpeft_wraps", None)) is not None:
            outer = chain[-1][2]
            inner = outer._modules[wrapped]
            seen.add(inner)
            chain.append((outer, wrapped, inner))
        place = Place(f"{prefix}{attribute}", tuple(chain))
        seen.add(place.module)
        yield place
        yield from _places_below(place.module, f"{place.name}.", seen)


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(plain name, Parameter) of the bare model, without what adapters added; shared ones under
    their first name.
    """
    seen: set[int] = set()
    owners = [("", model)] + [(f"{place.name}.", place.module) for place in places(model)]
    for prefix, owner in owners:
        for attribute, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}{attribute}", parameter


def is_quantized(module: nn.Module) -> bool:
    """Our own Linear4bit / Linear8bit: in_features, out_features, format, dequantize()."""
    return (
        hasattr(module, "dequantize")
        and hasattr(module, "in_features")
        and hasattr(module, "format")
    )


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear, Conv1D and our quantised layers: what computes y = x W^T + bias."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_quantized(module)


def linear_places(model: nn.Module) -> list[Place]:
    """All linear layers, without those nn.MultiheadAttention owns: it reads their weight and never
    calls them.
    """
    found = list(places(model))
    owners = tuple(f"{p.name}." for p in found if isinstance(p.module, nn.MultiheadAttention))
    if isinstance(model, nn.MultiheadAttention):
        return []
    return [p for p in found if is_linear(p.module) and not p.name.startswith(owners)]


def find_targets(model: nn.Module, config: Any) -> list[Place]:
    """The places `config` names, in model order; ConfigError if it names none, or something that is
    not linear.

    Args:
        model: any nn.Module; adapters attached to it already do not matter.
        config: has target_modules (list of names or suffixes, one regular expression, "all-linear",
            or None for the row of DEFAULT_TARGETS) and perhaps exclude_modules,
            layers_to_transform, layers_pattern, modules_to_save, other_targets (classes of modules
            that are no linear layers and may be named too).
    """
    linear = {place.name: place for place in linear_places(model)}
    targets = config.target_modules
    limits = [
        w
        for w in ("layers_to_transform", "layers_pattern")
        if getattr(config, w, None) not in (None, [])
    ]
    if isinstance(targets, str) and limits:
        raise refuse(
            ConfigError,
            limits[0],
            "a value",
            "none beside a target_modules string",
            "Name modules by a list.",
        )
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        heads = output_names(model, getattr(config, "task_type", None))
        chosen = [
            p for name, p in linear.items() if name not in heads and not is_excluded(config, name)
        ]
        if not chosen:
            raise ConfigError(
                "target_modules='all-linear': the model has no linear layer that is not excluded."
            )
        return chosen
    chosen = [place for place in places(model) if is_target(config, place.name)]
    if not chosen:
        raise _no_match(targets, config, linear)
    other = getattr(config, "other_targets", ())
    wrong = [p for p in chosen if p.name not in linear and not isinstance(p.module, other)]
    if wrong:
        raise refuse(
            ConfigError,
            f"target module '{wrong[0].name}'",
            type(wrong[0].module).__name__,
            "nn.Linear, Conv1D, Linear4bit or Linear8bit outside nn.MultiheadAttention"
            + "".join(f", or {kind.__name__}" for kind in other),
            "Name other modules in target_modules, or leave this one out by exclude_modules.",
        )
    return chosen


def target_names(model: nn.Module, config: Any, chosen: list[Place]) -> list[str]:
    """A sorted list for target_modules that names exactly `chosen`: last parts of names where that
    is enough.
    """
    full = sorted(place.name for place in chosen)
    short = sorted({name.rsplit(".", 1)[-1] for name in full})
    probe = replace(config, target_modules=short)
    return (
        short if sorted(p.name for p in places(model) if is_target(probe, p.name)) == full else full
    )


def default_targets(model: nn.Module) -> list[str]:
    """The row of DEFAULT_TARGETS for this model's config.model_type; ConfigError if there is
    none.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    row = DEFAULT_TARGETS.get(model_type)
    names = sorted({p.name.rsplit(".", 1)[-1] for p in linear_places(model)})
    if row is None:
        raise refuse(
            ConfigError,
            "target_modules",
            "None",
            f"a list of names, for model_type {model_type!r} has no default row",
            f"Choose from this model's linear layers: {', '.join(names[:20])}; or 'all-linear'.",
        )
    return [name for name in row if name in names] or list(row)


def is_target(config: Any, name: str) -> bool:
    """Whether `config` names the module of plain name `name` (peft's rules; not for
    "all-linear").
    """
    if is_excluded(config, name):
        return False
    targets = config.target_modules
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True  # a full name is taken whatever layers_to_transform says
    if not any(name.endswith(f".{target}") for target in targets):
        return False
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == []:
        return True
    index = layer_index(name, getattr(config, "layers_pattern", None))
    return index is not None and index in ([wanted] if isinstance(wanted, int) else wanted)


def is_excluded(config: Any, name: str) -> bool:
    """Whether exclude_modules names it, or modules_to_save trains it whole."""
    excluded = getattr(config, "exclude_modules", None)
    if excluded:
        if isinstance(excluded, str):
            if re.fullmatch(excluded, name):
                return True
        elif name in excluded or any(name.endswith(f".{word}") for word in excluded):
            return True
    saved = getattr(config, "modules_to_save", None) or ()
    return any(re.match(rf"(^|.*\.){word}($|\..*)", name) for word in saved)


def layer_index(name: str, layers_pattern: str | Iterable[str] | None = None) -> int | None:
    """The layer number in a module name: the first number, or the one after a name of
    `layers_pattern`.
    """
    if not layers_pattern:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
        return int(match["index"]) if match else None
    for word in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        match = re.match(rf"(?:^|.*?\.){word}\.(?P<index>\d+)\.", name)
        if match:
            return int(match["index"])
    return None


def pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key of rank_pattern / alpha_pattern that matches the end of `name`,
    else `default`.
    """
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def output_names(model: nn.Module, task_type: str | None = None) -> set[str]:
    """Plain names of the output layer (lm_head) and, for classification, of the heads."""
    found: set[str] = set()
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    for place in places(model):
        if output is not None and any(module is output for _, _, module in place.chain):
            found.add(place.name)
        if place.name == "lm_head" or (
            task_type in CLASSIFICATION_TASKS and place.name in CLASSIFIER_NAMES
        ):
            found.add(place.name)
    return found


def find_saved(model: nn.Module, config: Any) -> list[Place]:
    """The modules of modules_to_save (names end with one of the words), in model order.

    ConfigError for a word that matches nothing, except the classifier names which peft adds
    unasked.
    """
    words = list(getattr(config, "modules_to_save", None) or ())
    found = [p for p in places(model) if any(p.name.endswith(word) for word in words)]
    for word in words:
        if word not in CLASSIFIER_NAMES and not any(p.name.endswith(word) for p in found):
            near = near_names(word, (p.name for p in places(model)))
            raise refuse(ConfigError, "modules_to_save", repr(word), "the name of a module", near)
    outer = {p.name for p in found}
    # a module inside a saved one is saved with it
    return [p for p in found if not any(p.name.startswith(f"{name}.") for name in outer)]


def near_names(wanted: str, names: Iterable[str]) -> str:
    """Advice with the names nearest to `wanted`, full names and last parts alike."""
    full = set(names)
    pool = sorted(full | {name.rsplit(".", 1)[-1] for name in full})
    near = difflib.get_close_matches(wanted, pool, n=5, cutoff=0.5)
    if not near:
        near = [name for name in pool if "." not in name and not name.isdigit()][:10]
    return f"Near names: {', '.join(near)}."


def _no_match(targets: Any, config: Any, linear: Mapping[str, Place]) -> ConfigError:
    if isinstance(targets, str):
        last = re.sub(r"[^\w.]", " ", targets).split() or [targets]
        advice = near_names(last[-1].strip("."), linear)
    else:
        advice = " ".join(f"For '{word}': {near_names(word, linear)}" for word in list(targets)[:4])
    limits = [
        w
        for w in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if getattr(config, w, None)
    ]
    if limits:
        advice += f" Look at {', '.join(limits)} too."
    return refuse(
        ConfigError, "target_modules", repr(targets), "to match at least one linear layer", advice
    )


def warn_unused(model: nn.Module, config: Any, chosen: list[Place]) -> None:
    """A warning for each name of a list that matches nothing: most often a slip, but peft lets it
    pass, so it is no error."""
    if isinstance(config.target_modules, str):
        return
    for word in config.target_modules:
        if not any(p.name == word or p.name.endswith(f".{word}") for p in chosen):
            near = near_names(word, (p.name for p in linear_places(model)))
            message = f"target_modules: '{word}' matches no module. {near}"
            warnings.warn(message, stacklevel=caller_level())
