"""The benchmarks' own arithmetic; a small race runs, checks values and writes whole rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from cases import Case

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import harness  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import shapes  # noqa: E402

KEYS = {
    *"date commit device torch cuda op provider direction M N K R D dtype format pdl us".split(),
    *"us_p20 us_p80 eager_us tflops gbs peak_mib ms tokens_per_s note".split(),
}  # of a row


def race(tmp_path, *argv: str) -> list[dict]:
    out = tmp_path / "rows.jsonl"
    assert run.main([*argv, "--device", "cpu", "--rounds", "2", "--out", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_percentiles():
    median, p20, p80 = harness.percentiles([float(i) for i in range(11)])
    assert (median, p20, p80) == (5.0, 2.0, 8.0)


def test_shapes_from_text():
    assert shapes.linear_shapes("smollm2-135m,7x100,576x576") == [
        *shapes.LINEAR["smollm2-135m"],
        (7, 100),
    ]
    with pytest.raises(ValueError, match="llama3-8b"):
        shapes.linear_shapes("7by100")


def test_operations_and_bytes_of_a_case():
    case = Case("nf4", "bfloat16", M=10, N=64, K=128, R=8)
    assert case.flops("fwd") == 2 * 10 * 64 * 128 + 2 * 10 * 8 * (64 + 128)
    assert case.flops("fwd+bwd") == 4 * 10 * 64 * 128 + 6 * 10 * 8 * (64 + 128)
    assert case.weight_bytes() == pytest.approx(64 * 128 * 0.5159, rel=1e-3)
    assert case.bytes("fwd") == case.weight_bytes() + 2 * (10 + 8) * (64 + 128)


def test_standing_counts_and_means():
    rows = [
        {"op": "qlinear", "M": M, "provider": provider, "us": us, "race": "nf4"}
        for M, ours, theirs in ((1, 10.0, 20.0), (2, 10.0, 10.1), (3, 10.0, 5.0))
        for provider, us in (("fastpeft", ours), ("torch", theirs))
    ]
    text = report.standing(rows)
    assert "against torch: 1 wins, 1 ties, 1 losses" in text
    assert "1.003" in text  # cube root of 2 * 1.01 * 0.5
    assert "loss 0.500: nf4  M=3" in text
    assert "(0.50x)" in report.table(rows)


def test_wrong_values_have_no_time():
    exact = torch.randn(8, 8, dtype=torch.float64)

    def formulas(dtype, W, quantised):
        return {"y": exact.to(dtype)}

    right = harness.Work("fastpeft", lambda i: None, 1, 0.0, lambda: {"y": exact.float()})
    assert harness.checked(right, formulas, torch.float32) == (None, "")
    wrong = harness.Work("fastpeft", lambda i: None, 1, 0.0, lambda: {"y": exact.float() + 1e-3})
    refused, _ = harness.checked(wrong, formulas, torch.float32)
    assert "elements over" in refused
    low = harness.Work("other", lambda i: None, 1, 0.0, lambda: {"y": exact.bfloat16().float()})
    assert harness.checked(low, formulas, torch.float32) == (
        None,
        "as exact as torch.bfloat16 only",
    )


def test_linear_layers_race(tmp_path):
    rows = race(
        tmp_path,
        *("qlinear", "lora", "dequantize", "--shapes", "7x128", "--M", "1,5", "--R", "0,4"),
        *("--directions", "fwd,dgrad,fwd+bwd", "--providers", "fastpeft,torch,dequant+torch"),
    )
    assert all(set(row) <= KEYS for row in rows)
    ours = [row for row in rows if row["provider"] == "fastpeft"]
    # 2 M x (3 directions + 2 with LoRA), 2 M x 2 directions with LoRA on a dense weight, 1
    assert [sum(row["op"] == op for row in ours) for op in ("qlinear", "lora", "dequantize")] == [
        10,
        4,
        1,
    ]
    for row in ours:
        assert row["us"] > 0 and row["us_p20"] <= row["us"] <= row["us_p80"]
        assert "threads" in row["device"] and row["torch"] == torch.__version__ and row["commit"]
    assert {row["provider"] for row in rows} == {"fastpeft", "torch", "dequant+torch"}


def test_bottleneck_race(tmp_path):
    argv = ("bottleneck", "--shapes", "32x64", "--M", "3", "--D", "8")
    rows = race(tmp_path, *argv, "--providers", "fastpeft,torch")
    assert [(r["provider"], r["direction"]) for r in rows] == [
        (provider, direction)
        for direction in ("fwd", "fwd+bwd")
        for provider in ("fastpeft", "torch")
    ]


def test_training_step_race(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    argv = ("train-step", "--model", "tiny", "--batch", "1", "--length", "16", "--R", "4")
    rows = race(tmp_path, *argv, "--providers", "fastpeft")
    assert len(rows) == 1 and rows[0]["note"].startswith("qlora ckpt tiny 1x16")
    assert rows[0]["tokens_per_s"] == pytest.approx(16 / rows[0]["ms"] * 1e3, rel=1e-3)


def test_a_spent_budget_is_told(tmp_path, capsys):
    argv = ["qlinear", "--device", "cpu", "--shapes", "7x100", "--time-budget", "0"]
    assert run.main([*argv, "--out", str(tmp_path / "rows.jsonl")]) == 1
    assert "problems NOT run" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["nonsense"], ["--shapes", "7by3"], ["--providers", "nobody"]])
def test_wrong_input_is_refused(argv, capsys):
    assert run.main([*argv, "--device", "cpu"]) == 2
    assert "expected" in capsys.readouterr().err
