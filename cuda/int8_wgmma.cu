// LLM.int8() product for Hopper (sm_90a): int8 tensor cores, everything else behind them in
// registers.
//
//   y [M, N] = (q codes^T) scale_x absmax / 127^2 + sum over outlier columns k of x[m, k] W[n, k]
//              + scaling * s B^T + bias
//   q int8 [M, K], codes int8 [N, K], scale_x [M], absmax [N]; x, s [M, R], B [N, R], y 16 bit
//
// Computed transposed (y^T = W q^T): 128 rows of W are wgmma's A operand, kTokens tokens its B,
// both from shared memory by TMA with the 128-byte swizzle. The int32 sums stay in registers,
// become float32 there (times scale_x / 127), take up the outlier columns and the low-rank product
// as 16-bit k-blocks, and only then meet what belongs to rows: no matrix of sums in memory. Codes
// are exact in 16 bit, so an outlier column costs no rounding.
//
//   ring of stages:   [q | codes] x K/128   [x_out | w_out] x outliers/64   [s | B]
//   sums:              int32, then float32 (sum * scale_x / 127) ..........  * absmax / 127 /
//   scaling
//
// Work: tile 128 rows x kTokens x 128 bytes of K. A block: warpgroup 0 = producer, warpgroups 1, 2
// = consumers with 64 rows each. Clusters of two blocks take neighbouring row tiles of the same
// tokens: each copies half of the tokens' tile into both (multicast), which takes L2 traffic from
// 48 to 32 KB a k-block. A stage is free when the consumers of both blocks say so. Few tokens and
// few row tiles: clusters of four, two such pairs, each with half of K; they push int32 sums of
// half of the tokens to each other (exact) and go on with the other half each.
//
// Bound: tensor cores. A k-block of 128 rows x 256 tokens is 8 wgmma of 128 clocks (4096 int8
// products a clock); 1979 TOPS at 1.755 GHz, less where power limits the clock. Few tokens (M <=
// 128): reading W, 16 KB a k-block.
#include <algorithm>

#include "dependent_launch.cuh"
#include "device/numbers.cuh"
#include "device/sm90.cuh"
#include "device/tensor_map.cuh"
#include "device/tiles.cuh"
#include "device/wgmma_shared.cuh"
#include "int8_wgmma.h"

namespace fastpeft::cuda {

namespace {

constexpr int kRows = 128, kBlockBytes = 128, kThreads = 384;

struct GemmArgs {
  int M = 0, N = 0, K = 0, R = 0;
  int kblocks = 0;   // of K
  int pairs_r = 0;   // pairs of row tiles
  int tiles_t = 0;   // tiles of tokens
  int split = 1;     // parts of the reduction, 1 or 2
  int half = 0;      // tokens each block of a cluster copies: few tokens fill only part of a tile
  int capacity = 0;  // outlier columns in the gathered matrices
  const float* absmax = nullptr;  // [N]
  const float* scale = nullptr;   // [M]
  const int32_t* list = nullptr;  // outlier columns: their number, then the columns; or null
  const int8_t* codes = nullptr;  // [N, K]: columns beyond the capacity
  const void* x = nullptr;        // [M, K]: likewise
  const void* bias = nullptr;     // [N] or null
  float scaling = 1.0f;
};

template <class T_, int kTokens_>
struct Config {
  using T = T_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kTokens == 256 ? 4 : kTokens == 128 ? 6 : 8;
  static constexpr int kWBytes = kRows * kBlockBytes, kXBytes = kTokens * kBlockBytes;
  static constexpr int kStageBytes = kWBytes + kXBytes;
  // For each consumer warpgroup: first its tokens' scales, then 128 tokens x 64 rows on their way
  // out.
  static constexpr int kOutTokens = kTokens < 128 ? kTokens : 128;
  static constexpr int kOutAt = kStages * kStageBytes, kOutBytes = kOutTokens * 128;
  static constexpr int kBarAt = kOutAt + 2 * kOutBytes;
  static constexpr int kShared = kBarAt + 16 * kStages + 16 + 1024;
  static constexpr int kPieceTokens = kTokens / 4;  // what a store takes
  // A half of the sums fits where the output goes later.
  static constexpr bool kCanSplit = kTokens <= 128;
  static_assert(kShared <= 232448, "shared memory of sm_90");
};

struct Maps {
  CUtensorMap q, codes, y;   // int8 as pairs of bytes
  CUtensorMap x_out, w_out;  // outlier columns
  CUtensorMap s, b;          // low-rank product
};

// Pairs of row tiles in groups of kGroup, tokens outside them, so that neighbours in time share
// both operands in L2.
struct Schedule {
  static constexpr int kGroup = 8;
  int pairs_r, tiles_t, clusters, cluster;
  int member, part;  // of the pair; of the reduction
  int begin, end;    // k-blocks

