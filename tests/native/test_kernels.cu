// Every CUDA kernel on tiny odd shapes against plain host loops, without torch: for compute-sanitizer,
// the profiler, and a quick "does this machine compute right". Prints one line a group, exits 1 on a
// failure. Codes, masks and dequantised values are compared bit for bit; products by an error bound.
#include <algorithm>
#include <functional>

#include "../../csrc/core/philox.h"
#include "../../cuda/launch.h"
#include "host.h"

using namespace native;

namespace {

int failures = 0, checks = 0;

void check(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

template <class T>
void check_bits(const Buffer& got, const std::vector<T>& want, const std::string& what) {
  const std::vector<T> values = got.read<T>();
  size_t differ = 0, first = 0;
  for (size_t i = 0; i < want.size(); ++i)
    if (std::memcmp(&values[i], &want[i], sizeof(T)) != 0 && differ++ == 0) first = i;
  check(differ == 0, what + ": " + std::to_string(differ) + " of " + std::to_string(want.size()) +
                         " differ, first at " + std::to_string(first));
  check(got.guard_is_whole(), what + ": wrote past the end");
}

template <class T>
double unit_roundoff() {
  return std::is_same_v<T, double> ? 1e-15 : std::is_same_v<T, float> ? 6e-8
         : std::is_same_v<T, __half> ? 4.9e-4 : 3.9e-3;
}

// |got - want| <= roundoff * (a few * sum of |terms| / sqrt(count) + |want|): tight enough for one
// misplaced term to show, and true of any order of summation with weights rounded to T.
template <class T>
void check_sums(const Buffer& got, const std::vector<double>& want, const std::vector<double>& magnitude,
                const std::string& what) {
  const std::vector<T> values = got.read<T>();
  double worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double bound = unit_roundoff<T>() * (magnitude[i] + std::fabs(want[i])) + 1e-30;
    const double ratio = std::fabs(wide(values[i]) - want[i]) / bound;
    if (!(ratio <= worst)) worst = ratio, at = i;
  }
  check(worst <= 1.0, what + ": error " + std::to_string(worst) + " of the bound at " + std::to_string(at));
  check(got.guard_is_whole(), what + ": wrote past the end");
}

// ---- quantise

uint8_t host_code(Format f, float t) {
  int below = 0;
  for (int i = 0; i < 15; ++i) below += t > (f == Format::kNf4 ? kNf4Threshold[i] : kFp4Threshold[i]);
  return uint8_t(f == Format::kNf4 ? below : kFp4Order[below]);
}

template <class T>
void test_quantize_4bit(Format f, int64_t N, int64_t K, int64_t blocksize, size_t shift) {
  std::vector<T> w = random_values<T>(N * K, unsigned(N * 131 + K + blocksize), 0.05);
  for (int64_t i = blocksize; i < std::min<int64_t>(2 * blocksize, N * K); ++i) w[i] = narrow<T>(0.0);
  const int64_t count = N * K, blocks = block_count(N, K, blocksize);
  std::vector<uint8_t> codes(ceil_div<int64_t>(count, 2), uint8_t(zero_code(f)));
  std::vector<float> absmax(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = std::min(count, (b + 1) * blocksize);
    float top = 0;
    for (int64_t i = b * blocksize; i < end; ++i) top = std::max(top, std::fabs(float(wide(w[i]))));
    const float bounded = std::max(top, kTinyAbsmax), inverse = 1.0f / bounded;
    const bool is_ragged = (b + 1) * blocksize > count;
    absmax[b] = is_ragged ? bounded : top;
    for (int64_t i = b * blocksize; i < end; ++i) {
      const float v = float(wide(w[i]));
      const uint8_t code = host_code(f, is_ragged ? v / bounded : v * inverse);
      codes[i / 2] = uint8_t(i % 2 ? (codes[i / 2] & 0xF0) | code : code << 4 | zero_code(f));
    }
  }
  Buffer in(w, shift), out(codes.size()), scales(blocks * sizeof(float));
  QuantizeParams p;
  p.format = f;
  p.N = N;
  p.K = K;
  p.blocksize = blocksize;
  p.dtype = TypeOf<T>::value;
  p.w = in.data();
  p.codes = out.data();
  p.absmax = scales.as<float>();
  cuda::quantize(p);
  const std::string what = std::string("quantize ") + format_name(f) + " " + dtype_name(p.dtype) + " " +
                           std::to_string(N) + "x" + std::to_string(K) + "/" + std::to_string(blocksize);
  check_bits(scales, absmax, what + " absmax");
  check_bits(out, codes, what + " codes");
}

// Every threshold and its two neighbours, as values of a block whose absmax is 1.
void test_thresholds(Format f) {
  std::vector<float> w;
  for (int i = 0; i < 15; ++i) {
    const float t = f == Format::kNf4 ? kNf4Threshold[i] : kFp4Threshold[i];
    for (const float v : {t, std::nextafterf(t, 2.0f), std::nextafterf(t, -2.0f)}) w.push_back(v);
  }
  for (int i = 0; w.size() < 62; ++i) w.push_back(-0.97f + 0.1f * float(i));
  w.push_back(1.0f);
  w.push_back(-1.0f);
  std::vector<uint8_t> codes(32);
  for (int i = 0; i < 64; i += 2) codes[i / 2] = uint8_t(host_code(f, w[i]) << 4 | host_code(f, w[i + 1]));
  Buffer in(w), out(32), scale(4);
  QuantizeParams p;
  p.format = f;
  p.N = 1;
  p.K = 64;
  p.w = in.data();
  p.codes = out.data();
  p.absmax = scale.as<float>();
  cuda::quantize(p);
  check_bits(out, codes, std::string("thresholds ") + format_name(f));
}

template <class T>
void test_quantize_int8(int64_t N, int64_t K) {
  std::vector<T> w = random_values<T>(N * K, unsigned(N + K));
  for (int64_t k = 0; k < K; ++k) w[k] = narrow<T>(0.0);
  std::vector<int8_t> codes(N * K);
  std::vector<float> absmax(N, 0.0f);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) absmax[n] = std::max(absmax[n], std::fabs(float(wide(w[n * K + k]))));
    const float inverse = int8_inverse(absmax[n]);
    for (int64_t k = 0; k < K; ++k) codes[n * K + k] = int8_t(std::nearbyintf(float(wide(w[n * K + k])) * inverse));
  }
  Buffer in(w), out(codes.size()), scales(N * sizeof(float));
  QuantizeParams p;
  p.format = Format::kInt8;
  p.N = N;
  p.K = K;
  p.dtype = TypeOf<T>::value;
  p.w = in.data();
  p.codes = out.data();
  p.absmax = scales.as<float>();
  cuda::quantize(p);
  check_bits(out, codes, "quantize int8 codes");
  check_bits(scales, absmax, "quantize int8 absmax");
}

