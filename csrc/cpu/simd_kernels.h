// The kernels of simd.h over the vector primitives of one instruction set. Included once by each
// simd_<isa>.cpp, which defines before:
//   SIMD                     the function target attribute
//   Vec, kLanes              a vector of float32
//   load, store, broadcast, zero, mul, add, fma
//   Table, load_table, lookup(table, Bits), Bits: codebook lookup by the low 4 bits of each lane
//   shift<n>(Bits)           logical right shift
//   load_columns(tile, bits) bits[c][v], c in 0 ... 3: lanes n of vector v; after a shift by 0, 4,
//                            16, 20 the low nibble is the code of column 2c, 2c+1, 2c+8, 2c+9
//   load_row_pair(row, bits) bits[v]: lanes k of vector v; after a shift by 0, 8 the low nibble is
//                            the code of the even, odd row of the pair stored at `row` (16 bytes)
//   load_bytes, spread, ramp, add_bits, min_bits, gather: 32-bit integer lanes for the scales
//   load_int8, gather_int, signed_byte<b>, to_vec: int8 codes
//   magnitude, largest, largest_lane, keep_below, round_to_int8: int8 activations

// How far ahead packed bytes are fetched: the hardware's prefetcher stops at a page. 4096 x 4096,
// M = 1, weights not in cache, one Sapphire Rapids thread: none 1388 us, 1 KiB 1066, 4 KiB 909, 8
// KiB 902.
constexpr int kAheadBytes = 4096;
constexpr int kVecs = 16 / kLanes;  // vectors for the 16 rows or columns of a tile
constexpr int kPanel = 2 * kLanes;  // columns of a register tile

SIMD_INLINE void fetch_tile(const uint8_t* tile) {
  __builtin_prefetch(tile);
  __builtin_prefetch(tile + 64);
}

// Strips of a weight and the scales of their rows. A strip has one scale a row when blocksize >= 64
// and two when it is 32; blocks that begin beyond K (K % 64 != 0) have scale 0.
struct StripReader {
  const WeightView& w;
  const float* table;
  int64_t Np, blocks, strips_k;
  int32_t last_block;
  int tiles_per_block;  // tiles of a strip that share a scale

  SIMD explicit StripReader(const WeightView& view)
      : w(view),
        table(code_table(view.format)),
        Np(round_up<int64_t>(view.N, kTileN)),
        blocks(view.K / view.blocksize),
        strips_k(ceil_div<int64_t>(view.K, kTileK)),
        last_block(int32_t(block_count(view.N, view.K, view.blocksize) - 1)),
        tiles_per_block(view.blocksize >= 64 ? 4 : 2) {}

  SIMD const uint8_t* strip(int64_t strip_n, int64_t strip_k) const {
    return static_cast<const uint8_t*>(w.codes) + (strip_n * strips_k + strip_k) * kStripBytes;
  }

  // Flat index of the first block of the 16 rows of strip_n, one a lane. 32 bits: 2^31 blocks are
  // 2^36 weights.
  SIMD void rows(int64_t strip_n, Bits row[kVecs]) const {
    for (int v = 0; v < kVecs; ++v)
      row[v] =
          add_bits(spread(int32_t((strip_n * 16 + v * kLanes) * blocks)), ramp(int32_t(blocks)));
  }

  // scale[16] of the rows of strip_n for the block that holds column k; row as from rows().
  // absmax = map[q] * nested_absmax[flat / 256] + offset, two roundings.
  SIMD void scales(const Bits row[kVecs], int64_t strip_n, int64_t k, float* scale) const {
    const int64_t block = k / w.blocksize, place = block * Np + strip_n * 16;
    for (int v = 0; v < kVecs; ++v) {
      Vec s = zero();
      if (block < blocks && w.nested) {
        // rows beyond N are padding: any group that exists will do
        const Bits flat = min_bits(add_bits(row[v], spread(int32_t(block))), spread(last_block));
        const uint8_t* q = static_cast<const uint8_t*>(w.scales) + place + v * kLanes;
        s = add(mul(gather(w.nested + 1, load_bytes(q)), gather(w.nested + 257, shift<8>(flat))),
                broadcast(w.nested));
      } else if (block < blocks) {
        s = load(static_cast<const float*>(w.scales) + place + v * kLanes);
      }
      store(scale + v * kLanes, s);
    }
  }
};

