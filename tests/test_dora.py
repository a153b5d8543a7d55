"""DoRA: the closed form of its norms, its gradients, its files; on every base, plugged, merged."""

from __future__ import annotations

import copy

import fastpeft
import pytest
import tiny
import torch
from compare import assert_close
from fastpeft import Linear4bit, Linear8bit, LoRA, LoRALinear
from fastpeft.attach import adapter_parameters
from fastpeft.errors import ConfigError
from fastpeft.methods.lora_dora import gain
from plug import (
    FORMATS,
    assert_checkpoints,
    assert_round_trip,
    assert_trains_alone,
    assert_unplugs,
    build,
)
from test_io import assert_same_model, dequantised, load_peft, save_peft, shaken_peft
from tiny import one_thread  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore:target_modules. .* matches no module")

N, K, R = 48, 64, 4
BASES = {
    "dense": lambda linear: copy.deepcopy(linear),
    "nf4": Linear4bit.from_linear,
    "int8": lambda linear: Linear8bit.from_linear(linear, threshold=None),
    "llm.int8": lambda linear: Linear8bit.from_linear(linear, threshold=6.0),
}
DORA = LoRA(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)


def layer(base: str = "dense", dtype=torch.float32, **options) -> LoRALinear:
    """A DoRA layer that has left its start: B and the magnitudes are random."""
    torch.manual_seed(3)
    linear = BASES[base](nn.Linear(K, N).to(dtype))
    built = LoRALinear.from_linear(linear, r=R, lora_alpha=8, use_dora=True, **options)
    adapter = built.adapters["default"]
    with torch.no_grad():
        adapter.lora_B.weight.normal_(std=0.3)
        adapter.lora_magnitude_vector.mul_(torch.rand(N) + 0.5)
    return built


def weight(built: LoRALinear) -> torch.Tensor:
    """W [N, K], float64: exactly what is computed with."""
    base = built.base_layer
    return (base.weight if hasattr(base, "weight") else base.dequantize()).detach().double()


def formula(x, W, bias, A, B, m, scaling) -> torch.Tensor:
    """The paper's: rows of W + s B A at length m; the length is a constant to the gradient."""
    V = W + scaling * B @ A
    return x @ (V * (m / V.norm(dim=1).detach())[:, None]).T + bias


def leaves(built: LoRALinear) -> list[torch.Tensor]:
    adapter = built.adapters["default"]
    found = (adapter.lora_A.weight, adapter.lora_B.weight, adapter.lora_magnitude_vector)
    return [p.detach().double().requires_grad_() for p in found]


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formula(base, dtype):
    built = layer(base, dtype)
    x = torch.randn(2, 5, K).to(dtype)
    args = weight(built), built.bias.detach().double(), *leaves(built)
    exact = formula(x.double(), *args, 2.0)
    plain = formula(x, *(a.detach().to(dtype) for a in args), 2.0)
    assert_close(built(x), exact, plain)


@pytest.mark.parametrize("base", list(BASES))
def test_norms_in_closed_form(base):
    """Against the norms of W + s B A itself, int8 activations included: the norm has none."""
    built = layer(base)
    adapter = built.adapters["default"]
    A, B, m = leaves(built)
    exact = m / (weight(built) + 2.0 * B @ A).norm(dim=1)
    found = gain(adapter, built.base_layer, adapter.low_rank(), torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):  # not taken in bfloat16
        again = gain(adapter, built.base_layer, adapter.low_rank(), torch.float32)
    assert torch.equal(again, found)


