// NF4 linear layer in bf16 and fp16 for up to 128 tokens (512 where it wins) on Hopper (sm_90a),
// forward and input gradient from the same packed bytes.
//
//   forward   y [M, N] = x [M, K]  W^T + bias + scaling * s B^T      output rows = n, reduction = k
//   dgrad     dx[M, K] = dy[M, N] W    + ds A                        output rows = k, reduction = n
//
// Like qlinear_wgmma.cu (decoded weights are wgmma's A operand in registers, activations come by
// TMA), but few tokens make decoding the work: one weight serves 16 ... 128 tokens, so decoding
// runs in four warpgroups, four warps a scheduler, that hide each other's latency. A tile is 64 or
// 128 output rows; warpgroups that share rows take k-blocks in turn, and with few row tiles the
// blocks of a cluster share a tile's reduction as well:
//
//   64 rows:   warpgroup w: k-blocks w, w+4, ...        128 rows: warpgroup w: rows 64 (w / 2) ...,
//   cluster:   block b of c: k-blocks [b/c, (b+1)/c)              k-blocks w % 2, w % 2 + 2, ...
//
// Partial sums meet in (distributed) shared memory; a warpgroup adds those of the tokens it owns,
// in order of block and warpgroup: same bits on every run, no workspace, no block waits for one
// that may not be resident.
//
// Warpgroup 0 produces: warp 0 TMA, warps 1 ... 3 scales. Programmatic dependent launch: codes and
// scales of the first stages are asked for before the wait, activations after it.
//
// Bound, clocks a k-block and multiprocessor measured (H200): 64 rows x 16 tokens 175, 128 x 16
// 280, 128 x 64 390: latency and issue of decoding (85 instructions a k-block and warp, 105 in the
// gradient; half of the issue slots), where reading the codes takes 110 a 64 rows. 128 x 128: the
// tensor cores, 512 clocks, and shared memory, 550 wavefronts (lookups 96, x into wgmma 256, copies
// 160, codes): 550. 64 x 128: x through L2, 16 KB in 363 clocks. A block starts its first k-block
// after 3200 clocks and ends 500 ... 2600 behind the last.
#include <algorithm>

#include "qlinear_wgmma.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kScaleWarps = 3;
constexpr int kEntryStride = 256, kTableBytes = 256 * kEntryStride;
// Addresses in shared memory: the table starts at a multiple of its size, so that a byte permute
// makes whole addresses; stages of x behind it, everything else before it. Bits 24 and up of an
// address are the block's rank in its cluster.
constexpr uint32_t kTableAt = 65536, kXAt = kTableAt + kTableBytes;

