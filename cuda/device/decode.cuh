// Reading 4-bit and int8 weights: codebooks, absmax of a block, one tile row at a time.
// Layouts and rounding: csrc/core/formats.h.
#pragma once
#include "../../csrc/core/check.h"
#include "../../csrc/core/params.h"
#include "copy.cuh"
#include "numbers.cuh"

namespace fastpeft::cuda {

// Passed by value: constant memory of the launch, no device symbol to fill.
struct Codebook {
  float v[16];
};

inline Codebook codebook(Format f, float gain = 1.0f) {
  Codebook book;
  for (int i = 0; i < 16; ++i) book.v[i] = gain * (f == Format::kFp4 ? kFp4Code[i] : kNf4Code[i]);
  return book;
}

// A 4-bit weight as kernels see it. blocksize is a power of two, so that blocks are found by
// shifts.
struct PackedWeight {
  const uint8_t* codes;  // [Np/16][strips_k][512]
  const void* scales;    // float32, or uint8 when nested is set
  const float* nested;   // [1 + 256 + ceil(B/256)] or null
  int64_t N, K, Np;
  int strips_n, strips_k;
  int block_shift;  // log2(blocksize)
  bool by_column;   // scales [K/blocksize][Np], else flat
};

inline int log2_exact(int64_t v) {
  int shift = 0;
  while ((int64_t(1) << shift) < v) ++shift;
  FASTPEFT_CHECK((int64_t(1) << shift) == v, "blocksize ", v, ": a power of two is needed");
  return shift;
}

inline PackedWeight packed_weight(const WeightView& w) {
  FASTPEFT_CHECK(is_4bit(w.format), format_name(w.format), ": not a 4-bit format");
  FASTPEFT_CHECK(w.blocksize >= kMinBlocksize && w.blocksize <= kMaxBlocksize, "blocksize ",
                 w.blocksize, ": ", kMinBlocksize, " to ", kMaxBlocksize, " are supported");
  PackedWeight p;
  p.codes = static_cast<const uint8_t*>(w.codes);
  p.scales = w.scales;
  p.nested = w.nested;
  p.N = w.N;
  p.K = w.K;
  p.Np = round_up<int64_t>(w.N, kTileN);
  p.strips_n = int(p.Np / kTileN);
  p.strips_k = int(ceil_div<int64_t>(w.K, kTileK));
  p.block_shift = log2_exact(w.blocksize);
  p.by_column = scales_by_column(w.K, w.blocksize);
  return p;
}

struct BlockPlace {
  int64_t flat;   // index in row-major order: groups of the second level
  int64_t place;  // index into scales
};

__device__ __forceinline__ BlockPlace block_place(const PackedWeight& w, int64_t n, int64_t k) {
  const int64_t flat = (n * w.K + k) >> w.block_shift;
  return {flat, w.by_column ? (k >> w.block_shift) * w.Np + n : flat};
}

// Two separately rounded operations, as the formats demand.
__device__ __forceinline__ float decode_absmax(float map_value, float nested_absmax, float offset) {
  return __fadd_rn(__fmul_rn(map_value, nested_absmax), offset);
}

// absmax of the block that holds element (n, k), n < N, k < K.
__device__ __forceinline__ float block_absmax(const PackedWeight& w, int64_t n, int64_t k) {
  const BlockPlace at = block_place(w, n, k);
  if (!w.nested) return __ldg(static_cast<const float*>(w.scales) + at.place);
  const int q = __ldg(static_cast<const uint8_t*>(w.scales) + at.place);
  return decode_absmax(__ldg(w.nested + 1 + q), __ldg(w.nested + 257 + (at.flat >> 8)),
                       __ldg(w.nested));
}

// absmax of one block, in two steps: the loads early, the decoding when the map has arrived.
template <bool kNested>
struct RawScale {
  float value = 0.0f;  // float32 scale, or nested absmax
  int code = 0;

  // Zero outside [N, K]: padding rows have no block.
  __device__ __forceinline__ void load(const PackedWeight& w, int64_t n, int64_t k) {
    value = 0.0f;
    code = -1;
    if (n >= w.N || k >= w.K) return;
    const BlockPlace at = block_place(w, n, k);
    if constexpr (kNested) {
      code = __ldg(static_cast<const uint8_t*>(w.scales) + at.place);
      value = __ldg(w.nested + 257 + (at.flat >> 8));
    } else {
      value = __ldg(static_cast<const float*>(w.scales) + at.place);
    }
  }
  __device__ __forceinline__ float decode(const float* map, float offset) const {
    if (!kNested) return value;
    return code < 0 ? 0.0f : decode_absmax(map[code], value, offset);
  }
};

// Rows n and n + 1 at column k.
template <bool kNested>
struct RawScales {
  RawScale<kNested> row[2];

