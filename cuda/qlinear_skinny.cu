// 4-bit linear layer for few tokens, decode inside, forward and input gradient (sm_80 and newer).
//
//   forward  y [M, N]  = x W^T + bias + scaling * s B^T       x [M, K], s [M, R], B [N, R]
//   dgrad    dx [M, K] = dy W + ds A                          dy [M, N], ds [M, R], A [R, K]
//   W [N, K] tiled 4-bit codes, one absmax a block of >= 64 (forward) or >= 32 (dgrad) columns
//
// y^T = W x^T on mma.m16n8k16: weights are the 16-row operand, 8 (kTok = 1) or 16 tokens the columns.
//
// Forward. One lane's 16 stored bytes are the A fragments of a whole strip (16 rows x 64 columns),
// because the order of the reduction is free: lane (g, t) reads row g of tile t; its word i holds
// the pairs i and i+4 of columns of tile t, and is taken as the fragment of step i. The matching B
// fragment of step i is words i of x[token g][16t .. 16t+7] and [16t+8 .. 16t+15]: two plain 16-byte
// loads a strip, no shared memory. Codes stay unscaled in the mma; absmax * the strip's sum is added
// in float32.
//
//     CTA: rows [16 s0, 16 s1), all of K         k strips:  | warp 0 | warp 1 | ... | warp 15 |
//     a warp: for its k strips: x fragment once, then up to 4 row strips
//     then the 16 partial sums of every output are added in order of warps: no atomics, same bits
//
// dgrad. The same bytes through ldmatrix.trans: rows k, reduction n. absmax varies along n, so it is
// folded into dy (4 products a lane and 8 x 16 weights), which is rounded to 16 bits once more; in
// float16 the fold is normalised by a power of two an item, or small absmax would underflow.
//
//     CTA: 32 columns (half a strip) a time, all of N;  warps share N;  item = 2 row strips x 32
//
// Lookup: byte -> pair of 16-bit values in shared memory, a copy a lane, entry e at e * 256 + 4 lane,
// so that the address is one byte permute and banks never collide. The 128-byte holes between
// entries hold the partial sums. bf16 codes are stored times 1.43675: that halves the rounding error
// of the codebook, and absmax carries the inverse.
// Weights arrive by cp.async through a ring a warp owns (no block barrier), kDepth strips deep.
//
// Bound: reading the codes once: 0.516 bytes a weight. Lookups cost 16 LDS + 16 PRMT per 1024
// weights a warp: at most 64 weights a clock and SM against 34 that memory delivers.
#include "check.cuh"
#include "device/decode.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "launch.h"
#include "qlinear_skinny.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kEntryStride = 256, kTableBytes = 256 * kEntryStride;
constexpr int kMapBytes = 1024, kRingAt = kTableBytes + kMapBytes;
constexpr int kUnit = 32;  // dgrad: columns a CTA finishes at a time
constexpr float kBf16Gain = 1.43675f;

constexpr int shared_bytes(int depth) { return kRingAt + kWarps * depth * kStripBytes; }

struct SkinnyArgs {
  PackedWeight w;
  Codebook book;       // times gain
  float inverse_gain;  // 1 / gain
  int64_t M, R;
  const void* in;      // forward: x [M, K]; dgrad: dy [M, N]
  const void* bias;    // forward: [N] or null
  const void* s;       // forward: [M, R]; dgrad: ds [M, R]; or null
  const void* factor;  // forward: lora_b [N, R]; dgrad: lora_a [R, K]; or null
  float scaling;
  void* out;  // forward: y [M, N]; dgrad: dx [M, K]
  bool in_is_aligned;
};

// Two threads an entry, 64 bytes each; pieces rotated by lane so that the stores spread over banks.
template <class T>
__device__ __forceinline__ void fill_pairs(unsigned char* shared, const Codebook& book) {
  const int entry = threadIdx.x / 2;
  const uint32_t pair = pack_pair<T>(book.v[entry & 15], book.v[entry >> 4]);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int piece = (q + entry) & 3;
    *reinterpret_cast<uint4*>(shared + entry * kEntryStride + (threadIdx.x & 1) * 64 + piece * 16) =
        make_uint4(pair, pair, pair, pair);
  }
}

template <int kByte>
__device__ __forceinline__ uint32_t lookup_pair(const unsigned char* shared, uint32_t word, uint32_t lane4) {
  return *reinterpret_cast<const uint32_t*>(shared + __byte_perm(word, lane4, 0x7604 | (kByte << 4)));
}

