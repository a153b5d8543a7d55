"""Many adapters of several methods in one model: what they cost, how they switch, how they swap."""

from __future__ import annotations

import cProfile
import pstats

import fastpeft
import plug
import pytest
import tiny
import torch
from fastpeft import IA3, Bottleneck, LoRA, Prefix, Prompt
from fastpeft.attach import adapter_parameters
from fastpeft.errors import AdapterError, StateError
from tiny import one_thread  # noqa: F401
from torch import nn
from torch._dynamo.testing import CompileCounter

# name: (configuration, deviation of its random values)
SEVERAL = {
    "lora": (LoRA(r=4), 0.3),
    "wide": (LoRA(r=8, target_modules="all-linear", lora_bias=True), 0.1),
    "head": (LoRA(r=2, modules_to_save=["lm_head"]), 0.1),
    "prefix": (Prefix(num_virtual_tokens=3), 0.5),
    "mlp-prefix": (Prefix(num_virtual_tokens=2, projection=True, encoder_hidden_size=8), 0.5),
    "prompt": (Prompt(num_virtual_tokens=4), 0.5),
    "ia3": (IA3(), 0.5),
    "houlsby": (Bottleneck.houlsby(reduction_factor=8), 0.2),
    "parallel": (Bottleneck.parallel(reduction_factor=8), 0.2),
}
ORDERS = {"as listed": list(SEVERAL), "reversed": list(SEVERAL)[::-1]}


