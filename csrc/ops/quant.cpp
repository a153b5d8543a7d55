// quantize, quantize_absmax, tile, untile, dequantize: schemas in library.cpp, layouts in
// formats.h.
#include "backend.h"

namespace fastpeft::ops {

namespace {

void check_4bit_weight(const WeightArgs& w, const char* like_name, const Tensor& like) {
  const WeightView& v = w.view;
  check_blocksize(v.blocksize);
  check_dtype("codes", w.codes, ScalarType::Byte);
  const int64_t rows = ceil_div<int64_t>(v.N, kTileN), columns = ceil_div<int64_t>(v.K, kTileK);
  STD_TORCH_CHECK(w.codes.numel() == tiled_bytes(v.N, v.K), "codes: expected tiled shape [", rows,
                  ", ", columns, ", ", kStripBytes, "] for a [", v.N, ", ", v.K, "] weight (",
                  like_name, " is ", shape_text(like), "), got ", shape_text(w.codes));
  STD_TORCH_CHECK(w.scales.has_value(), "scales: expected a tensor for format ",
                  format_name(v.format), ", got None");
  check_dtype("scales", *w.scales, w.nested ? ScalarType::Byte : ScalarType::Float);
  const int64_t count = scale_count(v.N, v.K, v.blocksize);
  STD_TORCH_CHECK(w.scales->numel() == count, "scales: expected ", count, " values for a [", v.N,
                  ", ", v.K, "] weight with blocksize ", v.blocksize, " (", like_name, " is ",
                  shape_text(like), "), got ", w.scales->numel());
  if (!w.nested) return;
  check_dtype("nested", *w.nested, ScalarType::Float);
  check_vector("nested", *w.nested,
               257 + ceil_div<int64_t>(block_count(v.N, v.K, v.blocksize), kNestedBlock));
}

void check_int8_weight(const WeightArgs& w) {
  check_dtype("codes", w.codes, ScalarType::Char);
  check_matrix("codes", w.codes, w.view.N, w.view.K);
  STD_TORCH_CHECK(w.scales.has_value(), "scales: expected float32 [N] for format int8, got None");
  check_dtype("scales", *w.scales, ScalarType::Float);
  check_vector("scales", *w.scales, w.view.N);
  STD_TORCH_CHECK(!w.nested.has_value(), "nested: expected None for format int8");
}

}  // namespace

WeightArgs weight_args(const Tensor& codes, const OptionalTensor& scales,
                       const OptionalTensor& nested, int64_t format, int64_t blocksize, int64_t N,
                       int64_t K, const char* like_name, const Tensor& like) {
  WeightArgs w{codes, scales, nested, {}};
  w.view.format = checked_format(format);
  STD_TORCH_CHECK(N > 0 && K > 0, "weight: expected positive N and K, got [", N, ", ", K, "]");
  w.view.N = N;
  w.view.K = K;
  w.view.blocksize = blocksize;
  check_device("codes", codes, like_name, like);
  if (scales) check_device("scales", *scales, like_name, like);
  if (nested) check_device("nested", *nested, like_name, like);
  if (w.view.format == Format::kDense) {
    check_dtype("codes", codes, like.scalar_type());
    check_matrix("codes", codes, N, K);
    w.view.codes = codes.data_ptr();
    return w;
  }
  if (w.view.format == Format::kInt8) {
    check_int8_weight(w);
  } else {
    check_4bit_weight(w, like_name, like);
  }
  w.codes = aligned(codes);  // kernels copy in bulk
  w.scales = aligned(*scales);
  if (nested) w.nested = contiguous_of(*nested);
  w.view.codes = w.codes.data_ptr();
  w.view.scales = w.scales->data_ptr();
  w.view.nested = w.nested ? static_cast<const float*>(w.nested->data_ptr()) : nullptr;
  return w;
}

std::tuple<Tensor, Tensor> quantize(const Tensor& w, int64_t format, int64_t blocksize) {
  STD_TORCH_CHECK(w.dim() == 2, "w: expected shape [N, K], got ", shape_text(w));
  const Format kind = checked_format(format);
  STD_TORCH_CHECK(kind != Format::kDense, "format: dense is not a quantised format");
  const Tensor source = contiguous_of(w);
  const Backend backend(w);
  QuantizeParams p;
  p.format = kind;
  p.N = w.size(0);
  p.K = w.size(1);
  p.blocksize = blocksize;
  p.dtype = floating_dtype("w", w);
  p.w = source.data_ptr();
  p.stream = backend.stream();
  if (kind != Format::kInt8) check_blocksize(blocksize);
  Tensor codes = kind == Format::kInt8
                     ? empty({p.N, p.K}, ScalarType::Char, w)
                     : empty({ceil_div<int64_t>(p.N * p.K, 2)}, ScalarType::Byte, w);
  Tensor absmax =
      empty({kind == Format::kInt8 ? p.N : block_count(p.N, p.K, blocksize)}, ScalarType::Float, w);
  p.codes = codes.data_ptr();
  p.absmax = static_cast<float*>(absmax.data_ptr());
  if (p.N * p.K > 0) FASTPEFT_RUN(backend, quantize, p);
  return {codes, absmax};
}

std::tuple<Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& map,
                                           const Tensor& offset) {
  check_dtype("absmax", absmax, ScalarType::Float);
  STD_TORCH_CHECK(absmax.dim() == 1, "absmax: expected shape [B], got ", shape_text(absmax));
  check_dtype("map", map, ScalarType::Float);
  check_vector("map", map, 256);
  check_dtype("offset", offset, ScalarType::Float);
  check_vector("offset", offset, 1);
  check_device("map", map, "absmax", absmax);
  check_device("offset", offset, "absmax", absmax);
  const Tensor source = contiguous_of(absmax);
  const Backend backend(absmax);
  QuantizeAbsmaxParams p;
  p.count = absmax.size(0);
  const int64_t groups = ceil_div<int64_t>(p.count, kNestedBlock);
  Tensor codes = empty({p.count}, ScalarType::Byte, absmax);
  Tensor nested = empty({257 + groups}, ScalarType::Float, absmax);
  Tensor map_part = torch::stable::narrow(nested, 0, 1, 256);
  torch::stable::copy_(map_part, map);
  p.absmax = static_cast<const float*>(source.data_ptr());
  p.offset = static_cast<const float*>(offset.data_ptr());
  p.codes = static_cast<uint8_t*>(codes.data_ptr());
  p.nested = static_cast<float*>(nested.data_ptr());
  p.stream = backend.stream();
  FASTPEFT_RUN(backend, quantize_absmax, p);
  return {codes, nested};
}

