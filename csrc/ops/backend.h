// Which backend serves a tensor, on which device and stream, and torch's own matmul. The only
// #ifdef for CUDA lives here and in backend.cpp.
#pragma once
#include <optional>

#include "../core/plan.h"
#include "../cpu/cpu.h"
#include "tensor_args.h"

#ifdef FASTPEFT_WITH_CUDA
#include "../../cuda/launch.h"
// FASTPEFT_RUN(backend, kernel, params): the kernel of that name on the backend's device.
#define FASTPEFT_RUN(backend, kernel, params) \
  ((backend).is_cuda() ? ::fastpeft::cuda::kernel(params) : ::fastpeft::cpu::kernel(params))
// Registers the ops of a file for every device that was built.
#define FASTPEFT_REGISTER(registration)          \
  STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {  \
    registration(m);                             \
  }                                              \
  STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) { \
    registration(m);                             \
  }
#else
#define FASTPEFT_RUN(backend, kernel, params) ::fastpeft::cpu::kernel(params)
#define FASTPEFT_REGISTER(registration)         \
  STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { \
    registration(m);                            \
  }
#endif

namespace fastpeft::ops {

// Device and current stream of a tensor, for the length of one op.
class Backend {
 public:
  explicit Backend(const Tensor& tensor);
  bool is_cuda() const { return is_cuda_; }
  Stream stream() const { return stream_; }
  int arch() const;      // compute capability * 10; 0 on the CPU
  int sm_count() const;  // multiprocessors, or threads

 private:
  bool is_cuda_;
  Stream stream_ = nullptr;
  // Opened only when the tensor's device is not the current one: cheaper than always.
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Programmatic dependent launch: switches it where asked, and tells whether it is on; always false
// without CUDA kernels.
bool dependent_launch(std::optional<bool> is_on);
// The facts of the current CUDA device, or of the CPU, that a plan depends on.
void set_device(Problem& problem, bool is_cuda);

// Uninitialised contiguous tensor on `like`'s device.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like);
Tensor empty_with_last(const Tensor& like, int64_t last);  // like's shape, last dimension replaced

// Views without the dispatcher: [rows, columns] with these strides, starting at element `offset`.
Tensor matrix_view(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride,
                   int64_t column_stride, int64_t offset = 0);
Tensor transposed(const Tensor& matrix);

// out = beta * add + alpha * a b through torch's matmul; `add` may be out itself or broadcast [N].
void addmm(const Tensor& out, const Tensor& add, const Tensor& a, const Tensor& b,
           double beta = 1.0, double alpha = 1.0);
void mm(const Tensor& out, const Tensor& a, const Tensor& b, double alpha = 1.0);
// The dtype in which small products beside the base are computed: float32 where torch's 16-bit
// matmul is the slower one (a CPU without matrix units: half the speed, and 20 us a call), else
// `dtype`.
ScalarType product_dtype(const Backend& backend, ScalarType dtype);
// Rows to take at a time where they are widened: few enough that the copies stay in cache and need
// no fresh pages (4096 wide, M = 512: 3.1 against 8.7 ms a gradient).
int64_t product_rows(ScalarType dtype, ScalarType product, int64_t M);
// int32 out = int8 a b; false where torch cannot (its CUDA path wants M > 16 and multiples of 8) or
// is slow (a CPU without AVX-512): then int8_epilogue does without.
bool int_mm(const Tensor& out, const Tensor& a, const Tensor& b);

}  // namespace fastpeft::ops
