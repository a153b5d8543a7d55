"""One case object for value, gradient and speed: a quantised linear layer with LoRA at one size.

A Case is plain numbers; `build(device)` draws its tensors. `COVERING` is the list that test_qlinear
runs: every (kind, dtype, M) meets, and every pair of values of two axes meets somewhere
(test_qlinear checks it).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import reference
import torch

# kind -> (format, double quantisation, LLM.int8() threshold: -1 weight only, 0 plain int8, > 0 with
# outlier columns)
KINDS = {
    "nf4": ("nf4", True, -1.0),
    "nf4-single": ("nf4", False, -1.0),
    "fp4": ("fp4", False, -1.0),
    "int8": ("int8", False, -1.0),
    "llm.int8-0": ("int8", False, 0.0),
    "llm.int8": ("int8", False, 6.0),
    "dense": ("dense", False, -1.0),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = (0, 1, 2, 3, 5, 7, 16, 17, 63, 64, 65, 128, 333)
RANKS = (0, 1, 4, 8, 13, 64)
# (N, K, blocksize): a plain one; odd N; N = 1; K no multiple of 64, of 128, of the block; odd N*K;
# blocks over rows; a block beyond the whole row; more than 256 blocks, so that the nested level has
# several
SHAPES = (
    (64, 128, 64),
    (7, 341, 64),
    (33, 576, 64),
    (1, 64, 64),
    (65, 96, 32),
    (48, 192, 128),
    (130, 320, 64),
    (256, 70, 64),
    (17, 100, 4096),
)
LAYOUTS = ("plain", "strided", "3d", "transposed")
DROPOUTS = (0.0, 0.1, 0.5)


@dataclass(frozen=True)
class Weight:
    """A weight in the in-memory layout of csrc/core/formats.h, and the value it stands for."""

    format_id: int
    blocksize: int
    N: int
    K: int
    codes: torch.Tensor  # 4-bit: uint8 [Np/16, Kp/64, 512]; int8: int8 [N, K]; dense: dtype [N, K]
    scales: torch.Tensor | None  # float32 or uint8, memory order; int8: float32 [N]
    nested: torch.Tensor | None  # float32 [257 + ceil(B/256)]
    threshold: float
    exact: torch.Tensor  # [N, K] float32, or dtype (dense)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case."""

    x: torch.Tensor  # [M, K] or [2, M/2, K], perhaps strided
    dy: torch.Tensor  # [..., N]
    weight: Weight
    bias: torch.Tensor | None  # [N]
    A: torch.Tensor | None  # [R, K] float32
    B: torch.Tensor | None  # [N, R] float32
    seed: torch.Tensor | None  # int64 [1]
    keep: torch.Tensor | None  # bool [M, K]
    scaling: float
    p: float

    @property
    def x2d(self) -> torch.Tensor:
        """x as [M, K]."""
        return self.x.reshape(-1, self.x.shape[-1])

    @property
    def dy2d(self) -> torch.Tensor:
        """dy as [M, N]."""
        return self.dy.reshape(-1, self.dy.shape[-1])


