// Dropout of the LoRA branch: y = x * keep(seed, i) / (1 - p), mask recomputed from Philox4x32-10
// (csrc/core/philox.h), one counter for four elements, so forward and backward agree and nothing is
// stored. Work split: groups of four elements.
#include <algorithm>

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

}  // namespace

void dropout(const DropoutParams& p) {
  dispatch(p.dtype, [&](auto tag) { dropout_typed<typename decltype(tag)::type>(p); });
}

}  // namespace fastpeft::cpu
