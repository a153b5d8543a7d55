// LLM.int8() around the integer matmul (Dettmers et al. 2022, "LLM.int8()").
//
//   quantize_rows  outlier [K] = any over rows |x| >= threshold
//                  scale [M] = row absmax of what is no outlier; q [M, K] = round(x * 127 / scale),
//                  0 in outlier columns
//   int8_epilogue  y [M, N] = acc * scale_x * scale_w / 127^2 + sum over outlier columns x W + bias
//                  acc [M, N] int32 from a matmul, or computed here (dp4a) when null
//
// Work split
//   outliers: a thread owns 8 columns (or 1) and 32 rows; it only ever writes the value 1, so the
//             order of threads does not matter
//   rows:     a block a row, two passes
//   epilogue with acc:    a block owns 32 x 128 of y, a thread 4 x 4; each block lists the outlier
//             columns itself, in order, 4096 columns at a time: no host, no atomics
//   epilogue without acc: a warp owns one n and 8 tokens, lanes share K
// Bound: reading x, writing q; reading acc, writing y; for few tokens reading W once.
#include "check.cuh"
#include "device/decode.cuh"
#include "device/reduce.cuh"
#include "launch.h"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kFlagRows = 32;
constexpr int kTileM = 32, kTileN32 = 128;  // epilogue with acc
constexpr int kChunk = 16 * kThreads;       // outlier flags listed at a time
constexpr int kDotTokens = 8;               // epilogue without acc

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads)
    find_outliers_kernel(const T* __restrict__ x, int64_t M, int64_t K, float threshold,
                         uint8_t* __restrict__ outlier) {
  const int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (k >= K) return;
  const int64_t begin = int64_t(blockIdx.y) * kFlagRows, end = min(begin + kFlagRows, M);
  bool flags[kCount] = {};
  for (int64_t m = begin; m < end; ++m) {
    const Vec<T, kCount> row = load_vec<T, kCount>(x + m * K + k);
#pragma unroll
    for (int i = 0; i < kCount; ++i) flags[i] |= fabsf(float(to_acc(row.v[i]))) >= threshold;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (flags[i]) outlier[k + i] = 1;
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(QuantizeRowsParams p) {
  __shared__ float scratch[kWarps];
  const int64_t row = int64_t(blockIdx.x) * p.K;
  const T* x = static_cast<const T*>(p.x) + row;
  const int64_t step = kThreads * kCount;
  float top = 0.0f;
  for (int64_t k = int64_t(threadIdx.x) * kCount; k < p.K; k += step) {
    const Vec<T, kCount> v = load_vec<T, kCount>(x + k);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float a = fabsf(float(to_acc(v.v[i])));
      if (p.threshold <= 0.0f || a < p.threshold) top = fmaxf(top, a);
    }
  }
  top = block_max<kThreads>(top, scratch);
  const float inverse = int8_inverse(top);
  for (int64_t k = int64_t(threadIdx.x) * kCount; k < p.K; k += step) {
    const Vec<T, kCount> v = load_vec<T, kCount>(x + k);
    const Vec<uint8_t, kCount> flag = load_vec<uint8_t, kCount>(p.outlier + k);
    Vec<int8_t, kCount> q;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      q.v[i] =
          flag.v[i] ? int8_t(0) : int8_t(__float2int_rn(__fmul_rn(float(to_acc(v.v[i])), inverse)));
    store_vec<int8_t, kCount>(p.q + row + k, q);
  }
  if (threadIdx.x == 0) p.scale[blockIdx.x] = top;
}

template <class T>
struct EpilogueArgs {
  Int8Weight w;
  int64_t M;
  const int32_t* acc;      // [M, N] or null
  const int8_t* q;         // [M, K]
  const float* scale;      // [M]
  const uint8_t* outlier;  // [K] or null
  const T* x;              // [M, K]
  const T* bias;           // [N] or null
  T* y;                    // [M, N]
};

__device__ __forceinline__ float int8_value(int8_t q, float absmax) {
  return __fmul_rn(__fmul_rn(float(q), absmax), kInt8Step);
}

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
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) at += counts[i];
    total += counts[i];
  }
  for (; mask; mask &= mask - 1) columns[at++] = uint16_t(threadIdx.x * 16 + __ffs(mask) - 1);
  __syncthreads();
  return total;
}