template <class T_, bool kDgrad_, int kRowGroups_, int kTokens_>
struct Narrow {
  using T = T_;  // of activations, low-rank factors, bias and weights in registers
  static constexpr bool kDgrad = kDgrad_;
  static constexpr int kTokens = kTokens_, kRowGroups = kRowGroups_, kRows = 64 * kRowGroups;
  // 128 tokens: registers for the sums of 64 rows leave room for three warpgroups; with 128 rows
  // for four (all but 32 of the producers' registers), and the stages of x are six beside the
  // table.
  static constexpr bool kIsFull = kTokens == 128, kIsLow = kRowGroups == 1;
  static constexpr bool kHasTable = !kIsFull || !kIsLow;
  // Of the four k16 steps of a k-block those decoded by lookups, the others by permutes. With 128
  // tokens shared memory is the busiest pipe: three of four 24.7 us, all 25.1, two 25.7
  // (14336 x 4096).
  static constexpr int kLookupSteps = !kHasTable ? 0 : kIsFull ? 3 : 4;
  static constexpr int kConsumers = kIsFull && kIsLow ? 3 : 4, kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = !kIsFull ? 64 : kIsLow ? 56 : 32;
  static constexpr int kConsumerRegisters = !kIsFull ? 104 : kIsLow ? 152 : 112;
  static constexpr int kTurns = kConsumers / kRowGroups;  // warpgroups that share rows
  static constexpr int kXBytes = kTokens * kBlockK * 2, kWBytes = kRows * kBlockK / 2,
                       kSBytes = kRows * 2;
  static constexpr int kStages = kIsFull && kHasTable ? 6 : kIsLow && kTokens <= 32 ? 24 : 12;
  // Stages whose codes are asked for before anything else, 16 KB: more delay the first of them
  // (14336 x 4096, M = 16, of 12 stages all / 6 / 4: 14.1 / 13.8 / 13.6 us).
  static constexpr int kEarly = 8 / kRowGroups;
  static constexpr int kChunk = kIsFull && kHasTable ? 1 : 2;  // units of scales asked for at once
  static constexpr int kTokenTiles = kTokens / 8;
  // From the start of dynamic shared memory, rounded up to 1024.
  static constexpr int kSAt = kStages * kWBytes;
  static constexpr int kMapAt = kSAt + kStages * kSBytes;  // float[256], the dynamic map
  static constexpr int kBarAt = kMapAt + 1024;
  static constexpr int kBarEnd = (kBarAt + 16 * kStages + 16 + 127) / 128 * 128;
  static constexpr int kXOffset = (kBarEnd + 1023) / 1024 * 1024;  // without a table
  // With two turns each warpgroup stores what the other adds up, and keeps its own in registers.
  static constexpr int kPartialBytes = kConsumers * 64 * kTokens * (kTurns == 2 ? 2 : 4);
  static constexpr int kTileBytes = 8 * kRows * 4;  // sums of 8 tokens
  // Sums from other blocks: a place of their own, or behind the partial sums in the stages of x.
  static constexpr bool kReceivesInRing = !kHasTable || !kIsLow;
  static constexpr int kReceiveAt = kReceivesInRing ? kPartialBytes : kBarEnd;
  static constexpr int kMaxParts = kIsLow ? 4 : kIsFull ? 2 : 1;
  static constexpr int kReceiveBytes =
      (kTokenTiles + kMaxParts - 1) / kMaxParts * (kMaxParts - 1) * kTileBytes;
  static constexpr int kShared = (kHasTable ? int(kXAt) : kXOffset + 1024) + kStages * kXBytes;
  static_assert(!kHasTable ||
                    kBarEnd + (kReceivesInRing ? 0 : kReceiveBytes) + 2048 <= int(kTableAt),
                "fits below the table");
  static_assert(kPartialBytes + (kReceivesInRing ? kReceiveBytes : 0) <= kStages * kXBytes,
                "sums fit into the stages of x");
  static_assert(kShared <= 232448, "shared memory of sm_90");
  static_assert(kStages % kTurns == 0, "a warpgroup meets the same stages in every round");
  static_assert(kStages % (kScaleWarps * kChunk * (3 - kRowGroups)) == 0,
                "a scale warp meets the same stages in every round");
  static_assert(!kHasTable || kConsumers == 4, "fill_table's threads");
};

struct NarrowMaps {
  CUtensorMap x, w, s;
};

// What the roles of a block share.
struct Place {
  uint32_t base, full0, empty0, table, x0;
  uint32_t ready;             // the other blocks' sums have come
  uint32_t free;              // the other blocks are done with their stages
  int rank, row_tile, token;  // rank in the cluster
  int parts, parts_shift;     // blocks that share the reduction: a power of two
  int begin, count;           // k-blocks
  bool has_lora;

  // Grid: x = blocks of a cluster, y = row tiles, z = token tiles.
  FASTPEFT_DEVICE Place(const GemmArgs& a, int split, int each)
      : rank(blockIdx.x), row_tile(blockIdx.y), parts(split) {
    parts_shift = 31 - __clz(split);
    begin = rank * each;
    count = max(min(each, a.kblocks - begin), 0);
    has_lora = a.R > 0 && rank == parts - 1;
  }
  FASTPEFT_DEVICE int owner(int tile) const { return tile & (parts - 1); }
  // Of the token tiles that this block stores, from the other blocks.
  FASTPEFT_DEVICE int received_bytes(const GemmArgs& a, int token_tiles, int tile_bytes) const {
    const int tiles = min(token_tiles, (a.M - token + 7) / 8);
    return ((tiles + parts - 1 - rank) >> parts_shift) * (parts - 1) * tile_bytes;
  }
  // Barriers are initialised (and fenced), the table is filled. Called once, by all threads.
  FASTPEFT_DEVICE void sync() const {
    if (parts > 1) cluster_arrive_relaxed();
    __syncthreads();
    if (parts > 1) cluster_sync_wait();
  }
};

template <class C>
struct Loader {
  const NarrowMaps& maps;
  const GemmArgs& a;
  const Place& at;

