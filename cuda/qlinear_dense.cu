// LoRA over a frozen bf16 weight on Hopper (sm_90a): one GEMM, no pass over y for the branch.
//
//   forward   y [M, N] = x [M, K]  W^T + bias + scaling * s B^T      output rows = n, depth = k
//   dgrad     dx[M, K] = dy[M, N] W    + ds A                        output rows = k, depth = n
//
// W [N, K] row-major, never copied: its tile is wgmma's A operand, depth contiguous forward, output
// rows contiguous in dgrad. x is B. Both come by TMA with the 128-byte swizzle. The factor (B [N,
// R] or A [R, K]) and s are one more block of the depth, the first. Scaling is multiplied onto the
// tile of B in shared memory and rounded there, which is exact for a power of two. Onto the block's
// sums, in float32, it made the tensor cores wait: 12 us of 384 at M = 8192, 4096 x 4096.
//
//      cluster of 2:     block 0: rows   0 .. 127   x tokens 0 .. 255    each block loads half of x
//      256 x 256         block 1: rows 128 .. 255   x tokens 0 .. 255    and sends it to both
//
// A block: warpgroup 0 = producer (one lane), warpgroups 1, 2 = 64 rows x 256 tokens each. Clusters
// stay and take tiles in turn, row tiles in groups of 8 so that x and W are shared in L2.
// Bound: tensor cores; 32 bytes a clock and block from L2 (48 without the multicast, which L2
// cannot give); the card is power-limited at the size of layers. The branch is R / depth of the
// work; as separate passes it costs a write and a read of y at least (M = 8192, 4096 x 4096: 33 us
// of 345).
#include <algorithm>

#include "dependent_launch.cuh"
#include "device/sm90.cuh"
#include "device/tensor_map.cuh"
#include "device/tiles.cuh"
#include "device/wgmma_shared.cuh"
#include "launch.h"
#include "qlinear_dense.h"

