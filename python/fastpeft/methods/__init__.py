"""The methods. A method is a module here plus its import below."""

from . import (
    adapter,  # registers "bottleneck"
    full,  # registers "full"
    ia3,  # registers "ia3"
    lora,
    lora_method,  # registers "lora"
    prefix,  # registers "prefix"
    prompt,  # registers "prompt"
)
from .method import METHODS, Method, method_of, register_method

__all__ = [
    "METHODS",
    "Method",
    "adapter",
    "full",
    "ia3",
    "lora",
    "lora_method",
    "method_of",
    "prefix",
    "prompt",
    "register_method",
]
