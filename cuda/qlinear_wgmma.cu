// NF4 x bf16 GEMM for Hopper (sm_90a), forward and input gradient from the same packed bytes.
//
//   forward   y [M, N] = x [M, K]  W^T + bias + scaling * s B^T      output rows = n, reduction = k
//   dgrad     dx[M, K] = dy[M, N] W    + ds A                        output rows = k, reduction = n
//
// Both are computed transposed (y^T = W x^T): decoded weights are wgmma's A operand and never leave
// registers; activations are B, brought in by TMA with the 128-byte swizzle. The LoRA factor is up
// to four more k16 steps on the same sums.
//
// Weight: tiled NF4 of csrc/core/formats.h, blocksize a multiple of 64, K % blocksize == 0.
// ldmatrix on a 16x16 tile gives a lane the 8 nibbles of its m16k16 fragment with rows n,
// ldmatrix.trans those with rows k. MMA rows g, g+8 of a lane are neighbouring outputs 2*pi(g),
// 2*pi(g)+1, so the epilogue packs them into one word. Scales: float32, or uint8 decoded here
// (map[q] * nested + offset), as bf16(absmax / kCodeGain); the table holds bf16(code * kCodeGain).
// kCodeGain lowers the rms rounding of the codes from 0.143 % to 0.085 % (searched over [1, 2)).
//
// Work: tile 128 rows x kTokens tokens x 64. A block: warpgroup 0 = producers (warp 0: TMA; warp 1:
// scales), warpgroups 1, 2 = consumers with 64 rows each. Blocks come in clusters of two. Tiles of
// the full waves are whole; when the rest fills at most half of the blocks, the two blocks of a
// cluster share one tile, each half of the reduction, and exchange the sums of half of the tokens
// through distributed shared memory: no workspace, no flags, no block waits for one that may not be
// resident, and a + b is the same in either order.
//
//      block 2c:  tile tile tile [k first half ]  own tokens   0..127
//      block 2c+1:tile tile tile [k second half]  own tokens 128..255
//
// Bound: tensor cores from M = 256. A k-block is 8 wgmma of 128 clocks a scheduler pair against
// about 150 issue slots of decode a warp: hidden. The card is power-limited there.
#include <algorithm>

#include "dependent_launch.cuh"
#include "device/sm90.cuh"
#include "device/tensor_map.cuh"
#include "device/wgmma.cuh"
#include "launch.h"
#include "qlinear_wgmma.h"

