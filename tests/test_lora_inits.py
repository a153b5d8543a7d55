"""Starts that look at the weight: PiSSA and OLoRA as peft computes them, with a base that never
changes; LoftQ when a layer is quantised."""

from __future__ import annotations

import json
import warnings

import fastpeft
import pytest
import tiny
import torch
from compare import assert_close
from fastpeft import Linear4bit, LoRA, LoRALinear
from fastpeft.attach import adapter_parameters
from fastpeft.errors import AdapterError, ConfigError, StateError
from fastpeft.io import tensors_of
from fastpeft.patterns import places
from peft import LoraConfig, PeftModel, get_peft_model
from plug import FORMATS, assert_checkpoints, assert_trains_alone, assert_unplugs, build, logits
from test_io import assert_same_model, dequantised, load_peft
from tiny import one_thread  # noqa: F401
from torch import nn

N, K, R = 40, 56, 6
ANCHORED = ["pissa", "pissa_niter_8", "olora"]
MODELS = ["llama", "gpt2", "bert", "t5"]


def layer(init, base: nn.Module | None = None, **options) -> LoRALinear:
    torch.manual_seed(1)
    base = base or nn.Linear(K, N)
    return LoRALinear.from_linear(base, r=R, lora_alpha=9, init_lora_weights=init, **options)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ANCHORED)
