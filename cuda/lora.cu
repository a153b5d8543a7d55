// Dropout of the LoRA branch.
//
//   y [count] = x * keep(seed, i) / (1 - p)      (add: y += ...)
//
// keep is recomputed from Philox4x32-10 (csrc/core/philox.h): one counter serves four elements, so
// forward and backward agree, any backend gives the same mask, and nothing is stored.
// Work split: a thread per 8 consecutive elements (two counters, 16-byte accesses), or per element
// group of 4 when the pointers are not aligned. Bound: reading x and writing y.
#include "../csrc/core/philox.h"
#include "check.cuh"
#include "device/numbers.cuh"
#include "launch.h"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256;

template <class T>
struct DropoutArgs {
  const T* x;           // [count]
  T* y;                 // [count]
  const int64_t* seed;  // [1]
  int64_t count;
  uint32_t threshold;
  Acc<T> keep_scale;  // 1 / (1 - p)
  bool add;
};

template <class T>
__device__ __forceinline__ T drop(const DropoutArgs<T>& a, uint32_t random, T x, T y) {
  Acc<T> value = random < a.threshold ? Acc<T>(0) : to_acc(x) * a.keep_scale;
  if (a.add) value += to_acc(y);
  return from_acc<T>(value);
}

template <class T, int kCount, bool kAligned>
__global__ void __launch_bounds__(kThreads) dropout_kernel(DropoutArgs<T> a) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (first >= a.count) return;
  const uint64_t seed = uint64_t(__ldg(reinterpret_cast<const long long*>(a.seed)));
  Philox4 random[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) random[i] = philox(seed, uint64_t(first / 4 + i));
  if (kAligned && first + kCount <= a.count) {
    Vec<T, kCount> x = load_vec<T, kCount>(a.x + first), y = {};
    if (a.add) y = load_vec<T, kCount>(a.y + first);
#pragma unroll
    for (int i = 0; i < kCount; ++i) y.v[i] = drop(a, random[i / 4].v[i % 4], x.v[i], y.v[i]);
    store_vec<T, kCount>(a.y + first, y);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (first + i < a.count)
        a.y[first + i] =
            drop(a, random[i / 4].v[i % 4], a.x[first + i], a.add ? a.y[first + i] : T(0.0f));
  }
}

}  // namespace

void dropout(const DropoutParams& p) {
  if (p.count == 0) return;
  FASTPEFT_CHECK(p.p >= 0.0f && p.p < 1.0f, "dropout: p = ", p.p, ", expected 0 <= p < 1");
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    DropoutArgs<T> a;
    a.x = static_cast<const T*>(p.x);
    a.y = static_cast<T*>(p.y);
    a.seed = p.seed;
    a.count = p.count;
    a.threshold = drop_threshold(p.p);
    a.keep_scale = Acc<T>(1) / (Acc<T>(1) - Acc<T>(p.p));
    a.add = p.add;
    const cudaStream_t stream = cuda_stream(p.stream);
    if (is_aligned(a.x, 16) && is_aligned(a.y, 16))
      dropout_kernel<T, 8, true><<<grid_blocks(p.count, kThreads * 8), kThreads, 0, stream>>>(a);
    else
      dropout_kernel<T, 4, false><<<grid_blocks(p.count, kThreads * 4), kThreads, 0, stream>>>(a);
    check_launch("dropout_kernel");
  });
}

}  // namespace fastpeft::cuda