namespace fastpeft::cuda {

namespace {

constexpr float kCodeGain = 1.43675f;
constexpr int kRows = 128, kBlockK = 64, kThreads = 384;
constexpr int kChunk = 4;  // k-blocks whose scales are asked for at a time

struct GemmArgs {
  int M = 0;              // tokens
  int rows = 0;           // length of an output row: N forward, K dgrad
  int N = 0;              // rows of W
  int padded_n = 0;       // N rounded up to 16: length of a scale column
  int scale_columns = 0;  // K / blocksize
  int column_shift = 0;   // log2(blocksize / 64)
  int kblocks = 0;        // reduction / 64
  int tiles_r = 0, tiles_t = 0;
  int x_bytes =
      0;  // of a stage of x: few tokens fill only part of a tile, the rest is never stored
  const void* scales = nullptr;         // [scale_columns][padded_n] float32, or uint8 with nested
  const float* nested = nullptr;        // [257 + groups]
  const __nv_bfloat16* bias = nullptr;  // [rows] or null
  const __nv_bfloat16* lora = nullptr;  // forward: B [N, R]; dgrad: A [R, K]
  int R = 0;
  float scaling = 1.0f;  // forward only; ds carries it in dgrad
};

template <bool kDgrad_, int kTokens_>
struct Config {
  static constexpr bool kDgrad = kDgrad_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kTokens == 256 ? 4 : 6;
  static constexpr int kXBytes = kTokens * kBlockK * 2, kWBytes = kRows * kBlockK / 2,
                       kSBytes = kRows * 2;
  static constexpr int kWAt = kStages * kXBytes, kSAt = kWAt + kStages * kWBytes;
  static constexpr int kMapAt = kSAt + kStages * kSBytes;  // float[256], the dynamic map
  // Output staging, a half for each consumer warpgroup.
  static constexpr int kOutAt = (kMapAt + 1024 + 1023) / 1024 * 1024;
  static constexpr int kBarAt = kOutAt + 2 * kTokens * 64 * 2;
  static constexpr int kShared = kBarAt + 16 * kStages + 16 + 1024;
  static_assert(kShared <= 232448, "shared memory of sm_90");
  static_assert(kStages * kXBytes >= kTokens / 2 * kRows * 4, "the exchange reuses the ring of x");
};

// The 16 bf16 codes as byte tables in 8 registers: low and high bytes, negative and positive half.
struct Codebook {
  uint32_t low_neg[2], low_pos[2], high_neg[2], high_pos[2];
};

__host__ __device__ constexpr uint32_t bf16_bits(float v) {
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
__host__ __device__ constexpr uint32_t code_bytes(int first, int shift) {
  uint32_t r = 0;
  for (int i = 0; i < 4; i++)
    r |= ((bf16_bits(kNf4Code[first + i] * kCodeGain) >> shift) & 0xffu) << (8 * i);
  return r;
}

FASTPEFT_DEVICE Codebook make_codebook() {
  constexpr uint32_t a = code_bytes(0, 0), b = code_bytes(4, 0), c = code_bytes(8, 0),
                     d = code_bytes(12, 0);
  constexpr uint32_t e = code_bytes(0, 8), f = code_bytes(4, 8), g = code_bytes(8, 8),
                     h = code_bytes(12, 8);
  return {{opaque_constant(a), opaque_constant(b)},
          {opaque_constant(c), opaque_constant(d)},
          {opaque_constant(e), opaque_constant(f)},
          {opaque_constant(g), opaque_constant(h)}};
}

// 8 nibbles -> the 4 registers of an m16k16 fragment, unscaled: 21 integer instructions.
template <bool kDgrad>
FASTPEFT_DEVICE void decode8(uint32_t w, const Codebook& t, uint32_t (&f)[4]) {
  const uint32_t w4 = w << 4, s0 = w & 0x77777777u, s1 = s0 >> 16;
  constexpr uint32_t first = kDgrad ? 0x6240 : 0x5140, second = kDgrad ? 0x7351 : 0x7362;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint32_t s = h ? s1 : s0;
    const uint32_t positive =
        permute_bytes(w4, w, h ? 0xFBEA : 0xD9C8);  // bit 3 of each nibble, spread over a byte
    const uint32_t low = (permute_bytes(t.low_pos[0], t.low_pos[1], s) & positive) |
                         (permute_bytes(t.low_neg[0], t.low_neg[1], s) & ~positive);
    const uint32_t high = (permute_bytes(t.high_pos[0], t.high_pos[1], s) & positive) |
                          (permute_bytes(t.high_neg[0], t.high_neg[1], s) & ~positive);
    f[2 * h] = permute_bytes(low, high, first);
    f[2 * h + 1] = permute_bytes(low, high, second);
  }
}

// One tile, or half of one tile's reduction.
struct Item {
  int row = 0, token = 0;  // tile coordinates
  int begin = 0, end = 0;  // k-blocks
  bool shared = false;     // the reduction is cut over the cluster
};

// Which items a block works on. Row tiles in groups of kGroup, tokens outside them, so that
// neighbours in time share x and W in L2.
struct Schedule {
  static constexpr int kGroup = 16;
  int tiles_r, tiles_t, kblocks, blocks, block, full, rest;
  bool cut;

