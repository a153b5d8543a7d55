"""QLoRALinear: LoRA over a base that is quantised in the same call."""

from __future__ import annotations

import torch
from torch import nn

from ..quant.linear import Linear4bit, Linear8bit
from .lora import LoRALinear


class QLoRALinear(LoRALinear):
    """LoRALinear over a base that is quantised here (Dettmers et al. 2023, "QLoRA").

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias, use_dora: see
            LoRAAdapter.
        format: "nf4" or "int8" ("fp4": zeros until a checkpoint is loaded).
        blocksize, double_quant: see Linear4bit.
        threshold: see Linear8bit.
        lora_dtype: of A and B.
        name: of the adapter, which is active.

    Raises:
        ConfigError, FormatError: as LoRAAdapter, Linear4bit, Linear8bit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        format: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        threshold: float | None = 6.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype = torch.float32,
        name: str = "default",
        use_dora: bool = False,
    ) -> None:
        base: nn.Module
        if format == "int8":
            base = Linear8bit(in_features, out_features, bias, threshold, device, dtype)
        else:
            base = Linear4bit(
                in_features, out_features, bias, format, blocksize, double_quant, device, dtype
            )
        super().__init__(base)
        self.add_adapter(
            name,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            init_lora_weights,
            lora_bias,
            lora_dtype,
            use_dora,
        )
        self.set_active((name,))

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        name: str = "default",
        format: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        threshold: float | None = 6.0,
        use_dora: bool = False,
    ) -> QLoRALinear:
        """Quantises an nn.Linear (which stays as it is) and adds one active adapter; dtype is that
        of A and B.

        Raises:
            StateError: linear is quantised already; use LoRALinear.from_linear for such a base.
            ConfigError, FormatError: as LoRAAdapter, Linear4bit, Linear8bit.
        """
        base: nn.Module
        if format == "int8":
            base = Linear8bit.from_linear(linear, threshold)
        else:
            base = Linear4bit.from_linear(linear, blocksize, double_quant, format)
        return super().from_linear(  # type: ignore[return-value]
            base,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            init_lora_weights,
            lora_bias,
            dtype,
            name,
            use_dora,
        )
