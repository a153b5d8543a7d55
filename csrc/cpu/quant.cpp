// Quantise, double-quantise, re-tile, dequantise: one pass over the weight each.
// Rules of rounding and layouts: csrc/core/formats.h. Bound: reading (and writing) the weight.
// Work split: blocks, groups of 256 scales, strips of 16 rows; nothing depends on the split.
#include <algorithm>
#include <cmath>

#include "decode.h"
#include "numbers.h"
#include "parallel.h"
#include "simd.h"

namespace fastpeft::cpu {

namespace {

uint8_t code_of(Format f, float t) {
  const float* threshold = f == Format::kFp4 ? kFp4Threshold : kNf4Threshold;
  int below = 0;
  for (int i = 0; i < 15; ++i) below += threshold[i] < t;
  return uint8_t(f == Format::kFp4 ? kFp4Order[below] : below);
}

// One block of `count` elements starting at an even element; out: its nibbles, high first.
template <class T>
float quantize_block(Format f, const T* w, int64_t count, bool is_ragged, uint8_t* out) {
  float absmax = 0.0f;
  for (int64_t i = 0; i < count; ++i) absmax = std::max(absmax, std::fabs(float(to_float(w[i]))));
  const float bounded = std::max(absmax, kTinyAbsmax);
  const float inverse = 1.0f / bounded;
  uint8_t pair = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float v = float(to_float(w[i]));
    const uint8_t code = code_of(f, is_ragged ? v / bounded : v * inverse);
    if (i % 2 == 0) {
      pair = uint8_t(code << 4 | zero_code(f));
    } else {
      pair = uint8_t((pair & 0xF0) | code);
    }
    out[i / 2] = pair;
  }
  return is_ragged ? bounded : absmax;
}

template <class T>
void quantize_4bit(const QuantizeParams& p) {
  const T* w = static_cast<const T*>(p.w);
  uint8_t* codes = static_cast<uint8_t*>(p.codes);
  const int64_t count = p.N * p.K, blocks = block_count(p.N, p.K, p.blocksize);
  parallel_for(blocks, ceil_div<int64_t>(16384, p.blocksize), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * p.blocksize, n = std::min(p.blocksize, count - first);
      p.absmax[b] = quantize_block(p.format, w + first, n, n < p.blocksize, codes + first / 2);
    }
  });
}

template <class T>
void quantize_int8(const QuantizeParams& p) {
  const T* w = static_cast<const T*>(p.w);
  int8_t* codes = static_cast<int8_t*>(p.codes);
  parallel_for(p.N, ceil_div<int64_t>(16384, p.K), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float absmax = 0.0f;
      for (int64_t k = 0; k < p.K; ++k)
        absmax = std::max(absmax, std::fabs(float(to_float(w[n * p.K + k]))));
      const float inverse = int8_inverse(absmax);
      for (int64_t k = 0; k < p.K; ++k)
        codes[n * p.K + k] = int8_t(std::nearbyintf(float(to_float(w[n * p.K + k])) * inverse));
      p.absmax[n] = absmax;
    }
  });
}

// Scales of one strip, one a (row, 16-column tile) where a tile lies inside a block.
void tile_scales(const WeightView& w, int64_t strip_n, int64_t strip_k, float scale[16][4]) {
  const int64_t Np = round_up<int64_t>(w.N, kTileN), blocks = w.K / w.blocksize;
  for (int r = 0; r < 16; ++r) {
    const int64_t n = strip_n * 16 + r;
    for (int t = 0; t < 4; ++t) {
      const int64_t block = (strip_k * 64 + t * 16) / w.blocksize;
      const bool is_inside = n < w.N && block < blocks;
      scale[r][t] = is_inside ? block_scale(w, n * blocks + block, block * Np + n) : 0.0f;
    }
  }
}

// Blocks that straddle rows: the scale of every element.
void element_scales(const WeightView& w, int64_t n, int64_t k0, float scale[64]) {
  int64_t last = -1;
  float value = 0.0f;
  for (int k = 0; k < 64; ++k) {
    const bool is_inside = n < w.N && k0 + k < w.K;
    const int64_t block = is_inside ? (n * w.K + k0 + k) / w.blocksize : -1;
    if (is_inside && block != last) value = block_scale(w, block, block);
    last = block;
    scale[k] = is_inside ? value : 0.0f;
  }
}

