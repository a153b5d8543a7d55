// LLM.int8() around the integer matmul (Dettmers et al. 2022, "LLM.int8()").
//   quantize_rows  q [M, K] = round(x * 127 / scale), scale [M] = row absmax of what is not an
//                  outlier; a column with any |x| >= threshold is an outlier column, zero in q
//   int8_epilogue  y [M, N] = acc * scale_x * scale_w / 127^2 + sum over outlier columns x W + bias
// Work split: rows of x; rows of W. Bound: reading x; writing y.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "blocked.h"
#include "decode.h"
#include "numbers.h"
#include "parallel.h"

namespace fastpeft::cpu {

namespace {

int8_t rounded(float v) {
  return int8_t(std::nearbyintf(std::min(std::max(v, -127.0f), 127.0f)));
}

float plain_absmax(const std::vector<float>& row, float threshold, bool* has_outlier) {
  float most = 0.0f;
  for (float v : row) {
    const bool is_outlier = threshold > 0.0f && std::fabs(v) >= threshold;
    if (!is_outlier) most = std::max(most, std::fabs(v));
    *has_outlier |= is_outlier;
  }
  return most;
}

// Rows are independent but for the outlier columns, which any row may name: threads store the same
// 1 there, so their order does not matter.
void name_outliers(const QuantizeRowsParams& p, const float* row) {
  for (int64_t k = 0; k < p.K; ++k)
    if (std::fabs(row[k]) >= p.threshold)
      reinterpret_cast<std::atomic<uint8_t>*>(p.outlier)[k].store(1, std::memory_order_relaxed);
}

void zero_outliers(const QuantizeRowsParams& p) {
  if (p.threshold <= 0.0f) return;
  std::vector<int64_t> columns;
  for (int64_t k = 0; k < p.K; ++k)
    if (p.outlier[k]) columns.push_back(k);
  if (columns.empty()) return;
  parallel_for(p.M, std::max<int64_t>(1, 4096 / int64_t(columns.size())),
               [&](int64_t begin, int64_t end) {
                 for (int64_t m = begin; m < end; ++m)
                   for (int64_t k : columns) p.q[m * p.K + k] = 0;
               });
}

// Row by row in float32, whatever the dtype: float64 is rounded first, as q has 8 bits.
template <class T>
void quantize_rows_typed(const QuantizeRowsParams& p) {
  const T* x = static_cast<const T*>(p.x);
  const SimdKernels* k = simd_kernels();
  std::fill(p.outlier, p.outlier + p.K, uint8_t(0));
  parallel_for(p.M, ceil_div<int64_t>(8192, p.K), [&](int64_t begin, int64_t end) {
    std::vector<float> row(p.K);
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t i = 0; i < p.K; ++i) row[i] = float(to_float(x[m * p.K + i]));
      bool has_outlier = false;
      const float absmax = k ? k->row_absmax(row.data(), p.K, p.threshold, &has_outlier)
                             : plain_absmax(row, p.threshold, &has_outlier);
      if (has_outlier) name_outliers(p, row.data());
      const float inverse = int8_inverse(absmax);
      int8_t* q = p.q + m * p.K;
      if (k) {
        k->row_to_int8(row.data(), p.K, inverse, q);
      } else {
        for (int64_t i = 0; i < p.K; ++i) q[i] = rounded(row[i] * inverse);
      }
      p.scale[m] = absmax;
    }
  });
  zero_outliers(p);
}

std::vector<int64_t> outlier_columns(const Int8EpilogueParams& p) {
  std::vector<int64_t> columns;
  for (int64_t k = 0; p.outlier && k < p.w.K; ++k)
    if (p.outlier[k]) columns.push_back(k);
  return columns;
}

