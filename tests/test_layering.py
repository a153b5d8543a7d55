"""The layers of the source tree: who may include or import whom, who prints, how long a file is."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "fastpeft"
if not (ROOT / "csrc").is_dir() or not PACKAGE.is_dir():
    pytest.skip(f"{ROOT} is no source checkout", allow_module_level=True)

PYTHON = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"transformers", "peft", "accelerate", "trl", "datasets", "bitsandbytes", "matplotlib"}
NATIVE = sorted(
    p
    for d in ("csrc", "cuda")
    for p in (ROOT / d).rglob("*")
    if re.match(r"\.(h|cuh|cpp|cu)$", p.suffix)
)
# A part may import itself and the parts before it. "models" are the modules of MODELS; a module of
# the package root that is named nowhere (errors, patterns, ...) is a helper that every part may
# use.
LOWEST_FIRST = ["ops", "quant", "methods", "models", "hf", "train", "cli"]
MODELS = {"attach", "convert", "groups", "io", "merge", "report", "stream"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(node: ast.AST) -> list[str]:
    """Top-level names of the packages that an import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [node.module.split(".")[0]]
    return []


def at_import_time(module: ast.Module):
    """Nodes that run when the module is imported: no function bodies, no `if TYPE_CHECKING`."""
    waiting = list(module.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


# ---- C++ and CUDA


def test_native_sources_exist():
    assert {"csrc/core/formats.h", "csrc/ops/library.cpp"} <= {relative(p) for p in NATIVE}


def test_torch_is_included_in_csrc_ops_only():
    found = [
        f"{relative(p)}: {name}"
        for p in NATIVE
        if not relative(p).startswith("csrc/ops/")
        for name in includes(p)
        if re.match(r"(torch|ATen|c10|caffe2)/", name)
    ]
    assert not found, found


def test_of_torch_only_the_stable_abi():
    allowed = r"torch/(csrc/stable/|headeronly/|csrc/inductor/aoti_torch/(c|generated)/)"
    found = [
        f"{relative(p)}: {name}"
        for p in NATIVE
        for name in includes(p)
        if re.match(r"(torch|ATen|c10)/", name) and not re.match(allowed, name)
    ]
    assert not found, found


def test_core_and_cpu_know_no_cuda():
    found = [
        f"{relative(p)}: {name}"
        for p in NATIVE
        if relative(p).startswith(("csrc/core/", "csrc/cpu/"))
        for name in includes(p)
        if "cuda" in name or name.startswith(("cub/", "cute/", "cutlass/", "mma"))
    ]
    assert not found, found


@pytest.mark.parametrize(
    ("layer", "may_include"),
    [("csrc/core", ("core",)), ("csrc/cpu", ("core", "cpu")), ("cuda", ("core", "cuda"))],
)
def test_quoted_includes_stay_below(layer, may_include):
    """A file of a layer includes, by a quoted path, files of its own and of the layers below."""
    found = []
    for path in NATIVE:
        if not relative(path).startswith(layer + "/"):
            continue
        for name in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text()):
            roots = (path.parent, ROOT / "csrc", ROOT, ROOT / "cuda")
            target = next((r / name for r in roots if (r / name).exists()), None)
            where = relative(target.resolve()) if target else name
            if not where.startswith(tuple(f"csrc/{m}/" for m in may_include) + (layer + "/",)):
                found.append(f"{relative(path)}: {name}")
    assert not found, found


def test_pybind_only_in_the_module():
    found = [relative(p) for p in NATIVE if any(i.startswith("pybind11") for i in includes(p))]
    assert found == ["csrc/module.cpp"]


def test_cuda_switch_only_in_the_backend():
    """The one #ifdef for CUDA in csrc/ops stands in backend.*."""
    found = [
        relative(p)
        for p in NATIVE
        if relative(p).startswith("csrc/ops/")
        and p.stem != "backend"
        and re.search(r"#\s*if.*FASTPEFT_WITH_CUDA", p.read_text())
    ]
    assert not found, found


# ---- Python


def test_torch_ops_fastpeft_only_in_ops():
    found = []
    for path in PYTHON:
        if path.is_relative_to(PACKAGE / "ops"):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.fastpeft":
                found.append(f"{relative(path)}:{node.lineno}")
    assert not found, found


