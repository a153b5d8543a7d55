// Facts of the current device and per-device kernel attributes, cached. The only mutable state of
// the CUDA backend: written once per device (and kernel), read by every launch.
#include <atomic>
#include <cstdlib>
#include <cstring>
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
  FASTPEFT_CHECK(facts.arch >= 80, "compute capability ", facts.arch / 10, ".", facts.arch % 10,
                 ": the CUDA kernels need 8.0 or newer");
  facts.sm_count = attribute(cudaDevAttrMultiProcessorCount);
  facts.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (const char* text = std::getenv("FASTPEFT_ARCH")) {  // an older device, for its kernels' sake
    const int wanted = std::atoi(text);
    FASTPEFT_CHECK(wanted >= 80 && wanted <= facts.arch, "FASTPEFT_ARCH=", text,
                   ": expected 80 to ", facts.arch, ", the compute capability times 10");
    facts.arch = wanted;
    const int allowed = wanted == 80 ? 163 << 10 : wanted < 90 ? 99 << 10 : facts.shared_bytes;
    facts.shared_bytes = facts.shared_bytes < allowed ? facts.shared_bytes : allowed;
  }
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

namespace {
std::atomic<bool>& dependent_launch_switch() {
  static std::atomic<bool> is_on = [] {
    const char* text = std::getenv("FASTPEFT_PDL");
    return !(text && std::strcmp(text, "0") == 0);
  }();
  return is_on;
}
}  // namespace

bool dependent_launch() {
  return dependent_launch_switch().load(std::memory_order_relaxed);
}
void set_dependent_launch(bool is_on) {
  dependent_launch_switch().store(is_on, std::memory_order_relaxed);
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
