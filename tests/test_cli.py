"""The command line: exit codes, two-line errors, doctor (with a broken library too), inspect."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastpeft
import pytest
import torch
from fastpeft.cli import COMMANDS, diagnosis, main
from fastpeft.cli.errors import explain, split_message
from fastpeft.cli.show import as_bytes, as_seconds
from fastpeft.errors import AdapterError, ConfigError, LibraryError, StateError, refuse
from tiny_lm import TEXT, save_tiny, tiny_model

PACKAGE = Path(fastpeft.__file__).resolve().parent


@pytest.fixture
def run(capsys):
    """run("plan", "1", "2", "3") -> (exit code, stdout, lines of stderr), in this process."""

    def call(*arguments: str) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err.splitlines()

    return call


def fails_in_two_lines(result, code: int, *words: str) -> None:
    got, _, lines = result
    assert got == code, lines
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("fix: ")
    assert len(lines[1]) > len("fix: ")
    for word in words:
        assert word in "\n".join(lines)


# ---- errors


def test_messages_are_split_into_what_and_what_to_do():
    error = refuse(ConfigError, "r", 0, "at least 1. x", "Give a rank. Or two.")
    assert split_message("a.b: got ./x.y, expected z. Do this. And that.") == (
        "a.b: got ./x.y, expected z",
        "Do this. And that.",
    )
    assert explain(error)[1].endswith("Or two.")
    assert split_message("nothing to split") == ("nothing to split", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (AdapterError("x"), 2),
        (StateError("x"), 1),
        (LibraryError("x"), 1),
        (FileNotFoundError(2, "No such file", "/nowhere"), 2),
        (RuntimeError("x\ny"), 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_every_error_has_a_code_and_two_lines(error, code):
    what, todo, got = explain(error)
    assert got == code and what and todo and "\n" not in what + todo


def test_unknown_words_are_input_errors(run):
    fails_in_two_lines(run("trian"), 2, "trian")
    fails_in_two_lines(run("plan", "1", "2"), 2, "K", "plan --help")
    fails_in_two_lines(run("plan", "one", "2", "3"), 2, "M", "int")
    fails_in_two_lines(run("train", "--ranks", "3"), 2, "--ranks")


def test_help_lists_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0 and all(name in out for name in COMMANDS)


def test_as_a_module_with_a_wrong_input():
    done = subprocess.run(
        [sys.executable, "-m", "fastpeft", "train", "no-such-recipe"],
        capture_output=True,
        text=True,
    )
    fails_in_two_lines((done.returncode, done.stdout, done.stderr.splitlines()), 2, "demo")


# ---- train, evaluate, generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    save_tiny(path / "model")
    (path / "text.txt").write_text(TEXT * 60)
    return path


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flags(folder: Path) -> list[str]:
    words = f"--model {folder}/model --data {folder}/text.txt --r 4 --targets q_proj,v_proj"
    more = "--steps 3 --seq-len 32 --lr 0.01 --dtype float32 --device cpu --set warmup_steps=1"
    return [*words.split(), *more.split()]


def test_train_evaluate_generate(run, folder, tmp_path):
    output = str(tmp_path / "run")
    code, out, _ = run("train", *flags(folder), "-o", output)
    assert code == 0 and "held-out loss after" in out and "tokens/s" in out
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "adapter",
        "metrics.jsonl",
        "loss.png",
        "recipe.yaml",
        "summary.json",
    }
    fails_in_two_lines(run("train", *flags(folder), "-o", output), 2, "--overwrite")
    code, out, _ = run("train", "-o", output, "--resume", "--json")
    assert code == 0 and json.loads(out)["steps"] == 3
    code, out, _ = run("evaluate", output, "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["difference"] <= 1e-6

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["loss_after"] += 0.01
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    code, _, lines = run("evaluate", output, "--device", "cpu")
    assert code == 1 and lines[-2].startswith("error: held-out loss")

    options = ["--prompt", "the quick ", "--max-new-tokens", "5", "--device", "cpu", "--json"]
    code, out, _ = run("generate", output, *options, "--both")
    answer = json.loads(out)
    assert code == 0 and {"with adapter", "without adapter"} <= answer.keys()
    adapter = ["--adapter", f"{output}/adapter", "--format", "nf4", "--dtype", "float32"]
    code, out, _ = run("generate", f"{folder}/model", *adapter, *options)
    assert code == 0 and json.loads(out)["text"] == answer["with adapter"]
    fails_in_two_lines(run("generate", output, "--prompt", " ", "--device", "cpu"), 2, "prompt")


def test_train_refuses_wrong_inputs_before_it_starts(run, folder, tmp_path):
    base = flags(folder)
    output = ["-o", str(tmp_path / "run")]
    fails_in_two_lines(run("train", *base, *output, "--format", "nf5"), 2, "nf5", "nf4")
    fails_in_two_lines(run("train", *base, *output, "--set", "warmup"), 2, "name=value")
    fails_in_two_lines(run("train", *base, *output, "--set", "warmpu_steps=2"), 2, "warmup_steps")
    fails_in_two_lines(run("train", *base, *output, "--model", "/nowhere"), 2, "/nowhere")
    fails_in_two_lines(run("train", *base, *output, "--resume"), 2, "--resume")
    fails_in_two_lines(run("evaluate", str(tmp_path / "nothing")), 2, "recipe.yaml")


def test_target_modules_that_match_nothing_are_an_input_error(run, folder, tmp_path):
    words = ["-o", str(tmp_path / "run"), "--overwrite", "--targets", "q_porj"]
    code, _, lines = run("train", *flags(folder), *words)
    assert code == 2 and "q_porj" in lines[-2] and lines[-1].startswith("fix: ")


# ---- inspect


@pytest.fixture
def adapter(tmp_path) -> Path:
    model = tiny_model()
    fastpeft.attach(model, fastpeft.LoRA(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    return fastpeft.save_adapter(model, tmp_path / "adapter")


def test_inspect_adapter(run, adapter):
    code, out, _ = run("inspect", str(adapter), "--json")
    facts = json.loads(out)
    assert code == 0 and facts["kind"] == "adapter" and facts["problems"] == []
    assert facts["ranks"] == {"4": 4} and facts["targets"] == {"q_proj": 2, "v_proj": 2}
    assert facts["config"]["peft_type"] == "LORA" and facts["config"]["r"] == 4
    count = 2 * (4 * 64 + 64 * 4) + 2 * (4 * 64 + 32 * 4)
    assert facts["parameters"] == count and facts["bytes"] == 4 * count
    code, out, _ = run("inspect", str(adapter))
    assert code == 0 and "q_proj x2" in out and "no problem found" in out


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the tensors of an adapter folder."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fault", ["nan", "lost", "truncated", "field", "rank", "json"])
def test_inspect_finds_problems(run, adapter, fault):
    config = adapter / "adapter_config.json"
    if fault == "nan":
        rewrite(adapter, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
        word = "NaN"
    elif fault == "lost":
        rewrite(adapter, lambda tensors: tensors.pop(sorted(tensors)[0]))
        word = "lora_A"
    elif fault == "truncated":
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        word = "does not read"
    elif fault == "json":
        config.write_text("{")
        word = "JSON"
    else:
        values = json.loads(config.read_text())
        values |= {"new_maths": 3} if fault == "field" else {"r": 5}
        config.write_text(json.dumps(values))
        word = "new_maths" if fault == "field" else "rank 4"
    code, out, _ = run("inspect", str(adapter), "--json")
    problems = json.loads(out)["problems"]
    assert code == 1 and any(word in problem for problem in problems), problems


def test_inspect_checkpoint(run, folder, tmp_path):
    code, out, _ = run("inspect", str(folder / "model"), "--json")
    facts = json.loads(out)
    assert code == 0 and facts["kind"] == "checkpoint" and facts["config"]["model_type"] == "llama"
    assert facts["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert facts["bytes_by_dtype"] == {"F32": facts["bytes"]}

    from safetensors.torch import save_file

    model = tiny_model()
    report = fastpeft.quantize(model, "nf4")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    state.pop("lm_head.weight")  # tied to the embedding
    shutil.copytree(folder / "model", tmp_path / "packed")
    save_file(state, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = run("inspect", str(tmp_path / "packed"), "--json")
    assert code == 0 and json.loads(out)["quantized"] == {"nf4": len(report.converted)}
    lost = f"{report.converted[0]}.weight.absmax"
    state.pop(lost)
    save_file(state, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = run("inspect", str(tmp_path / "packed"))
    assert code == 1 and "weight.absmax missing" in out


def test_inspect_of_what_is_no_such_folder(run, tmp_path):
    fails_in_two_lines(run("inspect", str(tmp_path / "no")), 2, "expected a folder")
    fails_in_two_lines(run("inspect", str(tmp_path)), 2, "adapter_config.json")


# ---- doctor, plan


def test_doctor(run):
    code, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["library"]["loads"] and facts["self_test"]["cpu"] == "ok"
    assert code == (1 if facts["problems"] else 0)
    code, out, _ = run("doctor")
    assert "library" in out and "loads" in out


def test_doctor_shows_the_variables_that_are_set(run, monkeypatch):
    monkeypatch.setenv("FASTPEFT_PDL", "0")
    monkeypatch.delenv("FASTPEFT_ARCH", raising=False)
    assert json.loads(run("doctor", "--json")[1])["launch"]["variables"]["FASTPEFT_PDL"] == "0"
    out = run("doctor")[1]
    assert "FASTPEFT_PDL" in out and "FASTPEFT_ARCH " not in out


def broken_copy(tmp_path: Path, library: bytes | None) -> dict[str, str]:
    """An environment whose fastpeft has this for a library; None: none."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, tmp_path / "fastpeft", ignore=ignore)
    if library is not None:
        (tmp_path / "fastpeft" / "libfastpeft_ops.so").write_bytes(library)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("library", [b"this is no library", None], ids=["garbage", "missing"])
