// int8 x 16-bit GEMM for Hopper (sm_90a): weights become bf16 or fp16 in registers, forward and
// input gradient from the same row-major bytes, no 16-bit copy of W.
//
//   forward   y [M, N] = (x codes^T) absmax / 127 + bias + scaling * s B^T   rows = n, reduction =
//   k dgrad     dx[M, K] = dy (absmax / 127 codes) + ds A                      rows = k, reduction
//   = n codes int8 [N, K], absmax [N]; x [M, K], dy [M, N], s, ds [M, R], B [N, R], A [R, K] 16 bit
//
// Computed transposed (y^T = W x^T) like qlinear_wgmma.cu: decoded weights are wgmma's A operand,
// activations its B, by TMA. Codes are exact in 16 bit (int8_decode.cuh), 7 instructions for 4
// weights. A lane's MMA rows g, g + 8 are neighbouring outputs, which the epilogue packs into one
// word.
//
//   forward: tile [128 n][64 bytes k], 64-byte swizzle. A lane takes pairs of bytes (k 2t, 2t+1 and
//            2t+8, 2t+9 of each 16) of rows 2g and 2g+1; lanes g >= 4 take the rows in the other
//            order, so that no two lanes meet in a bank. Scales belong to output rows: in the
//            epilogue, in float32.
//   dgrad:   tile [64 n][128 bytes k], 128-byte swizzle. ldmatrix.trans hands a lane k 2g, 2g+1 of
//            rows n 2t, 2t+1: even bytes are MMA row g, odd ones row g + 8. Scales belong to the
//            reduction: 16 bit, one packed multiply a pair (warp 1 of the producer writes them).
//            fp16 holds them 64 times as large, undone behind the sums: absmax down to 1.2e-4 stays
//            normal.
//
// Work: tile 128 rows x kTokens tokens x 64. Warpgroup 0 = producer, 1 and 2 = consumers with 64
// rows each. Blocks come in clusters of two: where the last wave of tiles fills at most half of the
// blocks, the two share a tile, each half of the reduction, and exchange sums of half of the tokens
// through distributed shared memory: nobody waits for a block that may not be resident. With a
// split of 3 or 4 (few tokens, few row tiles) every tile is shared so by a cluster of that size.
// Tiles of 64 tokens let two blocks live on a multiprocessor. Bound: tensor cores from M = 256
// (1024 clocks a k-block of 256 tokens); few tokens: decoding, 520 clocks a k-block of 8 KB (140
// instructions a warp, most of them at half rate) against 260 of reading W.
#include <algorithm>

#include "dependent_launch.cuh"
#include "device/exchange.cuh"
#include "device/sm90.cuh"
#include "device/tensor_map.cuh"
#include "device/tiles.cuh"
#include "device/wgmma.cuh"
#include "int8_decode.cuh"
#include "int8_weight_wgmma.h"

namespace fastpeft::cuda {

namespace {

constexpr int kRows = 128, kBlockK = 64, kThreads = 384;
constexpr int kScaleChunk = 4;  // k-blocks whose scales are asked for at a time

struct GemmArgs {
  int M = 0;        // tokens
  int rows = 0;     // length of an output row: N forward, K dgrad
  int N = 0;        // rows of W
  int kblocks = 0;  // reduction / 64
  int tiles_r = 0, tiles_t = 0;
  int split = 1;                   // 3, 4: every tile is shared by a cluster of that size
  int x_bytes = 0;                 // of a stage of x: few tokens fill only part of a tile
  const float* absmax = nullptr;   // [N]
  const void* bias = nullptr;      // [rows] or null
  const uint16_t* lora = nullptr;  // forward: B [N, R]; dgrad: A [R, K]
  int R = 0;
  float scaling = 1.0f;  // forward only; ds carries it in dgrad
};

template <class T_, bool kDgrad_, int kTokens_>
struct Config {
  using T = T_;
  static constexpr bool kDgrad = kDgrad_;
  static constexpr int kTokens = kTokens_;
  static constexpr float kRange = kDgrad && std::is_same_v<T, fp16> ? 64.0f : 1.0f;  // of weights
  static constexpr int kStages = kTokens == 256 ? 4 : kTokens == 128 ? 6 : 5;
  // Of a multiprocessor, and registers of producer and consumers: 30720 or 64512 a block.
  static constexpr int kBlocks = kTokens == 64 ? 2 : 1;
  static constexpr int kXBytes = kTokens * kBlockK * 2, kWBytes = kRows * kBlockK;
  static constexpr int kSBytes = kBlockK * 2;  // scales of dgrad
  static constexpr int kWAt = kStages * kXBytes, kSAt = kWAt + kStages * kWBytes;
  // A quarter of the tokens: what a block of a shared tile owns one or two of.
  static constexpr int kPieceTokens = kTokens / 4, kPieceSums = kPieceTokens / 2;
  // Output staging for each consumer warpgroup.
  static constexpr int kOutTokens = kTokens < 128 ? kTokens : 128, kOutBytes = kOutTokens * 128;
  static constexpr int kOutAt = (kSAt + kStages * kSBytes + 1023) / 1024 * 1024;
  static constexpr int kBarAt = kOutAt + 2 * kOutBytes;
  static constexpr int kShared = kBarAt + 16 * kStages + 16 + 1024;
  static_assert(kBlocks * (kShared + 1024) <= 233472, "shared memory of sm_90");
  static_assert(kWAt >= kTokens * kRows * 4, "the exchange reuses the ring of x");
};

// Whole tiles with the last wave cut over clusters of two, or every tile cut over its cluster.
struct Schedule {
  CutSchedule cut;
  int split;

