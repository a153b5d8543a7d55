"""The methods. A method is a module here plus its import below."""

from . import lora  # registers "lora"
from .method import METHODS, Method, method_of, register_method

__all__ = ["METHODS", "Method", "lora", "method_of", "register_method"]
