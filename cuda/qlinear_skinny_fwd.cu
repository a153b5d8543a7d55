// 4-bit linear layer for few tokens, decode inside, forward (sm_80 and newer). Its parts:
// qlinear_skinny_fwd.cuh; the lookup: qlinear_skinny.cuh; one or two tokens where a block has room:
// qlinear_skinny_gemv.cu.
//
//   y [M, N] = x W^T + bias + scaling * s B^T      x [M, K], s [M, R], B [N, R]
//   W [N, K] tiled 4-bit codes, one absmax a block of >= 64 columns
//
//   block: row strips [s0, s1), all of K      items of a warp, in this order:
//              k groups of 256 columns          (group, strip s0) (group, strip s0 + 1) ...
//         s0 |  w0  |  w1  | ... | w15 |        (next group, strip s0) ...
//         .. |  w0  |  w1  | ... | w15 |      An item is 16 rows x 256 columns, 2 KB of codes. The
//         s1 |  w0  |  w1  | ... | w15 |      items of a block are dealt evenly to its warps.
//
// So the x fragments of a group stay in registers for all its row strips (K <= 4096: for the whole
// kernel). One lane's 16 stored bytes are four A fragments, because the order of the reduction is
// free: lane (g, t) reads row g of a tile, 16 columns; its word i holds the pairs i (bytes 0, 1 for
// rows 2p, 2p + 1) and i + 4 (bytes 2, 3) of columns. Step 0 takes pairs 0 and 1, step 1 pairs 2
// and 3, ..., so that the B fragments are x in its own order: two plain 16-byte loads. Codes stay
// unscaled in the mma.
//
// The four lanes t of a row read tiles 0..3 of one strip, the mma's columns are tokens; a strip's
// sums times absmax are added in float32.
//
// Sums go to shared memory, a float4 a lane: one part a group, or a warp's own where there are more
// groups than warps; at the end they are added in the order of parts. LoRA and bias are one more
// part, by tensor cores.
//
// Bound: reading the codes once, 0.516 bytes a weight. An item costs 64 PRMT + 64 LDS + 16 mma (32
// for 16 tokens) of lookups and about 80 instructions else; shared memory moves 64 + 16 (reading
// codes) + 16 (writing them) rows of 128 bytes: 96 clocks an item against about 117 that DRAM needs
// for its 2113 bytes (18 bytes a clock and multiprocessor). So lookups keep up with memory, but
// cannot catch up what the start of a block loses. H200; README.md has the times.
#include "dependent_launch.cuh"
#include "qlinear_skinny_fwd.cuh"

namespace fastpeft::cuda {

namespace {

using namespace skinny;

template <class T, int kTokens, int kDepth, bool kNested>
__global__ void __launch_bounds__(kThreads, 1)
    qlinear_fwd_skinny_kernel(const __grid_constant__ FwdArgs a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int kTiles = kTokens == 16 ? 2 : 1, kSumsAt = items_end(kDepth);
  // Freeing a slot before its item is computed costs 16 registers, too many with 16 tokens.
  constexpr bool kFreesEarly = kTokens < 16;
  using Scale = std::conditional_t<kNested, uint16_t, float2>;  // of two rows, as stored
  using ScaleWord = std::conditional_t<kNested, uint32_t, float2>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x / 32), 0);  // known to be uniform
  const uint32_t lane4 = lane * 4;
  const int block = blockIdx.x, m0 = blockIdx.y * kTokens, row_pair = 2 * pair_order(g);
  const int strip_begin = block * a.base + min(block, a.rest);
  const int strip_end = strip_begin + a.base + (block < a.rest);
  launch_dependents();

