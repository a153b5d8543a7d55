// Quantise a weight, quantise its scales, and re-tile its codes. Rounding and layouts: formats.h.
//
//   quantize         w [N, K] -> canonical 4-bit codes, absmax per block; or int8 rows
//   quantize_absmax  absmax [B] -> codes uint8 [B], nested absmax per 256
//   tile             canonical <-> tiled codes
//
// Work split
//   4-bit: blocksize/8 lanes (at most a warp) hold one block, 8 consecutive elements a lane a pass;
//          | lane 0: w0..w7 | lane 1: w8..w15 | ... | -> max by shuffles -> 4 bytes of codes a lane
//   int8:  a block of 256 threads a row, two passes (the second one hits L1/L2)
//   absmax: 256 threads = one group of the second level
//   tile:  a thread per 16 stored bytes (K % 16 == 0), else a thread a byte
// Bound: reading w (2 or 4 bytes an element) and writing half a byte.
#include <cmath>

#include "check.cuh"
#include "device/decode.cuh"
#include "device/reduce.cuh"
#include "launch.h"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256, kBlocksPerSm = 4;
constexpr int kElements = 8;  // consecutive elements a lane
constexpr int kCells = 128, kCellCopies = 16;
constexpr float kStep = 1099511627776.0f;  // 2^40: turns any positive difference into >= 1

struct Thresholds {
  float v[15];
};

struct Cell {
  float below;            // thresholds of lower cells
  float minus_threshold;  // -T * 2^40 of the cell's own threshold, -inf without one
};

struct Quantize4bitArgs {
  int64_t count, blocks;
  int block_shift;
  uint8_t* codes;         // [ceil(count / 2)]
  float* absmax;          // [blocks]
  Thresholds thresholds;  // FP4
  Cell cells[kCells];     // NF4
};

// Code of t by counting thresholds below it.
// NF4: thresholds are more than 1/32 apart, so a grid of cells of that width holds at most one
// each: cell(t) is monotonic, hence thresholds of lower cells are below t, those of higher cells
// are not, and one comparison remains. It is done on the FMA pipe: saturate((t - T) * 2^40) is 0 or
// 1 exactly, because T * 2^40 is exact and an FMA rounds once. NaN saturates to 0, as "all
// comparisons false". 16 copies of the table (one a half-warp lane) avoid bank conflicts.
constexpr float kCellShift = 12582912.0f + 32.0f;  // 1.5 * 2^23: the integer lands in the low bits

__device__ __forceinline__ int nf4_cell(float t) {
  return __float_as_int(__fmaf_rn(t, 32.0f, kCellShift)) & (kCells - 1);
}

void fill_cells(Cell* cells) {
  for (int c = 0; c < kCells; ++c) {  // cells above 64 are met by NaN only
    cells[c] = {0.0f, -INFINITY};
    for (int i = 0; i < 15 && c <= 64; ++i) {
      const int at = int(std::nearbyint(kNf4Threshold[i] * 32.0f)) + 32;  // as the sum above rounds
      if (at < c) cells[c].below += 1.0f;
      if (at == c) cells[c].minus_threshold = -kNf4Threshold[i] * kStep;
    }
  }
}

// Sorted position -> FP4 nibble, four bits each.
constexpr uint64_t fp4_order() {
  uint64_t packed = 0;
  for (int i = 0; i < 16; ++i) packed |= uint64_t(kFp4Order[i]) << (4 * i);
  return packed;
}

template <bool kNf4>
__device__ __forceinline__ float code_of(float t, const Cell* lane_cells, const Thresholds& th) {
  if constexpr (kNf4) {
    const Cell cell = lane_cells[nf4_cell(t) * kCellCopies];
    return cell.below + __saturatef(__fmaf_rn(t, kStep, cell.minus_threshold));
  } else {
    int below = 0;
#pragma unroll
    for (int i = 0; i < 15; ++i) below += t > th.v[i] ? 1 : 0;
    constexpr uint64_t kOrder = fp4_order();
    return float(kOrder >> (4 * below) & 15);
  }
}

