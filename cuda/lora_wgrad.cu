// Gradients of the LoRA factors, bf16 or fp16, R <= 64, N % 8 == K % 8 == 0.
//
//   ds [M, R] = scaling * dy B      dB [N, R] = scaling * dy^T s      dA [R, K] = ds^T drop(x)
//
// dA and dB are sums over tokens: G [R, C] = P^T Z with P [M, R] and Z [M, C] (Z = x or dy).
//
//        C ->  256 columns a block, 64 a warp       mma.m16n8k16, ranks as rows, tokens as k.
//      +----------+----------+--                    Lane (g, t) takes columns 8g .. 8g+7 of tokens
//   M  | block    | block    |      slice 0         4t .. 4t+3: words of two tokens, halves swapped
//   |  |  w0 .. w3|          |                      by PRMT, are the B operands of 8 tiles; the
//   same v  |  w4 .. w7|          |                      of P the A operand. Rows g, g + 8 of rank
//   tile q
//      +----------+----------+--                    are ranks 2g, 2g + 1 (R > 16: 8g + 2q, + 1).
//      |          |          |      slice 1
//
// Warps 0 .. 3 take the even 16 tokens of a slice, 4 .. 7 the odd ones. Sums: over tokens in a
// warp, then the two warps, then (lora_finish_kernel) the slices, always in this order.
// Bound: reading Z once; P again for every 64 columns from L2 (R / 64 of the bytes of Z); about 70
// instructions for 2 KB, where memory gives 460 issue slots. dA and dB share a launch; with many
// tokens and R <= 16 ds and dB come from one pass over dy instead (lora_dy.cu), on sm_90a with dA
// in it (lora_wgrad_sm90.cu).
#include "dependent_launch.cuh"
#include "lora.cuh"
#include "lora_wgrad.h"

namespace fastpeft::cuda {

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kColumnWarps = 4, kGroups = kWarps / kColumnWarps;
constexpr int kWarpColumns = 64, kBlockColumns = kColumnWarps * kWarpColumns;
constexpr int kMaxRank = 64;
constexpr int kSumStride = kBlockColumns + 1;  // odd: columns as rows of dB meet different banks

// One of dB, dA. slices > 1: `partial` [slices, C, Rp] (dB) or [slices, Rp, C] (dA), Rp = 8 kRank.
struct Product {
  const void* z;  // [M, C]
  const void* p;  // [M, R]
  void* out;      // dB [C, R], dA [R, C]
  float* partial;
  int C, column_blocks;
  float scale;
  bool is_dA, drops;
};

struct Args {
  Product dB, dA;
  const int64_t* seed;  // [1]
  int64_t M;
  int R, slices, tokens, depth;  // tokens a slice
  uint32_t threshold;
  bool is_float;  // out
};

// 16 tokens: 64 columns of Z, all ranks of P.
template <int kRank>
constexpr int slot_bytes() {
  return kTileSize + 16 * 8 * kRank * 2;
}

// P of this lane's tokens t, t + 4, ...: ranks 2g, 2g+1 (kTiles = 1) or 8g .. 8g+7. Past the last
// rank whatever stands there: those sums are dropped.
template <int kTiles>
__device__ __forceinline__ void load_ranks(uint32_t from, int R, int g, int t,
                                           uint32_t (&p)[4][kTiles]) {
  constexpr int kHeld = kTiles == 1 ? 2 : 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t at = from + uint32_t((t + 4 * i) * R + kHeld * g) * 2;
    if (R % kHeld != 0) {
#pragma unroll
      for (int q = 0; q < kTiles; ++q)
        p[i][q] = load_shared2(at + 4 * q) | load_shared2(at + 4 * q + 2) << 16;
    } else if constexpr (kTiles == 1) {
      p[i][0] = load_shared4(at);
    } else {
      const uint4 words = load_shared16(R == 64 ? at ^ (32 * t) : at);
#pragma unroll
      for (int q = 0; q < kTiles; ++q) p[i][q] = word_of(words, q);
    }
  }
}

template <class T>
__device__ __forceinline__ void store(const Args& a, void* out, int64_t at, float value) {
  if (a.is_float)
    static_cast<float*>(out)[at] = value;
  else
    static_cast<T*>(out)[at] = from_acc<T>(value);
}

