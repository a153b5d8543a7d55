// Gradients of the LoRA factors on Hopper (sm_90a), dy and x read once: bf16 or fp16, R <= 16,
// N % 8 == K % 8 == 0, no dropout.
//
//   ds [M, R] = scaling * dy B      dB [N, R] = scaling * dy^T s      dA [R, K] = ds^T x
//   dy [M, N], x [M, K], s [M, R], B [N, R]
//
//            dy: 64 columns a group        x
//   64    +----+----+-- ... --+----+  +----+-- ... --+   A cluster of 8 blocks takes 64 tokens at a
//   tokens| g0 | g1 |         |    |  | g0 |         |   time, all of their columns: group c goes
//   to a step+----+----+-- ... --+----+  +----+-- ... --+   block c % 8, there to warpgroup c / 8
//   % 2.
//         |    |    |         |    |  |    |         |   The sums of dB and dA over all steps stay
//         +----+----+-- ... --+----+  +----+-- ... --+   in registers, 8 of them a group.
//
// wgmma m64n16k16 takes a tile of 64 x 64 from shared memory as it came, either way: tokens as rows
// for ds (B^T beside it), columns as rows for dB (s^T beside it) and dA (ds^T beside it). The
// narrow operands stand in shared memory as [16 ranks][64], 128-byte swizzle, zeros past R.
//
// ds of a step is a sum over the columns of all blocks. Each warpgroup pushes its part to the block
// that owns the token (8 tokens a block); there a warp adds the 16 parts in order, rounds, writes
// ds and sends it to all blocks. x of a step follows dy of the next, so nobody waits for that trip;
// and since a warpgroup takes ds of step i before it pushes step i + 2, two buffers need no other
// word.
//
//   warps 0 .. 7: two warpgroups of consumers    8: TMA    9: s^T    10: sums of ds
//
// Partial sums of dB and dA, one a cluster, are added in order by lora_finish_kernel.
//
// Bound: reading dy and x (M = 8192, N = K = 4096: 134 MB, 32 us). Shared memory moves a tile in 64
// clocks and feeds it to the tensor cores in 160 (dy) or 80 (x), of 380 that memory takes.
#include <algorithm>

#include "dependent_launch.cuh"
#include "device/numbers.cuh"
#include "device/sm90.cuh"
#include "device/tensor_map.cuh"
#include "device/wgmma_shared.cuh"
#include "lora_wgrad.h"

