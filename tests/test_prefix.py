"""Prefix-tuning: peft's output, any checkpointing, generation with a cache, and back again."""

from __future__ import annotations

import copy

import fastpeft
import pytest
import tiny
import torch
from fastpeft import LoRA, Prefix, Prompt
from fastpeft.attach import adapter_parameters
from fastpeft.methods.prefix import PrefixAdapter
from plug import (
    FORMATS,
    assert_checkpoints,
    assert_round_trip,
    assert_trains_alone,
    assert_unplugs,
    build,
    by_config,
    gradients,
    logits,
    loss,
    padded,
    shake,
)

MODELS = ["llama", "gpt2", "bert"]
FAMILIES = ["llama", "gpt2", "qwen2", "mistral", "qwen3", "gemma", "phi", "opt", "mixtral"]
FAMILIES.append("gpt_neox")
P = 5


def make(name: str):
    if name in ("mistral", "mixtral"):
        return by_config(name, sliding_window=None)
    return tiny.qwen2() if name == "qwen2" else build(name)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_file_and_unplugging(name, format, tmp_path):
    assert_unplugs(lambda: build(name, format), Prefix(P), std=1.0)
    assert_round_trip(lambda: build(name, format), Prefix(P), tmp_path, std=1.0)


def test_projection_trains_and_its_file_holds_what_it_made(tmp_path):
    model = build("llama")
    assert_trains_alone(model, Prefix(P, projection=True, encoder_hidden_size=24), 0.01, 0.02)
    fastpeft.save_adapter(model, tmp_path)
    other = fastpeft.load_adapter(build("llama"), tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert list(adapter_parameters(other, "default")) == ["prompt_embeddings"]
    assert not fastpeft.adapters(other)["default"].projection


# ---- peft


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_ours(name, side, tmp_path):
    import peft

    model = make(name)
    fastpeft.attach(model, Prefix(P, projection=side == "none"))
    shake(model, std=0.5)
    fastpeft.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path)
    ids, mask = padded(side)
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        expected = theirs(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], expected[real], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(ours, logits(make(name)), atol=1e-3)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_we_load_pefts(name, projection, tmp_path):
    import peft

    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=projection
    )
    theirs = peft.get_peft_model(make(name), config)
    theirs.save_pretrained(tmp_path)
    model = fastpeft.load_adapter(make(name), tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=tiny.tokens()).logits
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)


def test_gradients_are_pefts(tmp_path):
    import peft

    model = build("llama")
    fastpeft.attach(model, Prefix(P))
    shake(model, std=1.0)
    fastpeft.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    weight = theirs.prompt_encoder["default"].embedding.weight.requires_grad_()
    loss(theirs).backward()
    loss(model).backward()
    (ours,) = adapter_parameters(model, "default").values()
    torch.testing.assert_close(ours.grad, weight.grad, atol=1e-7, rtol=1e-5)


# ---- the start


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_starts_as_the_tokens_it_names(name, projection):
    """A prefix that starts as the keys and values of a text is that text in front, until it is
    trained; the MLP reproduces them too."""
    model, text = build(name), [5, 9, 3, 5, 80]
    model.train()
    fastpeft.attach(model, Prefix(P, projection=projection, init_weights=text))
    assert all(m.training for m in model.modules())
    assert fastpeft.adapters(model)["default"].init_weights is None
    model.eval()
    with fastpeft.disabled(model), torch.no_grad():
        whole = torch.cat((torch.tensor(text).expand(2, -1), tiny.tokens()), dim=1)
        expected = model(whole).logits[:, P:]
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)


def test_starts_in_an_encoder():
    """No text in front would do the same there; the first layer's keys and values are told."""
    model, text = build("bert"), [5, 9, 3, 5, 80]
    with torch.no_grad():
        hidden = model.bert.embeddings(torch.tensor([text]))
        attention = model.bert.encoder.layer[0].attention.self
        wanted = torch.cat((attention.key(hidden), attention.value(hidden)), dim=-1)[0]
    fastpeft.attach(model, Prefix(P, init_weights=text))
    found = adapter_parameters(model, "default")["prompt_embeddings"]
    torch.testing.assert_close(found[:, : 2 * tiny.HIDDEN], wanted, atol=1e-6, rtol=1e-5)