void test_quantize_absmax(int64_t count) {
  std::vector<float> absmax = random_values<float>(count, unsigned(count), 0.02);
  for (float& a : absmax) a = std::fabs(a);
  const float offset = 0.0173f;
  if (count > 512)
    for (int i = 256; i < 512; ++i) absmax[i] = offset;  // a group of zeros
  std::vector<float> nested(257 + ceil_div<int64_t>(count, kNestedBlock), 0.0f);
  const std::vector<float> map = ascending_map();
  std::copy(map.begin(), map.end(), nested.begin() + 1);
  Buffer in(absmax), out(count), levels(nested), mean(std::vector<float>{offset});
  std::vector<uint8_t> codes(count);
  nested[0] = offset;
  for (int64_t b = 0; b < count; b += kNestedBlock) {
    float top = 0;
    for (int64_t i = b; i < std::min(count, b + kNestedBlock); ++i) top = std::max(top, std::fabs(absmax[i] - offset));
    nested[257 + b / kNestedBlock] = top;
    for (int64_t i = b; i < std::min(count, b + kNestedBlock); ++i) {
      const float inverse = 1.0f / top, centred = absmax[i] - offset;
      const float t = std::min(std::max(centred * inverse, -1.0f), 1.0f);
      int code = 0;
      for (int j = 0; top > 0 && j < 255; ++j) code += (map[j] + map[j + 1]) * 0.5f < nested_grid(t);
      codes[i] = uint8_t(code);
    }
  }
  QuantizeAbsmaxParams p;
  p.count = count;
  p.absmax = in.as<float>();
  p.offset = mean.as<float>();
  p.codes = out.as<uint8_t>();
  p.nested = levels.as<float>();
  cuda::quantize_absmax(p);
  check_bits(out, codes, "quantize_absmax codes " + std::to_string(count));
  check_bits(levels, nested, "quantize_absmax nested " + std::to_string(count));
}

