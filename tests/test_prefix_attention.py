"""The attention with a prefix in front: its formula, every implementation, positions."""

from __future__ import annotations

import fastpeft
import pytest
import tiny
import torch
import transformers
from fastpeft import Prefix
from fastpeft.errors import StateError
from fastpeft.methods.model_inputs import Arguments, inner_model
from fastpeft.methods.prefix_attention import (
    NAMES,
    PrefixStates,
    implementation_with_prefix,
)
from plug import build, padded, shake

P = 5


def attention(query, key, value, scaling, visible):
    """float64 softmax(q k^T) v over the visible keys; grouped heads are spelt out."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["causal", "mask", "both ways", "one token", "static"])
def test_formula(kind, implementation):
    model = build("llama").double()
    module = model.model.layers[1].self_attn
    new = {"one token": 1}.get(kind, 6)
    keys = {"one token": 4, "static": 8}.get(kind, 6)  # a static cache has room for two more
    draw = lambda heads, length: torch.randn(2, heads, length, 16, dtype=torch.float64)  # noqa: E731
    query, key, value = draw(4, new), draw(2, keys), draw(2, keys)
    states = [torch.randn(2, P, 16, dtype=torch.float64) for _ in range(4)]
    visible = torch.ones(2, 1, new, keys, dtype=torch.bool)
    if kind in ("causal", "mask", "static"):
        visible = visible.tril()
    if kind == "mask":
        visible[0, ..., :2] = False
    mask, options = None, {"is_causal": kind != "both ways"}
    if kind == "mask" or (implementation == "eager" and kind != "both ways"):
        mask = visible
    if implementation == "eager" and mask is not None:
        mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e300)
    options |= {"scaling": 0.3, "fastpeft_prefix": PrefixStates(states)}
    attend = transformers.AttentionInterface()[implementation_with_prefix(implementation)]
    output, _ = attend(module, query, key, value, mask, **options)
    front = [t.expand(2, -1, -1, -1) for t in states[2:]]  # of layer 1
    key, value = torch.cat((front[0], key), 2), torch.cat((front[1], value), 2)
    visible = torch.nn.functional.pad(visible, (P, 0), value=True)
    expected = attention(query, key, value, 0.3, visible)
    # the model's eager function takes its softmax in float32
    atol = 1e-12 if implementation == "sdpa" else 1e-6
    torch.testing.assert_close(output, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_eager_and_flash_give_what_sdpa_gives(side, monkeypatch):
    """Flash attention has no CPU kernel: in its place, what it promises (masks [B, T] of what is
    no padding; causal from the lower right)."""

    def flash(module, query, key, value, mask, scaling=None, **kwargs):
        assert module.config._attn_implementation == "flash_attention_2" and module.is_causal
        new, keys = query.shape[2], key.shape[2]
        visible = torch.ones(new, keys, dtype=torch.bool).tril(keys - new)[None, None]
        if mask is not None:
            assert mask.shape == (2, keys)
            visible = visible & mask.bool()[:, None, None]
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~visible, -1e9)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "flash_attention_2", flash)
    monkeypatch.setattr(  # it would look for the package
        transformers.PreTrainedModel,
        "_check_and_adjust_attn_implementation",
        lambda self, name, **kwargs: name,
    )
    ids, mask = padded(side)
    outputs = []
    for implementation in ("sdpa", "eager", "flash_attention_2"):
        model = build("llama")
        model.config._attn_implementation_internal = implementation
        fastpeft.attach(model, Prefix(P))
        shake(model, std=1.0)
        assert model.config._attn_implementation == NAMES[implementation]
        with torch.no_grad():
            outputs.append(model(ids, attention_mask=mask).logits[mask.bool()])
        fastpeft.detach(model)
        assert model.config._attn_implementation == implementation
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=2e-6, rtol=1e-5)
    model.config._attn_implementation_internal = "flash_attention_2"
    fastpeft.attach(model, Prefix(P))
    with pytest.raises(StateError, match="flash attention: got several texts packed"):
        model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False)


def test_packed_texts_see_the_prefix_each():
    """Two texts in one row, told apart by position_ids, give what they give alone."""
    model = build("llama")
    fastpeft.attach(model, Prefix(P))
    shake(model, std=1.0)
    ids = tiny.tokens(1, 9)
    with torch.no_grad():
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        packed = model(ids, position_ids=positions, use_cache=False)
        alone = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    torch.testing.assert_close(packed.logits, alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["roberta", "opt", "gpt2", "llama"])
def test_positions_are_those_the_model_numbers_itself(name):
    if name == "roberta":
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        sizes |= dict(intermediate_size=48, vocab_size=128, max_position_embeddings=64)
        model = transformers.RobertaModel(transformers.RobertaConfig(**sizes)).eval()
    else:
        model = build(name)
    base = inner_model(model, "test")
    ids, mask = padded()
    ids = ids.masked_fill(mask == 0, 1)
    named = {"input_ids": ids, "attention_mask": mask}
    positions = Arguments((), (), named).positions(base)
    with torch.no_grad():
        found, given = base(**named)[0], base(**named, position_ids=positions)[0]
    assert torch.equal(found[mask.bool()], given[mask.bool()])


def test_registering_twice_changes_nothing():
    name = implementation_with_prefix("sdpa")
    registered = transformers.AttentionInterface()[name]
    assert implementation_with_prefix("sdpa") == name
    assert transformers.AttentionInterface()[name] is registered