  FASTPEFT_DEVICE Schedule(const GemmArgs& a)
      : tiles_r(a.tiles_r),
        tiles_t(a.tiles_t),
        kblocks(a.kblocks),
        blocks(gridDim.x),
        block(blockIdx.x) {
    const int total = tiles_r * tiles_t;
    full = total / blocks * blocks;
    rest = total - full;
    cut = rest > 0 && 2 * rest <= blocks && kblocks >= 8;
  }
  FASTPEFT_DEVICE int count() const {
    const int last = cut ? block / 2 < rest : block < rest;
    return full / blocks + last;
  }
  FASTPEFT_DEVICE Item at(int i) const {
    Item item;
    item.shared = cut && i * blocks >= full;
    const int index = item.shared ? full + block / 2 : i * blocks + block;
    const int per = kGroup * tiles_t, group = index / per, within = index - group * per;
    const int width = min(kGroup, tiles_r - group * kGroup);
    item.token = within / width;
    item.row = group * kGroup + within - item.token * width;
    const int half = kblocks / 2, second = block & 1;
    item.begin = item.shared && second ? half : 0;
    item.end = item.shared && !second ? half : kblocks;
    return item;
  }
};

// Position in the ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase;
  FASTPEFT_DEVICE explicit Ring(uint32_t first_phase) : phase(first_phase) {}
  FASTPEFT_DEVICE void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

struct Maps {
  CUtensorMap x, w, y, s;
};

template <class C>
FASTPEFT_DEVICE void load_tiles(const Maps& maps, const GemmArgs& a, const Schedule& schedule,
                                uint32_t base, uint32_t full0, uint32_t empty0) {
  for (const CUtensorMap* m : {&maps.x, &maps.w, &maps.y}) tma_prefetch_map(m);
  wait_for_predecessor();
  Ring<C::kStages> ring(1);
  for (int i = 0, items = schedule.count(); i < items; i++) {
    const Item item = schedule.at(i);
    for (int kb = item.begin; kb < item.end; kb++, ring.advance()) {
      barrier_wait(empty0 + 8 * ring.stage, ring.phase);
      const uint32_t full = full0 + 8 * ring.stage;
      const uint32_t w = base + C::kWAt + ring.stage * C::kWBytes;
      barrier_expect(full, a.x_bytes + C::kWBytes);
      if (C::kDgrad)
        tma_load_3d(w, &maps.w, full, 0, item.row * 2, kb * 4);
      else
        tma_load_3d(w, &maps.w, full, 0, kb, item.row * 8);
      tma_load_2d(base + ring.stage * C::kXBytes, &maps.x, full, kb * kBlockK,
                  item.token * C::kTokens);
    }
    if (a.R > 0 &&
        item.end ==
            schedule.kblocks) {  // the tokens' low-rank factor [kTokens][64], zeros beyond R
      barrier_wait(empty0 + 8 * ring.stage, ring.phase);
      barrier_expect(full0 + 8 * ring.stage, a.x_bytes);
      tma_load_2d(base + ring.stage * C::kXBytes, &maps.s, full0 + 8 * ring.stage, 0,
                  item.token * C::kTokens);
      ring.advance();
    }
  }
}

// A lane's four scales of kChunk k-blocks, as they lie in memory: float32 scales, or codes and the
// nested absmax of each.
struct RawScales {
  float4 values[kChunk];
  uint32_t codes[kChunk];
};

// A warp turns the 128 scales of each k-block into bf16(absmax / kCodeGain) in the stage: forward
// 128 rows of one k-block, dgrad 64 rows (the reduction) of two k-blocks. It shares an issue port
// with two consumer warps and the card is power-limited, so its instructions are counted: loads are
// asked for kChunk k-blocks at a time (the ring hides one memory latency a chunk), and the gain is
// folded into map and offset, which leaves one FMA a scale; against the exact two roundings that
// moves a scale by 2^-24 before it is rounded to bf16.
template <class C>
struct ScaleProducer {
  static constexpr bool kDgrad = C::kDgrad;
  const GemmArgs& a;
  const float* map;  // map / kCodeGain, in shared memory
  const int lane;
  float offset = 0.0f;
  bool has_fixed_groups;  // forward: the nested absmax of a row is the same for all of its blocks
  bool has_shared_group;  // four rows from a multiple of four share their nested absmax
  float4 fixed;