void test_tile(Format f, int64_t N, int64_t K) {
  std::mt19937 engine{unsigned(N * K)};
  std::vector<uint8_t> canonical(ceil_div<int64_t>(N * K, 2));
  for (uint8_t& b : canonical) b = uint8_t(engine());
  if (N * K % 2) canonical.back() = uint8_t((canonical.back() & 0xF0) | zero_code(f));
  std::vector<uint8_t> tiled(tiled_bytes(N, K), uint8_t(zero_code(f) * 17));
  for (int64_t i = 0; i < N * K; ++i) {
    const int code = canonical[i / 2] >> (i % 2 ? 0 : 4) & 15;
    const NibblePlace at = tiled_place(i / K, i % K, K);
    tiled[at.byte] = uint8_t((tiled[at.byte] & ~(15 << at.shift)) | code << at.shift);
  }
  Buffer from(canonical), to(tiled.size()), back(canonical.size());
  TileParams p;
  p.format = f;
  p.N = N;
  p.K = K;
  p.from = from.as<uint8_t>();
  p.to = to.as<uint8_t>();
  cuda::tile(p);
  const std::string what = "tile " + std::to_string(N) + "x" + std::to_string(K);
  check_bits(to, tiled, what);
  p.to_tiled = false;
  p.from = to.as<uint8_t>();
  p.to = back.as<uint8_t>();
  cuda::tile(p);
  check_bits(back, canonical, "un" + what);
}

// ---- dequantise

template <class T>
void test_dequantize(const HostWeight& host, const DeviceWeight& device, int64_t begin, int64_t end) {
  std::vector<T> want((end - begin) * host.K);
  for (size_t i = 0; i < want.size(); ++i) want[i] = narrow<T>(host.exact[begin * host.K + i]);
  Buffer out(want.size() * sizeof(T));
  DequantizeParams p;
  p.w = device.view;
  p.row_begin = begin;
  p.row_end = end;
  p.dtype = TypeOf<T>::value;
  p.out = out.data();
  cuda::dequantize(p);
  check_bits(out, want,
             std::string("dequantize ") + format_name(host.format) + " " + dtype_name(p.dtype) + " " +
                 std::to_string(host.N) + "x" + std::to_string(host.K) + "/" + std::to_string(host.blocksize) +
                 (host.is_nested ? " nested" : "") + " rows " + std::to_string(begin) + ".." + std::to_string(end));
}

// ---- linear layer

template <class T>
struct LinearCase {
  std::vector<T> x, s, factor, bias;
  std::vector<double> want, magnitude;
};

