// Tensor-core NF4 GEMM of sm_90a: qlinear_wgmma.cu (Plan kWgmma), and qlinear_narrow.cu for up to
// 128 tokens (kNarrow). What they serve: wgmma_serves in csrc/core/plan.cpp; pointers 16-byte
// aligned; R <= 64 and R % 8 == 0.
#pragma once
#include "../csrc/core/params.h"

namespace fastpeft::cuda {

void qlinear_wgmma_fwd(const QLinearFwdParams& p);
void qlinear_wgmma_dgrad(const QLinearDgradParams& p);
void qlinear_narrow_fwd(const QLinearFwdParams& p);
void qlinear_narrow_dgrad(const QLinearDgradParams& p);

}  // namespace fastpeft::cuda