namespace fastpeft::cuda {

namespace {

constexpr int kCluster = 8, kTokens = 64, kColumns = 64, kRanks = 16;
constexpr int kThreads = 384, kOwned = kTokens / kCluster;  // tokens a block
constexpr int kConsumerWarps = 8;
// Column groups of a warpgroup, dy and x together, 8 registers each: N + K <= 18432.
constexpr int kMaxGroups = 18;
constexpr int kTileBytes = kTokens * kColumns * 2, kNarrowBytes = kRanks * kColumns * 2;
constexpr int kSources = 2 * kCluster, kPartBytes = kOwned * kRanks * 4;
constexpr int kPartsBytes = kSources * kPartBytes;
constexpr int kStages = 14;
// Shared memory: tiles; then s^T, ds^T, parts (two each); barriers; B^T of the block's groups.
constexpr int kSAt = kStages * kTileBytes, kDsAt = kSAt + 2 * kNarrowBytes,
              kPartsAt = kDsAt + 2 * kNarrowBytes, kBarAt = kPartsAt + 2 * kPartsBytes,
              kFactorAt = kBarAt + 1024;
constexpr int shared_bytes(int dy_groups) {
  return kFactorAt + 2 * dy_groups * kNarrowBytes + 1024;
}
static_assert(shared_bytes(kMaxGroups) <= 232448, "shared memory of sm_90");

struct Maps {
  CUtensorMap dy, x;
};

struct Args {
  const void* s;       // [M, R]
  const void* lora_b;  // [N, R]
  void* ds;            // [M, R]
  float* dB;           // [slices, N, 16]
  float* dA;           // [slices, 16, K]
  int64_t M;
  int N, K, R;
  int dy_groups, x_groups;  // of a warpgroup
  int tiles, slices;        // of 64 tokens; clusters
  float scaling;
};

// 16 of the reduction further, in units of 16 bytes: 16 columns, or 16 rows.
constexpr int kAlongRow = 2, kAlongColumn = 128;

// A word into a block's shared memory, counted on that block's barrier.
FASTPEFT_DEVICE void push_word(uint32_t to, uint32_t v, uint32_t bar) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(v),
      "r"(bar)
      : "memory");
}
// An 8x8 matrix of 16-bit units, a row of two units a lane, transposed between the lanes.
FASTPEFT_DEVICE uint32_t transpose_matrix(uint32_t v) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// 64 rows of [rows, R] -> [16 ranks][64] for wgmma, by one warp; zeros where nothing is.
FASTPEFT_DEVICE void place_transposed(uint32_t to, const uint16_t* from, int64_t rows_left, int R) {
  const int lane = threadIdx.x % 32, row = 2 * lane;
  const uint16_t* const at = from + int64_t(row) * R;
  const bool has[2] = {row < rows_left, row + 1 < rows_left};
  uint32_t words[kRanks];  // rank r of both rows
  if (R % 8 == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint4 v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e)
        v[e] = has[e] && 8 * h < R ? __ldg(reinterpret_cast<const uint4*>(at + e * R + 8 * h))
                                   : make_uint4(0, 0, 0, 0);
      const uint32_t first[4] = {v[0].x, v[0].y, v[0].z, v[0].w},
                     second[4] = {v[1].x, v[1].y, v[1].z, v[1].w};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        words[8 * h + 2 * q] = permute_bytes(first[q], second[q], 0x5410);
        words[8 * h + 2 * q + 1] = permute_bytes(first[q], second[q], 0x7632);
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      const uint32_t low = has[0] && r < R ? __ldg(at + r) : 0;
      const uint32_t high = has[1] && r < R ? __ldg(at + R + r) : 0;
      words[r] = low | high << 16;
    }
  }
#pragma unroll
  for (int r = 0; r < kRanks; ++r)
    asm volatile(
        "st.shared.b32 [%0], %1;" ::"r"(to + r * 128 + ((lane / 4 ^ (r & 7)) << 4) + lane % 4 * 4),
        "r"(words[r])
        : "memory");
  fence_async_proxy();
}

// Where things are in shared memory, and the ring of tiles: a stage is warpgroup 0's, the next one
// warpgroup 1's.
struct Shared {
  uint32_t base;
  FASTPEFT_DEVICE uint32_t bar(int i) const { return base + kBarAt + 8 * i; }
  FASTPEFT_DEVICE uint32_t full(int stage) const { return bar(stage); }
  FASTPEFT_DEVICE uint32_t empty(int stage) const { return bar(kStages + stage); }
  FASTPEFT_DEVICE uint32_t s_full(int i) const { return bar(2 * kStages + i); }
  FASTPEFT_DEVICE uint32_t s_empty(int i) const { return bar(2 * kStages + 2 + i); }
  FASTPEFT_DEVICE uint32_t parts_full(int i) const { return bar(2 * kStages + 4 + i); }
  FASTPEFT_DEVICE uint32_t ds_full(int i) const { return bar(2 * kStages + 6 + i); }
  FASTPEFT_DEVICE uint32_t tile(int stage) const { return base + stage * kTileBytes; }
  FASTPEFT_DEVICE uint32_t s(int i) const { return base + kSAt + i * kNarrowBytes; }
  FASTPEFT_DEVICE uint32_t ds(int i) const { return base + kDsAt + i * kNarrowBytes; }
  FASTPEFT_DEVICE uint32_t parts(int i) const { return base + kPartsAt + i * kPartsBytes; }
  FASTPEFT_DEVICE uint32_t factor(int group) const {
    return base + kFactorAt + group * kNarrowBytes;
  }
};
static_assert(8 * (2 * kStages + 8) <= 1024, "barriers");