// out[m, o] = sum_i in[m, i] w(o, i) + bias[o] + scaling sum_r s[m, r] f(o, r); magnitude: the root
// of the sum of squared terms times 4, plus what rounding of the result's parts allows.
template <class T>
LinearCase<T> linear_case(const HostWeight& w, int64_t M, int64_t R, bool is_dgrad, double scaling) {
  const int64_t outputs = is_dgrad ? w.K : w.N, inputs = is_dgrad ? w.N : w.K;
  LinearCase<T> c;
  c.x = random_values<T>(M * inputs, 1);
  c.s = random_values<T>(M * R, 2);
  c.factor = random_values<T>(outputs * R, 3, 0.1);
  c.bias = random_values<T>(outputs, 4);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = is_dgrad ? 0.0 : wide(c.bias[o]), squares = sum * sum;
      const auto add = [&](double term) {
        sum += term;
        squares += term * term;
      };
      for (int64_t i = 0; i < inputs; ++i)
        add(wide(c.x[m * inputs + i]) * double(w.exact[is_dgrad ? i * w.K + o : o * w.K + i]));
      for (int64_t r = 0; r < R; ++r)
        add(scaling * wide(c.s[m * R + r]) * wide(c.factor[is_dgrad ? r * w.K + o : o * R + r]));
      c.want.push_back(sum);
      const double growth = std::is_same_v<T, float> || std::is_same_v<T, double> ? std::sqrt(double(inputs)) : 4.0;
      c.magnitude.push_back(growth * std::sqrt(squares));
    }
  return c;
}

template <class T>
void test_linear(const HostWeight& host, const DeviceWeight& device, int64_t M, int64_t R, size_t shift) {
  for (const bool is_dgrad : {false, true}) {
    const double scaling = is_dgrad ? 1.0 : 0.5;
    const LinearCase<T> c = linear_case<T>(host, M, R, is_dgrad, scaling);
    Buffer in(c.x, shift), s(c.s), factor(c.factor), bias(c.bias), out(c.want.size() * sizeof(T));
    const auto run = [&] {
      if (is_dgrad) {
        QLinearDgradParams p;
        p.w = device.view;
        p.M = M;
        p.R = R;
        p.dtype = TypeOf<T>::value;
        p.dy = in.data();
        p.ds = R ? s.data() : nullptr;
        p.lora_a = R ? factor.data() : nullptr;
        p.dx = out.data();
        cuda::qlinear_dgrad(p);
      } else {
        QLinearFwdParams p;
        p.w = device.view;
        p.M = M;
        p.R = R;
        p.dtype = TypeOf<T>::value;
        p.x = in.data();
        p.bias = bias.data();
        p.s = R ? s.data() : nullptr;
        p.lora_b = R ? factor.data() : nullptr;
        p.scaling = float(scaling);
        p.y = out.data();
        cuda::qlinear_fwd(p);
      }
    };
    run();
    const std::string what = std::string(is_dgrad ? "dgrad " : "fwd ") + format_name(host.format) + " " +
                             dtype_name(TypeOf<T>::value) + " M" + std::to_string(M) + " N" + std::to_string(host.N) +
                             " K" + std::to_string(host.K) + " R" + std::to_string(R) + "/" +
                             std::to_string(host.blocksize) + (host.is_nested ? " nested" : "");
    check_sums<T>(out, c.want, c.magnitude, what);
    const std::vector<T> first = out.read<T>();
    out.poison();
    run();
    check_bits(out, first, what + " again");
  }
}

