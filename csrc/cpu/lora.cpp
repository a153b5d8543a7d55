// Dropout of the LoRA branch: y = x * keep(seed, i) / (1 - p), mask recomputed from Philox4x32-10
// (csrc/core/philox.h), one counter for four elements, so forward and backward agree and nothing is
// stored. Work split: groups of four elements.
// Its products, s = scale * drop(x) F^T, out (+)= drop(scale * s F^T) and the gradients of the
// factors, as plain loops: a token (s, ds, out), a row of dB or a range of columns of dA a task,
// sums in the order of the index.
#include <algorithm>
#include <vector>

#include "../core/philox.h"
#include "numbers.h"
#include "parallel.h"

namespace fastpeft::cpu {

namespace {

template <class T>
void dropout_typed(const DropoutParams& p) {
  using Acc = fastpeft::Acc<T>;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const uint64_t seed = uint64_t(*p.seed);
  const uint32_t threshold = drop_threshold(p.p);
  const Acc keep = Acc(1) / (Acc(1) - Acc(p.p));
  parallel_for(ceil_div<int64_t>(p.count, 4), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const Philox4 random = philox(seed, uint64_t(group));
      const int64_t last = std::min(p.count, group * 4 + 4);
      for (int64_t i = group * 4; i < last; ++i) {
        Acc value = random.v[i % 4] < threshold ? Acc(0) : Acc(to_float(x[i])) * keep;
        if (p.add) value += to_float(y[i]);
        y[i] = from_float(Tag<T>{}, value);
      }
    }
  });
}

// drop(x) without its factor 1 / (1 - p): elements [first, first + count) of x.
template <class T>
void dropped_row(const T* x, float p, const int64_t* seed, int64_t first, int64_t count,
                 Acc<T>* z) {
  for (int64_t i = 0; i < count; ++i) z[i] = to_float(x[first + i]);
  if (p == 0.0f) return;
  const uint32_t threshold = drop_threshold(p);
  Philox4 random = {};
  for (int64_t i = first; i < first + count; ++i) {
    if (i == first || i % 4 == 0) random = philox(uint64_t(*seed), uint64_t(i / 4));
    if (random.v[i % 4] < threshold) z[i - first] = 0;
  }
}

template <class T>
void lora_shrink_typed(const LoraShrinkParams& p) {
  using Acc = fastpeft::Acc<T>;
  const T* factor = static_cast<const T*>(p.factor);
  const Acc scale = Acc(p.scale) / (Acc(1) - Acc(p.p));
  const int64_t r_stride = p.is_transposed ? 1 : p.K, k_stride = p.is_transposed ? p.R : 1;
  parallel_for(p.M, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> z(p.K);
    for (int64_t m = begin; m < end; ++m) {
      dropped_row(static_cast<const T*>(p.x), p.p, p.seed, m * p.K, p.K, z.data());
      for (int64_t r = 0; r < p.R; ++r) {
        Acc sum = 0;
        for (int64_t k = 0; k < p.K; ++k)
          sum += z[k] * to_float(factor[r * r_stride + k * k_stride]);
        static_cast<T*>(p.s)[m * p.R + r] = from_float(Tag<T>{}, scale * sum);
      }
    }
  });
}

template <class T>
void lora_expand_typed(const LoraExpandParams& p) {
  using Acc = fastpeft::Acc<T>;
  const T *s = static_cast<const T*>(p.s), *factor = static_cast<const T*>(p.factor);
  const T* bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out);
  const Acc scale = Acc(p.scale) / (Acc(1) - Acc(p.p));
  const uint32_t threshold = drop_threshold(p.p);
  const int64_t r_stride = p.is_transposed ? p.C : 1, c_stride = p.is_transposed ? 1 : p.R;
  parallel_for(p.M, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * p.C; i < end * p.C; ++i) {
      const int64_t m = i / p.C, c = i % p.C;
      Acc value = p.add ? Acc(to_float(out[i])) : Acc(0);
      if (bias) value += to_float(bias[c]);
      const bool is_kept =
          p.p == 0.0f || philox(uint64_t(*p.seed), uint64_t(i / 4)).v[i % 4] >= threshold;
      Acc sum = 0;
      for (int64_t r = 0; is_kept && r < p.R; ++r)
        sum += to_float(s[m * p.R + r]) * to_float(factor[r * r_stride + c * c_stride]);
      out[i] = from_float(Tag<T>{}, value + scale * sum);
    }
  });
}

