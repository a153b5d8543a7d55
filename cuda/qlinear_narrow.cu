// NF4 x bf16 linear layer for up to 128 tokens on Hopper (sm_90a), forward and input gradient from
// the same packed bytes.
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
// Bound: decode, 78 half-rate integer instructions per 1024 weights and warp: 26 weights a clock
// and multiprocessor (14336 x 4096: 10 us at 1.75 GHz on all multiprocessors); below it codes from
// memory (7.4 us), and x through L2: every tile reads all tokens.
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

template <bool kDgrad_, int kRowGroups_, int kTokens_>
struct Narrow {
  static constexpr bool kDgrad = kDgrad_;
  static constexpr int kTokens = kTokens_, kRowGroups = kRowGroups_, kRows = 64 * kRowGroups;
  // 128 tokens: registers for the sums leave room for three warpgroups, stages of x none for the
  // table; the tensor cores need longer than decoding by permutes.
  static constexpr bool kIsFull = kTokens == 128, kHasTable = !kIsFull;
  static constexpr int kConsumers = kIsFull ? 3 : 4, kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = kIsFull ? 56 : 64;
  static constexpr int kConsumerRegisters = kIsFull ? 152 : 104;
  static constexpr int kTurns = kConsumers / kRowGroups;  // warpgroups that share rows
  static constexpr int kXBytes = kTokens * kBlockK * 2, kWBytes = kRows * kBlockK / 2,
                       kSBytes = kRows * 2;
  static constexpr int kStages = 12;
  static constexpr int kChunk = 2;  // units of scales asked for at a time
  static constexpr int kTokenTiles = kTokens / 8;
  // From the start of dynamic shared memory, rounded up to 1024.
  static constexpr int kSAt = kStages * kWBytes;
  static constexpr int kMapAt = kSAt + kStages * kSBytes;  // float[256], the dynamic map
  static constexpr int kBarAt = kMapAt + 1024;
  static constexpr int kBarEnd = (kBarAt + 16 * kStages + 16 + 127) / 128 * 128;
  static constexpr int kXOffset = (kBarEnd + 1023) / 1024 * 1024;  // without a table
  static constexpr int kPartialBytes = kConsumers * 64 * kTokens * 4;
  // Sums from other blocks: a place of their own, or behind the partial sums in the stages of x.
  static constexpr int kReceiveAt = kHasTable ? kBarEnd : kXOffset + kPartialBytes;
  static constexpr int kReceiveBytes = kRowGroups == 1 ? std::max(kTokenTiles, 8) * 2048 : 0;
  static constexpr int kShared = (kHasTable ? int(kXAt) : kXOffset + 1024) + kStages * kXBytes;
  static_assert(!kHasTable || kReceiveAt + kReceiveBytes + 2048 <= int(kTableAt),
                "fits below the table");
  static_assert(kHasTable || kPartialBytes + kReceiveBytes <= kStages * kXBytes,
                "sums fit into the stages of x");
  static_assert(kShared <= 232448, "shared memory of sm_90");
  static_assert(kStages % kTurns == 0, "a warpgroup meets the same stages in every round");
  static_assert(kStages % (kScaleWarps * kChunk * (3 - kRowGroups)) == 0,
                "a scale warp meets the same stages in every round");
  static_assert(kStages * kXBytes >= kPartialBytes, "the partial sums reuse the stages of x");
};

struct NarrowMaps {
  CUtensorMap x, w, s;
};

// What the roles of a block share.
struct Place {
  uint32_t base, full0, empty0, table, x0;
  uint32_t ready;             // the other blocks' sums have come
  uint32_t free;              // the other blocks are done with their stages
  uint32_t peer_empty0;       // in a pair: the other block's
  int rank, row_tile, token;  // rank in the cluster
  int parts;                  // blocks that share the reduction
  bool is_pair;               // two row tiles that share x
  int begin, count;           // k-blocks
  bool has_lora;

