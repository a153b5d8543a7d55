// Problem -> plan: which kernel serves a quantised linear layer at this size. A pure function:
// tested without a GPU, printed by `fastpeft plan`, obeyed by the launchers, recorded by the
// benchmarks.
#pragma once
#include <string>

#include "formats.h"
#include "types.h"

namespace fastpeft {

enum class Direction : int32_t { kFwd = 0, kDgrad = 1 };

struct Problem {
  Format format = Format::kNf4;
  Direction direction = Direction::kFwd;
  DType dtype = DType::kBFloat16;
  int64_t M = 1, N = 4096, K = 4096, R = 0, blocksize = 64;
  bool has_int8_activations = false;  // LLM.int8(), forward
  int arch = 0;                       // compute capability * 10 (90, 80, ...); 0 = CPU
  int sm_count = 0;                   // multiprocessors, or threads on the CPU
  int cpu_lanes = 0;  // CPU: float32 lanes of its SIMD kernels (16 AVX-512, 8 AVX2, 0 plain code)
  bool cpu_has_fast_bf16 = false;  // CPU: torch's bfloat16 matmul outruns its float32 one
};

enum class KernelId : int32_t {
  kFused = 0,          // one launch, decode inside, no 16-bit copy of W
  kDequantMatmul = 1,  // W dequantised once in one launch, then torch's matmul
  kPanels = 2,         // CPU: panels of rows dequantised into cache, torch's matmul on each
  kDense = 3,          // nothing to decode
  kWgmma = 4,          // sm_90a tensor cores, decode in registers, no 16-bit copy of W at any M
  kNarrow = 5,         // the same for few tokens: decode spread over four warpgroups
  kIntMatmul = 6,      // LLM.int8(): torch's int8 matmul where it can, then one pass over its sums
};

constexpr const char* kernel_name(KernelId k) {
  return k == KernelId::kFused           ? "fused"
         : k == KernelId::kDequantMatmul ? "dequantize+matmul"
         : k == KernelId::kPanels        ? "panels+matmul"
         : k == KernelId::kWgmma         ? "wgmma"
         : k == KernelId::kNarrow        ? "narrow"
         : k == KernelId::kIntMatmul     ? "int8 matmul+epilogue"
                                         : "dense";
}

struct Plan {
  KernelId kernel = KernelId::kDequantMatmul;
  bool fuses_lora = false;       // the low-rank product rides on the same sums
  int64_t tile_rows = 0;         // kWgmma, kNarrow: output rows of a tile
  int64_t tile_tokens = 0;       // kWgmma, kNarrow: tokens of a tile
  int64_t split = 1;             // kNarrow, int8 on kWgmma: parts of a tile's reduction
  int64_t outlier_capacity = 0;  // LLM.int8() on kWgmma: OutlierColumns::capacity
  int64_t panel_rows = 0;        // kPanels: rows of W a panel
  int64_t workspace_bytes = 0;   // temporary memory beside the output
  double predicted_us = 0.0;     // on an H200, where plan.cpp has a model; else 0
};

Plan make_plan(const Problem& problem);
std::string describe(const Problem& problem, const Plan& plan);  // one line for people

}  // namespace fastpeft
