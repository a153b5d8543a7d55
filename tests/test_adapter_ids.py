"""A batch that mixes adapters by row computes what each row computes alone."""

from __future__ import annotations

import fastpeft
import plug
import pytest
import tiny
import torch
from fastpeft import IA3, Bottleneck, LoRA, Prefix, Prompt
from fastpeft.attach import adapter_parameters
from fastpeft.errors import AdapterError, StateError
from tiny import one_thread  # noqa: F401
from torch import nn
from torch._dynamo.testing import CompileCounter

IDS = ["a", None, "b", "a", "narrow", None]
# One case a row: name of a model of `plug`, its weights' format.
BASES = [("llama", None), ("llama", "nf4"), ("llama", "int8"), ("gpt2", "nf4"), ("t5", None)]


def build(name: str = "llama", format: str | None = None, **options) -> nn.Module:
    """A model with LoRAs "a" and "b" on q and v, "narrow" on one layer, random values in all."""
    model = plug.build(name, format)
    targets = {"gpt2": ["h.1.attn.c_attn"], "t5": ["block.1.layer.0.SelfAttention.q"]}
    fastpeft.attach(model, LoRA(r=4, **options), "a")
    fastpeft.attach(model, LoRA(r=7, lora_alpha=5, use_rslora=True, **options), "b")
    narrow = targets.get(name, ["layers.1.self_attn.k_proj"])
    fastpeft.attach(model, LoRA(r=2, target_modules=narrow, **options), "narrow")
    for seed, adapter in enumerate(("a", "b", "narrow")):
        tiny.shake(adapter_parameters(model, adapter).values(), seed=seed)
    return model


