"""LoRALinear and QLoRALinear: formula, several adapters, switching, merging, copies; options."""

from __future__ import annotations

import copy
import math

import fastpeft
import pytest
import torch
from fastpeft import Linear4bit, Linear8bit, LoRAAdapter, LoRALinear, QLoRALinear
from torch import nn
from torch.nn import functional as F

K, N, R = 96, 64, 4
BASES = {
    "dense": lambda m: m,
    "nf4": lambda m: Linear4bit.from_linear(m),
    "int8": lambda m: Linear8bit.from_linear(m, threshold=None),
}


@pytest.fixture(params=list(BASES))
def base(request):
    return BASES[request.param](nn.Linear(K, N))


def wrapped(base, **options) -> LoRALinear:
    """One active adapter with both factors random."""
    return LoRALinear.from_linear(base, r=R, init_lora_weights=False, **options)


def exact_weight(base, dtype=torch.float64) -> torch.Tensor:
    return base.dequantize(dtype) if hasattr(base, "dequantize") else base.weight.detach().to(dtype)


def formula(layer, x, names) -> torch.Tensor:
    """In float64: the base plus every adapter's branch, without dropout."""
    y = x.double() @ exact_weight(layer.base_layer).t() + layer.base_layer.bias.double()
    for name in names:
        a = layer.adapters[name]
        y = y + a.scaling * (
            x.double() @ a.lora_A.weight.double().t() @ a.lora_B.weight.double().t()
        )
    return y.detach()


def close(y, exact, steps=1.0) -> None:
    limit = steps * {torch.bfloat16: 0.02, torch.float16: 0.003}.get(y.dtype, 2e-6)
    assert (y.double() - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_formula(base, dtype, lora_dtype, device):
    layer = wrapped(base, lora_alpha=6, dtype=lora_dtype).to(device)
    x = torch.randn(2, 5, K, dtype=dtype, device=device)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 5, N)
    close(y, formula(layer, x, ["default"]))


def test_first_output_is_the_base(base):
    x = torch.randn(7, K)
    before = base(x)
    for init in (True, "gaussian"):
        layer = LoRALinear.from_linear(base, r=R, init_lora_weights=init)
        assert layer.lora_A.weight.abs().max() > 0 and layer.lora_B.weight.abs().max() == 0
        torch.testing.assert_close(layer(x), before)


def test_bare_base_bit_for_bit(base):
    x = torch.randn(7, K)
    before = base(x)
    layer = wrapped(base)
    assert not torch.equal(layer(x), before)
    layer.set_active(())
    assert torch.equal(layer(x), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), base(x)) and layer(x).dtype == torch.bfloat16
    layer.set_active("default")
    layer.remove_adapter("default")
    assert layer.active == () and torch.equal(layer(x), before)


def test_initialisation():
    adapter = LoRAAdapter(400, 300, r=16)
    bound = math.sqrt(1 / 400)  # Kaiming-uniform with a = sqrt 5
    A = adapter.lora_A.weight
    assert A.shape == (16, 400) and A.dtype == torch.float32
    assert 0.95 * bound < A.abs().max() <= bound and abs(A.mean()) < 0.05 * bound
    gaussian = LoRAAdapter(400, 300, r=16, init_lora_weights="gaussian").lora_A.weight
    assert abs(gaussian.std() * 16 - 1) < 0.05
    both = LoRAAdapter(400, 300, r=16, init_lora_weights=False)
    assert both.lora_B.weight.abs().max() > 0
    assert adapter.scaling == 1.0 and LoRAAdapter(4, 4, 4, 6).scaling == 1.5
    assert LoRAAdapter(4, 4, 4, 6, use_rslora=True).scaling == 3.0


def test_gradients_reach_the_adapter_alone(base):
    layer = wrapped(base, lora_alpha=6)
    x = torch.randn(2, 5, K, requires_grad=True)
    dy = torch.randn(2, 5, N)
    layer(x).backward(dy)
    trained = [n for n, p in layer.named_parameters() if p.grad is not None]
    assert trained == ["adapters.default.lora_A.weight", "adapters.default.lora_B.weight"]
    A, B = (
        t.detach().double().requires_grad_() for t in (layer.lora_A.weight, layer.lora_B.weight)
    )
    x2 = x.detach().double().requires_grad_()
    y = x2 @ exact_weight(base).t() + layer.adapters["default"].scaling * (x2 @ A.t() @ B.t())
    y.backward(dy.double())
    for got, exact in ((x, x2), (layer.lora_A.weight, A), (layer.lora_B.weight, B)):
        close(got.grad, exact.grad)


def test_bias_trains_when_asked(base):
    layer = wrapped(base)
    layer.bias.requires_grad_(True)
    dy = torch.randn(3, N)
    layer(torch.randn(3, K)).backward(dy)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))


