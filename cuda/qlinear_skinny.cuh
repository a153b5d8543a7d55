// Few tokens on tensor cores (mma.sync): what qlinear_skinny.cu offers to the launchers.
#pragma once
#include "../csrc/core/params.h"

namespace fastpeft::cuda {

// 16-bit activations, a 4-bit weight, and columns that fall into whole strips and blocks.
bool skinny_fits(const QLinearFwdParams&);
bool skinny_fits(const QLinearDgradParams&);
void qlinear_fwd_skinny(const QLinearFwdParams&);
void qlinear_dgrad_skinny(const QLinearDgradParams&);

}  // namespace fastpeft::cuda
