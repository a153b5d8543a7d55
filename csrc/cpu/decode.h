// Reading a quantised weight: scales and strips of 16 rows x 64 columns. Layouts:
// csrc/core/formats.h.
#pragma once
#include <cstdint>

#include "../core/params.h"

namespace fastpeft::cpu {

inline const float* code_table(Format f) {
  return f == Format::kFp4 ? kFp4Code : kNf4Code;
}

// The decoded absmax of one block of a 4-bit weight; `flat` is the block's index in row-major
// order, `place` where it lies in memory.
inline float block_scale(const WeightView& w, int64_t flat, int64_t place) {
  if (!w.nested) return static_cast<const float*>(w.scales)[place];
  const uint8_t q = static_cast<const uint8_t*>(w.scales)[place];
  const float product = w.nested[1 + q] * w.nested[257 + flat / kNestedBlock];
  return product + w.nested[0];  // two roundings: built with -ffp-contract=off
}

// The exact float32 weight of rows 16*strip_n ... and columns 64*strip_k ...: out[n * stride + k].
// Outside [N, K] whatever the padding decodes to.
void decode_strip(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                  int64_t stride);

// The same without SIMD.
void decode_strip_plain(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                        int64_t stride);

}  // namespace fastpeft::cpu
