"""The sanitizer script: what it counts as a fault of fastpeft. The run itself: `make sanitize`."""

from __future__ import annotations

import sanitize

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void fastpeft::cuda::qlinear_fwd_kernel<1>(fastpeft::cuda::Args)+0x5f0 in q.cu:88
=========     by thread (3,0,0) in block (1,0,0)
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch [0x1] in libfastpeft_ops.so
=========
========= Invalid __global__ write of size 2 bytes
=========     at cutlass::Kernel2+0x10
=========     by thread (0,0,0) in block (0,0,0)
=========         Host Frame: fastpeft::ops::addmm [0x1] in libfastpeft_ops.so
=========
ran 13 ops on cuda
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void fastpeft::cuda::k()+0x1d0 in a.cu:7
=========     and Read access at void fastpeft::cuda::k()+0x210 in a.cu:9 [128 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\nfastpeft says hello\n========= ERROR SUMMARY: 0 errors\n"


def test_reports_of_fastpeft_and_of_others():
    assert sanitize.count(MEMCHECK) == (1, 1)
    assert sanitize.count(RACECHECK) == (1, 0)
    assert sanitize.count(CLEAN) == (0, 0)


def test_excerpt_shows_reports_and_the_programs_end():
    text = sanitize.excerpt(MEMCHECK + "frame #1\nRuntimeError: launch failed\n")
    assert "Invalid __global__ read" in text and "q.cu:88" in text and "Host Frame" not in text
    assert "RuntimeError: launch failed" in text and "frame #1" not in text
    assert "last words" in sanitize.excerpt("last words")


def test_table_names_what_is_wrong():
    results = [
        sanitize.Result("small", "memcheck", 0, 3, 0, 1.0),  # others' reports are not ours
        sanitize.Result("small", "racecheck", 1, 0, 0, 1.0),
        sanitize.Result("native", "memcheck", 0, 0, 1, 1.0),
    ]
    lines = sanitize.table(results).splitlines()[1:]
    assert ["WRONG" in line for line in lines] == [False, True, True]


def test_without_the_tool_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    assert sanitize.main([]) == 0
    assert "SKIPPED" in capsys.readouterr().out
