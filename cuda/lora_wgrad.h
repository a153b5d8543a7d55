// Between lora_wgrad.cu and lora_dy.cu.
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

}  // namespace fastpeft::cuda
