// AVX-512 primitives of simd_kernels.h: F, BW, VL, DQ; 16 lanes, tile of 12 tokens x 32 columns
// (24 sums, 2 weights, 1 activation of 32 registers).
#include "simd.h"

#if defined(__x86_64__)
// gcc 12 warns inside its own intrinsics, which start from a deliberately undefined vector
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "decode.h"
#include "numbers.h"

#define SIMD __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define SIMD_INLINE SIMD __attribute__((always_inline)) inline
#define UNROLL _Pragma("GCC unroll 16")

namespace fastpeft::cpu {
namespace {
namespace avx512 {

constexpr int kLanes = 16, kTileTokens = 12;
using Vec = __m512;
using Bits = __m512i;
using Table = __m512;

SIMD_INLINE Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
SIMD_INLINE void store(float* p, Vec v) {
  _mm512_storeu_ps(p, v);
}
SIMD_INLINE Vec broadcast(const float* p) {
  return _mm512_set1_ps(*p);
}
SIMD_INLINE Vec zero() {
  return _mm512_setzero_ps();
}
SIMD_INLINE Vec mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
SIMD_INLINE Vec add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
SIMD_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}

SIMD_INLINE Table load_table(const float* codes) {
  return _mm512_loadu_ps(codes);
}
// vpermps looks at the low 4 bits of a lane: no mask needed.
SIMD_INLINE Vec lookup(Table table, Bits bits) {
  return _mm512_permutexvar_ps(bits, table);
}
template <int n>
SIMD_INLINE Bits shift(Bits bits) {
  return _mm512_srli_epi32(bits, n);
}

// Lane n takes dword c of its row pair: two rows x four columns {2c, 2c+1, 2c+8, 2c+9}.
SIMD_INLINE void load_columns(const uint8_t* tile, Bits bits[4][1]) {
  const Bits low = _mm512_loadu_si512(tile), high = _mm512_loadu_si512(tile + 64);
  const Bits place =  // 4 * kPairPlace[n / 2]
      _mm512_setr_epi32(0, 0, 8, 8, 16, 16, 24, 24, 4, 4, 12, 12, 20, 20, 28, 28);
  const Bits row_shift = _mm512_setr_epi32(0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8);
  UNROLL for (int c = 0; c < 4; ++c) {
    const Bits at = _mm512_or_si512(place, _mm512_set1_epi32(c));
    bits[c][0] = _mm512_srlv_epi32(_mm512_permutex2var_epi32(low, at, high), row_shift);
  }
}

// Lane k takes dword (k / 2) % 4 of the stored row and moves its own nibble down.
SIMD_INLINE void load_row_pair(const uint8_t* row, Bits bits[1]) {
  const Bits at = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3);
  const Bits down = _mm512_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4, 16, 20, 16, 20, 16, 20, 16, 20);
  const Bits all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
  bits[0] = _mm512_srlv_epi32(_mm512_permutexvar_epi32(at, all), down);
}

SIMD_INLINE Bits load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SIMD_INLINE Bits spread(int32_t v) {
  return _mm512_set1_epi32(v);
}
SIMD_INLINE Bits ramp(int32_t step) {  // lane * step
  const Bits lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_mullo_epi32(lane, spread(step));
}
SIMD_INLINE Bits add_bits(Bits a, Bits b) {
  return _mm512_add_epi32(a, b);
}
SIMD_INLINE Bits min_bits(Bits a, Bits b) {
  return _mm512_min_epi32(a, b);
}
SIMD_INLINE Vec gather(const float* p, Bits at) {
  return _mm512_i32gather_ps(at, p, 4);
}

SIMD_INLINE Bits load_int8(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SIMD_INLINE Bits load_ints(const int32_t* p) {
  return _mm512_loadu_si512(p);
}
SIMD_INLINE Bits gather_int(const void* p, Bits at) {
  return _mm512_i32gather_epi32(at, p, 1);
}
template <int b>
SIMD_INLINE Bits signed_byte(Bits v) {
  return _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * b), 24);
}
SIMD_INLINE Vec to_vec(Bits v) {
  return _mm512_cvtepi32_ps(v);
}

SIMD_INLINE Vec magnitude(Vec v) {
  return _mm512_abs_ps(v);
}
SIMD_INLINE Vec largest(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
SIMD_INLINE float largest_lane(Vec v) {
  return _mm512_reduce_max_ps(v);
}
SIMD_INLINE Vec keep_below(Vec v, Vec limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, limit, _CMP_LT_OQ), v);
}
SIMD_INLINE void round_to_int8(Vec v, int8_t* q) {
  const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), bytes);
}

SIMD_INLINE Vec load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
SIMD_INLINE Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SIMD_INLINE void store_bf16(uint16_t* p, Vec v) {
  const __m512i u = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, is_nan, u, _mm512_set1_epi32(0x400000));
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
SIMD_INLINE void store_f16(uint16_t* p, Vec v) {
  const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

#include "simd_kernels.h"

constexpr SimdKernels all_kernels() {
  SimdKernels k = make_kernels(std::make_integer_sequence<int, kMaxFewTokens>{});
  add_tiles(k, std::make_integer_sequence<int, kTileTokens>{});
  return k;
}
constexpr SimdKernels kKernels = all_kernels();

}  // namespace avx512
}  // namespace

const SimdKernels* avx512_kernels() {
  return &avx512::kKernels;
}

}  // namespace fastpeft::cpu

#else
namespace fastpeft::cpu {
const SimdKernels* avx512_kernels() {
  return nullptr;
}
}  // namespace fastpeft::cpu
#endif