  Walk walk;
  walk.start(a, strip_begin, strip_end, warp);
  // The small things that every warp waits for go first: behind the rings' 4 MB they would take 2
  // us more.
  const int nested_first = strip_begin * kTileN * a.blocks_a_row >> 8;
  float map_value = 0.0f, nested_value = 0.0f, offset = 0.0f;
  if constexpr (kNested) {
    const int last = (min(strip_end * kTileN, a.N) * a.blocks_a_row - 1) >> 8;
    offset = __ldg(a.nested);
    if (threadIdx.x < 256) map_value = __ldg(a.nested + 1 + threadIdx.x);
    if (nested_first + int(threadIdx.x) <= last)
      nested_value = __ldg(a.nested + 257 + nested_first + threadIdx.x);
  }
  const Scale* scale_at;  // this lane's two rows of strip t of the group (the last one past K)
  int nested_at;
  const auto aim_scales = [&] {
    const int block = min(walk.group * kStrips + t, a.strips_k - 1) * kTileK >> a.block_shift;
    const int n = (walk.base + walk.row) * kTileN + row_pair;
    scale_at = reinterpret_cast<const Scale*>(static_cast<const char*>(a.scales) +
                                              (int64_t(block) * a.Np + n) * int(sizeof(Scale) / 2));
    nested_at = n * a.blocks_a_row + block - (nested_first << 8);
  };
  ScaleWord scale_code;
  const auto load_first_scale = [&] {
    aim_scales();
    scale_code = __ldg(scale_at);
  };
  load_first_scale();

  // The first slot of the ring. Chunk (tile T, row r) of a strip goes to T * 128 + (r ^ 2T) * 16
  // against bank conflicts.
  const uint32_t ring = shared_address(shared + kItemsAt + warp * kDepth * kItemBytes);
  Feeder feeder;
  feeder.walk = walk;
  feeder.to = keep(ring + (lane / 8) * kTileBytes + ((lane % 8) ^ (2 * (lane / 8))) * 16);
  feeder.aim(a, lane);
  int step = kDepth == 2 ? kItemBytes : 0;  // to the next slot, for those who read and who write
  const auto feed = [&] {
    feeder.issue(a, strip_end, warp, lane);
    feeder.to += step;
  };
  feed();

  const auto prefetch_scales = [&](int group) {  // of all row strips, 32 bytes a lane
    const int block = min(group * kStrips + t, a.strips_k - 1) * kTileK >> a.block_shift;
    const char* at = static_cast<const char*>(a.scales) +
                     (int64_t(block) * a.Np + walk.base * kTileN) * int(sizeof(Scale) / 2);
    const int bytes = walk.rows * kTileN * int(sizeof(Scale) / 2);
#pragma unroll 1
    for (int i = lane / 4 * 32; i < bytes; i += 256) prefetch(at + i);
  };
  prefetch_scales(walk.group);
  {  // two threads an entry of the table, 64 bytes each, rotated so that stores spread over banks
    const uint32_t low = a.book[lane / 4] >> (lane / 2 % 2 * 16), high = a.book[warp / 2];
    const uint32_t pair = __byte_perm(low, high, warp % 2 ? 0x7610 : 0x5410);
    const int entry = threadIdx.x / 2;
#pragma unroll
    for (int q = 0; q < 4; ++q)
      *reinterpret_cast<uint4*>(shared + entry * kEntryStride + lane % 2 * 64 +
                                ((q + entry) & 3) * 16) = make_uint4(pair, pair, pair, pair);
  }
  step = -step;
  // The second slot waits until x has been asked for: the first slots of all warps come sooner so.
  // In a dependent launch x has to wait anyway.
  const bool is_late = kDepth == 2 && !a.is_dependent;
  if (kDepth == 2 && !is_late) feed();
  // part j of an item: tile t of strip j
  uint32_t read_at = keep(ring + t * kTileBytes + (g ^ (2 * t)) * 16);
  float2* decoded = reinterpret_cast<float2*>(  // [4 strips][8 row pairs], as lanes (g, t) own them
      shared + (kHoles - kScaleHoles) * kSumHoleStride + warp * 2 * kEntryStride +
      kEntryStride / 2);
  wait_for_predecessor();
  if (a.has_start && warp < walk.rows) prefetch_start<T>(a, strip_begin + warp, lane);