__device__ __forceinline__ void lookup_fragment(const unsigned char* shared, uint32_t word, uint32_t lane4,
                                                uint32_t (&a)[4]) {
  a[0] = lookup_pair<0>(shared, word, lane4);
  a[1] = lookup_pair<1>(shared, word, lane4);
  a[2] = lookup_pair<2>(shared, word, lane4);
  a[3] = lookup_pair<3>(shared, word, lane4);
}

// Float f of the partial sums, kept in the holes of the table.
__device__ __forceinline__ float* partial(unsigned char* shared, int f) {
  return reinterpret_cast<float*>(shared + (f / 32) * kEntryStride + 128 + (f % 32) * 4);
}

__device__ __forceinline__ int share(int part, int parts, int64_t total) {
  return int(total * part / parts);
}

// ---- forward

template <int kTok>
struct TokenFragment {  // x of 8 * kTok tokens, 64 columns
  uint4 low[kTok], high[kTok];

  template <class T>
  __device__ __forceinline__ void load(const SkinnyArgs& a, int m0, int g, int t, int ks) {
#pragma unroll
    for (int i = 0; i < kTok; ++i) {
      const int m = m0 + 8 * i + g;
      low[i] = high[i] = make_uint4(0, 0, 0, 0);
      if (m < a.M) {
        const uint4* at = reinterpret_cast<const uint4*>(static_cast<const T*>(a.in) + m * a.w.K +
                                                         ks * kTileK + t * 16);
        low[i] = __ldg(at);
        high[i] = __ldg(at + 1);
      }
    }
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Which strip the ring loads next: row chunks, then k strips, then rows of the chunk.
struct StripCursor {
  int base, row, ks;

  template <int kRows>
  __device__ __forceinline__ void advance(int k_begin, int k_end, int s_end) {
    if (++row < min(kRows, s_end - base)) return;
    row = 0;
    if (++ks < k_end) return;
    ks = k_begin;
    base += kRows;
  }
};

// bias and scaling * s B^T as the first partial sums: warp w adds ranks w, w + 16, ...
template <class T, int kTok>
__device__ __forceinline__ void start_forward(const SkinnyArgs& a, int64_t n0, int m0, int t, int warp,
                                              float (&acc)[kTok][4]) {
  const T* bias = static_cast<const T*>(a.bias);
  const T* s = static_cast<const T*>(a.s);
  const T* lora_b = static_cast<const T*>(a.factor);
  const bool is_row[2] = {n0 < a.w.N, n0 + 1 < a.w.N};
#pragma unroll
  for (int i = 0; i < kTok; ++i)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      acc[i][c] = bias && warp == 0 && is_row[c / 2] ? to_acc(bias[n0 + c / 2]) : 0.0f;
  if (!s) return;
  for (int64_t r = warp; r < a.R; r += kWarps) {
    float b[2];
#pragma unroll
    for (int row = 0; row < 2; ++row)
      b[row] = is_row[row] ? a.scaling * to_acc(lora_b[(n0 + row) * a.R + r]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kTok; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t m = m0 + 8 * i + 2 * t + j;
        const float value = m < a.M ? to_acc(s[m * a.R + r]) : 0.0f;
        acc[i][j] += value * b[0];
        acc[i][2 + j] += value * b[1];
      }
  }
}

template <class T, int kTok, int kDepth, bool kNested>
__global__ void __launch_bounds__(kThreads, 1) qlinear_fwd_skinny_kernel(SkinnyArgs a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int kRows = 4 / kTok, kTokens = 8 * kTok;
  const PackedWeight& w = a.w;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const uint32_t lane4 = lane * 4;
  const int s_begin = share(blockIdx.x, gridDim.x, w.strips_n);
  const int s_end = share(blockIdx.x + 1, gridDim.x, w.strips_n);
  const int k_begin = share(warp, kWarps, w.strips_k), k_end = share(warp + 1, kWarps, w.strips_k);
  const int m0 = blockIdx.y * kTokens;
  const int row_pair = 2 * pair_order(g);

  // Ring: chunk (tile T, row r) of a strip at T * 128 + (r ^ 2T) * 16, so that reading row g of
  // tile t is free of conflicts.
  const uint32_t ring = shared_address(shared) + kRingAt + warp * kDepth * kStripBytes;
  const uint32_t write_at = ring + (lane / 8) * kTileBytes + ((lane % 8) ^ (2 * (lane / 8))) * 16;
  const uint32_t read_at = ring + t * kTileBytes + (g ^ (2 * t)) * 16;
  StripCursor next{k_begin < k_end ? s_begin : s_end, 0, k_begin};
  int write_slot = 0, read_slot = 0;
  const auto issue = [&] {
    if (next.base < s_end) {
      const int64_t strip = int64_t(next.base + next.row) * w.strips_k + next.ks;
      copy_async16(write_at + write_slot * kStripBytes, w.codes + strip * kStripBytes + lane * 16, 16);
      next.advance<kRows>(k_begin, k_end, s_end);
    }
    commit_copies();
    write_slot = (write_slot + 1) % kDepth;
  };
#pragma unroll
  for (int i = 0; i < kDepth; ++i) issue();

  TokenFragment<kTok> x;
  RawScales<kNested> raw;
  if (k_begin < k_end) {
    x.template load<T>(a, m0, g, t, k_begin);
    raw.load(w, int64_t(s_begin + t) * kTileN + row_pair, int64_t(k_begin) * kTileK);
  }
  fill_pairs<T>(shared, a.book);
  float* map = reinterpret_cast<float*>(shared + kTableBytes);
  float offset = 0.0f;
  if constexpr (kNested) {
    if (threadIdx.x < 256) map[threadIdx.x] = __ldg(w.nested + 1 + threadIdx.x);
    offset = __ldg(w.nested);
  }
  float acc[kRows][kTok][4];
  const auto start = [&](int base) {
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      start_forward<T, kTok>(a, int64_t(base + row) * kTileN + row_pair, m0, t, warp, acc[row]);
  };
  start(s_begin);
  __syncthreads();

  for (int base = s_begin; base < s_end; base += kRows) {
    const int rows = min(kRows, s_end - base);
    for (int ks = k_begin; ks < k_end; ++ks) {
      const TokenFragment<kTok> now = x;
      float absmax[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) absmax[r] = raw.decode(r, map, offset) * a.inverse_gain;
      // the next strip's x and scales, behind this strip's work
      const bool is_last = ks + 1 == k_end;
      const int next_ks = is_last ? k_begin : ks + 1, next_base = is_last ? base + kRows : base;
      if (next_base < s_end) {
        x.template load<T>(a, m0, g, t, next_ks);
        raw.load(w, int64_t(next_base + t) * kTileN + row_pair, int64_t(next_ks) * kTileK);
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= rows) break;
        wait_copies<kDepth - 1>();
        __syncwarp();
        const uint4 q = load_shared16(read_at + read_slot * kStripBytes);
        read_slot = (read_slot + 1) % kDepth;
        __syncwarp();
        issue();
        const float scale0 = __shfl_sync(kAllLanes, absmax[0], (lane & ~3) | row);
        const float scale1 = __shfl_sync(kAllLanes, absmax[1], (lane & ~3) | row);
        float c[kTok][2][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t f[4];
          lookup_fragment(shared, word_of(q, i), lane4, f);
#pragma unroll
          for (int j = 0; j < kTok; ++j)
            mma_16x8x16<T>(c[j][i % 2], f, word_of(now.low[j], i), word_of(now.high[j], i));
        }
#pragma unroll
        for (int j = 0; j < kTok; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            acc[row][j][e] += (e < 2 ? scale0 : scale1) * (c[j][0][e] + c[j][1][e]);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int j = 0; j < kTok; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int f = ((row * kWarps + warp) * kTokens + 8 * j + 2 * t + e) * 16 + row_pair;
          *reinterpret_cast<float2*>(partial(shared, f)) = make_float2(acc[row][j][e], acc[row][j][2 + e]);
        }
    __syncthreads();
    {  // one output a thread
      const int n16 = threadIdx.x % 16, row = threadIdx.x / 16 % kRows, token = threadIdx.x / (16 * kRows);
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < kWarps; ++part)
        sum += *partial(shared, ((row * kWarps + part) * kTokens + token) * 16 + n16);
      const int64_t n = int64_t(base + row) * kTileN + n16, m = m0 + token;
      if (row < rows && n < w.N && m < a.M) static_cast<T*>(a.out)[m * w.N + n] = from_acc<T>(sum);
    }
    if (base + kRows < s_end) {
      start(base + kRows);
      __syncthreads();
    }
  }
}

// ---- input gradient

// dy of 8 * kTok tokens, 32 rows of W from n: lane (g, t) holds rows n + 8t .. n + 8t + 7 of token g.
template <int kTok>
struct GradFragment {
  uint4 v[kTok];

  template <class T>
  __device__ __forceinline__ void load(const SkinnyArgs& a, int m0, int g, int64_t n) {
#pragma unroll
    for (int i = 0; i < kTok; ++i) {
      const int64_t m = m0 + 8 * i + g;
      v[i] = make_uint4(0, 0, 0, 0);
      if (m >= a.M || n >= a.w.N) continue;
      const T* at = static_cast<const T*>(a.in) + m * a.w.N + n;
      if (a.in_is_aligned) {
        v[i] = __ldg(reinterpret_cast<const uint4*>(at));
      } else {
        Vec<T, 8> piece = {};
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (n + e < a.w.N) piece.v[e] = at[e];
        memcpy(&v[i], &piece, 16);
      }
    }
  }
};

// Swaps nibbles 1 and 2 of both units: (n0,k0)(n0,k1)(n1,k0)(n1,k1) -> pairs of n for k0 and for k1.
__device__ __forceinline__ uint32_t transpose_units(uint32_t w) {
  const uint32_t differ = (w ^ (w >> 4)) & 0x00F000F0u;
  return w ^ differ ^ (differ << 4);
}

template <class T, int kTok>
__device__ __forceinline__ void start_dgrad(const SkinnyArgs& a, int64_t k0, int m0, int t, int warp,
                                            float (&acc)[kTok][4]) {
#pragma unroll
  for (int i = 0; i < kTok; ++i)
#pragma unroll
    for (int c = 0; c < 4; ++c) acc[i][c] = 0.0f;
  const T* ds = static_cast<const T*>(a.s);
  const T* lora_a = static_cast<const T*>(a.factor);
  if (!ds) return;
  for (int64_t r = warp; r < a.R; r += kWarps) {
    const float f[2] = {to_acc(lora_a[r * a.w.K + k0]), to_acc(lora_a[r * a.w.K + k0 + 1])};
#pragma unroll
    for (int i = 0; i < kTok; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t m = m0 + 8 * i + 2 * t + j;
        const float value = m < a.M ? to_acc(ds[m * a.R + r]) : 0.0f;
        acc[i][j] += value * f[0];
        acc[i][2 + j] += value * f[1];
      }
  }
}

template <class T, int kTok, int kDepth, bool kNested>
__global__ void __launch_bounds__(kThreads, 1) qlinear_dgrad_skinny_kernel(SkinnyArgs a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int kTokens = 8 * kTok;
  constexpr bool kNormalise = std::is_same_v<T, fp16>;
  const PackedWeight& w = a.w;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const uint32_t lane4 = lane * 4;
  const int64_t units = w.K / kUnit;
  const int u_begin = share(blockIdx.x, gridDim.x, units), u_end = share(blockIdx.x + 1, gridDim.x, units);
  const int items = (w.strips_n + 1) / 2;
  const int p_begin = share(warp, kWarps, items), p_end = share(warp + 1, kWarps, items);
  const int m0 = blockIdx.y * kTokens;
  const int column_pair = 2 * pair_order(g);

  // An item: row strips 2p, 2p+1, two tiles of each. Rows of the second strip are stored ^ 4: a
  // matrix takes its 8 rows from both strips, and they then lie in different banks.
  const uint32_t ring = shared_address(shared) + kRingAt + warp * kDepth * kStripBytes;
  const int strip_lane = lane / 16;
  const uint32_t write_at =
      ring + strip_lane * 256 + (lane / 8 % 2) * kTileBytes + ((lane % 8) ^ (strip_lane * 4)) * 16;
  // Row i of a matrix of step st is pair 4 (i/2) + 2 st + i%2 of the item's 16: lane t then needs
  // rows 8t + 4 st .. + 3 of W, that is words 2 st and 2 st + 1 of its piece of dy.
  const int matrix_pair = 4 * (lane % 8 / 2) + 2 * (lane / 16) + lane % 2;
  const uint32_t read_at = ring + (matrix_pair / 8) * 256 + (lane / 8 % 2) * kTileBytes +
                           (pair_place(matrix_pair % 8) ^ (matrix_pair / 8 * 4)) * 16;
  int next_unit = p_begin < p_end ? u_begin : u_end, next_item = p_begin;
  int write_slot = 0, read_slot = 0;
  const auto issue = [&] {
    if (next_unit < u_end) {
      const int strip = 2 * next_item + strip_lane;
      const int valid = strip < w.strips_n ? 16 : 0;
      const int64_t at = (int64_t(valid ? strip : 0) * w.strips_k + next_unit / 2) * kStripBytes +
                         (next_unit % 2) * 256 + (lane % 16) * 16;
      copy_async16(write_at + write_slot * kStripBytes, w.codes + at, valid);
      if (++next_item == p_end) {
        next_item = p_begin;
        ++next_unit;
      }
    }
    commit_copies();
    write_slot = (write_slot + 1) % kDepth;
  };
#pragma unroll
  for (int i = 0; i < kDepth; ++i) issue();

  GradFragment<kTok> dy;
  RawScale<kNested> raw;
  if (p_begin < p_end) {
    dy.template load<T>(a, m0, g, int64_t(p_begin) * 32 + 8 * t);
    raw.load(w, int64_t(p_begin) * 32 + lane, int64_t(u_begin) * kUnit);
  }
  fill_pairs<T>(shared, a.book);
  float* map = reinterpret_cast<float*>(shared + kTableBytes);
  float offset = 0.0f;
  if constexpr (kNested) {
    if (threadIdx.x < 256) map[threadIdx.x] = __ldg(w.nested + 1 + threadIdx.x);
    offset = __ldg(w.nested);
  }
  __syncthreads();

  for (int unit = u_begin; unit < u_end; ++unit) {
    float acc[2][kTok][4];  // two tiles of 16 columns
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      start_dgrad<T, kTok>(a, int64_t(unit) * kUnit + tile * 16 + column_pair, m0, t, warp, acc[tile]);
    for (int item = p_begin; item < p_end; ++item) {
      float absmax = raw.decode(map, offset) * a.inverse_gain, restore = 1.0f;
      if constexpr (kNormalise) {  // largest absmax of the item into [0.5, 1)
        const unsigned top = __reduce_max_sync(kAllLanes, __float_as_uint(absmax) & 0x7FFFFFFFu);
        const int exponent = min(max(int(top >> 23), 1), 252);
        absmax *= __int_as_float((253 - exponent) << 23);
        restore = __int_as_float((exponent + 1) << 23);
      }
      uint32_t b[kTok][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale0 = __shfl_sync(kAllLanes, absmax, 8 * t + 2 * i);
        const float scale1 = __shfl_sync(kAllLanes, absmax, 8 * t + 2 * i + 1);
#pragma unroll
        for (int j = 0; j < kTok; ++j) {
          const float2 v = unpack_pair<T>(word_of(dy.v[j], i));
          b[j][i] = pack_pair<T>(v.x * scale0, v.y * scale1);
        }
      }
      const bool is_last = item + 1 == p_end;
      const int next = is_last ? p_begin : item + 1, unit_of_next = is_last ? unit + 1 : unit;
      if (unit_of_next < u_end) {
        dy.template load<T>(a, m0, g, int64_t(next) * 32 + 8 * t);
        raw.load(w, int64_t(next) * 32 + lane, int64_t(unit_of_next) * kUnit);
      }
      wait_copies<kDepth - 1>();
      __syncwarp();
      const uint4 q = load_matrices_transposed(read_at + read_slot * kStripBytes);
      read_slot = (read_slot + 1) % kDepth;
      __syncwarp();
      issue();
      float c[2][kTok][4] = {};
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          uint32_t f[4];
          lookup_fragment(shared, transpose_units(word_of(q, 2 * step + tile)), lane4, f);
#pragma unroll
          for (int j = 0; j < kTok; ++j)
            mma_16x8x16<T>(kNormalise ? c[tile][j] : acc[tile][j], f, b[j][2 * step], b[j][2 * step + 1]);
        }
      if constexpr (kNormalise) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
          for (int j = 0; j < kTok; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[tile][j][e] += restore * c[tile][j][e];
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int j = 0; j < kTok; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int f = (warp * kTokens + 8 * j + 2 * t + e) * kUnit + tile * 16 + column_pair;
          *reinterpret_cast<float2*>(partial(shared, f)) = make_float2(acc[tile][j][e], acc[tile][j][2 + e]);
        }
    __syncthreads();
    const int token = threadIdx.x / kUnit;
    if (token < kTokens && m0 + token < a.M) {
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < kWarps; ++part)
        sum += *partial(shared, (part * kTokens + token) * kUnit + threadIdx.x % kUnit);
      static_cast<T*>(a.out)[(m0 + token) * w.K + int64_t(unit) * kUnit + threadIdx.x % kUnit] =
          from_acc<T>(sum);
    }
    if (unit + 1 < u_end) __syncthreads();
  }
}

// ---- launch

using Kernel = void (*)(SkinnyArgs);

template <class T, int kTok, int kDepth>
Kernel pick_nested(bool is_dgrad, bool is_nested) {
  if (is_dgrad)
    return is_nested ? qlinear_dgrad_skinny_kernel<T, kTok, kDepth, true>
                     : qlinear_dgrad_skinny_kernel<T, kTok, kDepth, false>;
  return is_nested ? qlinear_fwd_skinny_kernel<T, kTok, kDepth, true>
                   : qlinear_fwd_skinny_kernel<T, kTok, kDepth, false>;
}

template <class T>
Kernel pick(bool is_dgrad, bool is_nested, bool is_wide, bool is_deep) {
  if (is_wide)
    return is_deep ? pick_nested<T, 2, 8>(is_dgrad, is_nested) : pick_nested<T, 2, 4>(is_dgrad, is_nested);
  return is_deep ? pick_nested<T, 1, 8>(is_dgrad, is_nested) : pick_nested<T, 1, 4>(is_dgrad, is_nested);
}

void launch(SkinnyArgs& a, DType dtype, Format format, bool is_dgrad, int64_t parts, Stream stream) {
  const DeviceFacts facts = device_facts();
  const bool is_bf16 = dtype == DType::kBFloat16, is_wide = a.M > 8;
  // FP4's codes are exact in bf16 when multiplied by 12; float16 holds both codebooks well enough.
  const float gain = !is_bf16 ? 1.0f : format == Format::kNf4 ? kBf16Gain : 12.0f;
  a.book = codebook(format, gain);
  a.inverse_gain = 1.0f / gain;
  const int depth = facts.shared_bytes >= shared_bytes(8) ? 8 : 4;
  FASTPEFT_CHECK(facts.shared_bytes >= shared_bytes(depth), "qlinear: ", shared_bytes(depth),
                 " bytes of shared memory a block are needed, the device has ", facts.shared_bytes);
  const Kernel kernel = is_bf16 ? pick<bf16>(is_dgrad, a.w.nested, is_wide, depth == 8)
                                : pick<fp16>(is_dgrad, a.w.nested, is_wide, depth == 8);
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes(depth));
  const int64_t token_chunks = ceil_div<int64_t>(a.M, is_wide ? 16 : 8);
  FASTPEFT_CHECK(token_chunks < 65536, "qlinear: ", a.M, " tokens in one launch");
  const dim3 grid(unsigned(parts < facts.sm_count ? parts : facts.sm_count), unsigned(token_chunks));
  kernel<<<grid, kThreads, shared_bytes(depth), cuda_stream(stream)>>>(a);
  check_launch(is_dgrad ? "qlinear_dgrad_skinny_kernel" : "qlinear_fwd_skinny_kernel");
}

