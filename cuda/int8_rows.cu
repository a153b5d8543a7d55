// LLM.int8() (Dettmers et al. 2022, "LLM.int8()"): activations to int8, a scale a row, and the
// columns that are left out of it.
//
//   outlier [K] = any over rows |x| >= threshold
//   scale [M]   = row absmax of what is no outlier
//   q [M, K]    = round(x * 127 / scale), 0 in outlier columns
//   columns     = their list; x and codes of W gathered side by side, [M, capacity], [N, capacity]
//
// Work split
//   rows:     a block a row, read once: a thread keeps its elements in registers from the absmax to
//             the rounding. Whoever meets an outlier writes the flag 1: order does not matter.
//             Flags are complete only when all rows are through, so q is rounded everywhere first
//   columns:  a block owns 32 rows of x (zeroes q, gathers x) or of W (gathers codes); each lists
//             the columns itself. Without outliers it reads K flags and ends
// Bound: reading x, writing q: 25 MB at 2048 x 4096 bf16 = 6 us.
#include "dependent_launch.cuh"
#include "device/decode.cuh"
#include "int8_outliers.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = kOutlierThreads, kWarps = kThreads / 32;
constexpr int kColumnRows = 32, kBatch = 4;

// The byte of round(x * inverse), halves to even: the sum's last bits are the integer. What is out
// of range lies in an outlier column and is zeroed later.
__device__ __forceinline__ uint32_t rounded_bits(float x, float inverse) {
  return __float_as_uint(__fadd_rn(__fmul_rn(x, inverse), 12582912.0f));
}

