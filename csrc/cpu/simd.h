// The SIMD kernels of one instruction set, as a table of functions chosen once at run time.
// simd_avx512.cpp and simd_avx2.cpp bring the vector primitives, simd_kernels.h the kernels over
// them. Everything computes in float32; lanes run over rows n of W forward and columns k backward,
// so a decoded vector meets one broadcast activation a token and nothing is summed across lanes.
#pragma once
#include <cstdint>

#include "../core/params.h"

namespace fastpeft::cpu {

constexpr int kMaxFewTokens = 8;    // tokens of the kernels that keep all sums in registers
constexpr int kMaxTileTokens = 12;  // tokens of the widest register tile

struct SimdKernels {
  int panel;        // columns of a register tile: two vectors
  int tile_tokens;  // tokens of the widest register tile

  // y [M][16] of strip row strip_n; x [M][x_stride], zero padded to a multiple of 64. M in 1 ... 8.
  void (*few_fwd[kMaxFewTokens + 1])(const WeightView& w, int64_t strip_n, const float* x,
                                     int64_t x_stride, float* y);
  // dx [M][dx_stride], overwritten: columns 64 begin ... 64 end; dy [M][dy_stride] zero padded to
  // a multiple of 16. M in 1 ... 8.
  void (*few_dgrad[kMaxFewTokens + 1])(const WeightView& w, int64_t begin, int64_t end,
                                       const float* dy, int64_t dy_stride, float* dx,
                                       int64_t dx_stride);

  // The exact weight of one strip: out[k * stride + n], k in 0 ... 63, n in 0 ... 15 ...
  void (*decode_columns)(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                         int64_t stride);
  // ... or out[(k / panel) * panel_stride + n * stride + k % panel].
  void (*decode_rows)(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                      int64_t stride, int64_t panel_stride);

  // c [T][c_stride] (+)= x^T panel: panel [depth][panel], x [depth][T], T = index of the entry.
  void (*tile[kMaxTileTokens + 1])(int64_t depth, const float* panel, const float* x, float* c,
                                   int64_t c_stride, bool adds);

  void (*widen)(DType dtype, const void* from, float* to, int64_t count);
  void (*narrow)(DType dtype, const float* from, void* to, int64_t count);  // nearest even

  // LLM.int8(). Largest |x| below the threshold (0: of all), and whether anything reaches it.
  float (*row_absmax)(const float* x, int64_t count, float threshold, bool* has_outlier);
  void (*row_to_int8)(const float* x, int64_t count, float inverse, int8_t* q);
  // y [count] = acc * scale_x * scale_w / 127^2; y += factor * w.
  void (*scale_sums)(const int32_t* acc, int64_t count, float scale_x, const float* scale_w,
                     float* y);
  void (*add_scaled)(const float* w, int64_t count, float factor, float* y);
};

// Null where the machine has none (or FASTPEFT_CPU_ISA says plain).
const SimdKernels* simd_kernels();

// 4-bit with scales in column order: what the fastest kernels serve. Other weights (int8, blocks
// that straddle rows) are decoded strip by strip.
inline bool has_column_scales(const WeightView& w) {
  return is_4bit(w.format) && scales_by_column(w.K, w.blocksize);
}

const SimdKernels* avx512_kernels();  // null when not compiled for x86-64
const SimdKernels* avx2_kernels();

}  // namespace fastpeft::cpu
