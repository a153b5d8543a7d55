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
// Codes come by bulk copies, which do not pass the load-store pipe (cp.async: 16 of its clocks an
// item). Whatever a block asks for behind the codes arrives behind them: 64 KB a multiprocessor in
// flight are 3700 clocks (measured; small loads alone take 450, before the stream 900), so three
// slots a warp are slower than two. Nothing is general that need not be: a ragged last group is
// moved back over its neighbour (x is zero there), a warp without items takes one with x = 0, and
// there is no division.
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

constexpr int kStrips = 4, kMaxRows = 30;  // strips of an item; row strips a block
constexpr int kDepth = 2;
// Shared memory: lookup table | rings [kWarps][kDepth][2048] | offset, map | bias and LoRA's sums |
// barriers, one a slot and one of the map | sums of the warps, unless they fit into the table's
// holes: an entry fills the first half of its 256 bytes.
constexpr int kItemBytes = kStrips * kStripBytes, kRingBytes = kDepth * kItemBytes;
constexpr int kRingsAt = kTableBytes, kMapAt = kRingsAt + kWarps * kRingBytes, kMapCopied = 1040,
              kSumBytes = 128,  // a row strip: a float a lane
    kStartAt = kMapAt + kMapCopied + 112, kBarriersAt = kStartAt + kMaxRows * kSumBytes,
              kSumsAt = kBarriersAt + (kWarps * kDepth + 2) * 8;

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
  float inverse_gain;       // 1 / gain
  int sums_at, sum_stride;  // record i: part, row strip
  bool is_dependent;
  bool has_start;    // bias or LoRA
  bool ranks_by_4;   // s and lora_b can be read four ranks at once
  uint32_t book[8];  // 16 codes times gain, 16 bits each
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
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
__device__ __forceinline__ uint4 load_matrices(uint32_t shared) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

// bias + scaling * s B^T of one output.
template <class T>
__device__ __forceinline__ float start_sum(const Args& a, int m, int64_t n) {
  float sum = 0.0f;
  if (a.s) {
    const T* s = static_cast<const T*>(a.s) + int64_t(m) * a.R;
    const T* factor = static_cast<const T*>(a.lora_b) + n * a.R;
    if (a.ranks_by_4) {
#pragma unroll 4
      for (int r = 0; r < a.R; r += 4) {
        const uint2 v = *reinterpret_cast<const uint2*>(s + r),
                    w = *reinterpret_cast<const uint2*>(factor + r);
        const float2 v0 = unpack_pair<T>(v.x), v1 = unpack_pair<T>(v.y);
        const float2 w0 = unpack_pair<T>(w.x), w1 = unpack_pair<T>(w.y);
        sum += v0.x * w0.x + v0.y * w0.y + (v1.x * w1.x + v1.y * w1.y);
      }
    } else {
#pragma unroll 1
      for (int r = 0; r < a.R; ++r) sum += to_acc(s[r]) * to_acc(factor[r]);
    }
    sum *= a.scaling;
  }
  return a.bias ? sum + to_acc(static_cast<const T*>(a.bias)[n]) : sum;
}