def test_starts():
    for start, length in (([7], 3), ([1, 2, 3, 4], 3)):  # repeated, cut
        ids = (start * 3)[:length]
        found = []
        for given in (start, ids):
            model = build("llama")
            fastpeft.attach(model, Prefix(length, init_weights=given))
            found.append(logits(model))
        assert torch.equal(*found)
    model = build("llama")
    fastpeft.attach(model, Prefix(P, init_weights="zero"))
    (zero,) = adapter_parameters(model, "default").values()
    assert not zero.any()
    torch.manual_seed(0)
    fastpeft.attach(model, Prefix(P), "random")
    torch.manual_seed(0)
    ids = torch.randint(tiny.VOCABULARY, (P,)).tolist()
    fastpeft.attach(model, Prefix(P, init_weights=ids), "named")
    named, drawn = (adapter_parameters(model, n)["prompt_embeddings"] for n in ("named", "random"))
    assert torch.equal(named, drawn)


# ---- checkpointing


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing(name, projection):
    config = Prefix(P, projection=projection, encoder_hidden_size=24)
    assert_checkpoints(lambda: build(name), config, std=0.0 if projection else 1.0)


def test_two_passes_before_one_backward():
    """Each recomputed layer gets the keys of its own forward pass."""

    def both(model):
        other = tiny.tokens(seed=8)
        return loss(model) + 3 * model(other, labels=other).loss

    assert_checkpoints(lambda: build("llama"), Prefix(P, projection=True), both, std=0.0)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_projected_once_a_step(reentrant):
    model = build("llama")
    fastpeft.attach(model, Prefix(P, projection=True))
    (adapter,) = (m for m in model.modules() if isinstance(m, PrefixAdapter))
    calls = []
    adapter.transform.register_forward_hook(lambda *args: calls.append(1))
    gradients(model, reentrant)
    assert len(calls) == 1


def test_gradients_by_autograd_grad():
    model = build("llama").train()
    fastpeft.attach(model, Prefix(P, projection=True))
    named = adapter_parameters(model, "default")
    found = torch.autograd.grad(loss(model), list(named.values()))
    loss(model).backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(found, named.values(), strict=True))


# ---- generation


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2"])
def test_generation_with_a_cache_is_that_without(name):
    model = make(name)
    fastpeft.attach(model, Prefix(P))
    shake(model, std=1.0)
    ids, mask = padded()
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True)
    options |= dict(return_dict_in_generate=True, attention_mask=mask)
    for kind in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        with_cache = model.generate(ids, **kind, **options)
        beams = {k: v for k, v in kind.items() if k == "num_beams"}
        without = model.generate(ids, use_cache=False, **beams, **options)
        assert torch.equal(with_cache.sequences, without.sequences), kind
        steps = [torch.stack(run.logits) for run in (with_cache, without)]
        torch.testing.assert_close(*steps, atol=2e-6, rtol=1e-5)


def test_token_by_token_is_the_whole():
    model = build("llama")
    fastpeft.attach(model, Prefix(P))
    shake(model, std=1.0)
    ids, name, cache, steps = tiny.tokens(), "", None, []
    with torch.no_grad():
        for index in range(9):
            token = ids[:, index : index + 1]
            output = model(token, use_cache=True, **{} if index == 0 else {name: cache})
            name = "cache" if "cache" in output else "past_key_values"  # newer and older name
            cache = output[name]
            steps.append(output.logits)
    assert cache.get_seq_length() == 9  # of the text alone
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model), atol=2e-6, rtol=1e-5)


# ---- several


def test_prefixes_are_switched():
    model = build("llama")
    bare, seen = logits(model), {}
    for index, name in enumerate("abc"):
        fastpeft.attach(model, Prefix(P + index), name)
        tiny.shake(adapter_parameters(model, name).values(), 1.0, seed=index)
        seen[name] = logits(model)
    for name in "cabac":
        fastpeft.activate(model, name)
        assert torch.equal(logits(model), seen[name])
    fastpeft.activate(model, None)
    assert torch.equal(logits(model), bare)


