"""Writes wgmma.cuh: wgmma m64nNk16, A (bf16 or fp16) from registers, B from shared memory, float32
sums; and wgmma_shared.cuh: A and B from shared memory, int8 or 16 bit, sums as bits.
"""

from pathlib import Path

HEAD = """// Written by make_wgmma.py: change that, not this.
// wgmma m64nNk16 with A from registers and B (K-major, swizzled) from shared memory, both bf16 or
// fp16; float32 d = a . b + (accumulate ? d : 0).
#pragma once
#include "numbers.cuh"

namespace fastpeft::cuda {

template <int kTokens>
struct WgmmaRS;
"""
BODY = """
template <>
struct WgmmaRS<{n}> {{
  template <class T = bf16>
  static __device__ __forceinline__ void mma(float (&d)[{regs}], const uint32_t (&a)[4],
                                             uint64_t b_desc, int accumulate) {{
    if constexpr (std::is_same_v<T, fp16>) {{{fp16}
    }} else {{{bf16}
    }}
  }}
}};
"""
MMA = """
      asm volatile(
          "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{flag}, 0;\\n"
          "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{type}.{type} "
          "{{{d}}}, "
          "{{{a}}}, %{desc}, p, 1, 1, 0;\\n}}\\n"
          : {outs}
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate));"""


def mma(n: int, kind: str) -> str:
    regs = n // 2
    return MMA.format(
        n=n,
        type=kind,
        d=", ".join(f"%{i}" for i in range(regs)),
        a=", ".join(f"%{regs + i}" for i in range(4)),
        desc=regs + 4,
        flag=regs + 5,
        outs=", ".join(f'"+f"(d[{i}])' for i in range(regs)),
    )


def instruction(n: int) -> str:
    return BODY.format(n=n, regs=n // 2, fp16=mma(n, "f16"), bf16=mma(n, "bf16"))


SHARED_HEAD = """// Written by make_wgmma.py: change that, not this.
// wgmma m64nN with A and B (swizzled, K-major; A in 16 bit also with its rows contiguous, column
// major) from shared memory; d = a . b + (accumulate ? d : 0). The sums are 32-bit words, int32 or
// float32, so that one set of registers can hold first these and then those: int8 a step of 32
// along K, 16 bit one of 16.
#pragma once
#include "numbers.cuh"

namespace fastpeft::cuda {

template <int kTokens>
struct WgmmaSS;
"""
SHARED_BODY = """
template <>
struct WgmmaSS<{n}> {{
  static __device__ __forceinline__ void mma_s8(uint32_t (&d)[{regs}], uint64_t a_desc,
                                                uint64_t b_desc, int accumulate) {{{s8}
  }}
  template <class T, bool kColumnMajor = false>
  static __device__ __forceinline__ void mma(uint32_t (&d)[{regs}], uint64_t a_desc,
                                             uint64_t b_desc, int accumulate) {{
    if constexpr (std::is_same_v<T, fp16>) {{{fp16}
    }} else {{{bf16}
    }}
  }}
}};
"""
SHARED_MMA = """
      asm volatile(
          "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{flag}, 0;\\n"
          "wgmma.mma_async.sync.aligned.m64n{n}{types} "
          "{{{d}}}, "
          "%{a}, %{b}, p{tail};\\n}}\\n"
          : {outs}
          : "l"(a_desc), "l"(b_desc), "r"(accumulate){order});"""


def shared_mma(n: int, types: str, is_16bit: bool) -> str:
    regs = n // 2
    return SHARED_MMA.format(
        n=n,
        types=types,
        tail=f", 1, 1, %{regs + 3}, 0" if is_16bit else "",
        order=', "n"(kColumnMajor ? 1 : 0)' if is_16bit else "",
        d=", ".join(f"%{i}" for i in range(regs)),
        a=regs,
        b=regs + 1,
        flag=regs + 2,
        outs=", ".join(f'"+r"(d[{i}])' for i in range(regs)),
    )


def shared_instructions(n: int) -> str:
    return SHARED_BODY.format(
        n=n,
        regs=n // 2,
        s8=shared_mma(n, "k32.s32.s8.s8", False),
        fp16=shared_mma(n, "k16.f32.f16.f16", True),
        bf16=shared_mma(n, "k16.f32.bf16.bf16", True),
    )


def write(name: str, text: str) -> None:
    text = "// clang-format off\n" + text + "\n}  // namespace fastpeft::cuda\n"
    Path(__file__).with_name(name).write_text(text)


if __name__ == "__main__":
    write("wgmma.cuh", HEAD + "".join(instruction(n) for n in (16, 32, 64, 128, 256)))
    sizes = (16, 64, 128, 256)
    write("wgmma_shared.cuh", SHARED_HEAD + "".join(shared_instructions(n) for n in sizes))
