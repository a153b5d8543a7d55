#include "backend.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <vector>

// torch's C shims of its CUDA side are weak: the same library must load where torch has no CUDA.
#define FASTPEFT_WEAK extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
FASTPEFT_WEAK aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
FASTPEFT_WEAK aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);
FASTPEFT_WEAK aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle add,
                                        AtenTensorHandle a, AtenTensorHandle b, double beta,
                                        double alpha);
FASTPEFT_WEAK aoti_torch_cuda__int_mm_out(AtenTensorHandle out, AtenTensorHandle a,
                                          AtenTensorHandle b);

namespace fastpeft::ops {

namespace {

void torch_pool(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t),
                void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// One thread pool serves torch and our kernels.
const bool g_pool_is_set = (cpu::set_parallel_for(torch_pool), true);

void check_matmul(AOTITorchError code, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(code == AOTI_TORCH_SUCCESS, "torch's matmul failed on ", shape_text(a), " and ",
                  shape_text(b), " of ", dtype_text(a.scalar_type()));
}

}  // namespace

Backend::Backend(const Tensor& tensor) : is_cuda_(tensor.is_cuda()) {
  if (!is_cuda_) return;
#ifdef FASTPEFT_WITH_CUDA
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this torch has no CUDA: no current stream to launch on");
  const int32_t device = tensor.get_device_index();
  int32_t current = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&current));
  if (current != device) guard_.emplace(device);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
#endif
}

int Backend::arch() const {
#ifdef FASTPEFT_WITH_CUDA
  if (is_cuda_) return cuda::device_facts().arch;
#endif
  return 0;
}

int Backend::sm_count() const {
#ifdef FASTPEFT_WITH_CUDA
  if (is_cuda_) return cuda::device_facts().sm_count;
#endif
  return int(torch::stable::get_num_threads());
}

bool dependent_launch(std::optional<bool> is_on) {
#ifdef FASTPEFT_WITH_CUDA
  if (is_on) cuda::set_dependent_launch(*is_on);
  return cuda::dependent_launch();
#else
  (void)is_on;
  return false;
#endif
}

void set_device(Problem& problem, bool is_cuda) {
  if (is_cuda) {
#ifdef FASTPEFT_WITH_CUDA
    const cuda::DeviceFacts facts = cuda::device_facts();
    problem.arch = facts.arch;
    problem.sm_count = facts.sm_count;
    return;
#else
    STD_TORCH_CHECK(false, "is_cuda: this library was built without CUDA kernels");
#endif
  }
  problem.arch = 0;
  problem.sm_count = int(torch::stable::get_num_threads());
  problem.cpu_lanes = cpu::simd_lanes();
  problem.cpu_has_fast_bf16 = cpu::has_fast_bf16();
}

Tensor empty_sized(const int64_t* sizes, int64_t dims, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(dims);
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &result));
  return Tensor(result);
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return empty_sized(sizes.begin(), int64_t(sizes.size()), dtype, like);
}

Tensor empty_with_last(const Tensor& like, int64_t last) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = last;
  return empty_sized(sizes.data(), int64_t(sizes.size()), like.scalar_type(), like);
}

Tensor matrix_view(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride,
                   int64_t column_stride, int64_t offset) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &result));
  return Tensor(result);
}

Tensor transposed(const Tensor& matrix) {
  return matrix_view(matrix, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0));
}

void addmm(const Tensor& out, const Tensor& add, const Tensor& a, const Tensor& b, double beta,
           double alpha) {
  const auto call = a.is_cuda() ? aoti_torch_cuda_addmm_out : aoti_torch_cpu_addmm_out;
  check_matmul(call(out.get(), add.get(), a.get(), b.get(), beta, alpha), a, b);
}

void mm(const Tensor& out, const Tensor& a, const Tensor& b, double alpha) {
  if (alpha != 1.0) return addmm(out, out, a, b, 0.0, alpha);  // beta 0: out is not read
  const auto call = a.is_cuda() ? aoti_torch_cuda_mm_out : aoti_torch_cpu_mm_out;
  check_matmul(call(out.get(), a.get(), b.get()), a, b);
}

ScalarType product_dtype(const Backend& backend, ScalarType dtype) {
  const bool is_bf16 = dtype == ScalarType::BFloat16,
             is_16bit = is_bf16 || dtype == ScalarType::Half;
  if (backend.is_cuda() || !is_16bit || (is_bf16 && cpu::has_fast_bf16())) return dtype;
  return ScalarType::Float;
}

int64_t product_rows(ScalarType dtype, ScalarType product, int64_t M) {
  return dtype == product ? M : std::min<int64_t>(M, 128);
}

bool int_mm(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (a.is_cuda()) {
    if (a.size(0) <= 16 || a.size(1) % 8 || b.size(1) % 8) return false;
    check_matmul(aoti_torch_cuda__int_mm_out(out.get(), a.get(), b.get()), a, b);
    return true;
  }
  if (!cpu::has_fast_int_mm()) return false;
  check_matmul(aoti_torch_cpu__int_mm_out(out.get(), a.get(), b.get()), a, b);
  return true;
}

}  // namespace fastpeft::ops
