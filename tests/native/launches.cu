// Which kernels a program launches: test_kernels is linked with --wrap, so that every launch comes
// by here. `make sanitize` runs each kernel under each tool by itself and wants to know that none
// is missing.
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdlib>

#include "launches.h"

namespace native {

std::map<std::string, int> launches;

namespace {

// "void fastpeft::cuda::(anonymous namespace)::tile_rows_kernel<true>(...)" -> "tile_rows_kernel"
void note_launch(const void* function) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, function) != cudaSuccess) return;
  int status = 0;
  char* whole = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? whole : mangled;
  std::free(whole);
  const size_t end = name.find("_kernel") + 7;
  const size_t begin = name.find_last_of(": ", end);
  ++launches[end < 7 ? name : name.substr(begin + 1, end - begin - 1)];
}

}  // namespace

}  // namespace native

extern "C" {

cudaError_t __real_cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**);
cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                       void** args) {
  native::note_launch(function);
  return __real_cudaLaunchKernelExC(config, function, args);
}

// What the triple brackets become.
cudaError_t __real___cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t);
cudaError_t __wrap___cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                                      size_t shared_bytes, cudaStream_t stream) {
  native::note_launch(kernel);
  return __real___cudaLaunchKernel(kernel, grid, block, args, shared_bytes, stream);
}

}  // extern "C"
