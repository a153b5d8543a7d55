// Between lora_wgrad.cu, lora_wgrad_sm90.cu and lora_dy.cu.
#pragma once
#include "launch.h"

namespace fastpeft::cuda {

// ds and dB from one pass over dy (lora_dy.cu): R <= 16 and even, N % 8 == 0.
struct DyPass {
  int column_blocks = 0, slices = 0, tokens = 0;  // tokens a slice
  int64_t ds_floats = 0, dB_floats = 0;           // of partial sums
};
DyPass dy_pass(const LoraWgradParams&);
// partial_ds [column_blocks, M, 16], partial_dB [slices, N, 16]
void lora_dy(const LoraWgradParams&, const DyPass&, float* partial_ds, float* partial_dB);

// ds, dB and, without dropout, dA from one pass over dy and x (lora_wgrad_sm90.cu): R <= 16.
struct FusedPass {
  int slices = 0;  // 0: does not serve
  bool has_dA = false;
  int64_t floats = 0;  // of partial sums
};
FusedPass fused_pass(const LoraWgradParams&);
// partial_dB [slices, N, 16], partial_dA [slices, 16, K]; writes ds
void lora_wgrad_sm90(const LoraWgradParams&, const FusedPass&, float* partial_dB,
                     float* partial_dA);

}  // namespace fastpeft::cuda
