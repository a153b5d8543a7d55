// Quantise, quantise absmax, tile: bit for bit against plain loops.
#include <algorithm>

#include "../../cuda/launch.h"
#include "check.h"

namespace native {

namespace {

uint8_t host_code(Format f, float t) {
  int below = 0;
  for (int i = 0; i < 15; ++i)
    below += t > (f == Format::kNf4 ? kNf4Threshold[i] : kFp4Threshold[i]);
  return uint8_t(f == Format::kNf4 ? below : kFp4Order[below]);
}

template <class T>
void test_quantize_4bit(Format f, int64_t N, int64_t K, int64_t blocksize, size_t shift) {
  if (is_left_out()) return;
  std::vector<T> w = random_values<T>(N * K, unsigned(N * 131 + K + blocksize), 0.05);
  for (int64_t i = blocksize; i < std::min<int64_t>(2 * blocksize, N * K); ++i)
    w[i] = narrow<T>(0.0);
  const int64_t count = N * K, blocks = block_count(N, K, blocksize);
  std::vector<uint8_t> codes(ceil_div<int64_t>(count, 2), uint8_t(zero_code(f)));
  std::vector<float> absmax(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = std::min(count, (b + 1) * blocksize);
    float top = 0;
    for (int64_t i = b * blocksize; i < end; ++i) top = std::max(top, std::fabs(float(wide(w[i]))));
    const float bounded = std::max(top, kTinyAbsmax), inverse = 1.0f / bounded;
    const bool is_ragged = (b + 1) * blocksize > count;
    absmax[b] = is_ragged ? bounded : top;
    for (int64_t i = b * blocksize; i < end; ++i) {
      const float v = float(wide(w[i]));
      const uint8_t code = host_code(f, is_ragged ? v / bounded : v * inverse);
      codes[i / 2] = uint8_t(i % 2 ? (codes[i / 2] & 0xF0) | code : code << 4 | zero_code(f));
    }
  }
  Buffer in(w, shift), out(codes.size()), scales(blocks * sizeof(float));
  QuantizeParams p;
  p.format = f;
  p.N = N;
  p.K = K;
  p.blocksize = blocksize;
  p.dtype = TypeOf<T>::value;
  p.w = in.data();
  p.codes = out.data();
  p.absmax = scales.as<float>();
  cuda::quantize(p);
  const std::string what = std::string("quantize ") + format_name(f) + " " + dtype_name(p.dtype) +
                           " " + std::to_string(N) + "x" + std::to_string(K) + "/" +
                           std::to_string(blocksize);
  check_bits(scales, absmax, what + " absmax");
  check_bits(out, codes, what + " codes");
}

// Every threshold and its two neighbours, as values of a block whose absmax is 1.
void test_thresholds(Format f) {
  std::vector<float> w;
  for (int i = 0; i < 15; ++i) {
    const float t = f == Format::kNf4 ? kNf4Threshold[i] : kFp4Threshold[i];
    for (const float v : {t, std::nextafterf(t, 2.0f), std::nextafterf(t, -2.0f)}) w.push_back(v);
  }
  for (int i = 0; w.size() < 62; ++i) w.push_back(-0.97f + 0.1f * float(i));
  w.push_back(1.0f);
  w.push_back(-1.0f);
  std::vector<uint8_t> codes(32);
  for (int i = 0; i < 64; i += 2)
    codes[i / 2] = uint8_t(host_code(f, w[i]) << 4 | host_code(f, w[i + 1]));
  Buffer in(w), out(32), scale(4);
  QuantizeParams p;
  p.format = f;
  p.N = 1;
  p.K = 64;
  p.w = in.data();
  p.codes = out.data();
  p.absmax = scale.as<float>();
  cuda::quantize(p);
  check_bits(out, codes, std::string("thresholds ") + format_name(f));
}

template <class T>
void test_quantize_int8(int64_t N, int64_t K) {
  std::vector<T> w = random_values<T>(N * K, unsigned(N + K));
  for (int64_t k = 0; k < K; ++k) w[k] = narrow<T>(0.0);
  std::vector<int8_t> codes(N * K);
  std::vector<float> absmax(N, 0.0f);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k)
      absmax[n] = std::max(absmax[n], std::fabs(float(wide(w[n * K + k]))));
    const float inverse = int8_inverse(absmax[n]);
    for (int64_t k = 0; k < K; ++k)
      codes[n * K + k] = int8_t(std::nearbyintf(float(wide(w[n * K + k])) * inverse));
  }
  Buffer in(w), out(codes.size()), scales(N * sizeof(float));
  QuantizeParams p;
  p.format = Format::kInt8;
  p.N = N;
  p.K = K;
  p.dtype = TypeOf<T>::value;
  p.w = in.data();
  p.codes = out.data();
  p.absmax = scales.as<float>();
  cuda::quantize(p);
  check_bits(out, codes, "quantize int8 codes");
  check_bits(scales, absmax, "quantize int8 absmax");
}

