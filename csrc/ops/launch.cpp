// dependent_launch, plan_text: ops without tensors, so on no device's key.
#include "backend.h"

namespace fastpeft::ops {

namespace {

std::string plan_text(bool is_cuda, int64_t M, int64_t N, int64_t K, int64_t R, int64_t format,
                      int64_t blocksize, int64_t direction, ScalarType dtype) {
  STD_TORCH_CHECK(M >= 0 && N >= 1 && K >= 1 && R >= 0 && blocksize >= 1,
                  "M, N, K, R, blocksize: expected M >= 0, N >= 1, K >= 1, R >= 0, blocksize >= 1");
  STD_TORCH_CHECK(format >= 0 && format <= int64_t(Format::kInt8),
                  "format: expected 0 (dense) to 3 (int8), got ", format);
  STD_TORCH_CHECK(direction == 0 || direction == 1,
                  "direction: expected 0 (fwd) or 1 (dgrad), got ", direction);
  Problem p;
  p.format = Format(format);
  p.direction = Direction(direction);
  p.dtype = floating_dtype("dtype", dtype);
  p.M = M, p.N = N, p.K = K, p.R = R, p.blocksize = blocksize;
  set_device(p, is_cuda);
  return describe(p, make_plan(p));
}

}  // namespace

}  // namespace fastpeft::ops

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CompositeExplicitAutograd, m) {
  m.impl("dependent_launch", TORCH_BOX(&fastpeft::ops::dependent_launch));
  m.impl("plan_text", TORCH_BOX(&fastpeft::ops::plan_text));
}