def test_trainable_dense_base_gets_its_gradient():
    """Freezing is the rule; whoever unfreezes a dense weight gets the right gradient, not none."""
    layer = wrapped(nn.Linear(K, N))
    layer.base_layer.weight.requires_grad_(True)
    x, dy = torch.randn(3, K), torch.randn(3, N)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.base_layer.weight.grad, dy.t() @ x)
    assert layer.lora_A.weight.grad.abs().max() > 0


def test_several_adapters(base):
    layer = wrapped(base, name="a")
    layer.add_adapter("b", r=2, lora_alpha=3, init_lora_weights=False)
    layer.add_adapter("c", r=8, use_rslora=True, init_lora_weights=False)
    assert layer.active == ("a",)
    x = torch.randn(5, K)
    for names in (("a",), ("b",), ("c", "a"), ("b", "c", "a")):
        layer.set_active(names)
        assert layer.active == names
        close(layer(x), formula(layer, x, names), 2)
    layer(x).sum().backward()
    assert all(a.lora_B.weight.grad is not None for a in layer.adapters.values())
    layer.remove_adapter("c")
    assert layer.active == ("b", "a") and list(layer.adapters) == ["a", "b"]


def test_single_adapter_properties():
    layer = wrapped(nn.Linear(K, N), name="a")
    assert layer.lora_A.weight.shape == (R, K) and layer.lora_B.weight.shape == (N, R)
    layer.add_adapter("b", r=2)
    layer.set_active("b")
    assert layer.lora_A.weight.shape == (2, K)
    layer.set_active(("a", "b"))
    with pytest.raises(
        fastpeft.StateError, match=r"2 active of \['a', 'b'\], expected exactly one"
    ):
        _ = layer.lora_A
    assert layer.in_features == K and layer.weight is layer.base_layer.weight
    quantised = wrapped(Linear4bit(K, N))
    with pytest.raises(AttributeError, match="Linear4bit has no `weight`"):
        _ = quantised.weight


def test_lora_bias(base):
    layer = wrapped(base, lora_bias=True, lora_alpha=6)
    x = torch.randn(5, K)
    y = layer(x).detach()
    with torch.no_grad():
        layer.lora_B.bias.copy_(torch.randn(N))
    scaling = layer.adapters["default"].scaling
    torch.testing.assert_close(layer(x), y + scaling * layer.lora_B.bias)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.lora_B.bias.grad, torch.full((N,), 5 * scaling))
    y = layer(x)
    layer.eval().merge("default")
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def test_dropout_only_while_training(base):
    layer = wrapped(base, lora_dropout=0.5)
    x = torch.randn(50, K)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    layer.eval()
    state = torch.get_rng_state()
    close(layer(x), formula(layer, x, ["default"]))
    assert torch.equal(torch.get_rng_state(), state)  # no seed is drawn without dropout
    layer.train()
    mean = torch.stack([layer(x).detach() for _ in range(400)]).mean(0)
    spread = (first - formula(layer, x, ["default"])).abs().max()
    assert (mean - formula(layer, x, ["default"])).abs().max() < 0.3 * spread


