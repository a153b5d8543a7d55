// lora_wgrad, dropout, and the low-rank products of qlinear_*. With z = drop(x), s = z A^T, y +=
// scaling * s B^T:
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

// The backend's own narrow products; where they are not, torch's matmul. float64 on the CPU is for
// gradient checks: plain loops serve it.
bool has_narrow_kernels(const Backend& backend, DType dtype, int64_t R, int64_t N, int64_t K) {
  if (!backend.is_cuda()) return dtype == DType::kFloat64;
  return is_16bit(dtype) && R <= 64 && N % 8 == 0 && K % 8 == 0 && std::max(N, K) < (1 << 24);
}

const int64_t* seed_pointer(double p, const OptionalTensor& seed) {
  return p > 0.0 ? static_cast<const int64_t*>(seed->data_ptr()) : nullptr;
}

// out (+)= alpha a b
void accumulate(const Tensor& out, const Tensor& a, const Tensor& b, double alpha, bool adds) {
  adds ? addmm(out, out, a, b, 1.0, alpha) : mm(out, a, b, alpha);
}

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

}  // namespace

// s [M, R] = drop(x) A^T; x [M, K] aligned, A in x's dtype.
Tensor shrink(const Backend& backend, const Tensor& x, const Tensor& lora_A, double dropout_p,
              const OptionalTensor& seed) {
  const int64_t M = x.size(0), K = x.size(1), R = lora_A.size(0);
  Tensor s = empty({M, R}, x.scalar_type(), x);
  if (M == 0) return s;
  const DType dtype = floating_dtype("x", x);
  // Many ranks and tokens without dropout: torch's matmul is the faster one (H200, R = 64, K =
  // 4096: M = 64 6.2 against 4.5 us here, 8192 21 against 27).
  const bool pays = !backend.is_cuda() || R <= 16 || M <= 64 || dropout_p > 0.0;
  if (pays && has_narrow_kernels(backend, dtype, R, K, K)) {
    LoraShrinkParams p;
    p.M = M;
    p.K = K;
    p.R = R;
    p.dtype = dtype;
    p.x = x.data_ptr();
    p.factor = lora_A.data_ptr();
    p.p = float(dropout_p);
    p.seed = seed_pointer(dropout_p, seed);
    p.s = s.data_ptr();
    p.stream = backend.stream();
    FASTPEFT_RUN(backend, lora_shrink, p);
    return s;
  }
  const ScalarType wide = product_dtype(backend, x.scalar_type());
  const Tensor z = dropout_p > 0.0 ? drop(backend, x, dropout_p, seed) : x;
  const Tensor wide_a = as_dtype(lora_A, wide);
  const Tensor wide_s = wide == x.scalar_type() ? s : empty({M, R}, wide, x);
  const int64_t most = product_rows(x.scalar_type(), wide, M);
  for (int64_t m = 0; m < M; m += most) {
    const int64_t count = std::min(most, M - m);
    mm(matrix_view(wide_s, count, R, R, 1, m * R),
       as_dtype(matrix_view(z, count, K, K, 1, m * K), wide), transposed(wide_a));
  }
  return as_dtype(wide_s, x.scalar_type());
}

