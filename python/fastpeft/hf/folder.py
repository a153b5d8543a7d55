"""Model folders in and out: dense or quantised, under either of the names a quantised one bears."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft import folders
from fastpeft.attach import state_of
from fastpeft.errors import ConfigError, FormatError, StateError, refuse
from fastpeft.patterns import is_quantized, linear_places, places
from fastpeft.transposed import is_conv1d

from .config import FastPeftConfig
from .quantizer import FastPeftQuantizer

SAVE_AS = ("bitsandbytes", folders.METHOD)
# What a model folder holds beside weights and the files that save_pretrained writes.
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = ("config.json", "generation_config.json", "adapter_config.json")


def load_model(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> Any:
    """The model of a folder, by the class that its config.json names; a quantised folder, ours or
    bitsandbytes', with our layers and without the library bitsandbytes.

    Args:
        path: what save_pretrained, `save_quantized` or `fastpeft quantize` wrote.
        dtype: of what is not quantised; "auto": as stored.
        device: where to put it; default: the CPU.

    Returns:
        A transformers PreTrainedModel in evaluation mode.

    Raises:
        ConfigError: no model folder, a class transformers does not have, another library's
            quantisation.
        FormatError: packed tensors that are damaged, or that fit no layer.
    """
    from transformers import AutoConfig

    folder = Path(path)
    if not (folder / "config.json").is_file():
        advice = "Give the folder that save_pretrained wrote."
        raise refuse(ConfigError, "model", repr(str(path)), "a folder with config.json", advice)
    said = folders.quantization_config(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if said is not None:
        config.quantization_config = our_config(said).to_dict()
    kind = model_class(config)
    place = {} if device is None else {"device_map": {"": str(device)}}
    try:
        return kind.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, **place
        )
    except OSError as error:
        text = str(error).strip().split("\n")[0]
        advice = "Check the folder: fastpeft inspect"
        raise refuse(ConfigError, f"model {folder}", text, "a whole model", advice) from error


def our_config(said: dict[str, Any]) -> FastPeftConfig:
    """A folder's `quantization_config` as FastPeftConfig.

    Raises:
        ConfigError: it is neither ours nor bitsandbytes'.
    """
    method = said.get("quant_method", "bitsandbytes" if "load_in_4bit" in said else None)
    if method == folders.METHOD:
        return FastPeftConfig(**said)
    if method == "bitsandbytes":
        return FastPeftConfig.from_bitsandbytes(said)
    raise refuse(
        ConfigError,
        "quant_method",
        repr(method),
        " or ".join(map(repr, SAVE_AS)),
        "Load it with the library it belongs to.",
    )


def model_class(config: Any) -> type:
    """The transformers class that a config's `architectures` names; only transformers' own.

    Raises:
        ConfigError: it names none, or one transformers does not have.
    """
    import transformers

    names = list(config.architectures or ())
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise refuse(
        ConfigError,
        "architectures",
        names,
        "a model class of transformers",
        f"transformers {transformers.__version__} is installed; the model may need another.",
    )


def save_quantized(model: Any, path: str | os.PathLike[str], save_as: str = folders.METHOD) -> Path:
    """Write a quantised model as a folder, canonical tensors either way (fastpeft/folders.py).

    Args:
        model: a transformers model with quantised layers and no adapter.
        path: a folder; made if missing.
        save_as: "fastpeft": from_pretrained gives our layers where FastPeftConfig is imported, and
            fails elsewhere; "bitsandbytes": transformers loads it with bitsandbytes.

    Returns:
        The folder.

    Raises:
        StateError: nothing is quantised, or adapters are attached.
        FormatError: bitsandbytes has no word for it.
    """
    if save_as not in SAVE_AS:
        advice = "Choose one of these."
        raise refuse(ConfigError, "save_as", repr(save_as), " or ".join(SAVE_AS), advice)
    layers = {p.name: p.module for p in places(model) if is_quantized(p.module)}
    if not layers or state_of(model) is not None:
        got = "attached adapters" if layers else "no quantised layer"
        advice = "Save adapters with save_adapter; quantise first with fastpeft.quantize."
        raise refuse(StateError, "model", got, "a quantised model without adapters", advice)
    if save_as == "bitsandbytes":
        config: Any = _bitsandbytes(model, layers)
        quantizer = None
    else:
        config = config_of(layers)
        quantizer = FastPeftQuantizer(config, pre_quantized=True)
    before = {name: model.__dict__.pop(name, None) for name in ("hf_quantizer",)}
    said = getattr(model.config, "quantization_config", None)
    try:
        model.config.quantization_config = config
        if quantizer is not None:
            model.hf_quantizer = quantizer
        model.save_pretrained(path)
    finally:
        model.__dict__.pop("hf_quantizer", None)
        model.__dict__.update({k: v for k, v in before.items() if v is not None})
        if said is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = said
    return Path(path)


def config_of(layers: dict[str, Any]) -> FastPeftConfig:
    """The FastPeftConfig that describes these layers; they must be of one format."""
    formats = sorted({layer.format for layer in layers.values()})
    if len(formats) > 1:
        raise refuse(FormatError, "model", f"layers of {formats}", "one format", "Quantise anew.")
    first = next(iter(layers.values()))
    if first.format == "int8":
        return FastPeftConfig("int8", threshold=first.threshold, skip=())
    return FastPeftConfig(first.format, first.blocksize, first.double_quant, skip=())


def _bitsandbytes(model: Any, layers: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes' `quantization_config`, whose list of dense layers transformers understands."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    dense = [p.name for p in linear_places(model) if not is_quantized(p.module)]
    config = folders.bitsandbytes_config(layers, dense, str(model.dtype).removeprefix("torch."))
    taken = [name for name in layers if dense and not should_convert_module(name, dense)]
    if taken:
        raise refuse(
            FormatError,
            f"layer '{taken[0]}'",
            "a name that ends like a dense layer's",
            "what bitsandbytes' list of dense layers can express",
            "Save it as 'fastpeft'.",
        )
    return config


def copy_rest(source: Path, target: Path) -> list[str]:
    """Tokenizer files and the like: what lies beside the weights of `source` and is not in `target`
    yet. Returns their names."""
    copied = []
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _COPIED and file.name not in _NOT_COPIED
        if wanted and not file.name.endswith(".index.json") and file.is_file():
            if not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
                copied.append(file.name)
    return copied


def dense_layer(layer: Any, like: nn.Module) -> nn.Module:
    """A quantised layer as the dense one of exactly its weight, of the class of `like` (a module on
    meta of the architecture itself): GPT-2 keeps Conv1D."""
    weight, bias = layer.dequantize(), layer.bias
    like.weight = nn.Parameter(weight.t().contiguous() if is_conv1d(like) else weight)
    like.bias = None if bias is None else nn.Parameter(bias.detach())
    return like.requires_grad_(False).train(layer.training)