template <class T, bool kAligned>  // aligned: N % 4 == 0, acc and y at multiples of 16 bytes
__global__ void __launch_bounds__(kThreads) int8_epilogue_kernel(EpilogueArgs<T> a) {
  __shared__ uint16_t columns[kChunk];
  __shared__ int counts[kWarps];
  const int64_t N = a.w.N, K = a.w.K;
  const int64_t n0 = int64_t(blockIdx.x) * kTileN32 + threadIdx.x % 32 * 4;
  const int64_t m0 = int64_t(blockIdx.y) * kTileM + threadIdx.x / 32;  // then + 8, + 16, + 24
  Acc<T> sum[4][4] = {};
  float absmax[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (n0 + j < N) absmax[j] = a.w.absmax[n0 + j];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = m0 + 8 * i;
    if (m >= a.M) break;
    const Acc<T> scale = a.scale[m];
    Vec<int32_t, 4> acc = {};
    if (kAligned) {
      if (n0 < N) acc = load_vec<int32_t, 4>(a.acc + m * N + n0);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (n0 + j < N) acc.v[j] = a.acc[m * N + n0 + j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      sum[i][j] = Acc<T>(acc.v[j]) * (scale * Acc<T>(absmax[j])) * Acc<T>(1.0 / (127.0 * 127.0));
  }
  for (int64_t begin = 0; a.outlier && begin < K; begin += kChunk) {
    const int total = list_outliers(a.outlier, begin, K, a.w.is_aligned, columns, counts);
    for (int c = 0; c < total; ++c) {
      const int64_t k = begin + columns[c];
      float w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        w[j] = n0 + j < N ? int8_value(a.w.codes[(n0 + j) * K + k], absmax[j]) : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t m = m0 + 8 * i;
        if (m >= a.M) break;
        const Acc<T> x = to_acc(a.x[m * K + k]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += x * Acc<T>(w[j]);
      }
    }
    __syncthreads();  // columns and counts are used again
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = m0 + 8 * i;
    if (m >= a.M) break;
    Vec<T, 4> out;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (a.bias && n0 + j < N) sum[i][j] += to_acc(a.bias[n0 + j]);
      out.v[j] = from_acc<T>(sum[i][j]);
    }
    if (kAligned) {
      if (n0 < N) store_vec<T, 4>(a.y + m * N + n0, out);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (n0 + j < N) a.y[m * N + n0 + j] = out.v[j];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) int8_dot_kernel(EpilogueArgs<T> a) {
  const int lane = threadIdx.x % 32;
  const int64_t N = a.w.N, K = a.w.K;
  const int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32,
                m0 = int64_t(blockIdx.y) * kDotTokens;
  if (n >= N) return;
  const int8_t* codes = a.w.codes + n * K;
  const float absmax = a.w.absmax[n];
  int dot[kDotTokens] = {};
  Acc<T> outer[kDotTokens] = {};
  for (int64_t k = lane * 16; k < K; k += 32 * 16) {
    const uint4 w = load_codes(codes, k, K, a.w.is_aligned);
#pragma unroll
    for (int m = 0; m < kDotTokens; ++m) {
      if (m0 + m >= a.M) break;
      const uint4 q = load_codes(a.q + (m0 + m) * K, k, K, a.w.is_aligned);
      dot[m] = __dp4a(int(w.x), int(q.x), dot[m]);
      dot[m] = __dp4a(int(w.y), int(q.y), dot[m]);
      dot[m] = __dp4a(int(w.z), int(q.z), dot[m]);
      dot[m] = __dp4a(int(w.w), int(q.w), dot[m]);
    }
    if (!a.outlier) continue;
    const uint4 flags =
        load_codes(reinterpret_cast<const int8_t*>(a.outlier), k, K, a.w.is_aligned);
    if ((flags.x | flags.y | flags.z | flags.w) == 0) continue;
    for (int64_t i = k; i < min(k + 16, K); ++i) {
      if (!a.outlier[i]) continue;
      const float value = int8_value(codes[i], absmax);
#pragma unroll
      for (int m = 0; m < kDotTokens; ++m)
        if (m0 + m < a.M) outer[m] += to_acc(a.x[(m0 + m) * K + i]) * Acc<T>(value);
    }
  }
#pragma unroll
  for (int m = 0; m < kDotTokens; ++m) {
    if (m0 + m >= a.M) break;
    const int total = warp_sum(dot[m]);
    const Acc<T> extra = warp_sum(outer[m]);
    if (lane != 0) continue;
    Acc<T> sum =
        Acc<T>(total) * (Acc<T>(a.scale[m0 + m]) * Acc<T>(absmax)) * Acc<T>(1.0 / (127.0 * 127.0));
    sum += extra;
    if (a.bias) sum += to_acc(a.bias[n]);
    a.y[(m0 + m) * N + n] = from_acc<T>(sum);
  }
}

template <class T, int kCount>
void launch_quantize_rows(const QuantizeRowsParams& p) {
  const cudaStream_t stream = cuda_stream(p.stream);
  const T* x = static_cast<const T*>(p.x);
  const unsigned columns = grid_blocks(p.K, int64_t(kThreads) * kCount);
  constexpr int64_t kRowsALaunch = 65535 * kFlagRows;  // gridDim.y's limit
  for (int64_t begin = 0; p.threshold > 0.0f && begin < p.M; begin += kRowsALaunch) {
    const int64_t rows = p.M - begin < kRowsALaunch ? p.M - begin : kRowsALaunch;
    const dim3 grid(columns, unsigned(ceil_div<int64_t>(rows, kFlagRows)));
    find_outliers_kernel<T, kCount>
        <<<grid, kThreads, 0, stream>>>(x + begin * p.K, rows, p.K, p.threshold, p.outlier);
    check_launch("find_outliers_kernel");
  }
  quantize_rows_kernel<T, kCount><<<grid_blocks(p.M, 1), kThreads, 0, stream>>>(p);
  check_launch("quantize_rows_kernel");
}

}  // namespace

void quantize_rows(const QuantizeRowsParams& p) {
  if (p.K == 0) return;
  FASTPEFT_CUDA_CHECK(cudaMemsetAsync(p.outlier, 0, p.K, cuda_stream(p.stream)));
  if (p.M == 0) return;
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.K % 8 == 0 && is_aligned(p.x, 16) && is_aligned(p.q, 8) && is_aligned(p.outlier, 8))
      launch_quantize_rows<T, 8>(p);
    else
      launch_quantize_rows<T, 1>(p);
  });
}

