// The wide products of LoRA: few ranks to every column, bf16 or fp16, R <= 16, C % 8 == 0.
//
//   out [M, C] (+)= drop(scale * s F^T) + bias      s [M, R]
//   F [C, R] (forward: B) or, transposed, [R, C] (backward: dx += drop'(ds A), A [R, K])
//   drop: zero where Philox says so, by the place in out; scale carries 1 / (1 - p)
//
//            512 columns, 64 a warp
//        +----+----+-- ... --+----+     a step: 16 tokens. F of a warp's columns stays in
//        registers,
//  slice | w0 | w1 |         | w7 |     s of the next step is on its way. mma.m16n8k16, tokens as
//  of M  |    |    |         |    |     rows, ranks as k: ranks 4t .. 4t+3 are lane t's k.
//        +----+----+-- ... --+----+
//
// Columns are dealt so that a lane's sums over four tiles are 8 consecutive ones, 16 bytes; lanes
// of neighbouring tokens trade pieces, so that a store instruction fills four whole lines of 128
// bytes. Bound: writing out, and with (+) reading it: M = 8192, C = 4096 / 14336: 67 / 235 MB, 16 /
// 56 us.
#include "dependent_launch.cuh"
#include "device/reduce.cuh"
#include "lora.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kColumns = 64, kBlockColumns = kWarps * kColumns;
constexpr int kTokens = 16, kMaxRank = 16;

struct Args {
  const void* s;       // [M, R]
  const void* factor;  // [C, R], or [R, C] when is_transposed
  const void* bias;    // [C] or null
  void* out;           // [M, C]
  const int64_t* seed;
  int64_t M;
  int C, R, tokens;  // tokens a slice
  uint32_t threshold;
  float scale;
  bool is_transposed;
};

// Four ranks from `first` of a row of R.
__device__ __forceinline__ uint2 load_ranks(const uint16_t* row, int first, int R) {
  if (R % 4 == 0)
    return first < R ? __ldg(reinterpret_cast<const uint2*>(row + first)) : make_uint2(0, 0);
  uint32_t v[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] = first + e < R ? __ldg(row + first + e) : 0;
  return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
}

// Lanes of tokens g and g ^ 1 trade a piece: of `mine` [columns 0 .. 31, 32 .. 63] the even lane
// keeps the first and the odd one the second. Afterwards [0] belongs to the even token, [1] to the
// odd one; the same again undoes it.
__device__ __forceinline__ void trade(uint4 (&mine)[2], bool is_odd) {
  uint4 got;
  got.x = __shfl_xor_sync(kAllLanes, is_odd ? mine[0].x : mine[1].x, 4);
  got.y = __shfl_xor_sync(kAllLanes, is_odd ? mine[0].y : mine[1].y, 4);
  got.z = __shfl_xor_sync(kAllLanes, is_odd ? mine[0].z : mine[1].z, 4);
  got.w = __shfl_xor_sync(kAllLanes, is_odd ? mine[0].w : mine[1].w, 4);
  if (is_odd)
    mine[0] = got;
  else
    mine[1] = got;
}