// out [M, C] += drop(scale * s F^T) when `add` (no bias then), else out = that + bias (no dropout
// with a bias); F [C, R], or [R, C] when transposed. All in out's dtype and aligned.
void expand(const Backend& backend, const Tensor& out, const Tensor& s, const Tensor& factor,
            bool is_transposed, const OptionalTensor& bias, double scale, double dropout_p,
            const OptionalTensor& seed, bool add) {
  const int64_t M = out.size(0), C = out.size(1), R = s.size(1);
  const DType dtype = floating_dtype("out", out);
  // More ranks: torch's matmul writes as fast.
  if (has_narrow_kernels(backend, dtype, R, C, C) && (!backend.is_cuda() || R <= 16)) {
    LoraExpandParams p;
    p.M = M;
    p.C = C;
    p.R = R;
    p.dtype = dtype;
    p.s = s.data_ptr();
    p.factor = factor.data_ptr();
    p.is_transposed = is_transposed;
    p.bias = bias ? bias->data_ptr() : nullptr;
    p.scale = float(scale);
    p.p = float(dropout_p);
    p.seed = seed_pointer(dropout_p, seed);
    p.add = add;
    p.out = out.data_ptr();
    p.stream = backend.stream();
    FASTPEFT_RUN(backend, lora_expand, p);
    return;
  }
  const Tensor b = is_transposed ? factor : transposed(factor);
  if (dropout_p > 0.0) {
    Tensor branch = empty({M, C}, out.scalar_type(), out);
    mm(branch, s, b, scale);
    Tensor all = out;
    if (!add) torch::stable::zero_(all);
    drop_add(backend, out, branch, dropout_p, seed);
  } else if (add || !bias) {
    accumulate(out, s, b, scale, add);
  } else {
    addmm(out, *bias, s, b, 1.0, scale);
  }
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

namespace {

// Gradients by torch's matmul. dy [M, N], x [M, K], s [M, R], b [N, R] in x's dtype, M > 0.
std::tuple<Tensor, Tensor, Tensor> wgrad_by_matmul(const Backend& backend, const Tensor& dy,
                                                   const Tensor& x, const Tensor& s,
                                                   const Tensor& b, double scaling,
                                                   double dropout_p, const OptionalTensor& seed) {
  const int64_t M = x.size(0), N = b.size(0), K = x.size(1), R = b.size(1);
  const ScalarType dtype = product_dtype(backend, x.scalar_type());
  Tensor ds = empty({M, R}, dtype, x);
  Tensor dA = empty({R, K}, dtype, x), dB = empty({N, R}, dtype, x);
  const Tensor z = dropout_p > 0.0 ? drop(backend, x, dropout_p, seed) : x;
  const Tensor wide_b = as_dtype(b, dtype), wide_s = as_dtype(s, dtype);
  const int64_t most = product_rows(x.scalar_type(), dtype, M);
  for (int64_t m = 0; m < M; m += most) {
    const int64_t rows = std::min(most, M - m);
    const Tensor g = as_dtype(matrix_view(dy, rows, N, N, 1, m * N), dtype);
    const Tensor ds_part = matrix_view(ds, rows, R, R, 1, m * R);
    const Tensor s_part = matrix_view(wide_s, rows, R, R, 1, m * R);
    mm(ds_part, g, wide_b, scaling);
    accumulate(dB, transposed(g), s_part, scaling, m > 0);
    accumulate(dA, transposed(ds_part), as_dtype(matrix_view(z, rows, K, K, 1, m * K), dtype), 1.0,
               m > 0);
  }
  return {dA, dB, ds};
}

// The same by the backend's kernels, dA and dB in `grad` (x's dtype or float32).
std::tuple<Tensor, Tensor, Tensor> wgrad_by_kernels(const Backend& backend, const Tensor& dy,
                                                    const Tensor& x, const Tensor& s,
                                                    const Tensor& b, double scaling,
                                                    double dropout_p, const OptionalTensor& seed,
                                                    ScalarType grad) {
  LoraWgradParams p;
  p.M = x.size(0);
  p.N = b.size(0);
  p.K = x.size(1);
  p.R = b.size(1);
  p.dtype = floating_dtype("x", x);
  Tensor ds = empty({p.M, p.R}, x.scalar_type(), x);
  Tensor dA = empty({p.R, p.K}, grad, x), dB = empty({p.N, p.R}, grad, x);
  p.x = x.data_ptr();
  p.dy = dy.data_ptr();
  p.s = s.data_ptr();
  p.lora_b = b.data_ptr();
  p.scaling = float(scaling);
  p.p = float(dropout_p);
  p.seed = seed_pointer(dropout_p, seed);
  p.ds = ds.data_ptr();
  p.grad_dtype = floating_dtype("lora_A", grad);
  p.dA = dA.data_ptr();
  p.dB = dB.data_ptr();
  const Tensor workspace =
      empty({FASTPEFT_RUN(backend, lora_wgrad_workspace, p)}, ScalarType::Byte, x);
  p.workspace = workspace.data_ptr();
  p.stream = backend.stream();
  FASTPEFT_RUN(backend, lora_wgrad, p);
  return {dA, dB, ds};
}

}  // namespace

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
  const ScalarType grad = lora_A.scalar_type();
  if (M == 0) {
    Tensor dA = empty({R, K}, grad, x), dB = empty({N, R}, grad, x);
    torch::stable::zero_(dA);
    torch::stable::zero_(dB);
    return {dA, dB, empty({M, R}, x.scalar_type(), x)};
  }
  const Tensor dy_rows = matrix_view(aligned(dy), M, N, N, 1);
  const Tensor x_rows = matrix_view(aligned(x), M, K, K, 1), s_rows = aligned(s);
  // More ranks: torch's three products are faster (H200, R = 64, 4096 x 4096, M = 8192: 68 us
  // against 96).
  const bool pays = !backend.is_cuda() || R <= 16;
  if (pays && has_narrow_kernels(backend, floating_dtype("x", x), R, N, K))
    return wgrad_by_kernels(backend, dy_rows, x_rows, s_rows, b, scaling, dropout_p, seed, grad);
  auto [dA, dB, ds] =
      wgrad_by_matmul(backend, dy_rows, x_rows, s_rows, b, scaling, dropout_p, seed);
  return {as_dtype(dA, grad), as_dtype(dB, grad), as_dtype(ds, x.scalar_type())};
}

namespace {
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("lora_wgrad", TORCH_BOX(&lora_wgrad));
  m.impl("dropout", TORCH_BOX(&dropout));
}
}  // namespace

}  // namespace fastpeft::ops

FASTPEFT_REGISTER(fastpeft::ops::register_ops)
