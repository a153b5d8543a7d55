"""transformers loads, saves and trains our layers; a process without the plug-in never takes packed
bytes for weights."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import fastpeft
import pytest
import tiny
import torch
import transformers
from fastpeft.errors import ConfigError, FastPeftError, FormatError, StateError
from fastpeft.hf import FastPeftConfig, from_bitsandbytes, load_model, save_quantized
from hf_models import FORMATS, MODELS, dense_folders, layers, logits, same_bytes  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny import one_thread  # noqa: F401

# ---- loading and saving


@pytest.mark.parametrize(
    ("name", "format", "options"),
    [("llama", *f) for f in FORMATS] + [(m, *f) for m in list(MODELS)[1:] for f in FORMATS[::3]],
)
def test_loading_quantises_and_the_saved_folder_gives_the_same_model(
    name, format, options, dense, tmp_path
):
    kind = type(MODELS[name]())
    config = FastPeftConfig(format, **options)
    model = kind.from_pretrained(dense(name), quantization_config=config)
    expected = kind.from_pretrained(dense(name))
    report = fastpeft.quantize(expected, format, **options)
    assert model.hf_quantizer.report.converted == report.converted != []
    assert model.hf_quantizer.report.skipped == report.skipped
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    same_bytes(model, expected)
    assert torch.equal(logits(model), logits(expected))

    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "fastpeft" and said["format"] == format
    for again in (kind.from_pretrained(tmp_path), load_model(tmp_path)):
        assert type(again) is kind and set(layers(again)) == set(report.converted)
        same_bytes(again, model)
        assert torch.equal(logits(again), logits(model))
        if format == "int8":
            assert {m.threshold for m in layers(again).values()} == {options["threshold"]}
    stored = load_file(tmp_path / "model.safetensors")
    assert any(t.dtype in (torch.uint8, torch.int8) for t in stored.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_keep_their_dtype(dtype, dense, tmp_path):
    config = FastPeftConfig("int8", threshold=None)
    model = transformers.LlamaForCausalLM.from_pretrained(
        dense("llama"), dtype=dtype, quantization_config=config
    )
    expected = transformers.LlamaForCausalLM.from_pretrained(dense("llama"), dtype=dtype)
    fastpeft.quantize(expected, "int8", threshold=None)
    same_bytes(model, expected)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.dtype == dtype
    assert {layer.weight_dtype for layer in layers(again).values()} == {dtype}
    assert {layer.scales.dtype for layer in layers(again).values()} == {torch.float32}
    assert torch.equal(logits(again), logits(model))


def test_shards_and_the_bare_model_of_a_folder(dense, tmp_path):
    config = FastPeftConfig("nf4")
    model = transformers.LlamaForCausalLM.from_pretrained(
        dense("llama"), quantization_config=config
    )
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same_bytes(load_model(tmp_path), model)
    bare = transformers.AutoModel.from_pretrained(tmp_path)  # names without "model."
    same_bytes(bare, model.model)


def test_a_head_that_the_folder_lacks_is_quantised_from_its_start(dense):
    model = transformers.BertForQuestionAnswering.from_pretrained(
        dense("bert"), quantization_config=FastPeftConfig("nf4")
    )
    head = model.qa_outputs
    assert isinstance(head, fastpeft.Linear4bit)
    weight = head.dequantize()
    assert torch.isfinite(weight).all() and 0 < weight.std() < 0.1
    assert not head.bias.any()


def test_skip_and_dense_heads(dense):
    config = FastPeftConfig("nf4", skip=["lm_head", "down_proj", "layers.0"])
    model = transformers.LlamaForCausalLM.from_pretrained(
        dense("llama"), quantization_config=config
    )
    names = set(layers(model))
    assert names and not any("layers.0" in n or "down_proj" in n or "lm_head" in n for n in names)
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear


def test_an_accelerate_hook_goes_over_to_the_layer():
    """A model spread over several GPUs has one on every module."""
    hooks = pytest.importorskip("accelerate.hooks")
    from fastpeft.hf.quantizer import Pending, _with_hook

    seat = Pending(torch.nn.Linear(64, 32), None)
    hooks.add_hook_to_module(seat, hooks.AlignDevicesHook(execution_device="cpu"))
    layer = seat.finish("x", FastPeftConfig("nf4"))
    x = torch.randn(3, 64)
    expected = layer(x)
    moved = _with_hook(layer, seat)
    assert moved is layer and layer._hf_hook.execution_device == "cpu"
    assert not hasattr(seat, "_hf_hook") and torch.equal(layer(x), expected)


# ---- the trap: a process that has not imported the plug-in

_PLAIN = """
import sys, transformers
transformers.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print("failed")
    else:
        print("loaded")
