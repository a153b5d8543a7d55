// The narrow products of LoRA: every token times a factor with few columns.
//
//   s [M, R] = scale * drop(x) F^T      x [M, K], bf16 or fp16; R <= 64; K % 8 == 0
//   F [R, K] (forward: A) or, transposed, [K, R] (backward: ds = scaling * dy B, B [N, R])
//   drop: zero where Philox says so (csrc/core/philox.h); scale carries 1 / (1 - p)
//
//                 K ->   chunks of 64 columns, a warp's in turn
//        +--------+--------+--------+-----            blocks of a cluster share K, warps of a block
//  16 or | warp 0 | warp 1 |  ...   | warp 0 ...      share the block's part; sums are added over
//  64    |        |        |        |                 warps, then over blocks, in order: the same
//  tokens+--------+--------+--------+-----            bits on every run
//
// mma.m16n8k16, tokens as rows. Of half h of a chunk lane (g, t) takes columns 32h + 8t .. + 7 of
// tokens g, g + 8; words 0, 1 of a piece are its k of one step, words 2, 3 of the next, and F is
// taken in the same order: [R, K] as pieces too, [K, R] through ldmatrix.trans.
//
// Bound, many tokens: reading x once (M = 8192, K = 4096: 67 MB, 16 us); F comes from L2, R / 64 of
// the bytes of x with 64 tokens a block. About 70 instructions for 4 KB of x, where memory gives
// 230 clocks. With dropout: 8 x 2 Philox more for these 4 KB, about 300 clocks. Few tokens:
// latency; hence 16 tokens a block and up to 8 blocks a tile.
#include <algorithm>

#include "dependent_launch.cuh"
#include "lora.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kChunk = kTileColumns;
constexpr int kMaxRank = 64, kMaxCluster = 8;

struct Args {
  const void* x;        // [M, K]
  const void* factor;   // [R, K], or [K, R] when transposed
  void* s;              // [M, R]
  const int64_t* seed;  // [1], read with dropout only
  int64_t M;
  int K, R;
  int depth;  // slots of a ring
  uint32_t threshold;
  float scale;
};

__device__ __forceinline__ uint32_t cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
__device__ __forceinline__ uint32_t cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}
// arrive ... wait: every block of the cluster has come to `arrive`, and sees what the others wrote.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// A float to the place `shared` of block `rank` of the cluster.
__device__ __forceinline__ void store_to_rank(uint32_t shared, uint32_t rank, float v) {
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(v) : "memory");
#endif
}

// kTok: tiles of 16 tokens, kRank: tiles of 8 ranks, 1 KB of F each.
constexpr int kFactorTile = 8 * kTileColumns * 2;
template <int kTok, int kRank>
constexpr int slot_bytes() {
  return kTok * kTileSize + kRank * kFactorTile;
}
template <int kTok, int kRank>
constexpr int sum_bytes() {
  return 16 * kTok * 8 * kRank * 4;
}

// Rows of F [R, K] in a tile of 8 ranks.
__device__ __forceinline__ uint32_t factor_place(int row, int piece) {
  return uint32_t(row * 8 + (piece ^ (4 * (row & 1)))) * kPieceBytes;
}
// Offset of ranks 8j .. 8j+7 in row `place`: eight rows of a matrix meet eight different bank
// groups.
template <int kRank>
__device__ __forceinline__ uint32_t transposed_offset(int place, int j) {
  return uint32_t(place * kRank + (j ^ (place / (8 / kRank) % kRank))) * kPieceBytes;
}

// Copies a chunk of x and of F. Where a token, column or rank does not exist zeros come, and the
// address is not read.
template <int kTok, int kRank, bool kTransposed>
struct Feeder {
  const char *x, *factor;    // this lane's: row lane / 8, piece lane % 8 of the tile
  int64_t x_rows4, f_rows4;  // bytes between rows 4 apart
  int tokens_left;           // from row lane / 8 on
  uint32_t to;

  __device__ __forceinline__ void start(const Args& a, int64_t m0, int lane) {
    const int row = lane / 8, piece = lane % 8;
    x = static_cast<const char*>(a.x) + ((m0 + row) * a.K + 8 * piece) * 2;
    factor = static_cast<const char*>(a.factor) + (int64_t(row) * a.K + 8 * piece) * 2;
    x_rows4 = f_rows4 = int64_t(a.K) * 8;
    tokens_left = int(min(a.M - m0, int64_t(16 * kTok))) - row;
    to = tile_place(row, piece);
  }

