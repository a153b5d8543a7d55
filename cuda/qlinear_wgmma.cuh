// What the two wgmma kernels share (qlinear_wgmma.cu: tiles of 128 and 256 tokens;
// qlinear_narrow.cu: up to 128 tokens): arguments, decoding of NF4 into wgmma's A fragments,
// scales, LoRA fragments.
//
// Weight: tiled NF4 of csrc/core/formats.h, blocksize a multiple of 64, K % blocksize == 0.
// ldmatrix on a 16x16 tile gives a lane the 8 nibbles of its m16k16 fragment with rows n,
// ldmatrix.trans those with rows k. MMA rows g, g+8 of a lane are neighbouring outputs 2*pi(g),
// 2*pi(g)+1. T is bf16 or fp16: a weight is T(code * gain) * T(absmax * range / gain), rounded to
// T, with scales float32, or uint8 decoded here (map[q] * nested + offset). What the numbers gain
// and range are for: Coding.
#pragma once
#include "dependent_launch.cuh"
#include "device/numbers.cuh"
#include "device/sm90.cuh"
#include "device/tensor_map.cuh"
#include "device/tiles.cuh"
#include "device/wgmma.cuh"
#include "launch.h"
#include "qlinear_wgmma.h"

namespace fastpeft::cuda {

constexpr int kBlockK = 64;  // reduction of a k-block

// How a weight is written in T. kGain: the codes' rms rounding falls from 0.143 % to 0.085 % (bf16)
// and from 0.0179 % to 0.0092 % (fp16), searched over [1, 2). kRange, undone in float32 behind the
// sums: fp16 has normal numbers from 6.1e-5 to 65504, so weights are held 64 times as large, and
// every nonzero one is normal where absmax is between 1.2e-5 and 1000 (trained layers: 1e-3 ...
// 10); below, they round as weights in fp16 below 6.1e-5 do, above, they are infinite.
template <class T>
struct Coding;

template <>
struct Coding<bf16> {
  static constexpr float kGain = 1.43675f, kRange = 1.0f;
  static FASTPEFT_DEVICE uint32_t multiply(uint32_t a, uint32_t b) { return mul_bf16x2(a, b); }
  static constexpr uint32_t bits(float v) {
    const uint32_t u = __builtin_bit_cast(uint32_t, v);
    return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  }
};

template <>
struct Coding<fp16> {
  static constexpr float kGain = 1.36617f, kRange = 64.0f;
  static FASTPEFT_DEVICE uint32_t multiply(uint32_t a, uint32_t b) { return mul_fp16x2(a, b); }
  static constexpr uint32_t bits(float v) {  // of zero, or where fp16 is normal
    const uint32_t u = __builtin_bit_cast(uint32_t, v), size = u & 0x7fffffffu;
    return size == 0
               ? 0u
               : (u >> 31 << 15) | (((size + 0x0fffu + ((u >> 13) & 1u)) >> 13) - (112u << 10));
  }
};

struct GemmArgs {
  int M = 0;                     // tokens
  int rows = 0;                  // length of an output row: N forward, K dgrad
  int N = 0;                     // rows of W
  int padded_n = 0;              // N rounded up to 16: length of a scale column
  int scale_columns = 0;         // K / blocksize
  int column_shift = 0;          // log2(blocksize / 64)
  int kblocks = 0;               // reduction / 64
  int tiles_r = 0, tiles_t = 0;  // the wide kernel's tiles over rows and tokens
  int waves = 0;                 // and its full waves
  int x_bytes = 0;  // of a stage of x: few tokens fill only part, the rest is never stored
  const void* scales = nullptr;   // [scale_columns][padded_n] float32, or uint8 with nested
  const float* nested = nullptr;  // [257 + groups]
  bool has_fixed_groups = false;  // forward: the nested absmax of a row is the same for all blocks
  bool has_one_change = false;    // forward, at most 256 blocks a row: it changes once at most
  bool has_shared_group = false;  // four rows from a multiple of four share it
  bool has_regular_groups = false;  // 64 rows are a whole number of groups
  const void* bias = nullptr;       // T [rows] or null
  const void* lora = nullptr;       // T, forward: B [N, R]; dgrad: A [R, K]
  int R = 0;
  float scaling = 1.0f;  // forward only; ds carries it in dgrad
};

// The 16 codes in T as byte tables in 8 registers: low and high bytes, negative and positive half.
struct Codebook {
  uint32_t low_neg[2], low_pos[2], high_neg[2], high_pos[2];
};

template <class T>
__host__ __device__ constexpr uint32_t code_bytes(int first, int shift) {
  uint32_t r = 0;
  for (int i = 0; i < 4; i++)
    r |= ((Coding<T>::bits(kNf4Code[first + i] * Coding<T>::kGain) >> shift) & 0xffu) << (8 * i);
  return r;
}

template <class T>
FASTPEFT_DEVICE Codebook make_codebook() {
  constexpr uint32_t a = code_bytes<T>(0, 0), b = code_bytes<T>(4, 0), c = code_bytes<T>(8, 0),
                     d = code_bytes<T>(12, 0);
  constexpr uint32_t e = code_bytes<T>(0, 8), f = code_bytes<T>(4, 8), g = code_bytes<T>(8, 8),
                     h = code_bytes<T>(12, 8);
  return {{opaque_constant(a), opaque_constant(b)},
          {opaque_constant(c), opaque_constant(d)},
          {opaque_constant(e), opaque_constant(f)},
          {opaque_constant(g), opaque_constant(h)}};
}

// 8 nibbles -> the 4 registers of an m16k16 fragment, unscaled: 21 integer instructions.
template <bool kDgrad>
FASTPEFT_DEVICE void decode8(uint32_t w, const Codebook& t, uint32_t (&f)[4]) {
  const uint32_t w4 = w << 4, s0 = w & 0x77777777u, s1 = s0 >> 16;
  constexpr uint32_t first = kDgrad ? 0x6240 : 0x5140, second = kDgrad ? 0x7351 : 0x7362;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint32_t s = h ? s1 : s0;
    const uint32_t positive =
        permute_bytes(w4, w, h ? 0xFBEA : 0xD9C8);  // bit 3 of each nibble, spread over a byte
    const uint32_t low = (permute_bytes(t.low_pos[0], t.low_pos[1], s) & positive) |
                         (permute_bytes(t.low_neg[0], t.low_neg[1], s) & ~positive);
    const uint32_t high = (permute_bytes(t.high_pos[0], t.high_pos[1], s) & positive) |
                          (permute_bytes(t.high_neg[0], t.high_neg[1], s) & ~positive);
    f[2 * h] = permute_bytes(low, high, first);
    f[2 * h + 1] = permute_bytes(low, high, second);
  }
}