// dB, with G the type of the gradients.
template <class T, class G>
void dB_typed(const LoraWgradParams& p) {
  using Acc = fastpeft::Acc<T>;
  const T *dy = static_cast<const T*>(p.dy), *s = static_cast<const T*>(p.s);
  parallel_for(p.N, 16, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums(p.R);
    for (int64_t n = begin; n < end; ++n) {
      std::fill(sums.begin(), sums.end(), Acc(0));
      for (int64_t m = 0; m < p.M; ++m)
        for (int64_t r = 0; r < p.R; ++r)
          sums[r] += to_float(dy[m * p.N + n]) * to_float(s[m * p.R + r]);
      for (int64_t r = 0; r < p.R; ++r)
        static_cast<G*>(p.dB)[n * p.R + r] = from_float(Tag<G>{}, Acc(p.scaling) * sums[r]);
    }
  });
}

template <class T, class G>
void dA_typed(const LoraWgradParams& p) {
  using Acc = fastpeft::Acc<T>;
  const T* ds = static_cast<const T*>(p.ds);
  const Acc keep = Acc(1) / (Acc(1) - Acc(p.p));
  parallel_for(p.K, 64, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    std::vector<Acc> z(count), sums(p.R * count, Acc(0));
    for (int64_t m = 0; m < p.M; ++m) {
      dropped_row(static_cast<const T*>(p.x), p.p, p.seed, m * p.K + begin, count, z.data());
      for (int64_t r = 0; r < p.R; ++r)
        for (int64_t k = 0; k < count; ++k) sums[r * count + k] += z[k] * to_float(ds[m * p.R + r]);
    }
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t k = 0; k < count; ++k)
        static_cast<G*>(p.dA)[r * p.K + begin + k] =
            from_float(Tag<G>{}, keep * sums[r * count + k]);
  });
}

}  // namespace

void lora_shrink(const LoraShrinkParams& p) {
  dispatch(p.dtype, [&](auto tag) { lora_shrink_typed<typename decltype(tag)::type>(p); });
}

void lora_expand(const LoraExpandParams& p) {
  dispatch(p.dtype, [&](auto tag) { lora_expand_typed<typename decltype(tag)::type>(p); });
}

int64_t lora_wgrad_workspace(const LoraWgradParams&) {
  return 0;
}

void lora_wgrad(const LoraWgradParams& p) {
  LoraShrinkParams shrink;  // ds
  shrink.M = p.M;
  shrink.K = p.N;
  shrink.R = p.R;
  shrink.dtype = p.dtype;
  shrink.x = p.dy;
  shrink.factor = p.lora_b;
  shrink.is_transposed = true;
  shrink.scale = p.scaling;
  shrink.s = p.ds;
  lora_shrink(shrink);
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.grad_dtype == p.dtype) {
      dB_typed<T, T>(p);
      dA_typed<T, T>(p);
    } else {
      FASTPEFT_CHECK(p.grad_dtype == DType::kFloat32, "lora_wgrad: gradients of ",
                     dtype_name(p.grad_dtype));
      dB_typed<T, float>(p);
      dA_typed<T, float>(p);
    }
  });
}

void dropout(const DropoutParams& p) {
  dispatch(p.dtype, [&](auto tag) { dropout_typed<typename decltype(tag)::type>(p); });
}

}  // namespace fastpeft::cpu
