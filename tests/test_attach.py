"""attach, detach, activate, disabled: plugged in it trains alone, unplugged the model is what it
was.
"""

from __future__ import annotations

import copy

import fastpeft
import pytest
import tiny
import torch
from fastpeft import LoRA
from fastpeft.attach import adapter_parameters, state_of
from fastpeft.errors import AdapterError, ConfigError, StateError
from fastpeft.report import missing_gradients
from tiny import one_thread  # noqa: F401
from torch import nn

FORMATS = [None, "nf4", "int8"]


def build(name: str, format: str | None = None) -> nn.Module:
    model = tiny.MODELS[name]()
    if format:
        fastpeft.quantize(model, format, threshold=None)
    return model


def lora(**kwargs) -> LoRA:
    return LoRA(**{"r": 4, "target_modules": "all-linear", **kwargs})


def final_norm(name: str) -> list[str]:
    return ["ln_f" if name == "gpt2" else "model.norm"]


@pytest.fixture(params=list(tiny.MODELS))
def name(request) -> str:
    return request.param


# ---- plug and unplug


@pytest.mark.parametrize("format", FORMATS)
def test_detach_leaves_no_trace(name, format):
    model = build(name, format)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)  # a mix that has to come back
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    before, logits, keys = tiny.fingerprint(model), tiny.logits(model), set(vars(model))
    fastpeft.attach(model, lora(), "a")
    fastpeft.attach(model, lora(r=2, target_modules=r".*\.(v_proj|c_attn)"), "b")
    tiny.shake(adapter_parameters(model, "a").values())
    tiny.shake(adapter_parameters(model, "b").values())
    assert not torch.equal(tiny.logits(model), logits)
    fastpeft.detach(model, "a")
    assert list(fastpeft.adapters(model)) == ["b"]
    assert not torch.equal(tiny.logits(model), logits)
    fastpeft.detach(model)
    tiny.assert_same(before, tiny.fingerprint(model))
    assert torch.equal(tiny.logits(model), logits)
    assert set(vars(model)) == keys
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize("format", FORMATS)
def test_disabled_and_activate_none_are_the_bare_base(name, format):
    model = build(name, format)
    logits = tiny.logits(model)
    fastpeft.attach(model, lora(modules_to_save=final_norm(name)))
    tiny.shake(adapter_parameters(model, "default").values())
    changed = tiny.logits(model)
    flags = [p.requires_grad for p in model.parameters()]
    with fastpeft.disabled(model):
        assert fastpeft.adapters(model).active == ()
        assert torch.equal(tiny.logits(model), logits)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(tiny.logits(model), changed) and not torch.equal(changed, logits)
    fastpeft.activate(model, None)
    assert torch.equal(tiny.logits(model), logits)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("format", FORMATS)
def test_only_the_adapter_trains(name, format):
    model = build(name, format).train()
    fastpeft.attach(model, lora())
    trained = {id(p) for p in adapter_parameters(model, "default").values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if id(p) not in trained}
    packed = {k: b.clone() for k, b in model.named_buffers()}
    optimizer = torch.optim.AdamW(fastpeft.param_groups(model, lr=1e-2))
    losses = []
    for _ in range(8):
        value = tiny.loss(model)
        optimizer.zero_grad()
        value.backward()
        assert missing_gradients(model) == []
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.1, losses
    named = dict(model.named_parameters())
    assert all(torch.equal(value, named[key]) for key, value in frozen.items())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in packed.items())


def test_new_adapter_changes_nothing_yet(name):
    model = build(name)
    logits = tiny.logits(model)
    fastpeft.attach(model, lora())
    torch.testing.assert_close(tiny.logits(model), logits, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_order_of_quantize_and_attach_does_not_matter(name, format):
    first, second = tiny.MODELS[name](), tiny.MODELS[name]()
    config = lora(init_lora_weights=False)
    fastpeft.quantize(first, format)
    torch.manual_seed(1)
    fastpeft.attach(first, config)
    torch.manual_seed(1)
    fastpeft.attach(second, config)
    fastpeft.quantize(second, format)
    left, right = first.state_dict(), second.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert [type(m) for m in first.modules()] == [type(m) for m in second.modules()]
    flags = [(k, p.requires_grad) for k, p in first.named_parameters()]
    assert flags == [(k, p.requires_grad) for k, p in second.named_parameters()]
    assert torch.equal(tiny.logits(first), tiny.logits(second))
    fastpeft.detach(second)  # the dense base is gone for good, the quantised one stays
    fastpeft.detach(first)
    assert torch.equal(tiny.logits(first), tiny.logits(second))


def test_a_copy_is_its_own_model(name):
    model = build(name, "nf4")
    bare = tiny.logits(model)
    fastpeft.attach(model, lora(init_lora_weights=False, modules_to_save=final_norm(name)), "a")
    logits = tiny.logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.logits(twin), logits)
    tiny.shake(adapter_parameters(twin, "a").values())
    assert torch.equal(tiny.logits(model), logits)
    fastpeft.detach(twin)
    assert state_of(twin) is None and list(fastpeft.adapters(model)) == ["a"]
    assert torch.equal(tiny.logits(twin), bare) and torch.equal(tiny.logits(model), logits)


