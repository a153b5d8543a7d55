"""What only a GPU can show: graph capture, compilation to Triton, streams, sizes of real layers.

The whole covering matrix runs on CUDA through the `device` fixture of the other files.
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
from fastpeft.ops import quant as quant_ops

BF16 = torch.bfloat16
# the small-M kernels, the boundary to the large-M path, and beyond
TOKENS = (1, 4, 16, 64, 300)
MODEL_SIZED = [
    Case(kind, "bfloat16", M, 1024, 1536, 16, number=M)
    for kind in ("nf4", "int8", "llm.int8")
    for M in (1, 2, 8, 9, 32, 128, 129, 512, 2048)
]
# around the tiles of the tensor-core kernels: ragged edges in every direction, all ranks, split
# sums
TILES = [
    Case(
        "nf4",
        "bfloat16",
        M,
        N,
        K,
        R,
        bias=number % 2 == 0,
        dropout=0.25 if R and number % 3 == 0 else 0.0,
        number=number,
    )
    for number, (M, (N, K), R) in enumerate(
        itertools.product(
            (10, 33, 255, 256, 257, 1000),
            ((8, 64), (136, 640), (200, 192), (2048, 1024)),
            (0, 8, 13, 64),
        )
    )
]
# small and odd layers at every class of tokens: N and K that are no multiples of 64, of 16, of 8;
# both 16-bit types, with and without LoRA
ODD_SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (200, 648), (264, 100), (77, 333))
ODD = [
    Case("nf4", dtype, M, N, K, 16 if number % 2 else 0, bias=number % 3 == 0, number=number)
    for number, (M, (N, K), dtype) in enumerate(
        itertools.product(
            (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), ODD_SHAPES, ("bfloat16", "float16")
        )
    )
]
HALF = [
    Case("nf4", "float16", M, 1024, 1536, R, number=M)
    for M in (1, 2, 8, 16, 17, 32, 64, 128, 256, 512, 2048)
    for R in (0, 16)
]
# a dense base and its branch as one product (tiles that fill the device), and gradients of the
# factors from one pass over dy; then the ranks and tokens beside those
LORA_SIZES = [
    Case("dense", dtype, M, N, K, R, bias=bias, dropout=dropout)
    for dtype, M, N, K, R, bias, dropout in (
        ("bfloat16", 2048, 4096, 512, 16, True, 0.0),
        ("bfloat16", 2048, 512, 4096, 64, False, 0.0),
        ("bfloat16", 2077, 512, 4096, 8, False, 0.25),
        ("float16", 2048, 1024, 520, 16, True, 0.0),
        ("bfloat16", 2048, 1024, 520, 13, True, 0.25),
        ("float16", 300, 520, 1032, 24, False, 0.5),
    )
]


def make_layer(dropout: float = 0.0, N: int = 80, K: int = 192):
    """A QLoRALinear whose B is not zero, so that every gradient has a value."""
    linear = torch.nn.Linear(K, N, device="cuda", dtype=BF16)
    layer = fastpeft.QLoRALinear.from_linear(linear, r=8, lora_alpha=16, lora_dropout=dropout)
    with torch.no_grad():
        layer.lora_B.weight.normal_(0.0, 0.5)
    return layer.train()


def draw(M, N=80, K=192):
    x = torch.randn(M, K, device="cuda", dtype=BF16, requires_grad=True)
    return x, torch.randn(M, N, device="cuda", dtype=BF16)


def step(layer, x, dy) -> dict[str, torch.Tensor]:
    """Forward and backward, the gradients as values."""
    y = layer(x)
    leaves = (x, layer.lora_A.weight, layer.lora_B.weight)
    dx, dA, dB = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}


def check_step(got, layer, x, dy):
    """Holds a step without dropout against the formulas."""
    parts = (layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), 2.0)
    W, flat = layer.base_layer.dequantize(torch.float32), x.detach()
    bias = layer.base_layer.bias
    wanted = []
    for dtype in (torch.float64, x.dtype):
        y, _ = reference.qlinear(dtype, flat, W, bias, *parts)
        wanted.append({"y": y, **reference.qlinear_grads(dtype, dy, flat, W, *parts)})
    for name, value in got.items():
        exact, plain = wanted[0][name], wanted[1][name]
        compare.assert_close(value, exact, plain, dtype=x.dtype, name=name)


def capture(work):
    """Warms up on a side stream, then captures: (graph, what work() returned inside)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


@pytest.mark.parametrize("case", MODEL_SIZED + TILES + ODD + HALF + LORA_SIZES, ids=str)
def test_sizes_of_real_layers(cuda, case):
    kernelkit.check(case, cuda)


@pytest.mark.parametrize("case", TILES[::3] + ODD[::4] + HALF[::2] + LORA_SIZES, ids=str)
def test_second_run_is_bitwise_equal(cuda, case):
    inputs = case.build(cuda)
    first, second = kernelkit.run(inputs), kernelkit.run(inputs)
    for name in first:
        compare.assert_bitwise(first[name], second[name], f"{case} {name}")


@pytest.mark.parametrize("M", TOKENS)
def test_forward_and_backward_in_a_cuda_graph(cuda, M):
    layer = make_layer()
    x, dy = draw(M)
    graph, results = capture(lambda: step(layer, x, dy))
    for _ in range(3):  # new numbers in the same memory
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            dy.copy_(torch.randn_like(dy))
            layer.lora_A.weight.normal_(0.0, 0.1)
            layer.lora_B.weight.normal_(0.0, 0.5)
        for value in results.values():
            value.fill_(float("nan"))  # a replay that writes nothing must not look right
        graph.replay()
        torch.cuda.synchronize()
        replayed = {name: value.clone() for name, value in results.items()}
        check_step(replayed, layer, x, dy)
        eager = step(layer, x, dy)
        for name, value in eager.items():
            compare.assert_bitwise(replayed[name], value, f"M={M} {name}: graph against eager")