def test_start(init, use_rslora):
    """s B A is the leading part of W, and the output is the base's."""
    built, x = layer(init, use_rslora=use_rslora), torch.randn(5, K)
    adapter, W = built.adapters["default"], built.base_layer.weight.detach()
    part = adapter.lora_B.weight.detach() @ adapter.lora_A.weight.detach() * adapter.scaling
    if init == "olora":
        Q, triangle = torch.linalg.qr(W)
        expected = Q[:, :R] @ triangle[:R] * adapter.scaling
    else:
        U, S, Vh = torch.linalg.svd(W)
        expected = U[:, :R] * S[:R] @ Vh[:R]
        assert torch.allclose(adapter.lora_B.weight.norm(dim=0), adapter.lora_A.weight.norm(dim=1))
    if "niter" in init:  # random, and near the best of that rank
        assert (W - part).norm() < 1.02 * (W - expected).norm() < 0.9 * W.norm()
    else:
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(built(x), built.base_layer(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(built.base_layer.weight, W)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_trains_as_in_peft(name, init):
    """peft takes the part out of the base's weight, we do not: the same logits, gradients and
    losses, step by step."""
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=init)
    ours = fastpeft.attach(tiny.MODELS[name](), LoRA(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(tiny.MODELS[name](), LoraConfig(**options)).eval()
    losses = []
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=3.0)
        losses.append([])
        for _ in range(8):
            value = tiny.loss(model)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses[-1].append(value.item())
    assert losses[0][-1] < losses[0][0] - 0.05
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-4, atol=0)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("init", ANCHORED)
def test_trains_alone_and_unplugs(init, format):
    config = LoRA(r=4, init_lora_weights=init)
    assert_trains_alone(build("llama", format), config, lr=0.01, least=0.01)
    assert_unplugs(lambda: build("llama", format), config)


@pytest.mark.parametrize("name", MODELS)
def test_other_architectures(name):
    assert_unplugs(lambda: build(name, "nf4"), LoRA(r=4, init_lora_weights="pissa"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_checkpointing(init):
    config = LoRA(r=4, init_lora_weights=init, lora_dropout=0.1)
    assert_checkpoints(lambda: build("llama"), config, std=0)


FILES = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora-rslora": {"init_lora_weights": "olora", "use_rslora": True},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa-patterns": {
        "init_lora_weights": "pissa",
        "rank_pattern": {"up_proj": 6, "c_fc": 3},
        "alpha_pattern": {r".*\.0\..*": 20},
    },
    "olora-patterns-rslora": {
        "init_lora_weights": "olora",
        "use_rslora": True,
        "rank_pattern": {"up_proj": 6, "c_fc": 3},
        "alpha_pattern": {r".*\.0\..*": 20},
    },
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", FILES.values(), ids=list(FILES))
def test_file_is_a_plain_lora(name, options, tmp_path):
    """Of twice the rank, over the base as it is: for peft and for us."""
    config = LoRA(r=4, lora_alpha=8, target_modules="all-linear", **options)
    model = fastpeft.attach(tiny.MODELS[name](), config)
    tiny.shake(adapter_parameters(model, "default").values(), std=0.1)
    folder = fastpeft.save_adapter(model, tmp_path)
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert raw["r"] == 8 and raw["init_lora_weights"] is True
    merged, theirs = load_peft(name, folder), load_peft(name, folder)
    merged.merge_adapter()  # a second order of summation as a yardstick
    plain = [logits(theirs), logits(merged)]
    assert_close(logits(model), logits(theirs.double()), plain)
    again = fastpeft.load_adapter(tiny.MODELS[name](), folder)
    assert torch.equal(logits(again), logits(model))


def test_file_over_a_quantised_base(tmp_path):
    model = tiny.llama()
    fastpeft.quantize(model, "nf4")
    fastpeft.attach(model, LoRA(r=4, init_lora_weights="pissa", target_modules="all-linear"))
    tiny.shake(adapter_parameters(model, "default").values(), std=0.1)
    folder = fastpeft.save_adapter(model, tmp_path)
    assert_same_model(model, load_peft("llama", folder, dequantised(model, "llama")))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_merge(init, format):
    model = build("llama", format)
    fastpeft.attach(model, LoRA(r=4, init_lora_weights=init, target_modules="all-linear"))
    tiny.shake(adapter_parameters(model, "default").values(), std=0.1)
    wanted = logits(model)
    fastpeft.merge(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    fastpeft.unmerge(model)
    assert torch.equal(logits(model), wanted)


def test_anchor_is_in_the_state_dict():
    built = layer("pissa")
    other = LoRALinear.from_linear(nn.Linear(K, N), r=R, lora_alpha=9, init_lora_weights="olora")
    other.load_state_dict(built.state_dict())
    x = torch.randn(3, K)
    tiny.shake(built.adapters.parameters(), seed=2)
    tiny.shake(other.adapters.parameters(), seed=2)
    assert torch.equal(built(x), other(x))


def test_compiles_whole():
    built, x = layer("pissa", use_dora=True), torch.randn(3, K)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), built(x))


# ---- LoftQ


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_loftq_is_the_best_of_its_rank(format, use_rslora):
    """After quantize, s B A is the nearest matrix of rank r to what quantising took."""
    model = nn.Sequential(nn.Linear(K, N))
    W = model[0].weight.detach().clone()
    config = LoRA(r=R, target_modules=["0"], init_lora_weights="loftq", use_rslora=use_rslora)
    fastpeft.attach(model, config)
    assert torch.equal(model(torch.eye(K)), nn.functional.linear(torch.eye(K), W, model[0].bias))
    fastpeft.quantize(model, format)
    packed = model[0].base_layer.dequantize()
    lost = (W - packed).double()
    found = model[0].adapters["default"].delta().double()
    left = torch.linalg.svdvals(lost)[R:].square().sum().sqrt()
    torch.testing.assert_close((lost - found).norm(), left, rtol=1e-4, atol=1e-7)
    assert left < lost.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loftq_brings_the_model_nearer(name, tmp_path):
    exact = logits(tiny.MODELS[name]())
    plain = tiny.MODELS[name]()
    fastpeft.quantize(plain)
    model = tiny.MODELS[name]()
    config = LoRA(r=16, target_modules="all-linear", init_lora_weights="loftq")
    fastpeft.attach(model, config)
    fastpeft.quantize(model)
    started = logits(model)
    assert (started - exact).norm() < 0.8 * (logits(plain) - exact).norm()
    with fastpeft.disabled(model):
        assert torch.equal(logits(model), logits(plain))
    folder = fastpeft.save_adapter(model, tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert_same_model(model, load_peft(name, folder, dequantised(model, name)))
    fastpeft.load_adapter(plain, folder)
    assert torch.equal(logits(plain), started)
    fastpeft.detach(model)
    fastpeft.detach(plain)
    assert torch.equal(logits(model), logits(plain))


def test_loftq_leaves_a_trained_adapter_alone():
    built = layer("loftq")
    tiny.shake(built.adapters.parameters())
    before = built.adapters["default"].delta()
    built.base_layer = Linear4bit.from_linear(built.base_layer)
    assert torch.equal(built.adapters["default"].delta(), before)


def test_loftq_trains_alone():
    model = tiny.llama()
    fastpeft.attach(model, LoRA(r=4, init_lora_weights="loftq"))
    fastpeft.quantize(model)
    started = {k: v.clone() for k, v in tensors_of(model, "default").items()}
    assert any(value.any() for key, value in started.items() if "lora_B" in key)
    optimizer = torch.optim.AdamW(fastpeft.param_groups(model, lr=0.01))
    losses = []
    for _ in range(20):
        value = tiny.loss(model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.01
    assert all(not torch.equal(v, started[k]) for k, v in tensors_of(model, "default").items())


@pytest.mark.parametrize("use_dora", [False, True])
def test_loftq_over_a_quantised_model(use_dora):
    """From the dense weights afterwards: the same start as attaching before quantising."""
    weights = {k: v.clone() for k, v in tiny.llama().state_dict().items()}
    options = {"r": 8, "target_modules": "all-linear", "use_dora": use_dora}
    first = fastpeft.attach(tiny.llama(), LoRA(init_lora_weights="loftq", **options))
    fastpeft.quantize(first)
    model = tiny.llama()
    fastpeft.quantize(model)
    fastpeft.attach(model, LoRA(**options))
    plain = logits(model)
    key = "model.layers.1.mlp.up_proj.weight"
    for wrong in ({k: v for k, v in weights.items() if k != key}, {**weights, key: weights[key].T}):
        with pytest.raises(AdapterError, match=f"weights\\['{key}'\\]: got .*expected the dense"):
            fastpeft.loftq(model, wrong)
        assert torch.equal(logits(model), plain)
    assert len(fastpeft.loftq(model, weights)) == 14
    assert torch.equal(logits(model), logits(first)) and not torch.equal(logits(model), plain)
    with pytest.raises(StateError, match="got one that was trained"):
        fastpeft.loftq(model, weights)
    with pytest.raises(StateError, match="got no LoRA on a quantised layer"):
        fastpeft.loftq(fastpeft.attach(tiny.llama(), LoRA()), weights)


# ---- refusals


def test_refusals():
    with pytest.raises(ConfigError, match="'loftq' over a quantised layer.*Attach first"):
        layer("loftq", Linear4bit(K, N))
    with pytest.raises(ConfigError, match=f"r: got {N + 1}, expected at most min.* = {N}"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LoRALinear.from_linear(nn.Linear(K, N), r=N + 1, init_lora_weights="olora")
    for word in ("pissa_niter_", "pissa_niter_x", "corda", None, 3):
        with pytest.raises(ConfigError, match="init_lora_weights: got"):
            LoRA(init_lora_weights=word)
    model = tiny.llama()
    before = tiny.fingerprint(model)
    with pytest.raises(ConfigError, match="'loftq' over a quantised"):
        fastpeft.quantize(model)
        before = tiny.fingerprint(model)
        fastpeft.attach(model, LoRA(init_lora_weights="loftq"))
    tiny.assert_same(before, tiny.fingerprint(model))


def test_swap_refuses_what_has_no_parameters_of_its_own():
    from fastpeft.swap import adapter_state, swap

    model = tiny.llama()
    fastpeft.attach(model, LoRA(r=4, init_lora_weights="pissa"))
    state = adapter_state(model)
    before = logits(model)
    with pytest.raises(StateError, match="stands on a part of the base's weight"):
        swap(model, "default", state)
    assert torch.equal(logits(model), before)


def test_peft_reads_no_more_than_the_file(tmp_path):
    """A PiSSA adapter of ours over a base that peft leaves as it is."""
    model = tiny.llama()
    fastpeft.attach(model, LoRA(r=4, init_lora_weights="pissa"))
    folder = fastpeft.save_adapter(model, tmp_path)
    base = tiny.llama()
    weights = {p.name: p.module.weight.clone() for p in places(base) if p.name.endswith("q_proj")}
    theirs = PeftModel.from_pretrained(base, folder)
    for name, weight in weights.items():
        kept = theirs.get_base_model().get_submodule(name).base_layer.weight
        assert torch.equal(kept, weight)
