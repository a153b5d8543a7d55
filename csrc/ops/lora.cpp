// lora_wgrad, dropout. With z = drop(x), s = z A^T, y += scaling * s B^T:
//   ds = scaling * dy B,  dB = scaling * dy^T s,  dA = ds^T z
#include "backend.h"

namespace fastpeft::ops {

namespace {

DropoutParams dropout_params(const Backend& backend, const Tensor& x, const Tensor& y, double p,
                             const OptionalTensor& seed) {
  DropoutParams params;
  params.count = x.numel();
  params.dtype = floating_dtype("x", x);
  params.x = x.data_ptr();
  params.p = float(p);
  params.seed = static_cast<const int64_t*>(seed->data_ptr());
  params.y = y.data_ptr();
  params.stream = backend.stream();
  return params;
}

// out (+)= alpha a b
void accumulate(const Tensor& out, const Tensor& a, const Tensor& b, double alpha, bool adds) {
  adds ? addmm(out, out, a, b, 1.0, alpha) : mm(out, a, b, alpha);
}

}  // namespace

// A dropped copy of contiguous x.
Tensor drop(const Backend& backend, const Tensor& x, double p, const OptionalTensor& seed) {
  Tensor y = empty_with_last(x, x.size(x.dim() - 1));
  const DropoutParams params = dropout_params(backend, x, y, p, seed);
  if (params.count > 0) FASTPEFT_RUN(backend, dropout, params);
  return y;
}

// y += drop(x), both contiguous.
void drop_add(const Backend& backend, const Tensor& y, const Tensor& x, double p,
              const OptionalTensor& seed) {
  DropoutParams params = dropout_params(backend, x, y, p, seed);
  params.add = true;
  if (params.count > 0) FASTPEFT_RUN(backend, dropout, params);
}

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  floating_dtype("x", x);
  check_dropout(p, seed, x);
  if (x.dim() == 0 || p == 0.0) {
    STD_TORCH_CHECK(p == 0.0, "x: expected shape [..., K], got a scalar");
    return torch::stable::clone(contiguous_of(x));
  }
  const Backend backend(x);
  return drop(backend, contiguous_of(x), p, seed);
}

std::tuple<Tensor, Tensor, Tensor> lora_wgrad(const Tensor& dy, const Tensor& x, const Tensor& s,
                                              const Tensor& lora_A, const Tensor& lora_B,
                                              double scaling, double dropout_p,
                                              const OptionalTensor& seed) {
  floating_dtype("x", x);
  check_dtype("dy", dy, x.scalar_type());
  check_device("dy", dy, "x", x);
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(0) > 0,
                  "lora_A: expected shape [R, K] with R > 0, got ", shape_text(lora_A));
  const int64_t R = lora_A.size(0), K = lora_A.size(1), M = row_count(x);
  check_last("x", x, K);
  const int64_t N = lora_B.dim() == 2 ? lora_B.size(0) : 0;
  check_matrix("lora_B", lora_B, N, R);
  check_last("dy", dy, N);
  STD_TORCH_CHECK(row_count(dy) == M, "dy: expected as many rows as x ", shape_text(x), ", got ",
                  shape_text(dy));
  check_matrix("s", s, M, R);
  check_dtype("s", s, x.scalar_type());
  check_device("s", s, "x", x);
  check_dropout(dropout_p, seed, x);
  parameter("lora_A", lora_A, x);  // refuses wrong dtypes and devices; its values are not needed
  const Tensor b = parameter("lora_B", lora_B, x);
  const Backend backend(x);
  const Tensor dy_rows = matrix_view(contiguous_of(dy), M, N, N, 1);
  const Tensor x_rows = matrix_view(contiguous_of(x), M, K, K, 1);
  const ScalarType dtype = product_dtype(backend, x.scalar_type());
  Tensor ds = empty({M, R}, dtype, x);
  Tensor dA = empty({R, K}, dtype, x), dB = empty({N, R}, dtype, x);
  if (M == 0) {
    torch::stable::zero_(dA);
    torch::stable::zero_(dB);
  } else {
    const Tensor z = dropout_p > 0.0 ? drop(backend, x_rows, dropout_p, seed) : x_rows;
    const Tensor wide_b = as_dtype(b, dtype), wide_s = as_dtype(contiguous_of(s), dtype);
    const int64_t most = product_rows(x.scalar_type(), dtype, M);
    for (int64_t m = 0; m < M; m += most) {
      const int64_t rows = std::min(most, M - m);
      const Tensor g = as_dtype(matrix_view(dy_rows, rows, N, N, 1, m * N), dtype);
      const Tensor ds_part = matrix_view(ds, rows, R, R, 1, m * R);
      const Tensor s_part = matrix_view(wide_s, rows, R, R, 1, m * R);
      mm(ds_part, g, wide_b, scaling);
      accumulate(dB, transposed(g), s_part, scaling, m > 0);
      accumulate(dA, transposed(ds_part), as_dtype(matrix_view(z, rows, K, K, 1, m * K), dtype),
                 1.0, m > 0);
    }
  }
  return {as_dtype(dA, lora_A.scalar_type()), as_dtype(dB, lora_A.scalar_type()),
          as_dtype(ds, x.scalar_type())};
}

namespace {
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("lora_wgrad", TORCH_BOX(&lora_wgrad));
  m.impl("dropout", TORCH_BOX(&dropout));
}
}  // namespace

}  // namespace fastpeft::ops

FASTPEFT_REGISTER(fastpeft::ops::register_ops)