// Elements [first, first + 8) of w, zero from `end` on.
template <class T, bool kAligned>
__device__ __forceinline__ Vec<T, kElements> load_elements(const T* w, int64_t first, int64_t end) {
  if (kAligned && first + kElements <= end) return load_vec<T, kElements>(w + first);
  Vec<T, kElements> out;
#pragma unroll
  for (int i = 0; i < kElements; ++i) out.v[i] = first + i < end ? w[first + i] : T(0.0f);
  return out;
}

// 8 elements of a block -> 4 bytes of codes. Only a ragged last block divides, and may end inside.
template <class T, bool kNf4, bool kRagged>
__device__ __forceinline__ void store_codes(const Quantize4bitArgs& a, const Cell* lane_cells,
                                            const Vec<T, kElements>& w, int64_t first, int64_t end,
                                            float bounded) {
  constexpr float kZero = float(zero_code(kNf4 ? Format::kNf4 : Format::kFp4));
  const float inverse = __fdiv_rn(1.0f, bounded);
  uint32_t bytes = 0;
#pragma unroll
  for (int i = 0; i < kElements; i += 2) {
    const float w0 = float(to_acc(w.v[i])), w1 = float(to_acc(w.v[i + 1]));
    const float t0 = kRagged ? __fdiv_rn(w0, bounded) : __fmul_rn(w0, inverse);
    const float t1 = kRagged ? __fdiv_rn(w1, bounded) : __fmul_rn(w1, inverse);
    const float c0 = code_of<kNf4>(t0, lane_cells, a.thresholds);
    const float c1 =
        !kRagged || first + i + 1 < a.count ? code_of<kNf4>(t1, lane_cells, a.thresholds) : kZero;
    bytes |= (__float_as_uint(c0 * 16.0f + (c1 + 8388608.0f)) & 255u) << (4 * i);  // even one high
  }
  uint8_t* out = a.codes + first / 2;
  if (!kRagged || first + kElements <= end)
    *reinterpret_cast<uint32_t*>(out) = bytes;
  else
    for (int i = 0; first + 2 * i < end; ++i) out[i] = uint8_t(bytes >> (8 * i));
}

template <class T, bool kNf4, bool kAligned>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : kBlocksPerSm)
    quantize_4bit_kernel(const T* __restrict__ w, const __grid_constant__ Quantize4bitArgs a) {
  __shared__ Cell cells[kNf4 ? kCells * kCellCopies : 1];
  if constexpr (kNf4) {
    for (int i = threadIdx.x; i < kCells * kCellCopies; i += kThreads)
      cells[i] = a.cells[i / kCellCopies];
    __syncthreads();
  }
  const Cell* lane_cells = cells + (kNf4 ? threadIdx.x % kCellCopies : 0);
  const int blocksize = 1 << a.block_shift;
  const int group = min(32, blocksize / kElements);  // lanes a block
  const int passes = blocksize / (kElements * group), groups = kThreads / group;
  const int64_t lane_first = (threadIdx.x % group) * kElements;
  const auto block_of = [&](int64_t chunk) { return chunk * groups + threadIdx.x / group; };
  const auto load = [&](int64_t block, int pass) {
    const int64_t begin = block << a.block_shift;
    return load_elements<T, kAligned>(w, begin + lane_first + int64_t(pass) * group * kElements,
                                      min(begin + blocksize, a.count));
  };
  Vec<T, kElements> next = load(block_of(blockIdx.x), 0);
  for (int64_t chunk = blockIdx.x; chunk * groups < a.blocks; chunk += gridDim.x) {
    const int64_t block = block_of(chunk), begin = block << a.block_shift;
    Vec<T, kElements> v = next;
    if ((chunk + gridDim.x) * groups < a.blocks) next = load(block_of(chunk + gridDim.x), 0);
    float absmax = 0.0f;
    for (int pass = 0; pass < passes; ++pass) {
      if (pass > 0) v = load(block, pass);
#pragma unroll
      for (int i = 0; i < kElements; ++i) absmax = fmaxf(absmax, fabsf(float(to_acc(v.v[i]))));
    }
    for (int offset = group / 2; offset > 0; offset /= 2)
      absmax = fmaxf(absmax, __shfl_xor_sync(kAllLanes, absmax, offset));
    if (block >= a.blocks) continue;

    const float bounded = fmaxf(absmax, kTinyAbsmax);
    const bool is_ragged = begin + blocksize > a.count;
    const int64_t end = min(begin + blocksize, a.count);
    if (threadIdx.x % group == 0) a.absmax[block] = is_ragged ? bounded : absmax;
    for (int pass = 0; pass < passes; ++pass) {
      const int64_t first = begin + lane_first + int64_t(pass) * group * kElements;
      if (first >= end) break;
      if (passes > 1) v = load(block, pass);
      if (is_ragged)
        store_codes<T, kNf4, true>(a, lane_cells, v, first, end, bounded);
      else
        store_codes<T, kNf4, false>(a, lane_cells, v, first, end, bounded);
    }
  }
}

