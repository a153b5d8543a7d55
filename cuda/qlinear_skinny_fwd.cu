// 4-bit linear layer for few tokens, decode inside, forward (sm_80 and newer). Shared parts and the
// lookup: qlinear_skinny.cuh.
//
//   y [M, N] = x W^T + bias + scaling * s B^T      x [M, K], s [M, R], B [N, R]
//   W [N, K] tiled 4-bit codes, one absmax a block of >= 64 columns
//
// One lane's 16 stored bytes are the A fragments of a whole strip (16 rows x 64 columns), because
// the order of the reduction is free: lane (g, t) reads row g of tile t; its word i holds the pairs
// i and i+4 of columns of tile t, and is taken as the fragment of step i. The matching B fragment
// of step i is words i of x[token g][16t .. 16t+7] and [16t+8 .. 16t+15]: two plain 16-byte loads a
// strip, no shared memory. Codes stay unscaled in the mma; absmax * the strip's sum is added in
// float32.
//
//     block: rows [16 s0, 16 s1), all of K         k strips:  | warp 0 | warp 1 | ... | warp 15 |
//     a warp: for its k strips: x fragment once, then up to 4 (16 tokens: 2) row strips
//
// Bound: reading the codes once, 0.516 bytes a weight. Lookups cost 16 LDS + 16 PRMT per 1024
// weights a warp: at most 64 weights a clock and SM against 34 that memory delivers. What it waits
// for are instructions and their latency (46 % of issue slots, 38 % of DRAM at 14336x4096, M = 1;
// README.md).
#include "qlinear_skinny.cuh"

namespace fastpeft::cuda {

namespace {

using namespace skinny;

template <int kTok>
struct TokenFragment {  // x of 8 * kTok tokens, 64 columns
  uint4 low[kTok], high[kTok];

  template <class T>
  __device__ __forceinline__ void load(const Args& a, int m0, int g, int t, int ks) {
    const T* at = static_cast<const T*>(a.in) + ks * kTileK + t * 16;
#pragma unroll
    for (int i = 0; i < kTok; ++i) {
      const int m = m0 + 8 * i + g;
      low[i] = high[i] = make_uint4(0, 0, 0, 0);
      if (m < a.M) {
        const uint4* piece = reinterpret_cast<const uint4*>(at + m * a.w.K);
        low[i] = __ldg(piece);
        high[i] = __ldg(piece + 1);
      }
    }
  }
};

// Feeds the ring: strips of a chunk of kRows row strips, for every k strip; then the next chunk.
// The first strip of a k strip brings the scales of the whole chunk.
template <bool kNested, int kRows, int kDepth>
struct Feeder {
  uint32_t ring;                         // this lane's place in slot 0
  uint32_t scale_at;                     // slot 0
  const uint8_t *source, *first_source;  // this lane's next 16 bytes; those of row strip `base`
  int64_t row_stride;                    // bytes between row strips
  int left, base, row, rows, ks, slot;

  __device__ __forceinline__ void start_chunk(const Args& a, int chunk, int s_end, int k_begin,
                                              int lane) {
    base = chunk;
    rows = min(kRows, s_end - chunk);
    ks = k_begin;
    source = first_source =
        a.w.codes + (int64_t(base) * a.w.strips_k + k_begin) * kStripBytes + lane * 16;
  }