  TokenFragment<T, kTokens> x;
  int x_group = -1;
  bool is_first = true;
  for (int base = strip_begin; base < strip_end; base += walk.rows) {
    if (!is_first) walk.start(a, base, strip_end, warp);
    bool starts_chunk = true;
    int fresh = a.by_group ? INT_MAX : walk.rows;  // items until every row strip has a sum
    do {
      if (walk.group != x_group) {
        x.load(a, m0, g, t, walk.group);
        x_group = walk.group;
      }
      if (!is_first) load_first_scale();
      SumPlace<kTiles> own;
      own.find(a, kSumsAt, a.by_group ? walk.group : warp, lane);
      uint32_t sum_at = own.at + walk.row * kTiles * own.unit_stride;
      if (walk.left > 0) prefetch_scales(walk.group + 1);
      if (is_first) {
        if (is_late) feed();
        if constexpr (kNested) {
          offset *= a.inverse_gain;
          float* to = reinterpret_cast<float*>(shared + kTableBytes);
          if (threadIdx.x < 256) to[threadIdx.x] = map_value * a.inverse_gain;
          to[kMapBytes / 4 + threadIdx.x] = nested_value;
        }
        step = kDepth == 2 ? kItemBytes : 0;
        __syncthreads();
        is_first = false;
      }
      if (a.has_start && starts_chunk) {
        SumPlace<kTiles> place;
        place.find(a, kSumsAt, a.parts, lane);
#pragma unroll 1
        for (int row = warp; row < walk.rows; row += kWarps) {
          float acc[kTiles][4];
          start_sums<T, kTokens, kTiles>(a, base + row, m0, g, t, acc);
#pragma unroll
          for (int i = 0; i < kTiles; ++i)
            *reinterpret_cast<float4*>(shared + place.at + (row * kTiles + i) * place.unit_stride) =
                make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
        }
      }
      starts_chunk = false;
#pragma unroll 1
      for (int i = 0; i < walk.run; ++i) {
        wait_copies<kDepth - 1>();
        __syncwarp();
        uint4 q[4];
        const auto read_part = [&](int j) { q[j] = load_shared16(read_at + j * kStripBytes); };
        const auto free_slot = [&] {
          __syncwarp();
          feed();
          read_at += step;
          step = -step;
        };
        if constexpr (kFreesEarly) {
#pragma unroll
          for (int j = 0; j < 4; ++j) read_part(j);
          free_slot();
        }
        float scale[2];
        const auto decode_scales = [&] {
          if constexpr (kNested) {
            const auto nested_of = [&](int block) {
              return shared_float(shared, kNestedAt, block >> 6);
            };
            scale[0] = __fmaf_rn(shared_float(shared, kTableBytes, scale_code << 2 & 0x3FC),
                                 nested_of(nested_at), offset);
            scale[1] = __fmaf_rn(shared_float(shared, kTableBytes, scale_code >> 6),
                                 nested_of(nested_at + a.blocks_a_row), offset);
            nested_at += kTileN * a.blocks_a_row;
          } else {
            scale[0] = scale_code.x * a.inverse_gain;
            scale[1] = scale_code.y * a.inverse_gain;
          }
          scale_at += kTileN / 2;
          if (i + 1 < walk.run) scale_code = __ldg(scale_at);
        };
        decode_scales();
        decoded[(t >> 1) * (kEntryStride / 8) + (t & 1) * 8 + g] = make_float2(scale[0], scale[1]);
        __syncwarp();
        float acc[kTiles][4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (!kFreesEarly) {
            read_part(j);
            if (j == 3) free_slot();
          }
          float c[kTiles][4] = {};
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            uint32_t f[4];
            lookup_step(shared, q[j], step, lane4, f);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
              mma_16x8x16<T>(c[tile], f, x.word(tile, j, step, 0), x.word(tile, j, step, 1));
          }
          const float2 of_strip = decoded[(j >> 1) * (kEntryStride / 8) + (j & 1) * 8 + g];
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              acc[tile][e] += (e < 2 ? of_strip.x : of_strip.y) * c[tile][e];
        }
        const bool is_fresh = fresh > 0;
        --fresh;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          float4* to = reinterpret_cast<float4*>(shared + sum_at + tile * own.unit_stride);
          float4 sum = make_float4(acc[tile][0], acc[tile][1], acc[tile][2], acc[tile][3]);
          if (!is_fresh) {
            const float4 before = *to;
            sum.x += before.x, sum.y += before.y, sum.z += before.z, sum.w += before.w;
          }
          *to = sum;
        }
        sum_at += kTiles * own.unit_stride;
      }
      walk.row += walk.run;
    } while (walk.next());
    SumPlace<kTiles> own;
    own.find(a, kSumsAt, warp, lane);
    for (; !a.by_group && fresh > 0; --fresh) {  // row strips without an item
      if (walk.row >= walk.rows) walk.row = 0;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        *reinterpret_cast<float4*>(shared + own.at + (walk.row * kTiles + tile) * own.unit_stride) =
            make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      ++walk.row;
    }
    __syncthreads();
    finish_sums<T, kTokens, kTiles>(a, shared, kSumsAt, base, walk.rows, m0, warp, lane, g, t);
    if (base + walk.rows < strip_end) __syncthreads();  // the sums are read
  }
}

