// LLM.int8() behind a matrix of int32 sums from elsewhere, and the product itself for what the
// tensor-core kernels (int8_skinny_fwd.cu, int8_wgmma.cu) do not take: float32 and float64, ragged
// K.
//
//   int8_epilogue  y [M, N] = acc * scale_x * scale_w / 127^2 + sum over outlier columns x W + bias
//                  acc [M, N] int32 from a matmul, or computed here (dp4a) when null
//
// Work split
//   with acc:    a block owns 32 x 128 of y, a thread 4 x 4; each block lists the outlier columns
//                itself, in order, 4096 columns at a time: no host, no atomics
//   without acc: a warp owns one n and 8 tokens, lanes share K
// Bound: reading acc, writing y; for few tokens reading W once.
#include "check.cuh"
#include "device/decode.cuh"
#include "device/reduce.cuh"
#include "int8_outliers.cuh"
#include "int8_skinny.h"
#include "int8_wgmma.h"
#include "launch.h"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = kOutlierThreads, kWarps = kThreads / 32;
constexpr int kTileM = 32, kTileN32 = 128;  // epilogue with acc
constexpr int kDotTokens = 8;               // epilogue without acc

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

}  // namespace

void int8_epilogue(const Int8EpilogueParams& p) {
  if (p.M == 0 || p.w.N == 0) return;
  FASTPEFT_CHECK(p.w.format == Format::kInt8, format_name(p.w.format),
                 ": int8_epilogue wants int8");
  if (p.tile_tokens > 0) return int8_wgmma_fwd(p);
  if (int8_skinny_fits(p)) return int8_skinny_fwd(p);
  FASTPEFT_CHECK(p.s == nullptr, "int8_epilogue: this path adds no low-rank product");
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
