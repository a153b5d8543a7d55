// LoRA's products against plain host loops: s and ds, the branch of y and dx, gradients of the
// factors, and the dense base with its branch. Error bounds; the same bits on a second run.
#include <algorithm>

#include "../../csrc/core/philox.h"
#include "../../cuda/launch.h"
#include "check.h"

namespace native {

namespace {

constexpr int64_t kSeed = 0x23456789ABCDEFll;

// Sums of terms with what check_sums wants beside them.
struct Sums {
  std::vector<double> want, magnitude;
  void add(double sum, double squares, double roundings = 4.0) {
    want.push_back(sum);
    magnitude.push_back(roundings * std::sqrt(squares));
  }
};

// drop(x), unrounded.
template <class T>
std::vector<double> dropped(const std::vector<T>& x, float p) {
  std::vector<double> z(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const bool is_kept = p == 0.0f || philox(kSeed, i / 4).v[i % 4] >= drop_threshold(p);
    z[i] = is_kept ? wide(x[i]) / (1.0 - p) : 0.0;
  }
  return z;
}

std::string text(const char* what, DType dtype, std::initializer_list<int64_t> sizes, float p) {
  std::string s = std::string(what) + " " + dtype_name(dtype);
  for (const int64_t size : sizes) s += " " + std::to_string(size);
  return s + (p > 0.0f ? " dropout" : "");
}

template <class T>
void test_shrink(int64_t M, int64_t K, int64_t R, float p, bool is_transposed) {
  if (is_left_out()) return;
  const std::vector<T> x = random_values<T>(M * K, 1), factor = random_values<T>(R * K, 2, 0.1);
  const std::vector<double> z = dropped(x, p);
  const float scale = 0.75f;
  Sums sums;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t r = 0; r < R; ++r) {
      double sum = 0, squares = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double f = wide(factor[is_transposed ? k * R + r : r * K + k]);
        const double term = scale * z[m * K + k] * f;
        sum += term;
        squares += term * term;
      }
      sums.add(sum, squares);
    }
  Buffer in(x), weights(factor), seed(std::vector<int64_t>{kSeed}), out(M * R * sizeof(T));
  LoraShrinkParams q;
  q.M = M;
  q.K = K;
  q.R = R;
  q.dtype = TypeOf<T>::value;
  q.x = in.data();
  q.factor = weights.data();
  q.is_transposed = is_transposed;
  q.scale = scale;
  q.p = p;
  q.seed = seed.as<int64_t>();
  q.s = out.data();
  const std::string what =
      text(is_transposed ? "shrink transposed" : "shrink", q.dtype, {M, K, R}, p);
  cuda::lora_shrink(q);
  check_sums<T>(out, sums.want, sums.magnitude, what);
  const std::vector<T> first = out.read<T>();
  out.poison();
  cuda::lora_shrink(q);
  check_bits(out, first, what + " again");
}

template <class T>
void test_expand(int64_t M, int64_t C, int64_t R, float p, bool is_transposed, bool add,
                 bool has_bias) {
  if (is_left_out()) return;
  const std::vector<T> s = random_values<T>(M * R, 1), factor = random_values<T>(R * C, 2),
                       bias = random_values<T>(C, 3), start = random_values<T>(M * C, 4);
  const float scale = 1.5f;
  Sums sums;
  for (int64_t i = 0; i < M * C; ++i) {
    const int64_t m = i / C, c = i % C;
    const bool is_kept = p == 0.0f || philox(kSeed, i / 4).v[i % 4] >= drop_threshold(p);
    double sum = (add ? wide(start[i]) : 0.0) + (has_bias ? wide(bias[c]) : 0.0);
    double squares = sum * sum;
    for (int64_t r = 0; is_kept && r < R; ++r) {
      const double f = wide(factor[is_transposed ? r * C + c : c * R + r]);
      const double term = scale / (1.0 - p) * wide(s[m * R + r]) * f;
      sum += term;
      squares += term * term;
    }
    sums.add(sum, squares);
  }
  Buffer in(s), weights(factor), offsets(bias), seed(std::vector<int64_t>{kSeed}), out(start);
  LoraExpandParams q;
  q.M = M;
  q.C = C;
  q.R = R;
  q.dtype = TypeOf<T>::value;
  q.s = in.data();
  q.factor = weights.data();
  q.is_transposed = is_transposed;
  q.bias = has_bias ? offsets.data() : nullptr;
  q.scale = scale;
  q.p = p;
  q.seed = seed.as<int64_t>();
  q.add = add;
  q.out = out.data();
  const std::string what = text(add ? "expand add" : "expand", q.dtype, {M, C, R}, p);
  cuda::lora_expand(q);
  check_sums<T>(out, sums.want, sums.magnitude, what);
  const std::vector<T> first = out.read<T>();
  if (add)
    out.write(start);
  else
    out.poison();
  cuda::lora_expand(q);
  check_bits(out, first, what + " again");
}

