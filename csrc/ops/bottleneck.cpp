// bottleneck_fwd, bottleneck_bwd. With z = x D^T, h = act(z + b_d), u = h U^T,
// y = residual + scaling * (u + b_u), and g = scaling * dy:
//   dU = g^T h,  db_u = sum g,  dz = (g U) * act'(z + b_d),  dD = dz^T x,  db_d = sum dz,  dx = dz
//   D
// The hidden layer [M, D] is recomputed in the backward pass, never kept.
#include "backend.h"

namespace fastpeft::ops {

namespace {

struct Bottleneck {
  DType dtype;
  int64_t M, K, D;
  Tensor x, down, up;  // [M, K], [D, K], [K, D] in x's dtype
  OptionalTensor down_bias, up_bias;
  Activation activation;
};

Bottleneck bottleneck_args(const Tensor& x, const Tensor& down, const OptionalTensor& down_bias,
                           const Tensor& up, const OptionalTensor& up_bias, int64_t activation) {
  const DType dtype = floating_dtype("x", x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0,
                  "x: expected shape [..., K] with K > 0, got ", shape_text(x));
  const int64_t K = x.size(x.dim() - 1), M = row_count(x);
  STD_TORCH_CHECK(down.dim() == 2 && down.size(0) > 0,
                  "down: expected shape [D, K] with D > 0, got ", shape_text(down));
  const int64_t D = down.size(0);
  check_matrix("down", down, D, K);
  check_matrix("up", up, K, D);
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::kIdentity),
                  "activation: expected 0 (relu), 1 (gelu), 2 (gelu_tanh), 3 (silu), 4 (tanh) or "
                  "5 (identity), got ",
                  activation);
  Bottleneck b{dtype,
               M,
               K,
               D,
               matrix_view(contiguous_of(x), M, K, K, 1),
               parameter("down", down, x),
               parameter("up", up, x),
               {},
               {},
               Activation(int32_t(activation))};
  if (down_bias) {
    check_vector("down_bias", *down_bias, D);
    b.down_bias = parameter("down_bias", *down_bias, x);
  }
  if (up_bias) {
    check_vector("up_bias", *up_bias, K);
    b.up_bias = parameter("up_bias", *up_bias, x);
  }
  return b;
}

// z = x D^T + b_d, the bias added before the one rounding to a 16-bit dtype: added to a rounded
// product it would cancel, and relu would take the other side for more elements than torch's does.
void down_product(const Tensor& z, const Bottleneck& b) {
  b.down_bias ? addmm(z, *b.down_bias, b.x, transposed(b.down)) : mm(z, b.x, transposed(b.down));
}

BottleneckActParams act_params(const Backend& backend, const Bottleneck& b, const Tensor& z,
                               const Tensor& h) {
  BottleneckActParams p;
  p.M = b.M;
  p.D = b.D;
  p.dtype = b.dtype;
  p.activation = b.activation;
  p.z = z.data_ptr();
  p.h = h.data_ptr();
  p.stream = backend.stream();
  return p;
}

Tensor sum_rows(const Tensor& matrix) {
  const int64_t rows[1] = {0};
  return torch::stable::sum(matrix, torch::headeronly::IntHeaderOnlyArrayRef(rows, 1));
}

Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  Tensor t = empty(sizes, dtype, like);
  torch::stable::zero_(t);
  return t;
}

}  // namespace

