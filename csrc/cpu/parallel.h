// Threads and instruction sets of the CPU backend.
#pragma once
#include <cstdint>

#include "cpu.h"

namespace fastpeft::cpu {

enum class Isa : int { kPlain = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// What this machine runs, lowered by FASTPEFT_CPU_ISA; read once.
Isa isa();

void run_parallel(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t),
                  void* context);

// body(begin, end) over pieces of [0, count). Results must not depend on where the pieces end: that
// is what keeps every kernel bitwise independent of the number of threads.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  run_parallel(
      count, grain < 1 ? 1 : grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

}  // namespace fastpeft::cpu