using FwdKernel = void (*)(FwdArgs);

template <class T, int kTokens>
FwdKernel pick_fwd(bool is_deep, bool is_nested) {
  if (is_nested)
    return is_deep ? qlinear_fwd_skinny_kernel<T, kTokens, 2, true>
                   : qlinear_fwd_skinny_kernel<T, kTokens, 1, true>;
  return is_deep ? qlinear_fwd_skinny_kernel<T, kTokens, 2, false>
                 : qlinear_fwd_skinny_kernel<T, kTokens, 1, false>;
}

template <class T>
FwdKernel pick_fwd(int tokens, bool is_deep, bool is_nested) {
  return tokens == 8 ? pick_fwd<T, 8>(is_deep, is_nested) : pick_fwd<T, 16>(is_deep, is_nested);
}

// Row strips a block. Returns blocks.
int split_rows(FwdArgs& a, int strips_n, int sm_count) {
  int rows = ceil_div(strips_n, sm_count);
  if (a.nested)  // the block's second-level absmax must fit into shared memory
    rows = std::min(rows, std::max(1, (kNestedFloats - 2) * 16 / a.blocks_a_row));
  const int blocks = std::min(std::max(sm_count, ceil_div(strips_n, rows)), strips_n);
  a.base = strips_n / blocks;
  a.rest = strips_n % blocks;
  return blocks;
}

// Bytes of shared memory for the sums of a.chunk row strips behind those in the table's holes.
int place_sums(FwdArgs& a, int tokens, int free_bytes) {
  a.by_group = a.groups <= kWarps;
  a.parts = a.by_group ? a.groups : kWarps;
  const int tiles = tokens == 16 ? 2 : 1, parts = a.parts + a.has_start;
  const int holes = kHoles - kScaleHoles;
  const auto bytes = [&](int rows) {
    const int part_bytes = rows * tiles * kSumBytes,
              fitting = std::min(parts, holes / (rows * tiles));
    // one place for all is simpler to sum up than two
    a.hole_parts = fitting < parts && parts * part_bytes <= free_bytes ? 0 : fitting;
    return (parts - a.hole_parts) * part_bytes;
  };
  const int rows = a.base + (a.rest > 0);
  a.chunk = rows;
  while (bytes(a.chunk) > free_bytes) --a.chunk;
  a.chunk = ceil_div(rows, ceil_div(rows, a.chunk));
  const auto divide = [](int n) { return n ? uint32_t(((int64_t(1) << 31) + n - 1) / n) : 0u; };
  a.divide[0] = divide(a.chunk);
  a.divide[1] = divide(a.base % a.chunk);
  a.divide[2] = divide((a.base + 1) % a.chunk);
  return bytes(a.chunk);
}

}  // namespace

