// Quantised linear layer for few tokens, decoding inside.
//   fwd    y [M, N]  = x W^T + bias + scaling * s B^T     x [M, K], s [M, R], B [N, R]
//   dgrad  dx [M, K] = dy W + ds A                         dy [M, N], ds [M, R], A [R, K]
// Work split: fwd over strips of 16 rows of W, dgrad over strips of 64 columns; each sum runs in
// one order whatever the number of threads. Bound at M = 1: reading the packed weight once.
#include <algorithm>
#include <vector>

#include "blocked.h"
#include "decode.h"
#include "numbers.h"
#include "parallel.h"

namespace fastpeft::cpu {

namespace {

template <class T>
std::vector<fastpeft::Acc<T>> widen(const void* values, int64_t count) {
  const T* from = static_cast<const T*>(values);
  std::vector<fastpeft::Acc<T>> to(count);
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
  return to;
}

// Sum of at most 64 products in eight partial sums: short chains round less than one long one.
template <class Acc>
Acc strip_dot(const Acc* x, const float* w, int64_t count) {
  Acc part[8] = {};
  for (int64_t i = 0; i < count; ++i) part[i % 8] += x[i] * Acc(w[i]);
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

template <class T>
void fwd_plain(const QLinearFwdParams& p) {
  using Acc = fastpeft::Acc<T>;
  const int64_t M = p.M, N = p.w.N, K = p.w.K, R = p.s ? p.R : 0;
  const std::vector<Acc> x = widen<T>(p.x, M * K), s = widen<T>(p.s, M * R);
  const T* bias = static_cast<const T*>(p.bias);
  const T* lora_b = static_cast<const T*>(p.lora_b);
  T* y = static_cast<T*>(p.y);
  parallel_for(ceil_div<int64_t>(N, 16), 1, [&](int64_t begin, int64_t end) {
    float strip[16][64];
    std::vector<Acc> sum(M * 16);
    for (int64_t sn = begin; sn < end; ++sn) {
      std::fill(sum.begin(), sum.end(), Acc(0));
      for (int64_t sk = 0; sk * 64 < K; ++sk) {
        decode_strip(p.w, sn, sk, strip[0], 64);
        const int64_t width = std::min<int64_t>(64, K - sk * 64);
        for (int64_t m = 0; m < M; ++m)
          for (int r = 0; r < 16; ++r)
            sum[m * 16 + r] += strip_dot(&x[m * K + sk * 64], strip[r], width);
      }
      const int64_t rows = std::min<int64_t>(16, N - sn * 16);
      for (int64_t m = 0; m < M; ++m)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t n = sn * 16 + r;
          Acc low_rank = 0;
          for (int64_t i = 0; i < R; ++i) low_rank += s[m * R + i] * to_float(lora_b[n * R + i]);
          Acc value = sum[m * 16 + r] + Acc(p.scaling) * low_rank;
          if (bias) value += to_float(bias[n]);
          y[m * N + n] = from_float(Tag<T>{}, value);
        }
    }
  });
}

template <class T>
void dgrad_plain(const QLinearDgradParams& p) {
  using Acc = fastpeft::Acc<T>;
  const int64_t M = p.M, N = p.w.N, K = p.w.K, R = p.ds ? p.R : 0;
  const std::vector<Acc> dy = widen<T>(p.dy, M * N), ds = widen<T>(p.ds, M * R);
  const T* lora_a = static_cast<const T*>(p.lora_a);
  T* dx = static_cast<T*>(p.dx);
  parallel_for(ceil_div<int64_t>(K, 64), 1, [&](int64_t begin, int64_t end) {
    float strip[16][64];
    std::vector<Acc> sum(M * 64);
    for (int64_t sk = begin; sk < end; ++sk) {
      const int64_t width = std::min<int64_t>(64, K - sk * 64);
      std::fill(sum.begin(), sum.end(), Acc(0));
      for (int64_t sn = 0; sn * 16 < N; ++sn) {
        decode_strip(p.w, sn, sk, strip[0], 64);
        const int64_t rows = std::min<int64_t>(16, N - sn * 16);
        for (int64_t m = 0; m < M; ++m) {
          Acc part[64] = {};
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < width; ++i)
              part[i] += dy[m * N + sn * 16 + r] * Acc(strip[r][i]);
          for (int64_t i = 0; i < width; ++i) sum[m * 64 + i] += part[i];
        }
      }
      for (int64_t m = 0; m < M; ++m)
        for (int64_t i = 0; i < width; ++i) {
          Acc low_rank = 0;
          for (int64_t r = 0; r < R; ++r)
            low_rank += ds[m * R + r] * to_float(lora_a[r * K + sk * 64 + i]);
          dx[m * K + sk * 64 + i] = from_float(Tag<T>{}, sum[m * 64 + i] + low_rank);
        }
    }
  });
}

}  // namespace

void qlinear_fwd(const QLinearFwdParams& p) {
  const SimdKernels* k = simd_kernels();
  if (k && p.dtype != DType::kFloat64) return tokens_fwd(*k, p);
  dispatch(p.dtype, [&](auto tag) { fwd_plain<typename decltype(tag)::type>(p); });
}

void qlinear_dgrad(const QLinearDgradParams& p) {
  const SimdKernels* k = simd_kernels();
  if (k && p.dtype != DType::kFloat64) return tokens_dgrad(*k, p);
  dispatch(p.dtype, [&](auto tag) { dgrad_plain<typename decltype(tag)::type>(p); });
}

}  // namespace fastpeft::cpu
