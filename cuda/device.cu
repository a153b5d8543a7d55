// Facts of the current device and per-device kernel attributes, cached. The only mutable state of
// the CUDA backend: written once per device (and kernel), read by every launch.
#include <mutex>
#include <set>
#include <utility>

#include "check.cuh"
#include "launch.h"

namespace fastpeft::cuda {

namespace {

constexpr int kMaxDevices = 64;

int current_device() {
  int device = 0;
  FASTPEFT_CUDA_CHECK(cudaGetDevice(&device));
  FASTPEFT_CHECK(device < kMaxDevices, "device ", device, ": at most ", kMaxDevices, " devices");
  return device;
}

DeviceFacts read_facts(int device) {
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    FASTPEFT_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  DeviceFacts facts;
  facts.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
               attribute(cudaDevAttrComputeCapabilityMinor);
  facts.sm_count = attribute(cudaDevAttrMultiProcessorCount);
  facts.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  FASTPEFT_CHECK(facts.arch >= 80, "compute capability ", facts.arch / 10, ".", facts.arch % 10,
                 ": the CUDA kernels need 8.0 or newer");
  return facts;
}

}  // namespace

DeviceFacts device_facts() {
  static std::once_flag once[kMaxDevices];
  static DeviceFacts facts[kMaxDevices];
  const int device = current_device();
  std::call_once(once[device], [device] { facts[device] = read_facts(device); });
  return facts[device];
}

void bind_context() {
  FASTPEFT_CUDA_CHECK(cudaSetDevice(current_device()));
}

void allow_shared_memory(const void* kernel, int shared_bytes) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> done;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!done.insert({current_device(), kernel}).second) return;
  FASTPEFT_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
}

}  // namespace fastpeft::cuda