// code = round half to even(w * int8_inverse(absmax))
template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_int8_kernel(const T* __restrict__ w, int64_t K, int8_t* __restrict__ codes,
                         float* __restrict__ absmax) {
  __shared__ float scratch[kThreads / 32];
  const int64_t row = int64_t(blockIdx.x) * K;
  float top = 0.0f;
  for (int64_t k = threadIdx.x; k < K; k += kThreads)
    top = fmaxf(top, fabsf(float(to_acc(w[row + k]))));
  top = block_max<kThreads>(top, scratch);
  const float inverse = int8_inverse(top);
  for (int64_t k = threadIdx.x; k < K; k += kThreads)
    codes[row + k] = int8_t(__float2int_rn(__fmul_rn(float(to_acc(w[row + k])), inverse)));
  if (threadIdx.x == 0) absmax[blockIdx.x] = top;
}

__global__ void __launch_bounds__(kNestedBlock) quantize_absmax_kernel(QuantizeAbsmaxParams p) {
  __shared__ float middles[256], scratch[kNestedBlock / 32];
  const int64_t i = int64_t(blockIdx.x) * kNestedBlock + threadIdx.x;
  const float* map = p.nested + 1;
  if (threadIdx.x < 255)
    middles[threadIdx.x] = __fmul_rn(__fadd_rn(map[threadIdx.x], map[threadIdx.x + 1]), 0.5f);
  const float offset = *p.offset;
  const float centred = i < p.count ? __fsub_rn(p.absmax[i], offset) : 0.0f;
  const float top = block_max<kNestedBlock>(fabsf(centred), scratch);  // also fences middles
  if (threadIdx.x == 0) p.nested[257 + blockIdx.x] = top;
  if (i == 0) p.nested[0] = offset;
  if (i >= p.count) return;
  int code = 0;
  if (top > 0.0f) {
    const float t = fminf(fmaxf(__fmul_rn(centred, __fdiv_rn(1.0f, top)), -1.0f), 1.0f);
    const float grid = nested_grid(t);
    int high = 255;  // number of midpoints below grid, by bisection
    while (code < high) {
      const int mid = (code + high) / 2;
      if (middles[mid] < grid)
        code = mid + 1;
      else
        high = mid;
    }
  }
  p.codes[i] = uint8_t(code);
}

__device__ __forceinline__ uint32_t swap_nibbles(uint32_t w) {
  return (w >> 4 & 0x0F0F0F0Fu) | (w & 0x0F0F0F0Fu) << 4;
}