void test_linears() {
  struct Shape {
    Format format;
    int64_t N, K, blocksize;
  };
  const Shape shapes[] = {{Format::kNf4, 48, 128, 64},  {Format::kNf4, 16, 64, 64},   {Format::kNf4, 7, 64, 64},
                          {Format::kNf4, 341, 192, 64}, {Format::kNf4, 40, 1088, 64}, {Format::kNf4, 33, 100, 64},
                          {Format::kNf4, 24, 96, 32},   {Format::kNf4, 5, 7, 64},     {Format::kNf4, 64, 192, 128},
                          {Format::kNf4, 520, 256, 256}, {Format::kFp4, 72, 320, 64}, {Format::kInt8, 33, 80, 64},
                          {Format::kInt8, 19, 45, 64},  {Format::kNf4, 2500, 64, 64}};
  for (const Shape& s : shapes)
    for (const bool is_nested : {false, true}) {
      if (s.format == Format::kInt8 && is_nested) continue;
      const HostWeight host = make_weight(s.format, s.N, s.K, s.blocksize, is_nested, unsigned(s.N + s.K));
      const DeviceWeight device(host);
      for (const int64_t M : {1, 5, 8, 13, 17}) {
        const int64_t R = M == 1 ? 0 : M == 5 ? 13 : M == 8 ? 16 : 33;
        test_linear<__nv_bfloat16>(host, device, M, R, 0);
        test_linear<__half>(host, device, M, R, 0);
        if (M > 5) continue;
        test_linear<float>(host, device, M, R, 0);
        test_linear<double>(host, device, M, R, 0);
        test_linear<__nv_bfloat16>(host, device, M, R, 2);  // misaligned activations
      }
      if (is_nested) {
        test_dequantize<__nv_bfloat16>(host, device, 0, host.N);
        test_dequantize<__half>(host, device, 0, host.N);
        test_dequantize<__nv_bfloat16>(host, device, 3, host.N - 1);
      }
      test_dequantize<float>(host, device, 0, host.N);
      test_dequantize<double>(host, device, host.N / 2, host.N);
      test_dequantize<__nv_bfloat16>(host, device, 1, host.N);
    }
}

// ---- dropout

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

// ---- LLM.int8()

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
    for (int64_t k = 0; k < K; ++k)
      if (!outlier[k]) scale[m] = std::max(scale[m], std::fabs(float(wide(x[m * K + k]))));
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
      const double product = double(acc[m * N + n]) * double(scale[m]) * double(host.scales[n]) / (127.0 * 127.0);
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

// ---- bottleneck

double host_act(Activation kind, double a) {
  switch (kind) {
    case Activation::kRelu: return a > 0 ? a : 0;
    case Activation::kGelu: return a * (1 + std::erf(a / std::sqrt(2.0))) / 2;
    case Activation::kGeluTanh: return a * (1 + std::tanh(std::sqrt(2 / M_PI) * (a + 0.044715 * a * a * a))) / 2;
    case Activation::kSilu: return a / (1 + std::exp(-a));
    case Activation::kTanh: return std::tanh(a);
    default: return a;
  }
}

