// AVX2 + FMA + F16C primitives of simd_kernels.h: 8 lanes, tile of 6 tokens x 16 columns (12
// sums, 2 weights, 1 activation of 16 registers).
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "decode.h"
#include "numbers.h"

#define SIMD __attribute__((target("avx2,fma,f16c")))
#define SIMD_INLINE SIMD __attribute__((always_inline)) inline
#define UNROLL _Pragma("GCC unroll 16")

namespace fastpeft::cpu {
namespace {
namespace avx2 {

constexpr int kLanes = 8, kTileTokens = 6;
using Vec = __m256;
using Bits = __m256i;
struct Table {
  Vec low, high;
};

SIMD_INLINE Vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
SIMD_INLINE void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v);
}
SIMD_INLINE Vec broadcast(const float* p) {
  return _mm256_broadcast_ss(p);
}
SIMD_INLINE Vec zero() {
  return _mm256_setzero_ps();
}
SIMD_INLINE Vec mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
SIMD_INLINE Vec add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
SIMD_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}

SIMD_INLINE Table load_table(const float* codes) {
  return {_mm256_loadu_ps(codes), _mm256_loadu_ps(codes + 8)};
}
// vpermps looks at the low 3 bits of a lane; bit 3, moved to the sign, picks the half of the table.
SIMD_INLINE Vec lookup(const Table& table, Bits bits) {
  const Vec low = _mm256_permutevar8x32_ps(table.low, bits);
  const Vec high = _mm256_permutevar8x32_ps(table.high, bits);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 28)));
}
template <int n>
SIMD_INLINE Bits shift(Bits bits) {
  return _mm256_srli_epi32(bits, n);
}

SIMD_INLINE __m128i load_row(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Vector v holds rows 8v ... 8v+7, that is pairs 4v ... 4v+3, stored rows v, v+2, v+4, v+6: their
// dwords c, each twice, the odd row's byte moved down.
SIMD_INLINE void load_columns(const uint8_t* tile, Bits bits[4][2]) {
  const Bits twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  const Bits row_shift = _mm256_setr_epi32(0, 8, 0, 8, 0, 8, 0, 8);
  UNROLL for (int v = 0; v < 2; ++v) {
    const __m128i a = load_row(tile + v * 16), b = load_row(tile + v * 16 + 32);
    const __m128i c = load_row(tile + v * 16 + 64), d = load_row(tile + v * 16 + 96);
    const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
    const __m128i AB = _mm_unpackhi_epi32(a, b), CD = _mm_unpackhi_epi32(c, d);
    const __m128i column[4] = {_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd),
                               _mm_unpacklo_epi64(AB, CD), _mm_unpackhi_epi64(AB, CD)};
    UNROLL for (int i = 0; i < 4; ++i) {
      const Bits all = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(column[i]), twice);
      bits[i][v] = _mm256_srlv_epi32(all, row_shift);
    }
  }
}

// Vector v holds columns 8v ... 8v+7: dwords 0 ... 3, each twice, lower or upper unit moved down.
SIMD_INLINE void load_row_pair(const uint8_t* row, Bits bits[2]) {
  const Bits twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  const Bits all = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(load_row(row)), twice);
  bits[0] = _mm256_srlv_epi32(all, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
  bits[1] = _mm256_srlv_epi32(all, _mm256_setr_epi32(16, 20, 16, 20, 16, 20, 16, 20));
}

SIMD_INLINE Bits load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
SIMD_INLINE Bits spread(int32_t v) {
  return _mm256_set1_epi32(v);
}
SIMD_INLINE Bits ramp(int32_t step) {  // lane * step
  return _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), spread(step));
}
SIMD_INLINE Bits add_bits(Bits a, Bits b) {
  return _mm256_add_epi32(a, b);
}
SIMD_INLINE Bits min_bits(Bits a, Bits b) {
  return _mm256_min_epi32(a, b);
}
SIMD_INLINE Vec gather(const float* p, Bits at) {
  return _mm256_i32gather_ps(p, at, 4);
}

SIMD_INLINE Bits load_int8(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
SIMD_INLINE Bits load_ints(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const Bits*>(p));
}
SIMD_INLINE Bits gather_int(const void* p, Bits at) {
  return _mm256_i32gather_epi32(static_cast<const int*>(p), at, 1);
}
template <int b>
SIMD_INLINE Bits signed_byte(Bits v) {
  return _mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * b), 24);
}
SIMD_INLINE Vec to_vec(Bits v) {
  return _mm256_cvtepi32_ps(v);
}

SIMD_INLINE Vec magnitude(Vec v) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
}
SIMD_INLINE Vec largest(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
SIMD_INLINE float largest_lane(Vec v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
SIMD_INLINE Vec keep_below(Vec v, Vec limit) {
  return _mm256_and_ps(_mm256_cmp_ps(v, limit, _CMP_LT_OQ), v);
}
SIMD_INLINE void round_to_int8(Vec v, int8_t* q) {
  const Bits i = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(q), _mm_packs_epi16(words, words));
}

SIMD_INLINE Vec load_bf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
SIMD_INLINE Vec load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SIMD_INLINE void store_bf16(uint16_t* p, Vec v) {
  const Bits u = _mm256_castps_si256(v);
  const Bits odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  Bits r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
  const Vec is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const Bits quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(is_nan));
  r = _mm256_srli_epi32(r, 16);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
SIMD_INLINE void store_f16(uint16_t* p, Vec v) {
  const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}

#include "simd_kernels.h"

constexpr SimdKernels all_kernels() {
  SimdKernels k = make_kernels(std::make_integer_sequence<int, kMaxFewTokens>{});
  add_tiles(k, std::make_integer_sequence<int, kTileTokens>{});
  return k;
}
constexpr SimdKernels kKernels = all_kernels();

}  // namespace avx2
}  // namespace

const SimdKernels* avx2_kernels() {
  return &avx2::kKernels;
}

}  // namespace fastpeft::cpu

#else
namespace fastpeft::cpu {
const SimdKernels* avx2_kernels() {
  return nullptr;
}
}  // namespace fastpeft::cpu
#endif
