// Dequantise rows of a weight in one launch, second-level scales included.
//
//   out[n - row_begin, k] = cast(float32(codebook[code[n, k]] * absmax(n, k)))     row-major [rows, K]
//   absmax(b) = map[q[b]] * nested_absmax[b / 256] + offset
//
// dequantize_tiled_kernel (K % 64 == 0, 16- and 32-bit outputs). A warp takes 16 rows x 256 columns =
// 4 strips of 512 bytes; a lane loads 16 bytes of each (one coalesced 512-byte load a strip):
//
//        strip (16 x 64):   tile 0    tile 1    tile 2    tile 3        lane = 8 * tile + r
//        rows 2p, 2p+1      lane r    lane r+8  lane r+16 lane r+24     p = kPairOrder[r]
//
// A lane so holds 16 columns of two rows: 32 output bytes a row. Stored as they are, each 16-byte
// store would fill half sectors. So lanes of tiles 2i and 2i+1 first trade halves of their PACKED
// words (2 shuffles for 32 weights); then a pair of lanes writes whole 32-byte sectors together.
// Scales: lane (r, i) decodes the two rows of strip i, the others get them by shuffle, so every
// scale of the warp is decoded once.
// Codes become values through a codebook in shared memory with one copy a lane (no bank conflicts):
// 1 LDS + 2 integer operations + 1 FMUL + half a conversion a weight.
//
// Bound: memory. 14336 x 4096 to bf16: 30.3 MB read + 117.4 MB written; the pipes that decode need
// about a third of that time (figures: README.md).
//
// dequantize_any_kernel: any K, any blocksize, float64, int8: a thread an element.
#include <algorithm>

#include "check.cuh"
#include "device/decode.cuh"
#include "device/reduce.cuh"
#include "launch.h"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kStrips = 4;  // strips a warp, along k
constexpr int kWarpsK = 8;  // warps of a block along k; the others along n
constexpr int kWarpsN = kThreads / 32 / kWarpsK;

struct DequantizeArgs {
  PackedWeight w;
  Codebook book;
  int64_t row_begin, row_end;
  int strip_begin;  // row_begin / 16
};

// 8 weights of one row: bytes 0 and 2 (row 2p) or 1 and 3 (row 2p+1) of a and b.
template <int kRow>
__device__ __forceinline__ void lookup8(const float* lane_table, uint32_t a, uint32_t b, float absmax,
                                        float (&v)[8]) {
  v[0] = lookup<8 * kRow>(lane_table, a);
  v[1] = lookup<8 * kRow + 4>(lane_table, a);
  v[2] = lookup<8 * kRow + 16>(lane_table, a);
  v[3] = lookup<8 * kRow + 20>(lane_table, a);
  v[4] = lookup<8 * kRow>(lane_table, b);
  v[5] = lookup<8 * kRow + 4>(lane_table, b);
  v[6] = lookup<8 * kRow + 16>(lane_table, b);
  v[7] = lookup<8 * kRow + 20>(lane_table, b);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(v[i], absmax);
}

template <class T>
__device__ __forceinline__ void store8(T* out, const float (&v)[8]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint4*>(out) = make_uint4(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]),
                                                pack_pair<T>(v[4], v[5]), pack_pair<T>(v[6], v[7]));
  } else {
    reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
}

// kHalves: blocksize 32, two blocks a strip row.
template <class T, bool kNested, bool kHalves>
__global__ void __launch_bounds__(kThreads) dequantize_tiled_kernel(DequantizeArgs a, T* __restrict__ out) {
  __shared__ float table[16 * 32], map[kNested ? 256 : 1];
  const PackedWeight& w = a.w;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int r = lane % 8, strip_lane = lane / 8;  // strip_lane: tile when loading, strip when scaling
  const int ks = (int(blockIdx.x) * kWarpsK + warp % kWarpsK) * kStrips;
  const int ns = a.strip_begin + int(blockIdx.y) * kWarpsN + warp / kWarpsK;
  const bool is_inside = ns < w.strips_n && ks < w.strips_k;
  const int64_t n0 = int64_t(ns) * kTileN + 2 * pair_order(r);

  uint4 q[kStrips] = {};
  RawScales<kNested> raw[kHalves ? 2 : 1];
  if (is_inside) {
    const uint8_t* codes = w.codes + (int64_t(ns) * w.strips_k + ks) * kStripBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < kStrips; ++i)
      if (ks + i < w.strips_k) q[i] = load_stream(codes + i * kStripBytes);
#pragma unroll
    for (int h = 0; h < (kHalves ? 2 : 1); ++h)
      raw[h].load(w, n0, int64_t(ks + strip_lane) * kTileK + 32 * h);
  }
  fill_codebook(table, a.book);
  float offset = 0.0f;
  if constexpr (kNested) {
    map[threadIdx.x] = __ldg(w.nested + 1 + threadIdx.x);
    offset = __ldg(w.nested);
  }
  __syncthreads();
  if (!is_inside) return;

  float absmax[2][kHalves ? 2 : 1];
