// 4-bit linear layer for few tokens, decode inside, input gradient (sm_80 and newer). Shared parts
// and the lookup: qlinear_skinny.cuh.
//
//   dx [M, K] = dy W + ds A                dy [M, N], ds [M, R], A [R, K]
//   W [N, K] tiled 4-bit codes, one absmax a block of >= 32 columns
//
// The forward's bytes through ldmatrix.trans: rows k, reduction n. absmax varies along n, so it is
// folded into dy (8 products a lane and 1024 weights), which is so rounded to 16 bits once more; in
// float16 the fold is normalised by a power of two an item, or small absmax would underflow.
//
//     block: 32 columns (half a strip) a time, all of N;  rows:  | warp 0 | warp 1 | ... | warp 15
//     | item of a warp: 2 row strips x 32 columns = 4 tiles of 128 bytes
//
// Bound: as forward; 218 instructions an item of 1024 weights and warp (README.md).
#include "qlinear_skinny.cuh"

namespace fastpeft::cuda {

namespace {

using namespace skinny;

constexpr int kUnit = 32;  // columns a block finishes at a time
constexpr int kItem = 32;  // rows of W an item

// dy of 8 * kTok tokens, 32 rows of W: lane (g, t) holds rows 8t .. 8t + 7 of token g.
template <class T, int kTok>
struct GradFragment {
  uint4 v[kTok];
  const T* row[kTok];  // this lane's token, from its 8t on; null past M

