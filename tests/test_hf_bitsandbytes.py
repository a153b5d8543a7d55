"""bitsandbytes' files and models become ours to the bit, and ours become bitsandbytes'."""

from __future__ import annotations

import copy

import fastpeft
import pytest
import torch
import transformers
from fastpeft.errors import FormatError, StateError
from fastpeft.hf import from_bitsandbytes, load_model, save_quantized
from hf_models import FORMATS, MODELS, dense_folders, layers, logits, same_bytes  # noqa: F401
from tiny import one_thread  # noqa: F401

BNB = [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    {"load_in_8bit": True, "llm_int8_threshold": 4.0},
]


def is_foreign(model) -> bool:
    return any(type(m).__module__.startswith("bitsandbytes") for m in model.modules())


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", o) for o in BNB]
    + [("gpt2", o) for o in BNB[::3]]
    + [("bert", BNB[0]), ("bert", BNB[3]), ("tied", BNB[0])],
)
def test_bitsandbytes_becomes_ours_bit_for_bit_and_back(name, options, dense, tmp_path):
    pytest.importorskip("bitsandbytes")
    kind = type(MODELS[name]())
    config = transformers.BitsAndBytesConfig(**options)
    theirs = kind.from_pretrained(dense(name), quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    stored = {k: v.clone() for k, v in theirs.state_dict().items()}

    from_folder = from_bitsandbytes(tmp_path / "theirs")
    in_memory = from_bitsandbytes(theirs)
    assert in_memory is theirs and not is_foreign(theirs) and not is_foreign(from_folder)
    for model in (from_folder, in_memory):
        assert layers(model) and set(model.state_dict()) == set(stored)
        for key, value in model.state_dict().items():
            assert value.dtype == stored[key].dtype and torch.equal(value, stored[key]), key
        if "load_in_8bit" in options:
            assert {layer.threshold for layer in layers(model).values()} == {4.0}
    assert torch.equal(logits(from_folder), logits(in_memory))

    save_quantized(in_memory, tmp_path / "ours", save_as="bitsandbytes")
    assert in_memory.config.quantization_config.quant_method == "fastpeft"  # as before
    again = kind.from_pretrained(tmp_path / "ours")
    original = kind.from_pretrained(tmp_path / "theirs")
    assert is_foreign(again) and is_foreign(original)
    assert {n for n, m in again.named_modules() if type(m).__module__[:5] == "bitsa"} == {
        n for n, m in original.named_modules() if type(m).__module__[:5] == "bitsa"
    }
    same_bytes(again, original)
    if name in ("llama", "gpt2"):  # its CPU kernel wants other sizes than the others have
        assert torch.equal(logits(again), logits(original))


def test_fp4_weights_are_those_of_bitsandbytes(dense):
    functional = pytest.importorskip("bitsandbytes.functional")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = transformers.LlamaForCausalLM.from_pretrained(
        dense("llama"), quantization_config=config
    )
    weight = model.model.layers[0].mlp.up_proj.weight
    expected = functional.dequantize_4bit(weight.data, weight.quant_state)
    layer = from_bitsandbytes(model).model.layers[0].mlp.up_proj
    assert layer.format == "fp4" and torch.equal(layer.dequantize(), expected)


def test_models_bitsandbytes_has_repacked_are_refused(dense):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.LlamaForCausalLM.from_pretrained(
        dense("llama"), quantization_config=config
    )
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    state.packing_format_for_cpu = True  # what its CPU kernel leaves where the CPU has AVX-512
    with pytest.raises(StateError, match="before the first forward pass"):
        from_bitsandbytes(model)
    assert is_foreign(model) and not layers(model)


def test_a_quantised_model_of_our_own_saves_as_either(dense, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(dense("llama"))
    fastpeft.quantize(model, "int8", threshold=None)
    with pytest.raises(FormatError, match="threshold"):
        save_quantized(model, tmp_path / "bnb", save_as="bitsandbytes")
    said = model.config.quantization_config
    save_quantized(model, tmp_path / "ours")
    assert model.config.quantization_config is said and not hasattr(model, "hf_quantizer")
    same_bytes(load_model(tmp_path / "ours"), model)


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_a_plain_save_gives_a_bitsandbytes_folder(format, options, dense, tmp_path):
    """Without a word in config.json, int8 codes would load as a dense weight."""
    pytest.importorskip("bitsandbytes")
    model = transformers.LlamaForCausalLM.from_pretrained(dense("llama"))
    fastpeft.quantize(model, format, **options)
    model.save_pretrained(tmp_path / "out")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert is_foreign(theirs) and set(theirs.state_dict()) == set(model.state_dict())
    ours = load_model(tmp_path / "out")
    same_bytes(ours, model)
    assert torch.equal(logits(ours), logits(model))  # the threshold too

    copied = copy.deepcopy(model)
    told = model.config.quantization_config.to_dict()
    assert copied.config.quantization_config == told == copied.config.quantization_config.to_dict()
    fastpeft.attach(model, fastpeft.LoRA(r=4, target_modules=["q_proj"]))
    fastpeft.merge(model)
    skip = model.config.quantization_config.to_dict()["llm_int8_skip_modules"]
    assert "model.layers.1.self_attn.q_proj" in skip  # dense now: told as it is
