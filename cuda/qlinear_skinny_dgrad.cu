// 4-bit linear layer for few tokens, decode inside, input gradient (sm_80 and newer). Bricks:
// qlinear_skinny_dgrad.cuh.
//
//   dx [M, K] = dy W + ds A                dy [M, N], ds [M, R], A [R, K]
//   W [N, K] tiled 4-bit codes, one absmax a block of >= 32 columns
//
// The forward's bytes through ldmatrix.trans: rows k, reduction n. A stored byte holds one row n of
// a pair of columns (k0, k1), and so does what the table gives for it.
//   M <= 4: the pair is taken as it is, as two elements of the reduction: (n, k0), (n, k1). Column
//   2m of the other operand is (dy, 0), column 2m + 1 (0, dy): sums of k0 and of k1. No nibble is
//   moved, and the mma are as many as otherwise, for half of its products are with zero.
//   M <= 16: nibbles 1 and 2 of a unit are swapped first (4 instructions for 8 weights), then a
//   byte holds rows n0, n1 of one column; 8 or 16 tokens are the columns.
// absmax varies along n, so it is folded into dy. A warp decodes it for 128 rows at once, 4 rows a
// lane, into its own scratch: folded dy (M <= 4), or the scale as a 16-bit high and low part, two
// packed operations a pair of dy. dy is so rounded to 16 bits once more; in float16 the scales of
// an item are normalised by a power of two, or small absmax would underflow.
//
//     cluster of blocks: some halves of strips (32 columns), all of N; warps of all blocks:
//     rows:  | warp 0 | warp 1 | ... | warp 16 c - 1 |     chunk of a warp: 4 items; item: 32 rows
//     unit: a strip (64 columns), or one half of it where a share begins or ends inside a strip
// Sums of the warps meet in shared memory, those of the blocks through distributed shared memory,
// always in the same order.
//
// Bound: reading the codes, 33 clocks for 1024 weights and SM of an H200 (4.1 TB/s, 1.98 GHz).
// Shared memory takes 28 (measured; 16 are lookups, 8 writing and reading the codes), issue 19 - 23
// (75 - 92 instructions of 4 schedulers). 28672x8192, M = 1: 37 clocks. README.md has the rest.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "dependent_launch.cuh"
#include "qlinear_skinny.cuh"
#include "qlinear_skinny_dgrad.cuh"

namespace fastpeft::cuda {

namespace {

using namespace skinny_dgrad;

template <class T, int kTokens, bool kWide, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_dgrad_skinny_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  using L = Layout<kTokens, kWide>;
  constexpr bool kPairs = kTokens == 4, kNormalise = std::is_same_v<T, fp16>;
  constexpr int kHalves = L::kHalves, kSlot = L::kSlot, kTok = kPairs ? 1 : kTokens / 8;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);  // uniform, and known to be
  const int cluster_shift = kWide ? a.cluster_shift : 0, cluster = 1 << cluster_shift;
  const int rank = blockIdx.x & (cluster - 1), group = blockIdx.x >> cluster_shift;
  const int part = rank * kWarps + warp, N = a.N;
  const int h_begin = a.halves.begin(group), h_end = a.halves.begin(group + 1);
  const int p_begin = a.items.begin(part), p_end = a.items.begin(part + 1);
  const int m0 = blockIdx.y * kTokens, tokens = min(kTokens, a.M - m0);
  const int column_pair = 2 * pair_order(g);

