"""LoRA on a frozen 16-bit linear layer: what the low-rank branch costs. Providers: fastpeft, torch
(spelled out), peft.
"""

from __future__ import annotations

import bench_qlinear

PROVIDERS = ("fastpeft", "torch", "peft")


def run(cases, options: bench_qlinear.Options) -> int:
    """Like bench_qlinear.run, rows with op "lora"."""
    return bench_qlinear.run(cases, options, "lora")