struct Place {  // of this cluster
  int rank, slice, steps;
  FASTPEFT_DEVICE explicit Place(const Args& a)
      : rank(int(cluster_rank())),
        slice(int(blockIdx.x) / kCluster),
        steps((a.tiles - slice + a.slices - 1) / a.slices) {}
  FASTPEFT_DEVICE int token(const Args& a, int step) const {
    return (slice + step * a.slices) * kTokens;
  }
  // First column of group j of a warpgroup.
  FASTPEFT_DEVICE int column(int j, int warpgroup) const {
    return ((2 * j + warpgroup) * kCluster + rank) * kColumns;
  }
};

// One lane. Tiles in the order of their use; past the last column or token zeros come.
FASTPEFT_DEVICE void load_tiles(const Maps& maps, const Args& a, const Shared& shared,
                                const Place& place) {
  tma_prefetch_map(&maps.dy);
  tma_prefetch_map(&maps.x);
  wait_for_predecessor();
  int stage = 0;
  uint32_t phase = 1;
  const auto load = [&](const CUtensorMap& map, int groups, int token) {
    for (int i = 0; i < 2 * groups; ++i) {
      barrier_wait(shared.empty(stage), phase);
      barrier_expect(shared.full(stage), kTileBytes);
      tma_load_2d(shared.tile(stage), &map, shared.full(stage), place.column(i / 2, i % 2), token);
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
  };
  for (int step = 0; step <= place.steps; ++step) {
    if (step < place.steps) load(maps.dy, a.dy_groups, place.token(a, step));
    if (step > 0) load(maps.x, a.x_groups, place.token(a, step - 1));
  }
}

// One warp: s^T of each step.
FASTPEFT_DEVICE void load_s(const Args& a, const Shared& shared, const Place& place) {
  wait_for_predecessor();
  for (int step = 0; step < place.steps; ++step) {
    const int buffer = step % 2;
    barrier_wait(shared.s_empty(buffer), (step / 2 & 1) ^ 1);
    const int64_t token = place.token(a, step);
    place_transposed(shared.s(buffer), static_cast<const uint16_t*>(a.s) + token * a.R, a.M - token,
                     a.R);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(shared.s_full(buffer));
  }
}

// One warp: ds of the tokens that this block owns. A lane (g, t) has token g, ranks 2t, 2t + 1, 8 +
// 2t, 9 + 2t.
template <class T>
FASTPEFT_DEVICE void add_ds(const Args& a, const Shared& shared, const Place& place) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  wait_for_predecessor();
  for (int step = 0; step < place.steps; ++step) {
    const int buffer = step % 2;
    barrier_wait_cluster(shared.parts_full(buffer), step / 2 & 1);
    if (lane == 0) {
      barrier_expect(shared.parts_full(buffer), kPartsBytes);  // of step + 2
      barrier_expect(shared.ds_full(buffer), kNarrowBytes);
    }
    __syncwarp();
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      float v[4];
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                   : "r"(shared.parts(buffer) + i * kPartBytes + lane * 16)
                   : "memory");
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += v[e];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] *= a.scaling;
    const uint32_t pairs[2] = {pack_pair<T>(sum[0], sum[1]), pack_pair<T>(sum[2], sum[3])};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t word = transpose_matrix(pairs[h]);  // rank 8h + g, tokens 2t, 2t + 1
      const uint32_t to = shared.ds(buffer) + (8 * h + g) * 128 + ((place.rank ^ g) << 4) + 4 * t;
#pragma unroll
      for (int block = 0; block < kCluster; ++block)
        push_word(cluster_address(to, block), word, cluster_address(shared.ds_full(buffer), block));
    }
    const int64_t token = place.token(a, step) + place.rank * kOwned + g;
    if (token >= a.M) continue;
    uint16_t* const out = static_cast<uint16_t*>(a.ds) + token * a.R;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = 8 * (e / 2) + 2 * t + e % 2;
      if (r < a.R) out[r] = uint16_t(pairs[e / 2] >> (16 * (e % 2)));
    }
  }
}

FASTPEFT_DEVICE float number(uint32_t sum) {
  return __uint_as_float(sum);
}