#pragma unroll
  for (int row = 0; row < 2; ++row)
#pragma unroll
    for (int h = 0; h < (kHalves ? 2 : 1); ++h) absmax[row][h] = raw[h].decode(row, map, offset);

  const float* lane_table = table + lane;
  const bool is_odd = strip_lane & 1;
  const uint32_t keep = is_odd ? 0x7632u : 0x5410u, send = is_odd ? 0x5410u : 0x7632u;
  const bool writes[2] = {n0 >= a.row_begin && n0 < a.row_end, n0 + 1 >= a.row_begin && n0 + 1 < a.row_end};
  T* row_out = out + (n0 - a.row_begin) * w.K + int64_t(ks) * kTileK + (strip_lane & 2) * 16 + is_odd * 8;
#pragma unroll
  for (int i = 0; i < kStrips; ++i) {
    if (ks + i >= w.strips_k) break;
    // this lane's column half (even: 0..7, odd: 8..15) of tiles 2j (even_*) and 2j+1 (odd_*)
    const uint32_t mine0 = __byte_perm(q[i].x, q[i].y, keep), mine1 = __byte_perm(q[i].z, q[i].w, keep);
    const uint32_t other0 = __shfl_xor_sync(kAllLanes, __byte_perm(q[i].x, q[i].y, send), 8);
    const uint32_t other1 = __shfl_xor_sync(kAllLanes, __byte_perm(q[i].z, q[i].w, send), 8);
    const uint32_t even0 = is_odd ? other0 : mine0, even1 = is_odd ? other1 : mine1;
    const uint32_t odd0 = is_odd ? mine0 : other0, odd1 = is_odd ? mine1 : other1;
    float scale[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      scale[row] = __shfl_sync(kAllLanes, absmax[row][0], r + 8 * i);
      if constexpr (kHalves) {
        const float second = __shfl_sync(kAllLanes, absmax[row][1], r + 8 * i);
        scale[row] = strip_lane & 2 ? second : scale[row];
      }
    }
    float v[8];
    T* at = row_out + i * kTileK;
    if (writes[0]) {
      lookup8<0>(lane_table, even0, even1, scale[0], v);
      store8(at, v);
      lookup8<0>(lane_table, odd0, odd1, scale[0], v);
      store8(at + 16, v);
    }
    if (writes[1]) {
      lookup8<1>(lane_table, even0, even1, scale[1], v);
      store8(at + w.K, v);
      lookup8<1>(lane_table, odd0, odd1, scale[1], v);
      store8(at + w.K + 16, v);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_any_kernel(DequantizeArgs a, T* __restrict__ out) {
  __shared__ float table[16 * 32];
  fill_codebook(table, a.book);
  __syncthreads();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= (a.row_end - a.row_begin) * a.w.K) return;
  const int64_t n = a.row_begin + i / a.w.K, k = i % a.w.K;
  const NibblePlace at = tiled_place(n, k, a.w.K);
  const int code = a.w.codes[at.byte] >> at.shift & 15;
  out[i] = from_acc<T>(__fmul_rn(table[code * 32 + threadIdx.x % 32], block_absmax(a.w, n, k)));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_int8_kernel(Int8Weight w, int64_t row_begin, int64_t row_end, T* __restrict__ out) {
  constexpr int kElements = 8;
  const int64_t row = row_begin + blockIdx.y;
  const int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kElements;
  if (row >= row_end || k >= w.K) return;
  const float absmax = __ldg(w.absmax + row);
  const int8_t* from = w.codes + row * w.K + k;
  T* to = out + (row - row_begin) * w.K + k;
  const auto value = [absmax](int8_t q) {
    return from_acc<T>(__fmul_rn(__fmul_rn(float(q), absmax), kInt8Step));
  };
  if (w.is_aligned) {
    const Vec<int8_t, kElements> q = load_vec<int8_t, kElements>(from);
    Vec<T, kElements> v;
#pragma unroll
    for (int i = 0; i < kElements; ++i) v.v[i] = value(q.v[i]);
    store_vec<T, kElements>(to, v);
  } else {
    for (int i = 0; i < kElements && k + i < w.K; ++i) to[i] = value(from[i]);
  }
}

template <class T>
void launch_tiled(const DequantizeArgs& a, const DequantizeParams& p) {
  T* out = static_cast<T*>(p.out);
  const int strips_n = int(ceil_div<int64_t>(p.row_end, kTileN)) - a.strip_begin;
  const dim3 grid(ceil_div(a.w.strips_k, kStrips * kWarpsK), ceil_div(strips_n, kWarpsN));
  FASTPEFT_CHECK(grid.y < 65536, "dequantize: ", p.row_end - p.row_begin, " rows in one launch");
  const cudaStream_t stream = cuda_stream(p.stream);
  const bool halves = p.w.blocksize < kTileK;
  if (p.w.nested && halves)
    dequantize_tiled_kernel<T, true, true><<<grid, kThreads, 0, stream>>>(a, out);
  else if (p.w.nested)
    dequantize_tiled_kernel<T, true, false><<<grid, kThreads, 0, stream>>>(a, out);
  else if (halves)
    dequantize_tiled_kernel<T, false, true><<<grid, kThreads, 0, stream>>>(a, out);
  else
    dequantize_tiled_kernel<T, false, false><<<grid, kThreads, 0, stream>>>(a, out);
  check_launch("dequantize_tiled_kernel");
}

template <class T>
void dequantize_4bit(const DequantizeParams& p) {
  DequantizeArgs a;
  a.w = packed_weight(p.w);
  a.book = codebook(p.w.format);
  a.row_begin = p.row_begin;
  a.row_end = p.row_end;
  a.strip_begin = int(p.row_begin / kTileN);
  if constexpr (!std::is_same_v<T, double>) {
    if (p.w.K % kTileK == 0 && is_aligned(p.out, 16) && is_aligned(p.w.codes, 16)) {
      launch_tiled<T>(a, p);
      return;
    }
  }
  const int64_t count = (p.row_end - p.row_begin) * p.w.K;
  dequantize_any_kernel<T>
      <<<grid_blocks(count, kThreads), kThreads, 0, cuda_stream(p.stream)>>>(a, static_cast<T*>(p.out));
  check_launch("dequantize_any_kernel");
}

template <class T>
void dequantize_int8(const DequantizeParams& p) {
  Int8Weight w;
  w.codes = static_cast<const int8_t*>(p.w.codes);
  w.absmax = static_cast<const float*>(p.w.scales);
  w.N = p.w.N;
  w.K = p.w.K;
  w.is_aligned = p.w.K % 16 == 0 && is_aligned(w.codes, 16) && is_aligned(p.out, 16);
  for (int64_t begin = p.row_begin; begin < p.row_end; begin += 65535) {  // gridDim.y's limit
    const int64_t end = std::min<int64_t>(begin + 65535, p.row_end);
    const dim3 grid(grid_blocks(p.w.K, kThreads * 8), unsigned(end - begin));
    dequantize_int8_kernel<T><<<grid, kThreads, 0, cuda_stream(p.stream)>>>(
        w, begin, end, static_cast<T*>(p.out) + (begin - p.row_begin) * p.w.K);
    check_launch("dequantize_int8_kernel");
  }
}

}  // namespace

void dequantize(const DequantizeParams& p) {
  if (p.row_end <= p.row_begin || p.w.K == 0) return;
  if (p.w.format == Format::kDense) {  // nothing to decode: the rows as they are
    const int64_t row_bytes = p.w.K * dtype_bytes(p.dtype);
    FASTPEFT_CUDA_CHECK(cudaMemcpyAsync(
        p.out, static_cast<const char*>(p.w.codes) + p.row_begin * row_bytes,
        (p.row_end - p.row_begin) * row_bytes, cudaMemcpyDeviceToDevice, cuda_stream(p.stream)));
    return;
  }
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.w.format == Format::kInt8)
      dequantize_int8<T>(p);
    else
      dequantize_4bit<T>(p);
  });
}

}  // namespace fastpeft::cuda
