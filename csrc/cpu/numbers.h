// 16-bit floats without torch: storage types, exact conversions, and the dispatch from DType to
// type.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../core/instances.h"

namespace fastpeft::cpu {

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float v) {
  return v;
}
inline double to_float(double v) {
  return v;
}
inline float to_float(BFloat16 v) {
  return float_of(uint32_t(v.bits) << 16);
}

inline float to_float(Float16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7FFF;
  if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | (rest & 0x3FF) << 13);  // inf, nan
  if (rest >= 0x0400) return float_of(sign | ((rest << 13) + 0x38000000));
  const float tiny = float(rest) * 5.9604644775390625e-8f;  // subnormal: multiples of 2^-24
  return float_of(sign | bits_of(tiny));
}

// Round to nearest even.
inline float from_float(Tag<float>, float v) {
  return v;
}
inline double from_float(Tag<double>, double v) {
  return v;
}

inline BFloat16 from_float(Tag<BFloat16>, float v) {
  const uint32_t u = bits_of(v);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return {uint16_t(u >> 16 | 0x40)};  // stays a nan
  return {uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}

inline Float16 from_float(Tag<Float16>, float v) {
  const uint32_t u = bits_of(v), sign = u >> 16 & 0x8000, a = u & 0x7FFFFFFF;
  if (a > 0x7F800000) return {uint16_t(sign | 0x7E00)};
  if (a >= 0x47800000) return {uint16_t(sign | 0x7C00)};  // 65536 and above; 65520… carries below
  if (a < 0x38800000) {  // subnormal: adding 0.5 aligns 2^-24 with the last bit, rounding to even
    return {uint16_t(sign | (bits_of(float_of(a) + 0.5f) - 0x3F000000))};
  }
  return {uint16_t(sign | (((a + 0xFFF + (a >> 13 & 1)) >> 13) - 0x1C000))};
}

// f(Tag<T>{}) for the type of dtype.
template <class F>
void dispatch(DType dtype, F&& f) {
  dispatch_types<BFloat16, Float16>(dtype, f);
}

}  // namespace fastpeft::cpu
