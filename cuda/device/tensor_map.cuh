// Host side of TMA: the maps that describe a matrix and a packed weight to the copy engine.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "../../csrc/core/params.h"
#include "../check.cuh"

namespace fastpeft::cuda {

using EncodeFn = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                              const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                              const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// libcuda is not linked: the driver's function is asked for once.
inline EncodeFn encoder() {
  static const EncodeFn fn = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult status;
    FASTPEFT_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                         cudaEnableDefault, &status));
    FASTPEFT_CHECK(
        f != nullptr,
        "the CUDA driver has no cuTensorMapEncodeTiled: a driver for CUDA 12 or newer is needed");
    return reinterpret_cast<EncodeFn>(f);
  }();
  return fn;
}

inline CUtensorMap matrix_map(const void* data, int64_t columns, int64_t rows, uint32_t box_columns,
                              uint32_t box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)},
                   strides[1] = {cuuint64_t(columns) * 2};
  const cuuint32_t box[2] = {box_columns, box_rows}, ones[2] = {1, 1};
  const CUresult status =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides,
                box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FASTPEFT_CHECK(status == CUDA_SUCCESS, "tensor map of a ", rows, " x ", columns,
                 " matrix: error ", int(status));
  return map;
}

// Boxes of 64 * row_groups output rows and 64 of the reduction.
inline CUtensorMap weight_map(const WeightView& w, bool dgrad, uint32_t row_groups) {
  CUtensorMap map;
  const cuuint64_t strips_k = ceil_div<int64_t>(w.K, 64), strips_n = ceil_div<int64_t>(w.N, 16);
  const cuuint64_t sizes[3] = {128, strips_k, strips_n}, strides[2] = {512, 512 * strips_k};
  const cuuint32_t box[3] = {128, dgrad ? row_groups : 1u, dgrad ? 4u : 4 * row_groups},
                   ones[3] = {1, 1, 1};
  const CUresult status =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT32, 3, const_cast<void*>(w.codes), sizes, strides,
                box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FASTPEFT_CHECK(status == CUDA_SUCCESS, "tensor map of the packed weight: error ", int(status));
  return map;
}

}  // namespace fastpeft::cuda
