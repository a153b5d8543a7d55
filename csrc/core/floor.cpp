#include "floor.h"

#include <algorithm>

namespace fastpeft {

double weight_bytes(const Problem& p, bool is_double_quant) {
  const double weights = double(p.N) * double(p.K);
  if (p.format == Format::kDense) return weights * double(dtype_bytes(p.dtype));
  if (p.format == Format::kInt8) return weights + 4.0 * double(p.N);
  const double scale_bytes = is_double_quant ? 1.0 + 4.0 / kNestedBlock : 4.0;
  return weights * (0.5 + scale_bytes / double(p.blocksize));
}

Floor make_floor(const Problem& p, const Machine& machine, bool is_double_quant) {
  const double M = double(p.M), N = double(p.N), K = double(p.K), R = double(p.R);
  const double tflops = p.dtype == DType::kFloat64   ? 0.0
                        : p.dtype == DType::kFloat32 ? machine.tflops_fp32
                                                     : machine.tflops_16bit;
  Floor floor;
  floor.bytes = weight_bytes(p, is_double_quant) + double(dtype_bytes(p.dtype)) * (M + R) * (N + K);
  floor.flops = 2.0 * M * N * K + 2.0 * M * R * (N + K);
  floor.memory_us = floor.bytes / machine.read_gbs / 1e3;
  floor.compute_us = tflops > 0.0 ? floor.flops / tflops / 1e6 : 0.0;
  floor.us = std::max(floor.memory_us, floor.compute_us);
  floor.is_memory_bound = floor.memory_us >= floor.compute_us;
  return floor;
}

}  // namespace fastpeft