// G [R or C, ...] of the sums over tokens, as double.
template <class T>
Sums column_sums(const std::vector<double>& z, const std::vector<T>& p, int64_t M, int64_t C,
                 int64_t R, double scale, bool ranks_first) {
  Sums sums;
  for (int64_t i = 0; i < C * R; ++i) {
    const int64_t c = ranks_first ? i % C : i / R, r = ranks_first ? i / C : i % R;
    double sum = 0, squares = 0;
    for (int64_t m = 0; m < M; ++m) {
      const double term = scale * z[m * C + c] * wide(p[m * R + r]);
      sum += term;
      squares += term * term;
    }
    sums.add(sum, squares, 64.0);
  }
  return sums;
}

template <class T, class G>
void test_wgrad(int64_t M, int64_t N, int64_t K, int64_t R, float p) {
  if (is_left_out()) return;
  const std::vector<T> x = random_values<T>(M * K, 1), dy = random_values<T>(M * N, 2),
                       s = random_values<T>(M * R, 3), b = random_values<T>(N * R, 4, 0.1);
  const double scaling = 0.5;
  Sums ds_sums;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t r = 0; r < R; ++r) {
      double sum = 0, squares = 0;
      for (int64_t n = 0; n < N; ++n) {
        const double term = scaling * wide(dy[m * N + n]) * wide(b[n * R + r]);
        sum += term;
        squares += term * term;
      }
      ds_sums.add(sum, squares);
    }
  Buffer xs(x), dys(dy), ss(s), bs(b), seed(std::vector<int64_t>{kSeed}), ds(M * R * sizeof(T)),
      dA(R * K * sizeof(G)), dB(N * R * sizeof(G));
  LoraWgradParams q;
  q.M = M;
  q.N = N;
  q.K = K;
  q.R = R;
  q.dtype = TypeOf<T>::value;
  q.x = xs.data();
  q.dy = dys.data();
  q.s = ss.data();
  q.lora_b = bs.data();
  q.scaling = float(scaling);
  q.p = p;
  q.seed = seed.as<int64_t>();
  q.ds = ds.data();
  q.grad_dtype = TypeOf<G>::value;
  q.dA = dA.data();
  q.dB = dB.data();
  Buffer workspace(cuda::lora_wgrad_workspace(q));
  q.workspace = workspace.data();
  const std::string what = text("wgrad", q.dtype, {M, N, K, R}, p);
  cuda::lora_wgrad(q);
  check_sums<T>(ds, ds_sums.want, ds_sums.magnitude, what + " ds");
  std::vector<double> grads(dy.size());
  std::transform(dy.begin(), dy.end(), grads.begin(), [](T v) { return wide(v); });
  const Sums want_dB = column_sums(grads, s, M, N, R, scaling, false);
  check_sums<G>(dB, want_dB.want, want_dB.magnitude, what + " dB");
  // of the ds that the kernel rounded
  const Sums want_dA = column_sums(dropped(x, p), ds.read<T>(), M, K, R, 1.0, true);
  check_sums<G>(dA, want_dA.want, want_dA.magnitude, what + " dA");
  check(workspace.guard_is_whole(), what + ": wrote past the workspace");
  const std::vector<G> first_dA = dA.read<G>(), first_dB = dB.read<G>();
  for (const Buffer* out : {&ds, &dA, &dB}) const_cast<Buffer*>(out)->poison();
  workspace.poison();
  cuda::lora_wgrad(q);
  check_bits(dA, first_dA, what + " dA again");
  check_bits(dB, first_dB, what + " dB again");
}