"""


def test_without_the_plug_in_our_folder_is_an_error(dense, tmp_path):
    for format in ("nf4", "int8"):
        config = FastPeftConfig(format)
        model = transformers.LlamaForCausalLM.from_pretrained(
            dense("llama"), quantization_config=config
        )
        model.save_pretrained(tmp_path / format)
    folders = [str(dense("llama")), str(tmp_path / "nf4"), str(tmp_path / "int8")]
    done = subprocess.run([sys.executable, "-c", _PLAIN, *folders], capture_output=True, text=True)
    assert done.stdout.split() == ["loaded", "failed", "failed"], done.stdout + done.stderr[-500:]


# ---- Trainer, peft, generate


def step(model, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in tiny.tokens(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=data)


def test_the_trainer_takes_it_once_there_is_an_adapter(dense, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(
        dense("llama"), quantization_config=FastPeftConfig("nf4")
    )
    quantizer = model.hf_quantizer
    assert quantizer.is_trainable and quantizer.is_compileable and quantizer.is_serializable()
    assert not quantizer.is_qat_trainable
    with pytest.raises(ValueError, match="purely quantized"):
        step(model, tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fastpeft.attach(model, fastpeft.LoRA(r=4))
    assert quantizer.is_qat_trainable
    step(model, tmp_path).train()
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    with fastpeft.disabled(model):
        fastpeft.detach(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not quantizer.is_qat_trainable


def test_peft_preparation_does_no_harm(dense):
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM.from_pretrained(
        dense("llama"), dtype=torch.bfloat16, quantization_config=FastPeftConfig("nf4")
    )
    before = {name: layer.dequantize() for name, layer in layers(model).items()}
    packed = {n: b.clone() for n, b in model.named_buffers() if b.dtype == torch.uint8}
    peft.prepare_model_for_kbit_training(model)
    assert packed and all(
        torch.equal(b, packed[n]) for n, b in model.named_buffers() if n in packed
    )
    for name, layer in layers(model).items():
        assert torch.equal(layer.dequantize(), before[name])
    fastpeft.attach(model, fastpeft.LoRA(r=4))
    tiny.loss(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_generate_and_copies(dense):
    model = transformers.LlamaForCausalLM.from_pretrained(
        dense("llama"), quantization_config=FastPeftConfig("nf4")
    )
    again = copy.deepcopy(model)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        model.generate(tiny.tokens(), **options), again.generate(tiny.tokens(), **options)
    )
    assert again.hf_quantizer is not model.hf_quantizer and again.hf_quantizer.is_trainable


# ---- refusals


def test_registering_twice_changes_nothing():
    from fastpeft.hf import config
    from transformers.quantizers import auto

    before = auto.AUTO_QUANTIZER_MAPPING["fastpeft"]
    config.register()
    assert auto.AUTO_QUANTIZER_MAPPING["fastpeft"] is before
    auto.AUTO_QUANTIZER_MAPPING["fastpeft"] = object
    try:
        with pytest.raises(ConfigError, match="builtins.object"):
            config.register()
    finally:
        auto.AUTO_QUANTIZER_MAPPING["fastpeft"] = before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "int3"}, "int3"),
        ({"blocksize": 48}, "power of two"),
        ({"threshold": -1.0}, "threshold"),
        ({"skip": "lm_head"}, "skip"),
        ({"rounding": "up"}, "rounding"),
        ({"quant_method": "gptq"}, "gptq"),
    ],
)
def test_bad_configs_are_refused(options, words):
    with pytest.raises(FastPeftError, match=words):
        FastPeftConfig(**options)


def test_what_cannot_be_loaded_is_refused(dense, tmp_path):
    kind = transformers.LlamaForCausalLM
    with pytest.raises(ConfigError, match="never made"):
        kind.from_pretrained(dense("llama"), quantization_config=FastPeftConfig("fp4"))
    with pytest.raises(ConfigError, match="GPUs alone"):
        places = {"model": "cpu", "lm_head": "disk"}
        config = FastPeftConfig("nf4")
        kind.from_pretrained(dense("llama"), quantization_config=config, device_map=places)
    with pytest.raises(ConfigError, match="config.json"):
        from_bitsandbytes(tmp_path)
    with pytest.raises(StateError, match="bitsandbytes"):
        from_bitsandbytes(tiny.llama())
    with pytest.raises(StateError, match="no quantised layer"):
        save_quantized(tiny.llama(), tmp_path)


@pytest.mark.parametrize("damage", ["nan", "missing", "shape", "homeless"])
def test_damaged_packed_tensors_are_refused(damage, dense, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(
        dense("llama"), quantization_config=FastPeftConfig("nf4", double_quant=False)
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.1.mlp.up_proj"
    if damage == "nan":
        tensors[f"{layer}.weight.absmax"][3] = float("nan")
    elif damage == "missing":
        del tensors[f"{layer}.weight.absmax"]
    elif damage == "shape":
        other = "model.layers.1.self_attn.k_proj"
        tensors = {
            k: tensors[k.replace(layer, other)].clone() if k.startswith(layer) else v
            for k, v in tensors.items()
        }
    else:
        tensors = {k.replace(layer, "model.layers.9.mlp.up_proj"): v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="up_proj"):
        load_model(tmp_path)


def test_a_folder_of_another_method_is_refused(dense, tmp_path):
    config = json.loads((dense("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="gptq"):
        load_model(tmp_path)
    config["quantization_config"] = None
    config["architectures"] = ["os.system"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="os.system"):
        load_model(tmp_path)