# ---- several


def test_activate_one_or_a_list():
    """Two LoRAs on one layer: the branches add up, in any selection."""
    layer = nn.Sequential(nn.Linear(32, 24))
    x = torch.randn(5, 32)
    bare = layer(x)
    outputs = {}
    for name, rank in (("a", 2), ("b", 4)):
        fastpeft.attach(layer, LoRA(r=rank, target_modules=["0"], init_lora_weights=False), name)
        assert fastpeft.adapters(layer).active == (name,)
        outputs[name] = layer(x)
    fastpeft.activate(layer, ["a", "b"])
    both = layer(x)
    expected = outputs["a"].double() + outputs["b"].double() - bare.double()
    torch.testing.assert_close(both.double(), expected, atol=2e-6, rtol=0)
    assert sum(p.requires_grad for p in layer.parameters()) == 4
    fastpeft.activate(layer, "a")
    assert torch.equal(layer(x), outputs["a"])
    assert {k for k, p in layer.named_parameters() if p.requires_grad} == {
        "0.adapters.a.lora_A.weight",
        "0.adapters.a.lora_B.weight",
    }
    assert "* a: LoRA(" in repr(fastpeft.adapters(layer))
    assert "  b: LoRA(" in repr(fastpeft.adapters(layer))


def test_untrainable_adapter_takes_part_without_gradients():
    model = build("llama")
    bare = tiny.logits(model)
    fastpeft.attach(model, lora(init_lora_weights=False), trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert not torch.equal(tiny.logits(model), bare)


def test_modules_to_save_train_as_copies():
    model = build("llama-tied").train()
    before = tiny.fingerprint(model)
    fastpeft.attach(model, lora(modules_to_save=["lm_head", "norm"]), "a")
    parameters = adapter_parameters(model, "a")
    saved = [k for k in parameters if ".lora_" not in k]
    assert saved[-1] == "lm_head.weight" and len(saved) == 6, saved
    assert parameters["lm_head.weight"] is not model.get_input_embeddings().weight
    tiny.loss(model).backward()
    assert missing_gradients(model) == []
    with torch.no_grad():
        parameters["lm_head.weight"].add_(1.0)
    fastpeft.attach(model, lora(modules_to_save=["lm_head"]), "b")
    with pytest.raises(StateError, match=r"'lm_head'.*copies of adapters a, b.*one active copy"):
        fastpeft.activate(model, ["a", "b"])
    assert fastpeft.adapters(model).active == ("b",)
    fastpeft.detach(model, "a")
    fastpeft.detach(model, "b")
    tiny.assert_same(before, tiny.fingerprint(model))


# ---- gradient checkpointing


def gradients(model: nn.Module, reentrant: bool | None) -> dict[str, torch.Tensor]:
    model.train()
    if reentrant is not None:
        tiny.checkpoint_activations(model, reentrant)
        model.disable_input_require_grads()  # older versions do not set it: ours must do alone
    torch.manual_seed(11)
    tiny.loss(model).backward()
    assert missing_gradients(model) == []
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_with_both_kinds_of_checkpointing(name, format, dropout):
    model = build(name, format)
    fastpeft.attach(model, lora(init_lora_weights=False, lora_dropout=dropout))
    plain = gradients(model, None)
    for reentrant in (False, True):
        found = gradients(model, reentrant)
        assert found.keys() == plain.keys()
        for key in plain:
            assert torch.equal(found[key], plain[key]), (reentrant, key)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_embedding_output_needs_a_gradient_only_with_reentrant_checkpointing(reentrant):
    model = build("llama")
    fastpeft.attach(model, lora())
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda m, args: seen.append(args[0].requires_grad)
    )
    gradients(model, reentrant)
    assert seen[0] == (reentrant is True)
    seen.clear()
    model.eval()
    tiny.loss(model)
    assert seen == [False]


def test_missing_gradients_are_named():
    """Without the hook, reentrant checkpointing loses all gradients: the helper must tell."""
    model = build("llama")
    fastpeft.attach(model, lora(target_modules=["q_proj"]))
    tiny.checkpoint_activations(model.train(), True)
    model.disable_input_require_grads()
    for hooks in (model._forward_pre_hooks, model.get_input_embeddings()._forward_hooks):
        hooks.clear()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        assert not tiny.loss(model).requires_grad
    assert missing_gradients(model) == [k for k, p in model.named_parameters() if p.requires_grad]


# ---- groups


