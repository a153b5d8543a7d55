#include "plan.h"

#include <algorithm>
#include <sstream>

namespace fastpeft {

namespace {

// What csrc/cpu/blocked.cpp serves: 4-bit, scales in column order, computed in float32.
bool cpu_simd_serves(const Problem& p) {
  return p.cpu_lanes > 0 && is_4bit(p.format) && scales_by_column(p.K, p.blocksize) &&
         p.dtype != DType::kFloat64;
}

// Tokens up to which one fused pass over the packed bytes wins over dequantise + matmul.
int64_t fused_tokens(const Problem& p) {
  if (p.arch != 0) return 8;
  if (!cpu_simd_serves(p)) return 4;
  return p.cpu_has_matrix_units && p.dtype != DType::kFloat32 ? 32 : INT64_MAX;
}

// What cuda/qlinear_wgmma.cu was written for, and whether it was compiled.
bool wgmma_serves(const Problem& p) {
#ifdef FASTPEFT_HAS_SM90A
  if (p.arch != 90 || p.format != Format::kNf4 || p.dtype != DType::kBFloat16) return false;
  return p.M < (1 << 24) && p.N % 8 == 0 && p.K % 64 == 0 && p.blocksize >= 64 &&
         p.K % p.blocksize == 0 && p.N * (p.K / 64) < (int64_t(1) << 31);
#else
  (void)p;
  return false;
#endif
}

// Clocks that the wgmma kernel takes with tiles of `tokens`: k-blocks of 1024 (tensor cores) or 770
// (decode) clocks, over the waves of tiles; a last wave that fills at most half of the blocks is
// cut in two, for about 2500 clocks of exchange.
double wgmma_clocks(const Problem& p, int64_t tokens) {
  const bool is_fwd = p.direction == Direction::kFwd;
  const int64_t rows = is_fwd ? p.N : p.K, kblocks = ceil_div<int64_t>(is_fwd ? p.K : p.N, 64);
  const int64_t blocks = std::max(p.sm_count / 2 * 2, 2);
  const int64_t tiles = ceil_div<int64_t>(rows, 128) * ceil_div<int64_t>(p.M, tokens);
  const int64_t full = tiles / blocks, rest = tiles % blocks;
  const bool is_cut = rest > 0 && 2 * rest <= blocks && kblocks >= 8;
  const double waves = double(full) + (rest == 0 ? 0.0 : is_cut ? 0.5 : 1.0);
  return waves * double(kblocks) * (tokens == 256 ? 1024.0 : 770.0) + (is_cut ? 2500.0 : 0.0);
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
    plan.fuses_lora = p.dtype != DType::kFloat64;  // it scales in float32
    return plan;
  }
  if (wgmma_serves(p)) {
    plan.kernel = KernelId::kWgmma;
    plan.fuses_lora = p.R <= 64 && p.R % 8 == 0;
    plan.tile_tokens = wgmma_clocks(p, 128) < wgmma_clocks(p, 256) ? 128 : 256;
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
  s << format_name(p.format) << (p.direction == Direction::kFwd ? " fwd " : " dgrad ")
    << dtype_name(p.dtype) << " M=" << p.M << " N=" << p.N << " K=" << p.K << " R=" << p.R
    << " blocksize=" << p.blocksize << " on "
    << (p.arch ? "sm_" + std::to_string(p.arch) : std::string("cpu")) << ": "
    << kernel_name(plan.kernel);
  if (plan.panel_rows) s << " panel_rows=" << plan.panel_rows;
  if (plan.tile_tokens) s << " tile=128x" << plan.tile_tokens;
  s << " workspace_bytes=" << plan.workspace_bytes;
  return s.str();
}

}  // namespace fastpeft