  FASTPEFT_DEVICE void w(int i, int stage) const {
    const uint32_t full = at.full0 + 8 * stage, to = at.base + stage * C::kWBytes;
    const int kb = at.begin + i;
    barrier_expect(full, a.x_bytes + C::kWBytes);
    if (C::kDgrad)
      tma_load_3d(to, &maps.w, full, 0, at.row_tile * C::kRowGroups, kb * 4);
    else
      tma_load_3d(to, &maps.w, full, 0, kb, at.row_tile * 4 * C::kRowGroups);
  }
  FASTPEFT_DEVICE void x(int i, int stage) const {
    const uint32_t full = at.full0 + 8 * stage, to = at.x0 + stage * C::kXBytes;
    tma_load_2d(to, &maps.x, full, (at.begin + i) * kBlockK, at.token);
  }
  // After w() of the first stages.
  FASTPEFT_DEVICE void run() const {
    const int first = min(C::kStages, at.count);
    const int early = min(C::kEarly, first);
#pragma unroll 1
    for (int i = 0; i < early; i++) x(i, i);
#pragma unroll 1
    for (int i = early; i < first; i++) w(i, i), x(i, i);
    Ring<C::kStages> ring(1);
    ring.stage = first == C::kStages ? 0 : first;
    if (first == C::kStages) ring.phase = 0;
    for (int i = first; i < at.count; i++, ring.advance()) {
      barrier_wait(at.empty0 + 8 * ring.stage, ring.phase);
      w(i, ring.stage);
      x(i, ring.stage);
    }
    if (!at.has_lora) return;
    const uint32_t full = at.full0 + 8 * ring.stage;  // the tokens' low-rank factor, zeros beyond R
    barrier_wait(at.empty0 + 8 * ring.stage, ring.phase);
    barrier_expect(full, a.x_bytes);
    tma_load_2d(at.x0 + ring.stage * C::kXBytes, &maps.s, full, 0, at.token);
    barrier_arrive(full);  // in place of scales
  }
};

// A scale warp: begin() asks for everything, before the block's first barrier; run() waits for it.
template <class C>
struct Scales {
  using Producer = ScaleProducer<typename C::T, C::kDgrad, C::kRowGroups, C::kChunk>;
  static constexpr int kStep = C::kChunk * Producer::kUnit, kMapLoads = 3;
  static_assert(kMapLoads * 32 * kScaleWarps >= 256, "the dynamic map");
  const GemmArgs& a;
  const Place& at;
  const int worker;
  float* map;
  Producer producer;
  RawScales<C::kChunk> raw;
  float v[kMapLoads] = {};

  FASTPEFT_DEVICE Scales(const GemmArgs& args, const Place& place, int worker, float* map)
      : a(args), at(place), worker(worker), map(map), producer(args, map) {}
  FASTPEFT_DEVICE void begin() {
    const int lane = threadIdx.x & 31;
    if (a.nested) {
#pragma unroll
      for (int j = 0; j < kMapLoads; j++)
        v[j] = __ldg(a.nested + 1 + min((j * kScaleWarps + worker) * 32 + lane, 255));
    }
    producer.begin(at.row_tile * C::kRows);
    producer.load(at.begin + min(worker * kStep, at.count - 1), at.begin + at.count, raw);
  }
  FASTPEFT_DEVICE void run() {
    const int end = at.begin + at.count, lane = threadIdx.x & 31;
    // Nothing that was asked for is used, and so waited for, before this.
    asm volatile("" : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(producer.offset));
    if (a.nested) {
#pragma unroll
      for (int j = 0; j < kMapLoads; j++)
        map[min((j * kScaleWarps + worker) * 32 + lane, 255)] = v[j] * Producer::kFactor;
      named_barrier(2, 32 * kScaleWarps);
    }
    for (int i = worker * kStep; i < at.count; i += kScaleWarps * kStep) {
      if (i != worker * kStep) producer.load(at.begin + i, end, raw);
#pragma unroll
      for (int j = 0; j < C::kChunk; j++) {
        const int first = i + j * Producer::kUnit;
        if (first >= at.count) break;
        const uint2 packed = producer.decode(raw, j);
        const int mine = Producer::kUnit == 2 ? first + lane / 16 : first;
        const int stage = mine % C::kStages, phase = (mine / C::kStages + 1) & 1;
        if (mine < at.count) {
          barrier_wait(at.empty0 + 8 * stage, phase);
          // Forward: rows in order. Gradient: pair q of n at t = q % 4, then q / 4, the order in
          // which a lane of wgmma's fragment wants them.
          const uint32_t s_stage = at.base + C::kSAt + stage * C::kSBytes;
          if (C::kDgrad) {
            const int p = lane & 15;
            const uint32_t to =
                s_stage + (Producer::kUnit == 2 ? 0 : lane / 16 * 128) + (p & 1) * 64 + p / 2 * 4;
            asm volatile("st.shared.b32 [%0], %1;\nst.shared.b32 [%0 + 32], %2;" ::"r"(to),
                         "r"(packed.x), "r"(packed.y)
                         : "memory");
          } else {
            asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(
                             s_stage + (Producer::kUnit == 2 ? lane % 16 : lane) * 8),
                         "r"(packed.x), "r"(packed.y)
                         : "memory");
          }
        }
        __syncwarp();
        if (mine < at.count && lane % (32 / Producer::kUnit) == 0)
          barrier_arrive(at.full0 + 8 * stage);
      }
    }
  }
};

