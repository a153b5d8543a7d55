// LLM.int8() around the integer matmul (Dettmers et al. 2022, "LLM.int8()").
//   quantize_rows  q [M, K] = round(x * 127 / scale), scale [M] = row absmax of what is not an
//                  outlier; a column with any |x| >= threshold is an outlier column, zero in q
//   int8_epilogue  y [M, N] = acc * scale_x * scale_w / 127^2 + sum over outlier columns x W + bias
// Work split: rows of x; rows of W. Bound: reading x; writing y.
#include <algorithm>
#include <cmath>
#include <vector>

#include "decode.h"
#include "numbers.h"
#include "parallel.h"

namespace fastpeft::cpu {

namespace {

template <class T>
void find_outliers(const QuantizeRowsParams& p) {
  const T* x = static_cast<const T*>(p.x);
  parallel_for(p.K, std::max<int64_t>(64, 16384 / std::max<int64_t>(p.M, 1)),
               [&](int64_t begin, int64_t end) {
                 std::fill(p.outlier + begin, p.outlier + end, uint8_t(0));
                 if (p.threshold <= 0.0f) return;
                 for (int64_t m = 0; m < p.M; ++m)
                   for (int64_t k = begin; k < end; ++k)
                     p.outlier[k] |= std::fabs(float(to_float(x[m * p.K + k]))) >= p.threshold;
               });
}

template <class T>
void quantize_rows_typed(const QuantizeRowsParams& p) {
  const T* x = static_cast<const T*>(p.x);
  find_outliers<T>(p);
  parallel_for(p.M, ceil_div<int64_t>(8192, p.K), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* row = x + m * p.K;
      float absmax = 0.0f;
      for (int64_t k = 0; k < p.K; ++k) {
        const float a = std::fabs(float(to_float(row[k])));
        if (p.threshold <= 0.0f || a < p.threshold) absmax = std::max(absmax, a);
      }
      const float inverse = int8_inverse(absmax);
      for (int64_t k = 0; k < p.K; ++k)
        p.q[m * p.K + k] =
            p.outlier[k] ? 0 : int8_t(std::nearbyintf(float(to_float(row[k])) * inverse));
      p.scale[m] = absmax;
    }
  });
}

template <class T>
void epilogue_typed(const Int8EpilogueParams& p) {
  using Acc = typename Accumulator<T>::type;
  const int64_t N = p.w.N, K = p.w.K;
  const int8_t* codes = static_cast<const int8_t*>(p.w.codes);
  const float* absmax = static_cast<const float*>(p.w.scales);
  const T* x = static_cast<const T*>(p.x);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  std::vector<int64_t> columns;
  for (int64_t k = 0; p.outlier && k < K; ++k)
    if (p.outlier[k]) columns.push_back(k);
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

}  // namespace

void quantize_rows(const QuantizeRowsParams& p) {
  dispatch(p.dtype, [&](auto tag) { quantize_rows_typed<typename decltype(tag)::type>(p); });
}

void int8_epilogue(const Int8EpilogueParams& p) {
  dispatch(p.dtype, [&](auto tag) { epilogue_typed<typename decltype(tag)::type>(p); });
}

}  // namespace fastpeft::cpu
