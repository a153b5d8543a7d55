// The CPU backend: portable kernels, SIMD chosen at run time. std and csrc/core only; threads come
// from the caller.
#pragma once
#include <cstdint>

#include "../core/params.h"
#include "../core/plan.h"

namespace fastpeft::cpu {

// Runs body(context, begin, end) over pieces of [0, count), each at least `grain` long. csrc/ops
// fills it with torch's pool; until then it runs on the calling thread.
using ParallelFor = void (*)(int64_t count, int64_t grain,
                             void (*body)(void* context, int64_t begin, int64_t end),
                             void* context);
void set_parallel_for(ParallelFor);

// "avx512-bf16", "avx512", "avx2" or "plain": what this machine runs; FASTPEFT_CPU_ISA lowers it
// (tests).
const char* isa_name();

// float32 lanes of the SIMD kernels in use (16, 8, or 0 for plain code).
int simd_lanes();
// Whether torch's int8 matmul is a fast one here: without AVX-512 it is scalar code.
bool has_fast_int_mm();
// Whether torch's bfloat16 matmul outruns its float32 one: AMX, or AMD's AVX512-BF16. Intel's
// without AMX runs at half the float32 speed (84 against 165 GFLOP/s a thread, Sapphire Rapids).
bool has_fast_bf16();

FASTPEFT_DECLARE_KERNELS

}  // namespace fastpeft::cpu