  FASTPEFT_DEVICE ScaleProducer(const GemmArgs& args, const float* shared_map)
      : a(args), map(shared_map), lane(threadIdx.x & 31) {
    if (a.nested) offset = __ldg(a.nested) * (1.0f / kCodeGain);
    has_fixed_groups = !kDgrad && a.nested && 256 % a.scale_columns == 0;
    has_shared_group = 64 % a.scale_columns == 0;
  }
  // Clamped, not tested: a branch around a load makes the compiler wait for each load by itself.
  // Scales outside the matrix meet zeros of the other operand or rows that are never stored: any
  // finite value will do.
  FASTPEFT_DEVICE int row(const Item& item, int kb) const {
    const int n = kDgrad ? kb * kBlockK + (lane & 15) * 4 : item.row * kRows + lane * 4;
    return min(n, a.padded_n - 4);
  }
  FASTPEFT_DEVICE int column(const Item& item, int kb) const {
    return min((kDgrad ? item.row * 2 + (lane >> 4) : kb) >> a.column_shift, a.scale_columns - 1);
  }
  FASTPEFT_DEVICE float4 nested_of(int n, int column) const {
    const float* groups = a.nested + 257;
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; e++)  // rows of the padding borrow the last one's
      v[e] = __ldg(groups + ((uint32_t(min(n + e, a.N - 1)) * a.scale_columns + column) >> 8));
    return make_float4(v[0], v[1], v[2], v[3]);
  }
  FASTPEFT_DEVICE void begin(const Item& item) {
    if (has_fixed_groups) fixed = nested_of(row(item, 0), 0);
  }
  FASTPEFT_DEVICE void load(const Item& item, int kb, RawScales& raw) const {
    uint32_t at[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; j++) {
      const int k = min(kb + j, item.end - 1);
      at[j] = uint32_t(column(item, k)) * a.padded_n + row(item, k);
    }
    if (!a.nested) {
#pragma unroll
      for (int j = 0; j < kChunk; j++)
        raw.values[j] =
            __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(a.scales) + at[j]));
      return;
    }
#pragma unroll
    for (int j = 0; j < kChunk; j++)
      raw.codes[j] =
          __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(a.scales) + at[j]));
    if (has_fixed_groups) {
#pragma unroll
      for (int j = 0; j < kChunk; j++) raw.values[j] = fixed;
      return;
    }
    if (has_shared_group) {
#pragma unroll
      for (int j = 0; j < kChunk; j++) {
        const int k = min(kb + j, item.end - 1);
        const uint32_t flat = uint32_t(row(item, k)) * a.scale_columns + column(item, k);
        const float v = __ldg(a.nested + 257 + (flat >> 8));
        raw.values[j] = make_float4(v, v, v, v);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kChunk; j++) {
      const int k = min(kb + j, item.end - 1);
      raw.values[j] = nested_of(row(item, k), column(item, k));
    }
  }
  FASTPEFT_DEVICE uint2 decode(const float4& v, uint32_t codes) const {
    if (!a.nested) {
      constexpr float inverse = 1.0f / kCodeGain;
      return make_uint2(pack_bf16(v.x * inverse, v.y * inverse),
                        pack_bf16(v.z * inverse, v.w * inverse));
    }
    const float s0 = fmaf(map[codes & 255], v.x, offset),
                s1 = fmaf(map[(codes >> 8) & 255], v.y, offset);
    const float s2 = fmaf(map[(codes >> 16) & 255], v.z, offset),
                s3 = fmaf(map[codes >> 24], v.w, offset);
    return make_uint2(pack_bf16(s0, s1), pack_bf16(s2, s3));
  }
};

