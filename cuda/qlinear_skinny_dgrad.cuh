// The bricks of qlinear_skinny_dgrad.cu: its parameters, shared memory, the walk over chunks with
// copies of codes, scales, dy, the table and the products, LoRA's part, sums across a cluster.
#pragma once
#include "device/copy.cuh"
#include "qlinear_skinny.cuh"

namespace fastpeft::cuda::skinny_dgrad {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kHalf = 32;                     // columns
constexpr int kItem = 32;                     // rows of W: two strips
constexpr int kChunk = 4, kRows = 4 * kItem;  // items a chunk; 4 rows a lane
constexpr int kEntry = 256, kTableBytes = 256 * kEntry, kMapBytes = 1024;
constexpr int kRingAt = kTableBytes + kMapBytes;

// i-th of `parts` equal shares, to within one, of something.
struct Share {
  int base, extra;
  __device__ __forceinline__ int begin(int part) const { return part * base + min(part, extra); }
};

inline Share share_of(int64_t total, int parts) {
  return {int(total / parts), int(total % parts)};
}

// What the kernel reads first stands first: parameters arrive by lines of 64 bytes.
struct Args {
  const uint8_t* codes;  // PackedWeight
  const void* scales;
  const float* nested;
  const void* dy;     // [M, N]
  void* dx;           // [M, K]
  int cluster_shift;  // log2(blocks of a cluster)
  Share halves;       // over the clusters
  Share items;        // over the warps of a cluster
  int strips_n, strips_k, block_shift, N, Np, M, R;
  int blocks_a_row;    // K / blocksize
  float inverse_gain;  // 1 / gain
  const void* ds;      // [M, R] or null
  const void* lora_a;  // [R, K] or null
  int64_t K;
  uint16_t book[16];  // codes times gain, in the activations' type
};

// Shared memory of a variant. kWide: whole strips, for devices with 227 KB a block and clusters;
// else halves only, within 99 KB, where what belongs to one warp lies in the 128-byte holes between
// the entries of the table.
template <int kTokens, bool kWide>
struct Layout {
  static constexpr int kHalves = kWide ? 2 : 1;
  static constexpr int kSlot = 512 * kHalves;          // an item
  static constexpr int kPuts = kTokens / 2 * kHalves;  // pairs of sums of a lane and unit
  // Of a warp: folded dy or scales, and the sums of a unit, where there is room twice.
  static constexpr int kFoldBytes = kTokens == 4 ? 8 * kRows : 4 * kRows;
  static constexpr int kSumBytes = 8 * 32 * kPuts;
  static constexpr int kBuffers = kWide && kTokens < 16 ? 2 : 1;
  static constexpr int kScratchBytes = kFoldBytes + kBuffers * kSumBytes;
  static constexpr int kScratchAt = kWide ? kRingAt + kWarps * kChunk * kSlot : 128;
  static constexpr int kScratchStride = kWide ? kScratchBytes : 16 * kEntry;  // between warps
  static constexpr int kSumsIn = kWide ? kFoldBytes : 0;               // narrow: over the folded dy
  static constexpr int kMailAt = kScratchAt + kWarps * kScratchBytes;  // kWide: of two units
  static constexpr int kBellAt = kMailAt + 2 * kSumBytes;              // two barriers
  static constexpr int kBytes = kWide ? kBellAt + 16 : kRingAt + kWarps * kChunk * kSlot;
  static_assert(kWide ? kBytes <= 227 * 1024 : kBytes <= 99 * 1024, "shared memory");
  static_assert(kWide || (kFoldBytes <= 2048 && kSumBytes <= 2048), "the holes of 16 entries");