  __device__ __forceinline__ void start(const Args& a, int m0, int g, int t) {
#pragma unroll
    for (int i = 0; i < kTok; ++i) {
      const int64_t m = m0 + 8 * i + g;
      row[i] = m < a.M ? static_cast<const T*>(a.in) + m * a.w.N + 8 * t : nullptr;
    }
  }
  // N is a multiple of 8, so a piece lies inside or outside as a whole.
  __device__ __forceinline__ void load(int n, bool is_inside) {
#pragma unroll
    for (int i = 0; i < kTok; ++i) {
      v[i] = make_uint4(0, 0, 0, 0);
      if (row[i] && is_inside) v[i] = __ldg(reinterpret_cast<const uint4*>(row[i] + n));
    }
  }
};

// Swaps nibbles 1 and 2 of both units: (n0,k0)(n0,k1)(n1,k0)(n1,k1) -> pairs of n for k0 and for
// k1.
__device__ __forceinline__ uint32_t transpose_units(uint32_t w) {
  const uint32_t differ = (w ^ (w >> 4)) & 0x00F000F0u;
  return w ^ differ ^ (differ << 4);
}

// ds A as the first partial sums of two tiles of 16 columns: warp w adds ranks w, w + 16, ...
template <class T, int kTok>
__device__ __forceinline__ void start_sums(const Args& a, int k0, int m0, int t, int warp,
                                           float (&acc)[2][kTok][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int i = 0; i < kTok; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[tile][i][c] = 0.0f;
  const T* ds = static_cast<const T*>(a.s);
  const T* lora_a = static_cast<const T*>(a.factor);
  if (!ds) return;
  for (int r = warp; r < a.R; r += kWarps) {
    const T* row = lora_a + int64_t(r) * a.w.K + k0;
    float f[2][2], value[kTok][2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int e = 0; e < 2; ++e) f[tile][e] = to_acc(row[16 * tile + e]);
#pragma unroll
    for (int i = 0; i < kTok; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int m = m0 + 8 * i + 2 * t + j;
        value[i][j] = m < a.M ? to_acc(ds[int64_t(m) * a.R + r]) : 0.0f;
      }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int i = 0; i < kTok; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[tile][i][c] += value[i][c % 2] * f[tile][c / 2];
  }
}

// Feeds the ring: the warp's items of a unit, then those of the next unit. Rows of the second strip
// of an item are stored ^ 4: a matrix takes its 8 rows from both strips, which then lie in
// different banks.
template <bool kNested, int kDepth>
struct Feeder {
  uint32_t ring;      // this lane's place in slot 0
  uint32_t scale_at;  // slot 0
  const uint8_t* source;
  int64_t item_stride;  // bytes between items
  int left, unit, item, slot, strip_lane;

  __device__ __forceinline__ void start_unit(const Args& a, int u, int first, int lane) {
    unit = u;
    item = first;
    source = a.w.codes + (int64_t(2 * first + strip_lane) * a.w.strips_k + u / 2) * kStripBytes +
             (u % 2) * 256 + (lane % 16) * 16;
  }

  __device__ __forceinline__ void issue(const Args& a, int p_begin, int p_end, int lane) {
    if (left > 0) {
      --left;
      const bool is_strip = 2 * item + strip_lane < a.w.strips_n;
      copy_async16(ring + slot, is_strip ? source : a.w.codes, is_strip ? 16 : 0);
      const int n = item * kItem;
      copy_scales<kNested, kItem / 4>(a, scale_at + slot, lane,
                                      int64_t(unit * kUnit >> a.w.block_shift) * a.w.Np + n,
                                      n + 4 * lane < a.w.Np);
      source += item_stride;
      if (++item == p_end) start_unit(a, unit + 1, p_begin, lane);
    }
    commit_copies();
    slot = slot == (kDepth - 1) * slot_bytes(kNested) ? 0 : slot + slot_bytes(kNested);
  }
};

// dy * absmax of the item's rows as B fragments; returns what the sums must be multiplied by.
template <class T, int kTok>
__device__ __forceinline__ float fold_scales(float absmax, const uint4 (&dy)[kTok], int t,
                                             uint32_t (&b)[kTok][4]) {
  float restore = 1.0f;
  if constexpr (std::is_same_v<T, fp16>) {  // the item's largest absmax into [0.5, 1)
    const unsigned top = __reduce_max_sync(kAllLanes, __float_as_uint(absmax) & 0x7FFFFFFFu);
    const int exponent = min(max(int(top >> 23), 1), 252);
    absmax *= __int_as_float((253 - exponent) << 23);
    restore = __int_as_float((exponent + 1) << 23);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float scale0 = __shfl_sync(kAllLanes, absmax, 8 * t + 2 * i);
    const float scale1 = __shfl_sync(kAllLanes, absmax, 8 * t + 2 * i + 1);
#pragma unroll
    for (int j = 0; j < kTok; ++j) {
      const float2 v = unpack_pair<T>(word_of(dy[j], i));
      b[j][i] = pack_pair<T>(v.x * scale0, v.y * scale1);
    }
  }
  return restore;
}

template <class T, int kTok, int kDepth, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_dgrad_skinny_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int kTokens = 8 * kTok, kSlot = slot_bytes(kNested);
  constexpr bool kNormalise = std::is_same_v<T, fp16>;
  const PackedWeight& w = a.w;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const uint32_t lane4 = lane * 4;
  const int units = int(w.K / kUnit), items = (w.strips_n + 1) / 2;
  const int u_begin = share(blockIdx.x, gridDim.x, units),
            u_end = share(blockIdx.x + 1, gridDim.x, units);
  const int p_begin = share(warp, kWarps, items), p_end = share(warp + 1, kWarps, items);
  const int m0 = blockIdx.y * kTokens;
  const int column_pair = 2 * pair_order(g);

  unsigned char* ring = shared + kRingAt + warp * kDepth * kSlot;
  Feeder<kNested, kDepth> feeder;
  feeder.strip_lane = lane / 16;
  feeder.scale_at = shared_address(ring);
  feeder.ring = keep(feeder.scale_at + lane / 16 * 256 + (lane / 8 % 2) * kTileBytes +
                     ((lane % 8) ^ (lane / 16 * 4)) * 16);
  feeder.left = (p_end - p_begin) * (u_end - u_begin);
  feeder.slot = 0;
  feeder.item_stride = int64_t(2 * w.strips_k) * kStripBytes;
  feeder.start_unit(a, u_begin, p_begin, lane);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) feeder.issue(a, p_begin, p_end, lane);
  // Row i of a matrix of step st is pair 4 (i/2) + 2 st + i%2 of the item's 16: lane t then needs
  // rows 8t + 4 st .. + 3 of W, that is words 2 st and 2 st + 1 of its piece of dy.
  const int matrix_pair = 4 * (lane % 8 / 2) + 2 * (lane / 16) + lane % 2;
  const uint32_t read_at =
      keep(feeder.scale_at + (matrix_pair / 8) * 256 + (lane / 8 % 2) * kTileBytes +
           (pair_place(matrix_pair % 8) ^ (matrix_pair / 8 * 4)) * 16);

