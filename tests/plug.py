"""What every method must show on a tiny model: it alone trains, its file brings it back, unplugged
the base is what it was. Used by the tests of single methods."""

from __future__ import annotations

import fastpeft
import tiny
import torch
import transformers
from fastpeft.attach import adapter_parameters
from fastpeft.report import missing_gradients
from torch import nn

FORMATS = [None, "nf4", "int8"]


def bert(**changes) -> nn.Module:
    """An encoder with a classification head."""
    sizes = dict(
        vocab_size=tiny.VOCABULARY,
        hidden_size=tiny.HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        num_labels=3,
    )
    config = transformers.BertConfig(**{**sizes, **changes})
    return tiny._seeded(transformers.BertForSequenceClassification, config)


def t5() -> nn.Module:
    """An encoder-decoder."""
    config = transformers.T5Config(
        vocab_size=tiny.VOCABULARY,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return tiny._seeded(transformers.T5ForConditionalGeneration, config)


def by_config(name: str, **changes) -> nn.Module:
    """A tiny decoder of a family that transformers knows under `name`."""
    sizes = dict(
        hidden_size=tiny.HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=tiny.VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    if name == "opt":
        sizes = {k: v for k, v in sizes.items() if k not in ("intermediate_size", "head_dim")}
        sizes |= {"ffn_dim": 96, "word_embed_proj_dim": tiny.HIDDEN, "dropout": 0.0}
        del sizes["num_key_value_heads"]
    if name == "gpt_neox":
        del sizes["num_key_value_heads"]  # it has none, but would keep the field
    config = transformers.AutoConfig.for_model(name, **{**sizes, **changes})
    return tiny._seeded(lambda c: transformers.AutoModelForCausalLM.from_config(c), config)


MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": bert, "t5": t5}


def build(name: str, format: str | None = None) -> nn.Module:
    """A model of MODELS or a family of `by_config`, in eval mode, quantised if asked."""
    model = MODELS[name]() if name in MODELS else by_config(name)
    if format:
        fastpeft.quantize(model, format, threshold=None, skip=("lm_head", "classifier"))
    return model


def loss(model: nn.Module) -> torch.Tensor:
    """A scalar loss on fixed tokens."""
    ids = tiny.tokens()
    if type(model).__name__.endswith("ForSequenceClassification"):
        return model(ids, labels=torch.tensor([0, 2])).loss
    return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Logits for fixed tokens."""
    ids = tiny.tokens()
    if isinstance(model, transformers.T5ForConditionalGeneration):
        return model(input_ids=ids, decoder_input_ids=ids).logits
    return model(ids).logits


def shake(model: nn.Module, name: str = "default", std: float = 0.3) -> None:
    """Random values for all that the adapter trains."""
    tiny.shake(adapter_parameters(model, name).values(), std)


def padded(side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) [2, 9] with three pads in the first row: "none", "left" or "right"."""
    ids, mask = tiny.tokens(), torch.ones(2, 9, dtype=torch.long)
    if side != "none":
        mask[0, :3] = 0
    return ids, mask if side == "left" else mask.flip(1)


def assert_trains_alone(
    model: nn.Module, config, lr: float, least: float, steps: int = 20
) -> list[float]:
    """The loss falls by `least`; nothing but the adapter's parameters changed, bit by bit. Returns
    the losses."""
    # dropout off: falling over 20 steps must not be luck
    fastpeft.attach(model, config)
    own = {id(p) for p in adapter_parameters(model, "default").values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if id(p) not in own}
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    before = [p.detach().clone() for p in adapter_parameters(model, "default").values()]
    optimizer = torch.optim.AdamW(fastpeft.param_groups(model, lr=lr))
    losses = []
    for _ in range(steps):
        value = loss(model)
        optimizer.zero_grad()
        value.backward()
        assert missing_gradients(model) == []
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - least, losses
    after = adapter_parameters(model, "default").values()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    parameters, now = dict(model.named_parameters()), dict(model.named_buffers())
    assert all(torch.equal(value, parameters[key]) for key, value in frozen.items())
    assert all(torch.equal(value, now[key]) for key, value in buffers.items())
    return losses


def assert_unplugs(build_model, config, std: float = 0.3) -> None:
    """disabled, activate(None) and detach give the base bit for bit; detach leaves no trace."""
    model = build_model()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)  # a mix that has to come back
    fingerprint, keys, bare = tiny.fingerprint(model), set(vars(model)), logits(model)
    attention = getattr(model.config, "_attn_implementation", None)
    hooks = _hooks(model)
    fastpeft.attach(model, config, "a")
    fastpeft.attach(model, config, "b")
    shake(model, "b", std)
    changed = logits(model)
    assert not torch.equal(changed, bare)
    with fastpeft.disabled(model):
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), changed)
    fastpeft.activate(model, None)
    assert torch.equal(logits(model), bare)
    fastpeft.activate(model, "b")
    assert torch.equal(logits(model), changed)
    fastpeft.detach(model, "a")
    assert torch.equal(logits(model), changed)
    fastpeft.detach(model)
    assert torch.equal(logits(model), bare)
    tiny.assert_same(fingerprint, tiny.fingerprint(model))
    assert set(vars(model)) == keys and _hooks(model) == hooks
    assert getattr(model.config, "_attn_implementation", None) == attention


def assert_round_trip(build_model, config, folder, std: float = 0.3) -> None:
    """save -> load into a new model: the same logits, bit for bit, and the same files again."""
    model = build_model()
    fastpeft.attach(model, config)
    shake(model, std=std)
    wanted = logits(model)
    fastpeft.save_adapter(model, folder / "one")
    other = build_model()
    assert not torch.equal(logits(other), wanted)
    fastpeft.load_adapter(other, folder / "one", "again")
    assert torch.equal(logits(other), wanted)
    fastpeft.save_adapter(other, folder / "two")
    for path in (folder / "one").iterdir():
        if path.suffix == ".safetensors":
            assert path.read_bytes() == (folder / "two" / path.name).read_bytes()
    shake(other, "again", std=std * 2)
    assert not torch.equal(logits(other), wanted)  # the comparison can fail


def gradients(model: nn.Module, reentrant: bool | None, value=loss) -> tuple[float, dict]:
    """Loss and gradients of what trains, with no checkpointing (None) or one of its variants."""
    model.train()
    if reentrant is not None:
        tiny.checkpoint_activations(model, reentrant)
    torch.manual_seed(11)
    total = value(model)
    total.backward()
    assert missing_gradients(model) == []
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return float(total), found


def assert_checkpoints(build_model, config, value=loss, std: float = 0.3) -> None:
    """The same loss and gradients without checkpointing and with both its variants."""
    results = []
    for reentrant in (None, False, True):
        model = build_model()
        torch.manual_seed(1)
        fastpeft.attach(model, config)
        if std:
            shake(model, std=std)
        results.append(gradients(model, reentrant, value))
    for found in results[1:]:
        assert found[0] == results[0][0]
        assert found[1].keys() == results[0][1].keys()
        for key, gradient in results[0][1].items():
            torch.testing.assert_close(found[1][key], gradient, atol=1e-8, rtol=1e-5)
            assert gradient.abs().max() > 0, key


def _hooks(model: nn.Module) -> list:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    kinds += ("_forward_pre_hooks_with_kwargs",)
    return [[len(getattr(m, kind)) for kind in kinds] for m in model.modules()]