  FASTPEFT_DEVICE explicit Schedule(const GemmArgs& a)
      : pairs_r(a.pairs_r),
        tiles_t(a.tiles_t),
        clusters(gridDim.x / (2 * a.split)),
        cluster(blockIdx.x / (2 * a.split)),
        member(cluster_rank() % 2),
        part(cluster_rank() / 2),
        begin(a.kblocks * part / a.split),
        end(a.kblocks * (part + 1) / a.split) {}
  FASTPEFT_DEVICE int count() const {
    const int total = pairs_r * tiles_t;
    return total / clusters + (cluster < total % clusters);
  }
  FASTPEFT_DEVICE TilePlace at(int i) const {
    const TilePlace pair = tile_place<kGroup>(i * clusters + cluster, pairs_r, tiles_t);
    return {2 * pair.row + member, pair.token};
  }
};

FASTPEFT_DEVICE int outlier_blocks(const GemmArgs& a) {
  return a.list ? ceil_div(*a.list, 64) : 0;
}

// Elements [row, column 2 * lane, + 1] of a 128-byte-swizzled tile.
FASTPEFT_DEVICE void store_swizzled(uint32_t tile, int row, int lane, uint32_t pair) {
  const uint32_t at = tile + row * 128 + (((lane >> 2) ^ (row & 7)) << 4) + (lane & 3) * 4;
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(pair) : "memory");
}

// A stage of outlier columns beyond the capacity of the gathered matrices, taken from W and x by
// the producer's four warps, a lane two columns: slow (a load an element), and as rare as that
// many.
template <class C>
FASTPEFT_DEVICE void gather_block(const GemmArgs& a, const TilePlace& item, int block,
                                  uint32_t to) {
  using T = typename C::T;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, count = *a.list;
  const int first = block * 64 + 2 * lane;
  const int k[2] = {first < count ? a.list[1 + first] : -1,
                    first + 1 < count ? a.list[2 + first] : -1};
#pragma unroll 4
  for (int row = warp; row < kRows; row += 4) {
    const int n = item.row * kRows + row;
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; e++)
      v[e] = n < a.N && k[e] >= 0 ? float(a.codes[int64_t(n) * a.K + k[e]]) : 0.0f;
    store_swizzled(to, row, lane, pack_pair<T>(v[0], v[1]));
  }
#pragma unroll 4
  for (int row = warp; row < C::kTokens; row += 4) {
    const int m = item.token * C::kTokens + row;
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; e++)
      v[e] =
          m < a.M && k[e] >= 0 ? to_acc(static_cast<const T*>(a.x)[int64_t(m) * a.K + k[e]]) : 0.0f;
    store_swizzled(to + C::kWBytes, row, lane, pack_pair<T>(v[0], v[1]));
  }
  fence_async_proxy();
}

// Thread 0 drives the ring; the other threads of the producer only help with gathered stages.
template <class C>
FASTPEFT_DEVICE void produce(const Maps& maps, const GemmArgs& a, const Schedule& schedule,
                             uint32_t base, uint32_t full0, uint32_t empty0) {
  wait_for_predecessor();
  const bool is_driver = threadIdx.x == 0;
  const int outliers = outlier_blocks(a);
  const uint16_t pair = uint16_t(kBoth << (2 * schedule.part));
  const int copied = min(outliers, a.capacity / 64);
  Ring<C::kStages> ring(1);
  const auto load = [&](const CUtensorMap* w, const CUtensorMap* x, const TilePlace& item,
                        int column) {
    if (is_driver) {
      barrier_wait(empty0 + 8 * ring.stage, ring.phase);
      const uint32_t full = full0 + 8 * ring.stage, to = base + ring.stage * C::kStageBytes;
      barrier_expect(full, C::kWBytes + 2 * a.half * kBlockBytes);
      tma_load_2d(to, w, full, column, item.row * kRows);
      tma_multicast_2d(to + C::kWBytes + schedule.member * a.half * kBlockBytes, x, full, column,
                       item.token * C::kTokens + schedule.member * a.half, pair);
    }
    ring.advance();
  };
  for (int i = 0, items = schedule.count(); i < items; i++) {
    const TilePlace item = schedule.at(i);
    for (int kb = schedule.begin; kb < schedule.end; kb++)
      load(&maps.codes, &maps.q, item, kb * 64);
    for (int ob = 0; ob < copied; ob++) load(&maps.w_out, &maps.x_out, item, ob * 64);
    for (int ob = copied; ob < outliers; ob++) {
      if (is_driver) barrier_wait(empty0 + 8 * ring.stage, ring.phase);
      named_barrier(3, 128);
      gather_block<C>(a, item, ob, base + ring.stage * C::kStageBytes);
      named_barrier(3, 128);
      if (is_driver) barrier_arrive(full0 + 8 * ring.stage);
      ring.advance();
    }
    if (a.R > 0) load(&maps.b, &maps.s, item, 0);
  }
}