def test_two_at_once_stand_side_by_side():
    model = build("llama")
    for index, name in enumerate("ab"):
        fastpeft.attach(model, Prefix(P), name)
        tiny.shake(adapter_parameters(model, name).values(), 1.0, seed=index)
    fastpeft.activate(model, ["a", "b"])
    both = logits(model)
    rows = [adapter_parameters(model, n)["prompt_embeddings"].detach() for n in "ab"]
    fastpeft.attach(model, Prefix(2 * P), "c")
    with torch.no_grad():
        adapter_parameters(model, "c")["prompt_embeddings"].copy_(torch.cat(rows))
    assert torch.equal(logits(model), both)


@pytest.mark.parametrize("order", ["pxl", "lxp", "xpl"])
def test_beside_prompt_and_lora_in_any_order(order):
    """LoRA must not find the prefix's own MLP, and the prompt counts as text for the prefix."""
    config = {
        "p": Prefix(P, projection=True),
        "x": Prompt(3),
        "l": LoRA(r=2, target_modules="all-linear", init_lora_weights=False),
    }
    model = build("llama")
    bare, before = logits(model), tiny.fingerprint(model)
    for letter in order:
        torch.manual_seed(ord(letter))
        fastpeft.attach(model, config[letter], letter)
    fastpeft.activate(model, list("plx"))
    together = logits(model)
    prompt = adapter_parameters(model, "x")["prompt_embeddings"].detach().expand(2, -1, -1)
    fastpeft.activate(model, list("pl"))
    with torch.no_grad():
        text = model.get_input_embeddings()(tiny.tokens())
        expected = model(inputs_embeds=torch.cat((prompt, text), dim=1)).logits[:, 3:]
    torch.testing.assert_close(together, expected, atol=2e-6, rtol=1e-5)
    for letter in order:
        fastpeft.detach(model, letter)
    assert torch.equal(logits(model), bare)
    tiny.assert_same(before, tiny.fingerprint(model))


def test_quantised_after_attaching_is_the_same():
    outputs = []
    for first in (True, False):
        model = build("llama")
        if first:
            fastpeft.quantize(model, "nf4")
        torch.manual_seed(3)
        fastpeft.attach(model, Prefix(P, projection=True, init_weights="normal"))
        if not first:
            fastpeft.quantize(model, "nf4")
        outputs.append(logits(model))
    assert torch.equal(*outputs)


def test_a_copy_is_its_own_model():
    model = build("llama")
    fastpeft.attach(model, Prefix(P))
    before = logits(model)
    twin = copy.deepcopy(model)
    shake(twin, std=1.0)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    fastpeft.detach(twin)
    assert torch.equal(logits(twin), logits(build("llama")))
    assert torch.equal(logits(model), before)


def test_bfloat16_autocast_and_compile():
    model = build("llama")
    fastpeft.attach(model, Prefix(P))
    shake(model, std=1.0)
    exact = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tiny.tokens()).logits, exact, atol=2e-6, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(tiny.tokens()).logits
    assert rough.dtype == torch.bfloat16 and (rough - exact).abs().max() < 0.05 * exact.abs().max()
    half = logits(model.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and (half - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_on_a_gpu(cuda, reentrant):
    """The same logits and gradients as on the CPU, on kernels that take no mask and on masks."""
    results = []
    for device in ("cpu", cuda):
        model = build("llama").to(device)
        torch.manual_seed(1)
        fastpeft.attach(model, Prefix(P))
        with torch.no_grad():
            (start,) = adapter_parameters(model, "default").values()
            start.copy_(torch.randn(start.shape, generator=torch.Generator().manual_seed(2)))
        model.train()
        if reentrant is not None:
            tiny.checkpoint_activations(model, reentrant)
        ids, mask = (t.to(device) for t in padded())
        total = model(ids, labels=ids).loss + model(ids, labels=ids, attention_mask=mask).loss
        total.backward()
        results.append((total.item(), start.grad.cpu()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_generation_on_a_gpu(cuda, compiled):
    """A static cache, as it is and as transformers compiles it (half a minute), against a growing
    one.
    """
    model = build("llama", "nf4").to(cuda, torch.bfloat16)
    fastpeft.attach(model, Prefix(P))
    ids, mask = (t.to(cuda) for t in padded())
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=mask)
    options["disable_compile"] = not compiled
    static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(ids, **options))
