// NF4 x 16-bit (T = bf16, fp16) GEMM for Hopper (sm_90a), forward and input gradient from the same
// packed bytes.
//
//   forward   y [M, N] = x [M, K]  W^T + bias + scaling * s B^T      output rows = n, reduction = k
//   dgrad     dx[M, K] = dy[M, N] W    + ds A                        output rows = k, reduction = n
//
// Both are computed transposed (y^T = W x^T): decoded weights are wgmma's A operand and never leave
// registers; activations are B, brought in by TMA with the 128-byte swizzle. The LoRA factor is up
// to four more k16 steps on the same sums.
//
// Decoding, scales, LoRA fragments: qlinear_wgmma.cuh. Two rows of a lane are neighbouring outputs,
// so the epilogue packs them into one word.
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

struct Maps {
  CUtensorMap x, w, y, s;
};

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

// The codes of the first `early` k-blocks are on their way.
template <class C>
FASTPEFT_DEVICE void load_tiles(const Maps& maps, const GemmArgs& a, const CutSchedule& schedule,
                                int early, uint32_t base, uint32_t full0, uint32_t empty0) {
  Ring<C::kStages> ring(1);
  for (int i = 0, items = schedule.count(); i < items; i++) {
    const Item item = schedule.at(i);
    for (int kb = item.begin; kb < item.end; kb++, ring.advance()) {
      if (early > 0) {
        early--;
      } else {
        barrier_wait(empty0 + 8 * ring.stage, ring.phase);
        load_weight<C>(maps, a, item, kb, base, full0, ring.stage);
      }
      tma_load_2d(base + ring.stage * C::kXBytes, &maps.x, full0 + 8 * ring.stage, kb * kBlockK,
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

template <class C>
FASTPEFT_DEVICE void load_scales(const GemmArgs& a, const CutSchedule& schedule, uint32_t base,
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
  for (int i = 0, items = schedule.count(); i < items; i++) {
    const Item item = schedule.at(i);
    producer.begin(item.row * kRows);
    for (int kb = item.begin; kb < item.end; kb += kChunk) {
      producer.load(kb, item.end, raw);
      if (a.nested && i == 0 && kb == item.begin) {
#pragma unroll
        for (int j = 0; j < 8; j++) map[j * 32 + producer.lane] = v[j] * producer.kFactor;
        __syncwarp();
      }
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
    if (a.R > 0 &&
        item.end == schedule.kblocks) {  // the stage of the low-rank factor has no scales
      barrier_wait(empty0 + 8 * ring.stage, ring.phase);
      if (producer.lane == 0) barrier_arrive(full0 + 8 * ring.stage);
      ring.advance();
    }
  }
}

template <class C>
FASTPEFT_DEVICE void consume(const Maps& maps, const GemmArgs& a, const CutSchedule& schedule,
                             uint32_t base, uint32_t full0, uint32_t empty0, uint32_t ready) {
  using T = typename C::Type;
  constexpr bool kDgrad = C::kDgrad;
  const int cw = threadIdx.x / 128 - 1, warp = (threadIdx.x / 32) & 3, lane = threadIdx.x & 31;
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
  auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(empty0 + 8 * stage);
  };
  Ring<C::kStages> ring(0);
  int previous = -1;
  float acc[C::kTokens / 2];
  wait_for_predecessor();  // before the low-rank factor and bias are read and y is written

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
        for (int e = 0; e < 4; e++)
          f[step][e] = Coding<T>::multiply(f[step][e], c[kDgrad ? e >> 1 : e & 1]);
        asm volatile(""
                     : "+r"(f[step][0]), "+r"(f[step][1]), "+r"(f[step][2]),
                       "+r"(f[step][3])::"memory");
        wgmma_fence();
        WgmmaRS<C::kTokens>::template mma<T>(acc, f[step], desc + 2 * step,
                                             kb > item.begin || step > 0);
        wgmma_commit();
      }
      if (kb + 1 < item.end) fetch();  // behind the wgmmas in flight
      previous = current;
    }
    if (a.R > 0 && item.end == schedule.kblocks) {
      wgmma_wait<0>();
      release(previous);
#pragma unroll
      for (int step = 0; step < 4; step++) load_lora<T, kDgrad>(a, row, step, t, f[step]);
      barrier_wait(full0 + 8 * ring.stage, ring.phase);
      const uint64_t desc = swizzled_descriptor(base + ring.stage * C::kXBytes);
#pragma unroll
      for (int step = 0; step < 4; step++) {
        if (step * 16 >= a.R) continue;
        asm volatile(""
                     : "+r"(f[step][0]), "+r"(f[step][1]), "+r"(f[step][2]),
                       "+r"(f[step][3])::"memory");
        wgmma_fence();
        WgmmaRS<C::kTokens>::template mma<T>(acc, f[step], desc + 2 * step, 1);
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
    if (item.shared) exchange_halves<C::kTokens>(acc, base, ready, half);

    // Epilogue: transpose through shared memory ([token][64 rows], 128-byte swizzle), TMA store of
    // what this block owns.
    constexpr int kGroups = C::kTokens / 64;
    auto mine = [&](int group) { return !item.shared || uint32_t(group * 2 / kGroups) == half; };
    float bias[2] = {0.0f, 0.0f};
    if (a.bias && row < a.rows) load_bias<T>(a, row, bias);
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
                       "r"(pack_sums<T>(acc[4 * j], acc[4 * j + 2], bias[0], bias[1]))
                       : "memory");
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(e1 + j * 1024),
                       "r"(pack_sums<T>(acc[4 * j + 1], acc[4 * j + 3], bias[0], bias[1]))
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
  const CutSchedule schedule(a.tiles_r, a.tiles_t, a.kblocks);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  int early = 0;
  if (warp == 0 && elect_one()) {
    for (int i = 0; i < C::kStages; i++) {
      barrier_init(full0 + 8 * i, 2);   // TMA's expectation and the scale warp
      barrier_init(empty0 + 8 * i, 8);  // consumer warps
    }
    barrier_init(ready, 8);
    barrier_init_fence();
    fence_async_proxy();
    if (schedule.count() > 0) {
      const Item item = schedule.at(0);
      early = min(C::kStages, item.end - item.begin);
      for (int i = 0; i < early; i++) load_weight<C>(maps, a, item, item.begin + i, base, full0, i);
    }
  }
  __syncwarp();
  cluster_sync();
  launch_dependents();
  if (warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    if (warp == 0) {
      wait_for_predecessor();
      if (elect_one()) load_tiles<C>(maps, a, schedule, early, base, full0, empty0);
    }
    if (warp == 1) load_scales<C>(a, schedule, base, full0, empty0, map);
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

template <class T, bool kDgrad>
void run(const WeightView& w, GemmArgs a, const void* x, const void* s, void* y, int tokens,
         Stream stream) {
  const int64_t reduction = kDgrad ? w.N : w.K;
  a.tiles_r = ceil_div(a.rows, kRows);
  a.tiles_t = ceil_div(a.M, tokens);
  const int box = std::min<int>(tokens, round_up(a.M, 8));
  a.x_bytes = box * kBlockK * 2;
  bind_context();
  Maps maps;
  maps.x = matrix_map(x, reduction, a.M, kBlockK, box);
  maps.w = weight_map(w, kDgrad, 2);
  maps.y = matrix_map(y, a.rows, a.M, 64, 64);
  maps.s = a.R ? matrix_map(s, a.R, a.M, 64, box) : maps.x;
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