  __device__ __forceinline__ void load(const PackedWeight& w, int64_t n, int64_t k) {
    row[0].load(w, n, k);
    row[1].load(w, n + 1, k);
  }
  __device__ __forceinline__ float decode(int r, const float* map, float offset) const {
    return row[r].decode(map, offset);
  }
};

// Stored row (column) -> pair of n (k) of a tile: kPairOrder without a table.
__device__ __forceinline__ int pair_order(int place) {
  return (place >> 1) + 4 * (place & 1);
}
// Pair -> stored row (column): kPairPlace.
__device__ __forceinline__ int pair_place(int pair) {
  return pair < 4 ? 2 * pair : 2 * pair - 7;
}

// Codebook in shared memory, a copy a lane: entry e of lane l at e * 32 + l, so that 32 lanes with
// 32 different codes never meet in a bank.
__device__ __forceinline__ void fill_codebook(float* table, const Codebook& book) {
  for (int i = threadIdx.x; i < 16 * 32; i += blockDim.x) table[i] = book.v[i / 32];
}

// Value of the nibble at bit `shift` of word; lane_table = table + lane.
template <int kShift>
__device__ __forceinline__ float lookup(const float* lane_table, uint32_t word) {
  const uint32_t offset = (kShift >= 7 ? word >> (kShift >= 7 ? kShift - 7 : 0)
                                       : word << (kShift < 7 ? 7 - kShift : 0)) &
                          0x780u;
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(lane_table) + offset);
}

// One tile row of a quantised weight: rows 2P and 2P+1 (P a pair of rows), columns k0 .. k0+15, as
// exact float32 weights, zero outside [N, K]. The brick of the general kernels: any K, any
// blocksize.
struct RowPair {
  float w[2][16];
};

__device__ __forceinline__ RowPair load_row_pair(const PackedWeight& w, const float* lane_table,
                                                 int64_t pair, int64_t tile) {
  const int64_t k0 = tile * 16, n0 = 2 * pair;
  const int64_t strip = (pair / 8) * w.strips_k + tile / 4;
  const uint4 q = __ldg(reinterpret_cast<const uint4*>(
      w.codes + strip * kStripBytes + (tile % 4) * kTileBytes + pair_place(int(pair % 8)) * 16));
  const uint32_t words[4] = {q.x, q.y, q.z, q.w};  // word i: units of pairs i and i + 4
  const bool one_block = w.by_column || w.K % 16 == 0;
  float absmax[2] = {0.0f, 0.0f};
  if (one_block) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (n0 + r < w.N && k0 < w.K) absmax[r] = block_absmax(w, n0 + r, k0);
  }
  RowPair out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.w[0][2 * i] = lookup<0>(lane_table, words[i]);
    out.w[0][2 * i + 1] = lookup<4>(lane_table, words[i]);
    out.w[1][2 * i] = lookup<8>(lane_table, words[i]);
    out.w[1][2 * i + 1] = lookup<12>(lane_table, words[i]);
    out.w[0][2 * i + 8] = lookup<16>(lane_table, words[i]);
    out.w[0][2 * i + 9] = lookup<20>(lane_table, words[i]);
    out.w[1][2 * i + 8] = lookup<24>(lane_table, words[i]);
    out.w[1][2 * i + 9] = lookup<28>(lane_table, words[i]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float scale = absmax[r];
      if (!one_block) scale = n0 + r < w.N && k0 + i < w.K ? block_absmax(w, n0 + r, k0 + i) : 0.0f;
      out.w[r][i] = __fmul_rn(out.w[r][i], scale);
    }
  return out;
}

// The same for int8 [N, K] row-major.
struct Int8Weight {
  const int8_t* codes;  // [N, K]
  const float* absmax;  // [N]
  int64_t N, K;
  bool is_aligned;  // 16-byte loads of codes are possible: K % 16 == 0
};

__device__ __forceinline__ RowPair load_row_pair(const Int8Weight& w, const float*, int64_t pair,
                                                 int64_t tile) {
  RowPair out;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t n = 2 * pair + r, k0 = tile * 16;
    const bool is_row = n < w.N;
    const float absmax = is_row ? __ldg(w.absmax + n) : 0.0f;
    const int8_t* row = w.codes + n * w.K + k0;
    Vec<int8_t, 16> q = {};
    if (is_row && w.is_aligned) {
      q = load_vec<int8_t, 16>(row);
    } else if (is_row) {
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if (k0 + i < w.K) q.v[i] = row[i];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i)
      out.w[r][i] = __fmul_rn(__fmul_rn(float(q.v[i]), absmax), kInt8Step);
  }
  return out;
}

}  // namespace fastpeft::cuda
