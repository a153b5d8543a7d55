"""Where a prefix is not defined, does not fit, or would do nothing: each refusal read."""

from __future__ import annotations

import json

import fastpeft
import pytest
import tiny
import torch
import transformers
from fastpeft import Prefix
from fastpeft.errors import AdapterError, ConfigError, StateError
from plug import build, by_config, logits

P = 5


def with_config(**values):
    """A Llama whose config says so; the check reads nothing else."""
    model = build("llama")
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: build("t5"), "Prefix: got T5.*encoder-decoder.*Use LoRA, IA3 or Bottleneck"),
        (lambda: by_config("mistral"), r"sliding_attention \(sliding_window=4096\).*in the window"),
        (lambda: by_config("gemma2"), "layers of kind sliding_attention"),
        (lambda: with_config(layer_types=["linear_attention"] * 2), "kind linear_attention"),
        (lambda: with_config(layer_types=["chunked_attention"] * 2), "kind chunked_attention"),
        (lambda: with_config(num_kv_shared_layers=1), "1 layers that share keys and values"),
        (lambda: with_config(kv_lora_rank=8), r"latent keys \(kv_lora_rank=8\)"),
        (lambda: by_config("bloom"), "takes no position_ids.*ALiBi"),
        (lambda: by_config("mamba"), "takes no position_ids|no attention heads"),
        (lambda: torch.nn.Linear(2, 2), "Prefix: got Linear, expected a transformers model"),
    ],
)
def test_architectures(make, words):
    model = make()
    before, keys = tiny.fingerprint(model), set(vars(model))
    with pytest.raises(ConfigError, match=words):
        fastpeft.attach(model, Prefix(P))
    tiny.assert_same(before, tiny.fingerprint(model))
    assert set(vars(model)) == keys


def test_a_decoder_with_cross_attention():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=64, add_cross_attention=True
    )
    with pytest.raises(ConfigError, match="decoder with cross-attention"):
        fastpeft.attach(transformers.GPT2LMHeadModel(config), Prefix(P))


def test_an_attention_that_cannot_be_exchanged(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(type(model.model), "_supports_attention_backend", False)
    with pytest.raises(ConfigError, match="got an attention that cannot be exchanged"):
        fastpeft.attach(model, Prefix(P))


def test_an_implementation_without_support():
    model = build("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ConfigError, match="got 'flex_attention', expected one of sdpa, eager"):
        fastpeft.attach(model, Prefix(P))
    assert not hasattr(model.model, "fastpeft_prefixes")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_more_virtual_tokens_than_positions(name):
    with pytest.raises(ConfigError, match="num_virtual_tokens: got 64, expected less than the 64"):
        fastpeft.attach(build(name), Prefix(64))


def test_positions_that_a_learned_table_has_not():
    model = build("gpt2")
    fastpeft.attach(model, Prefix(56))
    with pytest.raises(StateError, match="position 64, virtual tokens included, expected less"):
        model(tiny.tokens())
    assert model(tiny.tokens(2, 8)).logits.shape == (2, 8, tiny.VOCABULARY)
    assert model(tiny.tokens(), position_ids=torch.arange(9)[None] // 2).logits.shape[1] == 9


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: got 0, expected an integer >= 1"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens: got True"),
        ({"projection": 1}, "projection: got 1, expected True or False"),
        ({"encoder_hidden_size": -4}, "encoder_hidden_size: got -4"),
        ({"init_weights": "ones"}, "init_weights: got 'ones', expected None, 'zero', 'normal' or"),
        ({"init_weights": [1.5]}, r"init_weights: got \[1.5\], expected"),
        ({"init_weights": []}, r"init_weights: got \[\], expected"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules: got 2, expected 1"),
    ],
)
def test_options(values, words):
    with pytest.raises(ConfigError, match=words):
        Prefix(**{"num_virtual_tokens": P, **values})


@pytest.fixture
def folder(tmp_path):
    model = build("llama")
    fastpeft.attach(model, Prefix(P))
    return fastpeft.save_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny.llama(layers=3), "num_layers: got 2, expected 3.*made for another model"),
        (lambda: tiny.llama(hidden=32), "token_dim: got 32, expected 16"),
        (lambda: build("gpt2"), "num_attention_heads: got 2, expected 4.*keys and values"),
        (lambda: build("t5"), "does not fit this model: Prefix: got T5.*encoder-decoder"),
    ],
)
def test_a_file_for_another_model(make, words, folder):
    model = make()
    before = tiny.fingerprint(model)
    with pytest.raises(AdapterError, match=words):
        fastpeft.load_adapter(model, folder)
    tiny.assert_same(before, tiny.fingerprint(model))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "P_TUNING"}, "peft_type: got 'P_TUNING', expected one of"),
        ({"prefix_dropout": 0.5}, "'prefix_dropout': got 0.5, expected null, false or empty"),
        ({"num_virtual_tokens": P + 1}, r"'prompt_embeddings': got shape \[5, 128\], expected \[6"),
    ],
)
def test_a_file_that_says_something_else(change, words, folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AdapterError, match=words):
        fastpeft.load_adapter(build("llama"), folder)


def test_a_prefix_that_would_do_nothing():
    """Whatever turns the attention away from ours while a prefix is active is told."""
    model = build("llama")
    fastpeft.attach(model, Prefix(P))
    model.set_attn_implementation("eager")
    with pytest.raises(StateError, match=r"used by layers \[\], attention 'eager', expected all 2"):
        model(tiny.tokens())
    fastpeft.activate(model, "default")
    wanted = logits(model)
    twin = type(model)(model.config)  # shares the config object
    bare = logits(twin)
    fastpeft.attach(twin, Prefix(P))
    fastpeft.detach(twin)
    assert torch.equal(logits(twin), bare)
    with pytest.raises(StateError, match="another model that shares this config"):
        model(tiny.tokens())
    fastpeft.activate(model, "default")
    assert torch.equal(logits(model), wanted)


def test_heads_the_config_does_not_tell():
    model = with_config(num_key_value_heads=1)
    with pytest.raises(ConfigError, match=r"\[\(1, 2, 16\)\], expected \(1, 1, 16\) in each of 2"):
        fastpeft.attach(model, Prefix(P))
    fastpeft.attach(model, Prefix(P, init_weights="normal"))  # the model is not asked
    with pytest.raises(StateError, match="layer 0: got 1 key heads of 16, expected 2 of 16"):
        model(tiny.tokens())


def test_tokens_that_are_none():
    with pytest.raises(ConfigError, match="got token ids 3 to 128, expected 0 to 127"):
        fastpeft.attach(build("llama"), Prefix(P, init_weights=[3, 128]))
