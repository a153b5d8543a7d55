// Dropout masks (bit for bit), bottleneck pieces.
#include <algorithm>

#include "../../csrc/core/philox.h"
#include "../../cuda/launch.h"
#include "check.h"

namespace native {

namespace {

template <class T>
void test_dropout(int64_t count, float drop, size_t shift) {
  if (is_left_out()) return;
  const std::vector<T> x = random_values<T>(count, 5), start = random_values<T>(count, 6);
  const int64_t seed = 0x123456789ABCDEFll;
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const A keep = A(1) / (A(1) - A(drop));
  for (const bool add : {false, true}) {
    std::vector<T> want(count);
    for (int64_t i = 0; i < count; ++i) {
      const bool is_kept = philox(uint64_t(seed), uint64_t(i / 4)).v[i % 4] >= drop_threshold(drop);
      const volatile A product = is_kept ? A(wide(x[i])) * keep : A(0);
      want[i] = narrow<T>(double(A(product + (add ? A(wide(start[i])) : A(0)))));
    }
    Buffer in(x, shift), out(start, shift), number(std::vector<int64_t>{seed});
    DropoutParams p;
    p.count = count;
    p.dtype = TypeOf<T>::value;
    p.x = in.data();
    p.p = drop;
    p.seed = number.as<int64_t>();
    p.add = add;
    p.y = out.data();
    cuda::dropout(p);
    // add: one fused multiply-add on the device, so the last bit may differ there
    if (!add) {
      check_bits(out, want, "dropout " + std::to_string(count));
    } else {
      std::vector<double> reference, size;
      for (int64_t i = 0; i < count; ++i) {
        reference.push_back(wide(want[i]));
        size.push_back(2 * (std::fabs(wide(x[i])) * keep + std::fabs(wide(start[i]))));
      }
      check_sums<T>(out, reference, size, "dropout add " + std::to_string(count));
    }
  }
}

double host_act(Activation kind, double a) {
  switch (kind) {
    case Activation::kRelu:
      return a > 0 ? a : 0;
    case Activation::kGelu:
      return a * (1 + std::erf(a / std::sqrt(2.0))) / 2;
    case Activation::kGeluTanh:
      return a * (1 + std::tanh(std::sqrt(2 / M_PI) * (a + 0.044715 * a * a * a))) / 2;
    case Activation::kSilu:
      return a / (1 + std::exp(-a));
    case Activation::kTanh:
      return std::tanh(a);
    default:
      return a;
  }
}

template <class T>
void test_bottleneck(Activation kind, int64_t M, int64_t D, bool has_bias) {
  if (is_left_out()) return;
  const std::vector<T> z = random_values<T>(M * D, 9), b = random_values<T>(D, 10),
                       dh = random_values<T>(M * D, 11);
  std::vector<double> h, dz, y, size_h, size_dz, size_y;
  const float scaling = 0.75f;
  for (int64_t i = 0; i < M * D; ++i) {
    const double a = wide(z[i]) + (has_bias ? wide(b[i % D]) : 0.0), step = 1e-5;
    const double slope = (host_act(kind, a + step) - host_act(kind, a - step)) / (2 * step);
    h.push_back(host_act(kind, a));
    dz.push_back(wide(dh[i]) * slope);
    y.push_back(wide(dh[i]) + scaling * a);
    size_h.push_back(4 * (std::fabs(a) + 1));
    size_dz.push_back((4 + 1e-9 / unit_roundoff<T>()) * (std::fabs(wide(dh[i])) + 1) * 2);
    size_y.push_back(4 * (std::fabs(a) + std::fabs(wide(dh[i]))));
  }
  Buffer zs(z), bias(b), grads(dh), hs(z.size() * sizeof(T)), dzs(z.size() * sizeof(T)),
      out(z.size() * sizeof(T));
  BottleneckActParams p;
  p.M = M;
  p.D = D;
  p.dtype = TypeOf<T>::value;
  p.activation = kind;
  p.z = zs.data();
  p.bias = has_bias ? bias.data() : nullptr;
  p.h = hs.data();
  cuda::bottleneck_act_fwd(p);
  const std::string what =
      "bottleneck act " + std::to_string(int(kind)) + " " + dtype_name(p.dtype);
  check_sums<T>(hs, h, size_h, what);
  hs.poison();
  p.dh = grads.data();
  p.dz = dzs.data();
  cuda::bottleneck_act_bwd(p);
  check_sums<T>(hs, h, size_h, what + " again");
  check_sums<T>(dzs, dz, size_dz, what + " backward");
  BottleneckOutParams o;
  o.M = M;
  o.K = D;
  o.dtype = p.dtype;
  o.u = zs.data();
  o.bias = p.bias;
  o.residual = grads.data();
  o.scaling = scaling;
  o.y = out.data();
  cuda::bottleneck_out(o);
  check_sums<T>(out, y, size_y, "bottleneck out");
}

template <class T>
void test_bottleneck_type() {
  for (int kind = 0; kind < 6; ++kind) {
    test_bottleneck<T>(Activation(kind), 5, 64, true);
    test_bottleneck<T>(Activation(kind), 3, 13, kind % 2 == 0);
  }
}

}  // namespace

void test_dropouts() {
  for (const float drop : {0.0f, 0.1f, 0.9f}) {
    test_dropout<float>(1003, drop, 0);
    test_dropout<__nv_bfloat16>(4096, drop, 0);
    test_dropout<__half>(517, drop, 2);
    test_dropout<double>(77, drop, 0);
  }
}

void test_bottlenecks() {
  test_bottleneck_type<float>();
  test_bottleneck_type<__nv_bfloat16>();
  test_bottleneck_type<__half>();
  test_bottleneck_type<double>();
}

}  // namespace native