// Where rank r, column c of a block's sums stands in shared memory. Lanes g write ranks 8g.. with R
// > 16: eight times an odd stride alone would meet four banks.
template <int kRank>
__device__ __forceinline__ int sum_place(int r, int c) {
  return r * kSumStride + (kRank == 2 ? c : c ^ (r >> 3));
}

// The block's sums [8 kRank ranks][256 columns] from shared memory to where they belong.
template <class T, int kRank>
__device__ __forceinline__ void store_sums(const Args& a, const Product& product, int slice,
                                           int first_column, const float* sums) {
  constexpr int kWidth = 8 * kRank;
  const bool is_final = a.slices == 1;
  const int columns = min(kBlockColumns, product.C - first_column);
  float* const partial = product.partial + int64_t(slice) * kWidth * product.C;
#pragma unroll 8
  for (int i = threadIdx.x; i < kWidth * kBlockColumns; i += kThreads) {
    const int r = product.is_dA ? i / kBlockColumns : i % kWidth;
    const int c = product.is_dA ? i % kBlockColumns : i / kWidth;
    if (c >= columns) continue;
    const float sum = sums[sum_place<kRank>(r, c)];
    const int64_t column = first_column + c;
    if (!is_final)
      partial[product.is_dA ? int64_t(r) * product.C + column : column * kWidth + r] = sum;
    else if (r < a.R)
      store<T>(a, product.out, product.is_dA ? int64_t(r) * product.C + column : column * a.R + r,
               product.scale * sum);
  }
}

template <class T, int kRank, bool kDrop>
__global__ void __launch_bounds__(kThreads, kRank == 2 ? 2 : 1)
    lora_wgrad_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kTiles = kRank / 2, kSlot = slot_bytes<kRank>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const bool is_dA = int(blockIdx.x) >= a.dB.column_blocks;
  const Product& product = is_dA ? a.dA : a.dB;
  const int block = int(blockIdx.x) - (is_dA ? a.dB.column_blocks : 0);
  const int first_column = block * kBlockColumns + warp % kColumnWarps * kWarpColumns;
  const int64_t m_begin = int64_t(blockIdx.y) * a.tokens + 16 * (warp / kColumnWarps);
  const int64_t m_end = min(a.M, int64_t(blockIdx.y + 1) * a.tokens);
  const uint32_t ring = shared_address(shared) + warp * a.depth * kSlot;

  launch_dependents();
  wait_for_predecessor();
  // Copies: row 4i + lane / 8 of 16 tokens, piece lane % 8; then of those kGroups * 16 further.
  // Where a token or column does not exist, zeros come and the address is not read.
  const int copied_column = first_column + 8 * (lane % 8);
  const int64_t z_rows4 = int64_t(product.C) * 8,
                p_step = 16 * kGroups * 2 * int64_t(a.R);  // bytes
  const char* z_from =
      static_cast<const char*>(product.z) + ((m_begin + lane / 8) * product.C + copied_column) * 2;
  const char* p_from = static_cast<const char*>(product.p) + m_begin * a.R * 2;
  int64_t p_left = (m_end - m_begin) * a.R * 2;
  int tokens_left =
      copied_column < product.C ? int(max(m_end - m_begin, int64_t(0))) - lane / 8 : 0;
  const uint32_t to = tile_place(lane / 8, lane % 8), z_at = tile_place(t, g);
  const auto issue = [&](uint32_t slot) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_async16(slot + to + i * 512, z_from, tokens_left > 4 * i ? 16 : 0);
      z_from += z_rows4;
    }
    copy_rank_rows<8 * kRank>(slot + kTileSize, p_from, a.R, p_left, lane);
    commit_copies();
    z_from += (4 * kGroups - 4) * z_rows4;
    tokens_left -= 16 * kGroups;
    p_from += p_step;
    p_left -= p_step;
  };
  for (int i = 0; i < a.depth; ++i) issue(ring + i * kSlot);
  const uint64_t seed = kDrop ? uint64_t(*a.seed) : 0;

  float acc[kTiles][8][4] = {};
  uint32_t slot = ring;
  for (int64_t m = m_begin; m < m_end; m += 16 * kGroups) {
    wait_copies_but(a.depth - 1);
    __syncwarp();
    uint4 z[4];
    uint32_t p[4][kTiles];
#pragma unroll
    for (int i = 0; i < 4; ++i) z[i] = load_shared16(slot + z_at + i * 512);
    load_ranks<kTiles>(slot + kTileSize, a.R, g, t, p);
    __syncwarp();
    issue(slot);
    slot = slot == ring + (a.depth - 1) * kSlot ? ring : slot + kSlot;
    if constexpr (kDrop) {
      if (product.drops) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          z[i] = drop_piece(z[i], seed, a.threshold,
                            (m + t + 4 * i) * product.C + first_column + 8 * g);
      }
    }
