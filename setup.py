"""Builds libfastpeft_ops.so and _C with CMake; CMakeLists.txt has the sources and flags."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "backend"))
from fastpeft_torch import find_torch  # noqa: E402

PACKAGE = ROOT / "python" / "fastpeft"


def nvcc_major() -> str | None:
    """Major version of the CUDA compiler that CMake would take, or None."""
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = [word for word in text.split() if word.startswith("V") and "." in word]
    return found[-1][1:].split(".")[0] if found else None


def torch_cuda_major(torch_dir: Path) -> str | None:
    """Major CUDA version of torch, read from its version file; None for a CPU build."""
    for line in (torch_dir / "version.py").read_text().splitlines():
        if line.startswith("cuda") and "'" in line:
            return line.split("'")[1].split(".")[0]
    return None


class CMakeBuild(build_ext):
    """configure, build, install into the package folder; the build folder stays for the next."""

    def run(self):
        torch_dir = find_torch()
        if torch_dir is None:
            raise SystemExit(
                "fastpeft: no torch >= 2.11 found to build against. Run: pip install 'torch>=2.11'"
            )
        mode = os.environ.get("FASTPEFT_CUDA", "AUTO").upper()
        nvcc, torch_cuda = nvcc_major(), torch_cuda_major(torch_dir)
        if mode != "OFF" and nvcc and torch_cuda and nvcc != torch_cuda:
            print(
                f"fastpeft: nvcc is CUDA {nvcc}, torch is built for CUDA {torch_cuda}: "
                "the driver must serve the newer of the two"
            )
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{mode.lower()}"
        stage = build_dir / "stage"
        stage.mkdir(parents=True, exist_ok=True)
        command = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            f"-DFASTPEFT_TORCH_DIR={torch_dir}",
            f"-DFASTPEFT_CUDA={mode}",
            f"-DFASTPEFT_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_INSTALL_PREFIX={stage}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if shutil.which("ninja"):
            command += ["-G", "Ninja"]
        if os.environ.get("FASTPEFT_ARCHS"):
            command.append(f"-DFASTPEFT_ARCHS={os.environ['FASTPEFT_ARCHS']}")
        try:
            import pybind11

            command.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        except ImportError:
            raise SystemExit(
                "fastpeft: pybind11 is missing. Run: pip install 'pybind11>=3.0'"
            ) from None
        subprocess.run(command, check=True)
        jobs = os.environ.get("FASTPEFT_JOBS") or str(os.cpu_count() or 2)
        subprocess.run(
            ["cmake", "--build", str(build_dir), "--target", "install", "-j", jobs], check=True
        )
        has_cuda = "FASTPEFT_WITH_CUDA" in (build_dir / "compile_commands.json").read_text()
        print(f"fastpeft: built with {'CPU and CUDA' if has_cuda else 'CPU only'} kernels")
        for built in stage.glob("*.so"):
            self._place(built, self._target())

    def _target(self) -> Path:
        """The package itself for a development build, else the folder that becomes the wheel."""
        direct = self.distribution.commands == ["build_ext"]
        in_place = self.inplace or self.editable_mode or direct
        return PACKAGE if in_place else Path(self.build_lib) / "fastpeft"

    @staticmethod
    def _place(built: Path, folder: Path) -> None:
        """Copies beside, then renames: a running process keeps the file that it has mapped."""
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{built.name}.new"
        shutil.copy2(built, beside)
        os.replace(beside, folder / built.name)

    def get_outputs(self):
        return [str(path) for path in self._target().glob("*.so")]

    def get_output_mapping(self):
        return {}


setup(ext_modules=[Extension("fastpeft._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