def test_param_groups():
    model = build("qwen2")
    fastpeft.attach(model, lora(lora_bias=True))
    groups = {g["name"]: g for g in fastpeft.param_groups(model, 1e-3, 16, weight_decay=0.1)}
    assert {k: g["lr"] for k, g in groups.items()} == pytest.approx(
        {"matrices": 1e-3, "lora_B": 1.6e-2, "vectors": 1e-3}
    )
    assert {k: g["weight_decay"] for k, g in groups.items()} == {
        "matrices": 0.1,
        "lora_B": 0.1,
        "vectors": 0.0,
    }
    found = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): k for k, p in model.named_parameters()}
    assert all("lora_B.weight" in names[id(p)] for p in groups["lora_B"]["params"])
    assert [g["name"] for g in fastpeft.param_groups(model, 1e-3)] == ["matrices", "vectors"]
    fastpeft.activate(model, None)
    with pytest.raises(StateError, match="no trainable parameter"):
        fastpeft.param_groups(model, 1e-3)


@pytest.mark.parametrize(
    ("word", "kwargs"),
    [
        ("lr", {"lr": 0.0}),
        ("lora_plus_ratio", {"lr": 1.0, "lora_plus_ratio": -1.0}),
        ("weight_decay", {"lr": 1.0, "weight_decay": -0.1}),
    ],
)
def test_param_groups_refuses_impossible_numbers(word, kwargs):
    with pytest.raises(ConfigError, match=rf"^{word}: got .*expected a positive number"):
        fastpeft.param_groups(nn.Linear(2, 2), **kwargs)


# ---- names and failures


@pytest.mark.parametrize("bad", ["", "a.b", "a/b", "a\\b", " a", None, 3, "keys", "training"])
def test_adapter_names_that_cannot_be(bad):
    model = build("llama")
    before = tiny.fingerprint(model)
    with pytest.raises(AdapterError, match=r"adapter name: got .*expected .*Choose another"):
        fastpeft.attach(model, lora(), bad)
    tiny.assert_same(before, tiny.fingerprint(model))


def test_unknown_and_taken_names():
    model = build("llama")
    with pytest.raises(AdapterError, match=r"None is attached: attach\(\) first"):
        fastpeft.detach(model)
    with pytest.raises(AdapterError, match="None is attached"):
        fastpeft.activate(model, "poems")
    fastpeft.attach(model, lora(), "poems")
    with pytest.raises(AdapterError, match="'poems', which is attached already.*Choose another"):
        fastpeft.attach(model, lora(), "poems")
    with pytest.raises(
        AdapterError, match="got 'poem', expected one of 'poems'. Near names: poems"
    ):
        fastpeft.activate(model, "poem")
    with pytest.raises(AdapterError, match="expected each name once"):
        fastpeft.activate(model, ["poems", "poems"])
    fastpeft.attach(model, lora(), "law")
    with pytest.raises(AdapterError, match="Say which: 'poems', 'law'"):
        fastpeft.detach(model)


def test_failed_attach_changes_nothing():
    model = build("llama")
    before, keys = tiny.fingerprint(model), set(vars(model))
    for config, words in (
        (lora(target_modules=["q_proy"]), r"\['q_proy'\].*For 'q_proy': Near names: .*q_proj"),
        (lora(target_modules=["norm"]), "'model.norm': got LlamaRMSNorm"),
        (lora(modules_to_save=["lm_hed"]), "modules_to_save: got 'lm_hed'.*lm_head"),
        (lora(layers_to_transform=[0]), "layers_to_transform: got a value"),
        (lora(bias="all"), "bias: got 'all', expected 'none'"),
        (object(), "config: got object, expected one of .*LoRA"),
    ):
        with pytest.raises(ConfigError, match=words):
            fastpeft.attach(model, config)
        tiny.assert_same(before, tiny.fingerprint(model))
        assert set(vars(model)) == keys


# ---- with the rest of torch and transformers


@pytest.mark.parametrize("format", [None, "nf4"])
def test_whole_model_compiles_without_a_break(format):
    model = tiny.llama(layers=1).train()
    if format:
        fastpeft.quantize(model, format)
    fastpeft.attach(model, lora(init_lora_weights=False, modules_to_save=final_norm("llama")))
    value = tiny.loss(model)
    value.backward()
    wanted = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = compiled(tiny.tokens(), labels=tiny.tokens()).loss
    again.backward()
    torch.testing.assert_close(again, value)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[key], atol=1e-6, rtol=1e-5, msg=key)


def test_generates_as_the_merged_model_does(name):
    model = build(name, "nf4")
    fastpeft.attach(model, lora(init_lora_weights=False))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    text = model.generate(tiny.tokens(), **options)
    fastpeft.merge(model)
    assert torch.equal(model.generate(tiny.tokens(), **options), text)


def test_later_adapters_cost_what_the_first_cost(monkeypatch):
    """Attaching walks the bare model alone: it visits as many modules as the first time."""
    model, real = build("llama"), nn.Module.named_modules
    visited: list[int] = []

    def counting(self, *args, **kwargs):
        for item in real(self, *args, **kwargs):
            visited[-1] += 1
            yield item

    monkeypatch.setattr(nn.Module, "named_modules", counting)
    for index in range(12):
        visited.append(0)
        fastpeft.attach(model, lora(r=2), f"a{index}")
    assert visited[-1] <= visited[1] + 2, visited