  FASTPEFT_DEVICE explicit Schedule(const GemmArgs& a)
      : cut(a.tiles_r, a.tiles_t, a.kblocks), split(a.split) {}
  FASTPEFT_DEVICE int count() const { return split == 1 ? cut.count() : 1; }
  FASTPEFT_DEVICE int sharers() const { return split == 1 ? 2 : split; }  // of a shared tile
  FASTPEFT_DEVICE Item at(int i) const {
    if (split == 1) return cut.at(i);
    const int tile = int(blockIdx.x) / split, part = int(blockIdx.x) % split;
    const TilePlace place = tile_place<CutSchedule::kGroup>(tile, cut.tiles_r, cut.tiles_t);
    Item item;
    item.row = place.row;
    item.token = place.token;
    item.begin = cut.kblocks * part / split;
    item.end = cut.kblocks * (part + 1) / split;
    item.shared = true;
    return item;
  }
  FASTPEFT_DEVICE bool is_last(const Item& item) const { return item.end == cut.kblocks; }
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
        tma_load_2d(w, &maps.w, full, item.row * kRows, kb * kBlockK);
      else
        tma_load_2d(w, &maps.w, full, kb * kBlockK, item.row * kRows);
      tma_load_2d(base + ring.stage * C::kXBytes, &maps.x, full, kb * kBlockK,
                  item.token * C::kTokens);
    }
    if (a.R > 0 && schedule.is_last(item)) {  // the tokens' low-rank factor, zeros beyond R
      barrier_wait(empty0 + 8 * ring.stage, ring.phase);
      barrier_expect(full0 + 8 * ring.stage, a.x_bytes);
      tma_load_2d(base + ring.stage * C::kXBytes, &maps.s, full0 + 8 * ring.stage, 0,
                  item.token * C::kTokens);
      ring.advance();
    }
  }
}

// dgrad: a warp writes absmax / 127 of the 64 rows of each k-block, a lane two. Rows past N
// meet zeros of dy: clamped, as any finite scale will do.
template <class C>
FASTPEFT_DEVICE void load_scales(const GemmArgs& a, const Schedule& schedule, uint32_t base,
                                 uint32_t full0, uint32_t empty0) {
  constexpr float kStep = kInt8Step * C::kRange;
  const int lane = threadIdx.x & 31;
  const uint32_t to = base + C::kSAt + lane * 4;
  Ring<C::kStages> ring(1);
  const auto publish = [&] {
    __syncwarp();
    if (lane == 0) barrier_arrive(full0 + 8 * ring.stage);
    ring.advance();
  };
  for (int i = 0, items = schedule.count(); i < items; i++) {
    const Item item = schedule.at(i);
    for (int kb = item.begin; kb < item.end; kb += kScaleChunk) {
      float2 v[kScaleChunk];
#pragma unroll
      for (int j = 0; j < kScaleChunk; j++) {
        const int n = min((min(kb + j, item.end - 1)) * kBlockK + 2 * lane, a.N - 2);
        v[j] = __ldg(reinterpret_cast<const float2*>(a.absmax + n));
      }
#pragma unroll
      for (int j = 0; j < kScaleChunk; j++) {
        if (kb + j >= item.end) break;
        barrier_wait(empty0 + 8 * ring.stage, ring.phase);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + ring.stage * C::kSBytes),
                     "r"(pack_pair<typename C::T>(v[j].x * kStep, v[j].y * kStep))
                     : "memory");
        publish();
      }
    }
    if (a.R > 0 && schedule.is_last(item)) {  // the low-rank stage has no scales
      barrier_wait(empty0 + 8 * ring.stage, ring.phase);
      publish();
    }
  }
}