template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_fwd_gemv_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  using Scale = std::conditional_t<kNested, uint16_t, float2>;  // of two rows, as stored
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x / 32), 0);  // known to be uniform
  const int block = blockIdx.x, is_long = block < a.rest;
  const int first_strip = block * a.base + min(block, a.rest), rows = a.base + is_long;

  const uint32_t base = shared_address(shared);
  const uint32_t barriers = base + kBarriersAt + warp * kDepth * 8,
                 map_barrier = base + kBarriersAt + kWarps * kDepth * 8;
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
  int group = int(uint64_t(first) * a.reciprocal[is_long] >> 31), row = first - group * rows;
  int left = max(count, 1);  // an item with x = 0 where there is none
  const int row_bytes = a.strips_k * kStripBytes;
  const auto first_column_strip = [&](int of) { return min(of * kStrips, a.strips_k - kStrips); };
  const uint8_t* const rows_from = a.codes + int64_t(first_strip) * row_bytes;
  const uint8_t* from =
      rows_from + int64_t(row) * row_bytes + first_column_strip(group) * kStripBytes;
  int feed_group = group, feed_row = row, feed_left = left;
  const uint32_t ring = base + kRingsAt + warp * kRingBytes;
  const auto feed = [&](int slot) {
    if (feed_left > 0) {
      if constexpr (kHasBulkCopies) {
        if (lane == 0) copy_bulk(ring + slot * kItemBytes, from, kItemBytes, barriers + slot * 8);
      } else {
#pragma unroll
        for (int j = 0; j < kStrips; ++j)
          copy_async16(ring + slot * kItemBytes + j * kStripBytes + lane * 16,
                       from + j * kStripBytes + lane * 16, 16);
      }
      from += row_bytes;
      --feed_left;
      if (++feed_row == rows) {
        feed_row = 0;
        ++feed_group;
        from = rows_from + first_column_strip(feed_group) * kStripBytes;
      }
    }
    if constexpr (!kHasBulkCopies) commit_copies();
  };
  if constexpr (kNested && !kHasBulkCopies) {
    if (threadIdx.x <= 256) copy_async4(base + kMapAt + threadIdx.x * 4, a.nested + threadIdx.x, 4);
  }
  feed(0);
  launch_dependents();

  // Scales of two rows of strip t of an item, asked for while the item before is finished.
  const int row_pair = 2 * pair_order(g);
  const Scale* scale_at;
  int nested_at;  // index of the first row's block, row-major
  std::conditional_t<kNested, uint32_t, float2> scale;
  float nested[2];
  const auto aim_scales = [&] {
    const int k_block = (first_column_strip(group) + t) >> a.block_shift;
    const int n = (first_strip + row) * kTileN + row_pair;
    scale_at = reinterpret_cast<const Scale*>(static_cast<const char*>(a.scales) +
                                              (int64_t(k_block) * a.Np + n) * (sizeof(Scale) / 2));
    nested_at = n * a.blocks_a_row + k_block;
  };
  const int last_nested = (a.N * a.blocks_a_row - 1) >> 8;
  const auto load_scales = [&] {
    scale = __ldg(scale_at);
    if constexpr (kNested) {
#pragma unroll
      for (int i = 0; i < 2; ++i)  // rows past N have no block
        nested[i] = __ldg(a.nested + 257 + min((nested_at + i * a.blocks_a_row) >> 8, last_nested));
    }
  };
  aim_scales();
  load_scales();
  const auto prefetch_scales = [&] {  // of the group's row strips, up to 16
    const int at = lane / 4 * (kNested ? 32 : 128);
    if (at < (rows - row) * kTileN * int(sizeof(Scale) / 2))
      prefetch(reinterpret_cast<const char*>(scale_at - row_pair / 2) + at);
  };
  if (rows > 1) prefetch_scales();

  if (a.has_start) {  // into L2: what start_sum() will read; the values may still change there
    const int n = first_strip * kTileN, outputs = min(rows * kTileN, a.N - n);
    const int at = threadIdx.x * 32;
    if (a.bias && at < outputs * int(sizeof(T)))
      prefetch(static_cast<const char*>(a.bias) + n * int64_t(sizeof(T)) + at);
    if (a.s && at < outputs * a.R * int(sizeof(T)))
      prefetch(static_cast<const char*>(a.lora_b) + int64_t(n) * a.R * int64_t(sizeof(T)) + at);
  }

  // x of token g % 2, strip g / 2: words (pair t, pair t + 4) of four tiles.
  uint32_t x[8];
  const auto load_x = [&] {
    const int strip = first_column_strip(group) + g / 2;
    const bool is_valid = g % 2 < a.M && strip >= group * kStrips && count > 0;
    const char* at = static_cast<const char*>(a.x) +
                     (int64_t(g % 2) * a.K + strip * kTileK + 2 * t) * int64_t(sizeof(T));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] = 0;
      if (is_valid) x[i] = *reinterpret_cast<const uint32_t*>(at + i * 16);
    }
  };
  const auto fill_table = [&] {
    // two threads an entry, 64 bytes each, rotated so that stores spread over the banks
    const uint32_t low = a.book[lane / 4] >> (lane / 2 % 2 * 16), high = a.book[warp / 2];
    const uint32_t pair = __byte_perm(low, high, warp % 2 ? 0x7610 : 0x5410);
    const int entry = threadIdx.x / 2;
#pragma unroll
    for (int q = 0; q < 4; ++q)
      *reinterpret_cast<uint4*>(shared + entry * kEntryStride + lane % 2 * 64 +
                                ((q + entry) & 3) * 16) = make_uint4(pair, pair, pair, pair);
  };
  const auto feed_others = [&] {
#pragma unroll
    for (int i = 1; i < kDepth; ++i) feed(i);
  };
  // x stands before the other slots, or it would arrive behind them; in a dependent launch it has
  // to wait anyway.
  if (a.is_dependent) {
    feed_others();
    fill_table();
  }
  wait_for_predecessor();
  load_x();
  if (!a.is_dependent) {
    feed_others();
    fill_table();
  }
  // Sums of a warp: [row strip][lane] floats, lane (g, t): row pair g, row t / 2, token t % 2.
  unsigned char* const sums = shared + a.sums_at + lane * 4;
  unsigned char* const own_sums = sums + warp * rows * a.sum_stride;
