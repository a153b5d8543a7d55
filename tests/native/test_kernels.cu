// Every CUDA kernel on tiny odd shapes against plain host loops, without torch: for
// compute-sanitizer, the profiler, and a quick "does this machine compute right". Prints one line a
// group, exits 1 on a failure. Codes, masks and dequantised values are compared bit for bit;
// products by an error bound. `test_kernels [filter]` runs the groups whose name contains it.
#include <cstring>

#include "check.h"

namespace {

const char* filter = "";

void group(const char* name, void (*body)()) {
  using namespace native;
  if (!std::strstr(name, filter)) return;
  const int failed = failures, checked = checks;
  try {
    body();
  } catch (const Error& e) {
    check(false, std::string(name) + ": " + e.what());
  }
  std::printf("%-14s %5d checks, %d failed\n", name, checks - checked, failures - failed);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) filter = argv[1];
  group("quantize", native::test_quantizers);
  group("tile", native::test_tiles);
  group("linear", native::test_linears);
  group("linear, wide", native::test_wide_linears);
  group("graph", native::test_graph);
  group("dropout", native::test_dropouts);
  group("int8", native::test_llm_int8s);
  group("bottleneck", native::test_bottlenecks);
  group("lora", native::test_loras);
  group("dense", native::test_dense_loras);
  std::printf("%d checks, %d failed\n", native::checks, native::failures);
  return native::failures ? 1 : 0;
}
