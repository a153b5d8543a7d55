// Tensor-core NF4 GEMM of sm_90a (qlinear_wgmma.cu). What it serves: wgmma_serves in
// csrc/core/plan.cpp; pointers 16-byte aligned; R <= 64 and R % 8 == 0.
#pragma once
#include "../csrc/core/params.h"

namespace fastpeft::cuda {

void qlinear_wgmma_fwd(const QLinearFwdParams& p);
void qlinear_wgmma_dgrad(const QLinearDgradParams& p);

}  // namespace fastpeft::cuda
