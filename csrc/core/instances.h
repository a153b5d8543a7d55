// DType -> the C++ types that kernels are instantiated for: the one list of them. A backend names
// its own 16-bit types.
#pragma once
#include "check.h"
#include "types.h"

namespace fastpeft {

template <class T>
struct Tag {
  using type = T;
};

// What a kernel sums in: float64 in float64, everything else in float32.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// f(Tag<T>{}) for the type of dtype.
template <class BFloat16, class Float16, class F>
void dispatch_types(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Tag<float>{});
    case DType::kFloat64:
      return f(Tag<double>{});
    case DType::kBFloat16:
      return f(Tag<BFloat16>{});
    case DType::kFloat16:
      return f(Tag<Float16>{});
  }
  FASTPEFT_CHECK(false, "unknown dtype ", int(dtype));
}

}  // namespace fastpeft
