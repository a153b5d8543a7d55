// The parts of the forward kernel for few tokens (qlinear_skinny_fwd.cu tells the whole): a warp's
// way through its items, its ring of codes, the token fragments, the sums.
#pragma once
#include <climits>

#include "qlinear_skinny.cuh"

namespace fastpeft::cuda::skinny {

constexpr int kStrips = 4, kItemBytes = kStrips * kStripBytes;
// Shared memory: lookup table | map | nested absmax of the block's rows | ring | sums. Sums of the
// first warps lie in the holes of the table, 512 bytes (a float4 a lane) in four holes.
constexpr int kNestedFloats = 512, kNestedAt = kTableBytes + kMapBytes,
              kItemsAt = kNestedAt + 4 * kNestedFloats;
constexpr int kSumBytes = 512, kSumHoleStride = 1024;
constexpr int kHoles = 64, kScaleHoles = 8;  // the last 8: decoded absmax, 256 bytes a warp

constexpr int items_end(int depth) {
  return kItemsAt + kWarps * depth * kItemBytes;
}

struct FwdArgs {
  const uint8_t* codes;  // [strips_n][strips_k][512]
  const void* scales;    // uint8 (nested) or float32 [K / blocksize][Np]
  const float* nested;   // [257 + ceil(B / 256)] or null
  int strips_k, groups;  // of 64 and of 256 columns
  int base, rest;        // row strips a block; the first `rest` blocks have one more
  int chunk;             // row strips whose sums fit into shared memory
  uint32_t divide[3];  // 2^31 / rows, up, of a full chunk and of a block's last: short, long block
  int block_shift, blocks_a_row, Np, N, K, M;
  const void* x;       // [M, K]
  uint32_t book[8];    // 16 codes times gain, 16 bits each
  float inverse_gain;  // 1 / gain
  int parts;           // of the sums: one a group if they are at most 16, else one a warp
  int hole_parts;      // parts in the table's holes
  bool by_group;
  bool has_start;  // one more part: bias and LoRA
  bool is_dependent;
  bool ranks_by_4;  // s and lora_b can be read four ranks at once
  int R;
  float scaling;
  const void* bias;    // [N] or null
  const void* s;       // [M, R] or null
  const void* lora_b;  // [N, R] or null
  void* y;             // [M, N]
};

__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// A warp's way through its items: runs of row strips in one group of columns, chunk after chunk.
struct Walk {
  int base, rows;  // the chunk: first row strip, row strips
  int group, row;  // of the run's first item
  int run;         // items of the run
  int left;        // items of the chunk after the run

  __device__ __forceinline__ void start(const FwdArgs& a, int first_strip, int strip_end,
                                        int warp) {
    base = first_strip;
    rows = min(a.chunk, strip_end - base);
    const uint32_t items = rows * a.groups;
    const int first = items * warp / kWarps, count = items * (warp + 1) / kWarps - first;
    const bool is_long = int(blockIdx.x) < a.rest;
    const uint32_t divide = a.divide[rows == a.chunk ? 0 : is_long ? 2 : 1];
    group = int(uint64_t(uint32_t(first)) * divide >> 31);
    row = first - group * rows;
    run = min(count, rows - row);
    left = count - run;
  }
  __device__ __forceinline__ bool next() {
    if (left == 0) return false;
    ++group;
    row = 0;
    run = min(left, rows);
    left -= run;
    return true;
  }
};

// Brings the codes of the warp's items into its ring, every lane 16 bytes of a strip.
struct Feeder {
  Walk walk;
  uint32_t to;          // this lane's place in the next slot
  const uint8_t* from;  // this lane's first bytes of the next item
  int valid;            // strips of the item that lie inside K

