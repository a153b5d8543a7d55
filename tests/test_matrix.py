"""Every method on every base of four architectures: one cell each, printed after the run.

A cell trains 20 steps and shows that the loss falls, that nothing but the adapter changed (bit for
bit), that its file gives the same logits in a new model (a new process: test_new_process.py), and
that `disabled` and `detach` give the base's logits bit for bit. What makes no sense is refused with
the reason and leaves the model as it was.
"""

from __future__ import annotations

import fastpeft
import pytest
import tiny
import torch
from conftest import MATRIX
from fastpeft import IA3, Bottleneck, Full, LoRA, Prefix, Prompt
from fastpeft.errors import ConfigError
from fastpeft.methods import METHODS
from plug import FORMATS, assert_trains_alone, build, logits
from tiny import one_thread  # noqa: F401

# method -> (its configuration, learning rate, how far the loss must fall)
ROWS = {
    "lora": (lambda: LoRA(r=4, target_modules="all-linear"), 1e-2, 0.02),
    "rslora": (lambda: LoRA(r=4, target_modules="all-linear", use_rslora=True), 1e-2, 0.02),
    "dora": (lambda: LoRA(r=4, target_modules="all-linear", use_dora=True), 1e-2, 0.02),
    "ia3": (IA3, 0.05, 0.005),
    "prefix": (lambda: Prefix(4), 0.1, 0.01),
    "prefix, projection": (lambda: Prefix(4, projection=True), 0.02, 0.01),
    "prompt": (lambda: Prompt(4), 0.05, 0.01),  # a random GPT-2 is nearly flat in its inputs
    "pfeiffer": (lambda: Bottleneck.pfeiffer(4), 1e-2, 0.02),
    "houlsby": (lambda: Bottleneck.houlsby(4), 1e-2, 0.02),
    "parallel": (lambda: Bottleneck.parallel(4), 1e-2, 0.02),
    "between": (lambda: Bottleneck.between_attention_and_ffn(4), 1e-2, 0.02),
    "full": (Full, 1e-3, 0.1),
}
MODELS = ("llama", "gpt2", "bert", "t5")


def refusal(method: str, name: str, format: str | None) -> str | None:
    """Part of the message with which a cell is refused; None: it must work."""
    if method == "full" and format:
        return f"Full: got a quantised base .*{format}.*A packed weight gets no gradient"
    if name == "t5" and method.startswith(("prefix", "prompt")):
        return "got T5.*encoder-decoder"
    return None


CELLS = [
    pytest.param(method, name, format, id=f"{method}-{name}-{format or 'dense'}")
    for method in ROWS
    for name in MODELS
    for format in FORMATS
]


@pytest.fixture
def cells(request) -> dict[tuple[str, str], str]:
    """What conftest prints after the run: {(row, column): text}."""
    return request.config.stash[MATRIX]


@pytest.mark.parametrize(("method", "name", "format"), CELLS)
def test_cell(method, name, format, tmp_path, cells):
    cell = (method, f"{name} {format or 'dense'}")
    cells[cell] = "FAILED"
    make, rate, least = ROWS[method]
    model = build(name, format)
    before, bare = tiny.fingerprint(model), logits(model)
    if message := refusal(method, name, format):
        with pytest.raises(ConfigError, match=message):
            fastpeft.attach(model, make())
        tiny.assert_same(before, tiny.fingerprint(model))
        assert torch.equal(logits(model), bare)
        cells[cell] = "refused"
        return
    losses = assert_trains_alone(model, make(), rate, least)
    trained = logits(model)
    assert not torch.equal(trained, bare)
    fastpeft.save_adapter(model, tmp_path / "adapter")
    loaded = fastpeft.load_adapter(build(name, format), tmp_path / "adapter")
    assert torch.equal(logits(loaded), trained)
    with fastpeft.disabled(model):
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), trained)
    fastpeft.detach(model)
    assert torch.equal(logits(model), bare)
    tiny.assert_same(before, tiny.fingerprint(model))
    cells[cell] = f"{losses[-1] - losses[0]:+.2f}"


def test_every_method_of_the_package_has_a_row():
    classes = {type(make()) for make, _, _ in ROWS.values()}
    assert classes == {method.config for method in METHODS.values()}