def test_starts_as_the_base_and_a_zero_row_is_no_nan():
    linear = nn.Linear(K, N)
    linear.weight.data[3] = 0
    x = torch.randn(4, K)
    expected = linear(x)
    built = LoRALinear.from_linear(linear, r=R, use_dora=True)
    torch.testing.assert_close(built(x), expected, rtol=1e-6, atol=1e-6)
    built(x).square().sum().backward()
    for parameter in built.adapters.parameters():
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_gradients_in_float64(base):
    built = layer(base).double()
    assert built.adapters["default"].weight_sq.dtype == torch.float64
    x = torch.randn(6, K, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    own = leaves(built)
    W = built.base_layer.weight if base == "dense" else built.base_layer.dequantize(torch.float64)
    y = formula(twin, W.detach(), built.bias.detach(), *own, 2.0)
    dy = torch.randn_like(y)
    y.backward(dy)
    out = built(x)
    out.backward(dy)
    adapter = built.adapters["default"]
    torch.testing.assert_close(out, y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-11, atol=1e-11)
    ours = (adapter.lora_A.weight, adapter.lora_B.weight, adapter.lora_magnitude_vector)
    for parameter, expected in zip(ours, own, strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_compiles_whole(base):
    built, x = layer(base, lora_dropout=0.1).eval(), torch.randn(6, K)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    expected = built(x)
    torch.testing.assert_close(compiled(x), expected)
    expected.sum().backward()
    wanted = {k: p.grad.clone() for k, p in built.named_parameters() if p.grad is not None}
    assert len(wanted) == 3
    built.zero_grad()
    compiled(x).sum().backward()
    for key, gradient in wanted.items():
        torch.testing.assert_close(dict(built.named_parameters())[key].grad, gradient)


def test_dropout_only_on_the_branch():
    built = layer(lora_dropout=0.5)
    x = torch.randn(400, K)
    torch.manual_seed(0)
    mean = torch.stack([built(x[:1]) for _ in range(400)]).mean(0)
    exact = built.eval()(x[:1])
    assert not torch.equal(built.train()(x[:1]), exact)
    torch.testing.assert_close(mean, exact, rtol=0, atol=0.5)


# ---- the norm of W is remembered: whatever changes W must be noticed


def current(built: LoRALinear) -> bool:
    """Whether the remembered norms are those of the base's weight."""
    own = built.adapters["default"].weight_sq
    exact = weight(built).square().sum(1)
    return torch.allclose(own.double(), exact, rtol=1e-3 if own.dtype != torch.float32 else 1e-6)


def test_norms_follow_the_weight():
    built = layer()
    state = {**built.state_dict(), "base_layer.weight": torch.randn(N, K)}
    assert not any("weight_sq" in key for key in state)
    built.load_state_dict(state)
    assert current(built)
    built.base_layer = Linear4bit.from_linear(built.base_layer)
    assert current(built)
    built.to(torch.bfloat16)
    assert built.adapters["default"].weight_sq.dtype == torch.float32 and current(built)
    other = copy.deepcopy(built)
    assert current(other) and torch.equal(
        other(torch.ones(1, K).bfloat16()), built(torch.ones(1, K).bfloat16())
    )
    meta = layer().to("meta")
    meta.to_empty(device="cpu")
    meta.load_state_dict(layer().state_dict())
    x = torch.randn(3, K)
    assert current(meta) and torch.equal(meta(x), layer()(x))


@pytest.mark.parametrize("init", [True, False, "pissa"])
def test_order_of_quantising_does_not_matter(init):
    """An untrained adapter starts from the norms of the quantised weight; a trained one keeps its
    own."""
    results = []
    for first in (True, False):
        torch.manual_seed(4)
        linear = nn.Linear(K, N)
        options = {"r": R, "use_dora": True, "init_lora_weights": init}
        built = LoRALinear.from_linear(
            linear if first else Linear4bit.from_linear(linear), **options
        )
        if first:
            built.base_layer = Linear4bit.from_linear(linear)
        results.append(built.adapters["default"].lora_magnitude_vector)
    if init == "pissa":  # stands on the part of another weight, but g = 1 all the same
        x = torch.randn(3, K)
        torch.testing.assert_close(built(x), built.base_layer(x), rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(*results)
    trained = layer()
    before = trained.adapters["default"].lora_magnitude_vector.clone()
    trained.base_layer = Linear4bit.from_linear(trained.base_layer)
    assert torch.equal(trained.adapters["default"].lora_magnitude_vector, before)


def test_loftq_with_dora():
    torch.manual_seed(4)
    linear = nn.Linear(K, N)
    W = linear.weight.detach().clone()
    built = LoRALinear.from_linear(linear, r=16, use_dora=True, init_lora_weights="loftq")
    built.base_layer = Linear4bit.from_linear(linear)
    x = torch.eye(K)
    errors = [(f(x) - built.bias - W.T).norm() for f in (built, built.base_layer)]
    assert errors[0] < 0.8 * errors[1]


class Shapes(TorchDispatchMode):
    """Records the shape and dtype of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for found in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(found, torch.Tensor):
                self.seen.add((tuple(sorted(found.shape)), found.dtype))
        return result


@pytest.mark.parametrize("base", list(BASES))
def test_no_step_makes_a_matrix_of_the_weights_size(base):
    built = layer(base, torch.bfloat16)
    x = torch.randn(7, K, dtype=torch.bfloat16, requires_grad=True)
    with Shapes() as shapes:
        built(x).sum().backward()
    assert ((7, N), torch.bfloat16) in shapes.seen
    large = {dtype for shape, dtype in shapes.seen if shape == (N, K)}
    # a dense weight shows up as itself, detached or transposed
    assert large <= ({torch.bfloat16} if base == "dense" else {torch.int8}), shapes.seen


# ---- whole models


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_trains_alone(name, format):
    config = LoRA(r=4, use_dora=True, target_modules=None)
    assert_trains_alone(build(name, format), config, lr=0.02, least=0.01)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_file_and_unplugging(name, format, tmp_path):
    config = LoRA(r=4, use_dora=True)
    assert_unplugs(lambda: build(name, format), config)
    assert_round_trip(lambda: build(name, format), config, tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_checkpointing(format):
    config = LoRA(r=4, lora_dropout=0.2, use_dora=True)
    assert_checkpoints(lambda: build("llama", format), config)


OPTIONS = {
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "rslora": {"use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "use_dora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"c_proj": 3, "up_proj": 6},
        "alpha_pattern": {r".*\.0\..*": 16},
    },
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_peft_both_ways(name, options, tmp_path):
    model = tiny.MODELS[name]()
    fastpeft.attach(model, LoRA(r=4, lora_alpha=8, **options))
    tiny.shake(adapter_parameters(model, "default").values(), std=0.1)
    folder = fastpeft.save_adapter(model, tmp_path / "ours")
    assert_same_model(model, load_peft(name, folder))

    theirs = shaken_peft(name, options)
    save_peft(theirs, tmp_path / "theirs")
    model = tiny.MODELS[name]()
    fastpeft.load_adapter(model, tmp_path / "theirs")
    assert_same_model(model, theirs)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_peft_over_the_exact_dense_weights(format, tmp_path):
    model = tiny.llama()
    fastpeft.quantize(model, format, threshold=None)
    fastpeft.attach(model, DORA)
    tiny.shake(adapter_parameters(model, "default").values(), std=0.1)
    folder = fastpeft.save_adapter(model, tmp_path)
    assert_same_model(model, load_peft("llama", folder, dequantised(model, "llama")))


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one"), ("one", "three")])
def test_several_active_as_in_peft(order, tmp_path):
    """one, three: DoRA; two: LoRA. In peft too DoRA scales what stands before it."""
    model = tiny.llama()
    for index, name in enumerate(("one", "two", "three")):
        config = LoRA(r=2 + index, target_modules="all-linear", use_dora=name != "two")
        fastpeft.attach(model, config, name)
        tiny.shake(adapter_parameters(model, name).values(), std=0.1, seed=index)
        fastpeft.save_adapter(model, tmp_path / name, name)
    theirs = load_peft("llama", tmp_path / order[0])
    theirs.load_adapter(tmp_path / order[1], "second")
    theirs.base_model.set_adapter(["default", "second"])
    fastpeft.activate(model, order)
    assert_same_model(model, theirs.eval())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("format", FORMATS)
def test_merge_and_unmerge(name, format):
    model = build(name, format)
    fastpeft.attach(model, DORA)
    tiny.shake(adapter_parameters(model, "default").values(), std=0.1)
    wanted = tiny.logits(model)
    fastpeft.merge(model)
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=1e-4, atol=1e-4)
    fastpeft.unmerge(model)
    assert torch.equal(tiny.logits(model), wanted)


def test_refusals():
    with pytest.raises(ConfigError, match="lora_bias: got True with use_dora=True"):
        LoRA(use_dora=True, lora_bias=True)
    with pytest.raises(ConfigError, match="lora_bias: got True with use_dora=True"):
        LoRALinear.from_linear(nn.Linear(K, N), use_dora=True, lora_bias=True)
    with pytest.raises(ConfigError, match="use_dora: got 1"):
        LoRA(use_dora=1)