  __device__ __forceinline__ void aim(const FwdArgs& a, int lane) {
    valid = a.strips_k - walk.group * kStrips;
    from = a.codes +
           (int64_t(walk.base + walk.row) * a.strips_k + walk.group * kStrips) * kStripBytes +
           lane * 16;
  }
  __device__ __forceinline__ void next_run(const FwdArgs& a, int strip_end, int warp, int lane) {
    if (!walk.next()) {
      do {
        const int next = walk.base + walk.rows;
        if (next >= strip_end) {  // nothing left: empty copies from here on
          walk.run = INT_MAX;
          valid = 0;
          return;
        }
        walk.start(a, next, strip_end, warp);
      } while (walk.run == 0);
    }
    aim(a, lane);
  }
  __device__ __forceinline__ void issue(const FwdArgs& a, int strip_end, int warp, int lane) {
    if (walk.run == 0) next_run(a, strip_end, warp, lane);
    --walk.run;
#pragma unroll
    for (int j = 0; j < kStrips; ++j)
      copy_async16(to + j * kStripBytes, from + j * kStripBytes, valid > j ? 16 : 0);
    commit_copies();
    from += int64_t(a.strips_k) * kStripBytes;
  }
};

// x of the tokens of a launch's row of blocks, 256 columns, in four parts.
template <class T, int kTokens>
struct TokenFragment {
  static constexpr int kTiles = kTokens == 16 ? 2 : 1;
  uint4 low[kTiles][4], high[kTiles][4];

  // B fragment of step i of part j: words 2 (i % 2) and the next of columns 0..7 or 8..15. It is a
  // pair of neighbouring registers, as the mma wants it.
  __device__ __forceinline__ uint32_t word(int tile, int j, int step, int e) const {
    return word_of(step < 2 ? low[tile][j] : high[tile][j], step % 2 * 2 + e);
  }
  __device__ __forceinline__ void load(const FwdArgs& a, int m0, int g, int t, int group) {
    const int strip = group * kStrips;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int m = m0 + 8 * i + g;
      const char* row =
          static_cast<const char*>(a.x) + (int64_t(m) * a.K + strip * kTileK) * sizeof(T);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4* at = reinterpret_cast<const uint4*>(row + j * kTileK * sizeof(T) + t * 32);
        low[i][j] = high[i][j] = make_uint4(0, 0, 0, 0);
        if (m < a.M && strip + j < a.strips_k) {
          low[i][j] = at[0];
          high[i][j] = at[1];
        }
      }
    }
  }
};

// The float at byte `at` of a region, `at` rounded down to four.
__device__ __forceinline__ float shared_float(const unsigned char* shared, int region, int at) {
  return *reinterpret_cast<const float*>(shared + region + (at & ~3));
}

// A fragment of step i of a part: bytes 0, 1 (i < 2) or 2, 3 of two words.
__device__ __forceinline__ void lookup_step(const unsigned char* shared, const uint4& q, int step,
                                            uint32_t lane4, uint32_t (&f)[4]) {
  const uint32_t first = step % 2 ? q.z : q.x, second = step % 2 ? q.w : q.y;
  f[0] = step < 2 ? lookup_pair<0>(shared, first, lane4) : lookup_pair<2>(shared, first, lane4);
  f[1] = step < 2 ? lookup_pair<1>(shared, first, lane4) : lookup_pair<3>(shared, first, lane4);
  f[2] = step < 2 ? lookup_pair<0>(shared, second, lane4) : lookup_pair<2>(shared, second, lane4);
  f[3] = step < 2 ? lookup_pair<1>(shared, second, lane4) : lookup_pair<3>(shared, second, lane4);
}

// Where the float4 of this lane lies: part (a group's or a warp's, or bias and LoRA), row strip,
// token tile. The first hole_parts parts lie in the table's holes.
template <int kTiles>
struct SumPlace {
  uint32_t at, unit_stride;  // unit: row strip * kTiles + tile

  __device__ __forceinline__ void find(const FwdArgs& a, int sums_at, int part, int lane) {
    const bool is_hole = part < a.hole_parts;
    unit_stride = is_hole ? kSumHoleStride : kSumBytes;
    at = (is_hole ? kEntryStride / 2 + lane / 8 * kEntryStride + lane % 8 * 16
                  : sums_at + lane * 16) +
         (is_hole ? part : part - a.hole_parts) * part_stride(a);
  }
  __device__ __forceinline__ uint32_t part_stride(const FwdArgs& a) const {
    return a.chunk * kTiles * unit_stride;
  }
};

