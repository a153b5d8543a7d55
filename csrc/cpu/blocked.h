// The quantised linear layer over SimdKernels: few tokens in registers, many tokens as a blocked
// matmul whose panels of W are decoded into cache, never as a whole. See blocked.cpp.
#pragma once
#include "simd.h"

namespace fastpeft::cpu {

// int8 without scales: the codes themselves are the weight.
void tokens_fwd(const SimdKernels& k, const QLinearFwdParams& p);
void tokens_dgrad(const SimdKernels& k, const QLinearDgradParams& p);

}  // namespace fastpeft::cpu
