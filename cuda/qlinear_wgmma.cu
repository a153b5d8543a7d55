// NF4 x 16-bit (T = bf16, fp16) GEMM for Hopper (sm_90a), forward and input gradient from the same
// packed bytes.
//
//   forward   y [M, N] = x [M, K]  W^T + bias + scaling * s B^T      output rows = n, reduction = k
//   dgrad     dx[M, K] = dy[M, N] W    + ds A                        output rows = k, reduction = n
//
// Both are computed transposed (y^T = W x^T): decoded weights are wgmma's A operand and never leave
// registers; activations are B, brought in by TMA with the 128-byte swizzle. The branch is up to
// four k16 steps more, the first of a tile: its factor is read into fragments behind the sums of
// the tile before, s takes a stage of x.
//
// Decoding, scales, LoRA fragments: qlinear_wgmma.cuh. Two rows of a lane are neighbouring outputs,
// so the epilogue packs them into one word.
//
// Work: tile 128 rows x kTokens tokens x 64. A block: warpgroup 0 = producers (warp 0: TMA; warp 1:
// scales; warp 3: the codes of the first stages), warpgroups 1, 2 = consumers with 64 rows each.
// Blocks come in clusters of two, on neighbouring row tiles: each brings half of x to both. Tiles
// of the full waves are whole; when the rest fills at most half of the clusters, the two blocks of
// a cluster share one tile, each half of the reduction, and push the sums of half of the tokens
// through distributed shared memory: no workspace, no flags, no block waits for one that may not be
// resident, and a + b is the same in either order.
//
//      block 2c:   rows   0..127  rows 256..383  [k first half ]  own tokens   0..127
//      block 2c+1: rows 128..255  rows 384..511  [k second half]  own tokens 128..255
//                  the same tokens, x shared     one tile
//
// Bound: tensor cores from M = 256: a k-block is 8 wgmma of 128 clocks a multiprocessor, 1024, and
// takes 1025; decode (150 issue slots a warp) hides under it. At the size of layers the card is
// power-limited, so what counts are bytes and instructions: x from L2 once for two blocks is worth
// 2 %. At 128 tokens a k-block needs 512 clocks of tensor cores and takes 740: decode.
#include <algorithm>

#include "qlinear_wgmma.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kRows = 128, kThreads = 384;
constexpr int kChunk = 4;  // k-blocks whose scales are asked for at a time

template <class T, bool kDgrad_, int kTokens_>
struct Config {
  using Type = T;
  static constexpr bool kDgrad = kDgrad_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kTokens == 256 ? 4 : 6;
  // k16 steps a wgmma group: two decode faster, one gives the stage back earlier.
  static constexpr int kGroup = kTokens == 256 ? 1 : 2;
  static constexpr int kXBytes = kTokens * kBlockK * 2, kWBytes = kRows * kBlockK / 2,
                       kSBytes = kRows * 2;
  static constexpr int kWAt = kStages * kXBytes, kSAt = kWAt + kStages * kWBytes;
  static constexpr int kMapAt = kSAt + kStages * kSBytes;  // float[256], the dynamic map
  // Output staging, a half for each consumer warpgroup.
  static constexpr int kOutAt = (kMapAt + 1024 + 1023) / 1024 * 1024;
  static constexpr int kBarAt = kOutAt + 2 * kTokens * 64 * 2;
  static constexpr int kShared = kBarAt + 16 * kStages + 32 + 1024;
  static_assert(kShared <= 232448, "shared memory of sm_90");
};

struct Maps {
  CUtensorMap x, w, y, s;
};

// Barriers are initialised. Called from the code of every role; nobody waits for the scale warp,
// which asks for its first loads before it comes.
FASTPEFT_DEVICE void sync_block() {
  named_barrier(3, kThreads - 32);
}
constexpr int kScaleBarrier = 4;  // the same for that warp: warp 0 arrives

// Codes of k-block kb of an item; announces the stage's bytes.
template <class C>
FASTPEFT_DEVICE void load_weight(const Maps& maps, const GemmArgs& a, const Item& item, int kb,
                                 uint32_t base, uint32_t full0, int stage) {
  const uint32_t full = full0 + 8 * stage, to = base + C::kWAt + stage * C::kWBytes;
  barrier_expect(full, a.x_bytes + C::kWBytes);
  if (C::kDgrad)
    tma_load_3d(to, &maps.w, full, 0, item.row * 2, kb * 4);
  else
    tma_load_3d(to, &maps.w, full, 0, kb, item.row * 8);
}

