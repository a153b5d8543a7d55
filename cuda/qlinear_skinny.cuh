// Few tokens on tensor cores (mma.sync): what qlinear_skinny_fwd.cu and qlinear_skinny_dgrad.cu
// share.
//
// Weights are the 16-row operand of mma.m16n8k16, 8 (kTok = 1) or 16 tokens its columns.
// A block of 16 warps a multiprocessor. Every warp owns a ring of kDepth slots in shared memory,
// fed by cp.async without any block barrier; a slot holds 512 bytes of codes and their scales.
//
// Lookup: byte -> pair of 16-bit values in shared memory, a copy a lane, entry e at e * 256 + 4
// lane, so that the address is one byte permute and banks never collide. The 128-byte holes between
// entries hold the warps' partial sums, added at the end in order of warps: no atomics, same bits
// on every run. bf16 codes are stored times 1.43675: that lowers the rounding error of the codebook
// (0.143 % -> 0.085 % rms relative), and the scales carry the inverse.
#pragma once
#include "check.cuh"
#include "device/decode.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "launch.h"

namespace fastpeft::cuda {

// 16-bit activations and a 4-bit weight with scales in column order.
bool skinny_fits(const QLinearFwdParams&);
bool skinny_fits(const QLinearDgradParams&);
void qlinear_fwd_skinny(const QLinearFwdParams&);
void qlinear_dgrad_skinny(const QLinearDgradParams&);

namespace skinny {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kEntryStride = 256, kTableBytes = 256 * kEntryStride;
constexpr int kMapBytes = 1024, kRingAt = kTableBytes + kMapBytes;
// Slots of the ring: 8, or what 99 KB of shared memory leave (sm_86, sm_89, sm_120).
constexpr int kDeep = 8, kShallowNested = 4, kShallow = 2;

// A slot: a strip's worth of codes, and the absmax of up to 64 rows (uint8 or float32).
constexpr int slot_bytes(bool is_nested) {
  return kStripBytes + 64 * (is_nested ? 1 : 4);
}
constexpr int shared_bytes(int depth, bool is_nested) {
  return kRingAt + kWarps * depth * slot_bytes(is_nested);
}

struct Args {
  PackedWeight w;
  Codebook book;       // times gain
  float inverse_gain;  // 1 / gain
  int blocks_a_row;    // K / blocksize
  int M, R;
  const void* in;      // forward: x [M, K]; dgrad: dy [M, N]
  const void* bias;    // forward: [N] or null
  const void* s;       // forward: s [M, R]; dgrad: ds [M, R]; or null
  const void* factor;  // forward: lora_b [N, R]; dgrad: lora_a [R, K]; or null
  float scaling;
  void* out;  // forward: y [M, N]; dgrad: dx [M, K]
};

using Kernel = void (*)(Args);
struct Variant {
  bool is_bf16, is_wide, is_nested, is_deep;
};

// `pick` names the kernel of a variant; `parts`: how many blocks find work.
void launch(Args& a, DType dtype, Format format, int64_t parts, Stream stream,
            Kernel (*pick)(Variant), const char* name);
bool weight_fits(const WeightView& w, DType dtype);

// Two threads an entry, 64 bytes each; pieces rotated by lane so that the stores spread over banks.
template <class T>
__device__ __forceinline__ void fill_pairs(unsigned char* shared, const Codebook& book) {
  const int entry = threadIdx.x / 2;
  const uint32_t pair = pack_pair<T>(book.v[entry & 15], book.v[entry >> 4]);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int piece = (q + entry) & 3;
    *reinterpret_cast<uint4*>(shared + entry * kEntryStride + (threadIdx.x & 1) * 64 + piece * 16) =
        make_uint4(pair, pair, pair, pair);
  }
}

template <int kByte>
__device__ __forceinline__ uint32_t lookup_pair(const unsigned char* shared, uint32_t word,
                                                uint32_t lane4) {
  return *reinterpret_cast<const uint32_t*>(shared +
                                            __byte_perm(word, lane4, 0x7604 | (kByte << 4)));
}

__device__ __forceinline__ void lookup_fragment(const unsigned char* shared, uint32_t word,
                                                uint32_t lane4, uint32_t (&a)[4]) {
  a[0] = lookup_pair<0>(shared, word, lane4);
  a[1] = lookup_pair<1>(shared, word, lane4);
  a[2] = lookup_pair<2>(shared, word, lane4);
  a[3] = lookup_pair<3>(shared, word, lane4);
}

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Float f of the partial sums, kept in the holes of the table.
__device__ __forceinline__ float* partial(unsigned char* shared, int f) {
  return reinterpret_cast<float*>(shared + (f / 32) * kEntryStride + 128 + (f % 32) * 4);
}

// The same value, of unknown origin: ptxas would rather recompute addresses in every step than keep
// them in a register, and sees through an empty asm.
__device__ __forceinline__ uint32_t keep(uint32_t v) {
  return __shfl_sync(kAllLanes, v, threadIdx.x % 32);
}

__device__ __forceinline__ int share(int part, int parts, int total) {
  return int(int64_t(total) * part / parts);
}

// Scales times 1 / gain. The second level here is one FMA: its last bit is far below 16-bit codes.
template <bool kNested>
struct Scales {
  const float* map;  // shared memory, times 1 / gain
  float offset;      // times 1 / gain
  float inverse_gain;

  __device__ __forceinline__ void fill(const Args& a, unsigned char* shared) {
    inverse_gain = a.inverse_gain;
    if constexpr (kNested) {
      float* to = reinterpret_cast<float*>(shared + kTableBytes);
      if (threadIdx.x < 256) to[threadIdx.x] = __ldg(a.w.nested + 1 + threadIdx.x) * inverse_gain;
      map = to;
      offset = __ldg(a.w.nested) * inverse_gain;
    }
  }
  // absmax / gain of row `row` of a slot.
  __device__ __forceinline__ float of(const unsigned char* slot, int row,
                                      float nested_absmax) const {
    if constexpr (kNested)
      return __fmaf_rn(map[slot[kStripBytes + row]], nested_absmax, offset);
    else
      return reinterpret_cast<const float*>(slot + kStripBytes)[row] * inverse_gain;
  }
};

// 4 * kLanes scales from element `at` on into the slot's tail; zeros for a lane past the padded
// rows.
template <bool kNested, int kLanes>
__device__ __forceinline__ void copy_scales(const Args& a, uint32_t slot, int lane, int64_t at,
                                            bool is_valid) {
  if (lane >= kLanes) return;
  at = is_valid ? at + 4 * lane : 0;
  if constexpr (kNested)
    copy_async4(slot + kStripBytes + lane * 4, static_cast<const uint8_t*>(a.w.scales) + at,
                is_valid ? 4 : 0);
  else
    copy_async16(slot + kStripBytes + lane * 16, static_cast<const float*>(a.w.scales) + at,
                 is_valid ? 16 : 0);
}

}  // namespace skinny
}  // namespace fastpeft::cuda