  __device__ __forceinline__ void copy(const Args& a, uint32_t slot, int k0, int lane) const {
    const bool is_inside = k0 + 8 * (lane % 8) < a.K;
    const int left = is_inside ? tokens_left : 0;
    const char* from = x + 2 * k0;
#pragma unroll
    for (int i = 0; i < 4 * kTok; ++i) {
      copy_async16(slot + to + i * 512, from, left > 4 * i ? 16 : 0);
      from += x_rows4;
    }
    const uint32_t factor_slot = slot + kTok * kTileSize;
    if constexpr (kTransposed)
      copy_columns(a, factor_slot, k0, lane);
    else
      copy_rows(a, factor_slot, k0, lane, is_inside ? a.R - lane / 8 : 0);
  }

  __device__ __forceinline__ void copy_rows(const Args& a, uint32_t slot, int k0, int lane,
                                            int left) const {
    const char* from = factor + 2 * k0;
    const uint32_t at = slot + factor_place(lane / 8, lane % 8);
#pragma unroll
    for (int i = 0; i < 2 * kRank; ++i) {  // rows 4 apart have the same parity
      copy_async16(at + i * 4 * 128, from, left > 4 * i ? 16 : 0);
      from += f_rows4;
    }
  }

  __device__ __forceinline__ void copy_columns(const Args& a, uint32_t slot, int k0,
                                               int lane) const {
#pragma unroll
    for (int i = 0; i < 2 * kRank; ++i) {
      const int piece = i * 32 + lane, k = piece / kRank, j = piece % kRank;
      const uint32_t to =
          slot + k / 32 * (kRank * kFactorTile / 2) + transposed_offset<kRank>(place_of(k % 32), j);
      const int64_t at = int64_t(k0 + k) * a.R + 8 * j;
      const uint16_t* from = static_cast<const uint16_t*>(a.factor) + at;
      if (a.R % 8 == 0) {
        copy_async16(to, from, k0 + k < a.K && 8 * j < a.R ? 16 : 0);
      } else {
        for (int e = 0; e < 8; ++e)
          store_shared2(to + 2 * e, k0 + k < a.K && 8 * j + e < a.R ? from[e] : uint16_t(0));
      }
    }
  }
};