// Any dtype, element by element; float64 takes it, and machines without SIMD.
template <class T>
void epilogue_plain(const Int8EpilogueParams& p) {
  using Acc = fastpeft::Acc<T>;
  const int64_t N = p.w.N, K = p.w.K;
  const int8_t* codes = static_cast<const int8_t*>(p.w.codes);
  const float* absmax = static_cast<const float*>(p.w.scales);
  const T* x = static_cast<const T*>(p.x);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  const std::vector<int64_t> columns = outlier_columns(p);
  parallel_for(N, std::max<int64_t>(1, 16384 / K), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t m = 0; m < p.M; ++m) {
        int32_t dot = p.acc ? p.acc[m * N + n] : 0;
        for (int64_t k = 0; !p.acc && k < K; ++k)
          dot += int32_t(p.q[m * K + k]) * int32_t(codes[n * K + k]);
        Acc value = Acc(dot) * (Acc(p.scale[m]) * Acc(absmax[n])) * Acc(1.0 / (127.0 * 127.0));
        for (int64_t k : columns)
          value +=
              Acc(to_float(x[m * K + k])) * Acc(float(codes[n * K + k]) * absmax[n] * kInt8Step);
        if (bias) value += to_float(bias[n]);
        y[m * N + n] = from_float(Tag<T>{}, value);
      }
  });
}

// Columns of the result in pieces of 512, so that the decoded outlier columns of W stay in L2.
template <class T>
void epilogue_simd(const SimdKernels& k, const Int8EpilogueParams& p) {
  constexpr int64_t kPiece = 512;
  const int64_t N = p.w.N, K = p.w.K;
  const int8_t* codes = static_cast<const int8_t*>(p.w.codes);
  const float* absmax = static_cast<const float*>(p.w.scales);
  const T* x = static_cast<const T*>(p.x);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  const std::vector<int64_t> columns = outlier_columns(p);
  const int64_t count = int64_t(columns.size());
  parallel_for(
      ceil_div(N, kPiece), ceil_div<int64_t>(16384, p.M * kPiece), [&](int64_t begin, int64_t end) {
        std::vector<float> w(count * kPiece);
        float row[kPiece], shift[kPiece] = {};
        for (int64_t piece = begin; piece < end; ++piece) {
          const int64_t n0 = piece * kPiece, width = std::min(kPiece, N - n0);
          for (int64_t n = 0; n < width; ++n) {
            for (int64_t j = 0; j < count; ++j)
              w[j * kPiece + n] =
                  float(codes[(n0 + n) * K + columns[j]]) * absmax[n0 + n] * kInt8Step;
            if (bias) shift[n] = float(to_float(bias[n0 + n]));
          }
          for (int64_t m = 0; m < p.M; ++m) {
            k.scale_sums(p.acc + m * N + n0, width, p.scale[m], absmax + n0, row);
            for (int64_t j = 0; j < count; ++j)
              k.add_scaled(&w[j * kPiece], width, float(to_float(x[m * K + columns[j]])), row);
            if (bias) k.add_scaled(shift, width, 1.0f, row);
            k.narrow(p.dtype, row, y + m * N + n0, width);
          }
        }
      });
}

// acc [M, N] = q . codes without an integer matmul: whole numbers in float32, exact up to 2^24 and
// one rounding beyond.
std::vector<int32_t> integer_product(const SimdKernels& k, const Int8EpilogueParams& p) {
  const int64_t N = p.w.N, K = p.w.K;
  std::vector<float> q(p.M * K), sums(p.M * N);
  std::vector<int32_t> acc(p.M * N);
  for (int64_t i = 0; i < p.M * K; ++i) q[i] = float(p.q[i]);
  QLinearFwdParams fwd;
  fwd.w = p.w;
  fwd.w.scales = nullptr;  // the codes themselves
  fwd.M = p.M;
  fwd.x = q.data();
  fwd.y = sums.data();
  tokens_fwd(k, fwd);
  for (int64_t i = 0; i < p.M * N; ++i) acc[i] = int32_t(sums[i]);
  return acc;
}

template <class T>
void epilogue_typed(const Int8EpilogueParams& p) {
  const SimdKernels* k = simd_kernels();
  if (!k || p.dtype == DType::kFloat64) return epilogue_plain<T>(p);
  if (p.acc) return epilogue_simd<T>(*k, p);
  const std::vector<int32_t> acc = integer_product(*k, p);
  Int8EpilogueParams with_acc = p;
  with_acc.acc = acc.data();
  epilogue_simd<T>(*k, with_acc);
}

}  // namespace

void quantize_rows(const QuantizeRowsParams& p) {
  dispatch(p.dtype, [&](auto tag) { quantize_rows_typed<typename decltype(tag)::type>(p); });
}

void int8_epilogue(const Int8EpilogueParams& p) {
  dispatch(p.dtype, [&](auto tag) { epilogue_typed<typename decltype(tag)::type>(p); });
}

}  // namespace fastpeft::cpu