FASTPEFT_DEVICE uint32_t load_shared_u16(uint32_t a) {
  uint16_t r;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(r) : "r"(a));
  return r;
}

template <class C>
struct Consumer {
  using T = typename C::T;
  static constexpr bool kDgrad = C::kDgrad;
  static constexpr int kSums = C::kTokens / 2;
  const Maps& maps;
  const GemmArgs& a;
  const Schedule& schedule;
  const uint32_t base, full0, empty0, ready;
  const int cw, warp, lane, g, t;
  const int swap;  // forward: MMA rows g, g + 8 are outputs 2g + swap, 2g + 1 - swap
  const uint32_t out;
  uint32_t w_lane, s_lane;  // offsets of this lane inside a stage
  ByteDecoder<T> decoder;
  Ring<C::kStages> ring;
  float acc[kSums];

  FASTPEFT_DEVICE Consumer(const Maps& maps, const GemmArgs& a, const Schedule& schedule,
                           uint32_t base, uint32_t full0, uint32_t empty0, uint32_t ready)
      : maps(maps),
        a(a),
        schedule(schedule),
        base(base),
        full0(full0),
        empty0(empty0),
        ready(ready),
        cw(threadIdx.x / 128 - 1),
        warp((threadIdx.x / 32) & 3),
        lane(threadIdx.x & 31),
        g(lane >> 2),
        t(lane & 3),
        swap(kDgrad ? 0 : g >> 2),
        out(base + C::kOutAt + cw * C::kOutBytes),
        ring(0) {
    const int row = cw * 64 + warp * 16 + 2 * g + swap;
    const uint32_t chunk = cw * 4 + warp;
    w_lane = opaque(base + C::kWAt +
                    (kDgrad ? lane * 128 + ((chunk ^ (lane & 7)) << 4) : row * 64 + 2 * t));
    s_lane = opaque(base + C::kSAt + 4 * t);
  }

