// Every CUDA kernel on tiny odd shapes against plain host loops, without torch: for
// compute-sanitizer, the profiler, and a quick "does this machine compute right". Prints one line a
// group, exits 1 on a failure. Codes, masks and dequantised values are compared bit for bit;
// products by an error bound.
//
//   test_kernels [--small] [--part i/n] [--bare] [--launches] [filter...]
//
// filter: the groups whose name contains one of the words, or is "=word". --small: a sample of the
// cases that still launches every kernel. --bare: buffers without guard and poison (host.h), for
// the tools. --launches: after each group "ran <group> <cases>" and
// "launched <group>/<kernel> <count>" lines.
#include <cstring>
#include <vector>

#include "check.h"
#include "launches.h"

namespace {

std::vector<std::string> filters;
bool is_small = false, lists_launches = false;

bool is_wanted(const char* name) {
  for (const std::string& filter : filters)
    if (filter[0] == '=' ? filter.substr(1) == name : std::strstr(name, filter.c_str()) != nullptr)
      return true;
  return filters.empty();
}

// --small runs one case in `stride`; no stride divides the length of a loop of its group, so that
// a sample meets every value of every loop.
void group(const char* name, void (*body)(), int stride) {
  using namespace native;
  if (!is_wanted(name)) return;
  const int failed = failures, checked = checks;
  native::stride = is_small ? stride : 1;
  cases = cases_run = 0;
  launches.clear();
  try {
    body();
  } catch (const Error& e) {
    check(false, std::string(name) + ": " + e.what());
  }
  std::printf("%-14s %5d checks, %d failed\n", name, checks - checked, failures - failed);
  if (lists_launches) {
    std::printf("ran %s %d\n", name, cases_run);
    for (const auto& [kernel, count] : launches)
      std::printf("launched %s/%s %d\n", name, kernel.c_str(), count);
  }
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--small") == 0)
      is_small = true;
    else if (std::strcmp(argv[i], "--bare") == 0)
      native::is_bare = true;
    else if (std::strcmp(argv[i], "--launches") == 0)
      lists_launches = true;
    else if (std::strcmp(argv[i], "--part") == 0 && i + 1 < argc)
      std::sscanf(argv[++i], "%d/%d", &native::part, &native::parts);
    else
      filters.push_back(argv[i]);
  }
  group("quantize", native::test_quantizers, 3);
  group("tile", native::test_tiles, 5);
  group("linear", native::test_linears, 7);
  group("linear, wide", native::test_wide_linears, 5);
  group("nf4 tensor cores", native::test_nf4_tiles, 13);
  group("int8 tensor cores", native::test_int8_tiles, 5);
  group("graph", native::test_graph, 1);
  group("dropout", native::test_dropouts, 5);
  group("int8", native::test_llm_int8s, 3);
  group("bottleneck", native::test_bottlenecks, 7);
  group("lora", native::test_loras, 7);
  group("dense", native::test_dense_loras, 3);
  std::printf("%d checks, %d failed\n", native::checks, native::failures);
  return native::failures ? 1 : 0;
}
