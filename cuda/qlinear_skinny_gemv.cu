// 4-bit linear layer for one or two tokens, decode inside, forward (sm_80 and newer).
//
//   y [M, N] = x W^T + bias + scaling * s B^T      x [M, K], s [M, R], B [N, R], M <= 2
//   W [N, K] tiled 4-bit codes, one absmax a block of >= 64 columns
//
//   block: row strips [s0, s1) of 16 rows, all of K      items of a warp, in this order:
//              k groups of 256 columns                    (group, strip s0) (group, strip s0 + 1)
//              ...
//         s0 |  w0  |  w1  | ... | w15 |                  (next group, strip s0) ...
//         .. |  w0  |  w1  | ... | w15 |
//         s1 |  w0  |  w1  | ... | w15 |      item: 16 rows x 256 columns = 4 strips, 2 KB of codes
//
// ldmatrix hands a lane (g, t) word t of row g of each tile: its four bytes are, through the lookup
// table, the A fragment of one mma. Columns 2j, 2j + 1 of the other operand are x of strip j of the
// group for the two tokens, so a lane keeps 8 registers of x for a whole group. Each strip has its
// own accumulator; of strip j's only columns 2j, 2j + 1 count, which lie in the lanes t = j: lane
// (g, t) picks rows 2p, 2p + 1 times strip t and scales them with the two absmax that it has
// decoded itself. Sums over t: three shuffles; over the items of a warp: its records in shared
// memory; over the warps: at the end, in their order.
//
// Whatever a block asks for behind the codes arrives behind them: 64 KB a multiprocessor in flight
// are 3700 clocks (measured; small loads alone take 450, before the stream 900). So the small
// things are asked for first, and in the loop the scales, their second level and the x of a new
// group travel with the codes, two items ahead; nothing is loaded when it is needed. Codes come by
// bulk copies, which do not pass the load-store pipe. Nothing is general that need not be: a ragged
// last group is moved back over its neighbour (x is zero there), a warp without items takes one
// with x = 0, and there is no division.
//
// Bound: reading the codes once, 0.516 bytes a weight: 117 clocks an item and multiprocessor at 18
// bytes a clock. The load-store pipe, an item: 64 lookups + 16 (ldmatrix) + 7 (map) + about 11
// (scales, shuffles, sums) rows of 128 bytes. README.md has the times.
#include <algorithm>

#include "dependent_launch.cuh"
#include "qlinear_skinny.cuh"