  // Loads that no kernel of the same step writes: codes, scales, tables.
  Ahead<kWide, kSlot> next;
  next.ring = shared_address(shared + kRingAt + warp * kChunk * kSlot);
  next.stride = uint32_t(a.strips_k) * kStripBytes;
  next.start_unit(a, h_begin, h_end, p_begin, p_end, lane);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) next.copy(i);
  // First of the lane's rows of a chunk. N is a multiple of 8: past it, the last rows are read, and
  // count as zeros.
  const auto rows_at = [&](int item) { return min(item * kItem + 4 * lane, N - 4); };
  RowScales<kNested> scales;
  scales.load(a, h_begin, rows_at(p_begin));
  float map_value = 0.0f, offset = 0.0f;
  if constexpr (kNested) {
    map_value = __ldg(a.nested + 1 + threadIdx.x % 256);
    offset = __ldg(a.nested);
  }
  launch_dependents();
  wait_for_predecessor();

  // Loads of what the kernel before may have written; their latency hides the table's filling.
  RowGrads<T, kPairs ? kTokens : 1> row_grads;
  ItemGrads<T, kTok> item_grads;
  const T* row_grad = static_cast<const T*>(a.dy) + int64_t(m0) * N;
  const auto load_item = [&](int item) { item_grads.load(min(item * kItem + 8 * t, N - 8)); };
  if constexpr (kPairs) {
    row_grads.load(row_grad + rows_at(p_begin), N, tokens);
  } else {
    item_grads.start(row_grad, N, tokens, g);
    load_item(p_begin);
  }
  // The first rank of a warp, where registers allow it; the others are loaded when they are added.
  constexpr bool kRankAhead = kTokens * kHalves < 32;
  LoraTerm<T, kTok, kPairs, kHalves> lora;
  const bool has_rank = kRankAhead && a.ds && part < a.R;
  if (has_rank) lora.load(a, part, h_begin * kHalf + column_pair, next.width, m0, t);

  fill_table(shared, a);
  const uint32_t bells = shared_address(shared + L::kBellAt);
  if (kWide && cluster > 1) {
    if (threadIdx.x == 0) {
      mail_init(bells);
      mail_init(bells + 8);
    }
    cluster_arrive();  // met before the first mail
  }
  // Row i of a matrix of step st is pair 4 (i/2) + 2 st + i%2 of the item's 16: lane t then has
  // rows 8t + 4 st .. + 3 of W in word (tile, st).
  const int matrix_pair = 4 * (lane % 8 / 2) + 2 * (lane / 16) + lane % 2;
  const uint32_t read_at = keep(next.ring + matrix_pair / 8 * 256 + lane / 8 % 2 * kTileBytes +
                                (pair_place(matrix_pair % 8) ^ (matrix_pair / 8 * 4)) * 16);
  const uint32_t lane4 = keep(lane * 4);
  // Folded dy, or high and low scales: 2 bytes a row, 256 a token or part.
  const uint32_t scratch_at = L::kScratchAt + warp * L::kScratchStride;
  const uint32_t fold_to = keep(scratch_at + L::place(lane * 8));
  const uint32_t fold_from =
      keep(scratch_at + t * 16 + (kPairs ? L::place(256 * min(g / 2, tokens - 1)) : 0));
  const uint32_t even = keep(g % 2 ? 0x1044 : 0x4410), odd = keep(g % 2 ? 0x3244 : 0x4432);
  // A unit's sums lie as the lanes have them, [put][lane] pairs of neighbouring columns; every
  // block finishes 1 / cluster of these pairs. Mail of a unit: [source rank][pair].
  const auto store = [&](int half, int pair, float2 sum) {
    const int put = pair / 32, pair_lane = pair % 32;
    const int token = kPairs ? pair_lane % 4 : put / 2 % kTok * 8 + pair_lane % 4 * 2 + put % 2;
    const int tile = kPairs ? put : put / (2 * kTok);  // of 16 columns
    const int column = half * kHalf + tile * 16 + 2 * pair_order(pair_lane / 4);
    if (token < tokens)
      *reinterpret_cast<uint32_t*>(static_cast<T*>(a.dx) + int64_t(m0 + token) * a.K + column) =
          pack_pair<T>(sum.x, sum.y);
  };
  const auto pairs_of = [&](int width) { return 32 * L::kPuts / kHalves * width; };
  const auto read_mail = [&](int unit, int half, int width) {
    const int own = pairs_of(width) >> cluster_shift, i = threadIdx.x;
    if (i >= own) return;
    mail_wait(bells + unit % 2 * 8, unit / 2 % 2);
    const float2* mail =
        reinterpret_cast<const float2*>(shared + L::kMailAt + unit % 2 * L::kSumBytes) + i;
    float2 sum = make_float2(0.0f, 0.0f);
    for (int r = 0; r < cluster; ++r) {
      sum.x += mail[r * own].x;
      sum.y += mail[r * own].y;
    }
    store(half, rank * own + i, sum);
  };

  float acc[kHalves][2][kTok][4] = {};
  if constexpr (kNested) {
    if (threadIdx.x < 256)
      reinterpret_cast<float*>(shared + kTableBytes)[threadIdx.x] = map_value * a.inverse_gain;
    offset *= a.inverse_gain;
  }
  const float* map = reinterpret_cast<const float*>(shared + kTableBytes);
  __syncthreads();

  // An item's codes are read while the one before is multiplied.
  uint4 q[kHalves];
  const auto load_codes = [&](int h, uint32_t at) {
    if (h == 0) {
      wait_copies<kChunk - 1>();
      __syncwarp();
    }
    q[h] = load_matrices_transposed(at + h * 512);
  };
