"""fastpeft: fine-tune large models on top of frozen, quantised weights.

Names are imported on first use: `import fastpeft` starts no GPU and imports neither torch nor
transformers, so that `fastpeft doctor` can tell what is wrong even when the native library does not
load.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that holds it.
_EXPORTS = {
    # layers
    "Linear4bit": "fastpeft.quant.linear",
    "Linear8bit": "fastpeft.quant.linear",
    "LoRALinear": "fastpeft.methods.lora",
    "QLoRALinear": "fastpeft.methods.qlora",
    "LoRAAdapter": "fastpeft.methods.lora",
    # tensors
    "QuantizedTensor": "fastpeft.quant.tensor",
    "quantize_tensor": "fastpeft.quant.tensor",
    # methods
    "LoRA": "fastpeft.methods.lora",
    "Full": "fastpeft.methods.full",
    "Prefix": "fastpeft.methods.prefix",
    "Prompt": "fastpeft.methods.prompt",
    "IA3": "fastpeft.methods.ia3",
    "Bottleneck": "fastpeft.methods.adapter",
    # models
    "quantize": "fastpeft.convert",
    "attach": "fastpeft.attach",
    "detach": "fastpeft.attach",
    "activate": "fastpeft.attach",
    "disabled": "fastpeft.attach",
    "adapters": "fastpeft.attach",
    "adapter_ids": "fastpeft.mixing",
    "swap": "fastpeft.swap",
    "adapter_state": "fastpeft.swap",
    "loftq": "fastpeft.loftq",
    "merge": "fastpeft.merge",
    "unmerge": "fastpeft.merge",
    "summary": "fastpeft.report",
    "memory": "fastpeft.report",
    "dependent_launch": "fastpeft.ops.launch",
    "param_groups": "fastpeft.groups",
    "save_adapter": "fastpeft.io",
    "load_adapter": "fastpeft.io",
    # errors
    "FastPeftError": "fastpeft.errors",
    "ConfigError": "fastpeft.errors",
    "FormatError": "fastpeft.errors",
    "AdapterError": "fastpeft.errors",
    "StateError": "fastpeft.errors",
    "LibraryError": "fastpeft.errors",
}
_MODULES = ("functional", "hf")

__all__ = ["__version__", *_EXPORTS, *_MODULES]


class _Package(ModuleType):
    """`fastpeft.attach` and `fastpeft.merge` are functions that live in modules of the same name.
    The import system would put the module over the function as soon as anything imports it, so that
    one assignment is redirected here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _EXPORTS:
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fastpeft.{name}")
    else:
        raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


sys.modules[__name__].__class__ = _Package
