// Tensor-core int8 x bf16 GEMM of sm_90a (int8_weight_wgmma.cu): forward of a weight-only layer,
// input gradient of any int8 layer. What it serves: int8_weight_wgmma_serves in csrc/core/plan.cpp;
// pointers 16-byte aligned; R <= 64 and R % 8 == 0.
#pragma once
#include "../csrc/core/params.h"

namespace fastpeft::cuda {

void int8_weight_wgmma_fwd(const QLinearFwdParams& p);
void int8_weight_wgmma_dgrad(const QLinearDgradParams& p);

}  // namespace fastpeft::cuda