// Stored tile row of 16 bytes: columns c = 0..7 are pairs kPairOrder[c] of rows n0 (low byte) and
// n1 (high byte). A canonical byte is a stored one with its nibbles swapped.
// a, b: the 8 canonical bytes of the two rows, pairs 0..3 in x, 4..7 in y.
__device__ __forceinline__ uint4 interleave(uint2 a, uint2 b) {
  const auto word = [&](int i) {                                       // units of pairs i and i + 4
    const uint32_t low = __byte_perm(a.x, b.x, 0x0040 + 0x0011 * i);   // a.x[i], b.x[i]
    const uint32_t high = __byte_perm(a.y, b.y, 0x0040 + 0x0011 * i);  // a.y[i], b.y[i]
    return swap_nibbles(__byte_perm(low, high, 0x5410));
  };
  return make_uint4(word(0), word(1), word(2), word(3));
}

__device__ __forceinline__ uint2 deinterleave(uint4 q, int row) {
  const uint32_t words[4] = {swap_nibbles(q.x), swap_nibbles(q.y), swap_nibbles(q.z),
                             swap_nibbles(q.w)};
  uint2 out = make_uint2(0, 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.x |= (words[i] >> (8 * row) & 255u) << (8 * i);
    out.y |= (words[i] >> (8 * row + 16) & 255u) << (8 * i);
  }
  return out;
}

// K % 16 == 0: a thread per stored 16 bytes.
template <bool kToTiled>
__global__ void __launch_bounds__(kThreads)
    tile_rows_kernel(TileParams p, int strips_k, int64_t rows) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows) return;
  const int64_t strip = i / 32;
  const int64_t n0 = strip / strips_k * 16 + 2 * pair_order(int(i % 8));
  const int64_t k0 = strip % strips_k * 64 + int(i / 8 % 4) * 16;
  const bool is_inside[2] = {n0 < p.N && k0 < p.K, n0 + 1 < p.N && k0 < p.K};
  const int64_t at[2] = {(n0 * p.K + k0) / 2, ((n0 + 1) * p.K + k0) / 2};
  if constexpr (kToTiled) {
    const uint32_t zero = uint32_t(zero_code(p.format)) * 0x11111111u;
    uint2 row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      row[r] =
          is_inside[r] ? *reinterpret_cast<const uint2*>(p.from + at[r]) : make_uint2(zero, zero);
    reinterpret_cast<uint4*>(p.to)[i] = interleave(row[0], row[1]);
  } else {
    const uint4 q = reinterpret_cast<const uint4*>(p.from)[i];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (is_inside[r]) *reinterpret_cast<uint2*>(p.to + at[r]) = deinterleave(q, r);
  }
}

// Any K: a thread per output byte, so that no byte has two writers.
__global__ void __launch_bounds__(kThreads)
    tile_bytes_kernel(TileParams p, int strips_k, int64_t bytes) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= bytes) return;
  const int64_t strip = i / kStripBytes;
  const int in_tile = int(i % kTileBytes);
  const int64_t n = strip / strips_k * 16 + 2 * pair_order(in_tile / 16) + in_tile % 2;
  const int64_t k = strip % strips_k * 64 + int(i % kStripBytes) / kTileBytes * 16 +
                    2 * pair_order(in_tile % 16 / 2);
  uint32_t byte = 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    uint32_t code = uint32_t(zero_code(p.format));
    if (n < p.N && k + j < p.K) {
      const int64_t flat = n * p.K + k + j;
      code = p.from[flat / 2] >> (flat % 2 ? 0 : 4) & 15u;
    }
    byte |= code << (4 * j);
  }
  p.to[i] = uint8_t(byte);
}

__global__ void __launch_bounds__(kThreads) untile_bytes_kernel(TileParams p, int64_t bytes) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= bytes) return;
  uint32_t byte = 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int64_t flat = 2 * i + j;
    uint32_t code = uint32_t(zero_code(p.format));
    if (flat < p.N * p.K) {
      const NibblePlace at = tiled_place(flat / p.K, flat % p.K, p.K);
      code = p.from[at.byte] >> at.shift & 15u;
    }
    byte |= code << (j ? 0 : 4);
  }
  p.to[i] = uint8_t(byte);
}

