// qlinear_fwd, qlinear_dgrad: plan -> fused kernel, dequantise + torch's matmul, or LLM.int8().
#include "backend.h"

namespace fastpeft::ops {

Tensor shrink(const Backend& backend, const Tensor& x, const Tensor& lora_A, double dropout_p,
              const OptionalTensor& seed);
void expand(const Backend& backend, const Tensor& out, const Tensor& s, const Tensor& factor,
            bool is_transposed, const OptionalTensor& bias, double scale, double dropout_p,
            const OptionalTensor& seed, bool add);

namespace {

Plan plan_for(const Backend& backend, const WeightView& w, Direction direction, DType dtype,
              int64_t M, int64_t R, bool has_int8_activations = false) {
  Problem problem;
  problem.has_int8_activations = has_int8_activations;
  problem.format = w.format;
  problem.direction = direction;
  problem.dtype = dtype;
  problem.M = M;
  problem.N = w.N;
  problem.K = w.K;
  problem.R = R;
  problem.blocksize = w.blocksize;
  problem.arch = backend.arch();
  problem.sm_count = backend.sm_count();
  if (!backend.is_cuda()) {
    problem.cpu_lanes = cpu::simd_lanes();
    problem.cpu_has_fast_bf16 = cpu::has_fast_bf16();
  }
  return make_plan(problem);
}

void dequantize_rows(const Backend& backend, const WeightView& w, DType dtype, int64_t begin,
                     int64_t end, const Tensor& out) {
  DequantizeParams p;
  p.w = w;
  p.row_begin = begin;
  p.row_end = end;
  p.dtype = dtype;
  p.out = out.data_ptr();
  p.stream = backend.stream();
  FASTPEFT_RUN(backend, dequantize, p);
}

// y [M, N] = x W^T + bias
void linear(const Tensor& y, const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  bias ? addmm(y, *bias, x, transposed(w)) : mm(y, x, transposed(w));
}

struct LowRank {
  Tensor s, b;  // [M, R], [N, R] in x's dtype
  double scaling;
};

// Where quantize_rows puts the outlier columns, and int8_epilogue finds them: pieces of one tensor.
OutlierColumns outlier_columns(const Tensor& memory, int64_t M, int64_t K, int64_t capacity) {
  const int64_t list_bytes = round_up<int64_t>(4 * (1 + K), 256), row_bytes = 2 * capacity;
  char* at = static_cast<char*>(memory.data_ptr());
  OutlierColumns columns;
  columns.capacity = capacity;
  columns.list = reinterpret_cast<int32_t*>(at);
  if (capacity == 0) return columns;
  columns.x = at + list_bytes;
  columns.w = at + list_bytes + round_up<int64_t>(M * row_bytes, 256);
  return columns;
}

int64_t outlier_bytes(int64_t M, int64_t N, int64_t K, int64_t capacity) {
  return round_up<int64_t>(4 * (1 + K), 256) + round_up<int64_t>(M * 2 * capacity, 256) +
         N * 2 * capacity;
}

// LLM.int8(): rows of x to int8; the product of the inliers; then, in one pass or behind the sums
// in registers, scales, outlier columns, bias and, where the plan says so, the low-rank product.
void int8_fwd(const Backend& backend, const WeightArgs& w, const Plan& plan, DType dtype,
              double threshold, const Tensor& x, const OptionalTensor& bias,
              const std::optional<LowRank>& lora, const Tensor& y) {
  const int64_t M = x.size(0), N = w.view.N, K = w.view.K;
  const bool is_fused = plan.kernel != KernelId::kIntMatmul;
  Tensor q = empty({M, K}, ScalarType::Char, x), scale = empty({M}, ScalarType::Float, x);
  Tensor outlier = empty({K}, ScalarType::Byte, x), acc, columns;
  QuantizeRowsParams rows;
  rows.M = M;
  rows.K = K;
  rows.dtype = dtype;
  rows.x = x.data_ptr();
  rows.threshold = float(threshold);
  rows.q = static_cast<int8_t*>(q.data_ptr());
  rows.scale = static_cast<float*>(scale.data_ptr());
  rows.outlier = static_cast<uint8_t*>(outlier.data_ptr());
  rows.stream = backend.stream();
  if (is_fused && threshold > 0.0) {
    rows.w = w.view;
    columns = empty({outlier_bytes(M, N, K, plan.outlier_capacity)}, ScalarType::Byte, x);
    rows.columns = outlier_columns(columns, M, K, plan.outlier_capacity);
  }
  FASTPEFT_RUN(backend, quantize_rows, rows);
  Int8EpilogueParams p;
  p.w = w.view;
  p.M = M;
  p.dtype = dtype;
  if (!is_fused) {
    acc = empty({M, N}, ScalarType::Int, x);
    if (int_mm(acc, q, transposed(w.codes))) p.acc = static_cast<const int32_t*>(acc.data_ptr());
  }
  p.tile_tokens = plan.tile_tokens;
  p.split = plan.split;
  p.q = rows.q;
  p.scale = rows.scale;
  p.outlier = threshold > 0.0 ? rows.outlier : nullptr;
  p.columns = rows.columns;
  p.x = rows.x;
  p.bias = bias ? bias->data_ptr() : nullptr;
  if (lora && plan.fuses_lora) {
    p.R = lora->s.size(1);
    p.s = lora->s.data_ptr();
    p.lora_b = lora->b.data_ptr();
    p.scaling = float(lora->scaling);
  }
  p.y = y.data_ptr();
  p.stream = backend.stream();
  FASTPEFT_RUN(backend, int8_epilogue, p);
}

// One launch; `lora` rides along when the plan says so.
void fused_fwd(const Backend& backend, const WeightArgs& w, const Plan& plan, DType dtype,
               const Tensor& x, const OptionalTensor& bias, const std::optional<LowRank>& lora,
               const Tensor& y) {
  QLinearFwdParams p;
  p.w = w.view;
  p.M = x.size(0);
  p.dtype = dtype;
  p.x = x.data_ptr();
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.plan = plan;
  if (lora && plan.fuses_lora) {
    p.R = lora->s.size(1);
    p.s = lora->s.data_ptr();
    p.lora_b = lora->b.data_ptr();
    p.scaling = float(lora->scaling);
  }
  p.y = y.data_ptr();
  p.stream = backend.stream();
  FASTPEFT_RUN(backend, qlinear_fwd, p);
}

// A dense base with its branch as one product, which wants an aligned weight.
bool is_one_product(const Plan& plan, const WeightView& w) {
  return plan.kernel == KernelId::kDense && plan.fuses_lora &&
         reinterpret_cast<uintptr_t>(w.codes) % 16 == 0;
}

void panels_fwd(const Backend& backend, const WeightArgs& w, DType dtype, int64_t panel_rows,
                const Tensor& x, const OptionalTensor& bias, const Tensor& y) {
  const int64_t M = x.size(0), N = w.view.N, K = w.view.K;
  Tensor panel = empty({std::min(panel_rows, N), K}, x.scalar_type(), x);
  for (int64_t n = 0; n < N; n += panel_rows) {
    const int64_t rows = std::min(panel_rows, N - n);
    dequantize_rows(backend, w.view, dtype, n, n + rows, panel);
    const Tensor y_part = matrix_view(y, M, rows, N, 1, n);
    const Tensor w_part = matrix_view(panel, K, rows, 1, K);
    if (bias) {
      addmm(y_part, matrix_view(*bias, 1, rows, rows, 1, n), x, w_part);
    } else {
      mm(y_part, x, w_part);
    }
  }
}

// y = x W^T + bias, and whether `lora` was added on the way.
bool base_fwd(const Backend& backend, const WeightArgs& w, DType dtype, double threshold,
              const Tensor& x, const OptionalTensor& bias, const std::optional<LowRank>& lora,
              const Tensor& y) {
  const bool has_int8_activations = w.view.format == Format::kInt8 && threshold >= 0.0;
  const int64_t R = lora ? lora->s.size(1) : 0;
  const Plan plan =
      plan_for(backend, w.view, Direction::kFwd, dtype, x.size(0), R, has_int8_activations);
  if (has_int8_activations) {
    int8_fwd(backend, w, plan, dtype, threshold, x, bias, lora, y);
    return plan.fuses_lora;
  }
  switch (plan.kernel) {
    case KernelId::kFused:
    case KernelId::kWgmma:
    case KernelId::kNarrow:
      fused_fwd(backend, w, plan, dtype, x, bias, lora, y);
      return plan.fuses_lora;
    case KernelId::kPanels:
      panels_fwd(backend, w, dtype, plan.panel_rows, x, bias, y);
      return false;
    case KernelId::kDense:
      if (!lora || !backend.is_cuda()) {
        linear(y, x, w.codes, bias);
        return false;
      }
      if (is_one_product(plan, w.view)) {
        fused_fwd(backend, w, plan, dtype, x, bias, lora, y);
        return true;
      }
      // Branch and bias first, then the product onto them: y is written twice and read once.
      expand(backend, y, lora->s, lora->b, false, bias, lora->scaling, 0.0, {}, false);
      addmm(y, y, x, transposed(w.codes));
      return true;
    case KernelId::kIntMatmul:
    case KernelId::kDequantMatmul:
      break;
  }
  Tensor dense = empty({w.view.N, w.view.K}, x.scalar_type(), x);
  dequantize_rows(backend, w.view, dtype, 0, w.view.N, dense);
  linear(y, x, dense, bias);
  return false;
}

}  // namespace

std::tuple<Tensor, Tensor> qlinear_fwd(const Tensor& x, const Tensor& codes,
                                       const OptionalTensor& scales, const OptionalTensor& nested,
                                       int64_t format, int64_t blocksize, int64_t N,
                                       double threshold, const OptionalTensor& bias,
                                       const OptionalTensor& lora_A, const OptionalTensor& lora_B,
                                       double scaling, double dropout_p,
                                       const OptionalTensor& seed) {
  const DType dtype = floating_dtype("x", x);
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected shape [..., K], got a scalar");
  const int64_t K = x.size(x.dim() - 1), M = row_count(x);
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(),
                  "lora_A and lora_B: give both or neither");
  const WeightArgs w = weight_args(codes, scales, nested, format, blocksize, N, K, "x", x);
  OptionalTensor bias_x;
  if (bias) {
    check_vector("bias", *bias, N);
    bias_x = parameter("bias", *bias, x);
  }
  const Backend backend(x);
  const Tensor rows = matrix_view(aligned(x), M, K, K, 1);
  Tensor y = empty_with_last(x, N);
  const Tensor y_rows = matrix_view(y, M, N, N, 1);
  std::optional<LowRank> lora;
  if (lora_A) {
    const int64_t R = lora_A->dim() == 2 ? lora_A->size(0) : 0;
    STD_TORCH_CHECK(R > 0, "lora_A: expected shape [R, K] with R > 0, got ", shape_text(*lora_A));
    check_matrix("lora_A", *lora_A, R, K);
    check_matrix("lora_B", *lora_B, N, R);
    check_dropout(dropout_p, seed, x);
    const Tensor a = parameter("lora_A", *lora_A, x);
    lora = LowRank{shrink(backend, rows, a, dropout_p, seed), parameter("lora_B", *lora_B, x),
                   scaling};
  }
  if (M > 0) {
    const bool is_added = base_fwd(backend, w, dtype, threshold, rows, bias_x, lora, y_rows);
    if (lora && !is_added)
      expand(backend, y_rows, lora->s, lora->b, false, {}, scaling, 0.0, {}, true);
  }
  return {y, lora ? lora->s : empty({0}, x.scalar_type(), x)};
}