template <class C>
struct Consumer {
  using T = typename C::T;
  static constexpr int kSums = C::kTokens / 2;
  const GemmArgs& a;
  const Maps& maps;
  const Schedule& schedule;
  const uint32_t base, full0, ready;
  const int cw, warp, lane, g, t;
  const uint32_t out;  // the warpgroup's staging area
  uint32_t freed;      // lanes 0, 1: this stage's barrier in either block of the pair
  Ring<C::kStages> ring;
  uint32_t sum[kSums];  // int32, later float32

  FASTPEFT_DEVICE Consumer(const Maps& m, const GemmArgs& args, const Schedule& schedule,
                           uint32_t base, uint32_t full0, uint32_t empty0, uint32_t ready)
      : a(args),
        maps(m),
        schedule(schedule),
        base(base),
        full0(full0),
        ready(ready),
        cw(threadIdx.x / 128 - 1),
        warp((threadIdx.x / 32) & 3),
        lane(threadIdx.x & 31),
        g(lane >> 2),
        t(lane & 3),
        out(base + C::kOutAt + cw * C::kOutBytes),
        freed(cluster_address(empty0, 2 * schedule.part + (lane & 1))),
        ring(0) {}

  FASTPEFT_DEVICE void release(int stage) const {
    if (lane < 2) barrier_arrive_peer(freed + 8 * stage);
  }
  FASTPEFT_DEVICE uint64_t a_descriptor(int stage) const {
    return swizzled_descriptor(base + stage * C::kStageBytes + cw * 64 * kBlockBytes);
  }
  FASTPEFT_DEVICE uint64_t b_descriptor(int stage) const {
    return swizzled_descriptor(base + stage * C::kStageBytes + C::kWBytes);
  }
  FASTPEFT_DEVICE static float number(uint32_t v) { return __uint_as_float(v); }

  FASTPEFT_DEVICE void integers() {
    int previous = -1;
    for (int kb = schedule.begin; kb < schedule.end; kb++) {
      barrier_wait(full0 + 8 * ring.stage, ring.phase);
      const uint64_t w = a_descriptor(ring.stage), x = b_descriptor(ring.stage);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; step++)
        WgmmaSS<C::kTokens>::mma_s8(sum, w + 2 * step, x + 2 * step,
                                    kb > schedule.begin || step > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = ring.stage;
      ring.advance();
    }
    finish(previous);
  }
  FASTPEFT_DEVICE void pin() {
#pragma unroll
    for (int e = 0; e < kSums; e++) asm volatile("" : "+r"(sum[e])::"memory");
  }
  FASTPEFT_DEVICE void finish(int stage) {
    wgmma_wait<0>();
    pin();
    release(stage);
  }
  // One more k-block of 64 in 16 bit.
  FASTPEFT_DEVICE void add_block() {
    barrier_wait(full0 + 8 * ring.stage, ring.phase);
    const uint64_t w = a_descriptor(ring.stage), x = b_descriptor(ring.stage);
#pragma unroll
    for (int e = 0; e < kSums; e++) asm volatile("" : "+r"(sum[e])::"memory");
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++)
      WgmmaSS<C::kTokens>::template mma<T>(sum, w + 2 * step, x + 2 * step, 1);
    wgmma_commit();
    finish(ring.stage);
    ring.advance();
  }
  // Nobody of the warpgroup, nor a copy on its way out, reads the staging area any more.
  FASTPEFT_DEVICE void wait_staging() const {
    if ((threadIdx.x & 127) == 0) store_wait_read();
    named_barrier(1 + cw, 128);
  }

  // Transposes through shared memory ([token][64 rows], 128-byte swizzle) and stores by TMA what
  // this block owns, up to 128 tokens at a time; y = sum * factor + shift, either of rows n and
  // n + 8.
  FASTPEFT_DEVICE void store(const TilePlace& item, const float (&factor)[2],
                             const float (&shift)[2]) {
    constexpr int kPieces = C::kOutTokens / C::kPieceTokens, kPieceBytes = C::kPieceTokens * 128;
    const uint32_t chunk = 2 * warp + ((lane >> 3) & 1), token = lane & 7;
    const uint32_t to = out + ((lane >> 4) * 8 + token) * 128 + ((chunk ^ token) << 4);
#pragma unroll
    for (int first = 0; first < 4; first += kPieces) {
      wait_staging();
#pragma unroll
      for (int piece = 0; piece < kPieces; piece++) {
        if (!owns(first + piece)) continue;
#pragma unroll
        for (int j = 0; j < C::kPieceTokens / 8; j += 2) {
          uint32_t packed[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int at = 4 * ((first + piece) * (C::kPieceTokens / 8) + j + i / 2) + 2 * (i % 2);
            packed[i] = pack_pair<T>(fmaf(number(sum[at]), factor[i % 2], shift[i % 2]),
                                     fmaf(number(sum[at + 1]), factor[i % 2], shift[i % 2]));
          }
          store_matrices_transposed(to + piece * kPieceBytes + j * 1024, packed);
        }
      }
      fence_async_proxy();
      named_barrier(1 + cw, 128);
      if ((threadIdx.x & 127) == 0) {
#pragma unroll
        for (int piece = 0; piece < kPieces; piece++)
          if (owns(first + piece))
            tma_store_2d(&maps.y, out + piece * kPieceBytes, item.row * kRows + cw * 64,
                         item.token * C::kTokens + (first + piece) * C::kPieceTokens);
        store_commit();
      }
    }
  }

  FASTPEFT_DEVICE bool owns(int piece) const { return a.split == 1 || piece / 2 == schedule.part; }
  // Adds the other half of K to the sums of this block's half of the tokens.
  FASTPEFT_DEVICE void exchange() {
    constexpr int kHalf = kSums / 2;
    const uint32_t peer = cluster_rank() ^ 2, mine = out + (threadIdx.x & 127) * 16;
    const uint32_t to = cluster_address(mine, peer), bar = cluster_address(ready, peer);
    const bool is_second = schedule.part == 1;
#pragma unroll
    for (int i = 0; i < kHalf; i += 4) {
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] = number(is_second ? sum[i + e] : sum[kHalf + i + e]);
      push_cluster(to + i * 512, make_float4(v[0], v[1], v[2], v[3]), bar);
    }
    barrier_wait_cluster(ready, 0);