#pragma unroll
  for (int h = 0; h < kHalves; ++h) load_codes(h, read_at);
  __syncwarp();

  int half, width;
  for (int unit = 0;; ++unit) {
    const int half_before = half, width_before = width;
    half = next.half;
    width = next.width;
    do {
      float s[4], restore = 1.0f;
      scales.decode(map, offset, a.inverse_gain, s);
      const int item = next.item, items = next.items;
      const bool is_ragged = item * kItem + kRows > N;
      if (is_ragged && item * kItem + 4 * lane >= N) {
        s[0] = s[1] = s[2] = s[3] = 0.0f;
        if constexpr (kPairs) row_grads.clear();
      }
      if constexpr (kNormalise) restore = normalise(s);
      if constexpr (kPairs) {
#pragma unroll
        for (int m = 0; m < kTokens; ++m) {
          if (m >= tokens) break;
          *reinterpret_cast<uint2*>(shared + fold_to + L::place(m * 256)) = row_grads.folded(m, s);
        }
      } else {
        const uint2 high = make_uint2(pack_pair<T>(s[0], s[1]), pack_pair<T>(s[2], s[3]));
        const float2 h0 = unpack_pair<T>(high.x), h1 = unpack_pair<T>(high.y);
        *reinterpret_cast<uint2*>(shared + fold_to) = high;
        *reinterpret_cast<uint2*>(shared + fold_to + L::place(256)) = make_uint2(
            pack_pair<T>(s[0] - h0.x, s[1] - h0.y), pack_pair<T>(s[2] - h1.x, s[3] - h1.y));
      }
      __syncwarp();

      if (item + kChunk < p_end)
        next.step(a, p_end);
      else
        next.start_unit(a, half + width, h_end, p_begin, p_end, lane);
      if (next.half >= h_end) {
        next.strips = 0;
      } else {
        scales.load(a, next.half, rows_at(next.item));
        if constexpr (kPairs) row_grads.load(row_grad + rows_at(next.item), N, tokens);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (i >= items) break;
        uint32_t b[kTok][kPairs ? 8 : 4];
        const unsigned char* from = shared + fold_from + L::place(i * 64);
        const uint4 fold = *reinterpret_cast<const uint4*>(from);
        if constexpr (kPairs) {
#pragma unroll
          for (int e = 0; e < 8; ++e) b[0][e] = permute(word_of(fold, e / 2), e % 2 ? odd : even);
        } else {
          const uint4 low = *reinterpret_cast<const uint4*>(from + L::place(256));
          if (is_ragged && (item + i) * kItem + 8 * t >= N) item_grads.clear();
#pragma unroll
          for (int j = 0; j < kTok; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const uint32_t dy = word_of(item_grads.v[j], e);
              b[j][e] = fma_pair<T>(dy, word_of(fold, e), mul_pair<T>(dy, word_of(low, e)));
            }
          load_item(i + 1 < items ? item + i + 1 : next.item);
        }
        const float restore_item = kNormalise ? __shfl_sync(kAllLanes, restore, 8 * i) : 1.0f;
        // The item's codes are in registers: its slot is free. At the end of a short chunk the rest
        // is copied too, so that three younger groups follow the next item's in any case.
        next.copy(i);
        if (i + 1 == items)
#pragma unroll 1
          for (int j = i + 1; j < kChunk; ++j) next.copy(j);
        const uint32_t next_at = read_at + (i + 1 < items ? (i + 1) * kSlot : 0);
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          if (h == 0 || width > 1) {
            float c[2][kTok][4] = {};
            float (&sums)[2][kTok][4] = kNormalise ? c : acc[h];
            uint32_t f[2][4];
            look_up_step<kPairs>(shared, q[h], 0, lane4, f);
            add_step<T, kTok, kPairs>(f, 0, b, sums);
            look_up_step<kPairs>(shared, q[h], 1, lane4, f);
            load_codes(h, next_at);
            add_step<T, kTok, kPairs>(f, 1, b, sums);
            if constexpr (kNormalise) {
#pragma unroll
              for (int tile = 0; tile < 2; ++tile)
#pragma unroll
                for (int j = 0; j < kTok; ++j)
#pragma unroll
                  for (int e = 0; e < 4; ++e) acc[h][tile][j][e] += restore_item * c[tile][j][e];
            }
          } else {
            load_codes(h, next_at);
          }
        }
        __syncwarp();
      }
    } while (__all_sync(kAllLanes, next.half == half));
    const bool has_next = next.half < h_end;

    // ---- the unit's sums: ranks of LoRA, then warps, then blocks
    if (a.ds) {
      if (has_rank) lora.add(acc);
      for (int r = part + (kRankAhead ? kWarps * cluster : 0); r < a.R; r += kWarps * cluster) {
        lora.load(a, r, half * kHalf + column_pair, width, m0, t);
        lora.add(acc);
      }
      if (has_rank && has_next)
        lora.load(a, part, next.half * kHalf + column_pair, next.width, m0, t);
    }
    // Mail of the unit before is read before any thread may send for the one after this.
    if (kWide && cluster > 1 && unit > 0) read_mail(unit - 1, half_before, width_before);
    const int sums_at = L::kSumsIn + unit % L::kBuffers * L::kSumBytes;
    const auto put = [&](int i, float v0, float v1) {
      *reinterpret_cast<float2*>(shared + scratch_at + sums_at + L::place(i * 256) +
                                 L::place(lane * 8)) = make_float2(v0, v1);
    };
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        if constexpr (kPairs) {
          put(2 * h + tile, acc[h][0][0][2 * tile] + acc[h][1][0][2 * tile],
              acc[h][0][0][2 * tile + 1] + acc[h][1][0][2 * tile + 1]);
        } else {
#pragma unroll
          for (int j = 0; j < kTok; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              put(((2 * h + tile) * kTok + j) * 2 + e, acc[h][tile][j][e], acc[h][tile][j][2 + e]);
        }
      }
    __syncthreads();
    if (kWide && cluster > 1) {
      if (unit == 0) cluster_wait();  // all blocks have begun
      if (threadIdx.x == 0) mail_expect(bells + unit % 2 * 8, 8 * pairs_of(width));
    }
    if (threadIdx.x < pairs_of(width)) {
      const unsigned char* from =
          shared + L::kScratchAt + sums_at + L::place(threadIdx.x / 32 * 256) + L::place(lane * 8);
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 v = *reinterpret_cast<const float2*>(from + w * L::kScratchStride);
        sum.x += v.x;
        sum.y += v.y;
      }
      if (cluster == 1) {
        store(half, threadIdx.x, sum);
      } else {
        const int own = pairs_of(width) >> cluster_shift, to = threadIdx.x / own;
        const int at = rank * own + threadIdx.x % own;
        mail_send(shared_address(shared + L::kMailAt + unit % 2 * L::kSumBytes) + 8 * at,
                  bells + unit % 2 * 8, to, sum);
      }
    }
    if (!has_next) {
      if (kWide && cluster > 1) read_mail(unit, half, width);
      return;
    }
    if (L::kBuffers == 1) __syncthreads();  // the sums are read
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int j = 0; j < kTok; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[h][tile][j][e] = 0.0f;
  }
}