  __device__ __forceinline__ void issue(const Args& a, int s_end, int k_begin, int k_end,
                                        int lane) {
    if (left > 0) {
      --left;
      copy_async16(ring + slot, source, 16);
      if (row == 0) {
        const int64_t n = int64_t(base) * kTileN;
        copy_scales<kNested, 4 * kRows>(a, scale_at + slot, lane,
                                        int64_t(ks * kTileK >> a.w.block_shift) * a.w.Np + n,
                                        n + 4 * lane < a.w.Np);
      }
      source += row_stride;
      if (++row == rows) {
        row = 0;
        source = first_source += kStripBytes;
        if (++ks == k_end) start_chunk(a, base + kRows, s_end, k_begin, lane);
      }
    }
    commit_copies();
    slot = slot == (kDepth - 1) * slot_bytes(kNested) ? 0 : slot + slot_bytes(kNested);
  }
};

// bias and scaling * s B^T as the first partial sums of kRows row strips from `strip`: warp w adds
// ranks w, w + 16, ... All loads of a rank are issued before the first is used.
template <class T, int kTok, int kRows>
__device__ __forceinline__ void start_sums(const Args& a, int strip, int row_pair, int m0, int t,
                                           int warp, float (&acc)[kRows][kTok][4]) {
  const T* bias = static_cast<const T*>(a.bias);
  const T* s = static_cast<const T*>(a.s);
  const T* lora_b = static_cast<const T*>(a.factor);
  const auto row_of = [&](int row, int e) { return int64_t(strip + row) * kTileN + row_pair + e; };
#pragma unroll
  for (int row = 0; row < kRows; ++row)
#pragma unroll
    for (int i = 0; i < kTok; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[row][i][c] = 0.0f;
  if (bias && warp == 0) {
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float value = row_of(row, e) < a.w.N ? to_acc(bias[row_of(row, e)]) : 0.0f;
#pragma unroll
        for (int i = 0; i < kTok; ++i) acc[row][i][2 * e] = acc[row][i][2 * e + 1] = value;
      }
  }
  if (!s) return;
  for (int r = warp; r < a.R; r += kWarps) {
    float b[kRows][2], value[kTok][2];
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        b[row][e] = row_of(row, e) < a.w.N ? to_acc(lora_b[row_of(row, e) * a.R + r]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kTok; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int m = m0 + 8 * i + 2 * t + j;
        value[i][j] = m < a.M ? a.scaling * to_acc(s[int64_t(m) * a.R + r]) : 0.0f;
      }
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int i = 0; i < kTok; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[row][i][c] += value[i][c % 2] * b[row][c / 2];
  }
}

// The sums of 16 rows x 8 kTok tokens of one strip.
template <class T, int kTok>
__device__ __forceinline__ void add_strip(const unsigned char* shared, const uint4& q,
                                          uint32_t lane4, const TokenFragment<kTok>& x,
                                          float scale0, float scale1, float (&acc)[kTok][4]) {
  float c[kTok][2][4] = {};  // two chains of mma each
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t f[4];
    lookup_fragment(shared, word_of(q, i), lane4, f);
#pragma unroll
    for (int j = 0; j < kTok; ++j)
      mma_16x8x16<T>(c[j][i % 2], f, word_of(x.low[j], i), word_of(x.high[j], i));
  }
#pragma unroll
  for (int j = 0; j < kTok; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[j][e] += (e < 2 ? scale0 : scale1) * (c[j][0][e] + c[j][1][e]);
}

template <class T, int kTok, int kDepth, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_fwd_skinny_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int kRows = 4 / kTok, kTokens = 8 * kTok, kSlot = slot_bytes(kNested);
  const PackedWeight& w = a.w;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const uint32_t lane4 = lane * 4;
  const int s_begin = share(blockIdx.x, gridDim.x, w.strips_n);
  const int s_end = share(blockIdx.x + 1, gridDim.x, w.strips_n);
  const int k_begin = share(warp, kWarps, w.strips_k), k_end = share(warp + 1, kWarps, w.strips_k);
  const int m0 = blockIdx.y * kTokens;
  const int row_pair = 2 * pair_order(g);

