// Outlier columns of LLM.int8(): flags -> a list, made by every block for itself, in order.
#pragma once
#include <cstring>

#include "device/numbers.cuh"
#include "device/reduce.cuh"

namespace fastpeft::cuda {

constexpr int kOutlierThreads = 256, kOutlierWarps = kOutlierThreads / 32;
constexpr int kChunk = 16 * kOutlierThreads;  // flags listed at a time

// 16 int8 of a row from column k: one 16-byte load, or byte by byte.
__device__ __forceinline__ uint4 load_codes(const int8_t* row, int64_t k, int64_t K,
                                            bool is_aligned) {
  uint4 out = make_uint4(0, 0, 0, 0);
  if (is_aligned) return __ldg(reinterpret_cast<const uint4*>(row + k));
  Vec<int8_t, 16> bytes = {};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (k + i < K) bytes.v[i] = row[k + i];
  memcpy(&out, &bytes, 16);
  return out;
}

// Lists, in order, the outlier columns of [begin, begin + kChunk) into `columns` (relative to
// begin); returns their number. `counts` holds one int a warp.
__device__ __forceinline__ int list_outliers(const uint8_t* outlier, int64_t begin, int64_t K,
                                             bool is_aligned, uint16_t* columns, int* counts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t k = begin + threadIdx.x * 16;
  unsigned mask = 0;
  if (k < K) {
    const uint4 flags = load_codes(reinterpret_cast<const int8_t*>(outlier), k, K, is_aligned);
    const uint32_t words[4] = {flags.x, flags.y, flags.z, flags.w};
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (words[i / 4] >> (8 * (i % 4)) & 255u) mask |= 1u << i;
  }
  const int mine = __popc(mask);
  int before = mine;  // inclusive scan over the warp
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) counts[warp] = before;
  __syncthreads();
  int at = before - mine, total = 0;
  for (int i = 0; i < kOutlierWarps; ++i) {
    if (i < warp) at += counts[i];
    total += counts[i];
  }
  for (; mask; mask &= mask - 1) columns[at++] = uint16_t(threadIdx.x * 16 + __ffs(mask) - 1);
  __syncthreads();
  return total;
}

}  // namespace fastpeft::cuda