def forward(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    encodes = getattr(model.config, "is_encoder_decoder", False)
    extra = {"decoder_input_ids": ids} if encodes else {}
    return model(input_ids=ids, **extra).logits


def alone(model: nn.Module, text: torch.Tensor, names=IDS) -> torch.Tensor:
    """Each row of `text` run by itself with its adapter active."""
    before, rows = fastpeft.adapters(model).active, []
    for row, name in zip(text, names, strict=True):
        fastpeft.activate(model, name)
        rows.append(forward(model, row[None]))
    fastpeft.activate(model, before)
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize(("name", "format"), BASES)
def test_rows_are_what_they_are_alone(name, format):
    model = build(name, format)
    text = tiny.tokens(len(IDS))
    wanted, active = alone(model, text), fastpeft.adapters(model).active
    before = forward(model, text)
    with fastpeft.adapter_ids(model, IDS) as same:
        assert same is model
        mixed = forward(model, text)
        assert fastpeft.adapters(model).active == ()
    torch.testing.assert_close(mixed, wanted, atol=2e-5, rtol=1e-4)
    with fastpeft.disabled(model):
        base = forward(model, text)
    for row, adapter in enumerate(IDS):
        differs = (mixed[row] - base[row]).abs().max() > 1e-2
        assert differs == (adapter is not None), row
    assert fastpeft.adapters(model).active == active  # and the block left nothing behind
    assert torch.equal(forward(model, text), before)


@torch.no_grad()
def test_base_rows_are_the_base_bit_for_bit():
    model, text = build(format="nf4"), tiny.tokens(len(IDS))
    with fastpeft.disabled(model):
        base = forward(model, text)
    with fastpeft.adapter_ids(model, IDS):
        mixed = forward(model, text)
    for row, adapter in enumerate(IDS):
        assert torch.equal(mixed[row], base[row]) == (adapter is None)


@torch.no_grad()
def test_one_adapter_for_all_rows_runs_fused():
    model, text = build(format="nf4"), tiny.tokens(3)
    fastpeft.activate(model, "b")
    wanted = forward(model, text)
    with fastpeft.adapter_ids(model, ["b"] * 3):
        assert torch.equal(forward(model, text), wanted)


@torch.no_grad()
def test_names_indices_tensors():
    model, text = build(), tiny.tokens(3)
    with fastpeft.adapter_ids(model, ["b", "a", "narrow"]):
        wanted = forward(model, text)
    for ids in ([1, 0, 2], (1, "a", 2), torch.tensor([1, 0, 2])):
        with fastpeft.adapter_ids(model, ids):
            assert torch.equal(forward(model, text), wanted)


@torch.no_grad()
def test_ia3_and_lora_in_one_batch():
    model, text = build(format="nf4"), tiny.tokens(4)
    fastpeft.attach(model, IA3(init_ia3_weights=False), "scale")
    fastpeft.attach(model, IA3(target_modules=["q_proj"], init_ia3_weights=False), "query")
    names = ["scale", "a", None, "query"]
    wanted = alone(model, text, names)
    with fastpeft.adapter_ids(model, names):
        mixed = forward(model, text)
    torch.testing.assert_close(mixed, wanted, atol=2e-5, rtol=1e-4)
    with fastpeft.disabled(model):
        assert torch.equal(forward(model, text)[2], mixed[2])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_bottleneck_adapters_and_lora_in_one_batch(name):
    """Norms before and after the sum; adapters that read the residual stream and such that do
    not."""
    model, text = plug.build(name, "nf4"), tiny.tokens(6)
    fastpeft.attach(model, Bottleneck.houlsby(reduction_factor=8), "houlsby")
    fastpeft.attach(model, Bottleneck.pfeiffer(reduction_factor=4), "pfeiffer")
    fastpeft.attach(model, Bottleneck.parallel(reduction_factor=8, leave_out=[0]), "parallel")
    fastpeft.attach(model, LoRA(r=4), "lora")
    for seed, adapter in enumerate(fastpeft.adapters(model)):
        tiny.shake(adapter_parameters(model, adapter).values(), std=0.3, seed=seed)
    names = ["pfeiffer", "houlsby", None, "lora", "parallel", "houlsby"]
    wanted = alone(model, text, names)
    for active in ("pfeiffer", None):  # neither leaves a trace
        fastpeft.activate(model, active)
        before = forward(model, text)
        with fastpeft.adapter_ids(model, names):
            mixed = forward(model, text)
        torch.testing.assert_close(mixed, wanted, atol=5e-5, rtol=1e-4)
        assert torch.equal(forward(model, text), before)
    for row, adapter in enumerate(names):  # the last one active was none
        assert torch.equal(mixed[row], before[row]) == (adapter is None), row
    with fastpeft.adapter_ids(model, ["houlsby"] * 6):
        mixed = forward(model, text)
    fastpeft.activate(model, "houlsby")
    assert torch.equal(forward(model, text), mixed)


def test_a_missing_norm_is_for_the_whole_batch():
    model, text = plug.build("bert"), tiny.tokens(2)
    fastpeft.attach(model, Bottleneck.pfeiffer(), "keeps")
    fastpeft.attach(model, Bottleneck.pfeiffer(original_ln_after=False), "drops")
    before = forward(model, text)
    words = r"adapter 'drops' in adapter_ids: got original_ln_after=False.*activate\(model, 'drops'"
    with pytest.raises(StateError, match=words), fastpeft.adapter_ids(model, ["keeps", "drops"]):
        pytest.fail("the block was entered")
    assert fastpeft.adapters(model).active == ("drops",)
    assert torch.equal(forward(model, text), before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_dora_pissa_and_embeddings_in_one_batch(name, format):
    """gpt2: the magnitude leaves out the base's bias."""
    model, text = plug.build(name, format), tiny.tokens(5)
    if name == "llama":
        fastpeft.attach(model, LoRA(r=4, target_modules=["embed_tokens", "q_proj"]), "embeds")
    else:
        fastpeft.attach(model, LoRA(r=4, target_modules=["wpe", "c_attn"]), "embeds")
    fastpeft.attach(model, LoRA(r=4, use_dora=True), "dora")
    fastpeft.attach(model, LoRA(r=4, init_lora_weights="pissa"), "pissa")
    for adapter in ("embeds", "dora", "pissa"):
        tiny.shake(adapter_parameters(model, adapter).values(), std=0.2)
    names = ["dora", "embeds", None, "pissa", "dora"]
    if name == "gpt2":  # positions: one row for the whole batch
        words = r"5 ids for a layer's input of shape \[1, 9\], expected one id for each row"
        with fastpeft.adapter_ids(model, names), pytest.raises(AdapterError, match=words):
            forward(model, text)
        names = ["dora", "pissa", None, "pissa", "dora"]
    wanted = alone(model, text, names)
    with fastpeft.adapter_ids(model, names):
        mixed = forward(model, text)
    torch.testing.assert_close(mixed, wanted, atol=2e-5, rtol=1e-4)
    with fastpeft.disabled(model):
        base = forward(model, text)
    for row, adapter in enumerate(names):
        assert torch.equal(mixed[row], base[row]) == (adapter is None), row


@torch.no_grad()
def test_bias_and_half_precision():
    model, text = build(lora_bias=True).to(torch.bfloat16), tiny.tokens(len(IDS))
    wanted = alone(model, text)
    with fastpeft.adapter_ids(model, IDS):
        mixed = forward(model, text)
    exact = build(lora_bias=True)
    exact.load_state_dict(model.state_dict())
    truth = alone(exact, text)
    error, same = (mixed - truth).abs().max(), (wanted - truth).abs().max()
    assert error <= 2 * same, (error, same)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_rows_on_a_gpu(cuda, format, dtype):
    """As far from the CPU's float32 as the rows alone are, and the base's rows bit for bit."""
    model, text = build(format=format), tiny.tokens(len(IDS))
    truth = alone(model, text)
    model, text = model.to(cuda, dtype), text.to(cuda)
    wanted = alone(model, text)
    with fastpeft.disabled(model):
        base = forward(model, text)
    with fastpeft.adapter_ids(model, IDS):
        mixed = forward(model, text)
    error, same = (mixed.cpu() - truth).abs().max(), (wanted.cpu() - truth).abs().max()
    assert error <= 2 * same + 1e-4, (error, same)
    for row, adapter in enumerate(IDS):
        assert torch.equal(mixed[row], base[row]) == (adapter is None), row


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_gradients_are_the_sum_of_the_rows_alone(format, reentrant):
    model, text = build(format=format).train(), tiny.tokens(len(IDS))
    fastpeft.activate(model, ["a", "b", "narrow"])
    weights = torch.randn(len(IDS), 9, tiny.VOCABULARY)
    for row, adapter in zip(range(len(IDS)), IDS, strict=True):
        if adapter is None:
            continue
        fastpeft.activate(model, adapter)
        (forward(model, text[row, None]) * weights[row]).sum().backward()
    wanted = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fastpeft.activate(model, ["a", "b", "narrow"])
    if reentrant is not None:
        tiny.checkpoint_activations(model, reentrant)
    with fastpeft.adapter_ids(model, IDS):
        (forward(model, text) * weights).sum().backward()
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        scale = gradient.abs().max()
        assert scale > 0
        torch.testing.assert_close(found[key] / scale, gradient / scale, atol=1e-4, rtol=1e-4)


def test_dropout_is_for_the_adapters_rows_alone():
    model, text = build(lora_dropout=0.5).train(), tiny.tokens(3)
    with torch.no_grad(), fastpeft.adapter_ids(model, ["a", None, "b"]):
        one, two = forward(model, text), forward(model, text)
    assert [torch.equal(a, b) for a, b in zip(one, two, strict=True)] == [False, True, False]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate(name):
    model, text = build(name, "nf4"), tiny.tokens(4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    names, wanted = ["a", None, "b", "a"], []
    for row, adapter in zip(text, names, strict=True):
        fastpeft.activate(model, adapter)
        wanted.append(model.generate(row[None], **options))
    with fastpeft.adapter_ids(model, names):
        assert torch.equal(model.generate(text, **options), torch.cat(wanted))
    assert len({tuple(row[0, 9:].tolist()) for row in wanted}) > 1  # adapters matter
    beams = [adapter for adapter in names[:2] for _ in range(2)]
    options["num_beams"] = 2
    for row in range(2):
        fastpeft.activate(model, names[row])
        wanted[row] = model.generate(text[row, None], **options)
    with fastpeft.adapter_ids(model, beams):
        assert torch.equal(model.generate(text[:2], **options), torch.cat(wanted[:2]))


@torch.no_grad()
def test_compiles_whole_and_once_for_the_same_ids():
    model, text = plug.build("llama", "nf4"), tiny.tokens(3)
    for seed, adapter in enumerate("ab"):
        fastpeft.attach(model, LoRA(r=4), adapter)
        tiny.shake(adapter_parameters(model, adapter).values(), seed=seed)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for ids, count in ((["a", None, "b"], 1), (["b", "a", None], 2)):
        with fastpeft.adapter_ids(model, ids):
            wanted = forward(model, text)
            for _ in range(2):
                torch.testing.assert_close(forward(compiled, text), wanted)
                assert counter.frame_count == count
    torch._dynamo.reset()


@torch.no_grad()
def test_blocks_nest_and_end_with_an_error():
    model, text = build(), tiny.tokens(3)
    plain = forward(model, text)
    with fastpeft.adapter_ids(model, ["a", "b", None]):
        outer = forward(model, text)
        with fastpeft.adapter_ids(model, [None, "b", "a"]):
            assert not torch.equal(forward(model, text), outer)
        assert torch.equal(forward(model, text), outer)
        with fastpeft.disabled(model):
            assert torch.equal(forward(model, text)[2], outer[2])
            assert not torch.equal(forward(model, text)[0], outer[0])
        assert torch.equal(forward(model, text), outer)
    with pytest.raises(ZeroDivisionError), fastpeft.adapter_ids(model, ["a"] * 3):
        1 / 0  # noqa: B018
    assert torch.equal(forward(model, text), plain)
    fastpeft.detach(model, "a")
    fastpeft.activate(model, "b")
    with fastpeft.adapter_ids(model, [None, "b", 1]):
        forward(model, text)
    assert fastpeft.adapters(model).active == ("b",)


# ---- refusal 22


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0, 3], r"adapter_ids\[1\]: got 3, expected a name or index of 0 'a', 1 'b', 2 'narrow'"),
        ([0, -1], r"adapter_ids\[1\]: got -1"),
        (["a", "narow"], r"adapter_ids\[1\]: got 'narow'.*Near names: narrow"),
        ([True, "a"], r"adapter_ids\[0\]: got True"),
        ([0.5, "a"], r"adapter_ids\[0\]: got 0.5"),
        ([], "adapter_ids: got no id, expected one for each row of the batch"),
        (torch.tensor([0, 9]), r"adapter_ids\[1\]: got 9"),
    ],
)
def test_22_ids_out_of_range(ids, words):
    model = build()
    before, logits = fastpeft.adapters(model).active, tiny.logits(model)
    with pytest.raises(AdapterError, match=words), fastpeft.adapter_ids(model, ids):
        pytest.fail("the block was entered")
    assert fastpeft.adapters(model).active == before
    assert torch.equal(tiny.logits(model), logits)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_22_wrong_number_of_ids(count):
    model = build()
    words = f"adapter_ids: got {count} ids for a batch of 3 rows, expected one id for each row"
    with fastpeft.adapter_ids(model, ["a"] * count):
        for arguments in ({"input_ids": tiny.tokens(3)}, {"inputs_embeds": torch.rand(3, 9, 64)}):
            with pytest.raises(AdapterError, match=words):
                model(**arguments)
        with pytest.raises(AdapterError, match=words):
            model(tiny.tokens(3))