#pragma unroll
    for (int q = 0; q < kTiles; ++q) {
      const uint32_t rows[4] = {low_pair(p[0][q], p[1][q]), high_pair(p[0][q], p[1][q]),
                                low_pair(p[2][q], p[3][q]), high_pair(p[2][q], p[3][q])};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t z0 = word_of(z[0], w), z1 = word_of(z[1], w), z2 = word_of(z[2], w),
                       z3 = word_of(z[3], w);
        mma_16x8x16<T>(acc[q][2 * w], rows, low_pair(z0, z1), low_pair(z2, z3));
        mma_16x8x16<T>(acc[q][2 * w + 1], rows, high_pair(z0, z1), high_pair(z2, z3));
      }
    }
  }
  wait_copies<0>();

  // The sums of the first token group, then the second's on top, then out: whole lines at a time.
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    __syncthreads();
    if (warp / kColumnWarps != group) continue;
    const int first = warp % kColumnWarps * kWarpColumns + 16 * t;
#pragma unroll
    for (int q = 0; q < kTiles; ++q)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {  // c / 2: rank, c % 2: column
          const int r = (kRank == 2 ? 2 * g : 8 * g + 2 * q) + c / 2;
          float* const at = sums + sum_place<kRank>(r, first + 8 * (c % 2) + j);
          *at = group == 0 ? acc[q][j][c] : *at + acc[q][j][c];
        }
  }
  __syncthreads();
  store_sums<T, kRank>(a, product, int(blockIdx.y), block * kBlockColumns, sums);
}

// out [rows, columns] = scale * sum of `slices` partial sums [rows, width], in their order.
struct Finish {
  const float* partial;
  void* out;
  int64_t rows, stride;  // floats between slices
  int slices, columns, width;
  float scale;
  bool is_float;
};
struct FinishArgs {
  Finish jobs[2];
  unsigned first_blocks;  // of jobs[0]
};
constexpr int kAtOnce = 32;  // slices whose loads are under way together

// 0 unless `exists`. Volatile, the test inside: otherwise the compiler has one load under way at a
// time.
__device__ __forceinline__ float load_if(const float* p, bool exists) {
  float v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.f32 %0, 0f00000000;\n"
      "@p ld.global.f32 %0, [%1];\n}\n"
      : "=f"(v)
      : "l"(p), "r"(int(exists)));
  return v;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    lora_finish_kernel(const __grid_constant__ FinishArgs a) {
  launch_dependents();
  const bool is_second = blockIdx.x >= a.first_blocks;
  const Finish& job = a.jobs[is_second];
  const int64_t at =
      int64_t(blockIdx.x - (is_second ? a.first_blocks : 0)) * kThreads + threadIdx.x;
  const int64_t row = at / job.width;
  const int column = int(at - row * job.width);
  wait_for_predecessor();
  if (row >= job.rows || column >= job.columns) return;
  float sum = 0.0f;
  for (int first = 0; first < job.slices; first += kAtOnce) {
    float part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      part[i] = load_if(job.partial + at + (first + i) * job.stride, first + i < job.slices);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += part[i];
  }
  const int64_t to = row * job.columns + column;
  if (job.is_float)
    static_cast<float*>(job.out)[to] = job.scale * sum;
  else
    static_cast<T*>(job.out)[to] = from_acc<T>(job.scale * sum);
}

void finish(const LoraWgradParams& p, const Finish& first, const Finish& second) {
  FinishArgs a;
  a.jobs[0] = first;
  a.jobs[1] = second;
  const auto blocks = [](const Finish& job) {
    return job.rows ? grid_blocks(job.rows * job.width, kThreads) : 0u;
  };
  a.first_blocks = blocks(first);
  const dim3 grid(a.first_blocks + blocks(second));
  const auto kernel =
      p.dtype == DType::kBFloat16 ? lora_finish_kernel<bf16> : lora_finish_kernel<fp16>;
  launch_kernel(kernel, "lora_finish_kernel", grid, kThreads, 0, p.stream, 1, a);
}