  // Chunk (tile T, row r) of a strip lies at T * 128 + (r ^ 2T) * 16, so that reading row g of tile
  // t is free of conflicts.
  unsigned char* ring = shared + kRingAt + warp * kDepth * kSlot;
  const uint32_t ring_at = shared_address(ring);
  const uint32_t read_at = keep(ring_at + t * kTileBytes + (g ^ (2 * t)) * 16);
  Feeder<kNested, kRows, kDepth> feeder;
  feeder.ring = keep(ring_at + (lane / 8) * kTileBytes + ((lane % 8) ^ (2 * (lane / 8))) * 16);
  feeder.scale_at = ring_at;
  feeder.row_stride = int64_t(w.strips_k) * kStripBytes;
  feeder.left = (k_end - k_begin) * (s_end - s_begin);
  feeder.row = feeder.slot = 0;
  feeder.start_chunk(a, s_begin, s_end, k_begin, lane);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) feeder.issue(a, s_end, k_begin, k_end, lane);

  // lane (g, t) decodes the scales of the two rows g of row strip t of the chunk
  TokenFragment<kTok> x;
  float nested[2] = {0.0f, 0.0f};
  int first_block[2];  // of the lane's rows; rows past N read row N - 1
  const auto find_blocks = [&](int base) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int n = (base + t % kRows) * kTileN + row_pair + e;
      first_block[e] = min(n, int(w.N) - 1) * a.blocks_a_row;
    }
  };
  const auto load_ahead = [&](int ks) {
    x.template load<T>(a, m0, g, t, ks);
    if constexpr (kNested) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        nested[e] =
            __ldg(w.nested + 257 + ((first_block[e] + (ks * kTileK >> w.block_shift)) >> 8));
    }
  };
  find_blocks(s_begin);
  if (k_begin < k_end) load_ahead(k_begin);
  fill_pairs<T>(shared, a.book);
  Scales<kNested> scales;
  scales.fill(a, shared);
  float acc[kRows][kTok][4];
  start_sums<T, kTok, kRows>(a, s_begin, row_pair, m0, t, warp, acc);
  __syncthreads();

  int slot = 0;
  for (int base = s_begin; base < s_end; base += kRows) {
    const int rows = min(kRows, s_end - base);
    const bool has_next = base + kRows < s_end;
    for (int ks = k_begin; ks < k_end; ++ks) {
      const TokenFragment<kTok> now = x;
      const float now_nested[2] = {nested[0], nested[1]};
      float absmax[2];
      if (ks + 1 < k_end) {  // the next strip's x and second-level scales, behind this strip's work
        load_ahead(ks + 1);
      } else if (has_next) {
        find_blocks(base + kRows);
        load_ahead(k_begin);
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= rows) break;
        wait_copies<kDepth - 1>();
        __syncwarp();
        const uint4 q = load_shared16(read_at + slot);
        if (row == 0) {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            absmax[e] = scales.of(ring + slot, t % kRows * kTileN + row_pair + e, now_nested[e]);
        }
        slot = slot == (kDepth - 1) * kSlot ? 0 : slot + kSlot;
        __syncwarp();
        feeder.issue(a, s_end, k_begin, k_end, lane);
        const float scale0 = __shfl_sync(kAllLanes, absmax[0], (lane & ~3) | row);
        const float scale1 = __shfl_sync(kAllLanes, absmax[1], (lane & ~3) | row);
        add_strip<T, kTok>(shared, q, lane4, now, scale0, scale1, acc[row]);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int j = 0; j < kTok; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int f = ((row * kWarps + warp) * kTokens + 8 * j + 2 * t + e) * 16 + row_pair;
          *reinterpret_cast<float2*>(partial(shared, f)) =
              make_float2(acc[row][j][e], acc[row][j][2 + e]);
        }
    if (has_next) start_sums<T, kTok, kRows>(a, base + kRows, row_pair, m0, t, warp, acc);
    __syncthreads();
    // one output a thread
    const int n16 = threadIdx.x % 16, row = threadIdx.x / 16 % kRows,
              token = threadIdx.x / (16 * kRows);
    const int64_t n = int64_t(base + row) * kTileN + n16, m = m0 + token;
    if (row < rows && n < w.N && m < a.M) {
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < kWarps; ++part)
        sum += *partial(shared, ((row * kWarps + part) * kTokens + token) * 16 + n16);
      static_cast<T*>(a.out)[m * w.N + n] = from_acc<T>(sum);
    }
    if (has_next) __syncthreads();  // the partial sums are read
  }
}

