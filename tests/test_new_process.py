"""A saved adapter gives the same logits, bit for bit, in a process that has only the files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastpeft
import pytest
import torch
from fastpeft import IA3, Full, LoRA, Prefix, Prompt
from plug import build, logits, shake
from safetensors.torch import load_file

CASES = [
    (model, format, method)
    for model in ("llama", "gpt2", "bert", "t5")
    for format in (None, "nf4", "int8")
    for method in ("lora", "ia3", "prefix", "prompt", "full")
    if not (model == "t5" and method in ("prefix", "prompt"))  # refused, see their tests
    if not (format and method == "full")
]
CONFIGS = {
    "lora": lambda: LoRA(r=2),
    "ia3": IA3,
    "prefix": lambda: Prefix(4, projection=True),
    "prompt": lambda: Prompt(4),
    "full": Full,
}
CHILD = """
import sys
from pathlib import Path
import fastpeft, torch
from plug import build, logits
from safetensors.torch import save_file
torch.set_num_threads(int(sys.argv[2]))
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    name, format, _ = folder.name.split("-")
    model = build(name, None if format == "None" else format)
    found[folder.name] = logits(fastpeft.load_adapter(model, folder)).clone()
save_file(found, sys.argv[3])
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """({case: logits here}, {case: logits there}): one process for all cases, it starts slowly."""
    folders, answer = tmp_path_factory.mktemp("adapters"), tmp_path_factory.mktemp("answer")
    here = {}
    for name, format, method in CASES:
        model = build(name, format)
        fastpeft.attach(model, CONFIGS[method]())
        shake(model, std=0.1 if method == "full" else 0.5)
        key = f"{name}-{format}-{method}"
        here[key] = logits(model)
        fastpeft.save_adapter(model, folders / key)
    tests = Path(__file__).parent
    paths = [str(tests), str(Path(fastpeft.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, folders, str(torch.get_num_threads()), answer / "logits"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return here, load_file(answer / "logits")


@pytest.mark.parametrize("case", ["-".join(map(str, case)) for case in CASES])
def test_the_same_logits_there(case, results):
    here, there = results
    assert torch.equal(here[case], there[case])
    name, format, _ = case.split("-")
    bare = logits(build(name, None if format == "None" else format))
    assert not torch.equal(here[case], bare)
