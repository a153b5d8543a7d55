// Quantised linear layer without a 16-bit copy of W: the launchers, and the kernels for whatever
// the tensor-core path (qlinear_skinny_*.cu) does not take: float32 and float64, int8, any K, any
// blocksize.
//
//   qlinear_fwd    y [M, N]  = x W^T + bias + scaling * s B^T
//   qlinear_dgrad  dx [M, K] = dy W + ds A
//
// Both read W through load_row_pair: 16 columns of two rows, exact float32 weights.
//   fwd:   a warp owns two rows; lanes share K; 4 tokens a block; sums by shuffles in a fixed order
//   dgrad: a block owns 16 columns; threads share the row pairs; 2 tokens a block
// Bound: arithmetic (a float32 FMA a weight and token, after a lookup), not memory: for correctness
// and few tokens. The plan sends larger M to dequantise + matmul.
#include "check.cuh"
#include "device/decode.cuh"
#include "device/reduce.cuh"
#include "int8_skinny.h"
#include "int8_weight_wgmma.h"
#include "launch.h"
#include "qlinear_dense.h"
#include "qlinear_skinny.cuh"
#include "qlinear_wgmma.h"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kFwdTokens = 4, kDgradTokens = 2;

// The LoRA term of either direction: forward s [M, R], B [N, R]; dgrad ds [M, R], A [R, K].
template <class T>
struct LoraTerm {
  const T* s;  // [M, R] or null
  const T* factor;
  int64_t R;
  float scaling;
};

template <class T, class W, bool kAligned>  // aligned: K % 16 == 0, x at a multiple of 16 bytes
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_fwd_kernel(W w, Codebook book, const T* __restrict__ x, const T* __restrict__ bias,
                       LoraTerm<T> lora, T* __restrict__ y, int64_t M) {
  __shared__ float table[16 * 32];
  fill_codebook(table, book);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t n0 = 2 * (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32);
  if (n0 >= w.N) return;
  const int64_t m0 = int64_t(blockIdx.y) * kFwdTokens;
  Acc<T> acc[2][kFwdTokens] = {};
  for (int64_t tile = lane; tile * 16 < w.K; tile += 32) {
    const RowPair pair = load_row_pair(w, table + lane, n0 / 2, tile);
#pragma unroll
    for (int m = 0; m < kFwdTokens; ++m) {
      if (m0 + m >= M) break;
      const T* row = x + (m0 + m) * w.K + tile * 16;
      Vec<T, 16> piece;
      if constexpr (kAligned) {
        piece = load_vec<T, 16>(row);
      } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) piece.v[i] = tile * 16 + i < w.K ? row[i] : T(0.0f);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        acc[0][m] += to_acc(piece.v[i]) * pair.w[0][i];
        acc[1][m] += to_acc(piece.v[i]) * pair.w[1][i];
      }
    }
  }
  for (int64_t r = lane; lora.s && r < lora.R; r += 32)
#pragma unroll
    for (int m = 0; m < kFwdTokens; ++m) {
      if (m0 + m >= M) break;
      const Acc<T> value = Acc<T>(lora.scaling) * to_acc(lora.s[(m0 + m) * lora.R + r]);
#pragma unroll
      for (int row = 0; row < 2; ++row)
        if (n0 + row < w.N) acc[row][m] += value * to_acc(lora.factor[(n0 + row) * lora.R + r]);
    }
#pragma unroll
  for (int row = 0; row < 2; ++row)
#pragma unroll
    for (int m = 0; m < kFwdTokens; ++m) {
      Acc<T> sum = warp_sum(acc[row][m]);
      if (lane != 0 || n0 + row >= w.N || m0 + m >= M) continue;
      if (bias) sum += to_acc(bias[n0 + row]);
      y[(m0 + m) * w.N + n0 + row] = from_acc<T>(sum);
    }
}

template <class T, class W>
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_dgrad_kernel(W w, Codebook book, const T* __restrict__ dy, LoraTerm<T> lora,
                         T* __restrict__ dx, int64_t M) {
  __shared__ float table[16 * 32];
  __shared__ Acc<T> parts[kWarps][kDgradTokens][16];
  fill_codebook(table, book);
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t k0 = int64_t(blockIdx.x) * 16, m0 = int64_t(blockIdx.y) * kDgradTokens;
  Acc<T> acc[kDgradTokens][16] = {};
  for (int64_t pair = threadIdx.x; 2 * pair < w.N; pair += kThreads) {
    const RowPair rows = load_row_pair(w, table + lane, pair, blockIdx.x);
#pragma unroll
    for (int m = 0; m < kDgradTokens; ++m) {
      if (m0 + m >= M) break;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (2 * pair + row >= w.N) break;
        const Acc<T> grad = to_acc(dy[(m0 + m) * w.N + 2 * pair + row]);
#pragma unroll
        for (int i = 0; i < 16; ++i) acc[m][i] += grad * rows.w[row][i];
      }
    }
  }
  for (int64_t r = threadIdx.x; lora.s && r < lora.R; r += kThreads)
