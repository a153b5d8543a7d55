"""How kernels are launched on a GPU: two graphs at once on two streams, dependent launch on and
off, the kernels of older devices on a newer one.

The whole set runs as an older device by hand:
    FASTPEFT_ARCH=80 pytest tests/test_qlinear.py tests/test_cuda.py        (86 and 89 likewise)
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import compare
import fastpeft
import kernelkit
import pytest
import torch
from cases import Case
from fastpeft.ops.launch import plan_text

HERE = Path(__file__).resolve().parent
BF16 = torch.bfloat16
CHAIN = 8
# sizes that fill a GPU, where blocks of two kernels meet; the small ones are kernelkit.FAMILIES
LARGE = [
    Case("nf4", "bfloat16", 16, 4096, 4096, 16, number=1),
    Case("nf4", "bfloat16", 256, 4096, 4096, 16, number=2),
    Case("nf4", "bfloat16", 1024, 1024, 4096, 0, number=3),
    Case("int8", "bfloat16", 8, 4096, 4096, 16, number=4),
    # few tokens, a tile's sum spread over the blocks of a cluster; all of a row of tiles in one
    Case("nf4", "bfloat16", 64, 4096, 4096, 16, number=5),
    Case("nf4", "bfloat16", 128, 1024, 4096, 64, number=6),
    Case("nf4", "float16", 64, 4096, 1024, 16, number=7),
    Case("int8", "bfloat16", 256, 4096, 1024, 16, number=8),
    Case("llm.int8", "bfloat16", 512, 4096, 1024, 16, number=9),
    # a dense base and its branch as one product; the factors' gradients over many tokens
    Case("dense", "bfloat16", 2048, 4096, 512, 16, number=10),
]


@pytest.fixture
def pdl(cuda):
    """The switch; put back afterwards."""
    before = fastpeft.dependent_launch()
    yield fastpeft.dependent_launch
    fastpeft.dependent_launch(before)


def captured(work, stream: torch.cuda.Stream):
    """(graph, what work() returned inside), warmed up and captured on that stream."""
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = work()
    return graph, results


# ---- two graphs at once


def replayed_together(cases: list[Case], rounds: int) -> None:
    """Both graphs on streams of their own, `rounds` times; every result is the eager one's bits."""
    inputs = [case.build("cuda") for case in cases]
    eager = [kernelkit.run(each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in cases]
    graphs = [
        captured(lambda each=each: kernelkit.run(each), stream)
        for each, stream in zip(inputs, streams, strict=True)
    ]
    for _, results in graphs:
        for value in results.values():
            value.fill_(float("nan"))  # a replay that writes nothing must not look right
    torch.cuda.synchronize()
    for _ in range(rounds):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for case, wanted, (_, results) in zip(cases, eager, graphs, strict=True):
        for name, value in wanted.items():
            compare.assert_bitwise(results[name], value, f"{case} {name}: graph against eager")


@pytest.mark.parametrize("case", kernelkit.FAMILIES + LARGE, ids=str)
def test_two_graphs_on_two_streams(cuda, case):
    """The same layer size twice: workspaces, counters and locks of a kernel are not shared."""
    replayed_together([case, replace(case, number=case.number + 1)], 10)


@pytest.mark.parametrize("other", LARGE[2:], ids=str)
def test_two_graphs_of_different_kernels(cuda, other):
    for case in LARGE[:2]:
        replayed_together([case, other], 10)


# ---- dependent launch


def chain(kind: str, width: int) -> list[torch.nn.Module]:
    """Layers that each read what the one before wrote, with LoRA whose B is not zero."""
    layers = []
    for _ in range(CHAIN):
        linear = torch.nn.Linear(width, width, device="cuda", dtype=BF16)
        layer = fastpeft.QLoRALinear.from_linear(linear, r=8, lora_alpha=16, format=kind)
        with torch.no_grad():
            layer.lora_B.weight.normal_(0.0, 0.2)
        layers.append(layer.train())
    return layers


def walk(layers, x, dy) -> list[torch.Tensor]:
    """Forward and backward through the chain: y, dx and every factor's gradient."""
    y = x
    for layer in layers:
        y = layer(y)
    factors = [p.weight for layer in layers for p in (layer.lora_A, layer.lora_B)]
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], dy)]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("width", [512, 576, 2048])
@pytest.mark.parametrize("M", [1, 16, 24, 64, 300])
def test_dependent_launch_changes_no_bit(pdl, M, width, kind):
    """A kernel that read an activation too early would read what the replay before left there: so
    the input changes from run to run.
    """
    layers = chain(kind, width)
    draws = [[torch.randn(M, width, device="cuda", dtype=BF16) for _ in range(2)] for _ in range(4)]
    x, dy = (torch.zeros_like(t) for t in draws[0])
    x.requires_grad_(True)

    def load(draw) -> None:
        with torch.no_grad():
            x.copy_(draw[0])
            dy.copy_(draw[1])

    wanted = []
    pdl(False)
    for draw in draws:
        load(draw)
        wanted.append([value.clone() for value in walk(layers, x, dy)])
    if not pdl(True):
        pytest.fail("dependent launch did not go on")
    graph, results = captured(lambda: walk(layers, x, dy), torch.cuda.Stream())
    for number, (draw, want) in enumerate(zip(draws, wanted, strict=True)):
        load(draw)
        eager = walk(layers, x, dy)
        graph.replay()
        torch.cuda.synchronize()
        for index, value in enumerate(want):
            where = f"{kind} M={M} width={width}, draw {number}, result {index}"
            compare.assert_bitwise(eager[index], value, f"{where}: eager with, against without")
            compare.assert_bitwise(results[index], value, f"{where}: graph with, against without")


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_environment_decides_at_the_start(cuda, value):
    code = "import fastpeft; print(fastpeft.dependent_launch())"
    environment = {**os.environ, "FASTPEFT_PDL": value}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(value == "1"), done.stderr[-2000:]


# ---- older devices


@pytest.mark.parametrize("arch", [80, 86, 89])
def test_kernels_of_an_older_device(cuda, arch):
    """Every fifth covering case and FAMILIES, in a process that takes the GPU for an older one."""
    major, minor = torch.cuda.get_device_capability()
    if arch > major * 10 + minor:
        pytest.skip(f"CUDA: this GPU is older than sm_{arch}")
    environment = {**os.environ, "FASTPEFT_ARCH": str(arch)}
    done = subprocess.run(
        [sys.executable, str(HERE / "kernelkit.py"), "--device", "cuda"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"sm_{arch} "), done.stdout


def test_a_device_that_this_gpu_cannot_be_is_refused(cuda):
    code = "from fastpeft.ops.launch import plan_text; plan_text(1, 64, 64, is_cuda=True)"
    for wrong in ("75", "999", "x"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "FASTPEFT_ARCH": wrong},
            capture_output=True,
            text=True,
        )
        assert done.returncode and f"FASTPEFT_ARCH={wrong}" in done.stderr, done.stderr[-2000:]


def test_the_plan_of_this_gpu_names_it(cuda):
    major, minor = torch.cuda.get_device_capability()
    arch = os.environ.get("FASTPEFT_ARCH") or f"{major}{minor}"
    assert f"on sm_{arch}:" in plan_text(1, 64, 64, is_cuda=True)
