"""Every operator: schema, fake and compiled run (torch's opcheck); gradients against float64 finite
differences; what is kept for the backward pass; compilation without a graph break.

Values over many shapes and dtypes: test_qlinear.py, test_bottleneck.py.
"""

from __future__ import annotations

import fastpeft
import pytest
import torch
from fastpeft.functional import bottleneck, qlinear
from fastpeft.ops.bottleneck import ACTIVATIONS
from fastpeft.ops.launch import plan_text
from fastpeft.ops.lora import dropout
from fastpeft.ops.quant import FORMAT_IDS
from fastpeft.quant.nf4 import dynamic_map
from torch.autograd import gradcheck
from torch.library import opcheck

N, K, R, D, M = 24, 80, 3, 5, 4


def packed(format: str, dtype=torch.float32, blocksize=32, double_quant=True):
    """A small quantised weight [N, K]; fp4 has no quantiser, so its codes are NF4's."""
    made = fastpeft.quantize_tensor(
        torch.randn(N, K, dtype=dtype),
        "int8" if format == "int8" else "nf4",
        blocksize,
        double_quant,
    )
    return made if format != "fp4" else fastpeft.QuantizedTensor(**{**vars(made), "format": "fp4"})


def weight_args(format: str, **options) -> tuple:
    if format == "dense":
        return torch.randn(N, K), None, None, FORMAT_IDS["dense"], 64
    q = packed(format, **options)
    return q.codes, q.scales, q.nested, FORMAT_IDS[format], q.blocksize


def samples() -> dict[str, list[tuple]]:
    """Arguments for every operator of the library."""
    x, dy = torch.randn(2, M, K), torch.randn(2, M, N)
    A, B, bias = torch.randn(R, K), torch.randn(N, R), torch.randn(N)
    seed, w = torch.tensor([7]), torch.randn(N, K)
    nf4 = packed("nf4")
    flat = nf4.canonical()["weight"].reshape(-1)
    down, up = torch.randn(D, K), torch.randn(K, D)
    low = (A, B, 0.5, 0.25, seed)
    off = (None, None, 1.0, 0.0, None)
    return {
        "quantize": [(w, FORMAT_IDS["nf4"], 32), (w.bfloat16(), FORMAT_IDS["int8"], K)],
        "quantize_absmax": [(torch.rand(300), dynamic_map(), torch.rand(1))],
        "tile": [(flat, FORMAT_IDS["nf4"], N, K)],
        "untile": [(nf4.codes, 1, N, K)],
        "dequantize": [
            (*weight_args(f, **o), N, K, dtype)
            for f, o, dtype in (
                ("nf4", {}, torch.float32),
                ("fp4", {"double_quant": False}, torch.bfloat16),
                ("nf4", {"blocksize": 64}, torch.float16),
                ("int8", {}, torch.float64),
            )
        ],
        "qlinear_fwd": [
            (x, *weight_args("nf4"), N, -1.0, bias, *low),
            (x.transpose(0, 1), *weight_args("dense"), N, -1.0, None, *low),
            (x[0], *weight_args("int8"), N, 2.0, bias, *off),
            (x.bfloat16()[:, :0], *weight_args("nf4"), N, -1.0, bias, *low),
        ],
        "qlinear_dgrad": [
            (dy, *weight_args("nf4"), K, torch.randn(2 * M, R), A, 0.25, seed),
            (dy.half(), *weight_args("int8"), K, None, None, 0.0, None),
        ],
        "lora_wgrad": [
            (dy, x, torch.randn(2 * M, R), *low),
            (dy.bfloat16(), x.bfloat16(), torch.randn(2 * M, R).bfloat16(), A, B, 2.0, 0.0, None),
        ],
        "dropout": [(x.transpose(0, 1), 0.5, seed)],
        "bottleneck_fwd": [
            (x, down, torch.randn(D), up, torch.randn(K), 1, 2.0, torch.randn_like(x)),
            (x.bfloat16(), down, None, up, None, 0, 1.0, None),
        ],
        "bottleneck_bwd": [
            (x, x.clone(), down, torch.randn(D), up, torch.randn(K), 3, 2.0),
            (x.bfloat16(), x.bfloat16(), down, None, up, None, 5, 1.0),
        ],
        "dependent_launch": [(None,)],
        "plan_text": [(False, M, N, K, R, FORMAT_IDS["nf4"], 32, 1, torch.bfloat16)],
    }


def names() -> list[str]:
    """All operators the library holds, asked from the dispatcher."""
    prefix = "fastpeft::"
    found = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix(prefix) for n in found if n.startswith(prefix))


