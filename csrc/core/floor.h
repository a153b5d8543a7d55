// Problem, machine -> floor: the time that no kernel can beat there, from the fewest bytes and the
// operations of the formula. A pure function, printed by `fastpeft plan`.
//
//   bytes = W as stored + x [M, K], y [M, N], A [R, K], B [N, R] once each
//   flops = 2 M N K + 2 M R (N + K)
//   floor = max(bytes / read bandwidth, flops / rate of the matrix units)
// Forward and input gradient cost the same: dy and dx in place of y and x.
#pragma once
#include "plan.h"

namespace fastpeft {

struct Machine {
  const char* name;
  const char* source;  // where the rates come from
  int arch;            // compute capability * 10
  int sm_count;
  double read_gbs;
  double tflops_16bit;  // bf16 and fp16, float32 sums, no sparsity
  double tflops_fp32;   // float32 without TF32
};

// A datasheet promises more than a kernel gets: the H200's says 4800 GB/s and 989 TFLOP/s.
constexpr Machine kMachines[] = {
    {"H200", "measured (float32: datasheet)", 90, 132, 4110, 770, 67},
    {"H100-SXM", "datasheet", 90, 132, 3350, 989, 67},
    {"A100-SXM", "datasheet", 80, 108, 2039, 312, 19.5},
    {"RTX-3090", "datasheet", 86, 82, 936, 71, 35.6},
    {"RTX-4090", "datasheet", 89, 128, 1008, 165.2, 82.6},
    {"RTX-5090", "datasheet", 120, 170, 1792, 209.5, 104.8},
};

struct Floor {
  double bytes = 0, flops = 0;
  double memory_us = 0, compute_us = 0;  // compute_us is 0 for float64: no figure
  double us = 0;                         // the larger of the two
  bool is_memory_bound = true;
};

// Bytes of W as stored, N * K * (0.5 + one scale a block) or N * K + 4 N; padding not counted.
double weight_bytes(const Problem& problem, bool is_double_quant);
Floor make_floor(const Problem& problem, const Machine& machine, bool is_double_quant = true);

}  // namespace fastpeft