namespace fastpeft::cuda {

namespace {

constexpr int kRows = 128, kTokens = 256, kDepth = 64, kStages = 4, kThreads = 384, kGroup = 8;
constexpr int kXBytes = kTokens * kDepth * 2, kWBytes = kRows * kDepth * 2;
constexpr int kWAt = kStages * kXBytes, kOutAt = kWAt + kStages * kWBytes;
constexpr int kOutBytes = 64 * 64 * 2;  // 64 tokens x 64 rows; two for each consumer warpgroup
constexpr int kBarAt = kOutAt + 4 * kOutBytes, kShared = kBarAt + 16 * kStages + 1024;
static_assert(kShared <= 232448, "shared memory of sm_90");

struct Maps {
  CUtensorMap x, w, s, factor, out;
};

struct DenseArgs {
  int tiles_r, tiles_t;  // of 256 x 256
  int blocks;            // of the depth
  int rows, R;
  float scale;                // of B; 1 in dgrad
  const __nv_bfloat16* bias;  // [rows] or null
};

// A operand: depth contiguous as swizzled_descriptor says; rows contiguous: 64 rows are one swizzle
// atom wide, 8 of the depth 1024 bytes: the same numbers.
template <bool kDgrad>
constexpr int kAStep = kDgrad ? 128 : 2;  // 16 of the depth, in units of 16 bytes

struct Tile {
  int row, token;  // first of the cluster's
  FASTPEFT_DEVICE Tile(const DenseArgs& a, int index) {
    const TilePlace place = tile_place<kGroup>(index, a.tiles_r, a.tiles_t);
    row = place.row * 2 * kRows;
    token = place.token * kTokens;
  }
};

template <bool kDgrad>
FASTPEFT_DEVICE void produce(const Maps& maps, const DenseArgs& a, uint32_t base, uint32_t full0,
                             uint32_t empty0) {
  const int rank = int(cluster_rank());
  for (const CUtensorMap* m : {&maps.x, &maps.w, &maps.out}) tma_prefetch_map(m);
  wait_for_predecessor();
  Ring<kStages> ring(1);
  const auto load = [&](const CUtensorMap& x, const CUtensorMap& w, int depth, int row, int token) {
    barrier_wait(empty0 + 8 * ring.stage, ring.phase);
    const uint32_t full = full0 + 8 * ring.stage;
    const uint32_t w_to = base + kWAt + ring.stage * kWBytes;
    barrier_expect(full, kXBytes + kWBytes);
    tma_multicast_2d(base + ring.stage * kXBytes + rank * (kXBytes / 2), &x, full, depth,
                     token + rank * (kTokens / 2), kBoth);
    if (kDgrad) {
      tma_load_2d(w_to, &w, full, row, depth);
      tma_load_2d(w_to + kWBytes / 2, &w, full, row + 64, depth);
    } else {
      tma_load_2d(w_to, &w, full, depth, row);
    }
    ring.advance();
  };
  for (int i = blockIdx.x / 2; i < a.tiles_r * a.tiles_t; i += gridDim.x / 2) {
    const Tile tile(a, i);
    const int row = tile.row + rank * kRows;
    if (a.R > 0) load(maps.s, maps.factor, 0, row, tile.token);
    for (int block = 0; block < a.blocks; ++block)
      load(maps.x, maps.w, block * kDepth, row, tile.token);
  }
}

// A warpgroup's 64 rows of B, 128-byte swizzle, times `scale`.
FASTPEFT_DEVICE void scale_factor(uint32_t tile, int R, float scale) {
  for (int i = threadIdx.x % 128; i < 8 * R; i += 128) {  // 16 bytes each
    const int row = i & 63, piece = i / 64;
    const uint32_t at = tile + row * 128 + ((piece ^ (row & 7)) << 4);
    uint32_t v[4];
    load_shared_u32x4(at, v);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      v[e] = pack_bf16(scale * __uint_as_float(v[e] << 16),
                       scale * __uint_as_float(v[e] & 0xFFFF0000u));
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
  }
  fence_async_proxy();
}

template <bool kDgrad>
FASTPEFT_DEVICE void consume(const Maps& maps, const DenseArgs& a, uint32_t base, uint32_t full0,
                             uint32_t empty0) {
  const int half = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int g = lane / 4, rank = int(cluster_rank());
  const uint32_t out = base + kOutAt + half * 2 * kOutBytes;
  const auto release = [&](int stage) {
    if (lane < 2) barrier_arrive_peer(cluster_address(empty0 + 8 * stage, lane));
  };
  Ring<kStages> ring(0);
  uint32_t acc[kTokens / 2];                         // float32
  const auto multiply = [&](int steps, bool adds) {  // one block of the depth
    barrier_wait(full0 + 8 * ring.stage, ring.phase);
    const uint64_t w =
        swizzled_descriptor(base + kWAt + ring.stage * kWBytes + half * (kWBytes / 2));
    const uint64_t x = swizzled_descriptor(base + ring.stage * kXBytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step)
      if (step < steps)
        WgmmaSS<kTokens>::mma<bf16, kDgrad>(acc, w + step * kAStep<kDgrad>, x + 2 * step,
                                            adds || step > 0);
    wgmma_commit();
  };
  wait_for_predecessor();
  for (int i = blockIdx.x / 2; i < a.tiles_r * a.tiles_t; i += gridDim.x / 2) {
    const Tile tile(a, i);
    int previous = -1;
    if (a.R > 0) {
      if (!kDgrad && a.scale != 1.0f) {
        barrier_wait(full0 + 8 * ring.stage, ring.phase);
        scale_factor(base + kWAt + ring.stage * kWBytes + half * (kWBytes / 2), a.R, a.scale);
        named_barrier(1 + half, 128);
      }
      multiply(ceil_div(a.R, 16), false);
      previous = ring.stage;
      ring.advance();
    }
    for (int block = 0; block < a.blocks; ++block) {
      multiply(kDepth / 16, a.R > 0 || block > 0);
      wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = ring.stage;
      ring.advance();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int e = 0; e < kTokens / 2; ++e) asm volatile("" : "+r"(acc[e])::"memory");
    release(previous);

    // Out, 64 tokens at a time through [token][64 rows] with the 128-byte swizzle, two in turn.
    const int first_row = tile.row + rank * kRows + half * 64, row = first_row + warp * 16 + g;
    float b0 = 0.0f, b1 = 0.0f;
    if (a.bias && row < a.rows) b0 = __bfloat162float(a.bias[row]);
    if (a.bias && row + 8 < a.rows) b1 = __bfloat162float(a.bias[row + 8]);
    const int token = (lane / 16) * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
#pragma unroll
    for (int group = 0; group < kTokens / 64; ++group) {
      const uint32_t to = out + group % 2 * kOutBytes;
      if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
      named_barrier(1 + half, 128);
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // 16 tokens
        const uint32_t* v = acc + (group * 8 + 2 * j) * 4;
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float shift = i % 2 ? b1 : b0;
          words[i] =
              pack_bf16(__uint_as_float(v[2 * i]) + shift, __uint_as_float(v[2 * i + 1]) + shift);
        }
        store_matrices_transposed(to + (16 * j + token) * 128 + ((chunk ^ (token & 7)) << 4),
                                  words);
      }
      fence_async_proxy();
      named_barrier(1 + half, 128);
      if (threadIdx.x % 128 == 0) {
        tma_store_2d(&maps.out, to, first_row, tile.token + group * 64);
        store_commit();
      }
    }
  }
  if (threadIdx.x % 128 == 0) store_wait();
}

