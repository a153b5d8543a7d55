"""From a recipe's entries to the method's configuration, and what its optimizer costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, refuse
from .recipe import Recipe

# Of torch's AdamW on float32 parameters: gradient, first and second moment.
_GRADIENT_BYTES, _STATE_BYTES = 4, 8


def _lora(recipe: Recipe, start: Sequence[int]) -> Any:
    from ..methods.lora import LoRA

    alpha = recipe.lora_alpha
    return LoRA(
        r=recipe.r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.target_modules,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        init_lora_weights=recipe.init_lora_weights,
        task_type="CAUSAL_LM",
        base_model_name_or_path=recipe.model,
    )


def _prefix(recipe: Recipe, start: Sequence[int]) -> Any:
    from ..methods.prefix import Prefix

    starts: dict[str, Any] = {"text": list(start), "vocabulary": None}
    return Prefix(
        recipe.num_virtual_tokens,
        projection=recipe.projection,
        init_weights=starts.get(recipe.prefix_init, recipe.prefix_init),
        base_model_name_or_path=recipe.model,
    )


def _prompt(recipe: Recipe, start: Sequence[int]) -> Any:
    from ..methods.prompt import Prompt

    return Prompt(recipe.num_virtual_tokens, base_model_name_or_path=recipe.model)


def _ia3(recipe: Recipe, start: Sequence[int]) -> Any:
    from ..methods.ia3 import IA3

    return IA3(
        target_modules=recipe.target_modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=recipe.model,
    )


def _bottleneck(recipe: Recipe, start: Sequence[int]) -> Any:
    from ..methods.adapter import Bottleneck

    entries = {"reduction_factor": recipe.reduction_factor, "init_weights": recipe.bottleneck_init}
    given = {key: value for key, value in entries.items() if value is not None}
    kind = getattr(Bottleneck, recipe.bottleneck)
    return kind(**given, base_model_name_or_path=recipe.model)


def _full(recipe: Recipe, start: Sequence[int]) -> Any:
    from ..methods.full import Full

    return Full(
        recipe.optimizer, recipe.float32_master, base_model_name_or_path=recipe.model or None
    )


_CONFIGS: dict[str, Callable[[Recipe, Sequence[int]], Any]] = {
    "lora": _lora,
    "prefix": _prefix,
    "prompt": _prompt,
    "ia3": _ia3,
    "bottleneck": _bottleneck,
    "full": _full,
}


def adapter_config(recipe: Recipe, start: Sequence[int] = ()) -> Any:
    """The configuration object of the recipe's method.

    Args:
        recipe: checked, its dtype resolved.
        start: the first tokens of the training text, of which a prefix may start.

    Raises:
        ConfigError: a value that cannot work; full fine-tuning in float16.
    """
    if recipe.method == "full" and recipe.dtype == "float16":
        raise refuse(
            ConfigError,
            "dtype",
            "float16 with method full",
            "float32 or bfloat16",
            "Gradients of float16 weights overflow: add --dtype float32.",
        )
    return _CONFIGS[recipe.method](recipe, start[: recipe.num_virtual_tokens])


def optimizer_plan(model: nn.Module, config: Any, recipe: Recipe) -> dict[str, Any]:
    """Which optimizer trains, and the bytes it takes beside activations and a frozen base.

    Args:
        model: with its adapter attached.
        config: of `adapter_config`.

    Returns:
        "optimizer": in words; "optimizer_bytes": {part: bytes}.
    """
    if recipe.method == "full":
        from ..methods.full_optimizer import memory_plan

        words = {"adamw": "AdamW (fused)", "adamw_8bit": "AdamW with 8-bit states"}
        parts = memory_plan(model, config)
        master = ", float32 master weights" if parts["master weights"] else ""
        return {"optimizer": words[recipe.optimizer] + master, "optimizer_bytes": parts}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {"gradients": count * _GRADIENT_BYTES, "optimizer states": count * _STATE_BYTES}
    return {"optimizer": "AdamW", "optimizer_bytes": parts}


def plan_text(plan: dict[str, Any]) -> str:
    """One line of `optimizer_plan`: "AdamW: gradients 1.1 MB, optimizer states 2.2 MB"."""
    parts = [f"{part} {size / 1e6:.1f} MB" for part, size in plan["optimizer_bytes"].items()]
    return f"{plan['optimizer']}: {', '.join(parts)}"


def adapter_file_bytes(folder: Path) -> int:
    """Bytes of the weights in an adapter's folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
