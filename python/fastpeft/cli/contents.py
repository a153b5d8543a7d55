"""The facts behind `fastpeft inspect`, read from headers and JSON: no model is built."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpeft.errors import ConfigError, FastPeftError, refuse

CONFIG_FIELDS = (
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "bias",
    "target_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)
_LORA = re.compile(r"(?:.*\.)?([^.]+)\.lora_([AB])\.weight$")
_BLOB = re.compile(r"(.+)\.weight\.quant_state\.bitsandbytes__(nf4|fp4)$")


def _headers(file: Path) -> Iterator[tuple[str, str, list[int], int]]:
    """(name, dtype, shape, bytes) of each tensor of a safetensors file, from its header."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (not a dict)
            part = tensors.get_slice(name)
            dtype, shape = part.get_dtype(), part.get_shape()
            count = 1
            for size in shape:
                count *= size
            yield name, dtype, shape, count * _width(dtype)


def _width(dtype: str) -> int:
    digits = "".join(c for c in dtype if c.isdigit())
    return max(1, int(digits[:2] if digits.startswith(("16", "32", "64")) else 8) // 8)


def _read_headers(folder: Path, problems: list[str]) -> dict[str, tuple[str, list[int], int]]:
    found: dict[str, tuple[str, list[int], int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            for name, dtype, shape, size in _headers(file):
                if name in found:
                    problems.append(f"{file.name}: tensor {name} is in another file too")
                found[name] = (dtype, shape, size)
        except Exception as error:  # safetensors has errors of its own kind
            problems.append(f"{file.name}: does not read: {' '.join(str(error).split())}")
    return found


def _json(file: Path, problems: list[str]) -> dict[str, Any]:
    from fastpeft.files import read_json

    try:
        return read_json(file.parent, file.name)
    except FastPeftError as error:
        problems.append(str(error))
        return {}


def _sizes(headers: dict[str, tuple[str, list[int], int]]) -> dict[str, Any]:
    by_dtype: Counter[str] = Counter()
    elements = 0
    for dtype, shape, size in headers.values():
        by_dtype[dtype] += size
        count = 1
        for length in shape:
            count *= length
        elements += count
    return {
        "tensors": len(headers),
        "parameters": elements,
        "bytes": sum(by_dtype.values()),
        "bytes_by_dtype": dict(by_dtype.most_common()),
    }


def look_adapter(folder: Path) -> dict[str, Any]:
    """Facts of an adapter folder: config, ranks {rank: modules}, targets {module: count}, ..."""
    from fastpeft import io

    problems: list[str] = []
    raw = _json(folder / "adapter_config.json", problems)
    headers = _read_headers(folder, problems)
    ranks: Counter[int] = Counter()
    targets: Counter[str] = Counter()
    for name, (_, shape, _) in headers.items():
        found = _LORA.match(name)
        if found and found[2] == "A" and len(shape) == 2:
            ranks[shape[0]] += 1
            targets[found[1]] += 1
    if raw:
        # The loader's own checks, so that "no problem" here means that the files can be loaded.
        try:
            config, method = io.read_config(folder)
            io.read_tensors(folder, method)
            problems += _rank_problems(config, ranks)
        except FastPeftError as error:
            problems.append(str(error))
    return {
        "kind": "adapter",
        "path": str(folder),
        "config": {
            name: raw[name] for name in CONFIG_FIELDS if raw.get(name) not in (None, {}, [])
        },
        "ranks": dict(ranks),
        "targets": dict(targets.most_common()),
        **_sizes(headers),
        "problems": problems,
    }


def _rank_problems(config: Any, ranks: Counter[int]) -> list[str]:
    allowed = (
        {config.r, *getattr(config, "rank_pattern", {}).values()} if hasattr(config, "r") else set()
    )
    wrong = sorted(set(ranks) - allowed) if allowed else []
    return [f"lora_A has rank {rank}, the config says {sorted(allowed)}" for rank in wrong]


def look_checkpoint(folder: Path) -> dict[str, Any]:
    """Facts of a model folder: config, quantised layers by format, sizes, problems."""
    problems: list[str] = []
    config = _json(folder / "config.json", problems)
    headers = _read_headers(folder, problems)
    if not headers:
        problems.append("no *.safetensors file in the folder")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(_json(index, problems).get("weight_map", {}))
        missing = sorted(named - set(headers))
        if missing:
            problems.append(
                f"{len(missing)} tensors of the index are in no file, such as {missing[0]}"
            )
    quantized: Counter[str] = Counter()
    for name in headers:
        found = _BLOB.match(name)
        if found:
            quantized[found[2]] += 1
            problems += _quantized_problems(found[1], headers)
        elif name.endswith(".SCB"):
            quantized["int8"] += 1
    shown = {name: config[name] for name in ("model_type", "architectures") if name in config}
    if "quantization_config" in config:
        shown["quantization_config"] = json.dumps(config["quantization_config"])
    if quantized:
        shown["quantised layers"] = ", ".join(f"{name} x{n}" for name, n in quantized.items())
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "config": shown,
        "quantized": dict(quantized),
        **_sizes(headers),
        "problems": problems,
    }


def _quantized_problems(module: str, headers: dict[str, tuple[str, list[int], int]]) -> list[str]:
    """What the headers alone show: the parts of a 4-bit weight that must come together."""
    needed = ["weight", "weight.absmax", "weight.quant_map"]
    if "nested_absmax" in " ".join(
        name for name in headers if name.startswith(f"{module}.weight.")
    ):
        needed += ["weight.nested_absmax", "weight.nested_quant_map"]
    missing = [name for name in needed if f"{module}.{name}" not in headers]
    return [f"{module}: {', '.join(missing)} missing"] if missing else []


def look(folder: Path) -> dict[str, Any]:
    """Facts of an adapter, checkpoint or run folder.

    Raises:
        ConfigError: it is none of them.
    """
    if (folder / "adapter_config.json").exists():
        return look_adapter(folder)
    if (folder / "adapter" / "adapter_config.json").exists():
        return look_adapter(folder / "adapter")
    if (folder / "config.json").exists():
        return look_checkpoint(folder)
    raise refuse(
        ConfigError,
        str(folder),
        "neither adapter_config.json nor config.json",
        "an adapter, checkpoint or run folder",
        "Give the folder that save_adapter or save_pretrained wrote.",
    )