bool is_16bit(DType t) { return t == DType::kBFloat16 || t == DType::kFloat16; }

}  // namespace

bool skinny_fits(const QLinearFwdParams& p) {
  return is_16bit(p.dtype) && is_4bit(p.w.format) && p.w.K % kTileK == 0 && p.w.blocksize >= kTileK &&
         is_aligned(p.x, 16) && is_aligned(p.w.codes, 16);
}

bool skinny_fits(const QLinearDgradParams& p) {
  return is_16bit(p.dtype) && is_4bit(p.w.format) && p.w.K % kUnit == 0 && is_aligned(p.w.codes, 16);
}

void qlinear_fwd_skinny(const QLinearFwdParams& p) {
  SkinnyArgs a = {};
  a.w = packed_weight(p.w);
  a.M = p.M;
  a.R = p.R;
  a.in = p.x;
  a.bias = p.bias;
  a.s = p.R > 0 ? p.s : nullptr;
  a.factor = p.lora_b;
  a.scaling = p.scaling;
  a.out = p.y;
  launch(a, p.dtype, p.w.format, false, a.w.strips_n, p.stream);
}

void qlinear_dgrad_skinny(const QLinearDgradParams& p) {
  SkinnyArgs a = {};
  a.w = packed_weight(p.w);
  a.M = p.M;
  a.R = p.R;
  a.in = p.dy;
  a.s = p.R > 0 ? p.ds : nullptr;
  a.factor = p.lora_a;
  a.out = p.dx;
  a.in_is_aligned = p.w.N % 8 == 0 && is_aligned(p.dy, 16);
  launch(a, p.dtype, p.w.format, true, p.w.K / kUnit, p.stream);
}

}  // namespace fastpeft::cuda