#pragma unroll
    for (int i = 0; i < kHalf; i += 4) {
      uint32_t v[4];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                   : "r"(mine + i * 512)
                   : "memory");
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (is_second)
          sum[kHalf + i + e] += v[e];
        else
          sum[i + e] += v[e];
      }
    }
  }

  FASTPEFT_DEVICE void run() {
    wait_for_predecessor();
    const int outliers = outlier_blocks(a);
    const int thread = threadIdx.x & 127;
    for (int i = 0, items = schedule.count(); i < items; i++) {
      const TilePlace item = schedule.at(i);
      const int n = item.row * kRows + cw * 64 + warp * 16 + g;
      float token_scale[C::kTokens / C::kOutTokens], factor[2], shift[2];
#pragma unroll
      for (int j = 0; j < C::kTokens / C::kOutTokens; j++) {
        const int m = item.token * C::kTokens + j * C::kOutTokens + thread;
        token_scale[j] = m < a.M ? a.scale[m] * (1.0f / 127.0f) : 0.0f;
      }
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const bool is_row = n + 8 * e < a.N;
        factor[e] = is_row ? a.absmax[n + 8 * e] * kInt8Step : 0.0f;
        shift[e] = is_row && a.bias ? to_acc(static_cast<const T*>(a.bias)[n + 8 * e]) : 0.0f;
      }
      integers();
      if constexpr (C::kCanSplit)
        if (a.split > 1) exchange();
      wait_staging();
#pragma unroll
      for (int j = 0; j < C::kTokens / C::kOutTokens; j++)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(out + (j * C::kOutTokens + thread) * 4),
                     "f"(token_scale[j])
                     : "memory");
      named_barrier(1 + cw, 128);
#pragma unroll
      for (int j = 0; j < C::kTokens / 8; j++) {
        float s[2];
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(s[0]), "=f"(s[1])
                     : "r"(out + (8 * j + 2 * t) * 4)
                     : "memory");
#pragma unroll
        for (int e = 0; e < 4; e++)
          sum[4 * j + e] = __float_as_uint(float(int(sum[4 * j + e])) * s[e % 2]);
      }
