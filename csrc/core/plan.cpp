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

// Microseconds of the wgmma kernel with tiles of `tokens`, measured on an H200: 5 to start and end,
// then k-blocks of 1130 (tensor cores, at the clock that power allows) or 810 clocks (decode)
// at 1.75 GHz over the waves of tiles. A last wave that fills at most half of the blocks is cut in
// two, for 1.4 of exchange. Within 6 % of the kernel on the shapes of Llama-3-8B and 70B at M = 64
// ... 512.
double wgmma_us(const Problem& p, int64_t tokens) {
  const bool is_fwd = p.direction == Direction::kFwd;
  const int64_t rows = is_fwd ? p.N : p.K, kblocks = ceil_div<int64_t>(is_fwd ? p.K : p.N, 64);
  const int64_t blocks = std::max(p.sm_count / 2 * 2, 2);
  const int64_t tiles = ceil_div<int64_t>(rows, 128) * ceil_div<int64_t>(p.M, tokens);
  const int64_t full = tiles / blocks, rest = tiles % blocks;
  const bool is_cut = rest > 0 && 2 * rest <= blocks && kblocks >= 8;
  const double waves = double(full) + (rest == 0 ? 0.0 : is_cut ? 0.5 : 1.0);
  const double clocks = tokens == 256 ? 1130.0 : 810.0;
  return 5.0 + waves * double(kblocks) * clocks / 1750.0 + (is_cut ? 1.4 : 0.0);
}

// Microseconds of dequantise + cuBLAS on the same card: 3.3 TB/s and 3.5 to start; then 5 and the
// slower of 3.5 TB/s and 720 TFLOP/s. Wins only where the wgmma kernel has too few tiles for the
// card (1024 x 4096: 8 of 132).
double dequant_matmul_us(const Problem& p) {
  const double weights = double(p.N) * double(p.K);
  const double matmul = std::max(weights * 2.0 / 3.5e6, 2.0 * double(p.M) * weights / 7.2e8);
  return 3.5 + weights * 2.516 / 3.3e6 + 5.0 + matmul;
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
    const double narrow = wgmma_us(p, 128), wide = wgmma_us(p, 256);
    if (std::min(narrow, wide) < dequant_matmul_us(p)) {
      plan.kernel = KernelId::kWgmma;
      plan.fuses_lora = p.R <= 64 && p.R % 8 == 0;
      plan.tile_tokens = narrow < wide ? 128 : 256;
      return plan;
    }
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