// A lane's four scales of kChunk units, as they lie in memory: float32 scales, or codes and the
// nested absmax of each.
template <int kChunk>
struct RawScales {
  float4 values[kChunk];
  uint32_t codes[kChunk];
  int columns[kChunk];
};

// A warp turns 128 scales at a time, a unit, into T(absmax * range / gain) in the stage: with two
// row groups of 64 in a tile the unit is one k-block (forward 128 rows of it, dgrad its 64 rows of
// two columns), with one row group it is two k-blocks. It shares an issue port with consumer warps
// and the card is power-limited, so its instructions are counted: loads are asked for kChunk units
// at a time (the ring hides one memory latency a chunk), and the gain is folded into map and
// offset, which leaves one FMA a scale; against the exact two roundings that moves a scale by 2^-24
// before it is rounded to T.
template <class T, bool kDgrad, int kRowGroups, int kChunk>
struct ScaleProducer {
  static constexpr int kUnit = 3 - kRowGroups;  // k-blocks
  static constexpr float kFactor = Coding<T>::kRange / Coding<T>::kGain;
  const GemmArgs& a;
  const float* map;  // map * kFactor, in shared memory
  const int lane;
  int first_row = 0;
  float offset = 0.0f;   // multiplied by kFactor where it is used, or a start would wait for it
  float4 fixed, second;  // forward: nested absmax of the lane's rows, before and from `change` on
  int4 change;           // columns
  uint32_t code_at, group_at[4];  // dgrad: places of the lane's scales from a k-block's first