template <class T>
FASTPEFT_DEVICE void consume(const Args& a, const Shared& shared, const Place& place) {
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  wait_for_predecessor();
  for (int j = warp; j < a.dy_groups; j += 4) {
    const int64_t column = place.column(j, warpgroup);
    place_transposed(shared.factor(2 * j + warpgroup),
                     static_cast<const uint16_t*>(a.lora_b) + column * a.R, a.N - column, a.R);
  }
  named_barrier(1 + warpgroup, 128);

  uint32_t acc[kMaxGroups][8] = {};  // float32: dB from the front, dA from the back
  int stage = warpgroup;
  uint32_t phase = 0;
  const auto next = [&] {
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(shared.empty(stage));
    if ((stage += 2) >= kStages) stage -= kStages, phase ^= 1;
  };
  for (int step = 0; step <= place.steps; ++step) {
    if (step < place.steps) {
      const int buffer = step % 2;
      uint32_t ds[8] = {};
      barrier_wait(shared.s_full(buffer), step / 2 & 1);
      const uint64_t s = swizzled_descriptor(shared.s(buffer));
#pragma unroll
      for (int j = 0; j < kMaxGroups; ++j) {
        if (j >= a.dy_groups) break;
        barrier_wait(shared.full(stage), phase);
        const uint64_t tile = swizzled_descriptor(shared.tile(stage)),
                       b = swizzled_descriptor(shared.factor(2 * j + warpgroup));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          WgmmaSS<kRanks>::mma<T>(ds, tile + i * kAlongRow, b + i * kAlongRow, 1);
          WgmmaSS<kRanks>::mma<T, true>(acc[j], tile + i * kAlongColumn, s + i * kAlongRow, 1);
        }
        next();
      }
      if (lane == 0) barrier_arrive(shared.s_empty(buffer));
      // Tokens 16 warp + g, + 8: of the blocks 2 warp, 2 warp + 1. The whole warpgroup is done with
      // ds of step - 2 first: a block that has the parts of one warp may send the next ds.
      named_barrier(1 + warpgroup, 128);
      const uint32_t to =
          shared.parts(buffer) + (2 * place.rank + warpgroup) * kPartBytes + lane * 16;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        push_cluster(cluster_address(to, 2 * warp + h),
                     make_float4(number(ds[2 * h]), number(ds[2 * h + 1]), number(ds[4 + 2 * h]),
                                 number(ds[5 + 2 * h])),
                     cluster_address(shared.parts_full(buffer), 2 * warp + h));
    }
    if (step > 0) {
      const int buffer = (step - 1) % 2;
      barrier_wait_cluster(shared.ds_full(buffer), (step - 1) / 2 & 1);
      fence_async_proxy();
      const uint64_t ds = swizzled_descriptor(shared.ds(buffer));
#pragma unroll
      for (int j = 0; j < kMaxGroups; ++j) {
        if (j >= a.x_groups) break;
        barrier_wait(shared.full(stage), phase);
        const uint64_t tile = swizzled_descriptor(shared.tile(stage));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i)
          WgmmaSS<kRanks>::mma<T, true>(acc[kMaxGroups - 1 - j], tile + i * kAlongColumn,
                                        ds + i * kAlongRow, 1);
        next();
      }
    }
  }

  // A lane's sums: columns g, g + 8 of the warp's 16, ranks 2t, 2t + 1, 8 + 2t, 9 + 2t.
#pragma unroll
  for (int j = 0; j < kMaxGroups; ++j) {
    if (j >= a.dy_groups) break;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = place.column(j, warpgroup) + 16 * warp + 8 * h + g;
      if (n >= a.N) continue;
      float* const to = a.dB + (int64_t(place.slice) * a.N + n) * kRanks + 2 * t;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        *reinterpret_cast<float2*>(to + 8 * e) =
            make_float2(number(acc[j][4 * e + 2 * h]), number(acc[j][4 * e + 2 * h + 1]));
    }
  }