// Byte -> pair of bf16 codes in shared memory, a copy a lane: entry e at e * 256 + 4 * lane, so
// that the address is one byte permute and banks never collide.
template <class T>
FASTPEFT_DEVICE void fill_table(uint32_t table, int thread) {  // of 512: half an entry each
  const int entry = thread / 2;
  uint32_t f[4];
  decode8<false>(uint32_t(entry), make_codebook<T>(), f);
#pragma unroll
  for (int q = 0; q < 4; q++)
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                     table + entry * kEntryStride + (thread & 1) * 64 + ((q + entry) & 3) * 16),
                 "r"(f[0])
                 : "memory");
}

template <int kByte>
FASTPEFT_DEVICE uint32_t lookup_pair(uint32_t word, uint32_t lane_table) {
  return load_shared_u32(permute_bytes(word, lane_table, 0x7604 | (kByte << 4)));
}

// 8 nibbles -> the 4 registers of an m16k16 fragment, unscaled; lane_table: the table's address + 4
// * lane.
template <bool kDgrad>
FASTPEFT_DEVICE void lookup8(uint32_t w, uint32_t lane_table, uint32_t (&f)[4]) {
  if (kDgrad) {  // nibbles 1 and 2 of both units swapped: pairs of n instead of pairs of k
    const uint32_t differ = (w ^ (w >> 4)) & 0x00F000F0u;
    w = w ^ differ ^ (differ << 4);
  }
  f[0] = lookup_pair<0>(w, lane_table);
  f[1] = lookup_pair<1>(w, lane_table);
  f[2] = lookup_pair<2>(w, lane_table);
  f[3] = lookup_pair<3>(w, lane_table);
}

// Low word of swizzled_descriptor(at) -> descriptor: a stage or a step further is one addition.
FASTPEFT_DEVICE uint64_t stage_descriptor(uint32_t low) {
  uint64_t d;
  asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(low), "r"(uint32_t(swizzled_descriptor(0) >> 32)));
  return d;
}

