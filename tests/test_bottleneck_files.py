"""The `adapters` library's files and logits: read, computed, written; and files that are refused.

The fixtures were made once with that library (fixtures/make_bottleneck_fixtures.py); it is not
needed here.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import bottleneck_models as models
import fastpeft
import pytest
import tiny
import torch
from fastpeft import Bottleneck
from fastpeft.errors import AdapterError, ConfigError
from safetensors.torch import load_file, save_file
from tiny import one_thread  # noqa: F401
from torch import nn

# ---- the library's adapters


@pytest.mark.parametrize("case", models.CASES)
def test_fixture_gives_the_librarys_logits(case):
    model = models.base_of(case)
    _, _, expected = models.read_case(case)
    inputs = {k: v for k, v in expected.items() if not k.endswith("logits")}
    before, base = tiny.fingerprint(model), models.logits(model, inputs)
    assert (base - expected["base_logits"]).abs().max() <= models.rounding(expected["base_logits"])
    fastpeft.load_adapter(model, models.FOLDER / case, "mine")
    error = (models.logits(model, inputs) - expected["logits"]).abs().max().item()
    assert error <= models.rounding(expected["logits"]), f"{case}: off by {error}"
    with fastpeft.disabled(model):
        assert torch.equal(models.logits(model, inputs), base)
    fastpeft.detach(model)
    assert torch.equal(models.logits(model, inputs), base)
    tiny.assert_same(before, tiny.fingerprint(model))


@pytest.mark.parametrize("case", models.CASES)
def test_saving_writes_what_the_library_wrote(case, tmp_path):
    raw, tensors, _ = models.read_case(case)
    model = models.base_of(case)
    fastpeft.load_adapter(model, models.FOLDER / case, "poems")
    fastpeft.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == raw
    ours = load_file(tmp_path / "adapter.safetensors")
    assert sorted(ours) == sorted(tensors)
    assert all(torch.equal(ours[key], tensors[key]) for key in tensors)


def test_files_of_a_bare_encoder_and_of_one_with_a_head_load_into_each_other(tmp_path):
    model = models.base_of("bert-seq_bn")
    fastpeft.load_adapter(model, models.FOLDER / "bert-seq_bn", "poems")
    expected = model.bert(**models.inputs_of(model)).last_hidden_state
    bare = copy.deepcopy(model.bert)
    fastpeft.load_adapter(_bare(bare), models.FOLDER / "bert-seq_bn", "poems")
    assert torch.equal(bare(**models.inputs_of(model)).last_hidden_state, expected)
    fastpeft.save_adapter(bare, tmp_path)
    assert all(k.startswith("encoder.") for k in load_file(tmp_path / "adapter.safetensors"))
    again = models.base_of("bert-seq_bn")
    fastpeft.load_adapter(again, tmp_path)
    assert torch.equal(models.logits(again), models.logits(model))


def _bare(model: nn.Module) -> nn.Module:
    """`model` without the seats of adapters that were attached to what it was a part of."""
    from fastpeft.methods.adapter_seats import adapted, leave_seats

    for _, seat in adapted(model):
        seat.adapters.clear()
    leave_seats(model)
    return model


def test_a_saved_adapter_loads_in_a_new_process(tmp_path):
    model = models.shaken(
        models.build("llama"), Bottleneck.houlsby(reduction_factor=4, scaling="learned")
    )
    fastpeft.save_adapter(model, tmp_path / "adapter")
    torch.save(models.logits(model), tmp_path / "logits.pt")
    code = (
        "import sys, torch, bottleneck_models as models, fastpeft\n"
        "torch.set_num_threads(1)\n"
        "model = fastpeft.load_adapter(models.by_config('llama'), sys.argv[1] + '/adapter')\n"
        "assert torch.equal(models.logits(model), torch.load(sys.argv[1] + '/logits.pt'))\n"
    )
    here = models.FOLDER.parent.parent
    paths = os.pathsep.join([str(here), str(Path(fastpeft.__file__).parent.parent)])
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})


# ---- refusals


def _folder(tmp_path, change_config=None, change_tensors=None, case="llama-ln_before"):
    raw, tensors, _ = models.read_case(case)
    raw, tensors = copy.deepcopy(raw), {k: v.clone() for k, v in tensors.items()}
    if change_config:
        change_config(raw)
    if change_tensors:
        change_tensors(tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    save_file(tensors, tmp_path / "adapter.safetensors")
    return tmp_path


def _rename(old, new):
    def change(tensors):
        key = next(key for key in tensors if old in key)
        tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def _fill(old, value):
    def change(tensors):
        next(tensor for key, tensor in tensors.items() if old in key).fill_(value)

    return change


@pytest.mark.parametrize(
    "config, tensors, match",
    [
        (None, _rename("adapter_up", "adapter_upp"), "may be a renamed"),
        (None, _rename("adapter_up", "elsewhere"), "1 missing keys"),
        (None, _fill("adapter_norm_before", 0.5), "both are one parameter"),
        (None, _fill("adapter_up", float("nan")), "NaN"),
        (lambda c: c.update(name="prose"), None, "missing keys"),
        (lambda c: c.update(name=None), None, "field 'name'"),
        (lambda c: c.update(hidden_size=64), None, "hidden_size"),
        (lambda c: c["config"].update(reduction_factor=2), None, "shape"),
        (lambda c: c["config"].update(phm_layer=True), None, "config.phm_layer"),
        (lambda c: c["config"].update(inv_adapter="nice"), None, "config.inv_adapter"),
        (lambda c: c["config"].update(stochastic_depth=0.1), None, "config.stochastic_depth"),
        (lambda c: c["config"].update(novelty=3), None, "config.novelty"),
        (lambda c: c["config"].update(architecture="lora"), None, "lora"),
        (lambda c: c.update(config="seq_bn"), None, "seq_bn"),
        (lambda c: c["config"].pop("mh_adapter"), None, "no mh_adapter"),
        (lambda c: c["config"].update(leave_out=[7]), None, "leave_out"),
        (lambda c: c["config"].update(reduction_factor=0), None, "reduction_factor"),
        (lambda c: c["config"].update(leave_out=5), None, "adapter_config.json"),
    ],
)
def test_damaged_folders_are_refused_and_the_model_is_as_before(tmp_path, config, tensors, match):
    model = models.base_of("llama-ln_before")
    before = tiny.fingerprint(model)
    with pytest.raises((AdapterError, ConfigError), match=match):
        fastpeft.load_adapter(model, _folder(tmp_path, config, tensors))
    tiny.assert_same(before, tiny.fingerprint(model))


def test_one_of_a_norms_two_names_is_enough(tmp_path):
    """Shared tensors are often written once."""

    def once(tensors):
        for key in [key for key in tensors if "adapter_norm_before" in key]:
            del tensors[key]

    model, other = models.base_of("llama-ln_before"), models.base_of("llama-ln_before")
    fastpeft.load_adapter(model, _folder(tmp_path, None, once))
    fastpeft.load_adapter(other, models.FOLDER / "llama-ln_before")
    assert torch.equal(models.logits(model), models.logits(other))


def test_another_models_adapter_is_refused():
    with pytest.raises(AdapterError, match="missing keys"):
        fastpeft.load_adapter(models.base_of("gpt2-seq_bn"), models.FOLDER / "llama-seq_bn")


def test_a_changed_weight_changes_the_logits(tmp_path):
    model = models.base_of("llama-ln_before")
    fastpeft.load_adapter(model, _folder(tmp_path, None, _fill("adapter_up.bias", 0.25)))
    other = models.base_of("llama-ln_before")
    fastpeft.load_adapter(other, models.FOLDER / "llama-ln_before")
    assert (models.logits(model) - models.logits(other)).abs().max() > 0.01


def test_pickles_are_refused_unless_asked_for(tmp_path):
    _, tensors, expected = models.read_case("llama-seq_bn")
    folder = _folder(tmp_path, case="llama-seq_bn")
    (folder / "adapter.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_adapter.bin")
    model = models.base_of("llama-seq_bn")
    with pytest.raises(AdapterError, match="a pickle"):
        fastpeft.load_adapter(model, folder)
    fastpeft.load_adapter(model, folder, allow_pickle_weights_only=True)
    inputs = {k: v for k, v in expected.items() if not k.endswith("logits")}
    error = (models.logits(model, inputs) - expected["logits"]).abs().max()
    assert error <= models.rounding(expected["logits"])


def test_files_without_a_version_mean_the_other_gelu(tmp_path):
    def old(raw):
        del raw["version"]
        raw["config"]["non_linearity"] = "gelu"

    model = models.base_of("llama-seq_bn")
    fastpeft.load_adapter(model, _folder(tmp_path, old, case="llama-seq_bn"))
    assert fastpeft.adapters(model)["default"].non_linearity == "gelu_new"
