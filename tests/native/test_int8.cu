// LLM.int8(): rows, scales and outlier columns bit for bit; the product by every path, with bias
// and low-rank product, by an error bound and to the same bits twice.
#include <algorithm>

#include "../../cuda/launch.h"
#include "check.h"

namespace native {

namespace {

struct Int8Case {
  int64_t M, N, K;
  float threshold;
  int64_t R = 0;
  int64_t capacity = 64;
  int64_t stride = 37;  // every so many columns hold an outlier
};

// Activations and what quantize_rows must make of them.
template <class T>
struct Rows {
  std::vector<T> x;
  std::vector<uint8_t> outlier;
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> list;

  explicit Rows(const Int8Case& c)
      : x(random_values<T>(c.M * c.K, 7)),
        outlier(c.K, 0),
        q(c.M * c.K),
        scale(c.M, 0.0f),
        list{0} {
    for (int64_t k = 3; k < c.K; k += c.stride)
      x[(k % c.M) * c.K + k] = narrow<T>(k % 2 ? 7.5 : -6.25);
    for (int64_t i = 0; i < c.M * c.K; ++i)
      if (c.threshold > 0 && std::fabs(float(wide(x[i]))) >= c.threshold) outlier[i % c.K] = 1;
    for (int64_t k = 0; k < c.K; ++k)
      if (outlier[k]) list.push_back(int32_t(k));
    list[0] = int32_t(list.size()) - 1;
    for (int64_t m = 0; m < c.M; ++m) {
      for (int64_t k = 0; k < c.K; ++k) {  // small elements of outlier columns count
        const float size = std::fabs(float(wide(x[m * c.K + k])));
        if (c.threshold <= 0 || size < c.threshold) scale[m] = std::max(scale[m], size);
      }
      const float inverse = int8_inverse(scale[m]);
      for (int64_t k = 0; k < c.K; ++k)
        q[m * c.K + k] =
            outlier[k] ? 0 : int8_t(std::nearbyintf(float(wide(x[m * c.K + k])) * inverse));
    }
  }
};

template <class T>
void test_llm_int8(const Int8Case& c) {
  if (is_left_out()) return;
  const int64_t M = c.M, N = c.N, K = c.K, R = c.R, capacity = c.capacity;
  const float threshold = c.threshold;
  const HostWeight host = make_weight(Format::kInt8, N, K, 64, false, unsigned(M + N + K));
  const DeviceWeight device(host);
  const Rows<T> rows(c);
  const bool has_outliers = threshold > 0;
  Buffer in(rows.x), codes(M * K), scales(M * sizeof(float)), flags(K), list(4 * (1 + K));
  Buffer x_columns(M * capacity * sizeof(T)), w_columns(N * capacity * sizeof(T));
  QuantizeRowsParams p;
  p.M = M;
  p.K = K;
  p.dtype = TypeOf<T>::value;
  p.x = in.data();
  p.threshold = threshold;
  p.q = codes.as<int8_t>();
  p.scale = scales.as<float>();
  p.outlier = flags.as<uint8_t>();
  p.w = device.view;
  if (has_outliers) {
    p.columns.capacity = capacity;
    p.columns.list = list.as<int32_t>();
    p.columns.x = x_columns.data();
    p.columns.w = w_columns.data();
  }
  cuda::quantize_rows(p);
  const std::string what = std::string(dtype_name(p.dtype)) + " M" + std::to_string(M) + " N" +
                           std::to_string(N) + " K" + std::to_string(K) + " R" + std::to_string(R);
  check_bits(flags, rows.outlier, "quantize_rows outliers " + what);
  check_bits(scales, rows.scale, "quantize_rows scale " + what);
  check_bits(codes, rows.q, "quantize_rows codes " + what);
  if (has_outliers) check_bits(list, rows.list, "quantize_rows list " + what);

  const float scaling = 0.5f;
  const std::vector<T> bias = random_values<T>(N, 8), s = random_values<T>(M * R, 2),
                       factor = random_values<T>(N * R, 3, 0.1);
  std::vector<int32_t> acc(M * N, 0);
  std::vector<double> want, magnitude;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double extra = wide(bias[n]), squares = extra * extra;
      const auto add = [&](double term) {
        extra += term;
        squares += term * term;
      };
      int32_t dot = 0;
      for (int64_t k = 0; k < K; ++k)
        dot += int32_t(rows.q[m * K + k]) * int32_t(int8_t(host.codes[n * K + k]));
      for (size_t j = 1; j < rows.list.size(); ++j)
        add(wide(rows.x[m * K + rows.list[j]]) * double(host.exact[n * K + rows.list[j]]));
      for (int64_t r = 0; r < R; ++r) add(scaling * wide(s[m * R + r]) * wide(factor[n * R + r]));
      acc[m * N + n] = dot;
      const double product =
          double(dot) * double(rows.scale[m]) * double(host.scales[n]) / (127.0 * 127.0);
      want.push_back(product + extra);
      magnitude.push_back(8 * std::sqrt(squares + product * product));
    }
  Buffer sums(acc), offsets(bias), low(s), factors(factor), y(want.size() * sizeof(T));
  const auto run = [&](const char* path, bool has_acc, bool has_list, int64_t tile_tokens,
                       int64_t split = 1) {
    Int8EpilogueParams e;
    e.w = device.view;
    e.M = M;
    e.dtype = p.dtype;
    e.tile_tokens = tile_tokens;
    e.split = split;
    e.acc = has_acc ? sums.as<int32_t>() : nullptr;
    e.q = codes.as<int8_t>();
    e.scale = scales.as<float>();
    e.outlier = has_outliers ? flags.as<uint8_t>() : nullptr;
    if (has_list) e.columns = p.columns;
    e.x = in.data();
    e.bias = offsets.data();
    e.R = R;
    e.s = R ? s.empty() ? nullptr : low.data() : nullptr;
    e.lora_b = factors.data();
    e.scaling = scaling;
    e.y = y.data();
    y.poison();
    cuda::int8_epilogue(e);
    check_sums<T>(y, want, magnitude, std::string("int8_epilogue ") + path + " " + what);
    const std::vector<T> first = y.read<T>();
    y.poison();
    cuda::int8_epilogue(e);
    check_bits(y, first, std::string("int8_epilogue ") + path + " " + what + " again");
  };
  const bool is_16bit = sizeof(T) == 2;
  if (R == 0) run("acc", true, false, 0);
  if (R == 0) run("dp4a", false, false, 0);
  if (is_16bit && K % 16 == 0) run("skinny", false, true, 0);
  if (is_16bit && K % 16 == 0 && N % 8 == 0 && R % 8 == 0 && cuda::device_facts().arch == 90)
    for (const int64_t tile_tokens : {64, 128, 256})
      for (const int64_t split : {1, 2})
        if (split == 1 || (K > 128 && tile_tokens < 256))
          run("wgmma", false, true, tile_tokens, split);
}

}  // namespace

void test_llm_int8s() {
  for (const float threshold : {0.0f, 6.0f}) {
    test_llm_int8<__nv_bfloat16>({5, 33, 128, threshold});
    test_llm_int8<__half>({3, 130, 45, threshold});
    test_llm_int8<float>({70, 9, 341, threshold});
    test_llm_int8<double>({2, 5, 64, threshold});
    test_llm_int8<__nv_bfloat16>({9, 16, 9008, threshold, 0, 128});
    test_llm_int8<__half>({13, 200, 2192, threshold, 13, 64});
    test_llm_int8<__nv_bfloat16>({16, 72, 272, threshold, 24, 64});
    test_llm_int8<__nv_bfloat16>({100, 264, 528, threshold, 16, 64});
    test_llm_int8<__half>({300, 520, 1040, threshold, 64, 64});
    test_llm_int8<__nv_bfloat16>({520, 136, 4096, threshold, 0, 256, 13});
  }
}

}  // namespace native