// ---- few tokens, forward: sums of one strip row in registers; the scale meets the sum of a block,
// not every weight. kParts chains a sum keep the FMA units busy when M is small.
template <int M>
SIMD void packed_fwd(const WeightView& w, int64_t strip_n, const float* x, int64_t x_stride,
                     float* y) {
  constexpr int kParts = M * kVecs >= 4 ? 1 : 4 / (M * kVecs);
  const StripReader reader(w);
  const Table table = load_table(reader.table);
  Vec total[M][kVecs];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kVecs; ++v) total[m][v] = zero();
  alignas(64) float scale[16] = {};
  Bits row[kVecs];
  reader.rows(strip_n, row);
  for (int64_t strip_k = 0; strip_k < reader.strips_k; ++strip_k) {
    const uint8_t* strip = reader.strip(strip_n, strip_k);
    for (int first = 0; first < 4; first += reader.tiles_per_block) {
      Vec part[kParts][M][kVecs];
      UNROLL for (int p = 0; p < kParts; ++p) {
        UNROLL for (int m = 0; m < M; ++m) {
          UNROLL for (int v = 0; v < kVecs; ++v) part[p][m][v] = zero();
        }
      }
      for (int t = first; t < first + reader.tiles_per_block; ++t) {
        Bits bits[4][kVecs];
        load_columns(strip + t * kTileBytes, bits);
        fetch_tile(strip + t * kTileBytes + kAheadBytes);
        const float* xt = x + strip_k * 64 + t * 16;
        UNROLL for (int c = 0; c < 4; ++c) {
          UNROLL for (int v = 0; v < kVecs; ++v) {
            const Vec w0 = lookup(table, bits[c][v]), w1 = lookup(table, shift<4>(bits[c][v]));
            const Vec w8 = lookup(table, shift<16>(bits[c][v]));
            const Vec w9 = lookup(table, shift<20>(bits[c][v]));
            UNROLL for (int m = 0; m < M; ++m) {
              const float* xm = xt + m * x_stride + 2 * c;
              part[0][m][v] = fma(w0, broadcast(xm), part[0][m][v]);
              part[1 % kParts][m][v] = fma(w1, broadcast(xm + 1), part[1 % kParts][m][v]);
              part[2 % kParts][m][v] = fma(w8, broadcast(xm + 8), part[2 % kParts][m][v]);
              part[3 % kParts][m][v] = fma(w9, broadcast(xm + 9), part[3 % kParts][m][v]);
            }
          }
        }
      }
      reader.scales(row, strip_n, strip_k * 64 + first * 16, scale);
      UNROLL for (int v = 0; v < kVecs; ++v) {
        const Vec s = load(scale + v * kLanes);
        UNROLL for (int m = 0; m < M; ++m) {
          UNROLL for (int p = 1; p < kParts; ++p) part[0][m][v] = add(part[0][m][v], part[p][m][v]);
          total[m][v] = fma(part[0][m][v], s, total[m][v]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kVecs; ++v) store(y + m * 16 + v * kLanes, total[m][v]);
}

// ---- few tokens, input gradient: the scale is taken into dy, 16 products a strip and token. Sums
// of a tile stay in registers over its 16 rows, then join dx (in L1): short chains round less.
template <int M>
SIMD void packed_dgrad(const WeightView& w, int64_t begin, int64_t end, const float* dy,
                       int64_t dy_stride, float* dx, int64_t dx_stride) {
  const StripReader reader(w);
  const Table table = load_table(reader.table);
  alignas(64) float scale[16] = {}, scaled[M][16];
  Bits row[kVecs];
  for (int m = 0; m < M; ++m)
    for (int64_t k = 0; k < (end - begin) * 64; k += kLanes) store(dx + m * dx_stride + k, zero());
  for (int64_t strip_n = 0; strip_n * 16 < w.N; ++strip_n) {
    reader.rows(strip_n, row);
    for (int64_t strip_k = begin; strip_k < end; ++strip_k) {
      const uint8_t* strip = reader.strip(strip_n, strip_k);
      for (int t = 0; t < 4; ++t) {
        fetch_tile(reader.strip(strip_n + 1, strip_k) + t * kTileBytes);
        if (t % reader.tiles_per_block == 0) {
          reader.scales(row, strip_n, strip_k * 64 + t * 16, scale);
          UNROLL for (int v = 0; v < kVecs; ++v) {
            const Vec s = load(scale + v * kLanes);
            UNROLL for (int m = 0; m < M; ++m)
                store(scaled[m] + v * kLanes,
                      mul(load(dy + m * dy_stride + strip_n * 16 + v * kLanes), s));
          }
        }
        float* out = dx + (strip_k - begin) * 64 + t * 16;
        Vec sum[M][kVecs];
        UNROLL for (int m = 0; m < M; ++m) {
          UNROLL for (int v = 0; v < kVecs; ++v) sum[m][v] = zero();
        }
        UNROLL for (int p = 0; p < 8; ++p) {
          Bits bits[kVecs];
          load_row_pair(strip + t * kTileBytes + kPairPlace[p] * 16, bits);
          UNROLL for (int v = 0; v < kVecs; ++v) {
            const Vec even = lookup(table, bits[v]), odd = lookup(table, shift<8>(bits[v]));
            UNROLL for (int m = 0; m < M; ++m) {
              sum[m][v] = fma(even, broadcast(scaled[m] + 2 * p), sum[m][v]);
              sum[m][v] = fma(odd, broadcast(scaled[m] + 2 * p + 1), sum[m][v]);
            }
          }
        }
        UNROLL for (int m = 0; m < M; ++m) {
          UNROLL for (int v = 0; v < kVecs; ++v) {
            float* to = out + m * dx_stride + v * kLanes;
            store(to, add(load(to), sum[m][v]));
          }
        }
      }
    }
  }
}

// ---- decoding a strip into a panel: 4-bit codes with scales in column order
SIMD void unpack_columns(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                         int64_t stride) {
  const StripReader reader(w);
  const Table table = load_table(reader.table);
  const uint8_t* strip = reader.strip(strip_n, strip_k);
  alignas(64) float scale[16] = {};
  Bits row[kVecs];
  reader.rows(strip_n, row);
  for (int t = 0; t < 4; ++t) {
    if (t % reader.tiles_per_block == 0) reader.scales(row, strip_n, strip_k * 64 + t * 16, scale);
    Bits bits[4][kVecs];
    load_columns(strip + t * kTileBytes, bits);
    fetch_tile(strip + t * kTileBytes + kAheadBytes / 2);
    UNROLL for (int c = 0; c < 4; ++c) {
      UNROLL for (int v = 0; v < kVecs; ++v) {
        const Vec s = load(scale + v * kLanes);
        float* to = out + (t * 16 + 2 * c) * stride + v * kLanes;
        store(to, mul(lookup(table, bits[c][v]), s));
        store(to + stride, mul(lookup(table, shift<4>(bits[c][v])), s));
        store(to + 8 * stride, mul(lookup(table, shift<16>(bits[c][v])), s));
        store(to + 9 * stride, mul(lookup(table, shift<20>(bits[c][v])), s));
      }
    }
  }
}

SIMD void unpack_rows(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                      int64_t stride, int64_t panel_stride) {
  const StripReader reader(w);
  const Table table = load_table(reader.table);
  const uint8_t* strip = reader.strip(strip_n, strip_k);
  alignas(64) float scale[16] = {};
  Bits row[kVecs];
  reader.rows(strip_n, row);
  for (int t = 0; t < 4; ++t) {
    if (t % reader.tiles_per_block == 0) reader.scales(row, strip_n, strip_k * 64 + t * 16, scale);
    fetch_tile(reader.strip(strip_n + 4, strip_k) + t * kTileBytes);
    float* tile = out + t * 16 / kPanel * panel_stride + t * 16 % kPanel;
    UNROLL for (int p = 0; p < 8; ++p) {
      Bits bits[kVecs];
      load_row_pair(strip + t * kTileBytes + kPairPlace[p] * 16, bits);
      UNROLL for (int v = 0; v < kVecs; ++v) {
        float* to = tile + 2 * p * stride + v * kLanes;
        store(to, mul(lookup(table, bits[v]), broadcast(scale + 2 * p)));
        store(to + stride, mul(lookup(table, shift<8>(bits[v])), broadcast(scale + 2 * p + 1)));
      }
    }
  }
}

// ---- int8: rows lie in memory as they are; a strip at the edge goes the plain way
SIMD_INLINE bool is_inner_int8(const WeightView& w, int64_t strip_n, int64_t strip_k) {
  return w.format == Format::kInt8 && strip_n * 16 + 16 <= w.N && strip_k * 64 + 64 <= w.K;
}

SIMD void int8_columns(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                       int64_t stride) {
  const int8_t* codes = static_cast<const int8_t*>(w.codes) + strip_n * 16 * w.K + strip_k * 64;
  const float* absmax = static_cast<const float*>(w.scales);
  const float one = 1.0f;
  const Vec step = broadcast(absmax ? &kInt8Step : &one);
  for (int v = 0; v < kVecs; ++v) {
    const Vec s = absmax ? load(absmax + strip_n * 16 + v * kLanes) : broadcast(&one);
    const int8_t* rows = codes + v * kLanes * w.K;
    const Bits row = ramp(int32_t(w.K));
    for (int64_t k = 0; k < 64; k += 4) {  // four columns of kLanes rows
      const Bits quad = gather_int(rows + k, row);
      float* to = out + k * stride + v * kLanes;
      store(to, mul(mul(to_vec(signed_byte<0>(quad)), s), step));
      store(to + stride, mul(mul(to_vec(signed_byte<1>(quad)), s), step));
      store(to + 2 * stride, mul(mul(to_vec(signed_byte<2>(quad)), s), step));
      store(to + 3 * stride, mul(mul(to_vec(signed_byte<3>(quad)), s), step));
    }
  }
}

SIMD void int8_rows(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                    int64_t stride, int64_t panel_stride) {
  const Vec step = broadcast(&kInt8Step);
  for (int64_t n = strip_n * 16; n < strip_n * 16 + 16; ++n, out += stride) {
    const int8_t* codes = static_cast<const int8_t*>(w.codes) + n * w.K + strip_k * 64;
    const Vec s = broadcast(static_cast<const float*>(w.scales) + n);
    UNROLL for (int k = 0; k < 64; k += kLanes) {
      store(out + k / kPanel * panel_stride + k % kPanel,
            mul(mul(to_vec(load_int8(codes + k)), s), step));
    }
  }
}

// ---- any format
SIMD void decode_columns(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                         int64_t stride) {
  if (has_column_scales(w)) return unpack_columns(w, strip_n, strip_k, out, stride);
  if (is_inner_int8(w, strip_n, strip_k)) return int8_columns(w, strip_n, strip_k, out, stride);
  float strip[16][64];
  decode_strip_plain(w, strip_n, strip_k, strip[0], 64);
  for (int k = 0; k < 64; ++k)
    for (int n = 0; n < 16; ++n) out[k * stride + n] = strip[n][k];
}

SIMD void decode_rows(const WeightView& w, int64_t strip_n, int64_t strip_k, float* out,
                      int64_t stride, int64_t panel_stride) {
  if (has_column_scales(w)) return unpack_rows(w, strip_n, strip_k, out, stride, panel_stride);
  if (is_inner_int8(w, strip_n, strip_k))
    return int8_rows(w, strip_n, strip_k, out, stride, panel_stride);
  float strip[16][64];
  decode_strip_plain(w, strip_n, strip_k, strip[0], 64);
  for (int n = 0; n < 16; ++n)
    for (int k = 0; k < 64; ++k)
      out[n * stride + k / kPanel * panel_stride + k % kPanel] = strip[n][k];
}

// ---- few tokens over strips decoded into L1: int8, and 4-bit blocks that straddle rows
template <int M>
SIMD void strips_fwd(const WeightView& w, int64_t strip_n, const float* x, int64_t x_stride,
                     float* y) {
  alignas(64) float strip[64][16];
  Vec total[M][kVecs];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kVecs; ++v) total[m][v] = zero();
  for (int64_t strip_k = 0; strip_k * 64 < w.K; ++strip_k) {
    decode_columns(w, strip_n, strip_k, strip[0], 16);
    Vec part[2][M][kVecs];
    UNROLL for (int m = 0; m < M; ++m) {
      UNROLL for (int v = 0; v < kVecs; ++v) part[0][m][v] = part[1][m][v] = zero();
    }
    for (int k = 0; k < 64; k += 2) {
      const float* xk = x + strip_k * 64 + k;
      UNROLL for (int v = 0; v < kVecs; ++v) {
        const Vec w0 = load(strip[k] + v * kLanes), w1 = load(strip[k + 1] + v * kLanes);
        UNROLL for (int m = 0; m < M; ++m) {
          part[0][m][v] = fma(w0, broadcast(xk + m * x_stride), part[0][m][v]);
          part[1][m][v] = fma(w1, broadcast(xk + m * x_stride + 1), part[1][m][v]);
        }
      }
    }
    UNROLL for (int m = 0; m < M; ++m) {
      UNROLL for (int v = 0; v < kVecs; ++v) total[m][v] =
          add(total[m][v], add(part[0][m][v], part[1][m][v]));
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kVecs; ++v) store(y + m * 16 + v * kLanes, total[m][v]);
}

template <int M>
SIMD void strips_dgrad(const WeightView& w, int64_t begin, int64_t end, const float* dy,
                       int64_t dy_stride, float* dx, int64_t dx_stride) {
  alignas(64) float strip[16][64];
  for (int m = 0; m < M; ++m)
    for (int64_t k = 0; k < (end - begin) * 64; k += kLanes) store(dx + m * dx_stride + k, zero());
  for (int64_t strip_n = 0; strip_n * 16 < w.N; ++strip_n) {
    for (int64_t strip_k = begin; strip_k < end; ++strip_k) {
      decode_rows(w, strip_n, strip_k, strip[0], 64, kPanel);
      for (int k = 0; k < 64; k += kLanes) {
        Vec sum[M];
        UNROLL for (int m = 0; m < M; ++m) sum[m] = zero();
        for (int n = 0; n < 16; ++n) {
          const Vec wk = load(strip[n] + k);
          UNROLL for (int m = 0; m < M; ++m) sum[m] =
              fma(wk, broadcast(dy + m * dy_stride + strip_n * 16 + n), sum[m]);
        }
        UNROLL for (int m = 0; m < M; ++m) {
          float* to = dx + m * dx_stride + (strip_k - begin) * 64 + k;
          store(to, add(load(to), sum[m]));
        }
      }
    }
  }
}

template <int M>
SIMD void few_fwd(const WeightView& w, int64_t strip_n, const float* x, int64_t x_stride,
                  float* y) {
  has_column_scales(w) ? packed_fwd<M>(w, strip_n, x, x_stride, y)
                       : strips_fwd<M>(w, strip_n, x, x_stride, y);
}

template <int M>
SIMD void few_dgrad(const WeightView& w, int64_t begin, int64_t end, const float* dy,
                    int64_t dy_stride, float* dx, int64_t dx_stride) {
  has_column_scales(w) ? packed_dgrad<M>(w, begin, end, dy, dy_stride, dx, dx_stride)
                       : strips_dgrad<M>(w, begin, end, dy, dy_stride, dx, dx_stride);
}

// ---- register tile of T tokens x 2 vectors
template <int T>
SIMD void register_tile(int64_t depth, const float* panel, const float* x, float* c,
                        int64_t c_stride, bool adds) {
  Vec sum[T][2];
  UNROLL for (int m = 0; m < T; ++m) {
    sum[m][0] = sum[m][1] = zero();
  }
  for (int64_t j = 0; j < depth; ++j, panel += kPanel, x += T) {
    const Vec w0 = load(panel), w1 = load(panel + kLanes);
    __builtin_prefetch(x + 32 * T);  // x comes from L2 or L3: 3 % at 4096 x 4096, M = 512
    UNROLL for (int m = 0; m < T; ++m) {
      const Vec xm = broadcast(x + m);
      sum[m][0] = fma(w0, xm, sum[m][0]);
      sum[m][1] = fma(w1, xm, sum[m][1]);
    }
  }
  UNROLL for (int m = 0; m < T; ++m) {
    UNROLL for (int v = 0; v < 2; ++v) {
      float* to = c + m * c_stride + v * kLanes;
      store(to, adds ? add(load(to), sum[m][v]) : sum[m][v]);
    }
  }
}

// ---- rows of 16-bit floats and of int8 activations
#include "simd_rows.h"

template <int... M>
constexpr SimdKernels make_kernels(std::integer_sequence<int, M...>) {
  SimdKernels k{};
  k.panel = kPanel;
  k.tile_tokens = kTileTokens;
  ((k.few_fwd[M + 1] = few_fwd<M + 1>), ...);
  ((k.few_dgrad[M + 1] = few_dgrad<M + 1>), ...);
  k.decode_columns = decode_columns;
  k.decode_rows = decode_rows;
  k.widen = widen;
  k.narrow = narrow;
  k.row_absmax = row_absmax;
  k.row_to_int8 = row_to_int8;
  k.scale_sums = scale_sums;
  k.add_scaled = add_scaled;
  return k;
}

template <int... T>
constexpr void add_tiles(SimdKernels& k, std::integer_sequence<int, T...>) {
  ((k.tile[T + 1] = register_tile<T + 1>), ...);
}
