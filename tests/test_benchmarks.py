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

import bench_qlinear  # noqa: E402
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
    assert "loss 0.500: nf4" in text and "M=3" in text
    assert "(0.50x)" in report.table(rows)


def made_rows() -> list[dict]:
    """Two directions and token counts; two providers, one of them with dependent launch too."""
    return [
        {
            **{"op": "qlinear", "race": "nf4", "N": 64, "K": 128, "R": 0, "dtype": "bfloat16"},
            **{"device": "a card", "torch": "2.11", "direction": direction, "M": M},
            **({"pdl": True} if name == "fastpeft pdl" else {}),
            **{"provider": name.split()[0], "us": us * M, "floor_us": 4.0 * M},
        }
        for direction in ("fwd", "dgrad")
        for M in (1, 64)
        for name, us in (("fastpeft", 8.0), ("fastpeft pdl", 5.0), ("torch", 7.0))
    ]


def test_standing_by_direction_with_every_loss_and_the_roof():
    text = report.standing(made_rows())
    assert "against torch: 0 wins, 0 ties, 4 losses" in text
    assert "nf4 dgrad: 0 wins, 0 ties, 2 losses" in text and text.count("loss 0.875") == 4
    assert "over without, geometric mean 0.625, 0.625 ... 0.625" in text
    assert "fastpeft 50 %" in text and "fastpeft pdl 80 %" in text and "torch 57 %" in text
    table = report.table(made_rows())
    assert "floor" in table and "8 us (50 %)" in table and "fastpeft pdl" in table


def test_a_file_of_rows_becomes_a_table(tmp_path, capsys):
    """Races that share peers' rows stand apart: a row file tells them by order alone."""
    rows = []
    for race, note, ours in (
        ("nf4", "skinny", 4.0),
        ("int8", "skinny", 20.0),
        ("nf4", f"skinny; {report.AS_ARCH}80", 8.0),
    ):
        for M in (1, 16):
            for provider, format, us in (("fastpeft", race, ours), ("torch", "bf16", 10.0)):
                rows.append({"op": "qlinear", "direction": "fwd", "M": M, "N": 64, "K": 128})
                rows[-1] |= {"R": 0, "dtype": "bfloat16", "provider": provider, "format": format}
                rows[-1] |= {"us": us, "commit": "c"} | ({"note": note} if race == format else {})
    rows.append({**rows[0], "note": f"{report.NATIVE}", "us": 99.0})  # raced nobody
    rows.append({**rows[0], "commit": "another", "us": 99.0})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.main([str(path), "--commit", "c"]) == 0
    out = capsys.readouterr().out
    assert "| nf4 | bfloat16 | bare | fwd | torch | 2 | 2.50 | 2, 0, 0 | 2.50 |" in out
    assert "| int8 | bfloat16 | bare | fwd | torch | 2 | 0.50 | 0, 0, 2 | 0.50 |" in out
    assert "| nf4, kernels of sm_80 | bfloat16 | bare | fwd | torch | 2 | 1.25 | 2, 0, 0" in out
    assert "Against torch: 4 wins, 0 ties, 2 losses of 6" in out
    assert "- int8 fwd bfloat16 64 x 128: M = 1 0.50, 16 0.50" in out
    assert report.main([str(path), "--commit", "none"]) == 1


def test_two_plots_beside_the_rows(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = report.plots(made_rows(), tmp_path / "rows")
    assert [path.name for path in drawn] == ["rows-time.png", "rows-share.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert report.plots([{"op": "bottleneck", "us": 1.0, "provider": "torch"}], tmp_path) == []


def test_roof_is_the_slower_of_bytes_and_operations():
    roof = harness.Roof(1000.0, {"bfloat16": 10.0, "int8": 20.0})
    assert roof.us(1e9, 1.0, "bfloat16") == pytest.approx(1000.0)
    assert roof.us(1.0, 1e9, "bfloat16") == pytest.approx(100.0)
    case = Case("llm.int8", "bfloat16", M=512, N=4096, K=4096)
    fwd, dgrad = (bench_qlinear.floor_us(case, d, roof) for d in ("fwd", "dgrad"))
    assert dgrad == pytest.approx(2 * fwd) and bench_qlinear.floor_us(case, "fwd", None) == 0


def test_fastpeft_runs_once_more_with_dependent_launch():
    work = harness.Work("fastpeft", lambda i: None, 1, 0.0)
    assert [w.label for w in harness.variants(work, True)] == ["fastpeft", "fastpeft pdl"]
    assert harness.variants(work, False) == [work]
    other = harness.Work("torch", lambda i: None, 1, 0.0)
    assert harness.variants(other, True) == [other]


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
        assert "pdl" not in row
        if row["op"] == "qlinear":
            assert any(kernel in row["note"] for kernel in ("fused", "matmul")), row
    assert {row["provider"] for row in rows} == {"fastpeft", "torch", "dequant+torch"}


def test_a_race_draws_and_sums_up(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    argv = ("--shapes", "16x64", "--M", "1,4", "--R", "0", "--format", "nf4,int8")
    rows = race(tmp_path, *argv, "--providers", "fastpeft,dequant+torch")
    assert {row["direction"] for row in rows} == {"fwd", "dgrad"}  # the default
    out = capsys.readouterr().out
    assert "roof: " in out and "share of the roof" in out and "against dequant+torch" in out
    assert (tmp_path / "rows-time.png").is_file() and (tmp_path / "rows-share.png").is_file()
    race(tmp_path, *argv, "--providers", "fastpeft", "--plot", str(tmp_path / "a"), "--pdl")
    assert (tmp_path / "a-time.png").is_file()
    assert "pdl" not in (tmp_path / "rows.jsonl").read_text()  # the CPU has no such launch


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
