// All schemas of torch.ops.fastpeft, in one place. Implementations: the file of the same stem.
//
// Letters: M tokens, N out features, K in features, R rank, D bottleneck width. A quantised weight
// is (codes, scales, nested, format, blocksize) in the in-memory layout of csrc/core/formats.h;
// format is the integer of fastpeft::Format.
#include "tensor_args.h"

STABLE_TORCH_LIBRARY(fastpeft, m) {
  // w [N, K] -> canonical codes (4-bit: uint8 [ceil(N*K/2)]; int8: int8 [N, K]) and absmax float32
  // ([blocks] or [N]).
  m.def("quantize(Tensor w, int format, int blocksize) -> (Tensor codes, Tensor absmax)");
  // absmax float32 [B], map float32 [256], offset float32 [1] -> codes uint8 [B], nested float32
  // [257 + ceil(B/256)].
  m.def(
      "quantize_absmax(Tensor absmax, Tensor map, Tensor offset) -> (Tensor codes, Tensor nested)");
  // canonical 4-bit codes [ceil(N*K/2)] <-> tiled [Np/16, Kp/64, 512].
  m.def("tile(Tensor codes, int format, int N, int K) -> Tensor");
  m.def("untile(Tensor codes, int format, int N, int K) -> Tensor");
  // the exact weight [N, K], each value rounded once from float32 code * absmax.
  m.def(
      "dequantize(Tensor codes, Tensor? scales, Tensor? nested, int format, int blocksize, int N, "
      "int K, "
      "ScalarType dtype) -> Tensor");

  // y [..., N] = x W^T + bias + scaling * drop(x) A^T B^T; also s [M, R] = drop(x) A^T ([0] without
  // LoRA) for backward. threshold: int8 only; < 0 weight only, 0 plain s8, > 0 LLM.int8() with
  // outlier columns.
  m.def(
      "qlinear_fwd(Tensor x, Tensor codes, Tensor? scales, Tensor? nested, int format, int "
      "blocksize, int N, "
      "float threshold, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, float "
      "dropout_p, Tensor? seed) "
      "-> (Tensor y, Tensor s)");
  // dx [..., K] = dy W + drop'(ds A); ds [M, R] from lora_wgrad.
  m.def(
      "qlinear_dgrad(Tensor dy, Tensor codes, Tensor? scales, Tensor? nested, int format, int "
      "blocksize, int K, "
      "Tensor? ds, Tensor? lora_A, float dropout_p, Tensor? seed) -> Tensor");
  // dA [R, K] = ds^T drop(x), dB [N, R] = scaling * dy^T s, ds [M, R] = scaling * dy B. dA, dB in
  // lora_A's dtype.
  m.def(
      "lora_wgrad(Tensor dy, Tensor x, Tensor s, Tensor lora_A, Tensor lora_B, float scaling, "
      "float dropout_p, "
      "Tensor? seed) -> (Tensor dA, Tensor dB, Tensor ds)");
  // x * keep(seed, i) / (1 - p), seed int64 [1] on x's device.
  m.def("dropout(Tensor x, float p, Tensor seed) -> Tensor");

  // y = residual + scaling * (act(x D^T + down_bias) U^T + up_bias); down [D, K], up [K, D].
  m.def(
      "bottleneck_fwd(Tensor x, Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, int "
      "activation, "
      "float scaling, Tensor? residual) -> Tensor");
  m.def(
      "bottleneck_bwd(Tensor dy, Tensor x, Tensor down, Tensor? down_bias, Tensor up, Tensor? "
      "up_bias, int activation, "
      "float scaling) -> (Tensor dx, Tensor ddown, Tensor ddown_bias, Tensor dup, Tensor "
      "dup_bias)");

  // Without tensors (launch.cpp). Programmatic dependent launch on or off for the process; None
  // leaves it. -> whether it is on now; always false without CUDA kernels.
  m.def("dependent_launch(bool? is_on) -> bool");
  // Which kernel serves a problem on the current CUDA device (or the CPU), as text; direction 0
  // forward, 1 input gradient.
  m.def(
      "plan_text(bool is_cuda, int M, int N, int K, int R, int format, int blocksize, int "
      "direction, ScalarType dtype) -> str");
}