template <class C>
FASTPEFT_DEVICE void load_scales(const GemmArgs& a, const Schedule& schedule, uint32_t base,
                                 uint32_t full0, uint32_t empty0, const float* map) {
  ScaleProducer<C> producer(a, map);
  const uint32_t to = base + C::kSAt + producer.lane * 8;
  Ring<C::kStages> ring(1);
  for (int i = 0, items = schedule.count(); i < items; i++) {
    const Item item = schedule.at(i);
    producer.begin(item);
    for (int kb = item.begin; kb < item.end; kb += kChunk) {
      RawScales raw;
      producer.load(item, kb, raw);
#pragma unroll
      for (int j = 0; j < kChunk; j++) {
        if (kb + j >= item.end) break;
        const uint2 packed = producer.decode(raw.values[j], raw.codes[j]);
        barrier_wait(empty0 + 8 * ring.stage, ring.phase);
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to + ring.stage * C::kSBytes),
                     "r"(packed.x), "r"(packed.y)
                     : "memory");
        __syncwarp();
        if (producer.lane == 0) barrier_arrive(full0 + 8 * ring.stage);
        ring.advance();
      }
    }
    if (a.R > 0 &&
        item.end == schedule.kblocks) {  // the stage of the low-rank factor has no scales
      barrier_wait(empty0 + 8 * ring.stage, ring.phase);
      if (producer.lane == 0) barrier_arrive(full0 + 8 * ring.stage);
      ring.advance();
    }
  }
}

// Fragment of k16 step `step` of the output rows' low-rank factor: forward scaling * B, dgrad A^T.
template <bool kDgrad>
FASTPEFT_DEVICE void load_lora(const GemmArgs& a, int row, int step, int t, uint32_t (&f)[4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int r = step * 16 + 2 * (t + 4 * i);
    uint32_t even = 0, odd = 0;  // rank pair of rows `row`, `row + 1`
    if (row < a.rows && r < a.R) {
      if (kDgrad) {
        const uint32_t v0 =
            __ldg(reinterpret_cast<const uint32_t*>(a.lora + size_t(r) * a.rows + row));
        const uint32_t v1 =
            __ldg(reinterpret_cast<const uint32_t*>(a.lora + size_t(r + 1) * a.rows + row));
        even = permute_bytes(v0, v1, 0x5410);
        odd = permute_bytes(v0, v1, 0x7632);
      } else {
        auto scaled = [&](int n) {
          const __nv_bfloat162 v =
              *reinterpret_cast<const __nv_bfloat162*>(a.lora + size_t(n) * a.R + r);
          return pack_bf16(__low2float(v) * a.scaling, __high2float(v) * a.scaling);
        };
        even = scaled(row);
        odd = scaled(row + 1);
      }
    }
    f[2 * i] = even;
    f[2 * i + 1] = odd;
  }
}

// The other block's sums of the tokens that this block owns, through distributed shared memory.
template <class C>
FASTPEFT_DEVICE void exchange(float (&acc)[C::kTokens / 2], uint32_t base, uint32_t ready,
                              uint32_t half) {
  constexpr int kSent = C::kTokens / 16;  // float4 of a thread: half of the tokens
  const int thread = threadIdx.x - 128;
  named_barrier(3, 256);  // both warpgroups are done with the ring of x
  // Owned: accumulators [half * kTokens / 4, + kTokens / 4).
#pragma unroll
  for (int i = 0; i < kSent; i++) {
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] = half ? acc[4 * i + e] : acc[C::kTokens / 4 + 4 * i + e];
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(base + (i * 256 + thread) * 16),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
  }
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
  __syncwarp();
  if ((threadIdx.x & 31) == 0) barrier_arrive_cluster(cluster_address(ready, half ^ 1));
  barrier_wait_cluster(ready, 0);
  const uint32_t from = cluster_address(base, half ^ 1);
