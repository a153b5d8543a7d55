"""`fastpeft compare`: rows measured once each in processes of their own, table, plot, refusals."""

from __future__ import annotations

import json

import pytest
from fastpeft.cli import main
from fastpeft.cli.compare import COLUMNS, cells
from fastpeft.errors import ConfigError, StateError
from fastpeft.train.compare import COMMON, ROWS, choose, compare, row_entries
from fastpeft.train.metrics import read_rows
from fastpeft.train.recipe import METHODS
from tiny_lm import TEXT, save_tiny


def test_every_method_of_the_package_has_a_row():
    assert {row["method"] for row in ROWS.values()} - {None} == set(METHODS)
    assert choose(None) == list(ROWS)
    assert choose(["prompt", " full"]) == ["full", "prompt"]
    for name in ROWS:  # each is a recipe that can run
        assert row_entries(name, {})["steps"] == COMMON["steps"]


@pytest.mark.parametrize(
    ("names", "changes", "words"),
    [
        (["qlra"], {}, ["qlra", "qlora"]),
        ([], {}, ["methods", "lora"]),
        (None, {"steps": 0}, ["steps", ">= 1"]),
        (None, {"dtype": "int3"}, ["dtype", "float32"]),
    ],
)
def test_wrong_questions_are_refused_before_anything_runs(names, changes, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        compare(tmp_path / "out", names, changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    save_tiny(path / "model")
    (path / "text.txt").write_text(TEXT * 60)
    (path / "held.txt").write_text(TEXT * 4)
    return path


def test_rows_table_and_plot(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    words = ["compare", "-o", str(out), "--model", str(texts / "model"), "--device", "cpu"]
    words += ["--data", str(texts / "text.txt"), "--heldout", str(texts / "held.txt")]
    words += ["--dtype", "float32", "--seq-len", "64", "--steps", "12"]

    def call(*more: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*words, *more])
        printed = capsys.readouterr()
        assert not caught.value.code, printed.err
        return printed.out

    rows = json.loads(call("--methods", "int8,qlora", "--json"))
    quantised = next(row for row in rows if row["name"] == "int8")
    lora = next(row for row in rows if row["name"] == "qlora")
    assert [row["name"] for row in rows] == ["qlora", "int8"]  # the table's order
    assert rows == json.loads((out / "comparison.json").read_text())
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert lora["loss_after"] < lora["loss_before"] and lora["trainable"] > 0
    weights = out / "qlora" / "adapter" / "adapter_model.safetensors"
    assert lora["adapter_bytes"] == weights.stat().st_size
    assert lora["steps"] == 12 and lora["lr"] == ROWS["qlora"]["lr"] and lora["tokens_per_s"] > 0
    assert lora["memory_bytes"] > 0 and lora["format"] == "nf4"
    assert quantised["trainable"] == 0 and quantised["tokens_per_s"] is None
    assert 0 < abs(quantised["loss_after"] - quantised["loss_before"]) < 0.1
    kinds = [row["kind"] for row in read_rows(out / "qlora" / "metrics.jsonl")]
    assert kinds.count("train") == 12

    # once more: nothing runs again, the table has the same values
    times = [(out / name / "result.json").stat().st_mtime_ns for name in ("int8", "qlora")]
    lines = call("--methods", "int8,qlora").splitlines()
    again = [(out / name / "result.json").stat().st_mtime_ns for name in ("int8", "qlora")]
    assert times == again
    head = next(i for i, line in enumerate(lines) if line.startswith("| method"))
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines[head : head + 4]]
    assert table[0] == list(COLUMNS) and table[2:] == [cells(row) for row in rows]

    # another question about one row: that one runs again
    rows = json.loads(call("--methods", "int8", "--seq-len", "32", "--json"))
    assert rows[0]["loss_before"] != quantised["loss_before"]


def test_a_failed_row_says_why_and_leaves_the_others(texts, tmp_path):
    changes = {"model": str(texts), "data": [str(texts / "text.txt")], "device": "cpu"}
    with pytest.raises(StateError, match=r"row lora: .*config\.json"):
        compare(tmp_path / "out", ["lora"], changes)
    assert "ConfigError" in (tmp_path / "out" / "lora" / "log.txt").read_text()
    assert not (tmp_path / "out" / "lora" / "result.json").exists()
