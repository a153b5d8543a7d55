"""LoRA on an embedding: the linear layer of one-hot rows, W = E^T [D, V].

    y = E[ids] + scaling * A^T[ids] B^T      A [R, V], B [D, R]

A starts as zeros and B normal, so that only rows of tokens that are seen ever change. There is no
dropout: peft has none here either. An embedding that multiplies its output (`embed_scale`) does so
with the branch too. Names in files are peft's: lora_embedding_A, lora_embedding_B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, refuse
from ..ops.lora import LowRank
from . import lora_dora, lora_init
from .lora import LoRALinear
from .lora_adapter import product
from .lora_config import check_dora, check_rank, check_scale, scaling_of
from .rows import low_rank_by_rows


class EmbeddingAdapter(nn.Module):
    """The low-rank factors of one adapter on one embedding; arguments as of LoRAAdapter.

    Args:
        in_features, out_features: number of tokens V, width D.

    Attributes:
        lora_embedding_A: Parameter [r, V].
        lora_embedding_B: Parameter [D, r].
        lora_magnitude_vector: Parameter [D], with use_dora, once it is on a layer.

    Raises:
        ConfigError: as LoRAAdapter; lora_bias, or a start that looks at the weight.
    """

    anchor_A: None = None
    is_loftq = False

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
        for option, value, unfit in (
            ("lora_bias", lora_bias, lora_bias),
            ("init_lora_weights", init_lora_weights, lora_init.is_mode(init_lora_weights)),
        ):
            if unfit:
                raise refuse(
                    ConfigError,
                    option,
                    f"{value!r} with an embedding",
                    "linear layers for this option",
                    "Leave the embedding out, or the option.",
                )
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.use_dora, self.lora_bias = use_dora, False
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, in_features, **options))
        self.lora_embedding_B = nn.Parameter(torch.randn(out_features, r, **options))
        if init_lora_weights is False:
            nn.init.normal_(self.lora_embedding_A)

    @property
    def scaling(self) -> float:
        """Factor of the branch."""
        return scaling_of(self.r, self.lora_alpha, self.use_rslora)

    def low_rank(self) -> LowRank:
        """A [R, V], B [D, R] and the factor."""
        return LowRank(self.lora_embedding_A, self.lora_embedding_B, self.scaling)

    def delta(self) -> Tensor:
        """scaling * B A, [D, V], float32 or wider: what merging adds to W = E^T."""
        return product(self.lora_embedding_A, self.lora_embedding_B, self.scaling)

    def extra_repr(self) -> str:
        """Rank, alpha and the like."""
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, use_rslora={self.use_rslora}, "
            f"use_dora={self.use_dora}"
        )


class LoRAEmbedding(LoRALinear):
    """A frozen nn.Embedding with any number of adapters, of which any selection is active.

    Input: ids int64 [...]; output [..., D] in the embedding's dtype. Switching, merging and what
    the base's other attributes say are LoRALinear's; `base_layer` is called, not read.

    Raises:
        ConfigError: no nn.Embedding, one with max_norm (it would change the frozen weight), or one
            whose class looks up something else than its input.
    """

    _bases = (nn.Embedding,)
    _adapter_class = EmbeddingAdapter

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        own = type(base_layer).forward is not nn.Embedding.forward
        if base_layer.max_norm is not None or (own and not hasattr(base_layer, "embed_scale")):
            raise refuse(
                ConfigError,
                "embedding",
                f"{type(base_layer).__name__} with max_norm or a forward of its own",
                "one that looks up its input",
                "Train it whole by modules_to_save.",
            )

    @property
    def in_features(self) -> int:
        """V, the number of tokens."""
        return self.base_layer.num_embeddings

    @property
    def out_features(self) -> int:
        """D, the width."""
        return self.base_layer.embedding_dim

    @property
    def bias(self) -> None:
        """An embedding has none."""
        return None

    def __getattr__(self, name: str) -> Any:
        known = ("num_embeddings", "embedding_dim", "padding_idx", "embed_scale")
        if name in known and "_modules" in self.__dict__:
            return getattr(self.base_layer, name)
        return super().__getattr__(name)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D]. Errors as LoRALinear."""
        if self._merged and self.training and torch.is_grad_enabled():
            self._refuse_merged("train")
        if self.rows is not None:
            return low_rank_by_rows(self, ids, self.rows)
        return self.compute(ids, () if self._merged else self._active)

    def compute(self, ids: Tensor, names: tuple[str, ...]) -> Tensor:
        """What `forward` returns with these adapters active."""
        base = self.base_layer
        y = base(ids)
        if not names:
            return y
        scale = getattr(base, "embed_scale", None)
        for name in names:
            adapter = self.adapters[name]
            lora = adapter.low_rank()
            rows = F.embedding(ids, lora.A.t(), padding_idx=base.padding_idx)
            branch = rows @ lora.B.t() * lora.scaling
            if scale is not None:
                branch = branch * torch.as_tensor(scale, device=y.device).to(branch.dtype)
            if adapter.use_dora:
                y = (y + branch) * lora_dora.gain(adapter, base, lora, base.weight.dtype)
            else:
                y = y + branch
        return y.to(base.weight.dtype)
