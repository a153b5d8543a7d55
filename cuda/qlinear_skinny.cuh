// Few tokens on tensor cores (mma.sync): what qlinear_skinny_fwd.* and qlinear_skinny_dgrad.*
// share.
//
// Lookup: byte -> pair of 16-bit values in shared memory, a copy a lane, entry e at e * 256 + 4
// lane, so that the address is one byte permute and banks never collide. bf16 codes are stored
// times 1.43675: that lowers the rounding error of the codebook (0.143 % -> 0.085 % rms relative),
// and the scales carry the inverse.
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
constexpr int kMapBytes = 1024;

bool weight_fits(const WeightView& w, DType dtype);
// One or two tokens of what skinny_fits(): qlinear_skinny_gemv.cu.
bool gemv_fits(const QLinearFwdParams&);
void qlinear_fwd_gemv(const QLinearFwdParams&);
// 16 codes times gain, 16 bits each; returns 1 / gain.
float pack_book(uint32_t (&book)[8], DType dtype, Format format);

// What the arguments of both forward kernels hold.
template <class Args>
void fill_args(Args& a, const QLinearFwdParams& p, const PackedWeight& w) {
  a.codes = w.codes;
  a.scales = w.scales;
  a.nested = w.nested;
  a.strips_k = w.strips_k;
  a.blocks_a_row = int(w.K >> w.block_shift);
  a.Np = int(w.Np);
  a.N = int(w.N);
  a.K = int(w.K);
  a.M = int(p.M);
  a.R = int(p.R);
  a.x = p.x;
  a.bias = p.bias;
  a.s = p.R > 0 ? p.s : nullptr;
  a.lora_b = p.lora_b;
  a.scaling = p.scaling;
  a.y = p.y;
  a.inverse_gain = pack_book(a.book, p.dtype, p.w.format);
}

template <int kByte>
__device__ __forceinline__ uint32_t lookup_pair(const unsigned char* shared, uint32_t word,
                                                uint32_t lane4) {
  return *reinterpret_cast<const uint32_t*>(shared +
                                            __byte_perm(word, lane4, 0x7604 | (kByte << 4)));
}

// The same value, of unknown origin: ptxas would rather recompute addresses in every step than keep
// them in a register, and sees through an empty asm.
__device__ __forceinline__ uint32_t keep(uint32_t v) {
  return __shfl_sync(kAllLanes, v, threadIdx.x % 32);
}

}  // namespace skinny
}  // namespace fastpeft::cuda