template <bool kDgrad>
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_dense_kernel(const __grid_constant__ Maps maps, const DenseArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  const uint32_t base = (shared_address(raw) + 1023u) & ~1023u;
  const uint32_t full0 = base + kBarAt, empty0 = full0 + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full0 + 8 * i, 1);    // the producer's expectation
      barrier_init(empty0 + 8 * i, 16);  // consumer warps of both blocks
    }
    barrier_init_fence();
    fence_async_proxy();
  }
  cluster_sync();
  launch_dependents();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce<kDgrad>(maps, a, base, full0, empty0);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<kDgrad>(maps, a, base, full0, empty0);
  }
  cluster_sync();  // no block leaves while its neighbour still sends to it
#endif
}

// `inner` and `outer`: of the activations [M, inner] and the output [M, outer].
template <bool kDgrad>
void run(DenseArgs a, const WeightView& w, const void* x, const void* s, const void* factor,
         void* out, int64_t M, Stream stream) {
  const int64_t depth = kDgrad ? w.N : w.K, rows = kDgrad ? w.K : w.N;
  FASTPEFT_CHECK(w.N % 8 == 0 && w.K % 8 == 0 && a.R % 8 == 0 && a.R <= kDepth,
                 "qlinear_dense: N = ", w.N, ", K = ", w.K, ", R = ", a.R,
                 ", expected multiples of 8 and R <= 64");
  a.rows = int(rows);
  a.tiles_r = int(ceil_div<int64_t>(rows, 2 * kRows));
  a.tiles_t = int(ceil_div<int64_t>(M, kTokens));
  a.blocks = int(ceil_div<int64_t>(depth, kDepth));
  bind_context();
  Maps maps;
  maps.x = matrix_map(x, depth, M, kDepth, kTokens / 2);
  maps.w = matrix_map(w.codes, w.K, w.N, 64, kDgrad ? 64 : kRows);
  maps.out = matrix_map(out, rows, M, 64, 64);
  maps.s = a.R ? matrix_map(s, a.R, M, kDepth, kTokens / 2) : maps.x;
  maps.factor = !a.R     ? maps.w
                : kDgrad ? matrix_map(factor, rows, a.R, 64, 64)
                         : matrix_map(factor, a.R, rows, 64, kRows);
  const int clusters = std::min(a.tiles_r * a.tiles_t, device_facts().sm_count / 2);
  const auto kernel = qlinear_dense_kernel<kDgrad>;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), kShared);
  launch_kernel(kernel, "qlinear_dense_kernel", dim3(unsigned(2 * clusters)), kThreads, kShared,
                stream, 2, maps, a);
}

}  // namespace

void qlinear_dense_fwd(const QLinearFwdParams& p) {
  DenseArgs a = {};
  a.R = p.s ? int(p.R) : 0;
  a.scale = p.scaling;
  a.bias = static_cast<const __nv_bfloat16*>(p.bias);
  run<false>(a, p.w, p.x, p.s, p.lora_b, p.y, p.M, p.stream);
}

void qlinear_dense_dgrad(const QLinearDgradParams& p) {
  DenseArgs a = {};
  a.R = p.ds ? int(p.R) : 0;
  a.scale = 1.0f;
  run<true>(a, p.w, p.dy, p.ds, p.lora_a, p.dx, p.M, p.stream);
}

}  // namespace fastpeft::cuda