Tensor bottleneck_fwd(const Tensor& x, const Tensor& down, const OptionalTensor& down_bias,
                      const Tensor& up, const OptionalTensor& up_bias, int64_t activation,
                      double scaling, const OptionalTensor& residual) {
  const Bottleneck b = bottleneck_args(x, down, down_bias, up, up_bias, activation);
  OptionalTensor rest;
  if (residual) {
    check_dtype("residual", *residual, x.scalar_type());
    check_device("residual", *residual, "x", x);
    bool is_same_shape = residual->dim() == x.dim();
    for (int64_t d = 0; is_same_shape && d < x.dim(); ++d)
      is_same_shape = residual->size(d) == x.size(d);
    STD_TORCH_CHECK(is_same_shape, "residual: expected x's shape ", shape_text(x), ", got ",
                    shape_text(*residual));
    rest = contiguous_of(*residual);
  }
  const Backend backend(x);
  Tensor y = empty_with_last(x, b.K);
  if (b.M == 0) return y;
  Tensor h = empty({b.M, b.D}, x.scalar_type(), x);
  Tensor u = empty({b.M, b.K}, x.scalar_type(), x);
  down_product(h, b);
  const BottleneckActParams act = act_params(backend, b, h, h);
  FASTPEFT_RUN(backend, bottleneck_act_fwd, act);
  mm(u, h, transposed(b.up));
  BottleneckOutParams out;
  out.M = b.M;
  out.K = b.K;
  out.dtype = b.dtype;
  out.u = u.data_ptr();
  out.bias = b.up_bias ? b.up_bias->data_ptr() : nullptr;
  out.residual = rest ? rest->data_ptr() : nullptr;
  out.scaling = float(scaling);
  out.y = y.data_ptr();
  out.stream = backend.stream();
  FASTPEFT_RUN(backend, bottleneck_out, out);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_bwd(
    const Tensor& dy, const Tensor& x, const Tensor& down, const OptionalTensor& down_bias,
    const Tensor& up, const OptionalTensor& up_bias, int64_t activation, double scaling) {
  const Bottleneck b = bottleneck_args(x, down, down_bias, up, up_bias, activation);
  check_dtype("dy", dy, x.scalar_type());
  check_device("dy", dy, "x", x);
  check_last("dy", dy, b.K);
  STD_TORCH_CHECK(row_count(dy) == b.M, "dy: expected x's shape ", shape_text(x), ", got ",
                  shape_text(dy));
  const ScalarType dtype = x.scalar_type();
  const Backend backend(x);
  const int64_t down_bias_size = down_bias ? b.D : 0, up_bias_size = up_bias ? b.K : 0;
  const ScalarType down_bias_dtype = down_bias ? down_bias->scalar_type() : dtype;
  const ScalarType up_bias_dtype = up_bias ? up_bias->scalar_type() : dtype;
  Tensor dx = empty_with_last(x, b.K);
  if (b.M == 0) {
    return {dx, zeros({b.D, b.K}, down.scalar_type(), x),
            zeros({down_bias_size}, down_bias_dtype, x), zeros({b.K, b.D}, up.scalar_type(), x),
            zeros({up_bias_size}, up_bias_dtype, x)};
  }
  const Tensor dy_rows = matrix_view(contiguous_of(dy), b.M, b.K, b.K, 1);
  Tensor z = empty({b.M, b.D}, dtype, x), h = empty({b.M, b.D}, dtype, x);
  Tensor dh = empty({b.M, b.D}, dtype, x), dz = empty({b.M, b.D}, dtype, x);
  Tensor ddown = empty({b.D, b.K}, dtype, x), dup = empty({b.K, b.D}, dtype, x);
  down_product(z, b);
  mm(dh, dy_rows, b.up, scaling);
  BottleneckActParams act = act_params(backend, b, z, h);
  act.dh = dh.data_ptr();
  act.dz = dz.data_ptr();
  FASTPEFT_RUN(backend, bottleneck_act_bwd, act);
  mm(dup, transposed(dy_rows), h, scaling);
  mm(ddown, transposed(dz), b.x);
  mm(matrix_view(dx, b.M, b.K, b.K, 1), dz, b.down);
  Tensor ddown_bias = down_bias ? as_dtype(sum_rows(dz), down_bias_dtype) : empty({0}, dtype, x);
  Tensor dup_bias = empty({0}, dtype, x);
  if (up_bias) {
    // scaling * sum of dy as a product with a row of ones, so that the scaling costs no pass
    Tensor ones = torch::stable::fill_(empty({1, b.M}, dtype, x), 1.0);
    Tensor sum = empty({1, b.K}, dtype, x);
    mm(sum, ones, dy_rows, scaling);
    dup_bias = as_dtype(torch::stable::reshape(sum, {b.K}), up_bias_dtype);
  }
  return {dx, as_dtype(ddown, down.scalar_type()), ddown_bias, as_dtype(dup, up.scalar_type()),
          dup_bias};
}

namespace {
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("bottleneck_fwd", TORCH_BOX(&bottleneck_fwd));
  m.impl("bottleneck_bwd", TORCH_BOX(&bottleneck_bwd));
}
}  // namespace

}  // namespace fastpeft::ops

FASTPEFT_REGISTER(fastpeft::ops::register_ops)