  FASTPEFT_DEVICE ScaleProducer(const GemmArgs& args, const float* shared_map)
      : a(args), map(shared_map), lane(threadIdx.x & 31) {
    if (a.nested) offset = __ldg(a.nested);
  }
  // Clamped, not tested: a branch around a load makes the compiler wait for each load by itself.
  // Scales outside the matrix meet zeros of the other operand or rows that are never stored: any
  // finite value will do.
  FASTPEFT_DEVICE int kblock(int kb) const { return kUnit == 2 ? kb + (lane >> 4) : kb; }
  FASTPEFT_DEVICE int row(int kb) const {
    const int n = kDgrad       ? kb * kBlockK + (lane & 15) * 4
                  : kUnit == 2 ? first_row + (lane & 15) * 4
                               : first_row + lane * 4;
    return min(n, a.padded_n - 4);
  }
  FASTPEFT_DEVICE int column(int kb) const {
    const int block = !kDgrad ? kb : first_row / kBlockK + (kUnit == 2 ? 0 : lane >> 4);
    return min(block >> a.column_shift, a.scale_columns - 1);
  }
  FASTPEFT_DEVICE float4 nested_of(int n, int column) const {
    const float* groups = a.nested + 257;
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; e++)  // rows of the padding borrow the last one's
      v[e] = __ldg(groups + ((uint32_t(min(n + e, a.N - 1)) * a.scale_columns + column) >> 8));
    return make_float4(v[0], v[1], v[2], v[3]);
  }
  // Starts the tile whose first output row is `row0`.
  FASTPEFT_DEVICE void begin(int row0) {
    first_row = row0;
    if (kDgrad) {
      const int shift = kUnit == 2 ? lane >> 4 : 0, n = (lane & 15) * 4;
      code_at = column(0) * a.padded_n + n + shift * kBlockK;
#pragma unroll
      for (int e = 0; e < 4; e++)
        group_at[e] = ((n + e + shift * kBlockK) * a.scale_columns + column(0)) >> 8;
      return;
    }
    if (a.has_fixed_groups || a.has_one_change) fixed = nested_of(row(0), 0);
    if (a.has_one_change) {
      second = nested_of(row(0), a.scale_columns - 1);
      const auto next = [&](int e) {
        return 256 - int(uint32_t(min(row(0) + e, a.N - 1)) * a.scale_columns & 255);
      };
      change = make_int4(next(0), next(1), next(2), next(3));
    }
  }
  // Of the kChunk units from k-block kb on; those past `end` repeat the last one or are whatever
  // follows it.
  FASTPEFT_DEVICE void load(int kb, int end, RawScales<kChunk>& raw) const {
    if (kDgrad && a.has_regular_groups && (kb + kChunk * kUnit) * kBlockK <= a.N)
      load_inside(kb, raw);
    else
      load_anywhere(kb, end, raw);
  }
  // Everything lies inside the matrix: places are sums of one of the lane's and one of the warp's.
  FASTPEFT_DEVICE void load_inside(int kb, RawScales<kChunk>& raw) const {
    const int first = kb * kBlockK, step = a.scale_columns / 4;  // groups of 64 rows
    if (!a.nested) {
      const float* from = static_cast<const float*>(a.scales) + first + code_at;
#pragma unroll
      for (int j = 0; j < kChunk; j++)
        raw.values[j] = __ldg(reinterpret_cast<const float4*>(from + j * kUnit * kBlockK));
      return;
    }
    const uint8_t* from = static_cast<const uint8_t*>(a.scales) + first + code_at;
#pragma unroll
    for (int j = 0; j < kChunk; j++)
      raw.codes[j] = __ldg(reinterpret_cast<const uint32_t*>(from + j * kUnit * kBlockK));
#pragma unroll
    for (int j = 0; j < kChunk; j++) {
      const float* groups = a.nested + 257 + (kb + j * kUnit) * step;
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; e++)
        v[e] = e > 0 && a.has_shared_group ? v[0] : __ldg(groups + group_at[e]);
      raw.values[j] = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
  FASTPEFT_DEVICE void load_anywhere(int kb, int end, RawScales<kChunk>& raw) const {
    int n[kChunk], c[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; j++) {
      const int k = min(kblock(kb + j * kUnit), end - 1);
      n[j] = row(k), c[j] = column(k);
    }
    if (!a.nested) {
#pragma unroll
      for (int j = 0; j < kChunk; j++)
        raw.values[j] = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(a.scales) +
                                                              uint32_t(c[j]) * a.padded_n + n[j]));
      return;
    }
#pragma unroll
    for (int j = 0; j < kChunk; j++)
      raw.codes[j] = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(a.scales) +
                                                             uint32_t(c[j]) * a.padded_n + n[j]));
    if (a.has_fixed_groups) return;
    if (a.has_one_change) {  // selected in decode(), or the start would wait here
#pragma unroll
      for (int j = 0; j < kChunk; j++) raw.columns[j] = c[j];
    } else if (a.has_shared_group) {
#pragma unroll
      for (int j = 0; j < kChunk; j++) {
        const int inside = min(n[j], a.N - 4);  // rows of the padding have no group of their own
        const float v = __ldg(a.nested + 257 + ((uint32_t(inside) * a.scale_columns + c[j]) >> 8));
        raw.values[j] = make_float4(v, v, v, v);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; j++) raw.values[j] = nested_of(n[j], c[j]);
    }
  }
  FASTPEFT_DEVICE uint2 decode(const RawScales<kChunk>& raw, int j) const {
    float4 v = a.has_fixed_groups ? fixed : raw.values[j];
    if (a.has_one_change) {
      const int c = raw.columns[j];
      v = make_float4(c < change.x ? fixed.x : second.x, c < change.y ? fixed.y : second.y,
                      c < change.z ? fixed.z : second.z, c < change.w ? fixed.w : second.w);
    }
    const uint32_t codes = raw.codes[j];
    if (!a.nested) {
      return make_uint2(pack_pair<T>(v.x * kFactor, v.y * kFactor),
                        pack_pair<T>(v.z * kFactor, v.w * kFactor));
    }
    const float shift = offset * kFactor;
    const float s0 = fmaf(map[codes & 255], v.x, shift),
                s1 = fmaf(map[(codes >> 8) & 255], v.y, shift);
    const float s2 = fmaf(map[(codes >> 16) & 255], v.z, shift),
                s3 = fmaf(map[codes >> 24], v.w, shift);
    return make_uint2(pack_pair<T>(s0, s1), pack_pair<T>(s2, s3));
  }
};