def test_llm_int8_in_a_cuda_graph(cuda):
    """The choice of outlier columns is made on the device: the graph must follow new inputs."""
    linear = torch.nn.Linear(192, 80, device="cuda", dtype=BF16)
    layer = fastpeft.Linear8bit.from_linear(linear, threshold=6.0)
    x = torch.randn(32, 192, device="cuda", dtype=BF16)
    with torch.no_grad():
        graph, y = capture(lambda: layer(x))
        for column in (3, 100):
            x.normal_()
            x[5, column] = 20.0
            y.fill_(float("nan"))
            graph.replay()
            compare.assert_bitwise(y, layer(x), f"outlier in column {column}")


def test_dropout_in_a_cuda_graph_is_new_at_every_replay(cuda):
    layer = make_layer(dropout=0.5)
    x, dy = draw(16)
    graph, results = capture(lambda: step(layer, x, dy))
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seen.append({name: value.clone() for name, value in results.items()})
    assert all(torch.isfinite(v).all() for run in seen for v in run.values())
    for first, second in ((0, 1), (1, 2)):
        assert not torch.equal(seen[first]["y"], seen[second]["y"])
        assert not torch.equal(seen[first]["dA"], seen[second]["dA"])


@pytest.mark.parametrize("M", [1, 48])
def test_compiles_without_a_graph_break(cuda, M):
    layer = make_layer()
    x, dy = draw(M)
    compiled = torch.compile(layer, fullgraph=True)
    y = compiled(x)
    leaves = (x, layer.lora_A.weight, layer.lora_B.weight)
    dx, dA, dB = torch.autograd.grad(y, leaves, dy)
    check_step({"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}, layer, x, dy)


def test_compiles_with_dropout(cuda):
    layer = make_layer(dropout=0.5)
    compiled = torch.compile(layer, fullgraph=True)
    x, dy = draw(8)
    y = compiled(x)
    y.backward(dy)
    assert torch.isfinite(y).all() and torch.isfinite(layer.lora_A.weight.grad).all()
    assert not torch.equal(y, compiled(x))


@pytest.mark.parametrize("M", TOKENS)
def test_no_step_waits_for_the_gpu(cuda, M):
    layer = make_layer(dropout=0.1)
    x, dy = draw(M)
    step(layer, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [*((M, 80, 192) for M in TOKENS), (16, 4096, 4096), (256, 4096, 4096), (1024, 1024, 4096)],
)
def test_two_streams_do_not_disturb_each_other(cuda, M, N, K):
    """The large ones fill the GPU, and split sums wait for each other: none may block another."""
    layers = [make_layer(N=N, K=K) for _ in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    data = [draw(M, N, K) for _ in range(2)]
    torch.cuda.synchronize()

    def on(i):
        with torch.cuda.stream(streams[i]):
            return step(layers[i], *data[i])

    alone = []
    for i in (0, 1):
        alone.append(on(i))
        torch.cuda.synchronize()
    together = [on(i) for _ in range(20) for i in (0, 1)]
    torch.cuda.synchronize()
    for number, got in enumerate(together):
        for name, value in got.items():
            compare.assert_bitwise(value, alone[number % 2][name], f"run {number} {name}")


def test_the_current_stream_is_used(cuda):
    """The op must queue behind work on the stream that is current, not on the default one."""
    layer = make_layer()
    x = torch.zeros(4, 192, device="cuda", dtype=BF16)
    with torch.no_grad():
        bias = layer(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        value = torch.randn_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # clock cycles: some 30 ms
            x.copy_(value)
            y = layer(x)
        stream.synchronize()
        compare.assert_bitwise(y, layer(value), "y")
        assert not torch.equal(y, bias)


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "int8"])
def test_moving_between_devices_keeps_the_weight(cuda, kind):
    linear = torch.nn.Linear(341, 7, dtype=BF16)
    if kind == "int8":
        layer = fastpeft.Linear8bit.from_linear(linear, threshold=None)
    else:
        layer = fastpeft.Linear4bit.from_linear(linear, double_quant=kind == "nf4")
    here = layer.dequantize(torch.float32)
    there = layer.to("cuda").dequantize(torch.float32)
    compare.assert_bitwise(there.cpu(), here, kind)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (7, 341), (300, 576)], ids=str)
def test_quantising_on_the_gpu_gives_the_cpu_codes(cuda, shape, dtype, format):
    W = torch.randn(shape, dtype=dtype)
    W[0] = 0.0  # a block of zeros
    for blocksize in (32, 64, 4096):
        here = quant_ops.quantize(W, reference.FORMAT_IDS[format], blocksize)
        there = quant_ops.quantize(W.cuda(), reference.FORMAT_IDS[format], blocksize)
        for name, a, b in zip(("codes", "absmax"), here, there, strict=True):
            compare.assert_bitwise(b.cpu(), a, f"{format} {shape} {blocksize} {name}")


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_double_quantisation_on_the_gpu_gives_the_cpu_codes(cuda, count):
    """For one offset: the mean of the scales is torch's, and sums in another order on a GPU."""
    absmax, table = torch.rand(count) + 0.1, reference.dynamic_map()
    offset = absmax.mean().view(1)
    here = quant_ops.quantize_absmax(absmax, table, offset)
    there = quant_ops.quantize_absmax(absmax.cuda(), table.cuda(), offset.cuda())
    wanted = reference.quantize_absmax(absmax)
    for name, a, b, want in zip(("codes", "nested"), here, there, wanted, strict=True):
        compare.assert_bitwise(b.cpu(), a, name)
        compare.assert_bitwise(a, want, name)