template <class T, int kTok, int kRank, bool kTransposed, bool kDrop>
__global__ void __launch_bounds__(kThreads, kRank* kTok <= 8 ? 2 : 1)
    lora_shrink_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int ranks = int(cluster_size()), rank = int(cluster_rank());
  const int64_t m0 = int64_t(blockIdx.x / ranks) * (16 * kTok);
  constexpr int kSlot = slot_bytes<kTok, kRank>(), kWidth = 8 * kRank;
  const uint32_t ring = shared_address(shared) + warp * a.depth * kSlot;
  if (ranks > 1) cluster_arrive();  // nobody writes to a block that has not begun
  const int chunks = ceil_div(a.K, kChunk), stride = kWarps * ranks;
  int next = rank * kWarps + warp;

  launch_dependents();
  wait_for_predecessor();
  Feeder<kTok, kRank, kTransposed> feeder;
  feeder.start(a, m0, lane);
  const auto issue = [&](uint32_t slot) {
    if (next < chunks) feeder.copy(a, slot, next * kChunk, lane);
    next += stride;
    commit_copies();
  };
  for (int i = 0; i < a.depth; ++i) issue(ring + i * kSlot);
  const uint64_t seed = kDrop ? uint64_t(*a.seed) : 0;
  const uint32_t x_at[2] = {tile_place(g, t), tile_place(g, 4 + t)};
  const uint32_t f_at = kTok * kTileSize;

  float acc[kTok][kRank][4] = {};
  uint32_t slot = ring;
  for (int chunk = rank * kWarps + warp; chunk < chunks; chunk += stride) {
    wait_copies_but(a.depth - 1);
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint4 f[kRank];
#pragma unroll
      for (int j = 0; j < kRank; ++j) {
        if constexpr (kTransposed)
          f[j] = load_matrices_transposed(slot + f_at + h * (kRank * kFactorTile / 2) +
                                          transposed_offset<kRank>(lane, j));
        else
          f[j] = load_shared16(slot + f_at + j * kFactorTile + factor_place(g, 4 * h + t));
      }
#pragma unroll
      for (int m = 0; m < kTok; ++m) {
        uint4 low = load_shared16(slot + m * kTileSize + x_at[h]);
        uint4 high = load_shared16(slot + m * kTileSize + 1024 + x_at[h]);
        if constexpr (kDrop) {
          const int64_t element = (m0 + 16 * m + g) * a.K + chunk * kChunk + 32 * h + 8 * t;
          low = drop_piece(low, seed, a.threshold, element);
          high = drop_piece(high, seed, a.threshold, element + 8 * int64_t(a.K));
        }
        const uint32_t steps[2][4] = {{low.x, high.x, low.y, high.y},
                                      {low.z, high.z, low.w, high.w}};
#pragma unroll
        for (int j = 0; j < kRank; ++j) {
          mma_16x8x16<T>(acc[m][j], steps[0], f[j].x, f[j].y);
          mma_16x8x16<T>(acc[m][j], steps[1], f[j].z, f[j].w);
        }
      }
    }
    __syncwarp();
    issue(slot);
    slot = slot == ring + (a.depth - 1) * kSlot ? ring : slot + kSlot;
  }
  wait_copies<0>();

  // Sums over the warps, in the place of the rings; each goes to the block that adds it over the
  // ranks.
  constexpr int kSums = kTok * 16 * kWidth;
  static_assert((kSums & (kSums - 1)) == 0, "shares are powers of two");
  static_assert(kSums * 4 <= kSlot, "the sums of a warp fit into a slot of its ring");
  const int share = kSums / ranks, share_bits = __ffs(share) - 1;
  float* const parts = reinterpret_cast<float*>(shared);  // [warps][kSums]
  float* const sums =
      reinterpret_cast<float*>(shared + kWarps * a.depth * kSlot);  // [ranks][share]
  // Column c of row m: rows that a store meets together fall into different banks.
  const auto place = [](int m, int c) {
    return m * kWidth + (c ^ (kWidth == 16 ? 8 * (m >> 1 & 1) : 8 * (m & 3)));
  };
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kTok; ++m)
#pragma unroll
    for (int j = 0; j < kRank; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        *reinterpret_cast<float2*>(parts + warp * kSums +
                                   place(16 * m + g + 8 * e, 8 * j + 2 * t)) =
            make_float2(acc[m][j][2 * e], acc[m][j][2 * e + 1]);
  if (ranks > 1) cluster_wait();
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < kSums; i += kThreads) {
    const float* const part = parts + place(i / kWidth, i % kWidth);
    float sum = part[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += part[w * kSums];
    if (ranks > 1)
      store_to_rank(shared_address(sums + rank * share + (i & (share - 1))), i >> share_bits, sum);
    else
      sums[i] = sum;
  }
  if (ranks > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  for (int i = threadIdx.x; i < share; i += kThreads) {
    const int at = rank * share + i, r = at % kWidth;
    const int64_t m = m0 + at / kWidth;
    if (m >= a.M || r >= a.R) continue;
    float sum = sums[i];
    for (int c = 1; c < ranks; ++c) sum += sums[c * share + i];
    static_cast<T*>(a.s)[m * a.R + r] = from_acc<T>(a.scale * sum);
  }
}

// The instances for one size of tile.
struct Config {
  void (*plain)(Args);
  void (*dropping)(Args);
  void (*transposed)(Args);
  int tokens, ranks, slot, sums;  // of a tile; bytes
};
template <class T, int kTok, int kRank>
constexpr Config config_of() {
  return {lora_shrink_kernel<T, kTok, kRank, false, false>,
          lora_shrink_kernel<T, kTok, kRank, false, true>,
          lora_shrink_kernel<T, kTok, kRank, true, false>,
          16 * kTok,
          8 * kRank,
          slot_bytes<kTok, kRank>(),
          sum_bytes<kTok, kRank>()};
}
template <class T>
constexpr Config kConfigs[] = {config_of<T, 1, 2>(), config_of<T, 4, 2>(), config_of<T, 1, 8>(),
                               config_of<T, 2, 8>(), config_of<T, 4, 8>()};

template <class T>
const Config& pick(int tokens, int64_t R) {
  const Config* config = kConfigs<T>;
  while (config->tokens != tokens || config->ranks < R) ++config;
  return *config;
}

// Tokens a tile: 64 (F is read M / 64 times) once eight blocks a tile fill most of the device. With
// R > 16 that takes a whole multiprocessor, so it waits until tiles alone fill them.
int tile_tokens(int64_t M, bool is_high, const DeviceFacts& facts) {
  const auto fill = [&](int tokens, int blocks) {
    return ceil_div<int64_t>(M, tokens) * blocks * 4 >= 3 * facts.sm_count;
  };
  if (!is_high) return fill(64, kMaxCluster) ? 64 : 16;
  const bool fits_64 = facts.shared_bytes >= kWarps * slot_bytes<4, 8>() + sum_bytes<4, 8>();
  const bool fits_32 = facts.shared_bytes >= kWarps * slot_bytes<2, 8>() + sum_bytes<2, 8>();
  return fits_64 && fill(64, 1) ? 64 : fits_32 && fill(32, kMaxCluster) ? 32 : 16;
}

}  // namespace