#pragma unroll
  for (int j = 0; j < kMaxGroups; ++j) {
    if (j >= a.x_groups) break;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int k = place.column(j, warpgroup) + 16 * warp + 8 * h + g;
      if (k >= a.K) continue;
      float* const to = a.dA + (int64_t(place.slice) * kRanks + 2 * t) * a.K + k;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        to[int64_t(8 * (e / 2) + e % 2) * a.K] =
            number(acc[kMaxGroups - 1 - j][4 * (e / 2) + 2 * h + e % 2]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    lora_wgrad_sm90_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Args a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  const Shared shared{(shared_address(raw) + 1023u) & ~1023u};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared.full(i), 1);
      barrier_init(shared.empty(i), 4);  // warps of a warpgroup
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.s_full(i), 1);
      barrier_init(shared.s_empty(i), kConsumerWarps);
      barrier_init(shared.parts_full(i), 1);
      barrier_init(shared.ds_full(i), 1);
    }
    barrier_init_fence();
    fence_async_proxy();
    for (int i = 0; i < 2; ++i) barrier_expect(shared.parts_full(i), kPartsBytes);
  }
  cluster_sync();
  launch_dependents();
  const Place place(a);
  const int warp = threadIdx.x / 32;
  if (warp < kConsumerWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    consume<T>(a, shared, place);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (warp == 8 && threadIdx.x % 32 == 0) load_tiles(maps, a, shared, place);
    if (warp == 9) load_s(a, shared, place);
    if (warp == 10) add_ds<T>(a, shared, place);
    __syncwarp();
  }
  cluster_sync();  // no block leaves while another sends to it
#endif
}

int groups_of(int64_t columns) {
  return int(ceil_div<int64_t>(columns, 2 * kCluster * kColumns));
}

}  // namespace

FusedPass fused_pass(const LoraWgradParams& p) {
  FusedPass pass;
#ifdef FASTPEFT_HAS_SM90A
  const DeviceFacts facts = device_facts();
  const int64_t x_columns = p.p > 0.0f ? 0 : p.K;
  if (facts.arch != 90 || p.R > kRanks || groups_of(p.N) + groups_of(x_columns) > kMaxGroups)
    return pass;
  // Clusters of 8 find 14 places on 132 multiprocessors; as many slices as keep the longest short:
  // of 128 tiles 13 slices take 44.4 us at 4096x4096, 14 take 47.1, 16 (two waves) 56.5.
  const int64_t places = std::max(facts.sm_count * 14 / 132, 1),
                tiles = ceil_div<int64_t>(p.M, kTokens);
  pass.slices = int(ceil_div(tiles, ceil_div(tiles, places)));
  pass.has_dA = p.p == 0.0f;
  pass.floats = pass.slices * kRanks * (p.N + x_columns);
#endif
  return pass;
}

void lora_wgrad_sm90(const LoraWgradParams& p, const FusedPass& pass, float* partial_dB,
                     float* partial_dA) {
  Args a;
  a.s = p.s;
  a.lora_b = p.lora_b;
  a.ds = p.ds;
  a.dB = partial_dB;
  a.dA = partial_dA;
  a.M = p.M;
  a.N = int(p.N);
  a.K = int(p.K);
  a.R = int(p.R);
  a.dy_groups = groups_of(p.N);
  a.x_groups = pass.has_dA ? groups_of(p.K) : 0;
  a.tiles = int(ceil_div<int64_t>(p.M, kTokens));
  a.slices = pass.slices;
  a.scaling = p.scaling;
  bind_context();
  Maps maps;
  maps.dy = matrix_map(p.dy, p.N, p.M, kColumns, kTokens);
  maps.x = matrix_map(p.x, p.K, p.M, kColumns, kTokens);
  const auto kernel =
      p.dtype == DType::kBFloat16 ? lora_wgrad_sm90_kernel<bf16> : lora_wgrad_sm90_kernel<fp16>;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes(kMaxGroups));
  launch_kernel(kernel, "lora_wgrad_sm90_kernel", dim3(unsigned(kCluster * pass.slices)), kThreads,
                shared_bytes(a.dy_groups), p.stream, kCluster, maps, a);
}

}  // namespace fastpeft::cuda
