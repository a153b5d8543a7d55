// int8 linear layer for few tokens (int8_skinny_fwd.cu): K a multiple of 16, pointers 16-byte
// aligned, bf16 or fp16 activations.
#pragma once
#include "../csrc/core/params.h"

namespace fastpeft::cuda {

bool int8_skinny_fits(const QLinearFwdParams&);  // weight only
void int8_skinny_fwd(const QLinearFwdParams&);
bool int8_skinny_fits(const Int8EpilogueParams&);  // int8 activations, acc not given
void int8_skinny_fwd(const Int8EpilogueParams&);

}  // namespace fastpeft::cuda
