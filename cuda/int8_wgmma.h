// Tensor-core LLM.int8() of sm_90a (int8_wgmma.cu). What it serves: int8_wgmma_serves in
// csrc/core/plan.cpp; pointers 16-byte aligned; R <= 64 and R % 8 == 0; columns filled when there
// is a threshold.
#pragma once
#include "../csrc/core/params.h"

namespace fastpeft::cuda {

void int8_wgmma_fwd(const Int8EpilogueParams& p);

}  // namespace fastpeft::cuda
