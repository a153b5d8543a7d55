// One struct per kernel: raw pointers with their shapes, nothing else. Filled by csrc/ops, obeyed
// by csrc/cpu and cuda. Letters: M tokens, N out features, K in features, R rank, D bottleneck
// width.
#pragma once
#include "formats.h"
#include "plan.h"
#include "types.h"

namespace fastpeft {

// A weight as kernels see it (layouts: formats.h).
struct WeightView {
  Format format = Format::kNf4;
  int64_t N = 0, K = 0;
  int64_t blocksize = 64;
  const void* codes = nullptr;    // 4-bit: tiled uint8; int8: int8 [N, K]; dense: dtype [N, K]
  const void* scales = nullptr;   // float32, or uint8 when nested is set; null for dense
  const float* nested = nullptr;  // [1 + 256 + ceil(B/256)] or null
};

// w [N, K] -> canonical codes and absmax.
struct QuantizeParams {
  Format format = Format::kNf4;
  int64_t N = 0, K = 0, blocksize = 64;
  DType dtype = DType::kFloat32;
  const void* w = nullptr;  // [N, K] contiguous
  void* codes = nullptr;    // 4-bit: uint8 [ceil(N*K/2)]; int8: int8 [N, K]
  float* absmax = nullptr;  // 4-bit: [ceil(N*K/blocksize)]; int8: [N]
  Stream stream = nullptr;
};

// Second level of double quantisation.
struct QuantizeAbsmaxParams {
  int64_t count = 0;
  const float* absmax = nullptr;  // [count]
  const float* offset = nullptr;  // [1], mean of absmax
  uint8_t* codes = nullptr;       // [count]
  float* nested = nullptr;  // in: [1..256] holds the map; out: [0] = offset, [257..] nested absmax
  Stream stream = nullptr;
};

// Canonical <-> tiled 4-bit codes.
struct TileParams {
  Format format = Format::kNf4;  // decides the padding code
  int64_t N = 0, K = 0;
  const uint8_t* from = nullptr;
  uint8_t* to = nullptr;
  bool to_tiled = true;
  Stream stream = nullptr;
};

// Rows [row_begin, row_end) of the weight, row-major, in dtype.
struct DequantizeParams {
  WeightView w;
  int64_t row_begin = 0, row_end = 0;
  DType dtype = DType::kFloat32;
  void* out = nullptr;  // [row_end - row_begin, K]
  Stream stream = nullptr;
};

// y = x W^T + bias + scaling * s B^T, one fused launch.
struct QLinearFwdParams {
  WeightView w;
  int64_t M = 0, R = 0;
  Plan plan;  // kernel and tile; kWgmma and kNarrow or the kernels for small M
  DType dtype = DType::kFloat32;
  const void* x = nullptr;       // [M, K]
  const void* bias = nullptr;    // [N] or null
  const void* s = nullptr;       // [M, R] = drop(x) A^T, or null
  const void* lora_b = nullptr;  // [N, R] or null
  float scaling = 1.0f;
  void* y = nullptr;  // [M, N]
  Stream stream = nullptr;
};

// dx = dy W + ds A, one fused launch (no dropout in the LoRA branch).
struct QLinearDgradParams {
  WeightView w;
  int64_t M = 0, R = 0;
  Plan plan;  // kernel and tile; kWgmma and kNarrow or the kernels for small M
  DType dtype = DType::kFloat32;
  const void* dy = nullptr;      // [M, N]
  const void* ds = nullptr;      // [M, R] = scaling * dy B, or null
  const void* lora_a = nullptr;  // [R, K] or null
  void* dx = nullptr;            // [M, K]
  Stream stream = nullptr;
};

// y = x * keep(seed, i) / (1 - p); keep by Philox4x32-10 (philox.h). add: y += instead of y =.
struct DropoutParams {
  int64_t count = 0;
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // [count]
  float p = 0.0f;
  const int64_t* seed = nullptr;  // [1], on the tensor's device
  bool add = false;
  void* y = nullptr;  // [count]
  Stream stream = nullptr;
};

// The outlier columns of LLM.int8() found on the device, and copies of them side by side for the
// tensor cores. CUDA only and where the plan asks for it; null otherwise.
struct OutlierColumns {
  int64_t capacity = 0;     // columns that x and w have room for, a multiple of 64
  int32_t* list = nullptr;  // [1 + K] their number, then the columns in order
  void* x = nullptr;        // [M, capacity] columns of x; zeros up to the next multiple of 64
  void* w = nullptr;        // [N, capacity] codes of W as numbers of x's dtype, likewise
};

// Per-token int8 of activations with LLM.int8() outlier columns (Dettmers et al. 2022). threshold
// 0: none.
struct QuantizeRowsParams {
  int64_t M = 0, K = 0;
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // [M, K]
  float threshold = 0.0f;
  int8_t* q = nullptr;         // [M, K], outlier columns zero
  float* scale = nullptr;      // [M] row absmax of what is not an outlier
  uint8_t* outlier = nullptr;  // [K] 1 where any |x| >= threshold
  WeightView w;                // int8, for columns.w
  OutlierColumns columns;      // filled when columns.list is given
  Stream stream = nullptr;
};

// y = acc * scale_x * scale_w / 127^2 + sum over outlier columns x[m,k] W[n,k] + bias
//     + scaling * s B^T
struct Int8EpilogueParams {
  WeightView w;  // int8
  int64_t M = 0, R = 0;
  int64_t tile_tokens = 0;  // Plan::tile_tokens: > 0 the tensor-core kernel, which wants columns
  int64_t split = 1;        // Plan::split, with it
  DType dtype = DType::kFloat32;
  const int32_t* acc = nullptr;      // [M, N] or null: then q . codes is computed here
  const int8_t* q = nullptr;         // [M, K]
  const float* scale = nullptr;      // [M]
  const uint8_t* outlier = nullptr;  // [K] or null
  OutlierColumns columns;            // as quantize_rows left them
  const void* x = nullptr;           // [M, K]
  const void* bias = nullptr;        // [N] or null
  const void* s = nullptr;           // [M, R] or null; only where the plan fuses LoRA
  const void* lora_b = nullptr;      // [N, R] or null
  float scaling = 1.0f;
  void* y = nullptr;  // [M, N]
  Stream stream = nullptr;
};

enum class Activation : int32_t {
  kRelu = 0,
  kGelu = 1,
  kGeluTanh = 2,
  kSilu = 3,
  kTanh = 4,
  kIdentity = 5
};

// Bottleneck pieces around the two GEMMs: h = act(z + b).
struct BottleneckActParams {
  int64_t M = 0, D = 0;
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kGelu;
  const void* z = nullptr;     // [M, D]
  const void* bias = nullptr;  // [D] or null
  const void* dh = nullptr;    // [M, D]; backward only
  void* h = nullptr;           // [M, D]
  void* dz = nullptr;          // [M, D] = dh * act'(z + b); backward only
  Stream stream = nullptr;
};

// y = residual + scaling * (u + bias)
struct BottleneckOutParams {
  int64_t M = 0, K = 0;
  DType dtype = DType::kFloat32;
  const void* u = nullptr;         // [M, K]
  const void* bias = nullptr;      // [K] or null
  const void* residual = nullptr;  // [M, K] or null
  float scaling = 1.0f;
  void* y = nullptr;  // [M, K]
  Stream stream = nullptr;
};

// s = scale * drop(x) F^T: S of the forward pass, and with F = B^T (transposed) dS of the backward.
struct LoraShrinkParams {
  int64_t M = 0, K = 0, R = 0;
  DType dtype = DType::kFloat32;
  const void* x = nullptr;       // [M, K]
  const void* factor = nullptr;  // [R, K], or [K, R] when is_transposed
  bool is_transposed = false;
  float scale = 1.0f;             // beside dropout's own 1 / (1 - p)
  float p = 0.0f;                 // as in DropoutParams
  const int64_t* seed = nullptr;  // [1], on the tensor's device; unused when p is 0
  void* s = nullptr;              // [M, R]
  Stream stream = nullptr;
};

// out (+)= drop(scale * s F^T) + bias: the low-rank branch of y, and with F = A^T (transposed) of
// dx.
struct LoraExpandParams {
  int64_t M = 0, C = 0, R = 0;
  DType dtype = DType::kFloat32;
  const void* s = nullptr;       // [M, R]
  const void* factor = nullptr;  // [C, R], or [R, C] when is_transposed
  bool is_transposed = false;
  const void* bias = nullptr;     // [C] or null
  float scale = 1.0f;             // beside dropout's own 1 / (1 - p)
  float p = 0.0f;                 // as in DropoutParams, by the place in out
  const int64_t* seed = nullptr;  // [1], on the tensor's device; unused when p is 0
  bool add = false;
  void* out = nullptr;  // [M, C]
  Stream stream = nullptr;
};

// ds = scaling * dy B, dB = scaling * dy^T s, dA = ds^T drop(x).
struct LoraWgradParams {
  int64_t M = 0, N = 0, K = 0, R = 0;
  DType dtype = DType::kFloat32;
  const void* x = nullptr;       // [M, K]
  const void* dy = nullptr;      // [M, N]
  const void* s = nullptr;       // [M, R], of the forward pass
  const void* lora_b = nullptr;  // [N, R]
  float scaling = 1.0f;
  float p = 0.0f;                      // as in DropoutParams
  const int64_t* seed = nullptr;       // [1], on the tensor's device; unused when p is 0
  void* ds = nullptr;                  // [M, R]
  DType grad_dtype = DType::kFloat32;  // of dA and dB: dtype or float32
  void* dA = nullptr;                  // [R, K]
  void* dB = nullptr;                  // [N, R]
  void* workspace = nullptr;           // lora_wgrad_workspace() bytes
  Stream stream = nullptr;
};

// The kernels a backend offers; csrc/cpu/cpu.h and cuda/launch.h declare the same names.
#define FASTPEFT_DECLARE_KERNELS                        \
  void quantize(const QuantizeParams&);                 \
  void quantize_absmax(const QuantizeAbsmaxParams&);    \
  void tile(const TileParams&);                         \
  void dequantize(const DequantizeParams&);             \
  void qlinear_fwd(const QLinearFwdParams&);            \
  void qlinear_dgrad(const QLinearDgradParams&);        \
  void dropout(const DropoutParams&);                   \
  void lora_shrink(const LoraShrinkParams&);            \
  void lora_expand(const LoraExpandParams&);            \
  void lora_wgrad(const LoraWgradParams&);              \
  int64_t lora_wgrad_workspace(const LoraWgradParams&); \
  void quantize_rows(const QuantizeRowsParams&);        \
  void int8_epilogue(const Int8EpilogueParams&);        \
  void bottleneck_act_fwd(const BottleneckActParams&);  \
  void bottleneck_act_bwd(const BottleneckActParams&);  \
  void bottleneck_out(const BottleneckOutParams&);

}  // namespace fastpeft