def test_autocast(base):
    layer = wrapped(base)
    x = torch.randn(5, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.lora_A.weight.grad.dtype == torch.float32
    close(y, formula(layer, x, ["default"]))


def test_dense_base_of_another_dtype():
    """A bfloat16 base takes float32 inputs (layer norms often give them): the weight is cast."""
    base = nn.Linear(K, N).bfloat16()
    layer = wrapped(base)
    x = torch.randn(5, K)
    assert layer(x).dtype == torch.float32
    close(layer(x), formula(layer, x, ["default"]))
    layer.set_active(())
    assert layer(x).dtype == torch.float32


def test_merge_and_unmerge(base, device):
    layer = wrapped(base, lora_alpha=6, name="a").eval().to(device)
    layer.add_adapter("b", r=2, init_lora_weights=False)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(5, K, device=device)
    y, sum_of_both = layer(x), formula(layer, x, ["a", "b"])
    assert layer.merge("a") < 1e-6
    assert layer.merged == ("a",) and isinstance(layer.base_layer, nn.Linear)
    assert layer.base_layer.weight.dtype == torch.float32
    assert not layer.base_layer.weight.requires_grad
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    exact = exact_weight(base) + layer.adapters["a"].delta().double()
    close(layer.base_layer.weight, exact)
    layer.unmerge()
    assert layer.base_layer is base and layer.merged == ()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.equal(layer(x), y)
    layer.merge(("a", "b"))
    close(layer(x), sum_of_both, 2)
    layer.unmerge()
    assert torch.equal(layer(x), y)


def test_merge_dtype_and_error():
    layer = wrapped(nn.Linear(K, N).bfloat16()).eval()
    error = layer.merge("default")
    assert layer.base_layer.weight.dtype == torch.bfloat16 and 1e-4 < error < 4e-3
    layer.unmerge()
    assert layer.merge("default", dtype=torch.float32) < 1e-7
    assert layer.base_layer.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merge_requantised_reports_its_error(kind):
    base = BASES[kind](nn.Linear(K, N))
    layer = wrapped(base).eval()
    exact = exact_weight(base, torch.float32) + layer.adapters["default"].delta()
    error = layer.merge("default", requantize=True)
    merged = layer.base_layer
    assert type(merged) is type(base) and merged.format == base.format
    difference = (merged.dequantize(torch.float32) - exact).norm() / exact.norm()
    assert error == pytest.approx(float(difference)) and error > 1e-3
    layer.unmerge()
    assert layer.base_layer is base


def test_merged_base_follows_casts():
    layer = wrapped(nn.Linear(K, N)).eval()
    layer.merge("default")
    layer.bfloat16().unmerge()
    assert layer.base_layer.weight.dtype == torch.bfloat16


def test_refused_while_merged():
    layer = wrapped(Linear4bit(K, N))
    layer.merge("default")
    x = torch.randn(2, K)
    for call, what in (
        (lambda: layer.merge("default"), "merge into"),
        (lambda: layer.add_adapter("b"), "add an adapter to"),
        (lambda: layer.remove_adapter("default"), "remove an adapter from"),
        (lambda: layer.set_active(()), "activate adapters of"),
        (lambda: layer(x), "train"),
    ):
        with pytest.raises(
            fastpeft.StateError, match=f"a call to {what} a layer with .*Call unmer"
        ):
            call()
    with torch.no_grad():
        assert layer(x).shape == (2, N)
    assert layer.eval()(x).shape == (2, N)
    layer.unmerge()
    with pytest.raises(fastpeft.StateError, match=r"got unmerge\(\) of an unmerged layer"):
        layer.unmerge()
    with pytest.raises(fastpeft.StateError, match="requantize: got a dense base"):
        wrapped(nn.Linear(K, N)).merge("default", requantize=True)
    assert layer.merged == ()


def test_qlora_linear_constructors():
    dense = nn.Linear(K, N)
    x = torch.randn(3, K)
    made = QLoRALinear.from_linear(dense, r=R, lora_alpha=8, lora_dropout=0.05, format="nf4")
    assert isinstance(made, LoRALinear) and made.base_layer.format == "nf4"
    assert torch.equal(made.base_layer(x), Linear4bit.from_linear(dense)(x))
    assert dense.weight.requires_grad  # the source is not touched
    eight = QLoRALinear.from_linear(dense, format="int8", threshold=0)
    assert eight.base_layer.threshold == 0.0
    layer = QLoRALinear(
        K, N, bias=False, r=2, blocksize=32, double_quant=False, dtype=torch.float16
    )
    assert layer.bias is None and layer.base_layer.weight_dtype == torch.float16
    assert layer.base_layer.blocksize == 32 and layer.lora_A.weight.dtype == torch.float32
    assert QLoRALinear(K, N, format="int8", lora_dtype=torch.bfloat16)(x).shape == (3, N)
    meta = QLoRALinear(K, N, device="meta")
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    state = QLoRALinear(K, N).state_dict()
    meta.load_state_dict(state, assign=True)
    assert meta(x).shape == (3, N)
    for piece in ("active=['default']", "r=8", "lora_alpha=16", "format=nf4", "bytes="):
        assert piece in repr(meta)


def test_copies_and_state_dict(base):
    layer = wrapped(base)
    layer.add_adapter("b", r=2, init_lora_weights=False)
    x = torch.randn(3, K)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.lora_B.weight.zero_()
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    layer.merge("default")
    merged = copy.deepcopy(layer).eval()
    assert torch.equal(merged(x), layer.eval()(x))
    merged.unmerge()
    assert merged.base_layer is not base and torch.equal(merged(x), other.eval()(x))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_compiles_fullgraph_with_dropout(kind):
    layer = LoRALinear.from_linear(
        BASES[kind](nn.Linear(K, N)), r=R, lora_dropout=0.3, init_lora_weights=False
    )
    layer.add_adapter("b", r=2, lora_dropout=0.3, init_lora_weights=False)
    layer.set_active(("default", "b"))
    x = torch.randn(2, 5, K, requires_grad=True)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        y = run(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert len(results[0]) == 6
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_training_lowers_the_loss():
    """The purpose: with the 4-bit base frozen the adapter learns a low-rank change."""
    torch.manual_seed(0)
    dense = nn.Linear(K, N)
    layer = QLoRALinear.from_linear(dense, r=R, lora_alpha=R)
    change = torch.randn(N, 2) @ torch.randn(2, K) * 0.05
    x = torch.randn(256, K)
    target = layer.base_layer(x) + x @ change.t()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(150):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