template <class T, int kTok>
Kernel pick_ring(Variant v) {
  if (v.is_nested)
    return v.is_deep ? qlinear_fwd_skinny_kernel<T, kTok, kDeep, true>
                     : qlinear_fwd_skinny_kernel<T, kTok, kShallowNested, true>;
  return v.is_deep ? qlinear_fwd_skinny_kernel<T, kTok, kDeep, false>
                   : qlinear_fwd_skinny_kernel<T, kTok, kShallow, false>;
}

Kernel pick(Variant v) {
  if (v.is_bf16) return v.is_wide ? pick_ring<bf16, 2>(v) : pick_ring<bf16, 1>(v);
  return v.is_wide ? pick_ring<fp16, 2>(v) : pick_ring<fp16, 1>(v);
}

}  // namespace

namespace skinny {

bool weight_fits(const WeightView& w, DType dtype) {
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && is_4bit(w.format) &&
         scales_by_column(w.K, w.blocksize) && is_aligned(w.codes, 16) &&
         is_aligned(w.scales, 16) && block_count(w.N, w.K, w.blocksize) < (int64_t(1) << 31);
}

void launch(Args& a, DType dtype, Format format, int64_t parts, Stream stream,
            Kernel (*pick)(Variant), const char* name) {
  const DeviceFacts facts = device_facts();
  Variant v;
  v.is_bf16 = dtype == DType::kBFloat16;
  v.is_wide = a.M > 8;
  v.is_nested = a.w.nested != nullptr;
  v.is_deep = facts.shared_bytes >= shared_bytes(kDeep, v.is_nested);
  // FP4's codes are exact in bf16 when multiplied by 12; float16 holds both codebooks well enough.
  const float gain = !v.is_bf16 ? 1.0f : format == Format::kNf4 ? 1.43675f : 12.0f;
  a.book = codebook(format, gain);
  a.inverse_gain = 1.0f / gain;
  a.blocks_a_row = int(a.w.K >> a.w.block_shift);
  const int bytes = shared_bytes(v.is_deep     ? kDeep
                                 : v.is_nested ? kShallowNested
                                               : kShallow,
                                 v.is_nested);
  FASTPEFT_CHECK(facts.shared_bytes >= bytes, name, ": ", bytes,
                 " bytes of shared memory a block are needed, the device has ", facts.shared_bytes);
  const Kernel kernel = pick(v);
  allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
  const int64_t token_chunks = ceil_div<int64_t>(a.M, v.is_wide ? 16 : 8);
  FASTPEFT_CHECK(token_chunks < 65536, name, ": ", a.M, " tokens in one launch");
  const dim3 grid(unsigned(parts < facts.sm_count ? parts : facts.sm_count),
                  unsigned(token_chunks));
  kernel<<<grid, kThreads, bytes, cuda_stream(stream)>>>(a);
  check_launch(name);
}

}  // namespace skinny

bool skinny_fits(const QLinearFwdParams& p) {
  return weight_fits(p.w, p.dtype) && p.w.blocksize >= kTileK && is_aligned(p.x, 16);
}

void qlinear_fwd_skinny(const QLinearFwdParams& p) {
  Args a = {};
  a.w = packed_weight(p.w);
  a.M = int(p.M);
  a.R = int(p.R);
  a.in = p.x;
  a.bias = p.bias;
  a.s = p.R > 0 ? p.s : nullptr;
  a.factor = p.lora_b;
  a.scaling = p.scaling;
  a.out = p.y;
  launch(a, p.dtype, p.w.format, a.w.strips_n, p.stream, pick, "qlinear_fwd_skinny_kernel");
}

}  // namespace fastpeft::cuda