@dataclass(frozen=True)
class Case:
    """One problem. M tokens, N out features, K in features, R rank (0: no LoRA)."""

    kind: str = "nf4"
    dtype: str = "bfloat16"
    M: int = 16
    N: int = 64
    K: int = 128
    R: int = 0
    blocksize: int = 64
    bias: bool = False
    dropout: float = 0.0
    layout: str = "plain"
    number: int = 0  # draws other values

    def __str__(self) -> str:
        parts = [self.kind, self.dtype, f"M{self.M}", f"N{self.N}", f"K{self.K}", f"R{self.R}"]
        parts += [f"b{self.blocksize}"] if self.blocksize != 64 else []
        parts += ["bias"] if self.bias else []
        parts += [f"drop{self.dropout}"] if self.dropout else []
        parts += [self.layout] if self.layout != "plain" else []
        return "-".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return DTYPES[self.dtype]

    def flops(self, direction: str = "fwd") -> int:
        """Multiplications and additions; frozen W, so a backward pass costs one product with W, and
        LoRA's four.
        """
        base, lora = 2 * self.M * self.N * self.K, 2 * self.M * self.R * (self.N + self.K)
        each = {"fwd": (1, 1), "dgrad": (1, 1), "fwd+bwd": (2, 3)}[direction]
        return each[0] * base + each[1] * lora

    def weight_bytes(self) -> float:
        """Bytes of W as stored."""
        fmt, double, _ = KINDS[self.kind]
        if fmt == "dense":
            return self.N * self.K * self.torch_dtype.itemsize
        if fmt == "int8":
            return self.N * self.K + 4 * self.N
        per_block = 1 + 4 / 256 if double else 4
        return self.N * self.K * (0.5 + per_block / self.blocksize)

    def bytes(self, direction: str = "fwd") -> float:
        """Fewest bytes through memory: W, x, y, A, B once a pass."""
        size = self.torch_dtype.itemsize
        once = self.weight_bytes() + size * (self.M + self.R) * (self.N + self.K)
        return once * (2 if direction == "fwd+bwd" else 1)

    def build(self, device="cpu", draw_on="cpu") -> Inputs:
        """Draws the tensors; the same numbers for every device, unless they are drawn on it
        (quicker at large sizes).
        """
        draw = torch.Generator(draw_on).manual_seed(1 + self.number)
        dtype, M, N, K, R = self.torch_dtype, self.M, self.N, self.K, self.R

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=draw, device=draw_on) * scale).to(device)

        # a model's weight comes in the activations' dtype
        weight = self.pack(normal(N, K, scale=K**-0.5).to(dtype))
        x = normal(M, K).to(dtype)
        if weight.threshold > 0 and M:  # a few outlier columns, as in real activations
            x[M // 2, :: max(K // 3, 1)] = 8.0
        seed = torch.tensor([1234567 + self.number], dtype=torch.int64, device=device)
        keep = None
        if self.dropout and R:
            keep = reference.keep_mask((M, K), self.dropout, int(seed), device)
        return Inputs(
            x=lay_out(x, self.layout),
            dy=lay_out(normal(M, N).to(dtype), self.layout),
            weight=weight,
            bias=normal(N).to(dtype) if self.bias else None,
            A=normal(R, K, scale=K**-0.5) if R else None,
            B=normal(N, R, scale=0.5) if R else None,
            seed=None if keep is None else seed,
            keep=keep,
            scaling=2.0 if self.number % 2 else 0.75,
            p=0.0 if keep is None else self.dropout,
        )

    def pack(self, W: torch.Tensor) -> Weight:
        """Packs W [N, K] by the formulas of reference.py."""
        fmt, double, threshold = KINDS[self.kind]
        ident, N, K = reference.FORMAT_IDS[fmt], self.N, self.K
        if fmt == "dense":
            return Weight(ident, self.blocksize, N, K, W, None, None, threshold, W)
        if fmt == "int8":
            codes, absmax = reference.quantize_int8(W)
            exact = reference.int8_weight(codes, absmax)
            return Weight(ident, self.blocksize, N, K, codes, absmax, None, threshold, exact)
        codes, absmax = reference.quantize_4bit(W, fmt, self.blocksize)
        scales, nested = absmax, None
        if double:
            scales, nested = reference.quantize_absmax(absmax)
            absmax = reference.dequantize_absmax(scales, nested)
        return Weight(
            ident,
            self.blocksize,
            N,
            K,
            reference.pack_tiled(codes, N, K, fmt),
            reference.scales_in_memory(scales, N, K, self.blocksize),
            nested,
            threshold,
            reference.dequantize_4bit(codes, absmax, fmt, self.blocksize, N, K),
        )


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x [M, K] in another shape or with other strides."""
    if layout == "strided":  # every second column of something wider
        wide = torch.full((x.shape[0], 2 * x.shape[1]), 7.0, dtype=x.dtype, device=x.device)
        wide[:, ::2] = x
        return wide[:, ::2]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "3d":
        return x.view(2, -1, x.shape[1]) if x.shape[0] % 2 == 0 else x.view(1, *x.shape)
    return x


AXES = {
    "kind": tuple(KINDS),
    "dtype": tuple(DTYPES),
    "M": TOKENS,
    "shape": SHAPES,
    "R": RANKS,
    "layout": LAYOUTS,
    "bias": (False, True),
    "dropout": DROPOUTS,
}


def axis(case: Case, name: str):
    """The case's value on an axis of AXES."""
    return (case.N, case.K, case.blocksize) if name == "shape" else getattr(case, name)


def pairs(case: Case) -> set:
    """Which pairs of axis values this case lets meet."""
    values = [(name, axis(case, name)) for name in AXES]
    return set(itertools.combinations(values, 2))


def covering(tries: int = 12) -> list[Case]:
    """Every (kind, dtype, M); for each, of some drawn settings of the other axes the one that shows
    most new pairs.
    """
    draw, seen, rows = random.Random(0), set(), []
    for M, kind, dtype in itertools.product(TOKENS, KINDS, DTYPES):

        def candidate(M=M, kind=kind, dtype=dtype):
            (N, K, blocksize), R = draw.choice(SHAPES), draw.choice(RANKS)
            return Case(
                kind,
                dtype,
                M,
                N,
                K,
                R,
                blocksize,
                bias=draw.random() < 0.5,
                dropout=draw.choice(DROPOUTS) if R else 0.0,
                layout=draw.choice(LAYOUTS),
                number=len(rows),
            )

        best = max((candidate() for _ in range(tries)), key=lambda case: len(pairs(case) - seen))
        seen |= pairs(best)
        rows.append(best)
    return rows


COVERING = covering()
# sizes of a real small model: the fused path and the panel path
MODEL_SIZED = [
    Case("nf4", dtype, M, N, K, 16, number=M, bias=bias)
    for dtype, (M, N, K), bias in itertools.product(
        ("float32", "bfloat16"), ((1, 576, 1536), (64, 1536, 576)), (False,)
    )
]