  FASTPEFT_DEVICE static uint32_t multiply_pair(uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, bf16>)
      return mul_bf16x2(a, b);
    else
      return mul_fp16x2(a, b);
  }
  FASTPEFT_DEVICE void release(int stage) const {
    if (lane == 0) barrier_arrive(empty0 + 8 * stage);
  }
  // Packed weights of the ring's stage: words 2s, 2s + 1 are step s.
  FASTPEFT_DEVICE void fetch(uint32_t (&w)[8]) const {
    barrier_wait(full0 + 8 * ring.stage, ring.phase);
    const uint32_t at = w_lane + ring.stage * C::kWBytes;
    if constexpr (kDgrad) {
      uint32_t low[4], high[4];
      load_matrices<true>(low, at);
      load_matrices<true>(high, at + 32 * 128);
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = low[i], w[4 + i] = high[i];
    } else {
      const uint32_t other = swap ? at - 64 : at + 64;
#pragma unroll
      for (int step = 0; step < 4; step++) {
        const uint32_t chunk = (step ^ (g & 3)) << 4;
        // bytes (k 2t, 2t+8, 2t+1, 2t+9): even ones are the first half of the fragment
        w[2 * step] =
            permute_bytes(load_shared_u16(at + chunk), load_shared_u16(at + chunk + 8), 0x5140);
        w[2 * step + 1] = permute_bytes(load_shared_u16(other + chunk),
                                        load_shared_u16(other + chunk + 8), 0x5140);
      }
    }
  }
  // Fragment of step `step`: rows g, g + 8, g, g + 8.
  FASTPEFT_DEVICE void decode(const uint32_t (&w)[8], int step, uint32_t s_stage,
                              uint32_t (&f)[4]) const {
    if constexpr (kDgrad) {
      decoder.word(w[2 * step], f[0], f[1]);
      decoder.word(w[2 * step + 1], f[2], f[3]);
      const uint32_t first = load_shared_u32(s_stage + step * 32);
      const uint32_t second = load_shared_u32(s_stage + step * 32 + 16);
#pragma unroll
      for (int e = 0; e < 4; e++) f[e] = multiply_pair(f[e], e < 2 ? first : second);
    } else {
      decoder.word(w[2 * step], f[0], f[2]);
      decoder.word(w[2 * step + 1], f[1], f[3]);
    }
  }

  // Fragment of k16 step `step` of the output rows' low-rank factor: forward B, dgrad A^T.
  FASTPEFT_DEVICE void load_lora(int row, int step, uint32_t (&f)[4]) const {
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
          even = __ldg(reinterpret_cast<const uint32_t*>(a.lora + size_t(row) * a.R + r));
          odd = __ldg(reinterpret_cast<const uint32_t*>(a.lora + size_t(row + 1) * a.R + r));
        }
      }
      f[2 * i] = swap ? odd : even;
      f[2 * i + 1] = swap ? even : odd;
    }
  }
  // Returns the stage that is in use until the sums are waited for. The wait stands behind the
  // branch around this call: inside it, with exchange_pieces() behind, ptxas serialises every wgmma
  // (C7515).
  FASTPEFT_DEVICE int add_lora(int row) {
    uint32_t f[4][4];
#pragma unroll
    for (int step = 0; step < 4; step++) load_lora(row, step, f[step]);
    barrier_wait(full0 + 8 * ring.stage, ring.phase);
    const uint64_t desc = swizzled_descriptor(base + ring.stage * C::kXBytes);
#pragma unroll
    for (int step = 0; step < 4; step++)
      asm volatile(""
                   : "+r"(f[step][0]), "+r"(f[step][1]), "+r"(f[step][2]),
                     "+r"(f[step][3])::"memory");
    pin();
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++)  // zeros beyond R
      WgmmaRS<C::kTokens>::template mma<T>(acc, f[step], desc + 2 * step, 1);
    wgmma_commit();
    const int stage = ring.stage;
    ring.advance();
    return stage;
  }
  FASTPEFT_DEVICE void pin() {
#pragma unroll
    for (int e = 0; e < kSums; e++) asm volatile("" : "+f"(acc[e])::"memory");
  }

  FASTPEFT_DEVICE void multiply(const Item& item) {
    uint32_t f[4][4], w[8];
    int previous = -1;
    fetch(w);
    for (int kb = item.begin; kb < item.end; kb++) {
      const uint64_t desc = swizzled_descriptor(base + ring.stage * C::kXBytes);
      const uint32_t s_stage = s_lane + ring.stage * C::kSBytes;
      const int current = ring.stage;
      ring.advance();
#pragma unroll
      for (int step = 0; step < 4; step++) {
        // wait -> decode -> fence -> wgmma, pinned by the empty asm: in any other order ptxas
        // serialises every wgmma.
        wgmma_wait<1>();
        asm volatile("" : "+r"(w[2 * step]), "+r"(w[2 * step + 1])::"memory");
        if (step == 1 && previous >= 0) release(previous);
        decode(w, step, s_stage, f[step]);
        asm volatile(""
                     : "+r"(f[step][0]), "+r"(f[step][1]), "+r"(f[step][2]),
                       "+r"(f[step][3])::"memory");
        wgmma_fence();
        WgmmaRS<C::kTokens>::template mma<T>(acc, f[step], desc + 2 * step,
                                             kb > item.begin || step > 0);
        wgmma_commit();
      }
      if (kb + 1 < item.end) fetch(w);  // behind the wgmmas in flight
      previous = current;
    }
    wgmma_wait<0>();
    pin();
    release(previous);
  }

  // y = sums * factor + shift of the two rows: transposed through shared memory ([token][64 rows],
  // 128-byte swizzle), TMA store of the pieces that this block owns, up to 128 tokens at a time.
  FASTPEFT_DEVICE void store(const Item& item, const Sharing& sharing, const float (&factor)[2],
                             const float (&shift)[2]) {
    const uint32_t order = swap ? 0x1032 : 0x3210;
    const uint32_t chunk = 2 * warp + (g >> 2);
    const uint32_t e0 = out + 2 * t * 128 + ((chunk ^ (2 * t)) << 4) + (g & 3) * 4;
    const uint32_t e1 = out + (2 * t + 1) * 128 + ((chunk ^ (2 * t + 1)) << 4) + (g & 3) * 4;
    const auto put = [&](uint32_t at, float top, float bottom) {
      const uint32_t v =
          pack_pair<T>(fmaf(top, factor[0], shift[0]), fmaf(bottom, factor[1], shift[1]));
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(kDgrad ? v : permute_bytes(v, v, order))
                   : "memory");
    };
    constexpr int kPieces = C::kOutTokens / C::kPieceTokens, kPieceBytes = C::kPieceTokens * 128;