def test_doctor_and_plan_with_a_broken_library(tmp_path, library):
    environment = broken_copy(tmp_path, library)

    def call(*arguments: str):
        command = [sys.executable, "-m", "fastpeft", *arguments]
        # Elsewhere, so that the copy and not a checkout in the working folder is imported.
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )

    done = call("doctor", "--json")
    assert done.returncode == 1, done.stderr
    facts = json.loads(done.stdout)
    assert str(tmp_path) in facts["library"]["path"] and not facts["library"]["loads"]
    (problem,) = [p for p in facts["problems"] if "libfastpeft_ops.so" in p["what"]]
    assert problem["fix"].startswith("pip install")
    if library is None:
        done = call("plan", "1", "64", "64")
        lines = done.stderr.splitlines()
        fails_in_two_lines((done.returncode, done.stdout, lines), 1, "_C", "pip install")


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        ("80-real;90a-real;90-virtual", (8, 0), True),
        ("80-real,90a-real,90-virtual", (8, 9), True),
        ("80-real;90a-real;90-virtual", (9, 0), True),
        ("80-real;90a-real;90-virtual", (12, 0), True),
        ("80-real;90a-real;90-virtual", (7, 5), False),
        ("90a-real", (12, 0), False),
        ("120", (10, 0), False),
        ("80", (9, 0), True),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_a_build_covers(archs, capability, covered):
    assert diagnosis.covers(archs, capability) is covered


