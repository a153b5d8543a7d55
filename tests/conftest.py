"""Fixtures: the device (CPU always, CUDA where there is one), seeds, threads."""

from __future__ import annotations

import os

# Before torch starts its thread pool: threads that sleep while they wait. Spinning ones cost four
# times the whole run where other processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

# {(row, column): text} of test_matrix.py
MATRIX = pytest.StashKey[dict[tuple[str, str], str]]()
THREADS = int(os.environ.get("FASTPEFT_TEST_THREADS", "2"))


def cuda_reason() -> str | None:
    """Why CUDA tests cannot run here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    from fastpeft._library import load
    from fastpeft.errors import LibraryError

    try:
        load()
    except LibraryError as error:
        return str(error)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastpeft::dequantize", "CUDA"):
        return "libfastpeft_ops.so is built without CUDA kernels"
    return None


def pytest_configure(config):
    torch.set_num_threads(THREADS)
    config.addinivalue_line("markers", "gpu: wants a CUDA device (`pytest -m gpu`: all that do)")
    config.stash[MATRIX] = {}


def pytest_collection_modifyitems(items):
    """Marks what asks for a GPU, by fixture or parameter: names alone tell of a part of them."""
    for item in items:
        call = getattr(item, "callspec", None)
        if "cuda" in item.fixturenames or (call and call.params.get("device") == "cuda"):
            item.add_marker("gpu")


def pytest_terminal_summary(terminalreporter, config):
    """The matrix of methods and bases, as far as this run went."""
    cells = config.stash[MATRIX]
    if not cells:
        return
    terminalreporter.section("change of the loss over 20 steps, by method and base")
    rows, columns = dict.fromkeys(r for r, _ in cells), dict.fromkeys(c for _, c in cells)
    width = max(map(len, rows))
    wide = {column: max(len(column), 7) for column in columns}
    terminalreporter.line("  ".join([" " * width, *(c.rjust(wide[c]) for c in columns)]))
    for row in rows:
        texts = (cells.get((row, c), "").rjust(wide[c]) for c in columns)
        terminalreporter.line("  ".join([row.ljust(width), *texts]))


def pytest_report_header(config):
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {threads} threads, CUDA: {cuda_reason() or 'yes'}"


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """ "cpu", then "cuda"; the latter is skipped, with the reason, where it cannot run."""
    if request.param == "cuda" and (reason := cuda_reason()):
        pytest.skip(f"CUDA: {reason}")
    return request.param


@pytest.fixture
def cuda() -> str:
    """For tests that make sense on a GPU alone."""
    if reason := cuda_reason():
        pytest.skip(f"CUDA: {reason}")
    return "cuda"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