#pragma unroll
    for (int first = 0; first < 4; first += kPieces) {
      if ((threadIdx.x & 127) == 0) store_wait_read();
      named_barrier(1 + cw, 128);
#pragma unroll
      for (int i = 0; i < kPieces; i++) {
        if (!sharing.owns(first + i)) continue;
#pragma unroll
        for (int j = 0; j < C::kPieceTokens / 8; j++) {
          const float* v = acc + (first + i) * C::kPieceSums + 4 * j;
          put(e0 + i * kPieceBytes + j * 1024, v[0], v[2]);
          put(e1 + i * kPieceBytes + j * 1024, v[1], v[3]);
        }
      }
      fence_async_proxy();
      named_barrier(1 + cw, 128);
      if ((threadIdx.x & 127) == 0) {
#pragma unroll
        for (int i = 0; i < kPieces; i++)
          if (sharing.owns(first + i))
            tma_store_2d(&maps.y, out + i * kPieceBytes, item.row * kRows + cw * 64,
                         item.token * C::kTokens + (first + i) * C::kPieceTokens);
        store_commit();
      }
    }
  }

  FASTPEFT_DEVICE void run() {
    if (a.R > 0 || a.bias) wait_for_predecessor();
    for (int i = 0, items = schedule.count(); i < items; i++) {
      const Item item = schedule.at(i);
      const int row = item.row * kRows + cw * 64 + warp * 16 + 2 * g;
      float factor[2] = {1.0f / C::kRange, 1.0f / C::kRange}, shift[2] = {0.0f, 0.0f};
      if (!kDgrad && row < a.rows) {  // rows come in pairs: N % 8 == 0
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int n = row + (e ^ swap);
          factor[e] = a.absmax[n] * kInt8Step;
          if (a.bias) shift[e] = to_acc(static_cast<const T*>(a.bias)[n]);
        }
      }
      multiply(item);
      int in_use = -1;
      if (a.R > 0) {
        if (!kDgrad || C::kRange != 1.0f) {  // in units of the branch before that is added
#pragma unroll
          for (int e = 0; e < kSums; e++) acc[e] *= factor[e / 2 % 2] / a.scaling;
          factor[0] = factor[1] = a.scaling;
        }
        if (schedule.is_last(item)) in_use = add_lora(row);
      }
      wgmma_wait<0>();
      pin();
      if (in_use >= 0) release(in_use);
      Sharing sharing;
      if (item.shared) {
        sharing.rank = int(cluster_rank());
        sharing.sharers = schedule.sharers();
        exchange_pieces<C::kTokens>(acc, base, ready, sharing);
      }
      store(item, sharing, factor, shift);
    }
    if ((threadIdx.x & 127) == 0) store_wait();
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads, C::kBlocks)
    int8_weight_wgmma_kernel(const __grid_constant__ Maps maps,
                             const __grid_constant__ GemmArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  const uint32_t base = (shared_address(raw) + 1023u) & ~1023u;
  const uint32_t full0 = base + C::kBarAt, empty0 = full0 + 8 * C::kStages,
                 ready = empty0 + 8 * C::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; i++) {
      barrier_init(full0 + 8 * i, C::kDgrad ? 2 : 1);  // TMA's expectation, the scale warp
      barrier_init(empty0 + 8 * i, 8);                 // consumer warps
    }
    barrier_init(ready, 8 * (Schedule(a).sharers() - 1));
    barrier_init_fence();
    fence_async_proxy();
  }
  cluster_sync();
  launch_dependents();
  const Schedule schedule(a);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kBlocks == 2 ? 32 : 40));
    if (threadIdx.x == 0) load_tiles<C>(maps, a, schedule, base, full0, empty0);
    if (C::kDgrad && threadIdx.x / 32 == 1) load_scales<C>(a, schedule, base, full0, empty0);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kBlocks == 2 ? 104 : 232));
    Consumer<C>(maps, a, schedule, base, full0, empty0, ready).run();
  }
  cluster_sync();  // no block leaves while its neighbour reads its shared memory
