// Rows of numbers at one SIMD level: 16-bit floats to float32 and back, int8 activations. Included
// by simd_kernels.h, inside the namespace of its level.
// ---- 16-bit floats
SIMD void widen(DType dtype, const void* from, float* to, int64_t count) {
  int64_t i = 0;
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, size_t(count) * sizeof(float));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(from);
  const bool is_bf16 = dtype == DType::kBFloat16;
  for (; i + kLanes <= count; i += kLanes)
    store(to + i, is_bf16 ? load_bf16(half + i) : load_f16(half + i));
  for (; i < count; ++i) to[i] = is_bf16 ? to_float(BFloat16{half[i]}) : to_float(Float16{half[i]});
}

SIMD void narrow(DType dtype, const float* from, void* to, int64_t count) {
  int64_t i = 0;
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, size_t(count) * sizeof(float));
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(to);
  const bool is_bf16 = dtype == DType::kBFloat16;
  for (; i + kLanes <= count; i += kLanes)
    is_bf16 ? store_bf16(half + i, load(from + i)) : store_f16(half + i, load(from + i));
  for (; i < count; ++i)
    half[i] = is_bf16 ? from_float(Tag<BFloat16>{}, from[i]).bits
                      : from_float(Tag<Float16>{}, from[i]).bits;
}

// ---- int8 activations
// max |x| of what is below `threshold` (all, when it is 0), and whether anything is not.
SIMD float row_absmax(const float* x, int64_t count, float threshold, bool* has_outlier) {
  Vec inside = zero(), all = zero();
  const float limit = threshold > 0.0f ? threshold : INFINITY;
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const Vec a = magnitude(load(x + k));
    inside = largest(inside, keep_below(a, broadcast(&limit)));
    all = largest(all, a);
  }
  float most = largest_lane(inside), most_of_all = largest_lane(all);
  for (; k < count; ++k) {
    const float a = std::fabs(x[k]);
    if (a < limit) most = std::fmax(most, a);
    most_of_all = std::fmax(most_of_all, a);
  }
  *has_outlier = threshold > 0.0f && most_of_all >= threshold;
  return most;
}

// q = round half to even(x * inverse); columns with outlier[k] stay to be zeroed by the caller.
SIMD void row_to_int8(const float* x, int64_t count, float inverse, int8_t* q) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes)
    round_to_int8(mul(load(x + k), broadcast(&inverse)), q + k);
  for (; k < count; ++k)
    q[k] = int8_t(std::nearbyintf(std::fmin(std::fmax(x[k] * inverse, -127.0f), 127.0f)));
}

// y = acc * (scale_x * scale_w[n]) / 127^2
SIMD void scale_sums(const int32_t* acc, int64_t count, float scale_x, const float* scale_w,
                     float* y) {
  const float unit = 1.0f / (127.0f * 127.0f);
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    const Vec s = mul(mul(load(scale_w + n), broadcast(&scale_x)), broadcast(&unit));
    store(y + n, mul(to_vec(load_ints(acc + n)), s));
  }
  for (; n < count; ++n) y[n] = float(acc[n]) * ((scale_w[n] * scale_x) * unit);
}

// y += factor * w
SIMD void add_scaled(const float* w, int64_t count, float factor, float* y) {
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes)
    store(y + n, fma(load(w + n), broadcast(&factor), load(y + n)));
  for (; n < count; ++n) y[n] += factor * w[n];
}
