"""Bottleneck adapters: how they start, and configurations that are refused."""

from __future__ import annotations

import bottleneck_models as models
import fastpeft
import pytest
import tiny
import torch
from fastpeft import Bottleneck
from fastpeft.attach import adapter_parameters
from fastpeft.errors import ConfigError, StateError
from tiny import one_thread  # noqa: F401

# ---- starts


@pytest.mark.parametrize("arch", ("llama", "gpt2", "bert", "t5"))
def test_mam_starts_as_the_base_bit_for_bit(arch):
    model = models.build(arch)
    base = models.logits(model)
    fastpeft.attach(model, Bottleneck.parallel())
    assert torch.equal(models.logits(model), base)


def test_starts():
    def weights(**more):
        model = models.build("llama")
        fastpeft.attach(model, Bottleneck.pfeiffer(1, **more), "a")
        found = adapter_parameters(model, "a")
        assert all(not p.any() for key, p in found.items() if key.endswith("bias"))
        return [p for key, p in found.items() if key.endswith("weight")]

    assert 0.015 < torch.cat([w.flatten() for w in weights()]).std() < 0.025
    houlsby = torch.cat([w.flatten() for w in weights(init_weights="houlsby")])
    assert houlsby.abs().max() <= 0.02 and 0.007 < houlsby.std() < 0.01
    first, second = weights(init_weights_seed=5), weights(init_weights_seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], first[2])  # each layer starts from the seed


# ---- refusals


@pytest.mark.parametrize(
    "word, value",
    [
        ("reduction_factor", 0),
        ("reduction_factor", {"default": -1}),
        ("non_linearity", "sinus"),
        ("scaling", "huge"),
        ("scaling", True),
        ("dropout", 1.0),
        ("init_weights", "zeros"),
        ("residual_before_ln", "post"),
        ("leave_out", [-1]),
        ("output_adapter", False),
    ],
)
def test_bad_values_are_refused(word, value):
    with pytest.raises(ConfigError, match=word):
        Bottleneck(**{word: value})


@pytest.mark.parametrize(
    "arch, more, match",
    [
        ("llama", {"leave_out": [2]}, "leave_out: got .2., expected indices below 2"),
        ("llama", {"leave_out": [0, 1]}, "every layer"),
        ("llama", {"cross_adapter": True}, "cross_adapter"),
        ("llama", {"residual_before_ln": "post_add"}, "residual_before_ln at 'model.layers.0'"),
        ("llama", {"reduction_factor": {"0": 2}}, "none for layer 1"),
        ("gemma2", {"original_ln_after": False}, "original_ln_after at"),
        ("phi", {"original_ln_after": False}, "original_ln_after at"),
    ],
)
def test_what_makes_no_sense_on_a_model_is_refused_before_it_changes(arch, more, match):
    model = models.build(arch)
    before = tiny.fingerprint(model)
    with pytest.raises(ConfigError, match=match):
        fastpeft.attach(model, Bottleneck(**more))
    tiny.assert_same(before, tiny.fingerprint(model))
    assert not fastpeft.adapters(model)


def test_a_gate_needs_a_sequence():
    model = models.shaken(models.build("opt"), Bottleneck(use_gating=True))
    with pytest.raises(StateError, match="use_gating"):
        models.logits(model)


def test_merging_is_refused():
    model = models.shaken(models.build("llama"), Bottleneck())
    with pytest.raises(StateError, match="has no merge"):
        fastpeft.merge(model)