#endif
}

// ---- host
template <class C>
void launch(const GemmArgs& a, const Maps& maps, int sm_count, Stream stream) {
  allow_shared_memory(reinterpret_cast<const void*>(int8_weight_wgmma_kernel<C>), C::kShared);
  const int total = a.tiles_r * a.tiles_t, blocks = sm_count / 2 * 2 * C::kBlocks;
  const int wanted = a.split > 1 ? a.split * total : total >= blocks ? blocks : 2 * total;
  launch_kernel(int8_weight_wgmma_kernel<C>, "int8_weight_wgmma_kernel",
                dim3(unsigned(a.split > 1 ? wanted : std::min(blocks, wanted))), kThreads,
                C::kShared, stream, a.split > 1 ? a.split : 2, maps, a);
}

// W as bytes: forward 64 columns of 128 rows, dgrad 128 columns of 64 rows.
CUtensorMap byte_map(const WeightView& w, bool is_dgrad) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(w.K), cuuint64_t(w.N)}, strides[1] = {cuuint64_t(w.K)};
  const cuuint32_t box[2] = {is_dgrad ? 128u : 64u, is_dgrad ? 64u : 128u}, ones[2] = {1, 1};
  const CUresult status =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(w.codes), sizes, strides,
                box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                is_dgrad ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FASTPEFT_CHECK(status == CUDA_SUCCESS, "tensor map of the int8 weight: error ", int(status));
  return map;
}

template <class T, bool kDgrad>
void run(const WeightView& w, GemmArgs a, const void* x, const void* s, void* y, const Plan& plan,
         Stream stream) {
  const int tokens = int(plan.tile_tokens);
  const int64_t reduction = kDgrad ? w.N : w.K;
  a.rows = int(kDgrad ? w.K : w.N);
  a.N = int(w.N);
  a.kblocks = int(ceil_div<int64_t>(reduction, kBlockK));
  a.tiles_r = ceil_div(a.rows, kRows);
  a.tiles_t = ceil_div(a.M, tokens);
  a.absmax = static_cast<const float*>(w.scales);
  a.split = int(plan.split);
  FASTPEFT_CHECK(a.split == 1 || (a.split > 2 && a.split <= 4 && a.kblocks >= a.split),
                 "int8_weight_wgmma: split = ", a.split, ", reduction ", reduction);
  const int box = std::min<int>(tokens, round_up(a.M, 8));
  a.x_bytes = box * kBlockK * 2;
  bind_context();
  Maps maps;
  maps.x = matrix_map(x, reduction, a.M, kBlockK, box);
  maps.w = byte_map(w, kDgrad);
  maps.y = matrix_map(y, a.rows, a.M, 64, uint32_t(tokens / 4));
  maps.s = a.R ? matrix_map(s, a.R, a.M, 64, box) : maps.x;
  const int sm_count = device_facts().sm_count;
  if (tokens == 256)
    launch<Config<T, kDgrad, 256>>(a, maps, sm_count, stream);
  else if (tokens == 128)
    launch<Config<T, kDgrad, 128>>(a, maps, sm_count, stream);
  else
    launch<Config<T, kDgrad, 64>>(a, maps, sm_count, stream);
}

}  // namespace

void int8_weight_wgmma_fwd(const QLinearFwdParams& p) {
  GemmArgs a;
  a.M = int(p.M);
  a.R = p.s && p.scaling != 0.0f ? int(p.R) : 0;
  a.scaling = p.scaling;
  a.bias = p.bias;
  a.lora = static_cast<const uint16_t*>(p.lora_b);
  const auto run_it = p.dtype == DType::kBFloat16 ? run<bf16, false> : run<fp16, false>;
  run_it(p.w, a, p.x, p.s, p.y, p.plan, p.stream);
}

void int8_weight_wgmma_dgrad(const QLinearDgradParams& p) {
  GemmArgs a;
  a.M = int(p.M);
  a.R = p.ds ? int(p.R) : 0;
  a.lora = static_cast<const uint16_t*>(p.lora_a);
  const auto run_it = p.dtype == DType::kBFloat16 ? run<bf16, true> : run<fp16, true>;
  run_it(p.w, a, p.dy, p.ds, p.dx, p.plan, p.stream);
}

}  // namespace fastpeft::cuda
