// CUDA errors: every runtime call and every launch is checked; thrown as fastpeft::Error.
#pragma once
#include <cuda_runtime.h>

#include "../csrc/core/check.h"
#include "../csrc/core/types.h"

#define FASTPEFT_CUDA_CHECK(call)                                                                  \
  do {                                                                                             \
    const cudaError_t fastpeft_status = (call);                                                    \
    FASTPEFT_CHECK(fastpeft_status == cudaSuccess, #call, ": ", cudaGetErrorName(fastpeft_status), \
                   ", ", cudaGetErrorString(fastpeft_status));                                     \
  } while (0)

namespace fastpeft::cuda {

inline cudaStream_t cuda_stream(Stream s) {
  return static_cast<cudaStream_t>(s);
}

// After a launch: a bad configuration shows here, a fault inside the kernel at the next
// synchronisation.
inline void check_launch(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  FASTPEFT_CHECK(status == cudaSuccess, kernel, ": launch failed: ", cudaGetErrorName(status), ", ",
                 cudaGetErrorString(status));
}

// Makes the current device's context current on this thread: the driver's own functions (tensor
// maps) need it, and a thread of autograd may come here before any runtime call of its own.
void bind_context();

// Raises the kernel's limit of dynamic shared memory, once per kernel and device.
void allow_shared_memory(const void* kernel, int shared_bytes);

inline bool is_aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % uintptr_t(bytes) == 0;
}

// Blocks of a grid-stride or one-block-a-chunk launch; grids are limited to 2^31 - 1 blocks in x.
inline unsigned grid_blocks(int64_t work, int64_t work_per_block) {
  const int64_t blocks = ceil_div(work, work_per_block);
  FASTPEFT_CHECK(blocks > 0 && blocks < (int64_t(1) << 31), "grid of ", blocks, " blocks");
  return unsigned(blocks);
}

}  // namespace fastpeft::cuda