namespace fastpeft::cuda {

namespace {

using namespace skinny;

constexpr int kStrips = 4, kMaxRows = 16;  // strips of an item; row strips a block
constexpr int kDepth = 2;
// Shared memory: lookup table, an entry in the first half of its 256 bytes, a record of sums in the
// second | rings [kWarps][kDepth][kSlotBytes] | barriers, one a slot and one of the map | offset,
// map | second-level absmax of the block's rows, a copy a warp | bias, s, lora_b.
// A slot: codes of an item | scales [4 strips][16 rows] | x of its group, where it is the first
// item of one: [2 tokens][4 strips] 128 bytes in 144, so that the lanes (token, strip, t) never
// meet in a bank.
constexpr int kSlotScalesAt = kStrips * kStripBytes, kSlotXAt = kSlotScalesAt + 256, kXStride = 144,
              kTokenStride = kStrips * kXStride, kSlotBytes = kSlotXAt + 2 * kTokenStride;
constexpr int kRingsAt = kTableBytes, kBarriersAt = kRingsAt + kWarps * kDepth * kSlotBytes,
              kMapAt = kBarriersAt + kWarps * kDepth * 8 + 16, kMapCopied = 1040,
              kNestedAt = kMapAt + kMapCopied;
constexpr int kSumsAt = kEntryStride / 2, kRowSums = kWarps * kEntryStride;  // [row strip][warp]

struct Args {
  const uint8_t* codes;    // [strips_n][strips_k][512]
  const void* scales;      // uint8 (nested) or float32 [K / blocksize][Np]
  const float* nested;     // [257 + ceil(B / 256)] or null
  const void* x;           // [M, K]
  int strips_k, groups;    // of 64 and of 256 columns
  int base, rest;          // row strips a block; the first `rest` blocks have one more
  uint32_t reciprocal[2];  // 2^31 / base and / (base + 1), up
  int block_shift;         // log2 of blocksize / 64
  int blocks_a_row, Np, N, K, M;
  uint32_t book[8];    // 16 codes times gain, 16 bits each
  float inverse_gain;  // 1 / gain
  bool is_dependent;
  int nested_stride;  // bytes of a warp's copy of the second level
  int staged_at;      // bias, s, lora_b in shared memory, or 0: they are read where they are
  int R;
  float scaling;
  const void* bias;    // [N] or null
  const void* s;       // [M, R] or null
  const void* lora_b;  // [N, R] or null
  void* y;             // [M, N]
};

#if __CUDA_ARCH__ >= 900
constexpr bool kHasBulkCopies = true;
#else
constexpr bool kHasBulkCopies = false;
#endif

__device__ __forceinline__ void init_barrier(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
#endif
}
__device__ __forceinline__ void fence_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred p;\nW: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D;\n"
      "bra W;\nD:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}
// By one lane: `bytes` from global to shared memory, counted by the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, int bytes,
                                          uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// s B^T of one output; staged: ranks by eight.
template <class T>
__device__ __forceinline__ float low_rank(const T* s, const T* factor, int R, bool is_staged) {
  float sum = 0.0f;
  if (!is_staged) {
#pragma unroll 1
    for (int r = 0; r < R; ++r) sum += to_acc(s[r]) * to_acc(factor[r]);
    return sum;
  }
#pragma unroll 1
  for (int r = 0; r < R; r += 8) {
    const uint4 v = load_shared16(shared_address(s + r)),
                w = load_shared16(shared_address(factor + r));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 v2 = unpack_pair<T>(word_of(v, i)), w2 = unpack_pair<T>(word_of(w, i));
      sum += v2.x * w2.x + v2.y * w2.y;
    }
  }
  return sum;
}

template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_fwd_gemv_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int kScaleBytes = kNested ? 1 : 4;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x / 32), 0);  // known to be uniform
  const int block = blockIdx.x, is_long = block < a.rest;
  const int first_strip = block * a.base + min(block, a.rest), rows = a.base + is_long;
  const uint32_t base = shared_address(shared), ring = base + kRingsAt + warp * kDepth * kSlotBytes,
                 barriers = base + kBarriersAt + warp * kDepth * 8,
                 map_barrier = base + kMapAt - 16;
  if (kHasBulkCopies && lane == 0) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) init_barrier(barriers + i * 8);
    if (kNested && warp == 0) init_barrier(map_barrier);
    fence_barriers();
    if (kNested && warp == 0) copy_bulk(base + kMapAt, a.nested, kMapCopied, map_barrier);
  }

  // The warp's items. Those of the feeder run kDepth ahead of those being computed.
  const uint32_t items = rows * a.groups, first = items * warp / kWarps;
  const int count = items * (warp + 1) / kWarps - first;
  int group = int(uint64_t(first) * a.reciprocal[is_long] >> 31);
  int row = first - group * rows;
  int left = max(count, 1);  // an item with x = 0 where there is none
  int feed_group = group, feed_row = row, feed_left = left;
  const int row_bytes = a.strips_k * kStripBytes;
  const auto first_column_strip = [&](int of) { return min(of * kStrips, a.strips_k - kStrips); };
  const uint8_t* from;      // codes of the feeder's item
  const char* scales_from;  // a lane copies 16 bytes of one strip, or none
  const auto aim = [&] {
    const int strip = first_column_strip(feed_group);
    from = a.codes + int64_t(first_strip + feed_row) * row_bytes + strip * kStripBytes;
    const int k_block = (strip + lane / kScaleBytes % kStrips) >> a.block_shift;
    scales_from = static_cast<const char*>(a.scales) +
                  (int64_t(k_block) * a.Np + (first_strip + feed_row) * kTileN) * kScaleBytes +
                  lane % kScaleBytes * 16;
  };
  const auto advance = [&] {
    --feed_left;
    from += row_bytes;
    scales_from += kTileN * kScaleBytes;
    if (++feed_row == rows) {
      feed_row = 0;
      ++feed_group;
      aim();
    }
  };
  const auto copy_codes = [&](uint32_t slot, uint32_t barrier, const uint8_t* codes) {
    if constexpr (kHasBulkCopies) {
      if (lane == 0) copy_bulk(slot, codes, kStrips * kStripBytes, barrier);
    } else {
#pragma unroll
      for (int j = 0; j < kStrips; ++j)
        copy_async16(slot + j * kStripBytes + lane * 16, codes + j * kStripBytes + lane * 16, 16);
    }
  };
  const auto copy_scales = [&](uint32_t slot) {
    if (lane < kStrips * kScaleBytes)
      copy_async16(slot + kSlotScalesAt + lane * 16, scales_from, 16);
  };
  // Zeros where a moved last group overlaps the one before, and for an item that is none.
  const auto copy_x = [&](uint32_t slot, int of) {
    const int strip = first_column_strip(of);
    const bool is_valid = strip + lane / 8 >= of * kStrips && count > 0;
    const char* at = static_cast<const char*>(a.x) + (strip * kTileK + lane * 8) * int(sizeof(T));
    const uint32_t to = slot + kSlotXAt + lane / 8 * kXStride + lane % 8 * 16;
    copy_async16(to, at, is_valid ? 16 : 0);
    if (a.M > 1)
      copy_async16(to + kTokenStride, at + int64_t(a.K) * int(sizeof(T)), is_valid ? 16 : 0);
  };

  const bool has_second = left > 1, has_second_group = has_second && row + 1 == rows;
  // What the kernel before may have written.
  const auto copy_activations = [&] {
    copy_x(ring, group);
    if (has_second_group) copy_x(ring + kSlotBytes, group + 1);
    if (a.staged_at) {
      const int n = first_strip * kTileN, outputs = min(rows * kTileN, a.N - n);
      const auto stage = [&](int at, const void* from, int bytes) {
#pragma unroll 1
        for (int i = threadIdx.x * 16; i < bytes; i += kThreads * 16)
          copy_async16(base + at + i, static_cast<const char*>(from) + i, min(bytes - i, 16));
      };
      const int row_bytes = a.R * int(sizeof(T));
      if (a.bias) stage(a.staged_at, static_cast<const T*>(a.bias) + n, outputs * int(sizeof(T)));
      if (a.s) {
        stage(a.staged_at + kMaxRows * kTileN * int(sizeof(T)), a.s, a.M * row_bytes);
        stage(a.staged_at + kMaxRows * kTileN * int(sizeof(T)) + 2 * row_bytes,
              static_cast<const T*>(a.lora_b) + int64_t(n) * a.R, outputs * row_bytes);
      }
    }
  };
  // Whatever is asked for behind the codes of all multiprocessors comes behind them: so the small
  // things stand before the second codes.
  const int nested_first = first_strip * kTileN * a.blocks_a_row;
  const uint32_t own_nested = kNestedAt + warp * a.nested_stride;
  aim();
  copy_codes(ring, barriers, from);
  launch_dependents();
  if (!a.is_dependent) {
    copy_activations();
    commit_copies();
  }
  copy_scales(ring);
  advance();
  if (has_second) copy_scales(ring + kSlotBytes);
  if constexpr (kNested) {
    const int last = (min((first_strip + rows) * kTileN, a.N) * a.blocks_a_row - 1) >> 8;
#pragma unroll 1
    for (int i = lane; i <= last - (nested_first >> 8); i += 32)
      copy_async4(base + own_nested + i * 4, a.nested + 257 + (nested_first >> 8) + i, 4);
    if (!kHasBulkCopies && threadIdx.x <= 256)
      copy_async4(base + kMapAt + threadIdx.x * 4, a.nested + threadIdx.x, 4);
  }
  if (has_second) {
    copy_codes(ring + kSlotBytes, barriers + 8, from);
    advance();
  }
  commit_copies();
  {  // two threads an entry, 64 bytes each, rotated so that stores spread over the banks
    const uint32_t low = a.book[lane / 4] >> (lane / 2 % 2 * 16), high = a.book[warp / 2];
    const uint32_t pair = __byte_perm(low, high, warp % 2 ? 0x7610 : 0x5410);
    const int entry = threadIdx.x / 2;
#pragma unroll
    for (int q = 0; q < 4; ++q)
      *reinterpret_cast<uint4*>(shared + entry * kEntryStride + lane % 2 * 64 +
                                ((q + entry) & 3) * 16) = make_uint4(pair, pair, pair, pair);
  }
  // Sums: [row strip][warp][lane] floats, lane (g, t): row pair g, row t / 2, token t % 2.
  unsigned char* const sums = shared + kSumsAt + lane * 4;
  unsigned char* sum_at = sums + warp * kEntryStride;