void test_quantize_absmax(int64_t count) {
  std::vector<float> absmax = random_values<float>(count, unsigned(count), 0.02);
  for (float& a : absmax) a = std::fabs(a);
  const float offset = 0.0173f;
  if (count > 512)
    for (int i = 256; i < 512; ++i) absmax[i] = offset;  // a group of zeros
  std::vector<float> nested(257 + ceil_div<int64_t>(count, kNestedBlock), 0.0f);
  const std::vector<float> map = ascending_map();
  std::copy(map.begin(), map.end(), nested.begin() + 1);
  Buffer in(absmax), out(count), levels(nested), mean(std::vector<float>{offset});
  std::vector<uint8_t> codes(count);
  nested[0] = offset;
  for (int64_t b = 0; b < count; b += kNestedBlock) {
    float top = 0;
    for (int64_t i = b; i < std::min(count, b + kNestedBlock); ++i)
      top = std::max(top, std::fabs(absmax[i] - offset));
    nested[257 + b / kNestedBlock] = top;
    for (int64_t i = b; i < std::min(count, b + kNestedBlock); ++i) {
      const float inverse = 1.0f / top, centred = absmax[i] - offset;
      const float t = std::min(std::max(centred * inverse, -1.0f), 1.0f);
      int code = 0;
      for (int j = 0; top > 0 && j < 255; ++j)
        code += (map[j] + map[j + 1]) * 0.5f < nested_grid(t);
      codes[i] = uint8_t(code);
    }
  }
  QuantizeAbsmaxParams p;
  p.count = count;
  p.absmax = in.as<float>();
  p.offset = mean.as<float>();
  p.codes = out.as<uint8_t>();
  p.nested = levels.as<float>();
  cuda::quantize_absmax(p);
  check_bits(out, codes, "quantize_absmax codes " + std::to_string(count));
  check_bits(levels, nested, "quantize_absmax nested " + std::to_string(count));
}

void test_tile(Format f, int64_t N, int64_t K) {
  if (is_left_out()) return;
  std::mt19937 engine{unsigned(N * K)};
  std::vector<uint8_t> canonical(ceil_div<int64_t>(N * K, 2));
  for (uint8_t& b : canonical) b = uint8_t(engine());
  if (N * K % 2) canonical.back() = uint8_t((canonical.back() & 0xF0) | zero_code(f));
  std::vector<uint8_t> tiled(tiled_bytes(N, K), uint8_t(zero_code(f) * 17));
  for (int64_t i = 0; i < N * K; ++i) {
    const int code = canonical[i / 2] >> (i % 2 ? 0 : 4) & 15;
    const NibblePlace at = tiled_place(i / K, i % K, K);
    tiled[at.byte] = uint8_t((tiled[at.byte] & ~(15 << at.shift)) | code << at.shift);
  }
  Buffer from(canonical), to(tiled.size()), back(canonical.size());
  TileParams p;
  p.format = f;
  p.N = N;
  p.K = K;
  p.from = from.as<uint8_t>();
  p.to = to.as<uint8_t>();
  cuda::tile(p);
  const std::string what = "tile " + std::to_string(N) + "x" + std::to_string(K);
  check_bits(to, tiled, what);
  p.to_tiled = false;
  p.from = to.as<uint8_t>();
  p.to = back.as<uint8_t>();
  cuda::tile(p);
  check_bits(back, canonical, "un" + what);
}

}  // namespace

void test_quantizers() {
  for (const Format f : {Format::kNf4, Format::kFp4}) {
    test_thresholds(f);
    for (const int64_t blocksize : {32, 64, 128, 256, 512, 4096}) {
      test_quantize_4bit<float>(f, 3, 2048, blocksize, 0);
      test_quantize_4bit<__nv_bfloat16>(f, 7, 341, blocksize, 0);
    }
    test_quantize_4bit<__half>(f, 64, 128, 64, 2);
    test_quantize_4bit<double>(f, 5, 77, 64, 0);
    test_quantize_4bit<float>(f, 1, 1, 64, 0);
  }
  test_quantize_int8<float>(5, 341);
  test_quantize_int8<__nv_bfloat16>(3, 64);
  for (const int64_t count : {1, 255, 256, 257, 1000}) test_quantize_absmax(count);
}

void test_tiles() {
  for (const auto& shape :
       {std::pair<int64_t, int64_t>{16, 64}, {48, 192}, {7, 80}, {33, 100}, {5, 7}, {20, 1008}}) {
    test_tile(Format::kNf4, shape.first, shape.second);
    test_tile(Format::kFp4, shape.first, shape.second);
  }
}

}  // namespace native