def test_heavy_packages_are_never_imported_at_import_time():
    """hf and train may at the head of a file, since nobody imports such a file before it is needed
    (test_import_is_light)."""
    found = [
        f"{relative(path)}:{node.lineno} {name}"
        for path in PYTHON
        for node in at_import_time(tree(path))
        for name in imported(node)
        if name in HEAVY and part_of(path.relative_to(PACKAGE).parts[0]) not in ("hf", "train")
    ]
    assert not found, found


def test_transformers_peft_accelerate_only_in_hf_and_train():
    found = [
        f"{relative(path)}:{node.lineno} {name}"
        for path in PYTHON
        for node in ast.walk(tree(path))
        for name in imported(node)
        if name in {"transformers", "peft", "accelerate"}
        and not path.is_relative_to(PACKAGE / "hf")
        and not path.is_relative_to(PACKAGE / "train")
    ]
    assert not found, found


def test_only_cli_prints():
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in PYTHON
        if not path.is_relative_to(PACKAGE / "cli")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"print", "sys.stdout.write"}
    ]
    assert not found, found


def part_of(name: str) -> str | None:
    """The part that a module or folder of the package belongs to; None for a helper."""
    return "models" if name in MODELS else name if name in LOWEST_FIRST else None


def inner_imports(path: Path):
    """(line, part) of every import of another part of the package, lazy ones included."""
    depth_names = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree(path)):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = depth_names[: len(depth_names) - (node.level - 1)]
            module = tuple(node.module.split(".")) if node.module else ()
            names = [base + module + (() if module else (a.name,)) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastpeft."):
            names = [tuple(node.module.split(".")[1:])]
        for name in names:
            if name and part_of(name[0]):
                yield node.lineno, part_of(name[0])


def test_imports_go_down_the_layers():
    found = []
    for path in PYTHON:
        own = part_of(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
        if own is None:
            continue
        for line, other in inner_imports(path):
            if LOWEST_FIRST.index(other) > LOWEST_FIRST.index(own):
                found.append(f"{relative(path)}:{line} {own} imports {other}")
    assert not found, found


def test_import_is_light():
    """`import fastpeft` imports neither transformers nor peft and starts no GPU."""
    code = """
import json, sys
import fastpeft
light = sorted(sys.modules)
fastpeft.QLoRALinear, fastpeft.quantize_tensor, fastpeft.attach, fastpeft.save_adapter
import fastpeft.cli, fastpeft.hf, fastpeft.train
import torch
print(json.dumps([light, sorted(sys.modules), torch.cuda.is_initialized()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    light, full, gpu_started = json.loads(done.stdout)
    for modules in (light, full):
        assert not HEAVY & {name.split(".")[0] for name in modules}
    assert not gpu_started


def test_every_public_name_resolves_and_is_documented():
    import fastpeft

    undocumented = [
        name
        for name in fastpeft.__all__
        if not name.startswith("_") and not (getattr(fastpeft, name).__doc__ or "").strip()
    ]
    assert not undocumented, undocumented


# ---- size


def test_files_are_short():
    """About 400 lines, 15 % of grace; a kernel file (.cu) 700."""
    found = []
    for path in [
        *PYTHON,
        *NATIVE,
        *(ROOT / "tests").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]:
        lines, most = len(path.read_text().splitlines()), 700 if path.suffix == ".cu" else 460
        if lines > most:
            found.append(f"{relative(path)}: {lines} lines, at most {most}")
    assert not found, found


def own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body without the docstring and without functions defined inside."""
    first = function.body[0]
    has_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = first.end_lineno if has_doc else first.lineno - 1
    inner = [n for n in function.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return function.end_lineno - start - sum(n.end_lineno - n.lineno + 1 for n in inner)


def test_functions_are_short():
    """About 60 lines, 15 % of grace."""
    found = []
    for path in [*PYTHON, *(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and own_lines(node) > 70:
                found.append(f"{relative(path)}:{node.lineno} {node.name}: {own_lines(node)}")
    assert not found, found


def test_nothing_is_unpickled():
    """Files are safetensors and JSON: no pickle, no torch.load without weights_only."""
    found = []
    for path in PYTHON:
        for node in ast.walk(tree(path)):
            if {"pickle", "dill", "joblib", "cloudpickle"} & set(imported(node)):
                found.append(f"{relative(path)}:{node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                if not any(k.arg == "weights_only" for k in node.keywords):
                    found.append(f"{relative(path)}:{node.lineno}")
    assert not found, found