#pragma unroll 1
  for (int i = 0; i < rows; ++i) *reinterpret_cast<float*>(sum_at + i * kRowSums) = 0.0f;
  sum_at += row * kRowSums;
  if (a.is_dependent) {
    wait_for_predecessor();
    copy_activations();
    commit_copies();
  }
  if constexpr (!kHasBulkCopies) wait_copies<0>();
  __syncthreads();

  const int row_pair = 2 * pair_order(g);
  int nested_at;  // index of the first row's block in the warp's copy, times 256
  const auto aim_nested = [&] {
    nested_at = (row * kTileN + row_pair) * a.blocks_a_row + (nested_first & 255) +
                ((first_column_strip(group) + t) >> a.block_shift);
  };
  aim_nested();
  const uint32_t lane4 = lane * 4;
  const unsigned char* slot = shared + kRingsAt + warp * kDepth * kSlotBytes;
  uint32_t barrier = barriers, parity = 0, x[8];
  int to_other = kSlotBytes;
  bool is_new = true, is_first = true;
#pragma unroll 1
  for (; left > 0; --left) {
    if constexpr (kHasBulkCopies) wait_barrier(barrier, parity);
    if (is_first && a.is_dependent)
      wait_copies<0>();  // x was asked for last
    else
      wait_copies<kDepth - 1>();
    __syncwarp();
    if (is_new) {
      const unsigned char* at = slot + kSlotXAt + g % 2 * kTokenStride + g / 2 * kXStride + t * 4;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[i] = 0;
        if (g % 2 < a.M) x[i] = *reinterpret_cast<const uint32_t*>(at + i * 16);
      }
    }
    // A strip's products stand in all columns; those of its own x are picked afterwards.
    float c[kStrips][4] = {};
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
      const uint4 q = load_matrices(shared_address(slot) + j * kStripBytes + lane * 16);
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        const uint32_t word = word_of(q, tile);
        const uint32_t f[4] = {
            lookup_pair<0>(shared, word, lane4), lookup_pair<1>(shared, word, lane4),
            lookup_pair<2>(shared, word, lane4), lookup_pair<3>(shared, word, lane4)};
        mma_16x8x16<T>(c[j], f, x[2 * tile], x[2 * tile + 1]);
      }
    }
    if (is_first) {
      is_first = false;
      wait_copies<0>();
      __syncwarp();
      if constexpr (kNested && kHasBulkCopies) wait_barrier(map_barrier, 0);
    }
    float of_row[2];
    if constexpr (kNested) {
      const uint32_t code =
          *reinterpret_cast<const uint16_t*>(slot + kSlotScalesAt + t * 16 + row_pair);
      const float* const map = reinterpret_cast<const float*>(shared + kMapAt);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float nested = *reinterpret_cast<const float*>(
            shared + own_nested + ((nested_at + i * a.blocks_a_row) >> 8) * 4);
        of_row[i] = __fmaf_rn(map[1 + (code >> 8 * i & 255)], nested, map[0]);
      }
    } else {
      const float2 scale =
          *reinterpret_cast<const float2*>(slot + kSlotScalesAt + t * 64 + row_pair * 4);
      of_row[0] = scale.x;
      of_row[1] = scale.y;
    }
    __syncwarp();
    if (feed_left > 0) {
      copy_codes(shared_address(slot), barrier, from);
      copy_scales(shared_address(slot));
      if (feed_row == 0) copy_x(shared_address(slot), feed_group);
      advance();
    }
    commit_copies();
    slot += to_other;
    if (to_other < 0) parity ^= 1;
    to_other = -to_other;
    barrier ^= 8;
    // rows 2p, 2p + 1 of strip t by token; lane t keeps row t / 2, token t % 2 of all strips
    const bool is_odd = t % 2, is_upper = t / 2;
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      v[e] =
          of_row[e / 2] * (is_upper ? (is_odd ? c[3][e] : c[2][e]) : (is_odd ? c[1][e] : c[0][e]));
    const float row0 = (is_odd ? v[1] : v[0]) + __shfl_xor_sync(kAllLanes, is_odd ? v[0] : v[1], 1);
    const float row1 = (is_odd ? v[3] : v[2]) + __shfl_xor_sync(kAllLanes, is_odd ? v[2] : v[3], 1);
    *reinterpret_cast<float*>(sum_at) +=
        (is_upper ? row1 : row0) + __shfl_xor_sync(kAllLanes, is_upper ? row0 : row1, 2);
    sum_at += kRowSums;
    nested_at += kTileN * a.blocks_a_row;
    is_new = ++row == rows;
    if (is_new) {
      row = 0;
      ++group;
      sum_at -= rows * kRowSums;
      aim_nested();
    }
  }
  wait_copies<0>();  // bias, s, lora_b
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * 32; i += kThreads) {
    const unsigned char* const at = sums + i / 32 * kRowSums;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < kWarps; ++part)
      sum += *reinterpret_cast<const float*>(at + part * kEntryStride);
    sum *= a.inverse_gain;
    const int o = i / 32 * kTileN + row_pair + t / 2, n = first_strip * kTileN + o, m = t % 2;
    if (m >= a.M || n >= a.N) continue;
    const T *bias = static_cast<const T*>(a.bias), *s = static_cast<const T*>(a.s) + m * a.R,
            *factor = static_cast<const T*>(a.lora_b) + int64_t(n) * a.R;
    if (a.staged_at) {
      const T* staged = reinterpret_cast<const T*>(shared + a.staged_at);
      bias = staged - first_strip * kTileN;
      s = staged + kMaxRows * kTileN + m * a.R;
      factor = staged + kMaxRows * kTileN + 2 * a.R + o * a.R;
    }
    if (a.s) sum += a.scaling * low_rank(s, factor, a.R, a.staged_at > 0);
    if (a.bias) sum += to_acc(bias[n]);
    static_cast<T*>(a.y)[int64_t(m) * a.N + n] = from_acc<T>(sum);
  }
}