namespace skinny {

float pack_book(uint32_t (&book)[8], DType dtype, Format format) {
  // FP4's codes are exact in bf16 when multiplied by 12; float16 holds both codebooks well enough.
  const float gain = dtype == DType::kFloat16 ? 1.0f : format == Format::kNf4 ? 1.43675f : 12.0f;
  const Codebook values = codebook(format, gain);
  uint16_t bits[16];
  for (int i = 0; i < 16; ++i) {
    const bf16 as_bf16 = __float2bfloat16_rn(values.v[i]);
    const fp16 as_fp16 = __float2half_rn(values.v[i]);
    memcpy(&bits[i], dtype == DType::kBFloat16 ? static_cast<const void*>(&as_bf16) : &as_fp16, 2);
  }
  memcpy(book, bits, sizeof(bits));
  return 1.0f / gain;
}

bool weight_fits(const WeightView& w, DType dtype) {
  return is_16bit(dtype) && is_4bit(w.format) && scales_by_column(w.K, w.blocksize) &&
         is_aligned(w.codes, 16) && is_aligned(w.scales, 16) &&
         block_count(w.N, w.K, w.blocksize) < (int64_t(1) << 31);
}

}  // namespace skinny

bool skinny_fits(const QLinearFwdParams& p) {
  const int64_t blocks_a_row = p.w.K / p.w.blocksize;
  return weight_fits(p.w, p.dtype) && p.w.blocksize >= kTileK && is_aligned(p.x, 16) &&
         blocks_a_row <= (kNestedFloats - 2) * 16 && p.w.N < (int64_t(1) << 27) &&
         round_up<int64_t>(p.w.N, kTileN) * blocks_a_row < (int64_t(1) << 31);
}

void qlinear_fwd_skinny(const QLinearFwdParams& p) {
  if (gemv_fits(p)) return qlinear_fwd_gemv(p);
  const char* name = "qlinear_fwd_skinny_kernel";
  const DeviceFacts facts = device_facts();
  const PackedWeight w = packed_weight(p.w);
  FwdArgs a = {};
  fill_args(a, p, w);
  a.groups = ceil_div(w.strips_k, kStrips);
  a.block_shift = w.block_shift;
  a.has_start = a.s || a.bias;
  a.is_dependent = dependent_launch() && facts.arch >= 90;
  a.ranks_by_4 = p.R % 4 == 0 && is_aligned(p.s, 8) && is_aligned(p.lora_b, 8);
  const int tokens = p.M <= 8 ? 8 : 16;
  const bool is_deep = facts.shared_bytes >= items_end(2);
  const int ring_end = items_end(is_deep ? 2 : 1);
  FASTPEFT_CHECK(facts.shared_bytes >= ring_end, name, ": ", ring_end,
                 " bytes of shared memory a block are needed, the device has ", facts.shared_bytes);
  const int blocks = split_rows(a, w.strips_n, facts.sm_count);
  const int bytes = ring_end + place_sums(a, tokens, facts.shared_bytes - ring_end);
  const FwdKernel kernel = p.dtype == DType::kBFloat16
                               ? pick_fwd<bf16>(tokens, is_deep, a.nested != nullptr)
                               : pick_fwd<fp16>(tokens, is_deep, a.nested != nullptr);
  allow_shared_memory(reinterpret_cast<const void*>(kernel), facts.shared_bytes);
  const int64_t passes = ceil_div<int64_t>(p.M, tokens);
  FASTPEFT_CHECK(passes < 65536, name, ": ", p.M, " tokens in one launch");
  launch_kernel(kernel, name, dim3(unsigned(blocks), unsigned(passes)), kThreads, bytes, p.stream,
                1, a);
}

}  // namespace fastpeft::cuda
