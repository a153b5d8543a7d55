// Dequantise rows of a weight in one launch, second-level scales included.
//
//   out[n - row_begin, k] = cast(float32(codebook[code[n, k]] * absmax(n, k)))     row-major [rows,
//   K] absmax(b) = map[q[b]] * nested_absmax[b / 256] + offset
//
// dequantize_tiled_kernel (K % 64 == 0, 16- and 32-bit outputs). A warp takes kStrips neighbouring
// strips (16 rows x 64 columns, 512 bytes each) a time; a lane loads 16 bytes of each, one
// coalesced 512-byte load a strip:
//
//        strip (16 x 64):   tile 0    tile 1    tile 2    tile 3        lane = 8 * tile + r
//        rows 2p, 2p+1      lane r    lane r+8  lane r+16 lane r+24     p = kPairOrder[r]
//
// A lane so holds 16 columns of two rows: 32 output bytes a row. Stored as they are, each 16-byte
// store instruction would fill half sectors. So lanes r and r^1 first trade halves of their PACKED
// words (2 shuffles for 32 weights): the even one then holds columns 0..7, the odd one 8..15, of
// both row pairs, and every store instruction of the warp writes four whole 128-byte lines. Scales:
// lane (r, i) decodes the two rows of strip i, the others get them by shuffle, so every scale of
// the warp is decoded once. Codes become values through a codebook in shared memory with one copy a
// lane (no bank conflicts): 1 LDS + 2 integer operations + 1 FMUL + half a conversion a weight.
// kStrips is 2; 4 where that still runs as one wave of blocks. Outputs too big to stay in L2 are
// stored evict-first.
//
// Bound: memory. 14336 x 4096 to bf16: 30.3 MB read + 117.4 MB written. H200: 40.7 us, where a
// kernel that only expands 1 byte to 4 takes 40.2 us; rejected neighbours: README.md.
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
constexpr int resident_blocks(int strips) {
  return strips == 4 ? 5 : 6;
}  // what registers allow
constexpr int64_t kResidentBytes = 24 << 20;  // outputs up to here are left to stay in L2

struct DequantizeArgs {
  PackedWeight w;
  Codebook book;
  int64_t row_begin, row_end;
  int strip_begin;   // row_begin / 16
  int groups_k;      // groups of kStrips strips along k
  int groups;        // all of them
  bool is_streamed;  // stores are evict-first
};

// 8 weights of one row: bytes 0 and 2 (row 2p) or 1 and 3 (row 2p+1) of a and b.
template <int kRow>
__device__ __forceinline__ void lookup8(const float* lane_table, uint32_t a, uint32_t b,
                                        float absmax, float (&v)[8]) {
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
__device__ __forceinline__ void store8(T* out, const float (&v)[8], bool is_streamed) {
  if constexpr (sizeof(T) == 2) {
    const uint4 piece = make_uint4(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]),
                                   pack_pair<T>(v[4], v[5]), pack_pair<T>(v[6], v[7]));
    if (is_streamed)
      __stcs(reinterpret_cast<uint4*>(out), piece);
    else
      *reinterpret_cast<uint4*>(out) = piece;
  } else {
    reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
}

// kHalf: 2 when blocksize is 32, two blocks a strip row; else 1.
template <class T, bool kNested, int kHalf, int kStrips>
__global__ void __launch_bounds__(kThreads, resident_blocks(kStrips))
    dequantize_tiled_kernel(DequantizeArgs a, T* __restrict__ out) {
  __shared__ float table[16 * 32], map[kNested ? 256 : 1];
  const PackedWeight& w = a.w;
  const int lane = threadIdx.x % 32, r = lane % 8, tile = lane / 8;
  const int group = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const int strip_row = group / a.groups_k, ks = group % a.groups_k * kStrips;

  uint4 codes[kStrips];
  RawScales<kNested> raw[kHalf];
  if (group < a.groups) {
    const int64_t ns = a.strip_begin + strip_row;
    const uint8_t* from = w.codes + (ns * w.strips_k + ks) * kStripBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < kStrips; ++i)
      if (ks + i < w.strips_k) codes[i] = load_stream(from + i * kStripBytes);
#pragma unroll
    for (int h = 0; h < kHalf; ++h)
      raw[h].load(w, ns * kTileN + 2 * pair_order(r),
                  int64_t(ks + tile % kStrips) * kTileK + 32 * h);
  }
  fill_codebook(table, a.book);
  float offset = 0.0f;
  if constexpr (kNested) {
    map[threadIdx.x] = __ldg(w.nested + 1 + threadIdx.x);
    offset = __ldg(w.nested);
  }
  __syncthreads();
  if (group >= a.groups) return;

  float absmax[2][kHalf];
#pragma unroll
  for (int row = 0; row < 2; ++row)