  // Grid: x = blocks of a cluster, y = row tiles (pairs of them), z = token tiles.
  FASTPEFT_DEVICE Place(const GemmArgs& a, int split, int each) {
    is_pair = split == 0;
    parts = max(split, 1);
    rank = blockIdx.x;
    row_tile = is_pair ? blockIdx.y * 2 + rank : blockIdx.y;
    const int part = is_pair ? 0 : rank;
    begin = part * each;
    count = max(min(each, a.kblocks - begin), 0);
    has_lora = a.R > 0 && part == parts - 1;
  }
  // Of the token tiles that this block stores, from the other blocks.
  FASTPEFT_DEVICE int received_bytes(const GemmArgs& a, int token_tiles) const {
    const int tiles = min(token_tiles, (a.M - token + 7) / 8);
    return (tiles + parts - 1 - rank) / parts * (parts - 1) * 2048;
  }
  // Barriers are initialised (and fenced), the table is filled.
  template <int kThreads>
  FASTPEFT_DEVICE void sync() const {
    const bool is_cluster = is_pair || parts > 1;
    if (is_cluster) cluster_arrive_relaxed();
    named_barrier(3, kThreads);  // called from the code of every role
    if (is_cluster) cluster_sync_wait();
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
    const int k = (at.begin + i) * kBlockK;
    if (at.is_pair) {  // each block brings half of the tokens to both
      const int half = a.x_bytes / 2;
      tma_multicast_2d(to + at.rank * half, &maps.x, full, k,
                       at.token + at.rank * (half / (kBlockK * 2)), kBoth);
    } else {
      tma_load_2d(to, &maps.x, full, k, at.token);
    }
  }
  // After w() of the first stages.
  FASTPEFT_DEVICE void run() const {
    const int first = min(C::kStages, at.count);
    for (int i = 0; i < first; i++) x(i, i);
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

template <class C>
FASTPEFT_DEVICE void load_scales(const GemmArgs& a, const Place& at, int worker, float* map) {
  using Producer = ScaleProducer<bf16, C::kDgrad, C::kRowGroups, C::kChunk>;
  constexpr int kStep = C::kChunk * Producer::kUnit, kMapLoads = 3;
  static_assert(kMapLoads * 32 * kScaleWarps >= 256, "the dynamic map");
  const int end = at.begin + at.count, lane = threadIdx.x & 31;
  float v[kMapLoads];  // everything is asked for before anything is used
  if (a.nested) {
#pragma unroll
    for (int j = 0; j < kMapLoads; j++)
      v[j] = __ldg(a.nested + 1 + min((j * kScaleWarps + worker) * 32 + lane, 255));
  }
  Producer producer(a, map);
  producer.begin(at.row_tile * C::kRows);
  RawScales<C::kChunk> raw;
  producer.load(at.begin + min(worker * kStep, at.count - 1), end, raw);
  at.template sync<C::kThreads>();
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
        const int place = Producer::kUnit == 2 ? lane % 16 : lane;
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at.base + C::kSAt +
                                                              stage * C::kSBytes + place * 8),
                     "r"(packed.x), "r"(packed.y)
                     : "memory");
      }
      __syncwarp();
      if (mine < at.count && lane % (32 / Producer::kUnit) == 0)
        barrier_arrive(at.full0 + 8 * stage);
    }
  }
}

// Byte -> pair of bf16 codes in shared memory, a copy a lane: entry e at e * 256 + 4 * lane, so
// that the address is one byte permute and banks never collide.
FASTPEFT_DEVICE void fill_table(uint32_t table, int thread, int threads) {
  const Codebook codebook = make_codebook<bf16>();
  for (int i = thread; i < 512; i += threads) {
    uint32_t f[4];
    decode8<false>(uint32_t(i / 2), codebook, f);
#pragma unroll
    for (int q = 0; q < 4; q++)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                       table + i / 2 * kEntryStride + (i & 1) * 64 + ((q + i / 2) & 3) * 16),
                   "r"(f[0])
                   : "memory");
  }
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

// The sums of this warpgroup's 64 rows over its k-blocks.
template <class C>
FASTPEFT_DEVICE void multiply(const GemmArgs& a, const Place& at, int row, int row_group, int turn,
                              float (&acc)[C::kTokens / 2]) {
  constexpr bool kDgrad = C::kDgrad;
  constexpr int kGroup = 2;  // k16 steps a wgmma group

  const int warp = (threadIdx.x / 32) & 3, lane = threadIdx.x & 31;
  const int g = lane >> 2, t = lane & 3, pair = (g >> 1) + 4 * (g & 1);
  const uint32_t lane_table = opaque(at.table + lane * 4);
  Codebook codebook = {};
  if constexpr (!C::kHasTable) codebook = make_codebook<bf16>();
  const uint32_t w_lane =
      opaque(at.base + (kDgrad ? (lane >> 3) * (512 * C::kRowGroups) + row_group * 512 +
                                     warp * 128 + (lane & 7) * 16
                               : (row_group * 4 + warp) * 512 + lane * 16));
  const uint32_t s_lane =
      opaque(at.base + C::kSAt +
             (kDgrad ? (row_group * 64 + 2 * t) * 2 : (row_group * 64 + warp * 16 + 2 * pair) * 2));
  const auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(at.empty0 + 8 * stage);
    if (lane == 1 && at.is_pair) barrier_arrive_peer(at.peer_empty0 + 8 * stage);
  };
