// mma.sync m16n8k16 (sm_80 and newer), float32 accumulators. Lane (g, t) = (lane / 4, lane % 4):
//   a[0] (row g, k 2t..)  a[1] (row g+8, k 2t..)  a[2] (row g, k 2t+8..)  a[3] (row g+8, k 2t+8..)
//   b0 (k 2t.., column g)  b1 (k 2t+8.., column g)
//   c[0], c[1] (row g, columns 2t, 2t+1)  c[2], c[3] (row g+8, columns 2t, 2t+1)
#pragma once
#include "numbers.cuh"

namespace fastpeft::cuda {

template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// m16n8k32 of int8, int32 sums: the same lanes with four k a word: a[0] (row g, k 4t..), a[2] (row
// g, k 4t+16..), b0 (k 4t.., column g).
__device__ __forceinline__ void mma_16x8x32_s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace fastpeft::cuda
