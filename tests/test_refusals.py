"""What an adapter folder, a name or a model is refused for, and that the message says what to do.

The numbers are those of the list of refusals in the project's interop guide. Each test reads the
message and looks that the model was left as it was.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import fastpeft
import pytest
import tiny
import torch
from fastpeft import LoRA
from fastpeft.attach import adapter_parameters, state_of
from fastpeft.errors import AdapterError, ConfigError
from fastpeft.methods.method import METHODS, register_method
from safetensors.torch import load_file, save_file
from tiny import one_thread  # noqa: F401
from torch import nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good folder: rank 4 on q and v of the tiny llama, for the test to spoil."""
    model = tiny.llama()
    fastpeft.attach(model, LoRA(r=4, base_model_name_or_path="some/llama"))
    tiny.shake(adapter_parameters(model, "default").values())
    return fastpeft.save_adapter(model, tmp_path / "adapter")


def refused(folder, message: str, model: nn.Module | None = None, error=AdapterError, **kwargs):
    """Loading raises `error` with `message`; the model and its active adapter stay as they are."""
    if model is None:
        model = tiny.llama()
        fastpeft.attach(model, LoRA(r=2), "other")
    before, state, logits = tiny.fingerprint(model), state_of(model), tiny.logits(model)
    active = fastpeft.adapters(model).active
    with pytest.raises(error, match=message):
        fastpeft.load_adapter(model, folder, "new", **kwargs)
    tiny.assert_same(before, tiny.fingerprint(model))
    assert state_of(model) is state and fastpeft.adapters(model).active == active
    assert torch.equal(tiny.logits(model), logits)


def change(folder: Path, how) -> None:
    tensors = how(load_file(folder / WEIGHTS))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def set_fields(folder: Path, **fields) -> None:
    config = {**json.loads((folder / CONFIG).read_text()), **fields}
    (folder / CONFIG).write_text(json.dumps(config))


def test_the_good_folder_loads(folder):
    fastpeft.load_adapter(tiny.llama(), folder)


# ---- 1 keys


def test_01_missing_key(folder):
    change(folder, lambda t: {k: v for k, v in t.items() if k != f"{Q0}.lora_B.weight"})
    refused(folder, r"q_proj.lora_A.weight': got no '.*q_proj.lora_B.weight', expected both")


def test_01_missing_layer(folder):
    change(folder, lambda t: {k: v for k, v in t.items() if "layers.1." not in k})
    refused(
        folder,
        r"4 missing keys \('base_model.model.model.layers.1.*The file has layers 0, the .*0 to 1",
    )


def test_01_unexpected_key(folder):
    change(folder, lambda t: {**t, f"{PREFIX}lm_head.weight": torch.ones(2, 2)})
    refused(
        folder,
        r"1 unexpected keys \('base_model.model.lm_head.weight'\).*It was made for 'some/llama'",
    )


def test_01_renamed_key(folder):
    change(
        folder,
        lambda t: {k.replace("1.self_attn.q_proj", "1.attn.q_proj"): v for k, v in t.items()},
    )
    refused(
        folder,
        r"2 missing keys .* and 2 unexpected keys .*model.layers.1.attn.q_proj.lora_A.weight' "
        r"may be a renamed '.*model.layers.1.self_attn.q_proj.lora_A.weight'",
    )


def test_01_foreign_prefix(folder):
    change(folder, lambda t: {k.removeprefix("base_model."): v for k, v in t.items()})
    refused(folder, r"8 missing keys .* and 8 unexpected keys \('model.model.layers.0")


# ---- 2 shapes, 3 ranks, 4 shards, 5 numbers, 6 dtypes


def test_02_shape_against_the_module(folder):
    key = f"{Q0}.lora_A.weight"
    change(folder, lambda t: {**t, key: torch.ones(4, 63)})
    refused(
        folder,
        r"q_proj.lora_A.weight': got shape \[4, 63\], expected \[4, 64\]. The module has 64 input",
    )


def test_02_shape_of_a_saved_module(tmp_path):
    model = tiny.llama()
    fastpeft.attach(model, LoRA(modules_to_save=["lm_head"]))
    folder = fastpeft.save_adapter(model, tmp_path)
    change(folder, lambda t: {**t, f"{PREFIX}lm_head.weight": torch.ones(129, 64)})
    refused(folder, r"lm_head.weight': got shape \[129, 64\], expected \[128, 64\]")


@pytest.mark.parametrize("rank", [0, -3, 2.5, True, "8"])
def test_03_impossible_rank(folder, rank):
    set_fields(folder, r=rank)
    refused(folder, rf"^r: got {rank!r}, expected an integer >= 1", error=ConfigError)