// How dA (and dB, unless dy_pass() makes it) is cut.
struct Split {
  int width, slices, tokens;  // ranks with padding; slices over M; tokens a slice
  FusedPass fused;            // ds, dB and dA, or
  bool uses_dy_pass;          // ds and dB, or neither
  DyPass dy;
  int64_t partial_floats;  // of dA and dB by lora_wgrad_kernel

  int64_t floats() const { return partial_floats + fused.floats + dy.ds_floats + dy.dB_floats; }
};

// One pass over dy pays where its time is the memory's; below, launches count: ds, then dA and dB
// in one. H200, us, one pass / three: 4096x4096 M = 128 10.7 / 9.0, 256 10.8 / 12.3, 1024 12.8 /
// 18.6; 14336x4096 M = 128 18.4 / 11.3, 512 19.8 / 24.4.
bool fused_pays(const LoraWgradParams& p) {
  return p.M >= (p.N + p.K <= 8192 ? 256 : 512);
}
constexpr int64_t kDyPassTokens = 2048;

// Slices over M: whole waves of blocks, against partial sums of 4 bytes, written and read, a rank,
// column and slice beside the M * 2 bytes of a column.
int64_t best_slices(int64_t M, int64_t blocks, int width) {
  const int64_t places = int64_t(device_facts().sm_count) * (width > 16 ? 1 : 2);
  const int64_t most = std::min<int64_t>(ceil_div<int64_t>(M, 64), 32);
  int64_t best = 1;
  double least = HUGE_VAL;
  for (int64_t slices = 1; slices <= most; ++slices) {
    const double waves = double(ceil_div(blocks * slices, places)) / double(slices);
    const double cost = waves * (1.0 + (slices > 1 ? 4.0 * width * slices / double(M) : 0.0));
    if (cost < least) least = cost, best = slices;
  }
  return best;
}

Split split_of(const LoraWgradParams& p) {
  Split split = {};
  split.width = p.R > 16 ? 64 : 16;
  if (fused_pays(p)) split.fused = fused_pass(p);
  if (split.fused.has_dA) return split;
  split.uses_dy_pass = !split.fused.slices && p.R <= 16 && p.R % 2 == 0 && p.M >= kDyPassTokens;
  if (split.uses_dy_pass) split.dy = dy_pass(p);
  const bool has_dB = !split.fused.slices && !split.uses_dy_pass;
  const int64_t columns = p.K + (has_dB ? p.N : 0);
  const int64_t blocks =
      ceil_div<int64_t>(p.K, kBlockColumns) + (has_dB ? ceil_div<int64_t>(p.N, kBlockColumns) : 0);
  const int64_t slices = best_slices(p.M, blocks, split.width);
  split.tokens = int(round_up<int64_t>(ceil_div<int64_t>(p.M, slices), 32));
  split.slices = int(ceil_div<int64_t>(p.M, split.tokens));
  split.partial_floats = split.slices > 1 ? split.slices * split.width * columns : 0;
  return split;
}

template <class T>
void launch_wgrad(const LoraWgradParams& p, const Args& a, int columns) {
  const bool is_high = p.R > 16, drops = p.p > 0.0f;
  const auto kernel =
      is_high ? (drops ? lora_wgrad_kernel<T, 8, true> : lora_wgrad_kernel<T, 8, false>)
              : (drops ? lora_wgrad_kernel<T, 2, true> : lora_wgrad_kernel<T, 2, false>);
  const int bytes = kWarps * a.depth * (is_high ? slot_bytes<8>() : slot_bytes<2>());
  allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
  launch_kernel(kernel, "lora_wgrad_kernel", dim3(unsigned(columns), unsigned(a.slices)), kThreads,
                bytes, p.stream, 1, a);
}

