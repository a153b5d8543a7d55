"""The methods. A method is a module here plus its import below."""

from . import (
    adapter,  # registers "bottleneck"
    lora,  # registers "lora"
    prefix,  # registers "prefix"
)
from .method import METHODS, Method, method_of, register_method

__all__ = ["METHODS", "Method", "adapter", "lora", "method_of", "prefix", "register_method"]