using Kernel = void (*)(Args);
struct Choice {
  Kernel kernel;
  int shared_bytes;
};

template <class T, int kTokens, bool kWide>
Choice choose_nested(bool is_nested) {
  return {is_nested ? qlinear_dgrad_skinny_kernel<T, kTokens, kWide, true>
                    : qlinear_dgrad_skinny_kernel<T, kTokens, kWide, false>,
          Layout<kTokens, kWide>::kBytes};
}
template <class T, bool kWide>
Choice choose_tokens(int64_t M, bool is_nested) {
  return M <= 4   ? choose_nested<T, 4, kWide>(is_nested)
         : M <= 8 ? choose_nested<T, 8, kWide>(is_nested)
                  : choose_nested<T, 16, kWide>(is_nested);
}
template <class T>
Choice choose(int64_t M, bool is_wide, bool is_nested) {
  return is_wide ? choose_tokens<T, true>(M, is_nested) : choose_tokens<T, false>(M, is_nested);
}

// Blocks a cluster, clusters, and whether units are whole strips: what finishes first by a model of
// an H200, in rounds of 32 rows x 32 columns for every warp of a block (0.33 us): 9 to start and
// end a block, 4 more for every further unit, 2.5 for a cluster; half units cost 1.17 of whole
// ones.
struct Split {
  int cluster_shift = 0, clusters = 1;
  bool is_wide = false;
};