def test_22_rows_that_belong_to_nobody():
    """Below the model's own check: a layer whose input has other rows."""
    model = build()
    with fastpeft.adapter_ids(model, ["a", "b"]):
        with pytest.raises(AdapterError, match=r"2 ids for a layer's input of shape \[3, 64\]"):
            model.model.layers[0].self_attn.q_proj(torch.rand(3, 64))


def test_what_cannot_share_a_batch():
    bare = tiny.llama()
    with pytest.raises(AdapterError, match="None is attached"), fastpeft.adapter_ids(bare, [None]):
        pass
    model = build()
    fastpeft.attach(model, Prefix(num_virtual_tokens=3), "prefix")
    fastpeft.attach(model, Prompt(num_virtual_tokens=3), "prompt")
    fastpeft.attach(model, LoRA(r=2, modules_to_save=["model.norm"]), "saves")
    for name, words in (
        ("prefix", r"adapter 'prefix' in adapter_ids: got method prefix, expected one of .*lora"),
        ("prompt", r"adapter 'prompt' in adapter_ids: got method prompt"),
        ("saves", r"modules_to_save: 'model.norm.weight'.*activate\(model, 'saves'\)"),
    ):
        with pytest.raises(StateError, match=words), fastpeft.adapter_ids(model, ["a", name]):
            pass
    fastpeft.activate(model, "a")
    fastpeft.merge(model, "a")
    with pytest.raises(StateError, match="merged"), fastpeft.adapter_ids(model, ["a"]):
        pass
