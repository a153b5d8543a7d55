"""Quantised model folders: what lies packed in their files, and the two ways their config.json may
name it.

The tensors have bitsandbytes' names and bytes either way. `quantization_config` says one of

- "bitsandbytes": transformers with bitsandbytes, and whatever else reads such folders, loads it
  without us; without bitsandbytes it is an error. `fastpeft.hf.from_bitsandbytes(path)` reads it.
- "fastpeft": `from_pretrained` gives our layers once `fastpeft.hf.FastPeftConfig` is imported. A
  process that has not imported it skips the unknown word and takes the file for a dense one. That
  must fail: 4-bit codes [ceil(N*K/2), 1] fit no [N, K] parameter, and int8 codes are therefore
  written as [N, K, 1] in these folders.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FormatError, refuse
from fastpeft.patterns import is_quantized, linear_places
from fastpeft.quant.format import FORMATS

METHOD = "fastpeft"
THRESHOLD = "fastpeft_threshold"  # in a bitsandbytes config: null for weight-only int8
_FOUR_BIT = re.compile(r"(.+)\.weight\.quant_state\.bitsandbytes__(\w+)")
_INT8 = re.compile(r"(.+)\.SCB")


def packed_layers(names: Iterable[str]) -> dict[str, str]:
    """{layer: "nf4", "fp4" or "int8"} of the tensor names of a checkpoint.

    Raises:
        FormatError: a 4-bit format that is neither.
    """
    found = {}
    for name in names:
        four = _FOUR_BIT.fullmatch(name)
        if four and four[2] not in FORMATS:
            raise refuse(FormatError, name, four[2], "nf4 or fp4", "This format is not supported.")
        if four:
            found[four[1]] = four[2]
        elif eight := _INT8.fullmatch(name):
            found[eight[1]] = "int8"
    return found


class Checkpoint:
    """The tensors of safetensors files by name, read when asked for. A context manager."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        self._files = [Path(file) for file in files]
        self._stack = ExitStack()
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        from safetensors import SafetensorError, safe_open

        for file in self._files:
            try:
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise refuse(
                    FormatError, f"file '{file}'", error, "safetensors", "Save it again."
                ) from error
            self._owner.update(dict.fromkeys(opened.keys(), opened))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._owner)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._owner[name].get_tensor(name)

    def packed(self, layer: str, format: str) -> dict[str, Tensor]:
        """The canonical tensors of one layer, names without the layer's."""
        keys = {key for f in FORMATS.values() for key in f.keys(True)}
        return {
            key: self.read(f"{layer}.{key}")
            for key in sorted(keys)
            if f"{layer}.{key}" in self._owner
        }


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """What config.json of a model folder says about quantisation, or None."""
    from fastpeft.files import read_json

    found = read_json(folder, "config.json").get("quantization_config")
    return found if isinstance(found, dict) else None


def bitsandbytes_config(
    layers: Mapping[str, Any], dense: Iterable[str], dtype: str, strict: bool = True
) -> dict[str, Any]:
    """The `quantization_config` by which bitsandbytes loads these layers.

    Args:
        layers: {name: Linear4bit or Linear8bit}, not empty, all of one format.
        dense: full names of the linear layers that stay dense.
        dtype: "float32", "bfloat16" or "float16": what bitsandbytes computes in.
        strict: refuse int8 weights under activations that are never quantised (threshold None);
            otherwise bitsandbytes is told 0 and `THRESHOLD` tells us.

    Raises:
        FormatError: bitsandbytes knows no word for it.
    """
    kinds = {(layer.format, getattr(layer, "threshold", 6.0)) for layer in layers.values()}
    (format, threshold), *others = kinds
    if others or (threshold is None and strict):
        what = "layers of several kinds" if others else "int8 weights without a threshold"
        advice = "Save it as 'fastpeft', or quantise with a threshold (0: no outliers)."
        raise refuse(FormatError, "model", what, "what bitsandbytes can express", advice)
    first = next(iter(layers.values()))
    told = {THRESHOLD: None} if threshold is None else {}
    return told | {
        "quant_method": "bitsandbytes",
        "load_in_4bit": format != "int8",
        "load_in_8bit": format == "int8",
        "_load_in_4bit": format != "int8",
        "_load_in_8bit": format == "int8",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_type": format if format != "int8" else "nf4",
        "bnb_4bit_use_double_quant": format != "int8" and first.double_quant,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": float(threshold or 0.0),
        "llm_int8_skip_modules": sorted(dense),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


class SavedAs:
    """The `quantization_config` of a model that `fastpeft.quantize` has changed, told when its
    config is written: a plain save_pretrained then gives a bitsandbytes folder, never int8 codes
    that pass for a dense weight. A copy is what it would tell now (a dictionary), or None.
    """

    quant_method = "bitsandbytes"

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def to_dict(self) -> dict[str, Any] | None:
        """What to write for the model as it is now."""
        model = self._model()
        if model is None:
            return None
        found = [(place.name, place.module) for place in linear_places(model)]
        layers = {name: module for name, module in found if is_quantized(module)}
        if not layers:
            return None
        dense = [name for name, module in found if name not in layers]
        dtype = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
        return bitsandbytes_config(layers, dense, dtype, strict=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any] | None:
        told = self.to_dict()
        return None if told is None else Told(told)

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self.__deepcopy__({}),)


class Told(dict[str, Any]):
    """A `quantization_config` that no longer follows a model; both kinds of readers can ask it."""

    def to_dict(self) -> dict[str, Any]:
        """The plain dictionary."""
        return dict(self)