// The sums of this warpgroup's 64 rows over its k-blocks.
template <class C>
FASTPEFT_DEVICE void multiply(const GemmArgs& a, const Place& at, int row, int row_group, int turn,
                              float (&acc)[C::kTokens / 2]) {
  using T = typename C::T;
  constexpr bool kDgrad = C::kDgrad;
  constexpr int kGroup = 2;  // k16 steps a wgmma group

  const int warp = (threadIdx.x / 32) & 3, lane = threadIdx.x & 31;
  const int g = lane >> 2, t = lane & 3, pair = (g >> 1) + 4 * (g & 1);
  const uint32_t lane_table = opaque(at.table + lane * 4);
  Codebook codebook = {};
  if constexpr (C::kLookupSteps < 4) codebook = make_codebook<T>();
  const uint32_t w_lane = opaque(
      at.base + turn * C::kWBytes +
      (kDgrad ? (lane >> 3) * (512 * C::kRowGroups) + row_group * 512 + warp * 128 + (lane & 7) * 16
              : (row_group * 4 + warp) * 512 + lane * 16));
  const uint32_t s_lane = opaque(at.base + C::kSAt + turn * C::kSBytes + row_group * 128 +
                                 (kDgrad ? t * 32 : (warp * 16 + 2 * pair) * 2));
  const uint32_t x_lane = uint32_t(swizzled_descriptor(at.x0 + turn * C::kXBytes));
#pragma unroll
  for (int e = 0; e < C::kTokens / 2; e++) acc[e] = 0.0f;
  constexpr int kPer = C::kStages / C::kTurns;  // stages that this warpgroup meets in a round
  uint32_t phase = 0;
  uint32_t f[4][4], w[4], scale[2] = {}, scales[4], next[4], next_scale = 0;
  const uint32_t full0 = at.full0 + 8 * turn, empty0 = at.empty0 + 8 * turn;
  // Packed weights and, forward, the two scales of this warpgroup's stage j.
  const auto fetch = [&](int j, uint32_t phase) {
    barrier_wait(full0 + 8 * C::kTurns * j, phase);
    load_matrices<kDgrad>(next, w_lane + j * (C::kTurns * C::kWBytes));
    if (!kDgrad) next_scale = load_shared_u32(s_lane + j * (C::kTurns * C::kSBytes));
  };
  if (turn < at.count) fetch(0, 0);
  int left = at.count - turn;  // k-blocks, those of the other warpgroups among them
  while (left > 0) {
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      const uint32_t x_stage = x_lane + j * (C::kTurns * C::kXBytes / 16);
      const uint32_t s_stage = s_lane + j * (C::kTurns * C::kSBytes);
      left -= C::kTurns;
#pragma unroll
      for (int e = 0; e < 4; e++) w[e] = next[e];
      if (!kDgrad) {
        scale[0] = permute_bytes(next_scale, next_scale, 0x1010);
        scale[1] = permute_bytes(next_scale, next_scale, 0x3232);
      }
#pragma unroll
      for (int group = 0; group < 4; group += kGroup) {
        // wait -> decode -> fence -> wgmma, pinned by the empty asm: in any other order ptxas
        // serialises every wgmma.
        wgmma_wait<1>();
#pragma unroll
        for (int step = group; step < group + kGroup; step++)
          asm volatile("" : "+r"(w[step])::"memory");
#pragma unroll
        for (int step = group; step < group + kGroup; step++) {
          uint32_t c[2] = {scale[0], scale[1]};
          if (kDgrad) {
            if (step % 2 == 0) load_shared_u32x4(s_stage + step * 8, scales);
            c[0] = scales[step % 2 * 2], c[1] = scales[step % 2 * 2 + 1];
          }
          if (step < C::kLookupSteps)
            lookup8<kDgrad>(w[step], lane_table, f[step]);
          else
            decode8<kDgrad>(w[step], codebook, f[step]);
#pragma unroll
          for (int e = 0; e < 4; e++)
            f[step][e] = Coding<T>::multiply(f[step][e], c[kDgrad ? e >> 1 : e & 1]);
          asm volatile(""
                       : "+r"(f[step][0]), "+r"(f[step][1]), "+r"(f[step][2]),
                         "+r"(f[step][3])::"memory");
        }
        wgmma_fence();
#pragma unroll
        for (int step = group; step < group + kGroup; step++)
          WgmmaRS<C::kTokens>::template mma<T>(acc, f[step], stage_descriptor(x_stage + 2 * step),
                                               1);
        wgmma_commit();
        // the next k-block's bytes, behind the wgmmas in flight
        if (group == 4 - kGroup && left > 0) fetch((j + 1) % kPer, phase ^ (j + 1 == kPer));
      }
      // Given back at once: stages held by warpgroups are stages that no copy is filling.
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(empty0 + 8 * C::kTurns * j);
      if (left <= 0) break;
    }
    phase ^= 1;
  }
  if (at.has_lora && at.count % C::kTurns == turn) {
    wait_for_predecessor();
#pragma unroll
    for (int step = 0; step < 4; step++) load_lora<T, kDgrad>(a, row, step, t, f[step]);
    const int stage = at.count % C::kStages;
    barrier_wait(at.full0 + 8 * stage, at.count / C::kStages & 1);
    const uint32_t x_stage = x_lane + (stage - turn) * (C::kXBytes / 16);
#pragma unroll
    for (int step = 0; step < 4; step++) {
      if (step * 16 >= a.R) continue;
      asm volatile(""
                   : "+r"(f[step][0]), "+r"(f[step][1]), "+r"(f[step][2]),
                     "+r"(f[step][3])::"memory");
      wgmma_fence();
      WgmmaRS<C::kTokens>::template mma<T>(acc, f[step], stage_descriptor(x_stage + 2 * step), 1);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int e = 0; e < C::kTokens / 2; e++) asm volatile("" : "+f"(acc[e])::"memory");
}

