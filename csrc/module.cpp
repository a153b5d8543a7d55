// fastpeft._C: facts about the build, the formats' constants, the printable plan of a problem and
// its floor. No tensor passes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <vector>

#include "core/floor.h"
#include "core/formats.h"
#include "core/plan.h"
#include "cpu/cpu.h"

namespace py = pybind11;
using namespace fastpeft;

namespace {

py::dict build_facts() {
  py::dict facts;
  facts["version"] = FASTPEFT_VERSION;
  facts["torch_target"] = FASTPEFT_TORCH_TARGET;
  facts["cpu_isa"] = cpu::isa_name();
#ifdef FASTPEFT_WITH_CUDA
  facts["cuda"] = true;
  facts["cuda_archs"] = FASTPEFT_ARCHS;
#else
  facts["cuda"] = false;
  facts["cuda_archs"] = "";
#endif
#ifdef FASTPEFT_HAS_SM90A
  facts["sm90a"] = true;
#else
  facts["sm90a"] = false;
#endif
  return facts;
}

Format format_of(const std::string& name) {
  for (Format f : {Format::kDense, Format::kNf4, Format::kFp4, Format::kInt8})
    if (name == format_name(f)) return f;
  throw py::value_error("format: expected dense, nf4, fp4 or int8, got " + name);
}

DType dtype_of(const std::string& name) {
  for (DType t : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16})
    if (name == dtype_name(t)) return t;
  throw py::value_error("dtype: expected float32, float64, bfloat16 or float16, got " + name);
}

Problem problem_of(int64_t M, int64_t N, int64_t K, int64_t R, const std::string& format,
                   int64_t blocksize, const std::string& direction, const std::string& dtype) {
  if (M < 0 || N < 1 || K < 1 || R < 0)
    throw py::value_error("M, N, K, R: expected M >= 0, N >= 1, K >= 1, R >= 0");
  if (blocksize < 1) throw py::value_error("blocksize: expected at least 1");
  if (direction != "fwd" && direction != "dgrad")
    throw py::value_error("direction: expected fwd or dgrad, got " + direction);
  Problem p;
  p.format = format_of(format);
  p.direction = direction == "fwd" ? Direction::kFwd : Direction::kDgrad;
  p.dtype = dtype_of(dtype);
  p.M = M, p.N = N, p.K = K, p.R = R, p.blocksize = blocksize;
  return p;
}

py::dict plan(int64_t M, int64_t N, int64_t K, int64_t R, const std::string& format,
              int64_t blocksize, const std::string& direction, const std::string& dtype, int arch,
              int sm_count) {
  Problem p = problem_of(M, N, K, R, format, blocksize, direction, dtype);
  p.arch = arch, p.sm_count = sm_count;
  if (arch == 0) p.cpu_lanes = cpu::simd_lanes(), p.cpu_has_fast_bf16 = cpu::has_fast_bf16();
  const Plan chosen = make_plan(p);
  py::dict result;
  result["kernel"] = kernel_name(chosen.kernel);
  result["fuses_lora"] = chosen.fuses_lora;
  result["tile_rows"] = chosen.tile_rows;
  result["tile_tokens"] = chosen.tile_tokens;
  result["split"] = chosen.split;
  result["predicted_us"] = chosen.predicted_us;
  result["panel_rows"] = chosen.panel_rows;
  result["workspace_bytes"] = chosen.workspace_bytes;
  result["text"] = describe(p, chosen);
  return result;
}

py::dict machine_facts(const Machine& m) {
  py::dict facts;
  facts["name"] = m.name;
  facts["source"] = m.source;
  facts["arch"] = m.arch;
  facts["sm_count"] = m.sm_count;
  facts["read_gbs"] = m.read_gbs;
  facts["tflops_16bit"] = m.tflops_16bit;
  facts["tflops_fp32"] = m.tflops_fp32;
  return facts;
}

const Machine& machine_of(const std::string& name) {
  std::string known;
  for (const Machine& m : kMachines) {
    if (name == m.name) return m;
    known += known.empty() ? m.name : std::string(", ") + m.name;
  }
  throw py::value_error("machine: expected one of " + known + ", got " + name);
}

py::dict floor_of(int64_t M, int64_t N, int64_t K, int64_t R, const std::string& format,
                  int64_t blocksize, const std::string& direction, const std::string& dtype,
                  const std::string& machine, bool double_quant) {
  const Problem p = problem_of(M, N, K, R, format, blocksize, direction, dtype);
  const Machine& on = machine_of(machine);
  const Floor f = make_floor(p, on, double_quant);
  py::dict result;
  result["machine"] = machine_facts(on);
  result["bytes"] = f.bytes;
  result["flops"] = f.flops;
  result["memory_us"] = f.memory_us;
  result["compute_us"] = f.compute_us;
  result["us"] = f.us;
  result["bound"] = f.is_memory_bound ? "memory" : "compute";
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, format constants, kernel plans and their floors. Works without torch.";
  m.def("build_facts", &build_facts,
        "dict: version, torch_target, cuda, cuda_archs, sm90a, cpu_isa.");
  m.def("plan", &plan, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("R") = 0,
        py::arg("format") = "nf4", py::arg("blocksize") = 64, py::arg("direction") = "fwd",
        py::arg("dtype") = "bfloat16", py::arg("arch") = 0, py::arg("sm_count") = 0,
        "The kernel that serves this problem: dict of kernel, fuses_lora, tile_rows, tile_tokens, "
        "split, panel_rows, "
        "workspace_bytes, text. arch is the compute "
        "capability times 10, 0 for the CPU.");
  m.def("floor", &floor_of, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("R") = 0,
        py::arg("format") = "nf4", py::arg("blocksize") = 64, py::arg("direction") = "fwd",
        py::arg("dtype") = "bfloat16", py::arg("machine") = kMachines[0].name,
        py::arg("double_quant") = true,
        "The time that no kernel can beat on a machine of MACHINES: dict of machine, bytes, flops, "
        "memory_us, compute_us, us, bound.");
  py::list machines;
  for (const Machine& machine : kMachines) machines.append(machine_facts(machine));
  m.attr("MACHINES") = machines;
  m.attr("NF4_CODE") = std::vector<float>(kNf4Code, kNf4Code + 16);
  m.attr("TILE") =
      std::map<std::string, int>{{"n", kTileN}, {"k", kTileK}, {"strip_bytes", kStripBytes}};
}
