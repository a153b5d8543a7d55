"""What the built library needs and offers: torch's stable ABI and nothing that changes between
releases.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from fastpeft._library import library_path


def symbols(flag: str) -> list[str]:
    """Demangled dynamic symbols of the library; flag: --undefined-only or --defined-only."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed (package binutils)")
    done = subprocess.run(
        [nm, "-D", "-C", flag, str(library_path())], capture_output=True, text=True, check=True
    )
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return [re.sub(r"^[0-9a-f]*\s*[A-Za-z]\s+", "", line) for line in lines]


def test_needs_no_torch_cpp_and_no_python_symbol():
    needed = symbols("--undefined-only")
    assert any("torch_" in name for name in needed), "no torch symbol at all: is this the library?"
    bad = [n for n in needed if re.search(r"\b(c10|at|caffe2|pybind11)::|^_?Py[A-Z_]", n)]
    bad += [n for n in needed if n.startswith("torch::")]
    assert not bad, f"tied to one torch or Python release: {bad[:10]}"


def test_needs_only_known_libraries():
    """C symbols of torch's stable ABI, of glibc and libgcc; C++ ones of the standard library."""
    strange = []
    for name in symbols("--undefined-only"):
        plain = name.split("@")[0]
        if "GLIBC" in name or "GCC_" in name or "CXXABI_" in name:
            continue
        if re.match(r"(aoti_torch_|torch_|_ITM_|__gmon_start__|__cxa_finalize)", plain):
            continue
        strange.append(name)
    assert not strange, f"unexpected: {strange[:10]}"


def test_offers_nothing_of_cuda():
    """The CUDA runtime is linked statically and must not meet torch's own."""
    leaked = [n for n in symbols("--defined-only") if re.match(r"(cuda[A-Z]|__cuda|cu[A-Z])", n)]
    assert not leaked, leaked[:10]


def test_does_not_link_the_cuda_driver_or_python():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed (package binutils)")
    done = subprocess.run(
        [readelf, "-d", str(library_path())], capture_output=True, text=True, check=True
    )
    needed = re.findall(r"NEEDED.*\[(.*)\]", done.stdout)
    assert any(name.startswith("libtorch") for name in needed)
    bad = [n for n in needed if re.match(r"lib(cuda|cudart|torch_cuda|torch_python|python|c10)", n)]
    assert not bad, bad
    assert not re.search(r"R(UN)?PATH", done.stdout), "a path of the build machine is inside"