// An item begins with the low-rank product, in a stage of its own.
FASTPEFT_DEVICE bool has_branch(const GemmArgs& a, const Item& item) {
  return a.R > 0 && item.begin == 0;
}

// Stages of the ring that a block's first item fills.
template <class C>
FASTPEFT_DEVICE int early_stages(const GemmArgs& a, const Item& item) {
  return min(C::kStages, item.end - item.begin + has_branch(a, item));
}

// Their codes, which no kernel of the same step writes.
template <class C>
FASTPEFT_DEVICE void load_early(const Maps& maps, const GemmArgs& a, const Item& item,
                                uint32_t base, uint32_t full0) {
  const int branch = has_branch(a, item);
  for (int i = branch; i < early_stages<C>(a, item); i++)
    load_weight<C>(maps, a, item, item.begin + i - branch, base, full0, i);
}

// Everything else.
template <class C>
FASTPEFT_DEVICE void load_tiles(const Maps& maps, const GemmArgs& a, const PairSchedule& schedule,
                                uint32_t base, uint32_t full0, uint32_t empty0) {
  Ring<C::kStages> ring(1);
  const int half_bytes = a.x_bytes / 2, half_tokens = half_bytes / (kBlockK * 2);
  const int rank = schedule.rank;
  for (int i = 0, items = schedule.count(); i < items; i++) {
    const Item item = schedule.at(i);
    const int token = item.token * C::kTokens;
    int early = i == 0 ? early_stages<C>(a, item) : 0;
    for (int kb = item.begin - has_branch(a, item); kb < item.end; kb++, ring.advance()) {
      const uint32_t full = full0 + 8 * ring.stage, to = base + ring.stage * C::kXBytes;
      const bool is_branch = kb < item.begin;
      if (early == 0) barrier_wait(empty0 + 8 * ring.stage, ring.phase);
      if (is_branch)
        barrier_expect(full, a.x_bytes);
      else if (early == 0)
        load_weight<C>(maps, a, item, kb, base, full0, ring.stage);
      // The tokens' low-rank factor [kTokens][64], zeros beyond R, or x.
      const CUtensorMap* map = is_branch ? &maps.s : &maps.x;
      const int k = is_branch ? 0 : kb * kBlockK;
      if (early > 0 ||
          item.shared) {  // a start would wait for the neighbour; or it works elsewhere
        tma_load_2d(to, map, full, k, token);
        tma_load_2d(to + half_bytes, map, full, k, token + half_tokens);
      } else {
        tma_multicast_2d(to + rank * half_bytes, map, full, k, token + rank * half_tokens, kBoth);
      }
      early -= early > 0;
    }
  }
}

template <class C>
FASTPEFT_DEVICE void load_scales(const GemmArgs& a, const PairSchedule& schedule, uint32_t base,
                                 uint32_t full0, uint32_t empty0, float* map) {
  float v[8];  // everything is asked for before anything is used
  if (a.nested) {
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = __ldg(a.nested + 1 + j * 32 + (threadIdx.x & 31));
  }
  ScaleProducer<typename C::Type, C::kDgrad, 2, kChunk> producer(a, map);
  const uint32_t to = base + C::kSAt + producer.lane * 8;
  RawScales<kChunk> raw;
  Ring<C::kStages> ring(1);
  const int items = schedule.count();
  if (items > 0) {
    const Item item = schedule.at(0);
    producer.begin(item.row * kRows);
    producer.load(item.begin, item.end, raw);
  }
  named_barrier(kScaleBarrier, 64);
  if (a.nested) {
#pragma unroll
    for (int j = 0; j < 8; j++) map[j * 32 + producer.lane] = v[j] * producer.kFactor;
    __syncwarp();
  }
  for (int i = 0; i < items; i++) {
    const Item item = schedule.at(i);
    if (i > 0) producer.begin(item.row * kRows);
    if (has_branch(a, item)) {  // its stage has no scales
      barrier_wait(empty0 + 8 * ring.stage, ring.phase);
      if (producer.lane == 0) barrier_arrive(full0 + 8 * ring.stage);
      ring.advance();
    }
    for (int kb = item.begin; kb < item.end; kb += kChunk) {
      if (i > 0 || kb > item.begin) producer.load(kb, item.end, raw);
#pragma unroll
      for (int j = 0; j < kChunk; j++) {
        if (kb + j >= item.end) break;
        const uint2 packed = producer.decode(raw, j);
        barrier_wait(empty0 + 8 * ring.stage, ring.phase);
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to + ring.stage * C::kSBytes),
                     "r"(packed.x), "r"(packed.y)
                     : "memory");
        __syncwarp();
        if (producer.lane == 0) barrier_arrive(full0 + 8 * ring.stage);
        ring.advance();
      }
    }
  }
}

