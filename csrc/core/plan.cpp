#include "plan.h"

#include <algorithm>
#include <sstream>

namespace fastpeft {

namespace {

// Tokens up to which one fused pass over the packed bytes wins over dequantise + matmul.
int64_t fused_tokens(const Problem& p) {
  if (p.arch == 0) return 4;
  return 8;
}

}  // namespace

Plan make_plan(const Problem& p) {
  Plan plan;
  if (p.format == Format::kDense) {
    plan.kernel = KernelId::kDense;
    return plan;
  }
  if (p.M <= fused_tokens(p)) {
    plan.kernel = KernelId::kFused;
    return plan;
  }
  if (p.arch == 0) {
    plan.kernel = KernelId::kPanels;
    plan.panel_rows = p.N;
    plan.workspace_bytes = plan.panel_rows * p.K * dtype_bytes(p.dtype);
    return plan;
  }
  plan.kernel = KernelId::kDequantMatmul;
  plan.workspace_bytes = p.N * p.K * dtype_bytes(p.dtype);
  return plan;
}

std::string describe(const Problem& p, const Plan& plan) {
  std::ostringstream s;
  s << format_name(p.format) << (p.direction == Direction::kFwd ? " fwd " : " dgrad ") << dtype_name(p.dtype)
    << " M=" << p.M << " N=" << p.N << " K=" << p.K << " R=" << p.R << " blocksize=" << p.blocksize << " on "
    << (p.arch ? "sm_" + std::to_string(p.arch) : std::string("cpu")) << ": " << kernel_name(plan.kernel);
  if (plan.panel_rows) s << " panel_rows=" << plan.panel_rows;
  s << " workspace_bytes=" << plan.workspace_bytes;
  return s.str();
}

}  // namespace fastpeft