def test_03_impossible_rank_of_a_pattern(folder):
    set_fields(folder, rank_pattern={"q_proj": 0})
    refused(folder, r"rank_pattern\['q_proj'\]: got 0", error=ConfigError)


def test_03_rank_above_the_width_warns():
    model = tiny.llama()
    with pytest.warns(UserWarning, match=r"r: got 40, expected at most min\(in, out\) = 32"):
        fastpeft.attach(model, LoRA(r=40, target_modules=["v_proj"]))


def test_03_ranks_of_a_and_b(folder):
    change(folder, lambda t: {**t, f"{Q0}.lora_B.weight": torch.ones(64, 5)})
    refused(
        folder, r"rank 4 in lora_A \[4, 64\], rank 5 in lora_B \[64, 5\], expected the same rank"
    )


def test_03_rank_of_the_config(folder):
    set_fields(folder, r=8)
    refused(
        folder, r"got shape \[4, 64\], expected \[8, 64\]. The tensor has rank 4, the config says 8"
    )


@pytest.mark.parametrize("shape", [(256,), (0, 64), (4, 0), (4, 64, 1)])
def test_04_shard(folder, shape):
    change(folder, lambda t: {**t, f"{Q0}.lora_A.weight": torch.ones(shape)})
    refused(folder, r"q_proj.lora_A.weight': got shape \[.*ZeRO-3 or FSDP: gather")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_05_not_finite(folder, value):
    change(folder, lambda t: {k: v.index_fill(0, torch.tensor([1]), value) for k, v in t.items()})
    refused(folder, "got NaN or Inf, expected finite numbers. Take an earlier checkpoint")


def test_05_a_diverged_adapter_is_not_saved(tmp_path):
    model = tiny.llama()
    fastpeft.attach(model, LoRA())
    next(iter(adapter_parameters(model, "default").values())).data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="adapter 'default', tensor '.*': got NaN or Inf"):
        fastpeft.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_06_dtype(folder, dtype):
    change(folder, lambda t: {k: v.to(dtype) for k, v in t.items()})
    refused(folder, rf"got {dtype}, expected float32, float16 or bfloat16")


# ---- 10 another base model


def test_10_other_depth(folder):
    model = tiny.llama(layers=1)
    refused(
        folder, r"4 unexpected keys .*layers 0 to 1, the adapter on this model 0: the base", model
    )


def test_10_other_width(folder):
    model = tiny.llama(hidden=32)
    refused(
        folder,
        r"got shape \[4, 64\], expected \[4, 32\].*32 input features.*made for 'some/llama'",
        model,
    )


def test_10_other_kv_heads(folder):
    model = tiny.llama()
    for layer in model.model.layers:
        layer.self_attn.v_proj = nn.Linear(64, 64, bias=False)
    wide = tiny.llama()
    wide.model.layers = nn.ModuleList()
    with pytest.raises(
        AdapterError, match=r"v_proj.lora_B.weight': got shape \[32, 4\].*64 output.*heads"
    ):
        fastpeft.load_adapter(model, folder)
    assert state_of(model) is None


def test_10_other_architecture(folder):
    message = r"does not fit this model: target_modules: got \['q_proj', 'v_proj'\].*'some/llama'"
    refused(folder, message, tiny.gpt2())


# ---- 11, 12 what we do not know


@pytest.mark.parametrize("kind", ["LOHA", "", None, 7, ["LORA"]])
def test_11_unknown_method(folder, kind):
    set_fields(folder, peft_type=kind)
    refused(folder, r"adapter_config.json': peft_type: got .*expected one of .*LORA")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 2]]),
        ("new", 0),
    ],
)
def test_11_set_field_that_changes_the_maths(folder, key, value):
    set_fields(folder, **{key: value})
    refused(folder, rf"field '{key}': got .*expected null, false or empty.*not supported")


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_11_start_that_changed_the_base(folder, how):
    set_fields(folder, init_lora_weights=how)
    refused(folder, rf"'init_lora_weights': got '{how}', expected .*base weights are the original")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", "16"),
        ("target_modules", 3),
        ("rank_pattern", []),
        ("layers_to_transform", ["0"]),
    ],
)
def test_11_field_of_the_wrong_kind(folder, key, value):
    if value == []:
        value = [1]
    set_fields(folder, **{key: value})
    refused(folder, key, error=ConfigError)


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_12_bias_modes(folder, mode):
    set_fields(folder, bias=mode)
    refused(folder, rf"bias: got '{mode}', expected 'none'")