template <class C>
FASTPEFT_DEVICE void consume(const Maps& maps, const GemmArgs& a, const PairSchedule& schedule,
                             uint32_t base, uint32_t full0, uint32_t empty0, uint32_t exchange) {
  using T = typename C::Type;
  constexpr bool kDgrad = C::kDgrad;
  const int cw = threadIdx.x / 128 - 1, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) & 3,
            lane = threadIdx.x & 31;
  const int g = lane >> 2, t = lane & 3, pair = (g >> 1) + 4 * (g & 1);
  const Codebook codebook = make_codebook<T>();
  // Offsets of this lane inside a stage.
  const uint32_t w_lane =
      opaque(base + C::kWAt +
             (kDgrad ? (lane >> 3) * 1024 + cw * 512 + warp * 128 + (lane & 7) * 16
                     : (cw * 4 + warp) * 512 + lane * 16));
  const uint32_t s_lane = opaque(
      base + C::kSAt + (kDgrad ? (cw * 64 + 2 * t) * 2 : (cw * 64 + warp * 16 + 2 * pair) * 2));
  const uint32_t out = base + C::kOutAt + cw * (C::kTokens * 128);
  const uint32_t half = cluster_rank();
  const uint32_t release0 = cluster_address(empty0, lane & 1);
  auto release = [&](int stage) {  // to both blocks: either may send into it next
    if (lane < 2) barrier_arrive_peer(release0 + 8 * stage);
  };
  Ring<C::kStages> ring(0);
  int previous = -1;
  float acc[C::kTokens / 2];
  const uint32_t ready = exchange + 16 * cw, free = ready + 8;
  const bool is_leader = warp == 0 && elect_one();
  uint32_t f[4][4];
  // Step 3 - j of the branch's factor into f[j]: the last step's wgmma is then the one that the
  // first k-block may meet in flight.
  const auto ask_branch = [&](const Item& item) {
    const int row = item.row * kRows + cw * 64 + warp * 16 + 2 * pair;
    if (has_branch(a, item)) {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if ((3 - j) * 16 < a.R) ask_lora<T, kDgrad>(a, row, 3 - j, t, f[j]);
    }
  };
  sync_block();
  wait_for_predecessor();  // before the low-rank factor and bias are read and y is written
  Item next = schedule.at(0);
  const int items = schedule.count();
  if (items > 0) ask_branch(next);
  cluster_sync_wait();  // the neighbour's barriers are initialised

  for (int i = 0; i < items; i++) {
    const Item item = next;
    const int row = item.row * kRows + cw * 64 + warp * 16 + 2 * pair;
    uint32_t w[4], scale[2] = {};
    T bias[2] = {};  // asked for here: behind the sums they would cost a memory latency
    if (a.bias && row < a.rows) {
      const T* from = static_cast<const T*>(a.bias) + row;
      bias[0] = __ldg(from), bias[1] = __ldg(from + 1);
    }
    if (item.shared && is_leader) {  // the neighbour may send sums to where the output is staged
      store_wait_read();
      barrier_arrive_peer(cluster_address(free, half ^ 1));
    }
    auto fetch = [&] {  // packed weights and, forward, the two scales of the ring's stage
      barrier_wait(full0 + 8 * ring.stage, ring.phase);
      load_matrices<kDgrad>(w, w_lane + ring.stage * C::kWBytes);
      if (!kDgrad) {
        const uint32_t v = load_shared_u32(s_lane + ring.stage * C::kSBytes);
        scale[0] = permute_bytes(v, v, 0x1010);
        scale[1] = permute_bytes(v, v, 0x3232);
      }
    };
    bool adds = has_branch(a, item);
    if (adds) {
      barrier_wait(full0 + 8 * ring.stage, ring.phase);
      const uint64_t desc = swizzled_descriptor(base + ring.stage * C::kXBytes);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int step = 3 - j;
        if (step * 16 >= a.R) continue;
        scale_lora<T, kDgrad>(a, f[j]);
        asm volatile("" : "+r"(f[j][0]), "+r"(f[j][1]), "+r"(f[j][2]), "+r"(f[j][3])::"memory");
        wgmma_fence();
        WgmmaRS<C::kTokens>::template mma<T>(acc, f[j], desc + 2 * step, step * 16 + 16 < a.R);
        wgmma_commit();
      }
      previous = ring.stage;
      ring.advance();
    }
    fetch();
    for (int kb = item.begin; kb < item.end; kb++) {
      const uint64_t desc = swizzled_descriptor(base + ring.stage * C::kXBytes);
      const int current = ring.stage;
      const uint32_t s_stage = s_lane + ring.stage * C::kSBytes;
      ring.advance();
#pragma unroll
      for (int group = 0; group < 4; group += C::kGroup) {
        // wait -> decode -> fence -> wgmma, pinned by the empty asm: in any other order ptxas
        // serialises every wgmma.
        wgmma_wait<1>();
#pragma unroll
        for (int step = group; step < group + C::kGroup; step++)
          asm volatile("" : "+r"(w[step])::"memory");
        if (group == C::kGroup && previous >= 0)
          release(previous);  // every wgmma of the k-block before is complete
#pragma unroll
        for (int step = group; step < group + C::kGroup; step++) {
          uint32_t c[2] = {scale[0], scale[1]};
          if (kDgrad) {
            c[0] = load_shared_u32(s_stage + (2 * step) * 16);
            c[1] = load_shared_u32(s_stage + (2 * step + 1) * 16);
          }
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
        for (int step = group; step < group + C::kGroup; step++)
          WgmmaRS<C::kTokens>::template mma<T>(acc, f[step], desc + 2 * step, step > 0 || adds);
        wgmma_commit();
      }
      if (kb + 1 < item.end) fetch();  // behind the wgmmas in flight
      adds = true;
      previous = current;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int e = 0; e < C::kTokens / 2; e++) asm volatile("" : "+f"(acc[e])::"memory");
    release(previous);
    previous = -1;
    if (i + 1 < items) {
      next = schedule.at(i + 1);
      ask_branch(next);
    }
    if (item.shared) {
      barrier_wait_cluster(free, 0);
      push_halves<C::kTokens>(acc, out, ready, half);
    }

    // Epilogue: transpose through shared memory ([token][64 rows], 128-byte swizzle), a TMA store a
    // half of the tokens, of what this block owns.
    if (is_leader) store_wait_read();
    named_barrier(1 + cw, 128);
    const float b0 = to_acc(bias[0]), b1 = to_acc(bias[1]);
    const uint32_t chunk = 2 * warp + (pair >> 2);
    const uint32_t e0 = out + 2 * t * 128 + ((chunk ^ (2 * t)) << 4) + (pair & 3) * 4;
    const uint32_t e1 = out + (2 * t + 1) * 128 + ((chunk ^ (2 * t + 1)) << 4) + (pair & 3) * 4;
#pragma unroll
    for (int part = 0; part < 2; part++) {
      if (item.shared && uint32_t(part) != half) continue;
#pragma unroll
      for (int j = C::kTokens / 16 * part; j < C::kTokens / 16 * (part + 1); j++) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(e0 + j * 1024),
                     "r"(pack_sums<T>(acc[4 * j], acc[4 * j + 2], b0, b1))
                     : "memory");
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(e1 + j * 1024),
                     "r"(pack_sums<T>(acc[4 * j + 1], acc[4 * j + 3], b0, b1))
                     : "memory");
      }
      fence_async_proxy();
      named_barrier(1 + cw, 128);
      if (is_leader) {
        tma_store_2d(&maps.y, out + part * (C::kTokens * 64), item.row * kRows + cw * 64,
                     item.token * C::kTokens + part * (C::kTokens / 2));
        store_commit();
      }
    }
  }
  if (is_leader) store_wait_read();
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_wgmma_kernel(const __grid_constant__ Maps maps, const GemmArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  const uint32_t base = (shared_address(raw) + 1023u) & ~1023u;
  float* map = reinterpret_cast<float*>(raw + (base - shared_address(raw)) + C::kMapAt);
  const uint32_t full0 = base + C::kBarAt, empty0 = full0 + 8 * C::kStages,
                 exchange = empty0 + 8 * C::kStages;
  const PairSchedule schedule(a.tiles_r, a.tiles_t, a.kblocks, a.waves);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    if (warp == 0) {
      const bool is_elected = elect_one();
      if (is_elected) {
        for (int i = 0; i < C::kStages; i++) {
          barrier_init(full0 + 8 * i, 2);    // TMA's expectation and the scale warp
          barrier_init(empty0 + 8 * i, 16);  // consumer warps of both blocks
        }
        for (int i = 0; i < 4; i++) barrier_init(exchange + 8 * i, 1);
        barrier_init_fence();
        fence_async_proxy();
        for (int i = 0; i < 2; i++) barrier_expect(exchange + 16 * i, C::kTokens * 128);
      }
      __syncwarp();
      cluster_arrive_relaxed();
      named_arrive(kScaleBarrier, 64);
      sync_block();
      launch_dependents();
      wait_for_predecessor();
      cluster_sync_wait();  // the neighbour's barriers are initialised
      if (is_elected) load_tiles<C>(maps, a, schedule, base, full0, empty0);
    } else {
      if (warp == 2 && elect_one())
        for (const CUtensorMap* map : {&maps.w, &maps.x, &maps.s, &maps.y}) tma_prefetch_map(map);
      __syncwarp();
      cluster_arrive_relaxed();
      if (warp == 1)
        load_scales<C>(a, schedule, base, full0, empty0, map);
      else
        sync_block();
      if (warp == 3 && elect_one() && schedule.count() > 0)
        load_early<C>(maps, a, schedule.at(0), base, full0);
      __syncwarp();
      cluster_sync_wait();
    }
    __syncwarp();
    cluster_arrive_relaxed();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    cluster_arrive_relaxed();
    consume<C>(maps, a, schedule, base, full0, empty0, exchange);
    cluster_arrive_relaxed();
  }
  cluster_sync_wait();  // no block leaves while its neighbour may write to it or its barriers