#pragma unroll
    for (int m = 0; m < kDgradTokens; ++m) {
      if (m0 + m >= M) break;
      const Acc<T> grad = to_acc(lora.s[(m0 + m) * lora.R + r]);
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if (k0 + i < w.K) acc[m][i] += grad * to_acc(lora.factor[r * w.K + k0 + i]);
    }
#pragma unroll
  for (int m = 0; m < kDgradTokens; ++m)
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const Acc<T> sum = warp_sum(acc[m][i]);
      if (lane == 0) parts[warp][m][i] = sum;
    }
  __syncthreads();
  const int m = threadIdx.x / 16, i = threadIdx.x % 16;
  if (m >= kDgradTokens || m0 + m >= M || k0 + i >= w.K) return;
  Acc<T> sum = parts[0][m][i];
#pragma unroll
  for (int part = 1; part < kWarps; ++part) sum += parts[part][m][i];
  dx[(m0 + m) * w.K + k0 + i] = from_acc<T>(sum);
}

Int8Weight int8_weight(const WeightView& w) {
  Int8Weight out;
  out.codes = static_cast<const int8_t*>(w.codes);
  out.absmax = static_cast<const float*>(w.scales);
  out.N = w.N;
  out.K = w.K;
  out.is_aligned = w.K % 16 == 0 && is_aligned(w.codes, 16);
  return out;
}

dim3 grid_of(int64_t blocks, int64_t M, int tokens) {
  const int64_t chunks = ceil_div<int64_t>(M, tokens);
  FASTPEFT_CHECK(chunks < 65536, "qlinear: ", M, " tokens in one fused launch");
  return dim3(grid_blocks(blocks, 1), unsigned(chunks));
}

template <class T, class W>
void launch_fwd(const QLinearFwdParams& p, const W& w, const Codebook& book) {
  const LoraTerm<T> lora{p.R > 0 ? static_cast<const T*>(p.s) : nullptr,
                         static_cast<const T*>(p.lora_b), p.R, p.scaling};
  const dim3 grid = grid_of(ceil_div<int64_t>(p.w.N, 2 * kWarps), p.M, kFwdTokens);
  const auto kernel = p.w.K % 16 == 0 && is_aligned(p.x, 16) ? qlinear_fwd_kernel<T, W, true>
                                                             : qlinear_fwd_kernel<T, W, false>;
  kernel<<<grid, kThreads, 0, cuda_stream(p.stream)>>>(w, book, static_cast<const T*>(p.x),
                                                       static_cast<const T*>(p.bias), lora,
                                                       static_cast<T*>(p.y), p.M);
  check_launch("qlinear_fwd_kernel");
}

template <class T, class W>
void launch_dgrad(const QLinearDgradParams& p, const W& w, const Codebook& book) {
  const LoraTerm<T> lora{p.R > 0 ? static_cast<const T*>(p.ds) : nullptr,
                         static_cast<const T*>(p.lora_a), p.R, 1.0f};
  const dim3 grid = grid_of(ceil_div<int64_t>(p.w.K, 16), p.M, kDgradTokens);
  qlinear_dgrad_kernel<T, W><<<grid, kThreads, 0, cuda_stream(p.stream)>>>(
      w, book, static_cast<const T*>(p.dy), lora, static_cast<T*>(p.dx), p.M);
  check_launch("qlinear_dgrad_kernel");
}

}  // namespace

void qlinear_fwd(const QLinearFwdParams& p) {
  if (p.M == 0 || p.w.N == 0) return;
  if (p.w.format == Format::kDense) return qlinear_dense_fwd(p);
  if (p.plan.kernel == KernelId::kWgmma)
    return p.w.format == Format::kInt8 ? int8_weight_wgmma_fwd(p) : qlinear_wgmma_fwd(p);
  if (p.plan.kernel == KernelId::kNarrow) return qlinear_narrow_fwd(p);
  if (skinny_fits(p)) return qlinear_fwd_skinny(p);
  if (int8_skinny_fits(p)) return int8_skinny_fwd(p);
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.w.format == Format::kInt8)
      launch_fwd<T>(p, int8_weight(p.w), Codebook{});
    else
      launch_fwd<T>(p, packed_weight(p.w), codebook(p.w.format));
  });
}

void qlinear_dgrad(const QLinearDgradParams& p) {
  if (p.M == 0 || p.w.K == 0) return;
  if (p.w.format == Format::kDense) return qlinear_dense_dgrad(p);
  if (p.plan.kernel == KernelId::kWgmma)
    return p.w.format == Format::kInt8 ? int8_weight_wgmma_dgrad(p) : qlinear_wgmma_dgrad(p);
  if (p.plan.kernel == KernelId::kNarrow) return qlinear_narrow_dgrad(p);
  if (skinny_fits(p)) return qlinear_dgrad_skinny(p);
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.w.format == Format::kInt8)
      launch_dgrad<T>(p, int8_weight(p.w), Codebook{});
    else
      launch_dgrad<T>(p, packed_weight(p.w), codebook(p.w.format));
  });
}

}  // namespace fastpeft::cuda