void check_wgrad(const LoraWgradParams& p) {
  FASTPEFT_CHECK(is_16bit(p.dtype), "lora_wgrad: ", dtype_name(p.dtype),
                 ", expected bfloat16 or float16");
  FASTPEFT_CHECK(p.R > 0 && p.R <= kMaxRank && p.K % 8 == 0 && p.N % 8 == 0 && p.K < (1 << 24) &&
                     p.N < (1 << 24) && p.M > 0,
                 "lora_wgrad: M = ", p.M, ", R = ", p.R, ", N = ", p.N, ", K = ", p.K,
                 ", expected R <= 64, N % 8 == 0, K % 8 == 0");
  for (const void* pointer : {p.x, p.dy, p.s, p.lora_b, static_cast<const void*>(p.ds)})
    FASTPEFT_CHECK(is_aligned(pointer, 16),
                   "lora_wgrad: a tensor must start at a multiple of 16 bytes");
}

// ds on its own.
void shrink_dy(const LoraWgradParams& p) {
  LoraShrinkParams shrink;
  shrink.M = p.M;
  shrink.K = p.N;
  shrink.R = p.R;
  shrink.dtype = p.dtype;
  shrink.x = p.dy;
  shrink.factor = p.lora_b;
  shrink.is_transposed = true;
  shrink.scale = p.scaling;
  shrink.s = p.ds;
  shrink.stream = p.stream;
  lora_shrink(shrink);
}

}  // namespace

int64_t lora_wgrad_workspace(const LoraWgradParams& p) {
  return p.M == 0 ? 0 : 4 * split_of(p).floats();
}

void lora_wgrad(const LoraWgradParams& p) {
  check_wgrad(p);
  const Split split = split_of(p);
  const bool is_float = p.grad_dtype == DType::kFloat32;
  Finish none = {};
  Finish dA = {nullptr,      p.dA,     p.R,      int64_t(split.width) * p.K,
               split.slices, int(p.K), int(p.K), 1.0f / (1.0f - p.p),
               is_float};
  Finish dB = {nullptr,  p.dB,        p.N,       p.N * split.width, split.slices,
               int(p.R), split.width, p.scaling, is_float};
  float* const partial_dA = static_cast<float*>(p.workspace);
  float* const behind = partial_dA + split.partial_floats;
  float* const partial_dB = partial_dA + (split.slices > 1 ? split.slices * dA.stride : 0);
  dA.partial = partial_dA;
  dB.partial = partial_dB;
  bool has_dB = false;
  if (split.fused.slices) {
    dB.partial = behind;
    dB.slices = split.fused.slices;
    float* const fused_dA = behind + split.fused.slices * dB.stride;
    lora_wgrad_sm90(p, split.fused, behind, fused_dA);
    if (split.fused.has_dA) {
      dA.partial = fused_dA;
      dA.slices = split.fused.slices;
      finish(p, dA, dB);
      return;
    }
  } else if (split.uses_dy_pass) {
    const Finish ds = {behind,   p.ds, p.M,       p.M * 16, split.dy.column_blocks,
                       int(p.R), 16,   p.scaling, false};
    dB.partial = behind + split.dy.ds_floats;
    dB.slices = split.dy.slices;
    lora_dy(p, split.dy, behind, behind + split.dy.ds_floats);
    finish(p, ds, dB);
  } else {
    shrink_dy(p);
    has_dB = true;
  }
  Args a = {};
  a.dB = {p.dy, p.s, p.dB, partial_dB, int(p.N), 0, p.scaling, false, false};
  a.dA = {p.x, p.ds, p.dA, partial_dA, int(p.K), 0, dA.scale, true, p.p > 0.0f};
  if (has_dB) a.dB.column_blocks = ceil_div(a.dB.C, kBlockColumns);
  a.dA.column_blocks = ceil_div(a.dA.C, kBlockColumns);
  a.seed = p.seed;
  a.M = p.M;
  a.R = int(p.R);
  a.slices = split.slices;
  a.tokens = split.tokens;
  a.threshold = drop_threshold(p.p);
  a.is_float = is_float;
  a.depth = p.R > 16 && device_facts().shared_bytes < kWarps * 4 * slot_bytes<8>() ? 3 : 4;
  const int columns = a.dB.column_blocks + a.dA.column_blocks;
  if (p.dtype == DType::kBFloat16)
    launch_wgrad<bf16>(p, a, columns);
  else
    launch_wgrad<fp16>(p, a, columns);
  const bool dB_waits = has_dB ? split.slices > 1 : bool(split.fused.slices);
  if (split.slices > 1 || dB_waits) finish(p, split.slices > 1 ? dA : none, dB_waits ? dB : none);
}

}  // namespace fastpeft::cuda