def full(order, format=None) -> nn.Module:
    """A model with all of SEVERAL attached in this order."""
    model = plug.build("llama", format)
    for name in order:
        config, std = SEVERAL[name]
        fastpeft.attach(model, config, name)
        seed = list(SEVERAL).index(name)
        tiny.shake(adapter_parameters(model, name).values(), std, seed)
    return model


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("format", [None, "nf4"])
def test_each_of_many_is_what_it_is_alone(order, format):
    """Whatever else is attached, and in whatever order it came."""
    model, alone, bare = full(ORDERS[order], format), {}, plug.build("llama", format)
    base = tiny.logits(bare)
    for name in SEVERAL:
        alone[name] = tiny.logits(full([name], format))
    for name in [*SEVERAL, *ORDERS["reversed"]]:
        fastpeft.activate(model, name)
        assert torch.equal(tiny.logits(model), alone[name]), name
    assert len({value.numpy().tobytes() for value in [base, *alone.values()]}) == len(SEVERAL) + 1
    fastpeft.activate(model, None)
    assert torch.equal(tiny.logits(model), base)
    fastpeft.activate(model, ["lora", "ia3", "prefix", "houlsby"])  # a list of several methods
    several = tiny.logits(model)
    other = full(["lora", "ia3", "prefix", "houlsby"], format)
    fastpeft.activate(other, ["lora", "ia3", "prefix", "houlsby"])
    assert torch.equal(tiny.logits(other), several)
    own = {id(p) for n in ("lora", "ia3", "prefix", "houlsby") for p in parameters(model, n)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_detached_in_any_order_the_base_is_back(format):
    model = plug.build("llama", format)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    print_, keys, base = tiny.fingerprint(model), set(vars(model)), tiny.logits(model)
    for name in ORDERS["as listed"]:
        fastpeft.attach(model, SEVERAL[name][0], name)
        tiny.shake(parameters(model, name))
    for name in ("prompt", "lora", "parallel", "head", "mlp-prefix", "ia3", "wide", "houlsby"):
        fastpeft.detach(model, name)
        assert name not in fastpeft.adapters(model)
        with fastpeft.disabled(model):
            assert torch.equal(tiny.logits(model), base), name
    assert list(fastpeft.adapters(model)) == ["prefix"]
    fastpeft.detach(model)
    assert torch.equal(tiny.logits(model), base)
    tiny.assert_same(print_, tiny.fingerprint(model))
    assert set(vars(model)) == keys


def parameters(model: nn.Module, name: str):
    return adapter_parameters(model, name).values()


@pytest.mark.parametrize("kind", ["lora", "wide", "ia3", "houlsby", "prefix", "prompt", "head"])
def test_the_50th_costs_what_the_first_cost(kind):
    """Counted in calls of Python functions, which no other process disturbs."""
    model, config = tiny.llama(layers=2), SEVERAL[kind][0]
    attach, switch, detach = [], [], []
    for index in range(50):
        attach.append(calls(fastpeft.attach, model, config, f"a{index}"))
        switch.append(calls(fastpeft.activate, model, "a0"))
    for index in range(49, 0, -1):
        detach.append(calls(fastpeft.detach, model, f"a{index}"))
    assert attach[49] <= 1.3 * attach[0], attach
    if (
        kind != "prefix"
    ):  # the pass that finds its start puts all modules, others' too, in eval mode
        assert attach[49] <= 1.05 * attach[1], attach  # the first one also wraps the layers
    assert switch[49] <= 1.05 * switch[1], switch
    assert detach[0] <= 1.2 * detach[-1], detach


def calls(function, *args) -> int:
    """How many Python functions a call calls."""
    profile = cProfile.Profile()
    profile.runcall(function, *args)
    return pstats.Stats(profile).total_calls


# ---- swap


def twins(format=None, **options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model with LoRAs "a" and "b" of one shape, "a" active, and the logits of both."""
    model = plug.build("llama", format)
    wanted = {}
    for seed, name in enumerate(("a", "b")):
        fastpeft.attach(model, LoRA(r=4, **options), name)
        tiny.shake(parameters(model, name), seed=seed)
        wanted[name] = tiny.logits(model)
    fastpeft.activate(model, "a")
    assert not torch.equal(wanted["a"], wanted["b"])
    return model, wanted


@pytest.mark.parametrize("way", ["folder", "state"])
def test_swap_plugs_other_values_in(tmp_path, way):
    model, wanted = twins("nf4", modules_to_save=["model.norm"])
    fastpeft.save_adapter(model, tmp_path / "b", "b")
    source = tmp_path / "b" if way == "folder" else fastpeft.adapter_state(model, "b")
    first = fastpeft.adapter_state(model, "a")
    fastpeft.detach(model, "b")
    tensors = {key: p.data_ptr() for key, p in adapter_parameters(model, "a").items()}
    flags = [p.requires_grad for p in model.parameters()]
    assert fastpeft.swap(model, "a", source) is model
    assert torch.equal(tiny.logits(model), wanted["b"])
    assert {key: p.data_ptr() for key, p in adapter_parameters(model, "a").items()} == tensors
    assert [p.requires_grad for p in model.parameters()] == flags
    fastpeft.swap(model, "a", first)  # the copies did not follow
    assert torch.equal(tiny.logits(model), wanted["a"])


@pytest.mark.parametrize("kind", ["prefix", "prompt", "ia3", "houlsby"])
def test_swap_of_other_methods(tmp_path, kind):
    config, std = SEVERAL[kind]
    model = plug.build("llama")
    for seed, name in enumerate(("a", "b")):
        fastpeft.attach(model, config, name)
        tiny.shake(parameters(model, name), std, seed)
    wanted = tiny.logits(model)
    fastpeft.save_adapter(model, tmp_path / "b", "b")
    fastpeft.activate(model, "a")
    assert not torch.equal(tiny.logits(model), wanted)
    fastpeft.swap(model, "a", tmp_path / "b")
    assert torch.equal(tiny.logits(model), wanted)


@pytest.mark.parametrize("format", [None, "nf4"])
def test_swap_does_not_compile_again(tmp_path, format):
    model, wanted = twins(format)
    fastpeft.save_adapter(model, tmp_path / "b", "b")
    first = fastpeft.adapter_state(model, "a")
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        assert_close(compiled(tiny.tokens()).logits, wanted["a"])
        count = counter.frame_count
        assert count > 0
        for source, name in ((tmp_path / "b", "b"), (first, "a"), (tmp_path / "b", "b")):
            fastpeft.swap(model, "a", source)
            assert_close(compiled(tiny.tokens()).logits, wanted[name])
            assert counter.frame_count == count
        fastpeft.activate(model, "b")  # other tensors: here the counter counts
        assert_close(compiled(tiny.tokens()).logits, wanted["b"])
        assert counter.frame_count > count
    torch._dynamo.reset()


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("format", [None, "nf4"])
def test_captured_graphs_replay_with_swapped_values(cuda, tmp_path, format):
    model, _ = twins(format)
    model.to(cuda, torch.bfloat16)
    text, wanted = tiny.tokens().to(cuda), {}
    for name in ("b", "a"):
        fastpeft.activate(model, name)
        wanted[name] = model(text, use_cache=False).logits.clone()
    fastpeft.save_adapter(model, tmp_path / "b", "b")
    first = {k: v.cpu() for k, v in fastpeft.adapter_state(model, "a").items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
        for _ in range(3):
            model(text, use_cache=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(text, use_cache=False).logits
    for source, name in ((first, "a"), (tmp_path / "b", "b"), (first, "a")):
        fastpeft.swap(model, "a", source)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(logits, wanted[name]), name
    assert not torch.equal(wanted["a"], wanted["b"])


def changed_folder(tmp_path, config) -> object:
    other = tiny.llama()
    fastpeft.attach(other, config)
    tiny.shake(parameters(other, "default"), seed=9)
    return fastpeft.save_adapter(other, tmp_path / "other")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoRA(r=4, lora_alpha=32), "lora_alpha: got 32, expected 16, as attached.*load_adapter"),
        (LoRA(r=4, use_rslora=True), "use_rslora: got True, expected False"),
        (LoRA(r=2), "r: got 2, expected 4"),
        (LoRA(r=4, rank_pattern={"0.self_attn.q_proj": 2}), "q_proj.*shape|shape.*q_proj"),
        (LoRA(r=4, target_modules=["q_proj"]), "missing keys"),
        (LoRA(r=4, target_modules=["q_proj", "k_proj", "v_proj"]), "unexpected keys"),
        (IA3(), "method ia3, expected lora, that of adapter 'a'"),
    ],
)
def test_swap_refuses_another_shape(tmp_path, config, words):
    model, wanted = twins()
    folder = changed_folder(tmp_path, config)
    with pytest.raises(AdapterError, match=words):
        fastpeft.swap(model, "a", folder)
    assert torch.equal(tiny.logits(model), wanted["a"])


def test_swap_refuses_bad_states():
    model, wanted = twins()
    state = fastpeft.adapter_state(model, "b")
    key = list(state)[-1]
    spoilt = {
        "missing keys": {k: v for k, v in state.items() if k != key},
        "unexpected keys": {**state, "more": torch.ones(2)},
        "NaN": {**state, key: state[key] * float("nan")},
        "shape": {**state, key: state[key].T.contiguous()},
    }
    for words, values in spoilt.items():
        with pytest.raises(AdapterError, match=words):
            fastpeft.swap(model, "a", values)
        assert torch.equal(tiny.logits(model), wanted["a"])
    with pytest.raises(AdapterError, match="'c'.*one of 'a', 'b'"):
        fastpeft.swap(model, "c", state)
    fastpeft.merge(model, "a")
    with pytest.raises(StateError, match="merged"):
        fastpeft.swap(model, "a", state)
