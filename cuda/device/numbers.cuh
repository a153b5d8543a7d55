// Element types on the GPU: conversions, accumulator types, 16-byte vectors, dispatch from DType.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../csrc/core/instances.h"

namespace fastpeft::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_acc(float v) {
  return v;
}
__device__ __forceinline__ double to_acc(double v) {
  return v;
}
__device__ __forceinline__ float to_acc(bf16 v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float to_acc(fp16 v) {
  return __half2float(v);
}

// Round to nearest even.
template <class T, class A>
__device__ __forceinline__ T from_acc(A v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(float(v));
  } else if constexpr (std::is_same_v<T, fp16>) {
    return __float2half_rn(float(v));
  } else {
    return T(v);
  }
}

// Two floats -> one 32-bit pair, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, 4);
  }
  return bits;
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
  if constexpr (std::is_same_v<T, bf16>) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u));
  } else {
    __half2 pair;
    memcpy(&pair, &bits, 4);
    return __half22float2(pair);
  }
}

// kCount elements that travel as 16-byte pieces (kCount * sizeof(T) a multiple of 16, aligned), or
// one by one.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) >= 16 ? 16 : kCount * sizeof(T)) Vec {
  T v[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ Vec<T, kCount> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T, kCount>*>(p);
}
template <class T, int kCount>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, kCount>& value) {
  *reinterpret_cast<Vec<T, kCount>*>(p) = value;
}

// f(Tag<T>{}) for the type of dtype.
template <class F>
void dispatch(DType dtype, F&& f) {
  dispatch_types<bf16, fp16>(dtype, f);
}

}  // namespace fastpeft::cuda