def machine(**changes) -> dict:
    """Facts of a healthy GPU machine, with some changed."""
    gpu = {"index": 0, "name": "G", "driver": "1", "capability": "9.0", "covered": True}
    facts = {
        "torch": {"version": "2.13.0", "cuda": "13.0", "error": None},
        "library": {"loads": True, "build": {"cuda": True, "cuda_archs": "90a-real"}},
        "gpus": [gpu],
        "cuda_usable": True,
        "self_test": {"cpu": "ok"},
        "packages": dict.fromkeys(diagnosis.PACKAGES, "1"),
    }
    return {**facts, **changes}


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"torch": {"version": None, "error": "ImportError: x"}}, "does not import", "torch>=2.11"),
        ({"torch": {"version": "2.9.1", "cuda": "12", "error": None}}, "too old", "torch>=2.11"),
        ({"torch": {"version": "2.13", "cuda": None, "error": None}}, "no CUDA", "torch"),
        ({"library": {"loads": True, "build": {"cuda": False}}}, "CPU kernels", "FASTPEFT_CUDA=ON"),
        ({"cuda_usable": False}, "cannot use", "driver"),
        ({"self_test": {"cpu": "off by 1"}}, "off by 1", "pip install"),
    ],
)
def test_doctor_knows_a_fix_for_each_problem(changes, what, fix):
    problems, _ = diagnosis._problems(machine(**changes))
    assert any(what in p["what"] and fix in p["fix"] for p in problems), problems
    assert diagnosis._problems(machine()) == ([], [])


def test_plan(run):
    pytest.importorskip("fastpeft._C", reason="the plan is printed by fastpeft._C: not built")
    code, out, _ = run("plan", "1", "576", "576", "--arch", "0", "--sm-count", "2", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["kernel"] and plan["workspace_bytes"] >= 0
    assert plan["floor"]["machine"]["name"] and plan["floor"]["us"] > 0
    code, out, _ = run("plan", "1", "576", "576", "--arch", "0", "--sm-count", "2")
    assert code == 0 and out.startswith(plan["text"] + "\n")
    rows = dict(
        line.strip().split("  ", 1) for line in out.splitlines()[1:] if "  " in line.strip()
    )
    assert rows["kernel"].strip().startswith(plan["kernel"])
    assert rows.keys() >= {"workspace", "floor", "memory", "arithmetic", "rates"}
    fails_in_two_lines(run("plan", "1", "576", "576", "--format", "nf5"), 2, "nf5")


def test_plan_for_a_named_card(run):
    pytest.importorskip("fastpeft._C", reason="the plan is printed by fastpeft._C: not built")
    for options, arch, name in (
        (("--machine", "RTX-3090"), "sm_86", "RTX-3090"),
        (("--machine", "A100-SXM", "--R", "16"), "sm_80", "A100-SXM"),
        (("--machine", "A100-SXM", "--arch", "0"), "cpu", "A100-SXM"),
        (("--arch", "90"), "sm_90", ""),
    ):
        code, out, _ = run("plan", "64", "4096", "4096", *options)
        assert code == 0 and f"on {arch}:" in out and name in out, out
    fails_in_two_lines(run("plan", "1", "64", "64", "--machine", "abacus"), 2, "H100-SXM")


def test_units():
    assert [as_bytes(n) for n in (3, 1536, 3 << 20, 5 << 30)] == [
        "3 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.00 GiB",
    ]
    assert [as_seconds(s) for s in (3.21, 75)] == ["3.2 s", "1:15 min"]
