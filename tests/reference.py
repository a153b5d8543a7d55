"""The formulas, spelled in plain torch: what every kernel is compared with.

Written from the papers and the file formats, not from the C++ code. A function that takes `dtype`
computes in that dtype: float64 gives the exact value, the tensor's own dtype gives plain torch's
value, whose error is the yardstick (compare.py).

Letters: M tokens, N out features, K in features, R rank, D bottleneck width. x [M, K], W [N, K], A
[R, K], B [N, R]. Sources: QLoRA (Dettmers et al. 2023) section 3; LLM.int8() (Dettmers et al.
2022); LoRA (Hu et al. 2021); Philox4x32-10 (Salmon et al. 2011); adapters (Houlsby et al. 2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# nibble -> value; NF4: quantiles of a normal distribution, FP4: sign | 3-bit magnitude, in twelfths
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_HALF = tuple(v / 12 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = _FP4_HALF + tuple(0.0 - v for v in _FP4_HALF)  # nibble 8 is a second +0
CODEBOOKS = {"nf4": NF4, "fp4": FP4}
FORMAT_IDS = {"dense": 0, "nf4": 1, "fp4": 2, "int8": 3}
NESTED_BLOCK = 256


# ---- 4-bit blocks


def codebook(fmt: str, device="cpu") -> torch.Tensor:
    """float32 [16]."""
    return torch.tensor(CODEBOOKS[fmt], dtype=torch.float32, device=device)


def quantize_4bit(W: torch.Tensor, fmt: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W [N, K] -> codes int64 [N*K] (one nibble each), absmax float32 [ceil(N*K/blocksize)].

    v = w * (1 / absmax) in float32; a value on a midpoint between two codes takes the lower one. An
    all-zero block has absmax 0 and the code of zero.
    """
    flat = W.detach().float().reshape(-1)
    blocks = -(-flat.numel() // blocksize)
    padded = F.pad(flat, (0, blocks * blocksize - flat.numel())).view(blocks, blocksize)
    absmax = padded.abs().amax(dim=1)
    inverse = torch.where(absmax > 0, 1.0 / absmax, torch.zeros_like(absmax))
    value = (padded * inverse[:, None]).reshape(-1)[: flat.numel()]
    table = codebook(fmt, W.device)
    if fmt == "nf4":
        return torch.bucketize(value.contiguous(), _midpoints(table)), absmax
    order = torch.argsort(table[:8])
    magnitude = order[torch.bucketize(value.abs(), _midpoints(table[:8][order]))]
    return magnitude + 8 * (value < 0).long(), absmax


def _midpoints(ascending: torch.Tensor) -> torch.Tensor:
    wide = ascending.double()
    return ((wide[1:] + wide[:-1]) / 2).float()


def pack_canonical(codes: torch.Tensor) -> torch.Tensor:
    """codes int64 [N*K] -> uint8 [ceil(N*K/2)]: element 2j is the high nibble of byte j."""
    even = F.pad(codes, (0, codes.numel() % 2))
    return (even[0::2] * 16 + even[1::2]).to(torch.uint8)


def unpack_canonical(packed: torch.Tensor, count: int) -> torch.Tensor:
    """uint8 [ceil(count/2)] -> int64 [count]."""
    wide = packed.reshape(-1).long()
    return torch.stack((wide >> 4, wide & 15), dim=1).reshape(-1)[:count]


def pack_tiled(codes: torch.Tensor, N: int, K: int, fmt: str) -> torch.Tensor:
    """codes int64 [N*K] -> uint8 [Np/16, Kp/64, 512], the layout of csrc/core/formats.h.

    strip 16 n x 64 k = 4 tiles of 16 x 16; a tile is 8 x 8 units of 2 n x 2 k; unit row or column j
    holds the pair j/2 + 4 (j mod 2); a unit's nibbles, low first: (n0,k0) (n0,k1) (n1,k0) (n1,k1).
    """
    zero = CODEBOOKS[fmt].index(0.0)
    grid = F.pad(codes.view(N, K), (0, -K % 64, 0, -N % 16), value=zero)
    rows, cols = grid.shape[0] // 16, grid.shape[1] // 64
    pairs = torch.tensor([j // 2 + 4 * (j % 2) for j in range(8)], device=codes.device)
    # [strip row, n pair, n in pair, strip column, tile, k pair, k in pair]
    parts = grid.view(rows, 8, 2, cols, 4, 8, 2)[:, pairs][:, :, :, :, :, pairs]
    parts = parts.permute(0, 3, 4, 1, 5, 2, 6)  # [rows, cols, tile, row, column, n, k]
    return (parts[..., 0] + 16 * parts[..., 1]).to(torch.uint8).reshape(rows, cols, 512)


def scales_in_memory(scales: torch.Tensor, N: int, K: int, blocksize: int) -> torch.Tensor:
    """Flat per-block scales [ceil(N*K/blocksize)] -> the memory order: [K/blocksize, Np] when
    blocks do not straddle rows, else unchanged. Rows beyond N hold 0.
    """
    if K % blocksize:
        return scales.clone()
    return F.pad(scales.view(N, K // blocksize), (0, 0, 0, -N % 16)).t().contiguous()


def dequantize_4bit(
    codes: torch.Tensor, absmax: torch.Tensor, fmt: str, blocksize: int, N: int, K: int
):
    """float32 [N, K]: codebook[code] * absmax, rounded once."""
    per_element = absmax.repeat_interleave(blocksize)[: N * K]
    return (codebook(fmt, codes.device)[codes] * per_element).view(N, K)


# ---- double quantisation


def dynamic_map(device="cpu") -> torch.Tensor:
    """float32 [256], sorted: per decade 10^(i-6), i = 0..6, the midpoints of 2^i equal steps from
    0.1 to 1, both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        middles = (10.0 ** (i - 6)) * (edges[1:] + edges[:-1]) / 2.0
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax float32 [B] -> codes uint8 [B], nested float32 [257 + ceil(B/256)] = offset | map |
    nested absmax.

    As bitsandbytes' CPU quantiser has it: v = (absmax - offset) / nested absmax goes to the nearest
    of 65536 grid points in [-1, 1], and that point to the nearest map entry (a midpoint belongs to
    the lower one). csrc/core/formats.h tells the order of roundings.
    """
    table, offset = dynamic_map(absmax.device), absmax.mean()
    blocks = -(-absmax.numel() // NESTED_BLOCK)
    centred = F.pad(absmax - offset, (0, blocks * NESTED_BLOCK - absmax.numel()))
    top = centred.view(blocks, NESTED_BLOCK).abs().amax(dim=1)
    inverse = torch.where(top > 0, 1.0 / top, torch.zeros_like(top))
    value = (centred.view(blocks, NESTED_BLOCK) * inverse[:, None]).clamp(-1, 1)
    point = (((value + 1.0) * 0.5).double() * 65535.0 + 0.5).float().floor()
    value = (point * 2.0 / 65535.0 - 1.0).reshape(-1)[: absmax.numel()]
    middles = (table[1:] + table[:-1]) * 0.5
    codes = torch.bucketize(value.contiguous(), middles).to(torch.uint8)
    codes[(top == 0).repeat_interleave(NESTED_BLOCK)[: absmax.numel()]] = 0
    return codes, torch.cat((offset.view(1), table, top))


def dequantize_absmax(codes: torch.Tensor, nested: torch.Tensor) -> torch.Tensor:
    """map[q] * nested_absmax[b / 256] + offset: two separately rounded float32 operations."""
    block = torch.arange(codes.numel(), device=codes.device) // NESTED_BLOCK
    product = nested[1:257][codes.long()] * nested[257:][block]
    return product + nested[0]


# ---- int8


def quantize_int8(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W [N, K] -> int8 [N, K], row absmax float32 [N]; code = round(w * 127 / absmax), ties to
    even.
    """
    wide = W.detach().float()
    absmax = wide.abs().amax(dim=1)
    inverse = torch.where(absmax > 0, 127.0 / absmax, torch.zeros_like(absmax))
    return torch.round(wide * inverse[:, None]).to(torch.int8), absmax


def quantize_rows(
    x: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K] -> codes float64 [M, K] (integers), row scale float32 [M], outlier columns bool [K].

    threshold > 0: an element with |x| >= threshold does not count for its row's scale, and the
    codes of its whole column are 0: that column is computed in x's dtype.
    """
    wide = x.detach().float()
    large = (wide.abs() >= threshold) if threshold > 0 else torch.zeros_like(wide, dtype=torch.bool)
    inner, outlier = wide.masked_fill(large, 0.0), large.any(dim=0)
    scale = inner.abs().amax(dim=1)
    inverse = torch.where(scale > 0, 127.0 / scale, torch.zeros_like(scale))
    codes = torch.round(inner * inverse[:, None]).masked_fill(outlier, 0.0)
    return codes.double(), scale, outlier


# ---- dropout


def philox(seed: int, counters: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10, key = seed, counter = (c, 0): int64 [n] -> int64 [n, 4] holding 32 random bits
    each.

    int64 products wrap modulo 2^64, which leaves both 32-bit halves right.
    """
    low = 0xFFFFFFFF
    c = [
        counters & low,
        (counters >> 32) & low,
        torch.zeros_like(counters),
        torch.zeros_like(counters),
    ]
    key0, key1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & low, (p1 >> 32) & low
        c = [high1 ^ c[1] ^ key0, p1 & low, high0 ^ c[3] ^ key1, p0 & low]
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack(c, dim=1)


def keep_mask(shape: tuple[int, ...], p: float, seed: int, device="cpu") -> torch.Tensor:
    """bool of `shape`: element i is dropped when its 32 bits are below p * 2^32; the counter is i /
    4.
    """
    count = int(torch.Size(shape).numel())
    counters = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    bits = philox(seed, counters).reshape(-1)[:count]
    p32 = float(torch.tensor(p, dtype=torch.float32))  # kernels hold p in float32
    return (bits >= int(p32 * 4294967296.0)).view(shape)


def dropout(x: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    """x * keep / (1 - p), in x's dtype."""
    return x if keep is None else x * keep / (1.0 - p)


# ---- linear layers with LoRA


def qlinear(dtype, x, W, bias=None, A=None, B=None, scaling=1.0, keep=None, p=0.0):
    """y = x W^T + bias + scaling * drop(x) A^T B^T: (y [M, N], s [M, R] or None), computed in
    `dtype`.
    """
    x, W, bias, A, B = (None if t is None else t.to(dtype) for t in (x, W, bias, A, B))
    y, s = F.linear(x, W, bias), None
    if A is not None:
        s = F.linear(dropout(x, keep, p), A)
        y = y + scaling * F.linear(s, B)
    return y, s


def qlinear_grads(dtype, dy, x, W, A=None, B=None, scaling=1.0, keep=None, p=0.0):
    """Gradients of qlinear, computed in `dtype`: dict of dx [M, K] and, with LoRA, dA [R, K], dB
    [N, R], ds [M, R].

    With s = drop(x) A^T and y = x W^T + scaling * s B^T:
    ds = scaling * dy B, dA = ds^T drop(x), dB = scaling * dy^T s, dx = dy W + drop'(ds A).
    """
    dy, x, W, A, B = (None if t is None else t.to(dtype) for t in (dy, x, W, A, B))
    grads = {"dx": dy @ W}
    if A is not None:
        dropped = dropout(x, keep, p)
        ds = scaling * (dy @ B)
        grads["ds"] = ds
        grads["dA"] = ds.t() @ dropped
        grads["dB"] = scaling * (dy.t() @ F.linear(dropped, A))
        grads["dx"] = grads["dx"] + dropout(ds @ A, keep, p)
    return grads


def llm_int8(
    dtype, x, codes, absmax, threshold, bias=None, A=None, B=None, scaling=1.0, keep=None, p=0.0
):
    """LLM.int8(): y = (q . codes) * scale_x * absmax / 127^2 + (outlier columns in `dtype`) + bias
    + LoRA.

    Returns (y [M, N], s [M, R] or None). The integer product is exact in every precision.
    """
    q, scale, outlier = quantize_rows(x, threshold)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = scale.to(wide)[:, None] * absmax.to(wide)[None, :]
    y = ((q @ codes.double().t()).to(wide) * factor * (1 / 127.0**2)).to(dtype)
    if bool(outlier.any()):
        W = int8_weight(codes, absmax).to(dtype)
        y = y + F.linear(x[:, outlier].to(dtype), W[:, outlier])
    if bias is not None:
        y = y + bias.to(dtype)
    if A is None:
        return y, None
    s = F.linear(dropout(x.to(dtype), keep, p), A.to(dtype))
    return y + scaling * F.linear(s, B.to(dtype)), s


def int8_weight(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """float32 [N, K]: (codes * absmax) * float32(1 / 127), two roundings: the weight that is
    computed with.
    """
    return codes.float() * absmax[:, None] * torch.tensor(1 / 127, device=codes.device)


# ---- bottleneck adapters

ACTIVATIONS = {
    "relu": (0, F.relu),
    "gelu": (1, F.gelu),
    "gelu_tanh": (2, lambda z: F.gelu(z, approximate="tanh")),
    "silu": (3, F.silu),
    "tanh": (4, torch.tanh),
    "identity": (5, lambda z: z),
}  # name -> (id in csrc/core/params.h, function)


def bottleneck(dtype, x, down, down_bias, up, up_bias, activation, scaling, residual=None):
    """y = residual + scaling * (act(x down^T + down_bias) up^T + up_bias), computed in `dtype`;
    down [D, K], up [K, D].
    """
    x, down, down_bias, up, up_bias, residual = (
        None if t is None else t.to(dtype) for t in (x, down, down_bias, up, up_bias, residual)
    )
    hidden = ACTIVATIONS[activation][1](F.linear(x, down, down_bias))
    y = scaling * F.linear(hidden, up, up_bias)
    return y if residual is None else residual + y


def bottleneck_grads(dtype, dy, x, down, down_bias, up, up_bias, activation, scaling):
    """Gradients by torch's autograd of the formula in `dtype`, without the residual's: dict dx,
    ddown, ddown_bias, dup, dup_bias.
    """
    names = ("dx", "ddown", "ddown_bias", "dup", "dup_bias")
    leaves = [
        None if t is None else t.detach().to(dtype).requires_grad_(True)
        for t in (x, down, down_bias, up, up_bias)
    ]
    y = bottleneck(dtype, *leaves, activation, scaling)
    wanted = [(n, t) for n, t in zip(names, leaves, strict=True) if t is not None]
    grads = torch.autograd.grad(y, [t for _, t in wanted], dy.to(dtype))
    return {name: g for (name, _), g in zip(wanted, grads, strict=True)}