#pragma unroll
    for (int h = 0; h < kHalf; ++h) absmax[row][h] = raw[h].decode(row, map, offset);
  const float* lane_table = table + lane;
  const bool is_odd = r & 1;
  const uint32_t keep = is_odd ? 0x7632u : 0x5410u, send = is_odd ? 0x5410u : 0x7632u;
  // of the output: rows of lanes r & ~1; those of r | 1 are 8 below
  const int row0 = strip_row * kTileN + 2 * pair_order(r & ~1) - int(a.row_begin % kTileN);
  const unsigned rows = unsigned(a.row_end - a.row_begin);
  T* const at = out + int64_t(row0) * w.K + ks * kTileK + tile * 16 + is_odd * 8;
#pragma unroll
  for (int i = 0; i < kStrips; ++i) {
    if (ks + i >= w.strips_k) break;
    const uint4 q = codes[i];
    const uint32_t mine[2] = {__byte_perm(q.x, q.y, keep), __byte_perm(q.z, q.w, keep)};
    const uint32_t other[2] = {__shfl_xor_sync(kAllLanes, __byte_perm(q.x, q.y, send), 1),
                               __shfl_xor_sync(kAllLanes, __byte_perm(q.z, q.w, send), 1)};
#pragma unroll
    for (int p = 0; p < 2; ++p) {  // the row pairs of lanes r & ~1 and r | 1
      const uint32_t low = p == is_odd ? mine[0] : other[0],
                     high = p == is_odd ? mine[1] : other[1];
      float scale[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int source = ((r & ~1) | p) + 8 * i;
        scale[row] = __shfl_sync(kAllLanes, absmax[row][0], source);
        if constexpr (kHalf == 2) {
          const float second = __shfl_sync(kAllLanes, absmax[row][1], source);
          scale[row] = tile >= 2 ? second : scale[row];
        }
      }
      T* const to = at + 8 * p * w.K + i * kTileK;
      float v[8];
      if (unsigned(row0 + 8 * p) < rows) {
        lookup8<0>(lane_table, low, high, scale[0], v);
        store8(to, v, a.is_streamed);
      }
      if (unsigned(row0 + 8 * p + 1) < rows) {
        lookup8<1>(lane_table, low, high, scale[1], v);
        store8(to + w.K, v, a.is_streamed);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_any_kernel(DequantizeArgs a, T* __restrict__ out) {
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

template <class T, bool kNested, int kHalf, int kStrips>
void launch_tiled(DequantizeArgs a, int64_t strips_n, T* out, cudaStream_t stream) {
  a.groups_k = ceil_div(a.w.strips_k, kStrips);
  FASTPEFT_CHECK(strips_n * a.groups_k < (int64_t(1) << 31), "dequantize: ", a.w.N, " x ", a.w.K,
                 " in one launch");
  a.groups = int(strips_n) * a.groups_k;
  dequantize_tiled_kernel<T, kNested, kHalf, kStrips>
      <<<ceil_div(a.groups, kThreads / 32), kThreads, 0, stream>>>(a, out);
  check_launch("dequantize_tiled_kernel");
}

template <class T, bool kNested>
void launch_tiled(DequantizeArgs& a, const DequantizeParams& p) {
  T* out = static_cast<T*>(p.out);
  const cudaStream_t stream = cuda_stream(p.stream);
  const int64_t strips_n = ceil_div<int64_t>(p.row_end, kTileN) - a.strip_begin;
  const int64_t warps = strips_n * ceil_div(a.w.strips_k, 4),
                in_a_wave = device_facts().sm_count * 5 * (kThreads / 32);
  a.is_streamed = (p.row_end - p.row_begin) * p.w.K * int64_t(sizeof(T)) > kResidentBytes;
  if (p.w.blocksize < kTileK)
    launch_tiled<T, kNested, 2, 2>(a, strips_n, out, stream);
  else if (warps <= in_a_wave)
    launch_tiled<T, kNested, 1, 4>(a, strips_n, out, stream);
  else
    launch_tiled<T, kNested, 1, 2>(a, strips_n, out, stream);
}

template <class T>
void dequantize_4bit(const DequantizeParams& p) {
  DequantizeArgs a = {};
  a.w = packed_weight(p.w);
  a.book = codebook(p.w.format);
  a.row_begin = p.row_begin;
  a.row_end = p.row_end;
  a.strip_begin = int(p.row_begin / kTileN);
  if constexpr (!std::is_same_v<T, double>) {
    if (p.w.K % kTileK == 0 && is_aligned(p.out, 16) && is_aligned(p.w.codes, 16)) {
      return p.w.nested ? launch_tiled<T, true>(a, p) : launch_tiled<T, false>(a, p);
    }
  }
  const int64_t count = (p.row_end - p.row_begin) * p.w.K;
  dequantize_any_kernel<T><<<grid_blocks(count, kThreads), kThreads, 0, cuda_stream(p.stream)>>>(
      a, static_cast<T*>(p.out));
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
