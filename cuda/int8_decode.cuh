// int8 codes -> 16-bit pairs in registers, exact: what the weight-only int8 kernels share.
//
//   word of 4 codes (b0, b1, b2, b3)  ->  even = (b0, b2), odd = (b1, b3)
//
// bf16: 128 + the low seven bits is one masked OR (0x43xx), minus 128 or, where the sign bit is
// set, 256 (0x4300, 0x4380): 7 instructions a word. fp16: 1024 + 128 + b is one masked XOR
// (0x64xx), minus 1152: 5 instructions.
#pragma once
#include "device/numbers.cuh"

namespace fastpeft::cuda {

template <class T>
class ByteDecoder {
 public:
  // The exponent bits hide behind the lane number: of two constants in one three-way operation the
  // compiler would make two operations.
  __device__ __forceinline__ ByteDecoder() {
    const uint32_t lane = threadIdx.x % 32;
    magic_ = __shfl_sync(0xFFFFFFFFu, kMagic ^ lane, lane) ^ lane;
  }
  __device__ __forceinline__ void word(uint32_t w, uint32_t& even, uint32_t& odd) const {
    even = pair(w);
    odd = pair(w >> 8);
  }

 private:
  static constexpr uint32_t kMagic = std::is_same_v<T, bf16> ? 0x43004300u : 0x64806480u;
  uint32_t magic_;

  __device__ __forceinline__ uint32_t pair(uint32_t w) const {
    uint32_t r;
    if constexpr (std::is_same_v<T, bf16>) {  // sm_80 has no bf16 subtraction: -1 * b + a
      const uint32_t a = (w & 0x007F007Fu) | magic_, b = (w & 0x00800080u) | magic_;
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(b), "r"(0xBF80BF80u), "r"(a));
    } else {
      asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"((w & 0x00FF00FFu) ^ magic_), "r"(kMagic));
    }
    return r;
  }
};

}  // namespace fastpeft::cuda
