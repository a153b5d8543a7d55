"""LoRA on embeddings: formula, gradients, peft's files both ways, tied ones refused."""

from __future__ import annotations

import json
import warnings

import fastpeft
import plug
import pytest
import tiny
import torch
from compare import assert_close
from fastpeft import IA3, LoRA
from fastpeft.attach import adapter_parameters
from fastpeft.errors import AdapterError, ConfigError
from fastpeft.methods.lora_embedding import LoRAEmbedding
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import one_thread  # noqa: F401
from torch import nn

V, D, R = 32, 12, 4
TARGETS = {
    "llama": ["embed_tokens", "q_proj"],
    "gemma3_text": ["embed_tokens", "v_proj"],  # multiplies its embedding
    "gpt2": ["wpe", "c_attn"],
    "bert": ["word_embeddings", "position_embeddings", "query"],
}
UNTIED = {"gemma3_text": {"tie_word_embeddings": False}}
OPTIONS = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def build(name: str, format: str | None = None) -> nn.Module:
    if name not in UNTIED:
        return plug.build(name, format)
    model = plug.by_config(name, **UNTIED[name])
    if format:
        fastpeft.quantize(model, format, threshold=None)
    return model


def layer(dtype=torch.float32, **options) -> LoRAEmbedding:
    torch.manual_seed(5)
    built = LoRAEmbedding(nn.Embedding(V, D, padding_idx=2, dtype=dtype))
    built.add_adapter("a", r=R, lora_alpha=8, **options)
    built.set_active("a")
    tiny.shake(built.adapters.parameters(), std=0.5)
    return built


def formula(ids, E, A, B, scaling, m=None) -> torch.Tensor:
    W = E + scaling * (B @ A).T
    if m is not None:
        W = W * (m / W.norm(dim=0).detach())
    return W[ids]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_formula_and_gradients(options):
    built = layer(**options).double()
    adapter, ids = built.adapters["a"], torch.tensor([[1, 5, 5], [0, 31, 7]])
    own = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    parameters = dict(zip((k for k, _ in adapter.named_parameters()), own, strict=True))
    scaling = 4.0 if options.get("use_rslora") else 2.0
    y = formula(
        ids,
        built.weight.detach(),
        parameters["lora_embedding_A"],
        parameters["lora_embedding_B"],
        scaling,
        parameters.get("lora_magnitude_vector"),
    )
    dy = torch.randn_like(y)
    y.backward(dy)
    out = built(ids)
    out.backward(dy)
    torch.testing.assert_close(out, y, rtol=1e-11, atol=1e-11)
    for key, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[key].grad, rtol=1e-10, atol=1e-10)


def test_starts_as_the_base_and_pads_get_no_gradient():
    base = nn.Embedding(V, D, padding_idx=2)
    built = LoRAEmbedding(base)
    built.add_adapter("a", r=R)
    ids = torch.tensor([2, 3, 4])
    expected = base(ids)
    built.set_active("a")
    assert torch.equal(built(ids), expected)
    built(ids).sum().backward()
    gradient = built.adapters["a"].lora_embedding_A.grad
    assert gradient[:, 2].abs().sum() == 0 and gradient[:, 3].abs().sum() > 0
    assert built.num_embeddings == V and built.padding_idx == 2 and built.weight is base.weight


def test_dtype_and_compile():
    built = layer(torch.bfloat16, use_dora=True)
    ids = torch.arange(V)
    assert built(ids).dtype == torch.bfloat16
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), built(ids))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("name", list(TARGETS))
def test_trains_alone_and_unplugs(name, options, tmp_path):
    config = LoRA(r=R, target_modules=TARGETS[name], **options)
    plug.assert_trains_alone(build(name), config, lr=0.02, least=0.01)
    plug.assert_unplugs(lambda: build(name), config)
    plug.assert_round_trip(lambda: build(name), config, tmp_path)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_over_a_quantised_base(format, tmp_path):
    config = LoRA(r=R, target_modules=TARGETS["llama"])
    plug.assert_trains_alone(build("llama", format), config, lr=0.02, least=0.01)
    plug.assert_unplugs(lambda: build("llama", format), config)
    plug.assert_round_trip(lambda: build("llama", format), config, tmp_path)


def test_checkpointing():
    config = LoRA(r=R, target_modules=TARGETS["llama"], use_dora=True)
    plug.assert_checkpoints(lambda: build("llama"), config)


# ---- peft


def load_peft(name, folder) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(build(name), folder).eval()


def assert_same_model(ours, theirs) -> None:
    plain = plug.logits(theirs)
    assert_close(plug.logits(ours), plug.logits(theirs.double()), plain, name="logits")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("name", list(TARGETS))