#pragma unroll
  for (int i = 0; i < kSent; i++) {
    const float4 v = load_cluster(from + (i * 256 + thread) * 16);
    const float other[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (half)
        acc[C::kTokens / 4 + 4 * i + e] += other[e];
      else
        acc[4 * i + e] += other[e];
    }
  }
}

template <class C>
FASTPEFT_DEVICE void consume(const Maps& maps, const GemmArgs& a, const Schedule& schedule,
                             uint32_t base, uint32_t full0, uint32_t empty0, uint32_t ready) {
  constexpr bool kDgrad = C::kDgrad;
  const int cw = threadIdx.x / 128 - 1, warp = (threadIdx.x / 32) & 3, lane = threadIdx.x & 31;
  const int g = lane >> 2, t = lane & 3, pair = (g >> 1) + 4 * (g & 1);
  const Codebook codebook = make_codebook();
  // Offsets of this lane inside a stage.
  const uint32_t w_lane =
      opaque(base + C::kWAt +
             (kDgrad ? (lane >> 3) * 1024 + cw * 512 + warp * 128 + (lane & 7) * 16
                     : (cw * 4 + warp) * 512 + lane * 16));
  const uint32_t s_lane = opaque(
      base + C::kSAt + (kDgrad ? (cw * 64 + 2 * t) * 2 : (cw * 64 + warp * 16 + 2 * pair) * 2));
  const uint32_t out = base + C::kOutAt + cw * (C::kTokens * 128);
  const uint32_t half = cluster_rank();
  auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(empty0 + 8 * stage);
  };
  Ring<C::kStages> ring(0);
  int previous = -1;
  float acc[C::kTokens / 2];
  if (a.R > 0 || a.bias) wait_for_predecessor();

  for (int i = 0, items = schedule.count(); i < items; i++) {
    const Item item = schedule.at(i);
    const int row = item.row * kRows + cw * 64 + warp * 16 + 2 * pair;
    uint32_t f[4][4], w[4], scale[2] = {};
    auto fetch = [&] {  // packed weights and, forward, the two scales of the ring's stage
      barrier_wait(full0 + 8 * ring.stage, ring.phase);
      load_matrices<kDgrad>(w, w_lane + ring.stage * C::kWBytes);
      if (!kDgrad) {
        const uint32_t v = load_shared_u32(s_lane + ring.stage * C::kSBytes);
        scale[0] = permute_bytes(v, v, 0x1010);
        scale[1] = permute_bytes(v, v, 0x3232);
      }
    };
    fetch();
    for (int kb = item.begin; kb < item.end; kb++) {
      const uint64_t desc = swizzled_descriptor(base + ring.stage * C::kXBytes);
      const int current = ring.stage;
      const uint32_t s_stage = s_lane + ring.stage * C::kSBytes;
      ring.advance();
#pragma unroll
      for (int step = 0; step < 4; step++) {
        // wait -> decode -> fence -> wgmma, pinned by the empty asm: in any other order ptxas
        // serialises every wgmma.
        wgmma_wait<1>();
        asm volatile("" : "+r"(w[step])::"memory");
        if (step == 1 && previous >= 0)
          release(previous);  // every wgmma of the k-block before is complete
        uint32_t c[2] = {scale[0], scale[1]};
        if (kDgrad) {
          c[0] = load_shared_u32(s_stage + (2 * step) * 16);
          c[1] = load_shared_u32(s_stage + (2 * step + 1) * 16);
        }
        decode8<kDgrad>(w[step], codebook, f[step]);
#pragma unroll
        for (int e = 0; e < 4; e++) f[step][e] = mul_bf16x2(f[step][e], c[kDgrad ? e >> 1 : e & 1]);
        asm volatile(""
                     : "+r"(f[step][0]), "+r"(f[step][1]), "+r"(f[step][2]),
                       "+r"(f[step][3])::"memory");
        wgmma_fence();
        WgmmaRS<C::kTokens>::mma(acc, f[step], desc + 2 * step, kb > item.begin || step > 0);
        wgmma_commit();
      }
      if (kb + 1 < item.end) fetch();  // behind the wgmmas in flight
      previous = current;
    }
    if (a.R > 0 && item.end == schedule.kblocks) {
      wgmma_wait<0>();
      release(previous);
#pragma unroll
      for (int step = 0; step < 4; step++) load_lora<kDgrad>(a, row, step, t, f[step]);
      barrier_wait(full0 + 8 * ring.stage, ring.phase);
      const uint64_t desc = swizzled_descriptor(base + ring.stage * C::kXBytes);
#pragma unroll
      for (int step = 0; step < 4; step++) {
        if (step * 16 >= a.R) continue;
        asm volatile(""
                     : "+r"(f[step][0]), "+r"(f[step][1]), "+r"(f[step][2]),
                       "+r"(f[step][3])::"memory");
        wgmma_fence();
        WgmmaRS<C::kTokens>::mma(acc, f[step], desc + 2 * step, 1);
      }
      wgmma_commit();
      previous = ring.stage;
      ring.advance();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int e = 0; e < C::kTokens / 2; e++) asm volatile("" : "+f"(acc[e])::"memory");
    release(previous);
    previous = -1;
    if (item.shared) exchange<C>(acc, base, ready, half);

    // Epilogue: transpose through shared memory ([token][64 rows], 128-byte swizzle), TMA store of
    // what this block owns.
    constexpr int kGroups = C::kTokens / 64;
    auto mine = [&](int group) { return !item.shared || uint32_t(group * 2 / kGroups) == half; };
    float b0 = 0.0f, b1 = 0.0f;
    if (a.bias && row < a.rows)
      b0 = __bfloat162float(a.bias[row]), b1 = __bfloat162float(a.bias[row + 1]);
    if ((threadIdx.x & 127) == 0) store_wait_read();
    named_barrier(1 + cw, 128);
    const uint32_t chunk = 2 * warp + (pair >> 2);
    const uint32_t e0 = out + 2 * t * 128 + ((chunk ^ (2 * t)) << 4) + (pair & 3) * 4;
    const uint32_t e1 = out + (2 * t + 1) * 128 + ((chunk ^ (2 * t + 1)) << 4) + (pair & 3) * 4;
#pragma unroll
    for (int group = 0; group < kGroups; group++)
      if (mine(group)) {
#pragma unroll
        for (int j = 8 * group; j < 8 * group + 8; j++) {
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(e0 + j * 1024),
                       "r"(pack_bf16(acc[4 * j] + b0, acc[4 * j + 2] + b1))
                       : "memory");
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(e1 + j * 1024),
                       "r"(pack_bf16(acc[4 * j + 1] + b0, acc[4 * j + 3] + b1))
                       : "memory");
        }
      }
    fence_async_proxy();
    named_barrier(1 + cw, 128);
    if ((threadIdx.x & 127) == 0) {
#pragma unroll
      for (int group = 0; group < kGroups; group++)
        if (mine(group))
          tma_store_2d(&maps.y, out + group * 8192, item.row * kRows + cw * 64,
                       item.token * C::kTokens + group * 64);
      store_commit();
    }
  }
  if ((threadIdx.x & 127) == 0) store_wait();
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_wgmma_kernel(const __grid_constant__ Maps maps, const GemmArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  const uint32_t base = (shared_address(raw) + 1023u) & ~1023u;
  float* map = reinterpret_cast<float*>(raw + (base - shared_address(raw)) + C::kMapAt);
  const uint32_t full0 = base + C::kBarAt, empty0 = full0 + 8 * C::kStages,
                 ready = empty0 + 8 * C::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; i++) {
      barrier_init(full0 + 8 * i, 2);   // TMA's expectation and the scale warp
      barrier_init(empty0 + 8 * i, 8);  // consumer warps
    }
    barrier_init(ready, 8);
    barrier_init_fence();
    fence_async_proxy();
  }
  if (a.nested)
    for (int i = threadIdx.x; i < 256; i += kThreads)
      map[i] = __ldg(a.nested + 1 + i) * (1.0f / kCodeGain);
  cluster_sync();
  launch_dependents();
  const Schedule schedule(a);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
    if (threadIdx.x == 0) load_tiles<C>(maps, a, schedule, base, full0, empty0);
    if (threadIdx.x / 32 == 1) load_scales<C>(a, schedule, base, full0, empty0, map);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    consume<C>(maps, a, schedule, base, full0, empty0, ready);
  }
  cluster_sync();  // no block leaves while its neighbour reads its shared memory