Tensor retile(const Tensor& codes, int64_t format, int64_t N, int64_t K, bool to_tiled) {
  const Format kind = checked_format(format);
  STD_TORCH_CHECK(is_4bit(kind), "format: only 4-bit formats are tiled, got ", format_name(kind));
  check_dtype("codes", codes, ScalarType::Byte);
  STD_TORCH_CHECK(N > 0 && K > 0, "weight: expected positive N and K, got [", N, ", ", K, "]");
  const int64_t canonical = ceil_div<int64_t>(N * K, 2);
  const int64_t expected = to_tiled ? canonical : tiled_bytes(N, K);
  STD_TORCH_CHECK(codes.numel() == expected, "codes: expected ", expected, " bytes for a [", N,
                  ", ", K, "] weight in ", to_tiled ? "canonical" : "tiled", " order, got ",
                  codes.numel());
  const Tensor source = contiguous_of(codes);
  const Backend backend(codes);
  Tensor out = to_tiled ? empty({ceil_div<int64_t>(N, kTileN), ceil_div<int64_t>(K, kTileK),
                                 int64_t(kStripBytes)},
                                ScalarType::Byte, codes)
                        : empty({canonical}, ScalarType::Byte, codes);
  TileParams p;
  p.format = kind;
  p.N = N;
  p.K = K;
  p.from = static_cast<const uint8_t*>(source.data_ptr());
  p.to = static_cast<uint8_t*>(out.data_ptr());
  p.to_tiled = to_tiled;
  p.stream = backend.stream();
  FASTPEFT_RUN(backend, tile, p);
  return out;
}

Tensor tile(const Tensor& codes, int64_t format, int64_t N, int64_t K) {
  return retile(codes, format, N, K, true);
}

Tensor untile(const Tensor& codes, int64_t format, int64_t N, int64_t K) {
  return retile(codes, format, N, K, false);
}

Tensor dequantize(const Tensor& codes, const OptionalTensor& scales, const OptionalTensor& nested,
                  int64_t format, int64_t blocksize, int64_t N, int64_t K, ScalarType dtype) {
  const DType kind = floating_dtype("dtype", dtype);
  const WeightArgs w = weight_args(codes, scales, nested, format, blocksize, N, K, "codes", codes);
  if (w.view.format == Format::kDense) {
    Tensor copy = torch::stable::clone(codes);
    return contiguous_of(as_dtype(copy, dtype));
  }
  const Backend backend(codes);
  Tensor out = empty({N, K}, dtype, codes);
  DequantizeParams p;
  p.w = w.view;
  p.row_end = N;
  p.dtype = kind;
  p.out = out.data_ptr();
  p.stream = backend.stream();
  FASTPEFT_RUN(backend, dequantize, p);
  return out;
}

namespace {
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax));
  m.impl("tile", TORCH_BOX(&tile));
  m.impl("untile", TORCH_BOX(&untile));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}
}  // namespace

}  // namespace fastpeft::ops

FASTPEFT_REGISTER(fastpeft::ops::register_ops)