// Fragment of k16 step `step` of the output rows' low-rank factor as it lies in memory; zeros
// beyond the matrix.
template <class T, bool kDgrad>
FASTPEFT_DEVICE void ask_lora(const GemmArgs& a, int row, int step, int t, uint32_t (&f)[4]) {
  const size_t pitch = kDgrad ? a.rows : a.R;
  const T* from = static_cast<const T*>(a.lora) +
                  (kDgrad ? (step * 16 + 2 * t) * pitch + row : row * pitch + step * 16 + 2 * t);
#pragma unroll
  for (int i = 0; i < 2; i++) {  // ranks 8i + 2t, 8i + 2t + 1 of the step
    const bool exists = row < a.rows && step * 16 + 8 * i < a.R;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const T* at = from + (kDgrad ? (8 * i + e) * pitch : 8 * i + e * pitch);
      f[2 * i + e] = 0;
      if (exists) f[2 * i + e] = __ldg(reinterpret_cast<const uint32_t*>(at));
    }
  }
}

// Makes it wgmma's, times range: forward scaling * B, dgrad A^T.
template <class T, bool kDgrad>
FASTPEFT_DEVICE void scale_lora(const GemmArgs& a, uint32_t (&f)[4]) {
  const float scale = (kDgrad ? 1.0f : a.scaling) * Coding<T>::kRange;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    if (kDgrad) {  // pairs of rows of two ranks -> pairs of ranks of two rows
      const uint32_t even = permute_bytes(f[i], f[i + 1], 0x5410);
      f[i + 1] = permute_bytes(f[i], f[i + 1], 0x7632);
      f[i] = even;
    }
#pragma unroll
    for (int e = i; e < i + 2; e++) {
      const float2 v = unpack_pair<T>(f[e]);
      if (!kDgrad || Coding<T>::kRange != 1.0f) f[e] = pack_pair<T>(v.x * scale, v.y * scale);
    }
  }
}

template <class T, bool kDgrad>
FASTPEFT_DEVICE void load_lora(const GemmArgs& a, int row, int step, int t, uint32_t (&f)[4]) {
  ask_lora<T, kDgrad>(a, row, step, t, f);
  scale_lora<T, kDgrad>(a, f);
}

// Of output rows `row`, `row + 1`.
template <class T>
FASTPEFT_DEVICE void load_bias(const GemmArgs& a, int row, float (&bias)[2]) {
  const T* from = static_cast<const T*>(a.bias) + row;
  bias[0] = to_acc(from[0]), bias[1] = to_acc(from[1]);
}

// Two sums as they are stored.
template <class T>
FASTPEFT_DEVICE uint32_t pack_sums(float low, float high, float low_bias, float high_bias) {
  constexpr float kUndo = 1.0f / Coding<T>::kRange;
  return pack_pair<T>(fmaf(low, kUndo, low_bias), fmaf(high, kUndo, high_bias));
}

// Arguments of a launch over the output rows `rows` (N forward, K dgrad).
template <bool kDgrad>
GemmArgs gemm_args(const WeightView& w, int64_t M, const void* bias, const void* lora, int64_t R,
                   float scaling) {
  GemmArgs a;
  a.M = int(M);
  a.rows = int(kDgrad ? w.K : w.N);
  a.N = int(w.N);
  a.padded_n = int(round_up<int64_t>(w.N, kTileN));
  a.scale_columns = int(w.K / w.blocksize);
  while ((int64_t(64) << a.column_shift) < w.blocksize) a.column_shift++;
  a.kblocks = int(ceil_div<int64_t>(kDgrad ? w.N : w.K, kBlockK));
  a.scales = w.scales;
  a.nested = w.nested;
  a.has_fixed_groups = !kDgrad && w.nested && 256 % a.scale_columns == 0;
  a.has_one_change = !kDgrad && w.nested && !a.has_fixed_groups && a.scale_columns <= 256;
  a.has_shared_group = 64 % a.scale_columns == 0;
  a.has_regular_groups = a.scale_columns % 4 == 0;
  a.bias = bias;
  a.lora = lora;
  a.R = int(R);
  a.scaling = scaling;
  return a;
}

}  // namespace fastpeft::cuda
