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


DEAD = """\
========= COMPUTE-SANITIZER
========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.
=========
========= Program hit cudaErrorIllegalAddress (error 700) on CUDA API call
=========
========= Error: process didn't terminate successfully
========= Target application returned an error
"""


def result(program="a", tool="racecheck", kernels=("k_kernel",), log="", code=0):
    death = sanitize.death_of(log)
    return sanitize.Result(program, tool, kernels, tuple(sanitize.faults(log)), death, code, 1.0)


def test_reports_of_fastpeft_and_of_others():
    found = result(log=MEMCHECK, kernels=("qlinear_fwd_kernel", "fwd_kernel"))
    assert (len(found.found), found.ours) == (2, 1)
    # the one that names neither may be of either
    assert found.of("qlinear_fwd_kernel") == 2 and found.of("fwd_kernel") == 1
    assert result(log=RACECHECK).ours == 1
    assert result(log=CLEAN).found == ()


def test_a_dead_tool_is_no_report_and_no_clean_bill():
    dead = result(log=DEAD, code=6)
    assert dead.found == () and dead.death and sanitize.wrong([dead]) == []
    assert sanitize.verdict([dead], "k_kernel") == "NOT CHECKED: tool dies"
    both = result(log=DEAD + RACECHECK.replace("::k()", "::k_kernel()"), code=6)
    assert sanitize.verdict([both], "k_kernel") == "1 reports" and sanitize.wrong([both])


def test_a_tools_death_in_one_part_is_told():
    kernels = ("a_kernel", "b_kernel")
    runs = [
        result("one 1/3", kernels=kernels, log=DEAD),
        result("one 2/3", kernels=("a_kernel",), log=CLEAN),
        result("one 3/3", kernels=("a_kernel",), log=CLEAN),
    ]
    assert sanitize.verdict(runs, "a_kernel") == "clean in part"
    assert sanitize.verdict(runs[1:], "a_kernel") == "clean"
    assert sanitize.verdict(runs, "b_kernel") == "NOT CHECKED: tool dies"
    assert sanitize.verdict(runs, "c_kernel") == "NOT RUN"
    text = sanitize.table(runs[1:], [*kernels, "c_kernel"], ["racecheck"])
    assert "1 of 3 kernels clean, 0 with reports, 2 not checked" in text


def test_excerpt_shows_reports_and_the_programs_end():
    text = sanitize.excerpt(MEMCHECK + "frame #1\nRuntimeError: launch failed\n")
    assert "Invalid __global__ read" in text and "q.cu:88" in text and "Host Frame" not in text
    assert "RuntimeError: launch failed" in text and "frame #1" not in text
    assert "last words" in sanitize.excerpt("last words")


def test_what_is_wrong():
    runs = [
        result("sanitize_small", "memcheck", log=MEMCHECK.replace("fastpeft", "other")),
        result("native", "racecheck", log=RACECHECK),
        result("native", "memcheck", log=CLEAN, code=1),
    ]
    assert sanitize.wrong(runs) == [
        "native, racecheck: 1 reports",
        "native, memcheck: ended with 1",
    ]


def test_every_kernel_of_the_source_is_known():
    found = sanitize.kernels_of_source()
    assert {"qlinear_narrow_kernel", "tile_rows_kernel", "dropout_kernel"} <= set(found)
    declared = sum(
        path.read_text().count("__global__") for path in (sanitize.ROOT / "cuda").glob("**/*.cu*")
    )
    assert len(found) == declared


SANITIZER = """\
#!/bin/sh
case "$*" in
    *racecheck*0/3*) echo "========= Internal Sanitizer Error: no"; exit 6;;
    *racecheck*1/3*) sleep 60;;
    *initcheck*kns=*) echo "========= filtered fastpeft";;
esac
echo "launched slow/slow_kernel 4"
"""
NATIVE = """\
#!/bin/sh
echo "ran slow 3"
echo "launched slow/slow_kernel 4"
echo "launched slow/fast_kernel 4"
"""


def test_the_whole_script(tmp_path, monkeypatch, capsys):
    for name, text in {"sanitizer": SANITIZER, "native": NATIVE}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sanitize, "find_tool", lambda: str(tmp_path / "sanitizer"))
    monkeypatch.setattr(sanitize, "skip_reason", lambda: None)
    monkeypatch.setattr(sanitize, "kernels_of_source", lambda: ["slow_kernel", "fast_kernel"])
    argv = ["--native", str(tmp_path / "native"), "--torch-tools", "", "--limit", "1"]
    assert sanitize.main([*argv, "--keep", str(tmp_path / "keep")]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["slow_kernel"] == "slow_kernel clean in part clean clean clean".split()
    assert lines["fast_kernel"][1:5] == "NOT CHECKED: tool dies".split()
    assert len(list((tmp_path / "keep").iterdir())) == 6


def test_without_the_tool_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    assert sanitize.main([]) == 0
    assert "SKIPPED" in capsys.readouterr().out