template <class T>
void test_bottleneck(Activation kind, int64_t M, int64_t D, bool has_bias) {
  const std::vector<T> z = random_values<T>(M * D, 9), b = random_values<T>(D, 10), dh = random_values<T>(M * D, 11);
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
  Buffer zs(z), bias(b), grads(dh), hs(z.size() * sizeof(T)), dzs(z.size() * sizeof(T)), out(z.size() * sizeof(T));
  BottleneckActParams p;
  p.M = M;
  p.D = D;
  p.dtype = TypeOf<T>::value;
  p.activation = kind;
  p.z = zs.data();
  p.bias = has_bias ? bias.data() : nullptr;
  p.h = hs.data();
  cuda::bottleneck_act_fwd(p);
  const std::string what = "bottleneck act " + std::to_string(int(kind)) + " " + dtype_name(p.dtype);
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

// ---- CUDA graph: launches captured on a stream replay to the same bits

void test_graph() {
  const HostWeight host = make_weight(Format::kNf4, 96, 128, 64, true, 77);
  const DeviceWeight device(host);
  const int64_t M = 3;
  Buffer x(random_values<__nv_bfloat16>(M * host.K, 12)), y(M * host.N * 2), dx(M * host.K * 2);
  cudaStream_t stream;
  NATIVE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto run = [&] {
    QLinearFwdParams f;
    f.w = device.view;
    f.M = M;
    f.dtype = DType::kBFloat16;
    f.x = x.data();
    f.y = y.data();
    f.stream = stream;
    cuda::qlinear_fwd(f);
    QLinearDgradParams d;
    d.w = device.view;
    d.M = M;
    d.dtype = DType::kBFloat16;
    d.dy = y.data();
    d.dx = dx.data();
    d.stream = stream;
    cuda::qlinear_dgrad(d);
  };
  run();
  const std::vector<uint16_t> want = dx.read<uint16_t>();
  dx.poison();
  y.poison();
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  NATIVE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  run();
  NATIVE_CUDA(cudaStreamEndCapture(stream, &graph));
  NATIVE_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  NATIVE_CUDA(cudaGraphLaunch(replay, stream));
  check_bits(dx, want, "graph replay");
  NATIVE_CUDA(cudaGraphExecDestroy(replay));
  NATIVE_CUDA(cudaGraphDestroy(graph));
  NATIVE_CUDA(cudaStreamDestroy(stream));
}

void group(const char* name, const std::function<void()>& body) {
  const int failed = failures, checked = checks;
  try {
    body();
  } catch (const Error& e) {
    check(false, std::string(name) + ": " + e.what());
  }
  std::printf("%-12s %5d checks, %d failed\n", name, checks - checked, failures - failed);
}

void test_quantizers() {
  for (const Format f : {Format::kNf4, Format::kFp4}) {
    test_thresholds(f);
    for (const int64_t blocksize : {32, 64, 128, 256, 512, 4096}) {
      test_quantize_4bit<float>(f, 3, 2048, blocksize, 0);
      test_quantize_4bit<__nv_bfloat16>(f, 7, 341, blocksize, 0);
    }
    test_quantize_4bit<__half>(f, 64, 128, 64, 2);
    test_quantize_4bit<double>(f, 5, 77, 64, 0);
    test_quantize_4bit<float>(f, 1, 1, 64, 0);
  }
  test_quantize_int8<float>(5, 341);
  test_quantize_int8<__nv_bfloat16>(3, 64);
  for (const int64_t count : {1, 255, 256, 257, 1000}) test_quantize_absmax(count);
}

template <class T>
void test_bottlenecks() {
  for (int kind = 0; kind < 6; ++kind) {
    test_bottleneck<T>(Activation(kind), 5, 64, true);
    test_bottleneck<T>(Activation(kind), 3, 13, kind % 2 == 0);
  }
}

}  // namespace

int main() {
  group("quantize", test_quantizers);
  group("tile", [] {
    for (const auto& shape : {std::pair<int64_t, int64_t>{16, 64}, {48, 192}, {7, 80}, {33, 100}, {5, 7}, {20, 1008}}) {
      test_tile(Format::kNf4, shape.first, shape.second);
      test_tile(Format::kFp4, shape.first, shape.second);
    }
  });
  group("linear", test_linears);
  group("dropout", [] {
    for (const float drop : {0.0f, 0.1f, 0.9f}) {
      test_dropout<float>(1003, drop, 0);
      test_dropout<__nv_bfloat16>(4096, drop, 0);
      test_dropout<__half>(517, drop, 2);
      test_dropout<double>(77, drop, 0);
    }
  });
  group("int8", [] {
    for (const float threshold : {0.0f, 6.0f}) {
      test_llm_int8<__nv_bfloat16>(5, 33, 128, threshold);
      test_llm_int8<__half>(3, 130, 45, threshold);
      test_llm_int8<float>(70, 9, 341, threshold);
      test_llm_int8<double>(2, 5, 64, threshold);
      test_llm_int8<__nv_bfloat16>(9, 16, 9000, threshold);
    }
  });
  group("bottleneck", [] {
    test_bottlenecks<float>();
    test_bottlenecks<__nv_bfloat16>();
    test_bottlenecks<__half>();
    test_bottlenecks<double>();
  });
  group("graph", test_graph);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures ? 1 : 0;
}
