"""Prompt tuning: embeddings in front of the text; files and outputs are peft's."""

from __future__ import annotations

import copy
import json

import fastpeft
import pytest
import tiny
import torch
from fastpeft import Prompt
from fastpeft.attach import adapter_parameters
from fastpeft.errors import AdapterError, ConfigError, StateError
from plug import (
    FORMATS,
    assert_checkpoints,
    assert_round_trip,
    assert_unplugs,
    build,
    by_config,
    logits,
    padded,
    shake,
)

MODELS = ["llama", "gpt2", "bert"]
P = 5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_file_and_unplugging(name, format, tmp_path):
    assert_unplugs(lambda: build(name, format), Prompt(P))
    assert_round_trip(lambda: build(name, format), Prompt(P), tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing(name):
    assert_checkpoints(lambda: build(name), Prompt(P))


def test_is_the_model_on_longer_embeddings():
    """Spelt out: the prompt and the text's embeddings through the bare model, the first P cut."""
    model, ids = build("llama"), tiny.tokens()
    fastpeft.attach(model, Prompt(P))
    shake(model)
    prompt = adapter_parameters(model, "default")["prompt_embeddings"]
    with torch.no_grad(), fastpeft.disabled(model):
        text = model.get_input_embeddings()(ids)
        long = torch.cat((prompt.expand(2, -1, -1), text), dim=1)
        expected = model(inputs_embeds=long, output_hidden_states=True)
    with torch.no_grad():
        given = model(ids, labels=ids, output_hidden_states=True)
    assert torch.equal(given.logits, expected.logits[:, P:])
    assert given.hidden_states[1].shape == (2, 9, tiny.HIDDEN)
    shifted = torch.nn.functional.cross_entropy(
        given.logits[:, :-1].reshape(-1, tiny.VOCABULARY), ids[:, 1:].reshape(-1)
    )
    torch.testing.assert_close(given.loss, shifted)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "opt"])
def test_peft_loads_ours(name, side, tmp_path):
    import peft

    make = tiny.MODELS.get(name) or (lambda: build(name))
    model = make()
    fastpeft.attach(model, Prompt(P))
    shake(model)
    fastpeft.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    ids, mask = padded(side)
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        expected = theirs(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], expected[:, P:][real], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_we_load_pefts(name, tmp_path):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(tiny.MODELS[name](), config)
    theirs.save_pretrained(tmp_path)
    model = fastpeft.load_adapter(tiny.MODELS[name](), tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=tiny.tokens()).logits[:, P:]
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)


def test_a_classifier_with_its_head(tmp_path):
    """peft trains and stores the head of a classifier beside the prompt."""
    import peft

    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    theirs = peft.get_peft_model(build("bert"), config)
    tiny.shake([p for n, p in theirs.named_parameters() if "modules_to_save" in n])
    theirs.save_pretrained(tmp_path / "theirs")
    model = fastpeft.load_adapter(build("bert"), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), atol=2e-6, rtol=1e-5)
    shake(model)
    fastpeft.save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(model), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generation_with_a_cache_is_that_without(name):
    model = build(name)
    fastpeft.attach(model, Prompt(P))
    shake(model)
    ids, mask = padded()
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True)
    options |= dict(return_dict_in_generate=True, attention_mask=mask)
    for beams in (1, 3):
        runs = [
            model.generate(ids, use_cache=cached, num_beams=beams, **options)
            for cached in (True, False)
        ]
        assert torch.equal(runs[0].sequences, runs[1].sequences)
        steps = [torch.stack(run.logits) for run in runs]
        torch.testing.assert_close(steps[0], steps[1], atol=2e-6, rtol=1e-5)


def test_several_follow_one_another():
    model = build("llama")
    for name in "ab":
        fastpeft.attach(model, Prompt(P), name)
        tiny.shake(adapter_parameters(model, name).values(), seed=ord(name))
    fastpeft.activate(model, ["a", "b"])
    both = logits(model)
    joined = [adapter_parameters(model, n)["prompt_embeddings"].detach() for n in "ab"]
    fastpeft.attach(model, Prompt(2 * P), "c")
    with torch.no_grad():
        adapter_parameters(model, "c")["prompt_embeddings"].copy_(torch.cat(joined))
    assert torch.equal(logits(model), both)


def test_a_copy_is_its_own_model():
    model = build("llama")
    fastpeft.attach(model, Prompt(P))
    before = logits(model)
    twin = copy.deepcopy(model)
    shake(twin)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    bare = logits(fastpeft.detach(twin))
    assert torch.equal(bare, logits(build("llama")))


def test_starts():
    model = build("llama")
    fastpeft.attach(model, Prompt(P), "words")
    fastpeft.attach(model, Prompt(60, "RANDOM"), "noise")
    rows = model.get_input_embeddings().weight
    words, noise = (adapter_parameters(model, n)["prompt_embeddings"] for n in ("words", "noise"))
    assert all((rows == row).all(dim=1).any() for row in words)
    assert not any((rows == row).all(dim=1).any() for row in noise)
    assert noise.std().item() == pytest.approx(rows.std().item(), rel=0.05)


def test_refusals(tmp_path):
    for value in (0, -1, True, 2.0):
        with pytest.raises(ConfigError, match="num_virtual_tokens: got .* an integer >= 1"):
            Prompt(value)
    with pytest.raises(ConfigError, match="prompt_tuning_init: got 'TEXT', expected one of"):
        Prompt(P, "TEXT")
    with pytest.raises(ConfigError, match="num_virtual_tokens: got 64, expected less than the 64"):
        fastpeft.attach(build("gpt2"), Prompt(64))
    with pytest.raises(ConfigError, match="Prompt: got T5For.*encoder-decoder.*Use LoRA"):
        fastpeft.attach(build("t5"), Prompt(P))
    with pytest.raises(ConfigError, match="takes no position_ids.*ALiBi"):
        fastpeft.attach(by_config("bloom"), Prompt(P))
    with pytest.raises(ConfigError, match="Prompt: got Linear, expected a transformers model"):
        fastpeft.attach(torch.nn.Linear(2, 2), Prompt(P))
    model = build("gpt2")
    fastpeft.attach(model, Prompt(60))
    for positions in (None, torch.arange(9).unsqueeze(0)):
        with pytest.raises(StateError, match="position 68, virtual tokens included, expected less"):
            model(tiny.tokens(), position_ids=positions)
    fastpeft.save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="token_dim: got 64, expected 32.*another model"):
        fastpeft.load_adapter(tiny.llama(hidden=32), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_virtual_tokens": 59}))
    with pytest.raises(AdapterError, match=r"'prompt_embeddings': got shape \[60, 64\]"):
        fastpeft.load_adapter(build("gpt2"), tmp_path)
    file.write_text(json.dumps({**config, "soft_words": ["x"]}))
    with pytest.raises(AdapterError, match="'soft_words'.*not supported"):
        fastpeft.load_adapter(build("gpt2"), tmp_path)


def test_a_cache_without_the_prompt_is_refused():
    model = build("llama")
    fastpeft.attach(model, Prompt(P))
    ids = tiny.tokens()
    with fastpeft.disabled(model):
        out = model(ids, use_cache=True)
    name = "cache" if "cache" in out else "past_key_values"  # its newer and its older name
    with pytest.raises(StateError, match="cache: got 9 tokens that begin with a prompt of 0"):
        model(ids[:, :1], **{name: out[name]})
    with pytest.raises(StateError, match="attention_mask: got 4 dimensions, expected 2"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