#pragma unroll 1
      for (int ob = 0; ob < outliers; ob++) add_block();
      if (a.R > 0) {
#pragma unroll
        for (int e = 0; e < kSums; e++)
          sum[e] = __float_as_uint(number(sum[e]) * (factor[e / 2 % 2] / a.scaling));
        factor[0] = factor[1] = a.scaling;
        add_block();
      }
      store(item, factor, shift);
    }
    if (thread == 0) store_wait();
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    int8_wgmma_kernel(const __grid_constant__ Maps maps, const __grid_constant__ GemmArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  const uint32_t base = (shared_address(raw) + 1023u) & ~1023u;
  const uint32_t full0 = base + C::kBarAt, empty0 = full0 + 8 * C::kStages,
                 ready = empty0 + 8 * C::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; i++) {
      barrier_init(full0 + 8 * i, 1);
      barrier_init(empty0 + 8 * i, 16);  // consumer warps of both blocks
    }
    barrier_init(ready, 1);
    barrier_init_fence();
    fence_async_proxy();
    barrier_expect(ready, 2 * C::kOutBytes);
  }
  cluster_sync();
  launch_dependents();
  const Schedule schedule(a);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    produce<C>(maps, a, schedule, base, full0, empty0);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    Consumer<C>(maps, a, schedule, base, full0, empty0, ready).run();
  }
  cluster_sync();  // no block leaves while its neighbour copies into its shared memory
#endif
}

// ---- host
template <class C>
void launch(const Int8EpilogueParams& p, GemmArgs a) {
  FASTPEFT_CHECK(a.split == 1 || (a.split == 2 && C::kCanSplit && a.kblocks > 1),
                 "int8_wgmma: split = ", a.split, ", tiles of ", C::kTokens, " tokens, K = ", a.K);
  a.tiles_t = ceil_div(a.M, C::kTokens);
  a.half = std::min(C::kTokens, int(round_up(a.M, 16))) / 2;
  bind_context();
  Maps maps;
  maps.q = matrix_map(p.q, p.w.K / 2, p.M, 64, a.half);
  maps.codes = matrix_map(p.w.codes, p.w.K / 2, p.w.N, 64, kRows);
  maps.y = matrix_map(p.y, p.w.N, p.M, 64, C::kPieceTokens);
  const bool has_columns = a.list != nullptr && a.capacity > 0;
  maps.x_out = has_columns ? matrix_map(p.columns.x, a.capacity, p.M, 64, a.half) : maps.q;
  maps.w_out = has_columns ? matrix_map(p.columns.w, a.capacity, p.w.N, 64, kRows) : maps.codes;
  maps.s = a.R ? matrix_map(p.s, a.R, p.M, 64, a.half) : maps.q;
  maps.b = a.R ? matrix_map(p.lora_b, a.R, p.w.N, 64, kRows) : maps.codes;
  allow_shared_memory(reinterpret_cast<const void*>(int8_wgmma_kernel<C>), C::kShared);
  const int total = a.pairs_r * a.tiles_t, size = 2 * a.split;
  const int clusters = a.split > 1 ? total : std::min(total, device_facts().sm_count / 2);
  launch_kernel(int8_wgmma_kernel<C>, "int8_wgmma_kernel", dim3(unsigned(size * clusters)),
                kThreads, C::kShared, p.stream, size, maps, a);
}

template <class T>
void launch_tile(const Int8EpilogueParams& p, const GemmArgs& a) {
  if (p.tile_tokens == 256)
    launch<Config<T, 256>>(p, a);
  else if (p.tile_tokens == 128)
    launch<Config<T, 128>>(p, a);
  else
    launch<Config<T, 64>>(p, a);
}

}  // namespace

void int8_wgmma_fwd(const Int8EpilogueParams& p) {
  FASTPEFT_CHECK(p.outlier == nullptr || p.columns.list != nullptr,
                 "int8_wgmma_fwd: outlier columns are not listed");
  GemmArgs a;
  a.M = int(p.M);
  a.N = int(p.w.N);
  a.K = int(p.w.K);
  a.R = p.s && p.scaling != 0.0f ? int(p.R) : 0;
  a.kblocks = int(ceil_div<int64_t>(p.w.K, kBlockBytes));
  a.pairs_r = int(ceil_div<int64_t>(p.w.N, 2 * kRows));
  a.split = int(p.split);
  a.capacity = int(p.columns.capacity);
  a.absmax = static_cast<const float*>(p.w.scales);
  a.scale = p.scale;
  a.list = p.outlier ? p.columns.list : nullptr;
  a.codes = static_cast<const int8_t*>(p.w.codes);
  a.x = p.x;
  a.bias = p.bias;
  a.scaling = p.scaling;
  if (p.dtype == DType::kBFloat16)
    launch_tile<bf16>(p, a);
  else
    launch_tile<fp16>(p, a);
}

}  // namespace fastpeft::cuda