#pragma unroll
  for (int e = 0; e < C::kTokens / 2; e++) acc[e] = 0.0f;
  int stage = turn;
  uint32_t phase = 0;
  uint32_t f[4][4], w[4], scale[2] = {}, next[4], next_scale = 0;
  const auto fetch = [&] {  // packed weights and, forward, the two scales of the ring's stage
    barrier_wait(at.full0 + 8 * stage, phase);
    load_matrices<kDgrad>(next, w_lane + stage * C::kWBytes);
    if (!kDgrad) next_scale = load_shared_u32(s_lane + stage * C::kSBytes);
  };
  if (turn < at.count) fetch();
  for (int i = turn; i < at.count; i += C::kTurns) {
    const uint32_t x_stage = at.x0 + stage * C::kXBytes;
    const uint32_t s_stage = s_lane + stage * C::kSBytes;
    const int current = stage;
    stage += C::kTurns;
    if (stage >= C::kStages) stage -= C::kStages, phase ^= 1;
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
          c[0] = load_shared_u32(s_stage + (2 * step) * 16);
          c[1] = load_shared_u32(s_stage + (2 * step + 1) * 16);
        }
        if constexpr (C::kHasTable)
          lookup8<kDgrad>(w[step], lane_table, f[step]);
        else
          decode8<kDgrad>(w[step], codebook, f[step]);
#pragma unroll
        for (int e = 0; e < 4; e++) f[step][e] = mul_bf16x2(f[step][e], c[kDgrad ? e >> 1 : e & 1]);
        asm volatile(""
                     : "+r"(f[step][0]), "+r"(f[step][1]), "+r"(f[step][2]),
                       "+r"(f[step][3])::"memory");
      }
      wgmma_fence();
#pragma unroll
      for (int step = group; step < group + kGroup; step++)
        WgmmaRS<C::kTokens>::mma(acc, f[step], swizzled_descriptor(x_stage + 32 * step), 1);
      wgmma_commit();
      // the next k-block's bytes, behind the wgmmas in flight
      if (group == 4 - kGroup && i + C::kTurns < at.count) fetch();
    }
    // Given back at once: stages held by warpgroups are stages that no copy is filling.
    wgmma_wait<0>();
    release(current);
  }
  if (at.has_lora && at.count % C::kTurns == turn) {
    wait_for_predecessor();
#pragma unroll
    for (int step = 0; step < 4; step++) load_lora<bf16, kDgrad>(a, row, step, t, f[step]);
    barrier_wait(at.full0 + 8 * stage, phase);
    const uint32_t x_stage = at.x0 + stage * C::kXBytes;
#pragma unroll
    for (int step = 0; step < 4; step++) {
      if (step * 16 >= a.R) continue;
      asm volatile(""
                   : "+r"(f[step][0]), "+r"(f[step][1]), "+r"(f[step][2]),
                     "+r"(f[step][3])::"memory");
      wgmma_fence();
      WgmmaRS<C::kTokens>::mma(acc, f[step], swizzled_descriptor(x_stage + 32 * step), 1);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int e = 0; e < C::kTokens / 2; e++) asm volatile("" : "+f"(acc[e])::"memory");
}

FASTPEFT_DEVICE float4 load_shared_float4(uint32_t from) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

FASTPEFT_DEVICE void store_shared_float4(uint32_t to, const float4& v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w)
               : "memory");
}

// Rounds and stores the sums of rows `row`, `row + 1` and tokens m, m + 1.
FASTPEFT_DEVICE void store(const GemmArgs& a, __nv_bfloat16* out, int row, int m,
                           const float (&bias)[2], const float4& v) {
  if (row >= a.rows) return;
  uint32_t* to = reinterpret_cast<uint32_t*>(out + int64_t(m) * a.rows + row);
  if (m < a.M) *to = pack_bf16(v.x + bias[0], v.z + bias[1]);
  if (m + 1 < a.M) to[a.rows / 2] = pack_bf16(v.y + bias[0], v.w + bias[1]);
}

