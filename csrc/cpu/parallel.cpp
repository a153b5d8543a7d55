#include "parallel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "../core/check.h"
#include "simd.h"

namespace fastpeft::cpu {

namespace {

void run_here(int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  body(context, 0, count);
}

ParallelFor g_parallel_for = run_here;

#if defined(__x86_64__)
// CPUID leaf 7, EDX bit 22; the system must also have enabled the tile registers (XCR0 bits 17,
// 18).
bool has_amx_bf16() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1)) return false;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;
}
#endif

Isa machine_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

constexpr const char* kIsaNames[] = {"plain", "avx2", "avx512", "avx512-bf16"};

Isa chosen_isa() {
  const Isa best = machine_isa();
  const char* asked = std::getenv("FASTPEFT_CPU_ISA");
  if (!asked || !*asked) return best;
  for (int i = 0; i <= int(best); ++i)
    if (std::strcmp(asked, kIsaNames[i]) == 0) return Isa(i);
  FASTPEFT_CHECK(false, "FASTPEFT_CPU_ISA is '", asked,
                 "', expected plain, avx2, avx512 or avx512-bf16, and no more than this machine's ",
                 kIsaNames[int(best)]);
  return best;
}

}  // namespace

void set_parallel_for(ParallelFor f) {
  g_parallel_for = f;
}

void run_parallel(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t),
                  void* context) {
  g_parallel_for(count, grain, body, context);
}

Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

const SimdKernels* simd_kernels() {
  static const SimdKernels* const chosen = isa() >= Isa::kAvx512 ? avx512_kernels()
                                           : isa() == Isa::kAvx2 ? avx2_kernels()
                                                                 : nullptr;
  return chosen;
}

int simd_lanes() {
  return simd_kernels() ? simd_kernels()->panel / 2 : 0;
}

bool has_fast_int_mm() {
  return isa() >= Isa::kAvx512;
}

bool has_fast_bf16() {
#if defined(__x86_64__)
  static const bool has = isa() == Isa::kAvx512Bf16 && (has_amx_bf16() || __builtin_cpu_is("amd"));
  return has;
#else
  return false;
#endif
}

const char* isa_name() {
  return kIsaNames[int(isa())];
}

}  // namespace fastpeft::cpu
