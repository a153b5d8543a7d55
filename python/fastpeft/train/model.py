"""The model of a run: the frozen base as its recipe wants it, the adapter, the texts as tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, refuse
from ..folders import quantization_config
from ..patterns import is_quantized, places
from .base import load_base, model_folder, pick_device, quiet_libraries
from .blocks import cut, hold_out, tokenize
from .folders import open_quantized
from .recipe import Recipe, load_recipe, resolve
from .sources import read

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def load(recipe: Recipe, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base as its folder holds it. Dense: on `device` if it fits there dense, else on the CPU.
    Quantised already: on `device`; blocksize, double_quant and threshold of the recipe become the
    folder's.

    Raises:
        ConfigError: a quantised folder for which the recipe says another format, or measure_dense.
    """
    from ..hf.folder import config_of

    said = quantization_config(model_folder(recipe.model))
    if said is not None:
        _check_packed(recipe, said)
        model, tokenizer = open_quantized(recipe.model, recipe.dtype, device)
        there = config_of({p.name: p.module for p in places(model) if is_quantized(p.module)})
        recipe.blocksize, recipe.double_quant = there.blocksize, there.double_quant
        recipe.threshold = there.threshold
    else:
        model, tokenizer = load_base(model_folder(recipe.model), getattr(torch, recipe.dtype))
    model.config.use_cache = False
    model.eval()
    if device.type == "cuda" and 1.2 * module_bytes(model) < torch.cuda.mem_get_info()[0]:
        model.to(device)
    return model, tokenizer


def _check_packed(recipe: Recipe, said: dict[str, Any]) -> None:
    """Refuses a recipe that a folder quantised as `said` cannot fulfil."""
    from ..hf.folder import our_config

    there = our_config(said).format
    if recipe.format != there:
        got = f"{recipe.format!r}, and the folder {recipe.model} is quantised already"
        advice = "Say so, or give the dense model it was made from."
        raise refuse(ConfigError, "format", got, repr(there), advice)
    if recipe.measure_dense:
        got = f"true, and the folder {recipe.model} is quantised already"
        advice = "Leave it out: the dense weights are not there."
        raise refuse(ConfigError, "measure_dense", got, "false", advice)


def freeze(
    model: PreTrainedModel,
    recipe: Recipe,
    device: torch.device,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Quantises the base in place as the recipe says, where it is not yet, and puts it on its
    device.

    Args:
        model: of `load`.
        progress: called with (layers done, layers, name).

    Returns:
        parameters, dense_bytes (the model in 16 bits), base_bytes and, if quantised,
        layer_dense_bytes and layer_bytes (of the quantised layers, in 16 bits and now).
    """
    import fastpeft

    parameters = sum(p.numel() for p in model.parameters())
    layers = [module for module in model.modules() if is_quantized(module)]
    parameters += sum(layer.in_features * layer.out_features for layer in layers)
    if recipe.format != "none" and not layers:
        options = {"blocksize": recipe.blocksize, "double_quant": recipe.double_quant}
        if recipe.format == "int8":
            options = {"threshold": recipe.threshold}
        report = fastpeft.quantize(model, recipe.format, progress=progress or False, **options)
        layers = [model.get_submodule(name) for name in report.converted]
    facts: dict[str, Any] = {"parameters": parameters, "dense_bytes": 2 * parameters}
    if layers:
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        facts["layer_dense_bytes"] = 2 * weights
        facts["layer_bytes"] = sum(module_bytes(layer) for layer in layers)
    model.to(device).eval()
    facts["base_bytes"] = module_bytes(model)
    return facts


def frozen_base(
    recipe: Recipe, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base as a recipe with a resolved dtype wants it: quantised, on its device."""
    model, tokenizer = load(recipe, device)
    freeze(model, recipe, device)
    return model, tokenizer


def texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Training blocks [B, seq_len] and held-out tokens [T] of a recipe."""
    data = [document for source in recipe.data for document in read(source)]
    blocks = cut(tokenize(data, tokenizer), recipe.seq_len)
    if not recipe.heldout:
        return hold_out(blocks, recipe.heldout_fraction)
    held = [document for source in recipe.heldout for document in read(source)]
    return blocks, tokenize(held, tokenizer)


def open_run(
    run: str | Path, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Recipe]:
    """The model of a run: its base, quantised again, with the saved adapter.

    Args:
        run: folder with recipe.yaml and adapter/.
        device: "auto", "cpu" or "cuda".

    Raises:
        ConfigError: no run there, or one without an adapter yet.
    """
    import fastpeft

    run = Path(run)
    # adapter_config.json of an adapter, config.json of a model trained as a whole
    for pattern in ("recipe.yaml", "adapter/*config.json"):
        if not any(run.glob(pattern)):
            raise refuse(
                ConfigError,
                "run",
                f"{run} without {pattern}",
                "the folder of a finished run",
                "Correct the path, or finish it with: fastpeft train --resume --output PATH",
            )
    recipe = resolve(load_recipe(run / "recipe.yaml"))
    quiet_libraries()
    model, tokenizer = frozen_base(recipe, pick_device(device))
    fastpeft.load_adapter(model, run / "adapter", name=ADAPTER)
    model.eval()
    return model, tokenizer, recipe