template <class T, bool kAdd, bool kDrop>
__global__ void __launch_bounds__(kThreads, 2) lora_expand_kernel(const __grid_constant__ Args a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const bool is_odd = g & 1;
  const int first_column = int(blockIdx.x) * kBlockColumns + warp * kColumns;
  if (first_column >= a.C) return;
  const int64_t m_begin = int64_t(blockIdx.y) * a.tokens;
  const int64_t m_end = min(a.M, m_begin + a.tokens);
  const uint16_t* const s = static_cast<const uint16_t*>(a.s);
  const uint16_t* const factor = static_cast<const uint16_t*>(a.factor);
  T* const out = static_cast<T*>(a.out);

  launch_dependents();
  wait_for_predecessor();
  // F: tile j, its column g is 32 (j / 4) + 8 (g / 2) + 2 (j % 4) + g % 2 of the warp's
  uint2 f[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int c = first_column + 32 * (j / 4) + 8 * (g / 2) + 2 * (j % 4) + g % 2;
    const int r = 4 * t;
    if (c >= a.C) {
      f[j] = make_uint2(0, 0);
    } else if (a.is_transposed) {
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = r + e < a.R ? __ldg(factor + int64_t(r + e) * a.C + c) : 0;
      f[j] = make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
    } else {
      f[j] = load_ranks(factor + int64_t(c) * a.R, r, a.R);
    }
  }
  uint4 bias[2] = {};
  if (a.bias) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (first_column + 32 * h + 8 * t < a.C)
        bias[h] = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(a.bias) +
                                                       first_column + 32 * h + 8 * t));
  }
  const uint64_t seed = kDrop ? uint64_t(*a.seed) : 0;

  // As stored: rows (g & ~1), (g | 1), + 8 of them, columns of this lane after the trade.
  const int column = first_column + 32 * is_odd + 8 * t;
  const auto place = [&](int64_t m, int i) {  // piece i: (half of the 16 tokens, even or odd one)
    return (m + 8 * (i / 2) + (i % 2 ? g | 1 : g & ~1)) * a.C + column;
  };
  const auto exists = [&](int64_t m, int i) {
    return column < a.C && m + 8 * (i / 2) + (i % 2 ? g | 1 : g & ~1) < m_end;
  };
  uint2 ranks[2];  // tokens g, g + 8 of the coming step
  uint4 old[2][2];
  const auto load = [&](int64_t m) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      ranks[h] = m + 8 * h + g < m_end ? load_ranks(s + (m + 8 * h + g) * a.R, 4 * t, a.R)
                                       : make_uint2(0, 0);
    if constexpr (kAdd) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        old[i / 2][i % 2] = exists(m, i) ? *reinterpret_cast<const uint4*>(out + place(m, i))
                                         : make_uint4(0, 0, 0, 0);
    }
  };
  load(m_begin);
  for (int64_t m = m_begin; m < m_end; m += kTokens) {
    float acc[8][4] = {};
    const uint32_t rows[4] = {ranks[0].x, ranks[1].x, ranks[0].y, ranks[1].y};
#pragma unroll
    for (int j = 0; j < 8; ++j) mma_16x8x16<T>(acc[j], rows, f[j].x, f[j].y);
    uint4 now[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      now[h][0] = old[h][0];
      now[h][1] = old[h][1];
    }
    load(m + kTokens);
#pragma unroll
    for (int h = 0; h < 2; ++h) {  // tokens g, then g + 8
      uint4(&piece)[2] = now[h];
      if constexpr (kAdd) trade(piece, is_odd);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = a.scale * acc[4 * half + e / 2][2 * h + e % 2];
        if constexpr (kDrop) {
          const uint64_t counter =
              uint64_t((m + 8 * h + g) * a.C + first_column + 32 * half + 8 * t) / 4;
          const Philox4 random[2] = {philox(seed, counter), philox(seed, counter + 1)};
#pragma unroll
          for (int e = 0; e < 8; ++e)
            if (random[e / 4].v[e % 4] < a.threshold) v[e] = 0.0f;
        }
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float2 pair = unpack_pair<T>(word_of(bias[half], w));
          if constexpr (kAdd) {
            const float2 before = unpack_pair<T>(word_of(piece[half], w));
            pair.x += before.x;
            pair.y += before.y;
          }
          words[w] = pack_pair<T>(v[2 * w] + pair.x, v[2 * w + 1] + pair.y);
        }
        piece[half] = make_uint4(words[0], words[1], words[2], words[3]);
      }
      trade(piece, is_odd);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (exists(m, 2 * h + i)) *reinterpret_cast<uint4*>(out + place(m, 2 * h + i)) = piece[i];
    }
  }
}

// [adds][drops]
template <class T>
constexpr void (*kKernels[2][2])(Args) = {
    {lora_expand_kernel<T, false, false>, lora_expand_kernel<T, false, true>},
    {lora_expand_kernel<T, true, false>, lora_expand_kernel<T, true, true>}};

}  // namespace

void lora_expand(const LoraExpandParams& p) {
  if (p.M == 0) return;
  const bool is_bf16 = p.dtype == DType::kBFloat16;
  FASTPEFT_CHECK(is_bf16 || p.dtype == DType::kFloat16, "lora_expand: ", dtype_name(p.dtype),
                 ", expected bfloat16 or float16");
  FASTPEFT_CHECK(p.R > 0 && p.R <= kMaxRank && p.C % 8 == 0 && p.C > 0 && p.C < (1 << 24),
                 "lora_expand: R = ", p.R, ", C = ", p.C, ", expected R <= 16, C % 8 == 0");
  for (const void* pointer : {p.s, p.factor, p.bias, static_cast<const void*>(p.out)})
    FASTPEFT_CHECK(is_aligned(pointer, 16),
                   "lora_expand: a tensor must start at a multiple of 16 bytes");
  Args a;
  a.s = p.s;
  a.factor = p.factor;
  a.bias = p.bias;
  a.out = p.out;
  a.seed = p.seed;
  a.M = p.M;
  a.C = int(p.C);
  a.R = int(p.R);
  a.threshold = drop_threshold(p.p);
  a.scale = p.scale / (1.0f - p.p);
  a.is_transposed = p.is_transposed;
  const int64_t columns = ceil_div<int64_t>(p.C, kBlockColumns);
  const int64_t wanted = ceil_div<int64_t>(device_facts().sm_count * 2, columns);
  a.tokens = int(round_up<int64_t>(ceil_div<int64_t>(p.M, wanted), kTokens));
  const dim3 grid(unsigned(columns), unsigned(ceil_div<int64_t>(p.M, a.tokens)));
  const auto kernel = (is_bf16 ? kKernels<bf16> : kKernels<fp16>)[p.add][p.p > 0.0f];
  launch_kernel(kernel, "lora_expand_kernel", grid, kThreads, 0, p.stream, 1, a);
}

}  // namespace fastpeft::cuda
