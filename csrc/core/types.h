// Plain types shared by every layer below torch. No torch, no CUDA header.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTPEFT_HD __host__ __device__ __forceinline__
#else
#define FASTPEFT_HD inline
#endif

namespace fastpeft {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr int64_t dtype_bytes(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}

constexpr const char* dtype_name(DType t) {
  return t == DType::kFloat32    ? "float32"
         : t == DType::kFloat64  ? "float64"
         : t == DType::kBFloat16 ? "bfloat16"
                                 : "float16";
}

constexpr bool is_16bit(DType t) {
  return t == DType::kBFloat16 || t == DType::kFloat16;
}

// cudaStream_t on the GPU, null on the CPU: the core knows neither.
using Stream = void*;

template <class T>
FASTPEFT_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
FASTPEFT_HD constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

}  // namespace fastpeft