  GradFragment<T, kTok> dy;
  dy.start(a, m0, g, t);
  float nested = 0.0f;
  const int N = int(w.N);
  const auto load_ahead = [&](int unit, int item) {
    dy.load(item * kItem, item * kItem + 8 * t < N);
    if constexpr (kNested) {
      const int n = min(item * kItem + lane, N - 1);
      nested =
          __ldg(w.nested + 257 + ((n * a.blocks_a_row + (unit * kUnit >> w.block_shift)) >> 8));
    }
  };
  if (p_begin < p_end) load_ahead(u_begin, p_begin);
  fill_pairs<T>(shared, a.book);
  Scales<kNested> scales;
  scales.fill(a, shared);
  float acc[2][kTok][4];  // two tiles of 16 columns
  start_sums<T, kTok>(a, u_begin * kUnit + column_pair, m0, t, warp, acc);
  __syncthreads();

  int slot = 0;
  for (int unit = u_begin; unit < u_end; ++unit) {
    for (int item = p_begin; item < p_end; ++item) {
      wait_copies<kDepth - 1>();
      __syncwarp();
      const uint4 q = load_matrices_transposed(read_at + slot);
      float absmax = scales.of(ring + slot, lane, nested);
      slot = slot == (kDepth - 1) * kSlot ? 0 : slot + kSlot;
      __syncwarp();
      feeder.issue(a, p_begin, p_end, lane);
      if (item * kItem + lane >= N) absmax = 0.0f;  // padding rows
      uint32_t b[kTok][4];
      const float restore = fold_scales<T, kTok>(absmax, dy.v, t, b);
      const bool is_last = item + 1 == p_end;
      const int next_unit = is_last ? unit + 1 : unit;
      if (next_unit < u_end) load_ahead(next_unit, is_last ? p_begin : item + 1);
      float c[2][kTok][4] = {};
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          uint32_t f[4];
          lookup_fragment(shared, transpose_units(word_of(q, 2 * step + tile)), lane4, f);
#pragma unroll
          for (int j = 0; j < kTok; ++j)
            mma_16x8x16<T>(kNormalise ? c[tile][j] : acc[tile][j], f, b[j][2 * step],
                           b[j][2 * step + 1]);
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
          *reinterpret_cast<float2*>(partial(shared, f)) =
              make_float2(acc[tile][j][e], acc[tile][j][2 + e]);
        }
    const bool has_next = unit + 1 < u_end;
    if (has_next) start_sums<T, kTok>(a, (unit + 1) * kUnit + column_pair, m0, t, warp, acc);
    __syncthreads();
    const int token = threadIdx.x / kUnit;
    if (token < kTokens && m0 + token < a.M) {
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < kWarps; ++part)
        sum += *partial(shared, (part * kTokens + token) * kUnit + threadIdx.x % kUnit);
      static_cast<T*>(a.out)[(m0 + token) * w.K + unit * kUnit + threadIdx.x % kUnit] =
          from_acc<T>(sum);
    }
    if (has_next) __syncthreads();  // the partial sums are read
  }
}

template <class T, int kTok>
Kernel pick_ring(Variant v) {
  if (v.is_nested)
    return v.is_deep ? qlinear_dgrad_skinny_kernel<T, kTok, kDeep, true>
                     : qlinear_dgrad_skinny_kernel<T, kTok, kShallowNested, true>;
  return v.is_deep ? qlinear_dgrad_skinny_kernel<T, kTok, kDeep, false>
                   : qlinear_dgrad_skinny_kernel<T, kTok, kShallow, false>;
}

Kernel pick(Variant v) {
  if (v.is_bf16) return v.is_wide ? pick_ring<bf16, 2>(v) : pick_ring<bf16, 1>(v);
  return v.is_wide ? pick_ring<fp16, 2>(v) : pick_ring<fp16, 1>(v);
}

}  // namespace

bool skinny_fits(const QLinearDgradParams& p) {
  return weight_fits(p.w, p.dtype) && p.w.N % 8 == 0 && is_aligned(p.dy, 16);
}

void qlinear_dgrad_skinny(const QLinearDgradParams& p) {
  Args a = {};
  a.w = packed_weight(p.w);
  a.M = int(p.M);
  a.R = int(p.R);
  a.in = p.dy;
  a.s = p.R > 0 ? p.ds : nullptr;
  a.factor = p.lora_a;
  a.out = p.dx;
  launch(a, p.dtype, p.w.format, p.w.K / kUnit, p.stream, pick, "qlinear_dgrad_skinny_kernel");
}

}  // namespace fastpeft::cuda
