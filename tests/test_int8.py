"""int8 weights on the GPU around the tiles of their kernels, and LLM.int8() with many outlier
columns.

Small shapes of every kind are in the covering matrix of test_qlinear.
"""

from __future__ import annotations

import itertools

import compare
import fastpeft
import kernelkit
import pytest
import reference
import torch
from cases import Case

# ragged edges everywhere; the few-token kernel, the tensor-core ones, and what neither takes
SHAPES = ((8, 16), (136, 656), (200, 192), (2048, 1024), (130, 320))
TILES = [
    Case(kind, dtype, M, N, K, R, bias=number % 2 == 0, number=number)
    for number, (kind, dtype, M, (N, K), R) in enumerate(
        itertools.product(
            ("int8", "llm.int8", "llm.int8-0"),
            ("bfloat16", "float16"),
            (1, 9, 16, 17, 257, 600),
            SHAPES,
            (0, 8, 64),
        )
    )
    if number % 2 == 0 or M in (16, 257)
]


@pytest.mark.parametrize("case", TILES, ids=str)
def test_tiles(cuda, case):
    kernelkit.check(case, cuda)


@pytest.mark.parametrize("case", TILES[::7], ids=str)
def test_second_run_is_bitwise_equal(cuda, case):
    inputs = case.build(cuda)
    first, second = kernelkit.run(inputs), kernelkit.run(inputs)
    for name in first:
        compare.assert_bitwise(first[name], second[name], f"{case} {name}")


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200, 700])
@pytest.mark.parametrize("M", [3, 40, 300])
def test_number_of_outlier_columns(device, M, count):
    """Fewer, exactly as many and more than fit the matrices that the tensor-core kernel copies."""
    N, K = 136, 768
    draw = torch.Generator().manual_seed(count)
    dense = torch.nn.Linear(K, N, dtype=torch.bfloat16)
    x = torch.randn(M, K, generator=draw).clamp(-5.0, 5.0)
    for column in torch.randperm(K, generator=draw)[:count].tolist():
        x[column % M, column] = 9.0 if column % 2 else -20.0
    x = x.to(device, torch.bfloat16)
    layer = fastpeft.Linear8bit.from_linear(dense.to(device), threshold=6.0)
    y = layer(x).detach()
    values = (x, layer.codes, layer.scales, 6.0, layer.bias)
    exact, _ = reference.llm_int8(torch.float64, *values)
    plain, _ = reference.llm_int8(torch.bfloat16, *values)
    compare.assert_close(y, exact.detach(), [plain.detach()], dtype=torch.bfloat16, name="y")