  static __device__ __forceinline__ constexpr int place(int byte) {
    return kWide ? byte : byte / 128 * kEntry + byte % 128;
  }
};

// ---- bricks
__device__ __forceinline__ void copy_async16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// Sums between the blocks of a cluster: a store on a remote address that counts its bytes on the
// receiver's barrier. (Releasing a cluster barrier would cost a fence of the whole GPU a unit.)
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.relaxed.aligned;" ::
                   : "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void mail_init(uint32_t bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
#endif
}
__device__ __forceinline__ void mail_expect(uint32_t bar, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void mail_wait(uint32_t bar, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred p;\nW: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@p bra D;\nbra W;\nD:\n}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
#endif
}
__device__ __forceinline__ void mail_send(uint32_t to, uint32_t bell, int rank, float2 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 there, bell;\n.reg .b64 both;\nmapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 bell, %1, %2;\nmov.b64 both, {%3, %4};\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [there], both, "
      "[bell];\n}\n" ::"r"(to),
      "r"(bell), "r"(rank), "f"(v.x), "f"(v.y)
      : "memory");
#endif
}
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t selector) {  // byte 4..7: zero
  return __byte_perm(a, 0, selector);
}
using skinny::keep;
template <class T>
__device__ __forceinline__ const T* keep(const T* p) {
  return reinterpret_cast<const T*>(
      __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(p), threadIdx.x % 32));
}
template <class T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  if constexpr (std::is_same_v<T, bf16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
template <class T>
__device__ __forceinline__ uint32_t mul_pair(uint32_t a, uint32_t b) {
  return fma_pair<T>(a, b, 0x80008000u);  // -0: keeps the sign of a zero product
}
// Swaps nibbles 1 and 2 of both units: (n0,k0)(n0,k1)(n1,k0)(n1,k1) -> pairs of n for k0 and for
// k1.
__device__ __forceinline__ uint32_t transpose_units(uint32_t w) {
  const uint32_t differ = (w ^ (w >> 4)) & 0x00F000F0u;
  return w ^ differ ^ (differ << 4);
}

// ---- one chunk ahead of the products: where the warp is, copies of codes, loads of scales
// Inside a slot: [half][strip][tile % 2][8 rows][16 bytes]; rows of the second strip are stored ^
// 4, so that a matrix, which takes its 8 rows from both, meets every bank once. A unit of one half
// lies in half 0.
template <bool kWide, int kSlot>
struct Ahead {
  int half, width;  // the unit begins at `half` and has 1 or 2
  int item, items;  // the chunk; items: 0 in a warp without rows
  // of this lane
  uint32_t ring, to[2];  // its place in slot 0; of both strips
  const uint8_t* source;
  uint32_t stride;  // bytes between row strips
  int strips;       // that it still copies
  int most;         // a chunk: 8, or 0 where its half of the strips is not of the unit

  __device__ __forceinline__ void count(const Args& a, int p_end) {
    items = min(kChunk, p_end - item);
    strips = min(min(2 * items, a.strips_n - 2 * item), most);
  }
  __device__ __forceinline__ void start_unit(const Args& a, int h, int h_end, int p_begin,
                                             int p_end, int lane) {
    half = h;
    item = p_begin;
    width = kWide && h % 2 == 0 && h + 1 < h_end && a.block_shift >= 6 ? 2 : 1;
    most = unsigned(lane / 16 - half % 2) < unsigned(width) ? 2 * kChunk : 0;
    source = a.codes + (int64_t(2 * item) * a.strips_k + half / 2) * kStripBytes + lane * 16;
    to[0] = ring + (kWide ? (lane / 16 - half % 2) * 512 : 0) + lane / 8 % 2 * kTileBytes +
            lane % 8 * 16;
    to[1] = (to[0] ^ 64) + 256;
    count(a, p_end);
  }
  __device__ __forceinline__ void step(const Args& a, int p_end) {
    item += kChunk;
    count(a, p_end);
  }
  // The next item of the chunk, into slot i; past its end nothing.
  __device__ __forceinline__ void copy(int i) {
    const uint8_t* second = source + stride;
    if (strips > 0) copy_async16(to[0] + i * kSlot, source);
    if (strips > 1) copy_async16(to[1] + i * kSlot, second);
    source = second + stride;
    strips -= 2;
    commit_copies();
  }
};

// Scales of rows 4L .. 4L + 3 of a chunk, in lane L; `n`: the first of them.
template <bool kNested>
struct RowScales {
  uint32_t codes;
  float v[4];  // nested absmax, or absmax

  __device__ __forceinline__ void load(const Args& a, int half, int n) {
    const uint32_t block = half * kHalf >> a.block_shift;
    const uint32_t at = block * a.Np + n;  // less than twice the blocks, which are below 2^31
    if constexpr (kNested) {
      codes = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(a.scales) + at));
      const float* nested = a.nested + 257;
      const uint32_t flat = uint32_t(n) * a.blocks_a_row + block;
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = __ldg(nested + ((flat + e * a.blocks_a_row) >> 8));
    } else {
      const float4 s =
          __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(a.scales) + at));
      v[0] = s.x, v[1] = s.y, v[2] = s.z, v[3] = s.w;
    }
  }
  // absmax / gain; map and offset are times 1 / gain already. The second level is one FMA here: its
  // last bit is far below 16-bit codes.
  __device__ __forceinline__ void decode(const float* map, float offset, float inverse_gain,
                                         float (&s)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      s[e] = kNested ? __fmaf_rn(map[codes >> (8 * e) & 255], v[e], offset) : v[e] * inverse_gain;
  }
};