def test_no_operator_without_a_sample():
    assert names() and set(names()) == set(samples())


@pytest.mark.parametrize("name", names())
def test_opcheck(name, device):
    checks = {"plan_text": ("test_schema", "test_faketensor")}  # the others compare tensors
    for args in samples()[name]:
        moved = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
        op = getattr(torch.ops.fastpeft, name).default
        opcheck(op, moved, **({"test_utils": checks[name]} if name in checks else {}))


def test_dependent_launch_is_a_switch():
    """It stays as it was told; without CUDA kernels it is off for good."""
    before = fastpeft.dependent_launch()
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("fastpeft::dequantize", "CUDA")
    try:
        for on in (False, True, True, False):
            assert fastpeft.dependent_launch(on) == (on and has_cuda)
            assert fastpeft.dependent_launch() == (on and has_cuda)
    finally:
        fastpeft.dependent_launch(before)


def test_the_plan_as_text():
    text = plan_text(33, 576, 1536, 16, "nf4", direction="dgrad")
    for part in ("nf4", "dgrad", "bfloat16", "M=33", "N=576", "K=1536", "R=16", "cpu"):
        assert part in text, text
    with pytest.raises(RuntimeError, match="expected M >= 0"):
        plan_text(1, 0, 64)
    with pytest.raises(RuntimeError, match="dtype"):
        plan_text(1, 64, 64, dtype=torch.int8)


