"""What is wrong with the tensors of an adapter, said so that a user can act on it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastpeft.errors import AdapterError, refuse
from fastpeft.patterns import layer_index

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_GATHER = "It looks like one shard of ZeRO-3 or FSDP: gather the parameters before saving."


def check_tensor(key: str, tensor: Tensor, label: str) -> None:
    """AdapterError unless `tensor` is float32, float16 or bfloat16, has data and is finite."""
    name = f"{label}, tensor '{key}'"
    if tensor.dtype not in DTYPES:
        raise refuse(
            AdapterError,
            name,
            f"{tensor.dtype}",
            "float32, float16 or bfloat16",
            "Cast it before saving.",
        )
    if tensor.numel() == 0 or tensor.dim() == 0:
        raise refuse(
            AdapterError, name, f"shape {list(tensor.shape)}", "a tensor with values", _GATHER
        )
    if tensor.is_meta:
        raise refuse(AdapterError, name, "a tensor on meta", "data", "Load the weights first.")
    if not bool(torch.isfinite(tensor).all()):
        raise refuse(
            AdapterError,
            name,
            "NaN or Inf",
            "finite numbers",
            "Take an earlier checkpoint of the training.",
        )


def check_lora_pairs(tensors: Mapping[str, Tensor], label: str) -> None:
    """AdapterError unless every lora_A [r, in] has a lora_B [out, r] of the same rank."""
    for key, tensor in tensors.items():
        side = (
            "lora_A"
            if ".lora_A.weight" in f".{key}"
            else "lora_B"
            if ".lora_B.weight" in f".{key}"
            else None
        )
        if side is None:
            continue
        if tensor.dim() != 2:
            raise refuse(
                AdapterError,
                f"{label}, tensor '{key}'",
                f"shape {list(tensor.shape)}",
                "two dimensions",
                _GATHER,
            )
        other_key = key.replace(
            "lora_A" if side == "lora_A" else "lora_B", "lora_B" if side == "lora_A" else "lora_A"
        )
        other = tensors.get(other_key)
        if other is None:
            raise refuse(
                AdapterError,
                f"{label}, tensor '{key}'",
                f"no '{other_key}'",
                "both",
                "The key is missing or renamed.",
            )
        if side == "lora_A" and other.dim() == 2 and tensor.shape[0] != other.shape[1]:
            raise refuse(
                AdapterError,
                f"{label}, tensor '{key}'",
                f"rank {tensor.shape[0]} in lora_A {list(tensor.shape)}, "
                f"rank {other.shape[1]} in lora_B {list(other.shape)}",
                "the same rank in both",
                "The file is damaged; save it again.",
            )


def compare(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], label: str, base: str | None = None
) -> None:
    """AdapterError unless `given` has exactly the keys and shapes of `wanted`; says what kind of
    mismatch it looks like.

    Args:
        wanted: the attached adapter's parameters by plain name.
        given: the file's tensors by plain name.
        label: what the file is, for the message.
        base: the model the file says it was made for.
    """
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    hint = f" It was made for {base!r}." if base else ""
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing keys ({_few(missing)})")
        if unexpected:
            parts.append(f"{len(unexpected)} unexpected keys ({_few(unexpected)})")
        raise refuse(
            AdapterError,
            label,
            " and ".join(parts),
            "the keys of the attached adapter",
            _why(wanted, given, missing) + hint,
        )
    for key, target in wanted.items():
        if given[key].shape != target.shape:
            raise refuse(
                AdapterError,
                f"{label}, tensor '{key}'",
                f"shape {list(given[key].shape)}",
                f"{list(target.shape)}",
                _why_shape(key, given[key], target) + hint,
            )


def _few(keys: list[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys[:3]) + (", ..." if len(keys) > 3 else "")


def _why(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], missing: list[str]) -> str:
    """Another depth, a renamed key, or simply another model."""
    ours, theirs = _layers(wanted), _layers(given)
    if ours != theirs:
        return (
            f"The file has layers {_span(theirs)}, the adapter on this model {_span(ours)}: "
            "the base model is another one."
        )
    unexpected = [key for key in given if key not in wanted]
    near = difflib.get_close_matches(missing[0], unexpected, n=1, cutoff=0.6) if missing else []
    if near:
        return f"'{near[0]}' may be a renamed '{missing[0]}'."
    return "The file belongs to another base model or was changed."


def _why_shape(key: str, given: Tensor, target: Tensor) -> str:
    """A rank that is not the config's, another width, or something else."""
    axis = 0 if ".lora_A." in key else 1 if ".lora_B." in key else None  # of the rank
    if axis is None or not given.dim() == target.dim() == 2:
        return "The file belongs to another base model or was changed."
    side = "input" if axis == 0 else "output"
    if given.shape[1 - axis] != target.shape[1 - axis]:
        return (
            f"The module has {target.shape[1 - axis]} {side} features: the base model has another "
            "hidden size or other heads."
        )
    return (
        f"The tensor has rank {given.shape[axis]}, the config says {target.shape[axis]} "
        "(r, rank_pattern)."
    )


def _layers(keys: Iterable[str]) -> list[int]:
    return sorted({index for key in keys if (index := layer_index(key)) is not None})


def _span(layers: list[int]) -> str:
    if not layers:
        return "without number"
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