// float16: the largest absmax of an item (8 lanes) into [0.5, 1); returns what undoes it.
__device__ __forceinline__ float normalise(float (&s)[4]) {
  const float top =
      group_max<8>(fmaxf(fmaxf(fabsf(s[0]), fabsf(s[1])), fmaxf(fabsf(s[2]), fabsf(s[3]))));
  const int exponent = min(max(int(__float_as_uint(top) >> 23), 1), 252);
#pragma unroll
  for (int e = 0; e < 4; ++e) s[e] *= __int_as_float((253 - exponent) << 23);
  return __int_as_float((exponent + 1) << 23);
}

// ---- dy
// M <= 4: rows of the lane as of RowScales, of every token.
template <class T, int kTokens>
struct RowGrads {
  uint2 v[kTokens];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kTokens; ++m) v[m] = make_uint2(0, 0);
  }
  __device__ __forceinline__ void load(const T* at, int N, int tokens) {
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (m >= tokens) break;
      v[m] = __ldg(reinterpret_cast<const uint2*>(at + m * N));
    }
  }
  __device__ __forceinline__ uint2 folded(int m, const float (&s)[4]) const {
    const float2 low = unpack_pair<T>(v[m].x), high = unpack_pair<T>(v[m].y);
    return make_uint2(pack_pair<T>(low.x * s[0], low.y * s[1]),
                      pack_pair<T>(high.x * s[2], high.y * s[3]));
  }
};

// More tokens: 8 kTok of them, 32 rows; lane (g, t) holds rows 8t .. 8t + 7 of tokens g and g + 8.
// A token past M reads the last one's: its column of the sums is its own.
template <class T, int kTok>
struct ItemGrads {
  uint4 v[kTok];
  const T* row[kTok];

  __device__ __forceinline__ void start(const T* first, int N, int tokens, int g) {
#pragma unroll
    for (int j = 0; j < kTok; ++j) row[j] = keep(first + int64_t(min(8 * j + g, tokens - 1)) * N);
  }
  __device__ __forceinline__ void load(int n) {
#pragma unroll
    for (int j = 0; j < kTok; ++j) v[j] = __ldg(reinterpret_cast<const uint4*>(row[j] + n));
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kTok; ++j) v[j] = make_uint4(0, 0, 0, 0);
  }
};

template <int kByte>
__device__ __forceinline__ uint32_t look_up(const unsigned char* shared, uint32_t word,
                                            uint32_t lane4) {
  return *reinterpret_cast<const uint32_t*>(shared +
                                            __byte_perm(word, lane4, 0x7604 | (kByte << 4)));
}

