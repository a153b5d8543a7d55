// Reductions in a fixed order: the same bits on every run.
#pragma once
#include <cstdint>

namespace fastpeft::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Over aligned groups of `width` lanes (a power of two); every lane gets the result.
template <int kWidth = 32>
__device__ __forceinline__ float group_max(float v) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2)
    v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, offset));
  return v;
}

template <class A>
__device__ __forceinline__ A warp_sum(A v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

// Over the block; `scratch` holds one float a warp. Every thread gets the result.
template <int kThreads>
__device__ __forceinline__ float block_max(float v, float* scratch) {
  v = group_max<32>(v);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = scratch[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; ++w) v = fmaxf(v, scratch[w]);
  __syncthreads();  // scratch may be used again
  return v;
}

}  // namespace fastpeft::cuda
