"""merge and unmerge on whole models: same outputs, exact return, and what is refused meanwhile."""

from __future__ import annotations

import fastpeft
import pytest
import tiny
import torch
from fastpeft import LoRA
from fastpeft.attach import adapter_parameters
from fastpeft.errors import AdapterError, StateError
from tiny import one_thread  # noqa: F401
from torch import nn

PAIRS = [
    ("llama", None),
    ("llama", "nf4"),
    ("gpt2", None),
    ("gpt2", "nf4"),
    ("qwen2", "int8"),
    ("llama-tied", "int8"),
]


def adapted(name: str, format: str | None) -> nn.Module:
    model = tiny.MODELS[name]()
    if format:
        fastpeft.quantize(model, format, threshold=None)
    head = ["ln_f"] if name == "gpt2" else ["model.norm"]
    config = LoRA(r=4, target_modules="all-linear", lora_bias=name == "qwen2", modules_to_save=head)
    fastpeft.attach(model, config, "a")
    tiny.shake(adapter_parameters(model, "a").values(), std=0.1)
    return model


@pytest.mark.parametrize(("name", "format"), PAIRS)
def test_merged_model_computes_the_same_and_returns_exactly(name, format):
    model = adapted(name, format)
    before, logits = tiny.fingerprint(model), tiny.logits(model)
    fastpeft.activate(model, None)
    bare = tiny.logits(model)
    fastpeft.activate(model, "a")
    report = fastpeft.merge(model, "a")
    assert report.name == "a" and report.errors and report.worst[1] < 1e-6
    assert fastpeft.summary(model).merged == "a" and fastpeft.summary(model).trainable == 0
    torch.testing.assert_close(tiny.logits(model), logits, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(bare, logits, atol=1e-2)
    fastpeft.unmerge(model)
    tiny.assert_same(before, tiny.fingerprint(model))
    assert torch.equal(tiny.logits(model), logits)


@pytest.mark.parametrize(("name", "format"), [p for p in PAIRS if p[1]])
def test_requantised_merge_tells_its_error(name, format):
    model = adapted(name, format)
    logits = tiny.logits(model)
    report = fastpeft.merge(model, requantize=True)
    assert all(0 < error < 0.2 for error in report.errors.values()), report.errors
    assert report.worst[1] == max(report.errors.values())
    assert f"{report.worst[1]:.3e}" in str(report)
    distance = (tiny.logits(model) - logits).norm() / logits.norm()
    assert 0 < distance < 1
    fastpeft.unmerge(model)
    assert torch.equal(tiny.logits(model), logits)


def test_dense_base_cannot_be_requantised_and_nothing_is_half_merged():
    model = adapted("llama", None)
    before, logits = tiny.fingerprint(model), tiny.logits(model)
    with pytest.raises(StateError, match="requantize: got a dense base"):
        fastpeft.merge(model, requantize=True)
    tiny.assert_same(before, tiny.fingerprint(model))
    assert torch.equal(tiny.logits(model), logits)
    fastpeft.merge(model)
    fastpeft.unmerge(model)


def test_failure_in_the_middle_undoes_the_first_layers(monkeypatch):
    model = adapted("llama", "nf4")
    before, real = tiny.fingerprint(model), fastpeft.LoRALinear.merge
    calls = []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 4:
            raise MemoryError("no room")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(fastpeft.LoRALinear, "merge", failing)
    with pytest.raises(MemoryError, match="no room"):
        fastpeft.merge(model)
    tiny.assert_same(before, tiny.fingerprint(model))
    assert fastpeft.adapters(model).active == ("a",)


def test_other_adapters_are_off_while_one_is_merged_and_on_again():
    model = adapted("llama", "nf4")
    only = tiny.logits(model)
    fastpeft.attach(model, LoRA(init_lora_weights=False), "b")
    fastpeft.activate(model, ["a", "b"])
    both = tiny.logits(model)
    fastpeft.merge(model, "a")
    torch.testing.assert_close(tiny.logits(model), only, atol=2e-5, rtol=2e-5)
    fastpeft.unmerge(model)
    assert fastpeft.adapters(model).active == ("a", "b")
    assert torch.equal(tiny.logits(model), both)


def test_what_is_refused_while_merged():
    model = adapted("llama", None)
    with pytest.raises(StateError, match=r"no merged adapter.*Call merge\(model, name\) first"):
        fastpeft.unmerge(model)
    with pytest.raises(AdapterError, match="expected one of 'a'"):
        fastpeft.merge(model, "b")
    fastpeft.merge(model)
    with pytest.raises(StateError, match=r"'a' is merged already.*Call unmerge\(model\) first"):
        fastpeft.merge(model, "a")
    refused = (
        ("attach adapter 'b'", lambda: fastpeft.attach(model, LoRA(), "b")),
        ("detach adapter 'a'", lambda: fastpeft.detach(model)),
        ("activate adapters", lambda: fastpeft.activate(model, None)),
        ("show the bare base", lambda: fastpeft.disabled(model).__enter__()),
        ("merged into it", lambda: fastpeft.quantize(model)),
        ("before training", lambda: fastpeft.param_groups(model, 1e-3)),
    )
    for words, deed in refused:
        with pytest.raises(StateError, match=words):
            deed()
    model.train()
    with pytest.raises(StateError, match=r"train a layer with \['a'\] merged.*unmerge"):
        tiny.loss(model)
    with torch.no_grad():
        tiny.loss(model)
    fastpeft.unmerge(model)
    tiny.loss(model).backward()


def test_unmerging_the_never_attached():
    with pytest.raises(StateError, match="no merged adapter"):
        fastpeft.unmerge(nn.Linear(2, 2))


def test_merged_adapter_can_still_be_saved(tmp_path):
    model = adapted("llama", "nf4")
    logits = tiny.logits(model)
    fastpeft.merge(model)
    fastpeft.save_adapter(model, tmp_path / "a")
    fastpeft.unmerge(model)
    fastpeft.load_adapter(model, tmp_path / "a", "again")
    assert torch.equal(tiny.logits(model), logits)