// The table: byte -> pair of 16-bit values, a copy a lane. Two threads an entry, 64 bytes each;
// pieces rotated by entry so that the stores spread over banks.
__device__ __forceinline__ void fill_table(unsigned char* shared, const Args& a) {
  const int entry = threadIdx.x / 2;
  const uint32_t pair = a.book[entry % 16] | uint32_t(a.book[entry / 16]) << 16;
#pragma unroll
  for (int q = 0; q < 4; ++q)
    *reinterpret_cast<uint4*>(shared + entry * kEntry + threadIdx.x % 2 * 64 +
                              (q + entry) % 4 * 16) = make_uint4(pair, pair, pair, pair);
}

// Half of an item: 16 rows (8t + 4 step .. + 3 of lane t) x 32 columns. q: words (tile 0, step 0),
// (tile 1, step 0), (tile 0, step 1), (tile 1, step 1).
template <bool kPairs>
__device__ __forceinline__ void look_up_step(const unsigned char* shared, const uint4& q, int step,
                                             uint32_t lane4, uint32_t (&f)[2][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    uint32_t w = word_of(q, 2 * step + tile);
    if constexpr (!kPairs) w = transpose_units(w);
    f[tile][0] = look_up<0>(shared, w, lane4);
    f[tile][1] = look_up<1>(shared, w, lane4);
    f[tile][2] = look_up<2>(shared, w, lane4);
    f[tile][3] = look_up<3>(shared, w, lane4);
  }
}

// b: folded dy, M <= 4: a register a row; else a register two rows.
template <class T, int kTok, bool kPairs>
__device__ __forceinline__ void add_step(const uint32_t (&f)[2][4], int step,
                                         const uint32_t (&b)[kTok][kPairs ? 8 : 4],
                                         float (&acc)[2][kTok][4]) {
  if constexpr (kPairs) {  // rows of both tiles; acc: two chains
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t both[4] = {f[0][2 * e], f[1][2 * e], f[0][2 * e + 1], f[1][2 * e + 1]};
      mma_16x8x16<T>(acc[e][0], both, b[0][4 * step + 2 * e], b[0][4 * step + 2 * e + 1]);
    }
  } else {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int j = 0; j < kTok; ++j)
        mma_16x8x16<T>(acc[tile][j], f[tile], b[j][2 * step], b[j][2 * step + 1]);
  }
}

// One rank of ds A for the lane's outputs: columns pair by pair, tokens as the accumulators have
// them. Loaded early, added late.
template <class T, int kTok, bool kPairs, int kHalves>
struct LoraTerm {
  uint32_t factor[kHalves][2];
  T ds[kPairs ? 1 : 2 * kTok];

  __device__ __forceinline__ void load(const Args& a, int rank, int column, int width, int m0,
                                       int t) {
    const T* at = static_cast<const T*>(a.lora_a) + int64_t(rank) * a.K + column;
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        factor[h][tile] =
            h < width ? __ldg(reinterpret_cast<const uint32_t*>(at + h * kHalf + tile * 16)) : 0;
#pragma unroll
    for (int i = 0; i < (kPairs ? 1 : 2 * kTok); ++i) {
      const int m = m0 + (kPairs ? t : 8 * (i / 2) + 2 * t + i % 2);
      ds[i] = from_acc<T>(0.0f);
      if (m < a.M) ds[i] = static_cast<const T*>(a.ds)[int64_t(m) * a.R + rank];
    }
  }
  __device__ __forceinline__ void add(float (&acc)[kHalves][2][kTok][4]) const {
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const float2 f = unpack_pair<T>(factor[h][tile]);
        if constexpr (kPairs) {
          acc[h][0][0][2 * tile] += to_acc(ds[0]) * f.x;
          acc[h][0][0][2 * tile + 1] += to_acc(ds[0]) * f.y;
        } else {
#pragma unroll
          for (int i = 0; i < 2 * kTok; ++i) {
            acc[h][tile][i / 2][i % 2] += to_acc(ds[i]) * f.x;
            acc[h][tile][i / 2][2 + i % 2] += to_acc(ds[i]) * f.y;
          }
        }
      }
  }
};

}  // namespace fastpeft::cuda::skinny_dgrad