Split choose_split(int64_t halves, int64_t items, int64_t chunks, int sm_count, bool has_clusters) {
  Split best;
  double best_cost = HUGE_VAL;
  const auto consider = [&](int shift, int64_t resident, int64_t each) {
    const int64_t clusters = ceil_div(halves, each), waves = ceil_div(clusters * chunks, resident);
    const int64_t depth = ceil_div<int64_t>(items, int64_t(kWarps) << shift);
    const bool is_wide = has_clusters && (shift > 0 || each > 1);
    const int64_t units = is_wide ? ceil_div<int64_t>(each, 2) : each;
    const double rounds = double(each * depth) * (is_wide && each > 1 ? 1.0 : 1.17);
    const double cost =
        double(waves) * (9.0 + rounds + 4.0 * double(units - 1) + (shift > 0 ? 2.5 : 0.0));
    if (cost < best_cost) {
      best_cost = cost;
      best = {shift, int(clusters), is_wide};
    }
  };
  for (int shift = 0; shift <= (has_clusters ? 3 : 0); ++shift) {
    // Clusters of 4 and more do not fill every group of multiprocessors.
    const int64_t resident = std::max<int64_t>(1, (sm_count >> shift) * (shift > 1 ? 9 : 10) / 10);
    consider(shift, resident, ceil_div(halves, resident));
    consider(shift, resident, std::min(halves, ceil_div(halves * chunks, resident)));
  }
  return best;
}

template <class T>
uint16_t bits_of(float v) {
  T value;
  if constexpr (std::is_same_v<T, bf16>)
    value = __float2bfloat16_rn(v);
  else
    value = __float2half_rn(v);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}

}  // namespace

bool skinny_fits(const QLinearDgradParams& p) {
  return skinny::weight_fits(p.w, p.dtype) && p.w.N > 0 && p.w.N % 8 == 0 && is_aligned(p.dy, 16) &&
         is_aligned(p.lora_a, 4) && is_aligned(p.dx, 4);
}

void qlinear_dgrad_skinny(const QLinearDgradParams& p) {
  const char* const name = "qlinear_dgrad_skinny_kernel";
  const DeviceFacts facts = device_facts();
  const bool is_bf16 = p.dtype == DType::kBFloat16;
  const int64_t chunks = ceil_div<int64_t>(p.M, 16);
  FASTPEFT_CHECK(chunks < 65536, name, ": ", p.M, " tokens in one launch");
  const int64_t halves = p.w.K / kHalf, items = ceil_div<int64_t>(p.w.N, kItem);
  const bool has_clusters = facts.arch >= 90 && facts.shared_bytes >= 227 * 1024;
  const Split split = choose_split(halves, items, chunks, facts.sm_count, has_clusters);
  const Choice choice = is_bf16 ? choose<bf16>(p.M, split.is_wide, p.w.nested != nullptr)
                                : choose<fp16>(p.M, split.is_wide, p.w.nested != nullptr);
  FASTPEFT_CHECK(facts.shared_bytes >= choice.shared_bytes, name, ": ", choice.shared_bytes,
                 " bytes of shared memory a block are needed, the device has ", facts.shared_bytes);

  // FP4's codes are exact in bf16 when multiplied by 12; float16 holds both codebooks well enough.
  const float gain = !is_bf16 ? 1.0f : p.w.format == Format::kNf4 ? 1.43675f : 12.0f;
  const PackedWeight w = packed_weight(p.w);
  Args a = {};
  a.codes = w.codes;
  a.scales = w.scales;
  a.nested = w.nested;
  a.dy = p.dy;
  a.dx = p.dx;
  a.cluster_shift = split.cluster_shift;
  a.halves = share_of(halves, split.clusters);
  a.items = share_of(items, kWarps << split.cluster_shift);
  a.strips_n = w.strips_n;
  a.strips_k = w.strips_k;
  a.block_shift = w.block_shift;
  a.N = int(w.N);
  a.Np = int(w.Np);
  a.M = int(p.M);
  a.R = int(p.R);
  a.blocks_a_row = int(w.K >> w.block_shift);
  a.inverse_gain = 1.0f / gain;
  a.ds = p.R > 0 ? p.ds : nullptr;
  a.lora_a = p.lora_a;
  a.K = w.K;
  const Codebook book = codebook(p.w.format, gain);
  for (int i = 0; i < 16; ++i)
    a.book[i] = is_bf16 ? bits_of<bf16>(book.v[i]) : bits_of<fp16>(book.v[i]);
  allow_shared_memory(reinterpret_cast<const void*>(choice.kernel), choice.shared_bytes);
  launch_kernel(choice.kernel, name,
                dim3(unsigned(split.clusters << split.cluster_shift), unsigned(chunks)), kThreads,
                choice.shared_bytes, p.stream, 1 << split.cluster_shift, a);
}

}  // namespace fastpeft::cuda