void int8_epilogue(const Int8EpilogueParams& p) {
  if (p.M == 0 || p.w.N == 0) return;
  FASTPEFT_CHECK(p.w.format == Format::kInt8, format_name(p.w.format),
                 ": int8_epilogue wants int8");
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    EpilogueArgs<T> a;
    a.w.codes = static_cast<const int8_t*>(p.w.codes);
    a.w.absmax = static_cast<const float*>(p.w.scales);
    a.w.N = p.w.N;
    a.w.K = p.w.K;
    a.w.is_aligned = p.w.K % 16 == 0 && is_aligned(p.w.codes, 16) && is_aligned(p.q, 16) &&
                     is_aligned(p.outlier, 16);
    a.M = p.M;
    a.acc = p.acc;
    a.q = p.q;
    a.scale = p.scale;
    a.outlier = p.outlier;
    a.x = static_cast<const T*>(p.x);
    a.bias = static_cast<const T*>(p.bias);
    a.y = static_cast<T*>(p.y);
    const int64_t rows = p.acc ? kTileM : kDotTokens, columns = p.acc ? kTileN32 : kWarps;
    const int64_t row_blocks = ceil_div<int64_t>(p.M, rows);
    FASTPEFT_CHECK(row_blocks < 65536, "int8_epilogue: ", p.M, " tokens in one launch");
    const dim3 grid(grid_blocks(p.w.N, columns), unsigned(row_blocks));
    const bool is_wide = p.w.N % 4 == 0 && is_aligned(p.acc, 16) && is_aligned(p.y, 16);
    const auto kernel = !p.acc    ? int8_dot_kernel<T>
                        : is_wide ? int8_epilogue_kernel<T, true>
                                  : int8_epilogue_kernel<T, false>;
    kernel<<<grid, kThreads, 0, cuda_stream(p.stream)>>>(a);
    check_launch("int8_epilogue");
  });
}

}  // namespace fastpeft::cuda
