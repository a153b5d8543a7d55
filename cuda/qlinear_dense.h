// Tensor-core GEMM of sm_90a over a dense bf16 weight with the low-rank branch on the same sums
// (qlinear_dense.cu). Serves R <= 64, R % 8 == N % 8 == K % 8 == 0 and pointers aligned to 16
// bytes.
#pragma once
#include "../csrc/core/params.h"

namespace fastpeft::cuda {

void qlinear_dense_fwd(const QLinearFwdParams& p);
void qlinear_dense_dgrad(const QLinearDgradParams& p);

}  // namespace fastpeft::cuda
