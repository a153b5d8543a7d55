"""LoRAAdapter: the low-rank factors of one adapter on one layer."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from ..ops.lora import LowRank
from .lora_config import check_dora, check_rank, check_scale, scaling_of


def product(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """scaling * B A of A [R, K], B [N, R]: [N, K], float32 (float64 for float64 factors), without
    a gradient.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    return B.detach().to(wide) @ A.detach().to(wide) * scaling


class LoRAAdapter(nn.Module):
    """The low-rank factors of one adapter on one layer.

    Args:
        in_features, out_features: K, N of the layer.
        r: rank R >= 1.
        lora_alpha: the branch is multiplied by lora_alpha / r, or lora_alpha / sqrt(r) with
            use_rslora.
        lora_dropout: chance to drop an element of the branch's input while training.
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023).
        init_lora_weights: True: A Kaiming-uniform (a = sqrt 5), B zero; "gaussian": A normal of
            deviation 1 / r, B zero; False: A and B both random, so that the adapter does something
            from the start. The modes of lora_init.py start like True until the layer adds its
            weight's part.
        lora_bias: give B a bias [N].
        dtype: of A and B; float32 unless memory is very short.
        device: as for nn.Linear.
        use_dora: scale the rows of W + scaling * B A to learned lengths.

    Attributes:
        lora_A: nn.Linear, weight [r, in_features].
        lora_B: nn.Linear, weight [out_features, r].
        lora_magnitude_vector: Parameter [out_features], with use_dora, once it is on a layer.
        anchor_A, anchor_B: buffers [r, in_features], [out_features, r] or None: the frozen part
            of PiSSA and OLoRA, with its sign.

    Raises:
        ConfigError: rank, alpha, dropout or init mode that cannot work.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        check_rank(r)
        check_scale(lora_alpha, lora_dropout, init_lora_weights)
        check_dora(use_dora, lora_bias)
        if r > min(in_features, out_features):
            warnings.warn(
                f"r: got {r}, expected at most min(in, out) = {min(in_features, out_features)}. "
                "A higher rank adds parameters but no freedom; lower it.",
                stacklevel=2,
            )
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout, self.lora_bias = float(lora_dropout), lora_bias
        self.use_dora, self.is_loftq = use_dora, init_lora_weights == "loftq"
        device = torch.empty(0).device if device is None else device  # skip_init takes no None
        skip = nn.utils.skip_init
        self.lora_A = skip(nn.Linear, in_features, r, bias=False, device=device, dtype=dtype)
        self.lora_B = skip(nn.Linear, r, out_features, bias=lora_bias, device=device, dtype=dtype)
        self.register_buffer("anchor_A", None)
        self.register_buffer("anchor_B", None)
        self.reset_parameters(init_lora_weights)

    @property
    def scaling(self) -> float:
        """Factor of the branch."""
        return scaling_of(self.r, self.lora_alpha, self.use_rslora)

    def reset_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Draws A (and B) anew, see the class."""
        check_scale(self.lora_alpha, self.lora_dropout, init_lora_weights)
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B.weight, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B.weight)
        if self.lora_bias:
            nn.init.zeros_(self.lora_B.bias)

    def low_rank(self) -> LowRank:
        """The factors as the operators take them; dropout only while training."""
        dropout_p = self.lora_dropout if self.training else 0.0
        return LowRank(*self.factors(), self.scaling, dropout_p)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [R, K], B [N, R] as they are computed with; R is 2 r with an anchor."""
        A, B = self.lora_A.weight, self.lora_B.weight
        if self.anchor_A is None:
            return A, B
        return torch.cat([A, self.anchor_A]), torch.cat([B, self.anchor_B], 1)

    def delta(self) -> Tensor:
        """scaling * B A, [N, K], float32 (float64 for float64 factors): what merging adds to the
        weight, before DoRA's scaling.
        """
        return product(*self.factors(), self.scaling)

    def extra_repr(self) -> str:
        """Rank, alpha, dropout and bytes."""
        nbytes = sum(p.numel() * p.element_size() for p in self.parameters())
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"use_rslora={self.use_rslora}, use_dora={self.use_dora}, bytes={nbytes}"
        )
