// Programmatic dependent launch: a kernel may start while the one before it on the stream ends.
//
// A kernel launched so runs its prologue (barriers, lookup tables, first weights: whatever no
// kernel of the same step writes) and then calls wait_for_predecessor() before it reads an
// activation or writes anything; launch_dependents() tells when the next one may start. Weights are
// read early: what writes them (quantise, tile) never calls launch_dependents(), so it has ended by
// then.
#pragma once
#include "check.cuh"
#include "launch.h"

namespace fastpeft::cuda {

__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Returns at once in a kernel that was launched in the ordinary way.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches `kernel`, in clusters of `cluster` blocks along x when that is > 1, dependent where the
// switch of launch.h is on and the device knows it.
template <class... Params, class... Args>
void launch_kernel(void (*kernel)(Params...), const char* name, dim3 grid, int threads,
                   int shared_bytes, Stream stream, int cluster, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = cuda_stream(stream);
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = unsigned(cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (dependent_launch() && device_facts().arch >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = unsigned(count);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  FASTPEFT_CHECK(status == cudaSuccess, name, ": launch failed: ", cudaGetErrorName(status), ", ",
                 cudaGetErrorString(status));
}

}  // namespace fastpeft::cuda
