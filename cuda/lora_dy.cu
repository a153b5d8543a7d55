// Everything LoRA's backward pass takes from dy, in one pass over it: bf16 or fp16, R <= 16,
// R even, N % 8 == 0.
//
//   ds [M, R] = scaling * dy B      dB [N, R] = scaling * dy^T s      dy [M, N], B [N, R], s [M, R]
//
// ds sums over columns, dB over tokens. A block owns a rectangle and leaves partial sums of both,
// unscaled; lora_finish_kernel (lora_wgrad.cu) adds them in order.
//
//            512 columns, 64 a warp
//        +----+----+-- ... --+----+     a step: 16 tokens. Each warp: dB of its 64 columns stays in
//  slice | w0 | w1 |         | w7 |     registers over all steps, B of them too; ds of the step is
//  of M  |    |    |         |    |     added over the 8 warps through shared memory (two buffers,
//        +----+----+-- ... --+----+     one barrier a step) and written.
//
// A warp's 16 x 64 tile (2 KB) is taken twice from shared memory: tokens as rows of mma.m16n8k16
// for ds (lane (g, t): columns 8t.., 32 + 8t.. of tokens g, g + 8), tokens as k for dB (columns
// 8g.. of tokens 4t .. 4t+3, as in lora_wgrad.cu). Piece e of row r stands at e ^ swizzle(r): no
// conflicts.
//
// Bound: reading dy once; M = 8192, N = 4096 / 14336: 67 / 235 MB, 16 / 57 us. Partial sums beside
// it: N / 512 times ds and a slice times dB, 13 / 23 MB, written and read in L2. Shared memory
// moves 80 KB for 16 KB of dy: 640 of the 925 clocks that memory gives. Two passes by cuBLAS: 45 /
// 120 us.
#include "dependent_launch.cuh"
#include "lora.cuh"
#include "lora_wgrad.h"

namespace fastpeft::cuda {

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kColumns = kTileColumns,
              kBlockColumns = kWarps * kColumns;
constexpr int kWidth = 16, kTokens = kTileTokens;        // ranks with padding; tokens a step
constexpr int kDepth = 4, kSlotBytes = kTileSize + 512;  // a tile of dy, its rows of s
constexpr int kBufferFloats = kWarps * kTokens * kWidth;
constexpr int kSharedBytes = kWarps * kDepth * kSlotBytes + 2 * kBufferFloats * 4;

struct Args {
  const void* dy;      // [M, N]
  const void* s;       // [M, R]
  const void* lora_b;  // [N, R]
  float* ds;           // [column blocks, M, 16]
  float* dB;           // [slices, N, 16]
  int64_t M;
  int N, R, tokens;  // tokens a slice
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) lora_dy_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_column = int(blockIdx.x) * kBlockColumns + warp * kColumns;
  const int64_t m_begin = int64_t(blockIdx.y) * a.tokens;
  const int64_t m_end = min(a.M, m_begin + a.tokens);
  const uint32_t ring = shared_address(shared) + warp * kDepth * kSlotBytes;
  float* const parts = reinterpret_cast<float*>(shared + kWarps * kDepth * kSlotBytes);

  launch_dependents();
  wait_for_predecessor();
  // Copies: row 4i + lane / 8 of the tile, piece lane % 8. Where a row or column does not exist,
  // zeros come and the address is not read.
  int rows_left = int(m_end - m_begin) - lane / 8;
  const bool is_inside = first_column + 8 * (lane % 8) < a.N;
  if (!is_inside) rows_left = 0;
  const char* from = static_cast<const char*>(a.dy) +
                     ((m_begin + lane / 8) * a.N + first_column + 8 * (lane % 8)) * 2;
  const int64_t rows4 = int64_t(a.N) * 8;  // bytes
  const uint32_t to = tile_place(lane / 8, lane % 8);
  const char* s_from = static_cast<const char*>(a.s) + m_begin * a.R * 2;
  int64_t s_left = (m_end - m_begin) * a.R * 2;  // bytes
  const auto issue = [&](uint32_t slot) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_async16(slot + to + i * 512, from, rows_left > 4 * i ? 16 : 0);
      from += rows4;
    }
    copy_rank_rows<kWidth>(slot + kTileSize, s_from, a.R, s_left, lane);
    commit_copies();
    rows_left -= kTokens;
    s_from += kTokens * 2 * a.R;
    s_left -= kTokens * 2 * a.R;
  };
