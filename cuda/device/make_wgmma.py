"""Writes wgmma.cuh: wgmma m64nNk16, A (bf16) from registers, B from shared memory, float32 sums."""

from pathlib import Path

HEAD = """// Written by make_wgmma.py: change that, not this.
// wgmma m64nNk16 with A (bf16) from registers and B (K-major, swizzled) from shared memory; float32
// d = a . b + (accumulate ? d : 0).
#pragma once
#include <cstdint>

namespace fastpeft::cuda {

template <int kTokens>
struct WgmmaRS;
"""
BODY = """
template <>
struct WgmmaRS<{n}> {{
  static __device__ __forceinline__ void mma(float (&d)[{regs}], const uint32_t (&a)[4],
                                             uint64_t b_desc, int accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{flag}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 "
        "{{{d}}}, "
        "{{{a}}}, %{desc}, p, 1, 1, 0;\\n}}\\n"
        : {outs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate));
  }}
}};
"""


def instruction(n: int) -> str:
    regs = n // 2
    return BODY.format(
        n=n,
        regs=regs,
        d=", ".join(f"%{i}" for i in range(regs)),
        a=", ".join(f"%{regs + i}" for i in range(4)),
        desc=regs + 4,
        flag=regs + 5,
        outs=", ".join(f'"+f"(d[{i}])' for i in range(regs)),
    )


if __name__ == "__main__":
    text = HEAD + "".join(instruction(n) for n in (16, 32, 64, 128, 256)) + "\n}  // namespace fastpeft::cuda\n"
    Path(__file__).with_name("wgmma.cuh").write_text("// clang-format off\n" + text)