// The dense base with its branch (sm_90a).
void test_dense(int64_t M, int64_t N, int64_t K, int64_t R, bool is_dgrad) {
  if (is_left_out()) return;
  using T = __nv_bfloat16;
  const int64_t depth = is_dgrad ? N : K, rows = is_dgrad ? K : N;
  const std::vector<T> w = random_values<T>(N * K, 1, 0.1), x = random_values<T>(M * depth, 2),
                       s = random_values<T>(M * R, 3), factor = random_values<T>(rows * R, 4, 0.1),
                       bias = random_values<T>(rows, 5);
  const float scaling = is_dgrad ? 1.0f : R == 16 ? 0.7f : R == 24 ? 1.0f : 0.25f;
  Sums sums;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t o = 0; o < rows; ++o) {
      double sum = is_dgrad ? 0.0 : wide(bias[o]), squares = sum * sum;
      const auto add = [&](double term) {
        sum += term;
        squares += term * term;
      };
      for (int64_t i = 0; i < depth; ++i)
        add(wide(x[m * depth + i]) * wide(w[is_dgrad ? i * K + o : o * K + i]));
      for (int64_t r = 0; r < R; ++r)
        add(scaling * wide(s[m * R + r]) * wide(factor[is_dgrad ? r * rows + o : o * R + r]));
      sums.add(sum, squares);
    }
  Buffer ws(w), xs(x), ss(s), factors(factor), offsets(bias), out(M * rows * sizeof(T));
  WeightView view;
  view.format = Format::kDense;
  view.N = N;
  view.K = K;
  view.codes = ws.data();
  const auto run = [&] {
    if (is_dgrad) {
      QLinearDgradParams p;
      p.w = view;
      p.M = M;
      p.R = R;
      p.dtype = DType::kBFloat16;
      p.dy = xs.data();
      p.ds = R ? ss.data() : nullptr;
      p.lora_a = factors.data();
      p.dx = out.data();
      cuda::qlinear_dgrad(p);
    } else {
      QLinearFwdParams p;
      p.w = view;
      p.M = M;
      p.R = R;
      p.dtype = DType::kBFloat16;
      p.x = xs.data();
      p.bias = offsets.data();
      p.s = R ? ss.data() : nullptr;
      p.lora_b = factors.data();
      p.scaling = scaling;
      p.y = out.data();
      cuda::qlinear_fwd(p);
    }
  };
  const std::string what =
      text(is_dgrad ? "dense dgrad" : "dense fwd", DType::kBFloat16, {M, N, K, R}, 0);
  run();
  check_sums<T>(out, sums.want, sums.magnitude, what);
  const std::vector<T> first = out.read<T>();
  out.poison();
  run();
  check_bits(out, first, what + " again");
}

template <class T>
void test_lora_type() {
  for (const int64_t R : {1, 6, 8, 16, 24, 64})
    for (const float p : {0.0f, 0.25f}) {
      test_shrink<T>(R, 64 + 8 * R, R, p, false);
      test_shrink<T>(70, 1024, R, p, false);
      if (p == 0.0f) test_shrink<T>(70, 200, R, p, true);
      test_wgrad<T, float>(5, 72, 264, R, p);
      test_wgrad<T, T>(150, 304, 40, R, p);
      if (R > 16) continue;
      test_expand<T>(37, 72, R, p, true, false, false);
      test_expand<T>(130, 520, R, p, false, true, false);
      test_expand<T>(3, 8, R, 0.0f, false, false, true);
    }
  test_shrink<T>(1200, 328, 16, 0.25f, false);
  test_shrink<T>(1200, 328, 13, 0.0f, true);
  test_shrink<T>(1200, 136, 64, 0.0f, false);
  test_wgrad<T, float>(2100, 136, 72, 16, 0.25f);
  // One pass over dy and x: several steps and column groups; ragged everywhere.
  test_wgrad<T, float>(2077, 520, 40, 8, 0.0f);
  test_wgrad<T, float>(2300, 1504, 2056, 13, 0.0f);
  test_wgrad<T, T>(5003, 1032, 136, 16, 0.0f);
  test_wgrad<T, float>(5003, 136, 1032, 4, 0.25f);
}

}  // namespace

void test_loras() {
  test_lora_type<__nv_bfloat16>();
  test_lora_type<__half>();
}

void test_dense_loras() {
  if (cuda::device_facts().arch != 90) return;
  for (const bool is_dgrad : {false, true}) {
    test_dense(256, 256, 64, 0, is_dgrad);
    test_dense(256, 256, 128, 16, is_dgrad);
    test_dense(100, 136, 200, 8, is_dgrad);
    test_dense(300, 392, 72, 64, is_dgrad);
    test_dense(1030, 264, 328, 24, is_dgrad);
  }
}

}  // namespace native