#pragma unroll
  for (int i = 0; i < kDepth; ++i) issue(ring + i * kSlotBytes);

  // B of this warp's columns: word q of k32 chunk h: columns 32h + 8t + 2q, + 1; rank 8j + g
  uint32_t b[2][2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        uint32_t pair = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = first_column + 32 * h + 8 * t + 2 * q + e, r = 8 * j + g;
          const uint32_t value =
              n < a.N && r < a.R
                  ? __ldg(static_cast<const uint16_t*>(a.lora_b) + int64_t(n) * a.R + r)
                  : 0;
          pair |= value << (16 * e);
        }
        b[h][j][q] = pair;
      }
  // Ranks 2g, 2g+1 of token t; past the last rank whatever stands there: its sums are dropped.
  const uint32_t s_at = kTileSize + uint32_t(t * a.R + 2 * g) * 2, s_rows4 = 8u * a.R;
  const uint32_t z_at = tile_place(t, g), x_at[2] = {tile_place(g, t), tile_place(g, 4 + t)};
  float* const sum_to = parts + (warp * kTokens + g) * kWidth + 2 * t;
  const int64_t sum_row = int64_t(blockIdx.x) * a.M + m_begin;
  float* ds_out = a.ds + sum_row * kWidth + threadIdx.x;
  int tokens_left = int(m_end - m_begin) - int(threadIdx.x) / kWidth;

  float dB[8][4] = {};
  uint32_t slot = ring;
  int buffer = 0;
  for (int64_t m = m_begin; m < m_end; m += kTokens) {
    wait_copies<kDepth - 1>();
    __syncwarp();
    uint4 z[4], low[2], high[2];
    uint32_t ranks[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // tokens t + 4i
      ranks[i] = load_shared4(slot + s_at + i * s_rows4);
      z[i] = load_shared16(slot + z_at + i * 512);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      low[h] = load_shared16(slot + x_at[h]);
      high[h] = load_shared16(slot + x_at[h] + 1024);
    }
    __syncwarp();
    issue(slot);
    slot = slot == ring + (kDepth - 1) * kSlotBytes ? ring : slot + kSlotBytes;
    const uint32_t rows[4] = {low_pair(ranks[0], ranks[1]), high_pair(ranks[0], ranks[1]),
                              low_pair(ranks[2], ranks[3]), high_pair(ranks[2], ranks[3])};
    float ds[2][4] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t steps[2][4] = {{low[h].x, high[h].x, low[h].y, high[h].y},
                                    {low[h].z, high[h].z, low[h].w, high[h].w}};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        mma_16x8x16<T>(ds[j], steps[0], b[h][j][0], b[h][j][1]);
        mma_16x8x16<T>(ds[j], steps[1], b[h][j][2], b[h][j][3]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        *reinterpret_cast<float2*>(sum_to + buffer + 8 * e * kWidth + 8 * j) =
            make_float2(ds[j][2 * e], ds[j][2 * e + 1]);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t z0 = word_of(z[0], w), z1 = word_of(z[1], w), z2 = word_of(z[2], w),
                     z3 = word_of(z[3], w);
      mma_16x8x16<T>(dB[2 * w], rows, low_pair(z0, z1), low_pair(z2, z3));
      mma_16x8x16<T>(dB[2 * w + 1], rows, high_pair(z0, z1), high_pair(z2, z3));
    }
    __syncthreads();  // of the buffer written two steps ago all sums are read
    const float* const part = parts + buffer + threadIdx.x;
    float sum = part[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += part[w * kTokens * kWidth];
    if (tokens_left > 0) *ds_out = sum;
    tokens_left -= kTokens;
    ds_out += kTokens * kWidth;
    buffer = kBufferFloats - buffer;
  }
  wait_copies<0>();

  float* const out = a.dB + int64_t(blockIdx.y) * a.N * kWidth + 2 * g;
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int n = first_column + 16 * t + 8 * c + j;
      if (n < a.N)
        *reinterpret_cast<float2*>(out + int64_t(n) * kWidth) = make_float2(dB[j][c], dB[j][2 + c]);
    }
}

}  // namespace

DyPass dy_pass(const LoraWgradParams& p) {
  DyPass pass;
  pass.column_blocks = int(ceil_div<int64_t>(p.N, kBlockColumns));
  const int64_t wanted = 2 * device_facts().sm_count / pass.column_blocks;
  pass.tokens = int(round_up<int64_t>(ceil_div<int64_t>(p.M, wanted > 1 ? wanted : 1), kTokens));
  pass.slices = int(ceil_div<int64_t>(p.M, pass.tokens));
  pass.ds_floats = pass.column_blocks * p.M * kWidth;
  pass.dB_floats = pass.slices * p.N * kWidth;
  return pass;
}

void lora_dy(const LoraWgradParams& p, const DyPass& pass, float* partial_ds, float* partial_dB) {
  static_assert(kThreads == kTokens * kWidth, "one sum of ds a thread and step");
  Args a;
  a.dy = p.dy;
  a.s = p.s;
  a.lora_b = p.lora_b;
  a.ds = partial_ds;
  a.dB = partial_dB;
  a.M = p.M;
  a.N = int(p.N);
  a.R = int(p.R);
  a.tokens = pass.tokens;
  const auto kernel = p.dtype == DType::kBFloat16 ? lora_dy_kernel<bf16> : lora_dy_kernel<fp16>;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), kSharedBytes);
  launch_kernel(kernel, "lora_dy_kernel", dim3(unsigned(pass.column_blocks), unsigned(pass.slices)),
                kThreads, kSharedBytes, p.stream, 1, a);
}

}  // namespace fastpeft::cuda