#pragma unroll 1
  for (int i = 0; i < rows; ++i) *reinterpret_cast<float*>(own_sums + i * a.sum_stride) = 0.0f;
  if constexpr (kNested && !kHasBulkCopies) wait_copies<kDepth - 1>();  // the map
  __syncthreads();
  if (a.has_start) {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * 32; i += kThreads) {
      const int n = (first_strip + i / 32) * kTileN + row_pair + t / 2;
      reinterpret_cast<float*>(shared + kStartAt)[i] =
          t % 2 < a.M && n < a.N ? start_sum<T>(a, t % 2, n) : 0.0f;
    }
  }

  const uint32_t lane4 = lane * 4, read_at = ring + lane * 16;
  int slot = 0;
  uint32_t parity = 0;
  bool is_first = true;
#pragma unroll 1
  for (; left > 0; --left) {
    if constexpr (kHasBulkCopies) {
      wait_barrier(barriers + slot * 8, parity);
    } else {
      wait_copies<kDepth - 1>();
      __syncwarp();
    }
    // A strip's products stand in all columns; those of its own x are picked afterwards.
    float c[kStrips][4] = {};
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
      const uint4 q = load_matrices(read_at + slot * kItemBytes + j * kStripBytes);
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        const uint32_t word = word_of(q, tile);
        const uint32_t f[4] = {
            lookup_pair<0>(shared, word, lane4), lookup_pair<1>(shared, word, lane4),
            lookup_pair<2>(shared, word, lane4), lookup_pair<3>(shared, word, lane4)};
        mma_16x8x16<T>(c[j], f, x[2 * tile], x[2 * tile + 1]);
      }
    }
    __syncwarp();
    feed(slot);
    if (++slot == kDepth) {
      slot = 0;
      parity ^= 1;
    }
    if (is_first) {
      is_first = false;
      if constexpr (kNested && kHasBulkCopies) wait_barrier(map_barrier, 0);
    }
    float of_row[2];
    if constexpr (kNested) {
      const unsigned char* map = shared + kMapAt;
      const float offset = *reinterpret_cast<const float*>(map);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        of_row[i] = __fmaf_rn(
            *reinterpret_cast<const float*>(map + 4 + ((i ? scale >> 6 : scale << 2) & 0x3FC)),
            nested[i], offset);
    } else {
      of_row[0] = scale.x;
      of_row[1] = scale.y;
    }
    float* const sum_at = reinterpret_cast<float*>(own_sums + row * a.sum_stride);
    if (++row == rows) {
      row = 0;
      ++group;
      if (left > 1) {
        load_x();
        aim_scales();
        prefetch_scales();
        load_scales();
      }
    } else {
      scale_at += kTileN / 2;
      nested_at += kTileN * a.blocks_a_row;
      if (left > 1) load_scales();
    }
    // rows 2p, 2p + 1 of strip t by token; lane t keeps row t / 2, token t % 2 of all strips
    const bool is_odd = t % 2, is_upper = t / 2;
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      v[e] =
          of_row[e / 2] * (is_upper ? (is_odd ? c[3][e] : c[2][e]) : (is_odd ? c[1][e] : c[0][e]));
    const float row0 = (is_odd ? v[1] : v[0]) + __shfl_xor_sync(kAllLanes, is_odd ? v[0] : v[1], 1);
    const float row1 = (is_odd ? v[3] : v[2]) + __shfl_xor_sync(kAllLanes, is_odd ? v[2] : v[3], 1);
    *sum_at += (is_upper ? row1 : row0) + __shfl_xor_sync(kAllLanes, is_upper ? row0 : row1, 2);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * 32; i += kThreads) {
    const unsigned char* const at = sums + i / 32 * a.sum_stride;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < kWarps; ++part)
      sum += *reinterpret_cast<const float*>(at + part * rows * a.sum_stride);
    sum *= a.inverse_gain;
    if (a.has_start) sum += reinterpret_cast<const float*>(shared + kStartAt)[i];
    const int n = (first_strip + i / 32) * kTileN + row_pair + t / 2, m = t % 2;
    if (m < a.M && n < a.N) static_cast<T*>(a.y)[int64_t(m) * a.N + n] = from_acc<T>(sum);
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