void decode_4bit_strip(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                       int64_t stride) {
  const int64_t strips_k = ceil_div<int64_t>(w.K, kTileK);
  const uint8_t* strip =
      static_cast<const uint8_t*>(w.codes) + (strip_n * strips_k + strip_k) * kStripBytes;
  const float* table = code_table(w.format);
  const bool by_column = scales_by_column(w.K, w.blocksize);
  float tile[16][4], element[64];
  if (by_column) tile_scales(w, strip_n, strip_k, tile);
  for (int r = 0; r < 16; ++r) {
    if (!by_column) element_scales(w, strip_n * 16 + r, strip_k * 64, element);
    const uint8_t* row = strip + kPairPlace[r / 2] * 16 + r % 2;
    for (int k = 0; k < 64; k += 2) {
      const uint8_t byte = row[k / 16 * kTileBytes + kPairPlace[k % 16 / 2] * 2];
      float* to = out + r * stride + k;
      to[0] = table[byte & 15] * (by_column ? tile[r][k / 16] : element[k]);
      to[1] = table[byte >> 4] * (by_column ? tile[r][k / 16] : element[k + 1]);
    }
  }
}

void decode_int8_strip(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                       int64_t stride) {
  const int8_t* codes = static_cast<const int8_t*>(w.codes);
  const float* absmax = static_cast<const float*>(w.scales);
  for (int r = 0; r < 16; ++r) {
    const int64_t n = strip_n * 16 + r;
    for (int i = 0; i < 64; ++i) {
      const int64_t k = strip_k * 64 + i;
      const bool is_inside = n < w.N && k < w.K;
      const float code = is_inside ? float(codes[n * w.K + k]) : 0.0f;
      // no scales: the codes themselves (the integer product of LLM.int8())
      out[r * stride + i] = absmax && is_inside ? code * absmax[n] * kInt8Step : code;
    }
  }
}

template <class T>
void write_row(const SimdKernels* k, DType dtype, const float* from, T* to, int64_t count) {
  if (k && dtype != DType::kFloat64) return k->narrow(dtype, from, to, count);
  for (int64_t i = 0; i < count; ++i) to[i] = from_float(Tag<T>{}, from[i]);
}

// Four strips side by side, so that rows are written 256 columns at a time.
template <class T>
void dequantize_rows(const DequantizeParams& p) {
  constexpr int64_t kStrips = 4, kWidth = kStrips * 64;
  T* out = static_cast<T*>(p.out);
  const SimdKernels* k = simd_kernels();
  const int64_t K = p.w.K, first = p.row_begin / 16, strips_k = ceil_div<int64_t>(K, kTileK);
  parallel_for(ceil_div<int64_t>(p.row_end, 16) - first, ceil_div<int64_t>(4096, K),
               [&](int64_t begin, int64_t end) {
                 alignas(64) float strips[16][kWidth];
                 for (int64_t s = first + begin; s < first + end; ++s) {
                   const int64_t row_begin = std::max(p.row_begin, s * 16);
                   const int64_t row_end = std::min(p.row_end, s * 16 + 16);
                   for (int64_t c = 0; c < strips_k; c += kStrips) {
                     for (int64_t i = 0; i < kStrips && c + i < strips_k; ++i)
                       decode_strip(p.w, s, c + i, &strips[0][i * 64], kWidth);
                     const int64_t width = std::min(kWidth, K - c * 64);
                     for (int64_t n = row_begin; n < row_end; ++n)
                       write_row(k, p.dtype, strips[n % 16], out + (n - p.row_begin) * K + c * 64,
                                 width);
                   }
                 }
               });
}