void lora_shrink(const LoraShrinkParams& p) {
  if (p.M == 0) return;
  const bool is_bf16 = p.dtype == DType::kBFloat16, drops = p.p > 0.0f;
  FASTPEFT_CHECK(is_bf16 || p.dtype == DType::kFloat16, "lora_shrink: ", dtype_name(p.dtype),
                 ", expected bfloat16 or float16");
  FASTPEFT_CHECK(p.R > 0 && p.R <= kMaxRank && p.K % 8 == 0 && p.K < (1 << 24),
                 "lora_shrink: R = ", p.R, ", K = ", p.K, ", expected R <= 64, K % 8 == 0");
  FASTPEFT_CHECK(is_aligned(p.x, 16) && is_aligned(p.factor, 16),
                 "lora_shrink: x and the factor must start at multiples of 16 bytes");
  FASTPEFT_CHECK(!(p.is_transposed && drops), "lora_shrink: no dropout with a transposed factor");
  const DeviceFacts facts = device_facts();
  const bool is_high = p.R > 16;
  const int tokens = tile_tokens(p.M, is_high, facts);
  const Config& config = is_bf16 ? pick<bf16>(tokens, p.R) : pick<fp16>(tokens, p.R);
  const auto kernel = p.is_transposed ? config.transposed : drops ? config.dropping : config.plain;
  const int64_t tiles = ceil_div(p.M, int64_t(config.tokens)),
                chunks = ceil_div<int64_t>(p.K, kChunk);
  const int slots = kWarps * config.slot, half = facts.shared_bytes / 2 - 1024;
  // Two blocks a multiprocessor where that is possible with a cluster of 4 or 8 (at one, not all
  // multiprocessors are reached: 30 clusters of 4, not 33) and with dropout (Philox wants warps).
  const bool fits_twice = half >= slots + config.sums;
  const int64_t places =
      fits_twice ? int64_t(facts.sm_count) * (drops ? 2 : 1) : int64_t(facts.sm_count) * 3 / 4;
  int cluster = 1;
  while (facts.arch >= 90 && cluster < kMaxCluster && tiles * cluster * 2 <= places &&
         cluster * kWarps < chunks)
    cluster *= 2;
  const int room = fits_twice && (cluster > 2 || drops) ? half : facts.shared_bytes;
  const int64_t wanted = ceil_div<int64_t>(chunks, cluster * kWarps);
  Args a;
  a.x = p.x;
  a.factor = p.factor;
  a.s = p.s;
  a.seed = p.seed;
  a.M = p.M;
  a.K = int(p.K);
  a.R = int(p.R);
  a.threshold = drop_threshold(p.p);
  a.scale = p.scale / (1.0f - p.p);
  a.depth = int(std::min<int64_t>({4, (room - config.sums) / slots, wanted}));
  const int bytes = a.depth * slots + config.sums;
  FASTPEFT_CHECK(a.depth >= 1, "lora_shrink: ", bytes, " bytes of shared memory a block");
  allow_shared_memory(reinterpret_cast<const void*>(kernel), facts.shared_bytes);
  launch_kernel(kernel, "lora_shrink_kernel", dim3(grid_blocks(tiles * cluster, 1)), kThreads,
                bytes, p.stream, cluster, a);
}

}  // namespace fastpeft::cuda