// Adds the warpgroups' sums (in order), then the blocks' (in order): token tile i of 8 tokens is
// added up by warpgroup i % kTurns and stored by block i % parts.
template <class C>
FASTPEFT_DEVICE void finish(const GemmArgs& a, const Place& at, __nv_bfloat16* out, int row,
                            int row_group, int turn, const float (&acc)[C::kTokens / 2]) {
  const int thread = row_group * 128 + (threadIdx.x & 127), t = threadIdx.x & 3;
  const auto partial = [&](int j, int i) {
    return at.x0 + ((j * C::kTokenTiles + i) * C::kRows * 2 + thread) * 16;
  };
  named_barrier(1, 128 * C::kConsumers);  // everybody is done with x
  const int other = int(threadIdx.x) - 128;
  if (!C::kHasTable && other < at.parts && other != at.rank)
    barrier_arrive_peer(cluster_address(at.free, other));
#pragma unroll
  for (int i = 0; i < C::kTokenTiles; i++)
    store_shared_float4(partial(turn, i),
                        make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  wait_for_predecessor();  // before anything is written to memory
  float bias[2] = {0.0f, 0.0f};
  if (a.bias && row < a.rows) load_bias<bf16>(a, row, bias);
  named_barrier(1, 128 * C::kConsumers);
  if (!C::kHasTable && at.parts > 1) barrier_wait_cluster(at.free, 0);
  const int tiles = min(C::kTokenTiles, (a.M - at.token + 7) / 8);
  const auto receive = [&](int i, int from) {
    return at.base + C::kReceiveAt + (i / at.parts * at.parts + from) * 2048 + thread * 16;
  };
#pragma unroll 2
  for (int i = turn; i < tiles; i += C::kTurns) {
    float4 sum = load_shared_float4(partial(0, i));
#pragma unroll
    for (int j = 1; j < C::kTurns; j++) {
      const float4 v = load_shared_float4(partial(j, i));
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const int owner = i % at.parts;
    const uint32_t to = receive(i, at.rank);
    if (at.parts == 1)
      store(a, out, row, at.token + i * 8 + 2 * t, bias, sum);
    else if (owner == at.rank)  // read again by this very thread
      store_shared_float4(to, sum);
    else
      push_cluster(cluster_address(to, owner), sum, cluster_address(at.ready, owner));
  }
  if (at.parts == 1) return;
  barrier_wait_cluster(at.ready, 0);
  for (int i = turn; i < tiles; i += C::kTurns) {
    if (i % at.parts != at.rank) continue;
    float4 sum = load_shared_float4(receive(i, 0));
    for (int b = 1; b < at.parts; b++) {
      const float4 v = load_shared_float4(receive(i, b));
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    store(a, out, row, at.token + i * 8 + 2 * t, bias, sum);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    qlinear_narrow_kernel(const __grid_constant__ NarrowMaps maps, const GemmArgs a, int split,
                          int each, __nv_bfloat16* out) {
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
  at.peer_empty0 = at.is_pair ? cluster_address(at.empty0, at.rank ^ 1) : 0;
  const int warp_id = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), warpgroup = warp_id / 4;
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    if (warp_id == 0) {
      const Loader<C> loader{maps, a, at};
      if (elect_one()) {
        for (int i = 0; i < C::kStages; i++) {
          barrier_init(at.full0 + 8 * i, 2);  // TMA's expectation and a scale warp
          barrier_init(at.empty0 + 8 * i, 4 * C::kRowGroups * (at.is_pair ? 2 : 1));
        }
        barrier_init(at.ready, 1);
        barrier_init(at.free, max(at.parts - 1, 1));
        barrier_init_fence();
        fence_async_proxy();
        if (at.parts > 1) barrier_expect(at.ready, at.received_bytes(a, C::kTokenTiles));
        for (int i = 0, first = min(C::kStages, at.count); i < first; i++) loader.w(i, i);
      }
      __syncwarp();
      at.template sync<C::kThreads>();
      launch_dependents();
      wait_for_predecessor();
      if (elect_one()) loader.run();
      __syncwarp();
    } else {
      float* map = reinterpret_cast<float*>(raw + (at.base - shared_address(raw)) + C::kMapAt);
      load_scales<C>(a, at, warp_id - 1, map);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kConsumerRegisters));
    const int row_group = (warpgroup - 1) / C::kTurns, turn = (warpgroup - 1) % C::kTurns;
    const int g = (threadIdx.x & 31) >> 2;
    const int row =
        at.row_tile * C::kRows + row_group * 64 + (warp_id & 3) * 16 + 2 * ((g >> 1) + 4 * (g & 1));
    if constexpr (C::kHasTable) fill_table(at.table, threadIdx.x - 128, 128 * C::kConsumers);
    at.template sync<C::kThreads>();
    float acc[C::kTokens / 2];
    multiply<C>(a, at, row, row_group, turn, acc);
    finish<C>(a, at, out, row, row_group, turn, acc);
  }
  if (at.is_pair) {  // no block leaves while its neighbour may write to it or its barriers
    cluster_arrive_relaxed();
    cluster_sync_wait();
  }
#endif
}

// ---- host
template <class C>
void launch(GemmArgs a, const WeightView& w, const void* x, const void* s, void* y, int split,
            Stream stream) {
  const int64_t reduction = C::kDgrad ? w.N : w.K;
  const int row_tiles = ceil_div(a.rows, C::kRows);
  const bool is_pair = split == 0;
  const int tokens = std::min<int>(C::kTokens, round_up(a.M, is_pair ? 16 : 8));
  a.x_bytes = tokens * kBlockK * 2;
  bind_context();
  NarrowMaps maps;
  maps.x = matrix_map(x, reduction, a.M, kBlockK, is_pair ? tokens / 2 : tokens);
  maps.w = weight_map(w, C::kDgrad, C::kRowGroups);
  maps.s = a.R ? matrix_map(s, a.R, a.M, 64, tokens) : maps.x;
  allow_shared_memory(reinterpret_cast<const void*>(qlinear_narrow_kernel<C>), C::kShared);
  const int cluster = is_pair ? 2 : std::max(split, 1);
  const dim3 grid(unsigned(cluster), unsigned(is_pair ? ceil_div(row_tiles, 2) : row_tiles),
                  unsigned(ceil_div(a.M, C::kTokens)));
  launch_kernel(qlinear_narrow_kernel<C>, "qlinear_narrow_kernel", grid, C::kThreads, C::kShared,
                stream, cluster, maps, a, split, ceil_div(a.kblocks, std::max(split, 1)),
                static_cast<__nv_bfloat16*>(y));
}

template <bool kDgrad>
void run(const GemmArgs& a, const WeightView& w, const void* x, const void* s, void* y,
         const Plan& plan, Stream stream) {
  const int parts = int(plan.split);
  FASTPEFT_CHECK(parts >= 0 && parts <= 8 && (parts <= 1 || plan.tile_rows == 64),
                 "qlinear_narrow: split ", parts, " of tiles of ", plan.tile_rows, " rows");
  const bool is_tall = plan.tile_rows == 128;
  if (plan.tile_tokens == 16)
    return is_tall ? launch<Narrow<kDgrad, 2, 16>>(a, w, x, s, y, parts, stream)
                   : launch<Narrow<kDgrad, 1, 16>>(a, w, x, s, y, parts, stream);
  if (plan.tile_tokens == 32)
    return is_tall ? launch<Narrow<kDgrad, 2, 32>>(a, w, x, s, y, parts, stream)
                   : launch<Narrow<kDgrad, 1, 32>>(a, w, x, s, y, parts, stream);
  if (plan.tile_tokens == 64)
    return is_tall ? launch<Narrow<kDgrad, 2, 64>>(a, w, x, s, y, parts, stream)
                   : launch<Narrow<kDgrad, 1, 64>>(a, w, x, s, y, parts, stream);
  FASTPEFT_CHECK(plan.tile_tokens == 128 && !is_tall, "qlinear_narrow: no tile of ", plan.tile_rows,
                 " x ", plan.tile_tokens);
  launch<Narrow<kDgrad, 1, 128>>(a, w, x, s, y, parts, stream);
}

}  // namespace

void qlinear_narrow_fwd(const QLinearFwdParams& p) {
  const GemmArgs a = gemm_args<false>(p.w, p.M, p.bias, p.lora_b, p.s ? p.R : 0, p.scaling);
  run<false>(a, p.w, p.x, p.s, p.y, p.plan, p.stream);
}

void qlinear_narrow_dgrad(const QLinearDgradParams& p) {
  const GemmArgs a = gemm_args<true>(p.w, p.M, nullptr, p.lora_a, p.ds ? p.R : 0, 1.0f);
  run<true>(a, p.w, p.dy, p.ds, p.dx, p.plan, p.stream);
}

}  // namespace fastpeft::cuda