#endif
}

// ---- host
template <class C>
void launch(const GemmArgs& a, const Maps& maps, int sm_count, Stream stream) {
  allow_shared_memory(reinterpret_cast<const void*>(qlinear_wgmma_kernel<C>), C::kShared);
  const int total = a.tiles_r * a.tiles_t, blocks = sm_count / 2 * 2;
  launch_kernel(qlinear_wgmma_kernel<C>, "qlinear_wgmma_kernel",
                dim3(unsigned(total >= blocks ? blocks : std::min(blocks, 2 * total))), kThreads,
                C::kShared, stream, 2, maps, a);
}

template <bool kDgrad>
void run(const WeightView& w, GemmArgs a, const void* x, const void* s, void* y, int tokens,
         Stream stream) {
  const int64_t reduction = kDgrad ? w.N : w.K;
  a.rows = int(kDgrad ? w.K : w.N);
  a.N = int(w.N);
  a.padded_n = int(round_up<int64_t>(w.N, kTileN));
  a.scale_columns = int(w.K / w.blocksize);
  while ((int64_t(64) << a.column_shift) < w.blocksize) a.column_shift++;
  a.kblocks = int(ceil_div<int64_t>(reduction, kBlockK));
  a.tiles_r = ceil_div(a.rows, kRows);
  a.tiles_t = ceil_div(a.M, tokens);
  a.scales = w.scales;
  a.nested = w.nested;
  const int box = std::min<int>(tokens, round_up(a.M, 8));
  a.x_bytes = box * kBlockK * 2;
  bind_context();
  Maps maps;
  maps.x = matrix_map(x, reduction, a.M, kBlockK, box);
  maps.w = weight_map(w, kDgrad);
  maps.y = matrix_map(y, a.rows, a.M, 64, 64);
  maps.s = a.R ? matrix_map(s, a.R, a.M, 64, box) : maps.x;
  const int sm_count = device_facts().sm_count;
  if (tokens == 256)
    launch<Config<kDgrad, 256>>(a, maps, sm_count, stream);
  else
    launch<Config<kDgrad, 128>>(a, maps, sm_count, stream);
}

}  // namespace

void qlinear_wgmma_fwd(const QLinearFwdParams& p) {
  GemmArgs a;
  a.M = int(p.M);
  a.R = p.s ? int(p.R) : 0;
  a.scaling = p.scaling;
  a.bias = static_cast<const __nv_bfloat16*>(p.bias);
  a.lora = static_cast<const __nv_bfloat16*>(p.lora_b);
  run<false>(p.w, a, p.x, p.s, p.y, int(p.tile_tokens), p.stream);
}

void qlinear_wgmma_dgrad(const QLinearDgradParams& p) {
  GemmArgs a;
  a.M = int(p.M);
  a.R = p.ds ? int(p.R) : 0;
  a.lora = static_cast<const __nv_bfloat16*>(p.lora_a);
  run<true>(p.w, a, p.dy, p.ds, p.dx, int(p.tile_tokens), p.stream);
}

}  // namespace fastpeft::cuda
