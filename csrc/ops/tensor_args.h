// Checks of what users hand in: done once, here; the text names the tensor, what was expected and
// what was given. Includes torch's stable ABI for the whole of csrc/ops.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../core/params.h"

namespace fastpeft::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return torch::headeronly::toString(t);
  }
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline std::string device_text(const Tensor& t) {
  return t.is_cuda()  ? "cuda:" + std::to_string(t.get_device_index())
         : t.is_cpu() ? std::string("cpu")
                      : std::string("another device");
}

inline bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 ||
         t == ScalarType::Half;
}

// The kernels' name of a floating dtype; refuses the others.
inline DType floating_dtype(const char* name, ScalarType t) {
  STD_TORCH_CHECK(is_floating(t), name,
                  ": expected torch.float32, torch.bfloat16, torch.float16 or torch.float64, got ",
                  dtype_text(t));
  return t == ScalarType::Float      ? DType::kFloat32
         : t == ScalarType::Double   ? DType::kFloat64
         : t == ScalarType::BFloat16 ? DType::kBFloat16
                                     : DType::kFloat16;
}
inline DType floating_dtype(const char* name, const Tensor& t) {
  return floating_dtype(name, t.scalar_type());
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, name, ": expected ", dtype_text(expected), ", got ",
                  dtype_text(t.scalar_type()));
}

inline void check_device(const char* name, const Tensor& t, const char* like_name,
                         const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
                  name, " is on ", device_text(t), " but ", like_name, " is on ", device_text(like),
                  ": put both on one device");
}

inline void check_vector(const char* name, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count, name, ": expected shape [", count, "], got ",
                  shape_text(t));
}

inline void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name,
                  ": expected shape [", rows, ", ", columns, "], got ", shape_text(t));
}

inline void check_last(const char* name, const Tensor& t, int64_t last) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) == last, name, ": expected shape [..., ",
                  last, "], got ", shape_text(t));
}

inline Tensor contiguous_of(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Contiguous from a 16-byte boundary: bulk copies on the GPU ask for it; only odd slices are
// copied.
inline Tensor aligned(const Tensor& t) {
  const Tensor packed = contiguous_of(t);
  return reinterpret_cast<uintptr_t>(packed.data_ptr()) % 16 ? torch::stable::clone(packed)
                                                             : packed;
}

// Parameters may be float32 or x's dtype; kernels compute in x's.
inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// `name` may be x's dtype or float32 (a parameter kept in full precision): the result is x's dtype.
inline Tensor parameter(const char* name, const Tensor& t, const Tensor& x) {
  check_device(name, t, "x", x);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() || t.scalar_type() == ScalarType::Float, name,
                  ": expected ", dtype_text(x.scalar_type()), " like x, or torch.float32, got ",
                  dtype_text(t.scalar_type()));
  return aligned(as_dtype(t, x.scalar_type()));
}

inline int64_t row_count(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}

inline Format checked_format(int64_t format) {
  STD_TORCH_CHECK(format >= 0 && format <= 3,
                  "format: expected 0 (dense), 1 (nf4), 2 (fp4) or 3 (int8), got ", format);
  return Format(int32_t(format));
}

inline void check_blocksize(int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= kMinBlocksize && blocksize <= kMaxBlocksize &&
                      (blocksize & (blocksize - 1)) == 0,
                  "blocksize: expected a power of two in 32 ... 4096, got ", blocksize);
}

inline void check_dropout(double p, const OptionalTensor& seed, const Tensor& x) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p: expected a value in [0, 1), got ", p);
  if (p == 0.0) return;
  STD_TORCH_CHECK(seed.has_value(), "seed: expected int64 [1] because dropout_p > 0, got None");
  check_dtype("seed", *seed, ScalarType::Long);
  check_vector("seed", *seed, 1);
  check_device("seed", *seed, "x", x);
}

// A weight's tensors, held while kernels read them, and what kernels see of them.
struct WeightArgs {
  Tensor codes;
  OptionalTensor scales, nested;
  WeightView view;
};

// Refuses what does not fit together: format, blocksize, sizes, dtypes, devices.
// `like` (called like_name) is the activation tensor; dense codes must have its dtype.
WeightArgs weight_args(const Tensor& codes, const OptionalTensor& scales,
                       const OptionalTensor& nested, int64_t format, int64_t blocksize, int64_t N,
                       int64_t K, const char* like_name, const Tensor& like);

}  // namespace fastpeft::ops
