// The elementwise parts of a bottleneck adapter around torch's two GEMMs.
//   act_fwd  h [M, D]  = act(z + b)
//   act_bwd  dz [M, D] = dh * act'(z + b), and h again (the hidden state is not stored)
//   out      y [M, K]  = residual + scaling * (u + b)
// Work split: rows. Bound: reading and writing the tensors once.
#include <cmath>

#include "numbers.h"
#include "parallel.h"

namespace fastpeft::cpu {

namespace {

constexpr double kSqrtHalf = 0.70710678118654752440;      // sqrt(1/2)
constexpr double kInvSqrtTwoPi = 0.39894228040143267794;  // 1 / sqrt(2 pi)
constexpr double kTanhScale = 0.79788456080286535588;     // sqrt(2 / pi)
constexpr double kTanhCube = 0.044715;

template <class Acc>
struct Value {
  Acc h, slope;
};

// gelu(a) = a Phi(a), gelu' = Phi(a) + a phi(a); the tanh form: t = tanh(c (a + k a^3)),
// h = a (1 + t) / 2, h' = (1 + t) / 2 + a (1 - t^2) c (1 + 3 k a^2) / 2; silu(a) = a sig(a),
// silu' = sig(a) (1 + a (1 - sig(a))).
template <class Acc>
Value<Acc> activate(Activation kind, Acc a) {
  switch (kind) {
    case Activation::kRelu:
      return {a > 0 ? a : Acc(0), Acc(a > 0)};
    case Activation::kGelu: {
      const Acc phi = std::exp(-a * a / 2) * Acc(kInvSqrtTwoPi);
      const Acc cdf = (1 + std::erf(a * Acc(kSqrtHalf))) / 2;
      return {a * cdf, cdf + a * phi};
    }
    case Activation::kGeluTanh: {
      const Acc t = std::tanh(Acc(kTanhScale) * (a + Acc(kTanhCube) * a * a * a));
      const Acc inner = Acc(kTanhScale) * (1 + 3 * Acc(kTanhCube) * a * a);
      return {a * (1 + t) / 2, (1 + t) / 2 + a * (1 - t * t) * inner / 2};
    }
    case Activation::kSilu: {
      const Acc sigmoid = 1 / (1 + std::exp(-a));
      return {a * sigmoid, sigmoid * (1 + a * (1 - sigmoid))};
    }
    case Activation::kTanh: {
      const Acc t = std::tanh(a);
      return {t, 1 - t * t};
    }
    case Activation::kIdentity:
      return {a, Acc(1)};
  }
  FASTPEFT_CHECK(false, "unknown activation ", int(kind));
  return {};
}

template <class T>
void act_typed(const BottleneckActParams& p) {
  using Acc = fastpeft::Acc<T>;
  const T* z = static_cast<const T*>(p.z);
  const T* bias = static_cast<const T*>(p.bias);
  const T* dh = static_cast<const T*>(p.dh);
  T* h = static_cast<T*>(p.h);
  T* dz = static_cast<T*>(p.dz);
  parallel_for(p.M, ceil_div<int64_t>(4096, p.D), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t d = 0; d < p.D; ++d) {
        const int64_t i = m * p.D + d;
        const Acc a = Acc(to_float(z[i])) + (bias ? Acc(to_float(bias[d])) : Acc(0));
        const Value<Acc> v = activate(p.activation, a);
        if (h) h[i] = from_float(Tag<T>{}, v.h);
        if (dz) dz[i] = from_float(Tag<T>{}, Acc(to_float(dh[i])) * v.slope);
      }
  });
}

template <class T>
void out_typed(const BottleneckOutParams& p) {
  using Acc = fastpeft::Acc<T>;
  const T* u = static_cast<const T*>(p.u);
  const T* bias = static_cast<const T*>(p.bias);
  const T* residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  parallel_for(p.M, ceil_div<int64_t>(16384, p.K), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t k = 0; k < p.K; ++k) {
        const int64_t i = m * p.K + k;
        Acc value = to_float(u[i]);
        if (bias) value += to_float(bias[k]);
        value *= Acc(p.scaling);
        if (residual) value += to_float(residual[i]);
        y[i] = from_float(Tag<T>{}, value);
      }
  });
}

}  // namespace

void bottleneck_act_fwd(const BottleneckActParams& p) {
  dispatch(p.dtype, [&](auto tag) { act_typed<typename decltype(tag)::type>(p); });
}

void bottleneck_act_bwd(const BottleneckActParams& p) {
  FASTPEFT_CHECK(p.dh && p.dz, "bottleneck_act_bwd needs dh and dz");
  dispatch(p.dtype, [&](auto tag) { act_typed<typename decltype(tag)::type>(p); });
}

void bottleneck_out(const BottleneckOutParams& p) {
  dispatch(p.dtype, [&](auto tag) { out_typed<typename decltype(tag)::type>(p); });
}

}  // namespace fastpeft::cpu
