// Comparisons of the native tests: counted, reported, never fatal.
#pragma once
#include "host.h"

namespace native {

inline int failures = 0, checks = 0;

// Of every group's cases `test_kernels --small` runs one in `stride`, and `--part i/n` the i-th of
// every n of those.
inline int stride = 1, part = 0, parts = 1;
inline int cases = 0, cases_run = 0;  // of the group

inline bool is_left_out() {
  const int number = cases++;
  if (number % stride != 0 || number / stride % parts != part) return true;
  ++cases_run;
  return false;
}

inline void check(bool ok, const std::string& what) {
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
  return std::is_same_v<T, double>   ? 1e-15
         : std::is_same_v<T, float>  ? 6e-8
         : std::is_same_v<T, __half> ? 4.9e-4
                                     : 3.9e-3;
}

// |got - want| <= roundoff * (a few * sum of |terms| / sqrt(count) + |want|): tight enough for one
// misplaced term to show, and true of any order of summation with weights rounded to T.
template <class T>
void check_sums(const Buffer& got, const std::vector<double>& want,
                const std::vector<double>& magnitude, const std::string& what) {
  const std::vector<T> values = got.read<T>();
  double worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double bound = unit_roundoff<T>() * (magnitude[i] + std::fabs(want[i])) + 1e-30;
    const double ratio = std::fabs(wide(values[i]) - want[i]) / bound;
    if (!(ratio <= worst)) worst = ratio, at = i;
  }
  check(worst <= 1.0,
        what + ": error " + std::to_string(worst) + " of the bound at " + std::to_string(at));
  check(got.guard_is_whole(), what + ": wrote past the end");
}

// The groups of test_kernels, one file each.
void test_quantizers();
void test_tiles();
void test_linears();
void test_wide_linears();
void test_nf4_tiles();
void test_int8_tiles();
void test_graph();
void test_dropouts();
void test_llm_int8s();
void test_bottlenecks();
void test_loras();
void test_dense_loras();

}  // namespace native
