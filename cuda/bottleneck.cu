// The elementwise parts of a bottleneck adapter around torch's two GEMMs.
//
//   act_fwd  h [M, D]  = act(z + b)
//   act_bwd  dz [M, D] = dh * act'(z + b), and h again when asked (the hidden state is not stored)
//   out      y [M, K]  = residual + scaling * (u + b)
//
// Work split: a thread per 8 consecutive elements of the flat tensor when rows are a multiple of 8
// and pointers are aligned, else a thread an element. Bound: reading and writing the tensors once.
#include "check.cuh"
#include "device/numbers.cuh"
#include "launch.h"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256, kWide = 8;

constexpr double kSqrtHalf = 0.70710678118654752440;      // sqrt(1/2)
constexpr double kInvSqrtTwoPi = 0.39894228040143267794;  // 1 / sqrt(2 pi)
constexpr double kTanhScale = 0.79788456080286535588;     // sqrt(2 / pi)
constexpr double kTanhCube = 0.044715;

template <class A>
struct Activated {
  A h, slope;
};

// gelu(a) = a Phi(a), gelu' = Phi(a) + a phi(a); tanh form with t = tanh(c (a + d a^3)):
// h = a (1 + t) / 2, h' = (1 + t) / 2 + a (1 - t^2) c (1 + 3 d a^2) / 2;
// silu(a) = a sig(a), silu' = sig(a) (1 + a (1 - sig(a))).
template <class A>
__device__ __forceinline__ Activated<A> activate(Activation kind, A a) {
  switch (kind) {
    case Activation::kRelu:
      return {a > A(0) ? a : A(0), a > A(0) ? A(1) : A(0)};
    case Activation::kGelu: {
      const A density = exp(-a * a / A(2)) * A(kInvSqrtTwoPi);
      const A cdf = (A(1) + erf(a * A(kSqrtHalf))) / A(2);
      return {a * cdf, cdf + a * density};
    }
    case Activation::kGeluTanh: {
      const A t = tanh(A(kTanhScale) * (a + A(kTanhCube) * a * a * a));
      const A inner = A(kTanhScale) * (A(1) + A(3 * kTanhCube) * a * a);
      return {a * (A(1) + t) / A(2), (A(1) + t) / A(2) + a * (A(1) - t * t) * inner / A(2)};
    }
    case Activation::kSilu: {
      const A sigmoid = A(1) / (A(1) + exp(-a));
      return {a * sigmoid, sigmoid * (A(1) + a * (A(1) - sigmoid))};
    }
    case Activation::kTanh: {
      const A t = tanh(a);
      return {t, A(1) - t * t};
    }
    default:
      return {a, A(1)};
  }
}

template <class T>
struct ActArgs {
  const T *z, *bias, *dh;  // [M, D], [D] or null, [M, D] or null
  T *h, *dz;               // [M, D] or null
  int64_t count, D;
  Activation activation;
};

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) bottleneck_act_kernel(ActArgs<T> a) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (first >= a.count) return;
  using V = Vec<T, kCount>;
  const V z = load_vec<T, kCount>(a.z + first);
  V bias = {}, dh = {}, h, dz;
  if (a.bias) bias = load_vec<T, kCount>(a.bias + first % a.D);
  if (a.dz) dh = load_vec<T, kCount>(a.dh + first);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Acc<T> in = to_acc(z.v[i]) + (a.bias ? to_acc(bias.v[i]) : Acc<T>(0));
    const Activated<Acc<T>> out = activate(a.activation, in);
    h.v[i] = from_acc<T>(out.h);
    dz.v[i] = from_acc<T>(to_acc(dh.v[i]) * out.slope);
  }
  if (a.h) store_vec<T, kCount>(a.h + first, h);
  if (a.dz) store_vec<T, kCount>(a.dz + first, dz);
}

template <class T>
struct OutArgs {
  const T *u, *bias, *residual;  // [M, K], [K] or null, [M, K] or null
  T* y;                          // [M, K]
  int64_t count, K;
  float scaling;
};

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) bottleneck_out_kernel(OutArgs<T> a) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (first >= a.count) return;
  using V = Vec<T, kCount>;
  const V u = load_vec<T, kCount>(a.u + first);
  V bias = {}, residual = {}, y;
  if (a.bias) bias = load_vec<T, kCount>(a.bias + first % a.K);
  if (a.residual) residual = load_vec<T, kCount>(a.residual + first);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Acc<T> value = to_acc(u.v[i]);
    if (a.bias) value += to_acc(bias.v[i]);
    value *= Acc<T>(a.scaling);
    if (a.residual) value += to_acc(residual.v[i]);
    y.v[i] = from_acc<T>(value);
  }
  store_vec<T, kCount>(a.y + first, y);
}

void launch_act(const BottleneckActParams& p, bool is_backward) {
  if (p.M * p.D == 0) return;
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    ActArgs<T> a;
    a.z = static_cast<const T*>(p.z);
    a.bias = static_cast<const T*>(p.bias);
    a.dh = is_backward ? static_cast<const T*>(p.dh) : nullptr;
    a.h = static_cast<T*>(p.h);
    a.dz = is_backward ? static_cast<T*>(p.dz) : nullptr;
    a.count = p.M * p.D;
    a.D = p.D;
    a.activation = p.activation;
    const bool is_wide = p.D % kWide == 0 && is_aligned(p.z, 16) && is_aligned(p.bias, 16) &&
                         is_aligned(a.dh, 16) && is_aligned(p.h, 16) && is_aligned(a.dz, 16);
    const cudaStream_t stream = cuda_stream(p.stream);
    if (is_wide)
      bottleneck_act_kernel<T, kWide>
          <<<grid_blocks(a.count, kThreads * kWide), kThreads, 0, stream>>>(a);
    else
      bottleneck_act_kernel<T, 1><<<grid_blocks(a.count, kThreads), kThreads, 0, stream>>>(a);
    check_launch("bottleneck_act_kernel");
  });
}

}  // namespace

void bottleneck_act_fwd(const BottleneckActParams& p) {
  launch_act(p, false);
}

void bottleneck_act_bwd(const BottleneckActParams& p) {
  FASTPEFT_CHECK(p.M * p.D == 0 || (p.dh && p.dz), "bottleneck_act_bwd needs dh and dz");
  launch_act(p, true);
}

void bottleneck_out(const BottleneckOutParams& p) {
  if (p.M * p.K == 0) return;
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    OutArgs<T> a;
    a.u = static_cast<const T*>(p.u);
    a.bias = static_cast<const T*>(p.bias);
    a.residual = static_cast<const T*>(p.residual);
    a.y = static_cast<T*>(p.y);
    a.count = p.M * p.K;
    a.K = p.K;
    a.scaling = p.scaling;
    const bool is_wide = p.K % kWide == 0 && is_aligned(p.u, 16) && is_aligned(p.bias, 16) &&
                         is_aligned(p.residual, 16) && is_aligned(p.y, 16);
    const cudaStream_t stream = cuda_stream(p.stream);
    if (is_wide)
      bottleneck_out_kernel<T, kWide>
          <<<grid_blocks(a.count, kThreads * kWide), kThreads, 0, stream>>>(a);
    else
      bottleneck_out_kernel<T, 1><<<grid_blocks(a.count, kThreads), kThreads, 0, stream>>>(a);
    check_launch("bottleneck_out_kernel");
  });
}

}  // namespace fastpeft::cuda