# ---- 13 names: see also test_attach


def test_13_names(folder):
    model = tiny.llama()
    for bad in ("", "a.b", "../a"):
        with pytest.raises(AdapterError, match="adapter name: got "):
            fastpeft.load_adapter(model, folder, bad)
    fastpeft.load_adapter(model, folder, "a")
    with pytest.raises(AdapterError, match="'a', which is attached already"):
        fastpeft.load_adapter(model, folder, "a")


# ---- 15 paths and files


def test_15_no_folder(folder):
    refused(folder / "nowhere", "path '.*nowhere': got nothing there, expected a folder")
    refused(folder / WEIGHTS, "got a file, expected a folder. Give the folder that holds")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_15_link_out_of_the_folder(folder, tmp_path, name):
    secret = tmp_path / "secret"
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    refused(
        folder, rf"file '.*{name}': got a link to '.*secret', expected a file inside the folder"
    )


def test_15_links_inside_the_folder_and_to_the_hubs_blobs_are_good(folder, tmp_path):
    (folder / WEIGHTS).rename(folder / "real")
    (folder / WEIGHTS).symlink_to("real")
    fastpeft.load_adapter(tiny.llama(), folder)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (folder / name).resolve().rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    fastpeft.load_adapter(tiny.llama(), snapshot)


def test_15_dangling_link_and_loop(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("gone")
    refused(folder, "adapter_config.json': got .*No such file")
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(CONFIG)
    refused(folder, "adapter_config.json': got .*(loop|levels of symbolic links)")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_15_things_that_are_no_files(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, rf"{name}': got a folder, expected a regular file")
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    refused(folder, rf"{name}': got a device, pipe or socket, expected a regular file")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_15_empty_file(folder, name):
    (folder / name).write_bytes(b"")
    refused(folder, rf"{name}': got an empty file, expected content")


@pytest.mark.parametrize("size", [3, 8, 100, -1])
def test_15_truncated_safetensors(folder, size):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
    refused(folder, rf"{WEIGHTS}': got .*expected a whole safetensors file")


def test_15_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, "got no adapter_model.safetensors")


def test_15_json_not_utf8(folder):
    (folder / CONFIG).write_bytes('{"peft_type": "LÖRA"}'.encode("latin-1"))
    refused(folder, "adapter_config.json': got .*utf-8.*expected UTF-8 text")


def test_15_json_too_large(folder):
    (folder / CONFIG).write_text("{" + " " * 10_000_001 + "}")
    refused(folder, r"got 10000003 bytes, expected at most 10000000")


def test_15_json_duplicate_key(folder):
    (folder / CONFIG).write_text('{"r": 8, "peft_type": "LORA", "r": 4}')
    refused(folder, "got key 'r' twice, expected each key once")
    (folder / CONFIG).write_text('{"peft_type": "LORA", "rank_pattern": {"q": 1, "q": 2}}')
    refused(folder, "got key 'q' twice")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "got list, expected a JSON object"),
        ('{"r": NaN}', "got NaN, expected finite numbers"),
        ('{"r": 1', "expected JSON"),
        ("[" * 100_000, "expected JSON"),
    ],
)
def test_15_json_that_is_none(folder, text, message):
    (folder / CONFIG).write_text(text)
    refused(folder, message)


def test_15_save_where_a_file_lies(tmp_path):
    model = tiny.llama()
    fastpeft.attach(model, LoRA())
    (tmp_path / "taken").write_text("x")
    with pytest.raises(AdapterError, match="taken': got a file, expected a folder"):
        fastpeft.save_adapter(model, tmp_path / "taken")


def test_15_pickle_with_code_does_not_run(folder, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    refused(folder, "a dict of tensors", allow_pickle_weights_only=True)
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    refused(folder, "a dict of tensors", allow_pickle_weights_only=True)
    torch.save([torch.ones(1)], folder / "adapter_model.bin")
    refused(folder, "got list, expected a dict of tensors", allow_pickle_weights_only=True)
    assert not (tmp_path / "ran").exists()


# ---- 24 registering twice


def test_24_method_registered_twice():
    before = dict(METHODS)
    with pytest.raises(ConfigError, match="method 'lora' is registered already"):
        register_method(METHODS["lora"])
    from dataclasses import replace

    with pytest.raises(
        ConfigError, match="'other': peft_type 'LORA' or config LoRA is registered already"
    ):
        register_method(replace(METHODS["lora"], name="other"))
    assert METHODS == before