template <class T, int kCount, int kVecs>  // kVecs > 0: K <= kThreads * kCount * kVecs
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(QuantizeRowsParams p) {
  __shared__ float scratch[kWarps];
  launch_dependents();
  wait_for_predecessor();
  const int64_t row = int64_t(blockIdx.x) * p.K;
  const T* x = static_cast<const T*>(p.x) + row;
  constexpr int64_t kStep = kThreads * kCount;
  const int64_t first = int64_t(threadIdx.x) * kCount;
  const bool has_outliers = p.threshold > 0.0f;
  float top = 0.0f;
  const auto measure = [&](const Vec<T, kCount>& v, int64_t k) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float size = fabsf(float(to_acc(v.v[i])));
      if (has_outliers && size >= p.threshold)
        p.outlier[k + i] = 1;
      else
        top = fmaxf(top, size);
    }
  };
  const auto store = [&](const Vec<T, kCount>& v, int64_t k, float inverse) {
    Vec<uint8_t, kCount> q;
#pragma unroll
    for (int i = 0; i < kCount; ++i) q.v[i] = uint8_t(rounded_bits(float(to_acc(v.v[i])), inverse));
    store_vec<uint8_t, kCount>(reinterpret_cast<uint8_t*>(p.q) + row + k, q);
  };
  if constexpr (kVecs > 0) {
    Vec<T, kCount> v[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
      if (first + i * kStep < p.K) v[i] = load_vec<T, kCount>(x + first + i * kStep);
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
      if (first + i * kStep < p.K) measure(v[i], first + i * kStep);
    top = block_max<kThreads>(top, scratch);
    const float inverse = int8_inverse(top);
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
      if (first + i * kStep < p.K) store(v[i], first + i * kStep, inverse);
  } else {
    for (int64_t k = first; k < p.K; k += kStep) measure(load_vec<T, kCount>(x + k), k);
    top = block_max<kThreads>(top, scratch);
    const float inverse = int8_inverse(top);
    for (int64_t k = first; k < p.K; k += kStep) store(load_vec<T, kCount>(x + k), k, inverse);
  }
  if (threadIdx.x == 0) p.scale[blockIdx.x] = top;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    outlier_columns_kernel(const __grid_constant__ QuantizeRowsParams p, bool is_aligned) {
  __shared__ uint16_t columns[kChunk];
  __shared__ int counts[kWarps];
  launch_dependents();
  wait_for_predecessor();
  const int64_t x_blocks = ceil_div<int64_t>(p.M, kColumnRows);
  const bool is_x = blockIdx.x < x_blocks;
  const int64_t begin = (is_x ? blockIdx.x : blockIdx.x - x_blocks) * kColumnRows;
  const int rows = int(min(int64_t(kColumnRows), (is_x ? p.M : p.w.N) - begin));
  const int64_t capacity = p.columns.capacity;
  const int8_t* codes = static_cast<const int8_t*>(p.w.codes);
  T* to = static_cast<T*>(is_x ? p.columns.x : p.columns.w);
  int listed = 0;
  for (int64_t k0 = 0; k0 < p.K; k0 += kChunk) {
    const int total = list_outliers(p.outlier, k0, p.K, is_aligned, columns, counts);
    if (p.columns.list && blockIdx.x == 0)
      for (int i = threadIdx.x; i < total; i += kThreads)
        p.columns.list[1 + listed + i] = int(k0) + columns[i];
    const int elements = rows * total;
    for (int i0 = threadIdx.x; i0 < elements; i0 += kBatch * kThreads) {
      T value[kBatch];
      int64_t from[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {  // all loads before the first store
        const int element = i0 + i * kThreads, row = element / total;
        if (element >= elements) break;
        from[i] = (begin + row) * p.K + k0 + columns[element - row * total];
        if (listed + element - row * total < capacity)
          value[i] =
              is_x ? static_cast<const T*>(p.x)[from[i]] : from_acc<T>(float(codes[from[i]]));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int element = i0 + i * kThreads, row = element / total;
        if (element >= elements) break;
        const int64_t at = listed + element - row * total;
        if (is_x) p.q[from[i]] = 0;
        if (at < capacity) to[(begin + row) * capacity + at] = value[i];
      }
    }
    listed += total;
    __syncthreads();  // columns and counts are used again
  }
  if (p.columns.list && blockIdx.x == 0 && threadIdx.x == 0) p.columns.list[0] = listed;
  const int padding = int(min(round_up<int64_t>(listed, 64), capacity)) - listed;
  for (int i = threadIdx.x; i < rows * padding; i += kThreads) {
    const int row = i / padding, j = i - row * padding;
    to[(begin + row) * capacity + listed + j] = T(0.0f);
  }
}

template <class T, int kCount, int kVecs>
void launch_rows(const QuantizeRowsParams& p) {
  launch_kernel(quantize_rows_kernel<T, kCount, kVecs>, "quantize_rows_kernel",
                dim3(grid_blocks(p.M, 1)), kThreads, 0, p.stream, 1, p);
}

template <class T>
void run(const QuantizeRowsParams& p) {
  const int64_t vectors = ceil_div<int64_t>(p.K, kThreads * 8);
  if (p.K % 8 != 0 || !is_aligned(p.x, 16) || !is_aligned(p.q, 8))
    launch_rows<T, 1, 0>(p);
  else if (vectors > 8 || sizeof(T) > 2)
    launch_rows<T, 8, 0>(p);
  else if (vectors > 4)
    launch_rows<T, 8, 8>(p);
  else if (vectors > 2)
    launch_rows<T, 8, 4>(p);
  else
    launch_rows<T, 8, 2>(p);
  if (p.threshold <= 0.0f) return;
  const int64_t w_rows = p.columns.w ? p.w.N : 0;
  launch_kernel(
      outlier_columns_kernel<T>, "outlier_columns_kernel",
      dim3(grid_blocks(ceil_div<int64_t>(p.M, kColumnRows) + ceil_div<int64_t>(w_rows, kColumnRows),
                       1)),
      kThreads, 0, p.stream, 1, p, p.K % 16 == 0 && is_aligned(p.outlier, 16));
}

}  // namespace

void quantize_rows(const QuantizeRowsParams& p) {
  if (p.K == 0) return;
  FASTPEFT_CUDA_CHECK(cudaMemsetAsync(p.outlier, 0, p.K, cuda_stream(p.stream)));
  if (p.M == 0) return;
  dispatch(p.dtype, [&](auto tag) { run<typename decltype(tag)::type>(p); });
}

}  // namespace fastpeft::cuda