// Ranks r .. r + 3 of a row of [rows, R]; zeros outside.
template <class T>
__device__ __forceinline__ uint2 load_ranks(const FwdArgs& a, const void* p, int64_t row,
                                            bool is_row, int r) {
  uint2 v = make_uint2(0, 0);
  if (!is_row || r >= a.R) return v;
  const T* at = static_cast<const T*>(p) + row * a.R + r;
  if (a.ranks_by_4) return *reinterpret_cast<const uint2*>(at);
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(at);
  v.x = bits[0];
  if (r + 1 < a.R) v.x |= uint32_t(bits[1]) << 16;
  if (r + 2 < a.R) v.y = bits[2];
  if (r + 3 < a.R) v.y |= uint32_t(bits[3]) << 16;
  return v;
}

// Into L2: what start_sums will read of one row strip.
template <class T>
__device__ __forceinline__ void prefetch_start(const FwdArgs& a, int strip, int lane) {
  const int n = strip * kTileN, bytes = min(kTileN, a.N - n) * a.R * int(sizeof(T));
  if (a.bias && lane == 0) prefetch(static_cast<const T*>(a.bias) + n);
  if (!a.s) return;
#pragma unroll 1
  for (int i = lane * 32; i < bytes; i += 1024)
    prefetch(reinterpret_cast<const char*>(static_cast<const T*>(a.lora_b) + int64_t(n) * a.R) + i);
}

// bias + scaling * s B^T of one row strip, in the layout of the warps' sums.
template <class T, int kTokens, int kTiles>
__device__ __forceinline__ void start_sums(const FwdArgs& a, int strip, int m0, int g, int t,
                                           float (&acc)[kTiles][4]) {
  const int64_t n = int64_t(strip) * kTileN + 2 * pair_order(g);
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[i][e] = 0.0f;
  if (a.s) {
    for (int r = 4 * t; r - 4 * t < a.R; r += 16) {
      const uint2 b0 = load_ranks<T>(a, a.lora_b, n, n < a.N, r);
      const uint2 b1 = load_ranks<T>(a, a.lora_b, n + 1, n + 1 < a.N, r);
      const uint32_t f[4] = {b0.x, b1.x, b0.y, b1.y};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int m = m0 + 8 * i + g;
        const uint2 v = load_ranks<T>(a, a.s, m, m < a.M && g < kTokens, r);
        mma_16x8x16<T>(acc[i], f, v.x, v.y);
      }
    }
  }
  const T* bias = static_cast<const T*>(a.bias);
  float value[2] = {0.0f, 0.0f};
  if (bias) {
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (n + e < a.N) value[e] = to_acc(bias[n + e]);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[i][e] = a.scaling * acc[i][e] + value[e / 2];
}

// The outputs of one row strip and token tile.
template <class T, int kTokens>
__device__ __forceinline__ void write_sums(const FwdArgs& a, int strip, int tile, int m0, int g,
                                           int t, float4 sum) {
  const int64_t n = int64_t(strip) * kTileN + 2 * pair_order(g);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int64_t m = m0 + 8 * tile + 2 * t + e;
    if (m >= a.M) continue;
    T* y = static_cast<T*>(a.y) + m * a.N + n;
    if (n < a.N) y[0] = from_acc<T>(e ? sum.y : sum.x);
    if (n + 1 < a.N) y[1] = from_acc<T>(e ? sum.w : sum.z);
  }
}

// Adds the parts of a chunk in order and writes y.
template <class T, int kTokens, int kTiles>
__device__ __forceinline__ void finish_sums(const FwdArgs& a, const unsigned char* shared,
                                            int sums_at, int base, int rows, int m0, int warp,
                                            int lane, int g, int t) {
  const int parts = a.parts + a.has_start;
  for (int unit = warp; unit < rows * kTiles; unit += kWarps) {
    float4 sum = {};
    const auto add = [&](int part, int count) {
      SumPlace<kTiles> place;
      place.find(a, sums_at, part, lane);
      const unsigned char* at = shared + place.at + unit * place.unit_stride;
#pragma unroll 8
      for (int i = 0; i < count; ++i, at += place.part_stride(a)) {
        const float4 v = *reinterpret_cast<const float4*>(at);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
    };
    add(0, a.hole_parts);
    add(a.hole_parts, parts - a.hole_parts);
    write_sums<T, kTokens>(a, base + unit / kTiles, unit % kTiles, m0, g, t, sum);
  }
}

}  // namespace fastpeft::cuda::skinny