#endif
}

// ---- host
template <class C>
void launch(GemmArgs a, const Maps& maps, int sm_count, Stream stream) {
  allow_shared_memory(reinterpret_cast<const void*>(qlinear_wgmma_kernel<C>), C::kShared);
  const int total = ceil_div(a.tiles_r, 2) * a.tiles_t;
  const int clusters = total >= sm_count / 2 ? sm_count / 2 : std::min(sm_count / 2, 2 * total);
  a.waves = total / clusters;
  launch_kernel(qlinear_wgmma_kernel<C>, "qlinear_wgmma_kernel", dim3(unsigned(2 * clusters)),
                kThreads, C::kShared, stream, 2, maps, a);
}

template <class T, bool kDgrad>
void run(const WeightView& w, GemmArgs a, const void* x, const void* s, void* y, int tokens,
         Stream stream) {
  const int64_t reduction = kDgrad ? w.N : w.K;
  a.tiles_r = ceil_div(a.rows, kRows);
  a.tiles_t = ceil_div(a.M, tokens);
  const int box = std::min<int>(tokens, round_up(a.M, 16));
  a.x_bytes = box * kBlockK * 2;
  bind_context();
  Maps maps;
  maps.x = matrix_map(x, reduction, a.M, kBlockK, box / 2);
  maps.w = weight_map(w, kDgrad, 2);
  maps.y = matrix_map(y, a.rows, a.M, 64, tokens / 2);
  maps.s = a.R ? matrix_map(s, a.R, a.M, 64, box / 2) : maps.x;
  const int sm_count = device_facts().sm_count;
  if (tokens == 256)
    launch<Config<T, kDgrad, 256>>(a, maps, sm_count, stream);
  else
    launch<Config<T, kDgrad, 128>>(a, maps, sm_count, stream);
}

}  // namespace

void qlinear_wgmma_fwd(const QLinearFwdParams& p) {
  const GemmArgs a = gemm_args<false>(p.w, p.M, p.bias, p.lora_b, p.s ? p.R : 0, p.scaling);
  const auto f = p.dtype == DType::kFloat16 ? run<fp16, false> : run<bf16, false>;
  f(p.w, a, p.x, p.s, p.y, int(p.plan.tile_tokens), p.stream);
}

void qlinear_wgmma_dgrad(const QLinearDgradParams& p) {
  const GemmArgs a = gemm_args<true>(p.w, p.M, nullptr, p.lora_a, p.ds ? p.R : 0, 1.0f);
  const auto f = p.dtype == DType::kFloat16 ? run<fp16, true> : run<bf16, true>;
  f(p.w, a, p.dy, p.ds, p.dx, int(p.plan.tile_tokens), p.stream);
}

}  // namespace fastpeft::cuda
