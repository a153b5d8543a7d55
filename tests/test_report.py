"""summary and memory: numbers that can be counted by hand."""

from __future__ import annotations

import fastpeft
import tiny
import torch
from fastpeft import LoRA
from tiny import one_thread  # noqa: F401
from torch import nn


def test_summary_counts_by_hand():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16, bias=False))
    plain = fastpeft.summary(model)
    assert (plain.total, plain.trainable, plain.share) == (2592, 2592, 1.0) and not plain.adapters
    fastpeft.attach(model, LoRA(r=2, target_modules=["0"]), "a")
    fastpeft.attach(model, LoRA(r=4, target_modules=["1"], lora_bias=True), "b", trainable=False)
    fastpeft.activate(model, ["a", "b"])
    found = fastpeft.summary(model)
    a, b = 2 * (64 + 32), 4 * (32 + 16) + 16
    assert (found.total, found.trainable) == (2592 + a + b, a)
    assert found.share == a / (2592 + a + b)
    rows = [
        (r.name, r.method, r.parameters, r.bytes, r.active, r.trainable) for r in found.adapters
    ]
    assert rows == [("a", "lora", a, 4 * a, True, True), ("b", "lora", b, 4 * b, True, False)]
    assert str(found).splitlines()[1].startswith("trainable   192 (")
    assert str(found).splitlines()[3] == "adapter b   lora, 208, active, frozen"


def test_quantised_weights_count_as_the_weights_they_stand_for():
    model = tiny.llama()
    total = fastpeft.summary(model).total
    fastpeft.quantize(model)
    assert fastpeft.summary(model).total == total


def test_memory_by_hand():
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(128, 64, bias=False)).bfloat16()
    model.register_buffer("mask", torch.zeros(3, dtype=torch.int64))
    fastpeft.quantize(model, double_quant=False, skip=["1"])
    fastpeft.attach(model, LoRA(r=2, target_modules=["0"]))
    assert fastpeft.memory(model) == {
        "packed codes": 64 * 128 // 2,
        "scales": 4 * 64 * 128 // 64,
        "dense": 2 * 64 + 2 * 64 * 128,
        "adapters": 4 * 2 * (128 + 64),
        "other": 24,
    }
    assert fastpeft.memory(model).total == sum(fastpeft.memory(model).values())
    assert str(fastpeft.memory(model)).splitlines()[0] == "packed codes  4,096 bytes"


def test_memory_counts_tied_weights_once_and_what_a_merge_keeps():
    model = tiny.llama(tied=True)
    unique = {id(p): p.nbytes for p in model.parameters()}
    assert fastpeft.memory(model)["dense"] == sum(unique.values())
    fastpeft.attach(model, LoRA(modules_to_save=["lm_head"]))
    head = model.lm_head.copies["default"].weight.nbytes
    before = fastpeft.memory(model)
    assert before["adapters"] == fastpeft.summary(model).adapters[0].bytes >= head
    fastpeft.merge(model)
    targets = [m for m in model.modules() if isinstance(m, fastpeft.LoRALinear)]
    grown = sum(m.base_layer.weight.nbytes for m in targets)
    assert fastpeft.memory(model).total == before.total + grown
    fastpeft.unmerge(model)
    assert fastpeft.memory(model) == before