// 16 rows to tiled order, or back. With even K a byte holds two columns of one row in either order,
// high nibble first in the canonical, low first in the tiled one.
void tile_strip_row(const TileParams& p, int64_t strip_n) {
  const int64_t strips_k = ceil_div<int64_t>(p.K, kTileK);
  const int64_t first = strip_n * strips_k * kStripBytes,
                row_end = std::min(p.N, strip_n * 16 + 16);
  if (p.to_tiled)
    std::fill(p.to + first, p.to + first + strips_k * kStripBytes,
              uint8_t(zero_code(p.format) * 0x11));
  for (int64_t n = strip_n * 16; n < row_end; ++n) {
    if (p.K % 2 == 0) {
      const int64_t in_tile = first + kPairPlace[n % 16 / 2] * 16 + n % 2, row = n * p.K / 2;
      for (int64_t k = 0; k < p.K; k += 2) {
        const int64_t tiled = in_tile + k / 16 * kTileBytes + kPairPlace[k % 16 / 2] * 2;
        const uint8_t byte = p.from[p.to_tiled ? row + k / 2 : tiled];
        p.to[p.to_tiled ? tiled : row + k / 2] = uint8_t(byte << 4 | byte >> 4);
      }
      continue;
    }
    for (int64_t k = 0; k < p.K; ++k) {
      const int64_t e = n * p.K + k;
      const uint8_t code = e % 2 ? p.from[e / 2] & 15 : p.from[e / 2] >> 4;
      const NibblePlace place = tiled_place(n, k, p.K);
      uint8_t& to = p.to[place.byte];
      to = uint8_t((to & 0xF0 >> place.shift) | code << place.shift);
    }
  }
}

}  // namespace

void decode_strip(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                  int64_t stride) {
  const SimdKernels* k = simd_kernels();
  k ? k->decode_rows(w, strip_n, strip_k, out, stride, k->panel)
    : decode_strip_plain(w, strip_n, strip_k, out, stride);
}

void decode_strip_plain(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                        int64_t stride) {
  if (is_4bit(w.format)) return decode_4bit_strip(w, strip_n, strip_k, out, stride);
  FASTPEFT_CHECK(w.format == Format::kInt8, "no strips in format ", format_name(w.format));
  decode_int8_strip(w, strip_n, strip_k, out, stride);
}

void quantize(const QuantizeParams& p) {
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    is_4bit(p.format) ? quantize_4bit<T>(p) : quantize_int8<T>(p);
  });
}

void quantize_absmax(const QuantizeAbsmaxParams& p) {
  const float offset = p.offset[0];
  const float* map = p.nested + 1;
  float middle[255];
  for (int i = 0; i < 255; ++i) middle[i] = (map[i] + map[i + 1]) * 0.5f;
  p.nested[0] = offset;
  parallel_for(ceil_div<int64_t>(p.count, kNestedBlock), 16, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * kNestedBlock, last = std::min(p.count, first + kNestedBlock);
      float absmax = 0.0f;
      for (int64_t i = first; i < last; ++i)
        absmax = std::max(absmax, std::fabs(p.absmax[i] - offset));
      p.nested[257 + g] = absmax;
      const float inverse = 1.0f / absmax;
      for (int64_t i = first; i < last; ++i) {
        const float t = std::min(std::max((p.absmax[i] - offset) * inverse, -1.0f), 1.0f);
        p.codes[i] = absmax == 0.0f
                         ? 0
                         : uint8_t(std::lower_bound(middle, middle + 255, nested_grid(t)) - middle);
      }
    }
  });
}

void tile(const TileParams& p) {
  const int64_t count = p.N * p.K;
  if (p.to_tiled || p.K % 2 == 0) {
    return parallel_for(ceil_div<int64_t>(p.N, kTileN), ceil_div<int64_t>(4096, p.K),
                        [&](int64_t begin, int64_t end) {
                          for (int64_t s = begin; s < end; ++s) tile_strip_row(p, s);
                        });
  }
  // Back, by canonical byte: with odd K a byte holds the end of one row and the start of the next.
  parallel_for(ceil_div<int64_t>(count, 2), 8192, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      uint8_t nibble[2] = {0, uint8_t(zero_code(p.format))};
      for (int h = 0; h < 2 && 2 * b + h < count; ++h) {
        const NibblePlace at = tiled_place((2 * b + h) / p.K, (2 * b + h) % p.K, p.K);
        nibble[h] = p.from[at.byte] >> at.shift & 15;
      }
      p.to[b] = uint8_t(nibble[0] << 4 | nibble[1]);
    }
  });
}

void dequantize(const DequantizeParams& p) {
  dispatch(p.dtype, [&](auto tag) { dequantize_rows<typename decltype(tag)::type>(p); });
}

}  // namespace fastpeft::cpu
