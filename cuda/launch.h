// The CUDA backend: launchers with the same names and structs as csrc/cpu/cpu.h. CUDA runtime and
// csrc/core only. Every launcher is asynchronous on params.stream, allocates nothing, and is safe
// to capture in a graph.
#pragma once
#include "../csrc/core/params.h"
#include "../csrc/core/plan.h"

namespace fastpeft::cuda {

// Compute capability * 10, multiprocessors and shared memory a block of the current device (cached
// per device).
struct DeviceFacts {
  int arch = 0;
  int sm_count = 0;
  int shared_bytes = 0;
};
DeviceFacts device_facts();

// Programmatic dependent launch, on unless FASTPEFT_PDL=0: see dependent_launch.cuh.
bool dependent_launch();
void set_dependent_launch(bool is_on);

FASTPEFT_DECLARE_KERNELS

}  // namespace fastpeft::cuda