using Kernel = void (*)(Args);

template <class T>
Kernel pick(bool is_nested) {
  return is_nested ? qlinear_fwd_gemv_kernel<T, true> : qlinear_fwd_gemv_kernel<T, false>;
}

// Row strips a block, in as few rounds of all multiprocessors as the limit of rows allows.
int split_rows(Args& a, int strips_n, int sm_count) {
  const int rounds = ceil_div(strips_n, sm_count * kMaxRows);
  const int blocks = std::min(sm_count * rounds, strips_n);
  a.base = strips_n / blocks;
  a.rest = strips_n % blocks;
  return blocks;
}

// A warp's copy of the second level of kMaxRows row strips.
int nested_bytes(int64_t blocks_a_row) {
  return int(round_up<int64_t>((kMaxRows * kTileN * blocks_a_row / kNestedBlock + 3) * 4, 16));
}
// Bias, s, lora_b.
int staged_bytes(int64_t R) {
  return int((kMaxRows * kTileN * (1 + R) + 2 * R) * 2);
}

}  // namespace

namespace skinny {

bool gemv_fits(const QLinearFwdParams& p) {
  // The map is copied in pieces of 16 bytes: three floats behind it are read.
  const bool map_fits =
      !p.w.nested ||
      (is_aligned(p.w.nested, 16) && block_count(p.w.N, p.w.K, p.w.blocksize) > 2 * kNestedBlock);
  return p.M <= 2 && p.w.K >= kStrips * kTileK && map_fits &&
         device_facts().shared_bytes >= kNestedAt + kWarps * nested_bytes(p.w.K / p.w.blocksize);
}

void qlinear_fwd_gemv(const QLinearFwdParams& p) {
  const char* name = "qlinear_fwd_gemv_kernel";
  const DeviceFacts facts = device_facts();
  const PackedWeight w = packed_weight(p.w);
  Args a = {};
  fill_args(a, p, w);
  a.groups = ceil_div(w.strips_k, kStrips);
  a.block_shift = w.block_shift - 6;
  a.is_dependent = dependent_launch() && facts.arch >= 90;
  const int blocks = split_rows(a, w.strips_n, facts.sm_count);
  for (int i = 0; i < 2; ++i)
    a.reciprocal[i] = uint32_t(((int64_t(1) << 31) + a.base + i - 1) / (a.base + i));
  const Kernel kernel = p.dtype == DType::kBFloat16 ? pick<bf16>(a.nested) : pick<fp16>(a.nested);
  a.nested_stride = a.nested ? nested_bytes(a.blocks_a_row) : 0;
  int bytes = kNestedAt + kWarps * a.nested_stride;
  if ((a.s || a.bias) && p.R % 8 == 0 && is_aligned(a.bias, 16) && is_aligned(a.s, 16) &&
      is_aligned(a.lora_b, 16) && bytes + staged_bytes(a.R) <= facts.shared_bytes) {
    a.staged_at = bytes;
    bytes += staged_bytes(a.R);
  }
  allow_shared_memory(reinterpret_cast<const void*>(kernel), facts.shared_bytes);
  launch_kernel(kernel, name, dim3(unsigned(blocks)), kThreads, bytes, p.stream, 1, a);
}

}  // namespace skinny
}  // namespace fastpeft::cuda