// Sums of up to 16 row strips lie in the holes.
bool sums_in_holes(int rows) {
  return rows * kWarps * kEntryStride <= kTableBytes;
}
int shared_bytes(int rows) {
  return kSumsAt + (sums_in_holes(rows) ? 0 : kWarps * rows * kSumBytes);
}

}  // namespace

namespace skinny {

bool gemv_fits(const QLinearFwdParams& p) {
  // The map is copied in pieces of 16 bytes: three floats behind it are read.
  const bool map_fits =
      !p.w.nested ||
      (is_aligned(p.w.nested, 16) && block_count(p.w.N, p.w.K, p.w.blocksize) > 2 * kNestedBlock);
  return p.M <= 2 && p.w.K >= kStrips * kTileK && map_fits &&
         device_facts().shared_bytes >= shared_bytes(kMaxRows);
}

void qlinear_fwd_gemv(const QLinearFwdParams& p) {
  const char* name = "qlinear_fwd_gemv_kernel";
  const DeviceFacts facts = device_facts();
  const PackedWeight w = packed_weight(p.w);
  Args a = {};
  a.codes = w.codes;
  a.scales = w.scales;
  a.nested = w.nested;
  a.x = p.x;
  a.strips_k = w.strips_k;
  a.groups = ceil_div(w.strips_k, kStrips);
  a.block_shift = w.block_shift - 6;
  a.blocks_a_row = int(w.K >> w.block_shift);
  a.Np = int(w.Np);
  a.N = int(w.N);
  a.K = int(w.K);
  a.M = int(p.M);
  a.is_dependent = dependent_launch() && facts.arch >= 90;
  a.R = int(p.R);
  a.bias = p.bias;
  a.s = p.R > 0 ? p.s : nullptr;
  a.lora_b = p.lora_b;
  a.scaling = p.scaling;
  a.y = p.y;
  a.has_start = a.s || a.bias;
  a.ranks_by_4 = p.R % 4 == 0 && is_aligned(p.s, 8) && is_aligned(p.lora_b, 8);
  a.inverse_gain = pack_book(a.book, p.dtype, p.w.format);
  const int blocks = split_rows(a, w.strips_n, facts.sm_count);
  for (int i = 0; i < 2; ++i)
    a.reciprocal[i] = uint32_t(((int64_t(1) << 31) + a.base + i - 1) / (a.base + i));
  const Kernel kernel = p.dtype == DType::kBFloat16 ? pick<bf16>(a.nested) : pick<fp16>(a.nested);
  const int rows_a_block = a.base + (a.rest > 0);
  a.sums_at = sums_in_holes(rows_a_block) ? kEntryStride / 2 : kSumsAt;
  a.sum_stride = sums_in_holes(rows_a_block) ? kEntryStride : kSumBytes;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes(kMaxRows));
  launch_kernel(kernel, name, dim3(unsigned(blocks)), kThreads, shared_bytes(rows_a_block),
                p.stream, 1, a);
}

}  // namespace skinny
}  // namespace fastpeft::cuda