def test_peft_both_ways(name, options, tmp_path):
    model = build(name)
    bare = plug.logits(model)
    fastpeft.attach(
        model,
        LoRA(r=R, target_modules=TARGETS[name], rank_pattern={"embed_tokens": 3}, **options),
    )
    tiny.shake(adapter_parameters(model, "default").values(), std=0.1)
    folder = fastpeft.save_adapter(model, tmp_path / "ours")
    theirs = load_peft(name, folder)
    assert not torch.allclose(plug.logits(theirs), bare, atol=1e-3)
    assert_same_model(model, theirs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=R, lora_alpha=8, target_modules=TARGETS[name], **options)
        theirs = get_peft_model(build(name), config).eval()
        tiny.shake((p for p in theirs.parameters() if p.requires_grad), std=0.1)
        theirs.save_pretrained(tmp_path / "theirs")
    model = build(name)
    fastpeft.load_adapter(model, tmp_path / "theirs")
    assert_same_model(model, theirs)


def test_copy_of_the_base_in_peft_files(tmp_path):
    """peft stores the embedding itself too: taken if it is ours, refused if not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(build("llama"), LoraConfig(target_modules=TARGETS["llama"]))
        theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in tensors
    fastpeft.load_adapter(build("llama"), tmp_path)
    fastpeft.load_adapter(build("llama").bfloat16(), tmp_path)
    tensors[key][0, 0] += 1
    save_file(tensors, path)
    model = build("llama")
    before = tiny.fingerprint(model)
    with pytest.raises(AdapterError, match=f"{key}': got another weight than this model's"):
        fastpeft.load_adapter(model, tmp_path)
    tiny.assert_same(before, tiny.fingerprint(model))
    del tensors[key]
    tensors[key.replace("embed_tokens", "embed_token")] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="1 unexpected keys"):
        fastpeft.load_adapter(build("llama"), tmp_path)


def test_keys_in_the_file(tmp_path):
    model = build("llama")
    fastpeft.attach(model, LoRA(r=R, target_modules=["embed_tokens"]))
    fastpeft.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    shapes = {key: list(value.shape) for key, value in tensors.items()}
    assert shapes == {f"{stem}A": [R, tiny.VOCABULARY], f"{stem}B": [tiny.HIDDEN, R]}
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["target_modules"] == ["embed_tokens"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("name", list(TARGETS))
def test_merge(name, options):
    model = build(name)
    fastpeft.attach(model, LoRA(r=R, target_modules=TARGETS[name], **options))
    tiny.shake(adapter_parameters(model, "default").values(), std=0.1)
    wanted = plug.logits(model)
    fastpeft.merge(model)
    torch.testing.assert_close(plug.logits(model), wanted, rtol=1e-4, atol=1e-4)
    fastpeft.unmerge(model)
    assert torch.equal(plug.logits(model), wanted)


def test_plus_rates_reach_the_embedding():
    model = build("llama")
    fastpeft.attach(model, LoRA(r=R, target_modules=TARGETS["llama"]))
    groups = fastpeft.param_groups(model, lr=1e-3, lora_plus_ratio=16)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for key, parameter in adapter_parameters(model, "default").items():
        assert rates[id(parameter)] == pytest.approx(16e-3 if "_B" in key else 1e-3), key


# ---- refusals


TIED = [
    ("llama-tied", ["embed_tokens"], "model.embed_tokens': got tied to 'lm_head'"),
    ("llama-tied", ["lm_head", "q_proj"], "lm_head': got tied to 'model.embed_tokens'"),
    ("gpt2", ["wte"], "transformer.wte': got tied to 'lm_head'"),
    ("t5", ["shared"], "shared': got (tied|used in several places)"),
]


@pytest.mark.parametrize(("name", "targets", "words"), TIED)
def test_21_tied_embeddings(name, targets, words):
    model = tiny.MODELS[name]() if name in tiny.MODELS else plug.build(name)
    before = tiny.fingerprint(model)
    with pytest.raises(ConfigError, match=words):
        fastpeft.attach(model, LoRA(target_modules=targets))
    tiny.assert_same(before, tiny.fingerprint(model))


def test_other_refusals():
    model = build("llama")
    for config, words in (
        (LoRA(target_modules=["embed_tokens"], lora_bias=True), "lora_bias: got True with an emb"),
        (LoRA(target_modules=["embed_tokens"], init_lora_weights="pissa"), "'pissa' with an emb"),
        (IA3(target_modules=["embed_tokens"]), "'model.embed_tokens': got Embedding"),
        (LoRA(target_modules=["norm"]), "'model.norm': got LlamaRMSNorm.* or Embedding"),
    ):
        before = tiny.fingerprint(model)
        with pytest.raises(ConfigError, match=words):
            fastpeft.attach(model, config)
        tiny.assert_same(before, tiny.fingerprint(model))
    with pytest.raises(ConfigError, match="Embedding with max_norm"):
        LoRAEmbedding(nn.Embedding(V, D, max_norm=1.0))
    with pytest.raises(ConfigError, match="base_layer: got Linear"):
        LoRAEmbedding(nn.Linear(V, D))
    with pytest.raises(ConfigError, match="OPTLearnedPositionalEmbedding with .* forward of its"):
        fastpeft.attach(plug.by_config("opt"), LoRA(target_modules=["embed_positions"]))
