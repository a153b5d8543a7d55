"""FastPeftConfig: `from_pretrained(path, quantization_config=FastPeftConfig("nf4"))`.

Importing this module tells transformers about it; doing so again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from fastpeft.errors import ConfigError, refuse
from fastpeft.folders import METHOD, THRESHOLD
from fastpeft.quant.format import FORMATS, check_blocksize
from fastpeft.quant.linear import check_threshold


class FastPeftConfig(QuantizationConfigMixin):
    """How transformers' from_pretrained quantises while it loads, or what a folder of ours holds.

    Which layers are quantised: those `fastpeft.quantize` would take; a folder that is quantised
    already tells it itself.

    Args:
        format: "nf4" or "int8"; "fp4" only for a folder that holds it.
        blocksize: weights that share a scale, 4-bit only.
        double_quant: quantise the scales too, 4-bit only.
        threshold: int8 only: LLM.int8()'s outlier threshold; 0: none; None: weight only.
        skip: names, or parts of names between dots, of modules to leave dense.
        quant_method: "fastpeft"; in the files.

    Raises:
        ConfigError: an unknown format or an option we do not know.
        FormatError: a block size that is no power of two in 32 ... 4096.
    """

    def __init__(
        self,
        format: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        threshold: float | None = 6.0,
        skip: Iterable[str] = ("lm_head",),
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if format not in FORMATS:
            raise refuse(ConfigError, "format", repr(format), "'nf4' or 'int8'", "Take one.")
        if quant_method != METHOD or any(value not in (None, [], {}) for value in unknown.values()):
            got = f"quant_method {quant_method!r}, {sorted(unknown)}"
            advice = "The folder was written by something else, or by a newer release."
            raise refuse(ConfigError, "quantization_config", got, "known options", advice)
        if isinstance(skip, str):
            raise refuse(ConfigError, "skip", repr(skip), "a list of names", f"Write [{skip!r}].")
        self.quant_method = METHOD
        self.format = format
        self.blocksize = check_blocksize(blocksize)
        self.double_quant = bool(double_quant)
        self.threshold = check_threshold(threshold)
        self.skip = list(skip)

    @classmethod
    def from_bitsandbytes(cls, config: Mapping[str, Any]) -> FastPeftConfig:
        """The same said by a bitsandbytes `quantization_config` (a dictionary of config.json)."""
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            threshold = config.get("llm_int8_threshold", 6.0)
            return cls("int8", threshold=config.get(THRESHOLD, threshold), skip=())
        # The defaults are bitsandbytes'.
        double = config.get("bnb_4bit_use_double_quant", False)
        return cls(config.get("bnb_4bit_quant_type", "fp4"), double_quant=double, skip=())


def register() -> None:
    """Tell transformers about FastPeftConfig and its quantizer. Calling it again does nothing.

    Raises:
        ConfigError: something else has taken the name.
    """
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    from .quantizer import FastPeftQuantizer

    tables = (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, FastPeftConfig, register_quantization_config),
        (AUTO_QUANTIZER_MAPPING, FastPeftQuantizer, register_quantizer),
    )
    for table, ours, enter in tables:
        there = table.get(METHOD)
        if there is None:
            enter(METHOD)(ours)
        elif there is not ours:
            got = f"{there.__module__}.{there.__qualname__}"
            advice = "Remove the other package that registers it."
            raise refuse(ConfigError, f"quantizer '{METHOD}'", got, "ours", advice)


register()