Tensor qlinear_dgrad(const Tensor& dy, const Tensor& codes, const OptionalTensor& scales,
                     const OptionalTensor& nested, int64_t format, int64_t blocksize, int64_t K,
                     const OptionalTensor& ds, const OptionalTensor& lora_A, double dropout_p,
                     const OptionalTensor& seed) {
  const DType dtype = floating_dtype("dy", dy);
  STD_TORCH_CHECK(dy.dim() >= 1, "dy: expected shape [..., N], got a scalar");
  const int64_t N = dy.size(dy.dim() - 1), M = row_count(dy);
  STD_TORCH_CHECK(ds.has_value() == lora_A.has_value(), "ds and lora_A: give both or neither");
  const WeightArgs w = weight_args(codes, scales, nested, format, blocksize, N, K, "dy", dy);
  const Backend backend(dy);
  const Tensor rows = matrix_view(aligned(dy), M, N, N, 1);
  Tensor dx = empty_with_last(dy, K);
  const Tensor dx_rows = matrix_view(dx, M, K, K, 1);
  OptionalTensor low_rank, a;
  int64_t R = 0;
  if (ds) {
    R = ds->dim() == 2 ? ds->size(1) : 0;
    check_matrix("ds", *ds, M, R);
    check_matrix("lora_A", *lora_A, R, K);
    check_dtype("ds", *ds, dy.scalar_type());
    check_device("ds", *ds, "dy", dy);
    check_dropout(dropout_p, seed, dy);
    low_rank = aligned(*ds);
    a = parameter("lora_A", *lora_A, dy);
  }
  if (M == 0) return dx;
  const Plan plan = plan_for(backend, w.view, Direction::kDgrad, dtype, M, R);
  const bool is_one = ds && dropout_p == 0.0 && is_one_product(plan, w.view);
  const bool is_fused = plan.kernel == KernelId::kFused || plan.kernel == KernelId::kWgmma ||
                        plan.kernel == KernelId::kNarrow || is_one;
  const bool fuses_ds = is_fused && plan.fuses_lora && ds && dropout_p == 0.0;
  if (is_fused) {
    QLinearDgradParams p;
    p.w = w.view;
    p.M = M;
    p.dtype = dtype;
    p.dy = rows.data_ptr();
    p.plan = plan;
    if (fuses_ds) {
      p.R = R;
      p.ds = low_rank->data_ptr();
      p.lora_a = a->data_ptr();
    }
    p.dx = dx.data_ptr();
    p.stream = backend.stream();
    FASTPEFT_RUN(backend, qlinear_dgrad, p);
  } else if (w.view.format == Format::kDense && ds && backend.is_cuda()) {
    expand(backend, dx_rows, *low_rank, *a, true, {}, 1.0, dropout_p, seed, false);
    addmm(dx_rows, dx_rows, rows, w.codes);
    return dx;
  } else if (w.view.format == Format::kDense) {
    mm(dx_rows, rows, w.codes);
  } else {
    // Whole, also where the forward pass works in panels: the reduction runs over the rows of W,
    // and adding panels in 16 bit would round once a panel.
    Tensor dense = empty({N, K}, dy.scalar_type(), dy);
    dequantize_rows(backend, w.view, dtype, 0, N, dense);
    mm(dx_rows, rows, dense);
  }
  if (ds && !fuses_ds)
    expand(backend, dx_rows, *low_rank, *a, true, {}, 1.0, dropout_p, seed, true);
  return dx;
}

namespace {
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("qlinear_fwd", TORCH_BOX(&qlinear_fwd));
  m.impl("qlinear_dgrad", TORCH_BOX(&qlinear_dgrad));
}
}  // namespace

}  // namespace fastpeft::ops

FASTPEFT_REGISTER(fastpeft::ops::register_ops)