def double(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("format", ["dense", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_qlinear_gradients(format, dropout_p):
    """Every gradient against finite differences; the fixed seed makes dropout a fixed function."""
    w = torch.randn(N, K, dtype=torch.float64) if format == "dense" else packed(format)
    seed = torch.tensor([5])
    x, bias, A, B = double(2, M, K), double(N), double(R, K), double(N, R)

    def f(x, bias, A, B):
        return qlinear(x, w, bias, A, B, 0.7, dropout_p=dropout_p, seed=seed)

    assert gradcheck(f, (x, bias, A, B), fast_mode=True)
    assert gradcheck(lambda x: qlinear(x, w), (x,), fast_mode=True)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_bottleneck_gradients(activation):
    x, residual = double(2, M, K), double(2, M, K)
    down, db, up, ub = double(D, K), double(D), double(K, D), double(K)

    def f(x, down, db, up, ub, residual):
        return bottleneck(x, down, db, up, ub, activation, 0.6, residual)

    assert gradcheck(f, (x, down, db, up, ub, residual), fast_mode=True)

    def serial(x, down, up):
        return bottleneck(x, down, None, up, None, activation, 1.0, x)

    assert gradcheck(serial, (x, down, up), fast_mode=True)


def test_dropout_gradient_is_the_same_mask():
    x = double(5, 33)
    y = dropout(x, 0.4, torch.tensor([3]))
    kept = y != 0
    assert 0.3 < kept.double().mean() < 0.9
    assert torch.equal(y[kept], (x / 0.6)[kept].detach()) or torch.allclose(y[kept], x[kept] / 0.6)
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept)


def test_dropout_is_the_same_on_every_device(device):
    x, seed = torch.randn(7, 333), torch.tensor([2**40 + 3])
    for dtype in (torch.float32, torch.bfloat16):
        here = dropout(x.to(dtype), 0.3, seed)
        assert torch.equal(dropout(x.to(device, dtype), 0.3, seed.to(device)).cpu(), here)


def test_dropout_follows_the_seed_and_torch_generator():
    x = torch.ones(1000)
    assert torch.equal(dropout(x, 0.5, torch.tensor([1])), dropout(x, 0.5, torch.tensor([1])))
    assert not torch.equal(dropout(x, 0.5, torch.tensor([1])), dropout(x, 0.5, torch.tensor([2])))
    torch.manual_seed(4)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(first, dropout(x, 0.5))
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("asking", ["x", "bias", "A", "B"])
def test_gradients_one_at_a_time(asking):
    """Whatever is asked alone equals what comes out when all are asked."""
    w = packed("nf4")
    leaves = {"x": torch.randn(2, M, K), "bias": torch.randn(N)}
    leaves |= {"A": torch.randn(R, K), "B": torch.randn(N, R)}

    def run(wanted):
        t = {n: v.clone().requires_grad_(n in wanted) for n, v in leaves.items()}
        y = qlinear(*(t["x"], w, t["bias"], t["A"], t["B"], 0.5), dropout_p=0.2, seed=SEED)
        y.square().sum().backward()
        return {n: t[n].grad for n in t}

    alone, together = run([asking]), run(list(leaves))
    assert [n for n, g in alone.items() if g is not None] == [asking]
    torch.testing.assert_close(alone[asking], together[asking])


SEED = torch.tensor([11])


def saved_bytes(f) -> int:
    """Bytes of distinct tensors that autograd keeps while f runs."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f().sum().backward()
    return sum(kept.values())


def test_backward_keeps_no_dense_weight():
    q = fastpeft.quantize_tensor(torch.randn(512, 512))
    x = torch.randn(2, 512, requires_grad=True)
    A, B = torch.randn(4, 512), torch.randn(512, 4)
    factors = (A.numel() + B.numel()) * 4
    frozen = saved_bytes(lambda: qlinear(x, q, None, A, B))
    assert frozen <= q.nbytes + factors + 2 * 4 * 4  # not even x: A asks for no gradient
    A.requires_grad_(True)
    assert saved_bytes(lambda: qlinear(x, q, None, A, B)) == frozen + x.numel() * 4


def test_no_graph_without_gradients():
    q, x = packed("nf4"), torch.randn(M, K, requires_grad=True)
    assert qlinear(x, q).requires_grad and not qlinear(x.detach(), q).requires_grad
    with torch.no_grad():
        assert not qlinear(x, q).requires_grad


def test_second_derivative_is_refused():
    q = packed("nf4")
    x = torch.randn(M, K, requires_grad=True)
    (dx,) = torch.autograd.grad(qlinear(x, q).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_repeats_bit_for_bit(device):
    q, x = packed("nf4").to(device), torch.randn(65, K)
    A, B = torch.randn(R, K), torch.randn(N, R)

    def run():
        t = [v.to(device, copy=True).requires_grad_(True) for v in (x, A, B)]
        y = qlinear(t[0], q, None, t[1], t[2], dropout_p=0.1, seed=SEED.to(device))
        y.square().sum().backward()
        return [y, *(v.grad for v in t)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def compiled_like_eager(f, leaves, backend):
    """f(*leaves) and its gradients, compiled without a graph break, against eager."""
    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend=backend)):
        t = [v.clone().requires_grad_(v.is_floating_point()) for v in leaves]
        torch.manual_seed(1)
        y = g(*t)
        y.square().sum().backward()
        results.append([y, *(v.grad for v in t if v.requires_grad)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("format", ["dense", "nf4", "int8"])
def test_compiles_fullgraph(format, device):
    w = torch.randn(N, K).to(device) if format == "dense" else packed(format).to(device)
    sizes = ((2, M, K), (N,), (R, K), (N, R))
    leaves = [torch.randn(size, device=device) for size in sizes]

    def f(x, bias, A, B):
        return qlinear(x, w, bias, A, B, 0.5, dropout_p=0.2)

    compiled_like_eager(f, leaves, "aot_eager")


def test_bottleneck_compiles_fullgraph():
    leaves = [torch.randn(2, M, K), torch.randn(D, K), torch.randn(D), torch.randn(K, D)]

    def f(x, down, down_bias, up):
        return bottleneck(x, down, down_bias, up, None, "silu", 0.5, x)

    compiled_like_eager(f, leaves, "aot_eager")


def test_compiles_with_inductor():
    w = packed("nf4")
    leaves = [torch.randn(2, M, K), torch.randn(R, K), torch.randn(N, R)]

    def f(x, A, B):
        return qlinear(x * 2, w, None, A, B, 0.5)

    compiled_like_eager(f, leaves, "inductor")


def test_functional_refusals():
    q, x = packed("nf4"), torch.randn(M, K)
    with pytest.raises(fastpeft.ConfigError, match="lora_A, lora_B: got one of the two"):
        qlinear(x, q, lora_A=torch.randn(R, K))
    with pytest.raises(fastpeft.ConfigError, match=r"dropout_p: got 1.0, expected .*\[0, 1\)"):
        qlinear(x, q, dropout_p=1.0)
    with pytest.raises(fastpeft.StateError, match="weight: got a tensor with requires_grad=True"):
        qlinear(x, torch.randn(N, K, requires_grad=True))
    with pytest.raises(fastpeft.ConfigError, match="activation: got 'selu', expected one of relu"):
        bottleneck(x, torch.randn(D, K), None, torch.randn(K, D), None, "selu")
    with pytest.raises(fastpeft.ConfigError, match=rf"x: got .*81\], expected \[..., {K}\]"):
        qlinear(torch.randn(M, K + 1), q)
    with pytest.raises(RuntimeError, match=r"x: expected torch.float32.*got torch.int64"):
        qlinear(torch.ones(M, K, dtype=torch.int64), q)
