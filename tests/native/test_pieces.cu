// Dropout masks (bit for bit), LLM.int8() rows and epilogue, bottleneck pieces.
#include <algorithm>

#include "../../csrc/core/philox.h"
#include "../../cuda/launch.h"
#include "check.h"

namespace native {

namespace {

template <class T>
void test_dropout(int64_t count, float drop, size_t shift) {
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

template <class T>
void test_llm_int8(int64_t M, int64_t N, int64_t K, float threshold) {
  const HostWeight host = make_weight(Format::kInt8, N, K, 64, false, unsigned(M + N + K));
  const DeviceWeight device(host);
  std::vector<T> x = random_values<T>(M * K, 7);
  for (int64_t k = 3; k < K; k += 37) x[(k % M) * K + k] = narrow<T>(k % 2 ? 7.5 : -6.25);
  std::vector<uint8_t> outlier(K, 0);
  std::vector<int8_t> q(M * K);
  std::vector<float> scale(M, 0.0f);
  for (int64_t i = 0; i < M * K; ++i)
    if (threshold > 0 && std::fabs(float(wide(x[i]))) >= threshold) outlier[i % K] = 1;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) {  // small elements of outlier columns count
      const float size = std::fabs(float(wide(x[m * K + k])));
      if (threshold <= 0 || size < threshold) scale[m] = std::max(scale[m], size);
    }
    const float inverse = int8_inverse(scale[m]);
    for (int64_t k = 0; k < K; ++k)
      q[m * K + k] = outlier[k] ? 0 : int8_t(std::nearbyintf(float(wide(x[m * K + k])) * inverse));
  }
  Buffer in(x), codes(M * K), scales(M * sizeof(float)), flags(K);
  QuantizeRowsParams p;
  p.M = M;
  p.K = K;
  p.dtype = TypeOf<T>::value;
  p.x = in.data();
  p.threshold = threshold;
  p.q = codes.as<int8_t>();
  p.scale = scales.as<float>();
  p.outlier = flags.as<uint8_t>();
  cuda::quantize_rows(p);
  check_bits(flags, outlier, "quantize_rows outliers");
  check_bits(scales, scale, "quantize_rows scale");
  check_bits(codes, q, "quantize_rows codes");

  const std::vector<T> bias = random_values<T>(N, 8);
  std::vector<int32_t> acc(M * N, 0);
  std::vector<double> want, magnitude;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double extra = wide(bias[n]), squares = extra * extra;
      for (int64_t k = 0; k < K; ++k) {
        acc[m * N + n] += int32_t(q[m * K + k]) * int32_t(int8_t(host.codes[n * K + k]));
        const double term = outlier[k] ? wide(x[m * K + k]) * double(host.exact[n * K + k]) : 0.0;
        extra += term;
        squares += term * term;
      }
      const double product =
          double(acc[m * N + n]) * double(scale[m]) * double(host.scales[n]) / (127.0 * 127.0);
      want.push_back(product + extra);
      magnitude.push_back(8 * std::sqrt(squares + product * product));
    }
  Buffer sums(acc), offsets(bias), y(want.size() * sizeof(T));
  for (const bool has_acc : {true, false}) {
    Int8EpilogueParams e;
    e.w = device.view;
    e.M = M;
    e.dtype = p.dtype;
    e.acc = has_acc ? sums.as<int32_t>() : nullptr;
    e.q = codes.as<int8_t>();
    e.scale = scales.as<float>();
    e.outlier = threshold > 0 ? flags.as<uint8_t>() : nullptr;
    e.x = in.data();
    e.bias = offsets.data();
    e.y = y.data();
    y.poison();
    cuda::int8_epilogue(e);
    check_sums<T>(y, want, magnitude, std::string("int8_epilogue ") + (has_acc ? "acc" : "dp4a"));
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

void test_llm_int8s() {
  for (const float threshold : {0.0f, 6.0f}) {
    test_llm_int8<__nv_bfloat16>(5, 33, 128, threshold);
    test_llm_int8<__half>(3, 130, 45, threshold);
    test_llm_int8<float>(70, 9, 341, threshold);
    test_llm_int8<double>(2, 5, 64, threshold);
    test_llm_int8<__nv_bfloat16>(9, 16, 9000, threshold);
  }
}

void test_bottlenecks() {
  test_bottleneck_type<float>();
  test_bottleneck_type<__nv_bfloat16>();
  test_bottleneck_type<__half>();
  test_bottleneck_type<double>();
}

}  // namespace native