template <class T, bool kNf4>
void launch_quantize_4bit(const QuantizeParams& p) {
  Quantize4bitArgs a = {};
  a.count = p.N * p.K;
  a.blocks = block_count(p.N, p.K, p.blocksize);
  a.block_shift = log2_exact(p.blocksize);
  a.codes = static_cast<uint8_t*>(p.codes);
  a.absmax = p.absmax;
  for (int i = 0; i < 15; ++i) a.thresholds.v[i] = kNf4 ? kNf4Threshold[i] : kFp4Threshold[i];
  const T* w = static_cast<const T*>(p.w);
  const int64_t lanes = p.blocksize / kElements < 32 ? p.blocksize / kElements : 32;
  if (kNf4) fill_cells(a.cells);
  const unsigned blocks = grid_blocks(a.blocks, kThreads / lanes);
  const unsigned resident = unsigned(device_facts().sm_count) * kBlocksPerSm;
  const unsigned grid = blocks < resident ? blocks : resident;
  if (is_aligned(w, 16))
    quantize_4bit_kernel<T, kNf4, true><<<grid, kThreads, 0, cuda_stream(p.stream)>>>(w, a);
  else
    quantize_4bit_kernel<T, kNf4, false><<<grid, kThreads, 0, cuda_stream(p.stream)>>>(w, a);
  check_launch("quantize_4bit_kernel");
}

}  // namespace

void quantize(const QuantizeParams& p) {
  if (p.N * p.K == 0) return;
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.format == Format::kInt8) {
      quantize_int8_kernel<T><<<grid_blocks(p.N, 1), kThreads, 0, cuda_stream(p.stream)>>>(
          static_cast<const T*>(p.w), p.K, static_cast<int8_t*>(p.codes), p.absmax);
      check_launch("quantize_int8_kernel");
      return;
    }
    FASTPEFT_CHECK(is_4bit(p.format), format_name(p.format), ": cannot be quantised to");
    FASTPEFT_CHECK(p.blocksize >= kMinBlocksize && p.blocksize <= kMaxBlocksize, "blocksize ",
                   p.blocksize, ": ", kMinBlocksize, " to ", kMaxBlocksize, " are supported");
    if (p.format == Format::kNf4)
      launch_quantize_4bit<T, true>(p);
    else
      launch_quantize_4bit<T, false>(p);
  });
}

void quantize_absmax(const QuantizeAbsmaxParams& p) {
  if (p.count == 0) return;
  quantize_absmax_kernel<<<grid_blocks(p.count, kNestedBlock), kNestedBlock, 0,
                           cuda_stream(p.stream)>>>(p);
  check_launch("quantize_absmax_kernel");
}

void tile(const TileParams& p) {
  if (p.N * p.K == 0) return;
  FASTPEFT_CHECK(is_4bit(p.format), format_name(p.format), ": has no tiled order");
  const int strips_k = int(ceil_div<int64_t>(p.K, kTileK));
  const int64_t tiled = tiled_bytes(p.N, p.K), canonical = ceil_div<int64_t>(p.N * p.K, 2);
  const cudaStream_t stream = cuda_stream(p.stream);
  if (p.K % 16 == 0 && is_aligned(p.from, 16) && is_aligned(p.to, 16)) {
    const unsigned grid = grid_blocks(tiled / 16, kThreads);
    if (p.to_tiled)
      tile_rows_kernel<true><<<grid, kThreads, 0, stream>>>(p, strips_k, tiled / 16);
    else
      tile_rows_kernel<false><<<grid, kThreads, 0, stream>>>(p, strips_k, tiled / 16);
  } else if (p.to_tiled) {
    tile_bytes_kernel<<<grid_blocks(tiled, kThreads), kThreads, 0, stream>>>(p, strips_k, tiled);
  } else {
    untile_bytes_kernel<<<grid_blocks(canonical, kThreads), kThreads, 0, stream>>>(p, canonical);
  }
  check_launch("tile");
}

}  // namespace fastpeft::cuda