FASTPEFT_DEVICE void store_shared_float4(uint32_t to, const float4& v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w)
               : "memory");
}

// Where a thread's sums go: rows `row`, `row + 1` of tokens 0 and 1, 8 and 9, ... from `to` on.
template <class T>
struct Output {
  T* to;
  int rows, tokens;  // length of a row of out; tokens from the first on, none outside the matrix
  float bias[2] = {0.0f, 0.0f};

  FASTPEFT_DEVICE Output(const GemmArgs& a, T* out, int row, int token)
      : to(out + int64_t(token) * a.rows + row),
        rows(a.rows),
        tokens(row < a.rows ? a.M - token : 0) {}
  FASTPEFT_DEVICE void store(int tile, const float4& v) const {
    uint32_t* at = reinterpret_cast<uint32_t*>(to + int64_t(tile * 8) * rows);
    if (tile * 8 < tokens) *at = pack_sums<T>(v.x, v.z, bias[0], bias[1]);
    if (tile * 8 + 1 < tokens) at[rows / 2] = pack_sums<T>(v.y, v.w, bias[0], bias[1]);
  }
};

// Adds the warpgroups' sums (in order), then the blocks' (in order): token tile i of 8 tokens is
// added up by warpgroup i % kTurns and stored by block i % parts.
template <class C>
FASTPEFT_DEVICE void finish(const GemmArgs& a, const Place& at, typename C::T* out, int row,
                            int row_group, int turn, const float (&acc)[C::kTokens / 2]) {
  constexpr int kTurns = C::kTurns, kTiles = C::kTokenTiles, kOwn = (kTiles + kTurns - 1) / kTurns;
  const int thread = row_group * 128 + (threadIdx.x & 127), t = threadIdx.x & 3;
  const auto partial = [&](int j, int i) {
    return at.x0 + ((j * (kTurns == 2 ? kOwn : kTiles) + i) * C::kRows * 2 + thread) * 16;
  };
  named_barrier(1, 128 * C::kConsumers);  // everybody is done with x
  const int other = int(threadIdx.x) - 128;
  if (C::kReceivesInRing && other < at.parts && other != at.rank)
    barrier_arrive_peer(cluster_address(at.free, other));
  const int tiles = min(kTiles, (a.M - at.token + 7) / 8);
  // Of the tile i that its owner stores, from another block.
  const auto receive = [&](int i, int from) {
    const int slot = (i >> at.parts_shift) * (at.parts - 1) + from - (from > at.owner(i));
    return (C::kReceivesInRing ? at.x0 : at.base) + C::kReceiveAt + slot * C::kTileBytes +
           thread * 16;
  };
  const auto push = [&](int i, const float4& v) {
    const int owner = at.owner(i);
    push_cluster(cluster_address(receive(i, at.rank), owner), v, cluster_address(at.ready, owner));
  };
  Output<typename C::T> output(a, out, row, at.token + 2 * t);
  const auto finish_tile = [&](int i, const float4& own) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int b = 0; b < at.parts; b++) {
      const float4 v = b == at.rank ? own : load_shared_float4(receive(i, b));
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    output.store(i, sum);
  };
  const auto begin_output = [&] {
    wait_for_predecessor();  // before anything is written to memory
    if (a.bias && row < a.rows) load_bias<typename C::T>(a, row, output.bias);
    named_barrier(1, 128 * C::kConsumers);
    if (C::kReceivesInRing && at.parts > 1) barrier_wait_cluster(at.free, 0);
  };
  if constexpr (kTurns == 2) {  // each stores what the other adds up, and keeps its own
    const auto chosen = [&](int j, bool mine) {
      const bool first = (turn == 0) == mine;
      float4 v;
      v.x = first ? acc[8 * j] : acc[8 * j + 4], v.y = first ? acc[8 * j + 1] : acc[8 * j + 5];
      v.z = first ? acc[8 * j + 2] : acc[8 * j + 6], v.w = first ? acc[8 * j + 3] : acc[8 * j + 7];
      return v;
    };
#pragma unroll
    for (int j = 0; j < kOwn; j++) store_shared_float4(partial(turn, j), chosen(j, false));
    begin_output();
    float4 own[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      own[j] = chosen(j, true);
      const float4 v = load_shared_float4(partial(turn ^ 1, j));
      own[j].x += v.x, own[j].y += v.y, own[j].z += v.z, own[j].w += v.w;
    }
    if (C::kMaxParts > 1 && at.parts > 1) {  // two: block b stores the tiles of turn b
      static_assert(C::kMaxParts <= 2, "turn of a tile = block that stores it");
      if (turn != at.rank) {
#pragma unroll
        for (int j = 0; j < kOwn; j++)
          if (2 * j + turn < tiles) push(2 * j + turn, own[j]);
        return;
      }
      barrier_wait_cluster(at.ready, 0);
#pragma unroll
      for (int j = 0; j < kOwn; j++) {
        const float4 v = load_shared_float4(receive(2 * j + turn, turn ^ 1));
        own[j].x += v.x, own[j].y += v.y, own[j].z += v.z, own[j].w += v.w;
      }
    }
#pragma unroll
    for (int j = 0; j < kOwn; j++) output.store(2 * j + turn, own[j]);
  } else {  // loops, as instructions that run once are slow to fetch
#pragma unroll
    for (int i = 0; i < kTiles; i++)
      store_shared_float4(partial(turn, i),
                          make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
    begin_output();
    const auto total = [&](int i) {
      float4 sum = load_shared_float4(partial(0, i));
#pragma unroll
      for (int j = 1; j < kTurns; j++) {
        const float4 v = load_shared_float4(partial(j, i));
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      return sum;
    };
    if (at.parts > 1) {
#pragma unroll 2
      for (int i = turn; i < tiles; i += kTurns)
        if (at.owner(i) != at.rank) push(i, total(i));
    }
    bool is_ready = at.parts == 1;
#pragma unroll 1
    for (int i = turn; i < tiles; i += kTurns) {
      if (at.owner(i) != at.rank) continue;
      const float4 own = total(i);
      if (!is_ready) barrier_wait_cluster(at.ready, 0);
      is_ready = true;
      finish_tile(i, own);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    qlinear_narrow_kernel(const __grid_constant__ NarrowMaps maps, const GemmArgs a, int split,
                          int each, typename C::T* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  Place at(a, split, each);
  at.base = (shared_address(raw) + 1023u) & ~1023u;
  at.table = (at.base & 0xff000000u) + kTableAt;
  at.x0 = C::kHasTable ? (at.base & 0xff000000u) + kXAt : at.base + C::kXOffset;
  at.full0 = at.base + C::kBarAt;
  at.empty0 = at.full0 + 8 * C::kStages;
  at.ready = at.empty0 + 8 * C::kStages;
  at.free = at.ready + 8;
  at.token = blockIdx.z * C::kTokens;
  const int warp_id = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), warpgroup = warp_id / 4;
  const Loader<C> loader{maps, a, at};
  // Prologue by role; first in the code, as fetching instructions is slow here, the first codes.
  if (warp_id == 0 && elect_one()) {
    tma_prefetch_map(&maps.w);
    tma_prefetch_map(&maps.x);
    for (int i = 0; i < C::kStages; i++)
      barrier_init(at.full0 + 8 * i, 2);  // TMA's expectation and a scale warp
    fence_async_proxy();
#pragma unroll 1
    for (int i = 0, first = min(C::kEarly, at.count); i < first; i++) loader.w(i, i);
  }
  Scales<C> scales(a, at, warp_id - 1,
                   reinterpret_cast<float*>(raw + (at.base - shared_address(raw)) + C::kMapAt));
  if (warp_id > 0 && warpgroup == 0) scales.begin();
  if (warpgroup > 0) {
    if (warp_id == 4 && elect_one()) {
      for (int i = 0; i < C::kStages; i++) barrier_init(at.empty0 + 8 * i, 4 * C::kRowGroups);
      barrier_init(at.ready, 1);
      barrier_init(at.free, max(at.parts - 1, 1));
      barrier_init_fence();
      fence_async_proxy();
      if (at.parts > 1)
        barrier_expect(at.ready, at.received_bytes(a, C::kTokenTiles, C::kTileBytes));
    }
    if (C::kHasTable) fill_table<typename C::T>(at.table, threadIdx.x - 128);
  }
  __syncwarp();
  at.sync();
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    if (warp_id > 0) {
      scales.run();
    } else {
      launch_dependents();
      wait_for_predecessor();
      if (elect_one()) loader.run();
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kConsumerRegisters));
    const int row_group = (warpgroup - 1) / C::kTurns, turn = (warpgroup - 1) % C::kTurns;
    const int g = (threadIdx.x & 31) >> 2;
    const int row =
        at.row_tile * C::kRows + row_group * 64 + (warp_id & 3) * 16 + 2 * ((g >> 1) + 4 * (g & 1));
    float acc[C::kTokens / 2];
    multiply<C>(a, at, row, row_group, turn, acc);
    finish<C>(a, at, out, row, row_group, turn, acc);
  }
#endif
}

// ---- host
template <class C>
void launch(GemmArgs a, const WeightView& w, const void* x, const void* s, void* y, int split,
            Stream stream) {
  FASTPEFT_CHECK(split <= C::kMaxParts, "qlinear_narrow: split ", split, " of tiles of ", C::kRows,
                 " x ", C::kTokens);
  const int64_t reduction = C::kDgrad ? w.N : w.K;
  const int row_tiles = ceil_div(a.rows, C::kRows);
  const int tokens = std::min<int>(C::kTokens, round_up(a.M, 8));
  a.x_bytes = tokens * kBlockK * 2;
  bind_context();
  NarrowMaps maps;
  maps.x = matrix_map(x, reduction, a.M, kBlockK, tokens);
  maps.w = weight_map(w, C::kDgrad, C::kRowGroups);
  maps.s = a.R ? matrix_map(s, a.R, a.M, 64, tokens) : maps.x;
  allow_shared_memory(reinterpret_cast<const void*>(qlinear_narrow_kernel<C>), C::kShared);
  const dim3 grid(unsigned(split), unsigned(row_tiles), unsigned(ceil_div(a.M, C::kTokens)));
  launch_kernel(qlinear_narrow_kernel<C>, "qlinear_narrow_kernel", grid, C::kThreads, C::kShared,
                stream, split, maps, a, split, ceil_div(a.kblocks, split),
                static_cast<typename C::T*>(y));
}

template <class T, bool kDgrad>
void run(const GemmArgs& a, const WeightView& w, const void* x, const void* s, void* y,
         const Plan& plan, Stream stream) {
  const int parts = int(plan.split);
  FASTPEFT_CHECK(parts >= 1 && parts <= 8 && (parts & (parts - 1)) == 0, "qlinear_narrow: split ",
                 parts);
  const bool is_tall = plan.tile_rows == 128;
  if (plan.tile_tokens == 16)
    return is_tall ? launch<Narrow<T, kDgrad, 2, 16>>(a, w, x, s, y, parts, stream)
                   : launch<Narrow<T, kDgrad, 1, 16>>(a, w, x, s, y, parts, stream);
  if (plan.tile_tokens == 32)
    return is_tall ? launch<Narrow<T, kDgrad, 2, 32>>(a, w, x, s, y, parts, stream)
                   : launch<Narrow<T, kDgrad, 1, 32>>(a, w, x, s, y, parts, stream);
  if (plan.tile_tokens == 64)
    return is_tall ? launch<Narrow<T, kDgrad, 2, 64>>(a, w, x, s, y, parts, stream)
                   : launch<Narrow<T, kDgrad, 1, 64>>(a, w, x, s, y, parts, stream);
  FASTPEFT_CHECK(plan.tile_tokens == 128, "qlinear_narrow: no tile of ", plan.tile_rows, " x ",
                 plan.tile_tokens);
  if (is_tall) return launch<Narrow<T, kDgrad, 2, 128>>(a, w, x, s, y, parts, stream);
  launch<Narrow<T, kDgrad, 1, 128>>(a, w, x, s, y, parts, stream);
}

}  // namespace

void qlinear_narrow_fwd(const QLinearFwdParams& p) {
  const GemmArgs a = gemm_args<false>(p.w, p.M, p.bias, p.lora_b, p.s ? p.R : 0, p.scaling);
  const auto serve = p.dtype == DType::kFloat16 ? run<fp16, false> : run<bf16, false>;
  serve(a, p.w, p.x, p.s, p.y, p.plan, p.stream);
}

void qlinear_narrow_dgrad(const QLinearDgradParams& p) {
  const GemmArgs a = gemm_args<true>(p.w, p.M, nullptr, p.lora_a, p.ds ? p.R : 0, 1.0f);
  const auto serve = p.dtype == DType::kFloat16 ? run<fp16, true> : run<bf16, true>;
  serve(a, p.w, p.dy, p.ds, p.dx, p.plan, p.stream);
}

}  // namespace fastpeft::cuda
