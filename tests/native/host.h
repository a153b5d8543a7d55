// What the native programs share: device buffers with a guard, host types, random data, and a
// quantised weight made by plain loops from the rules of csrc/core/formats.h.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/core/check.h"
#include "../../csrc/core/params.h"

namespace native {

using namespace fastpeft;

#define NATIVE_CUDA(call)                                                \
  do {                                                                   \
    const cudaError_t status = (call);                                   \
    if (status != cudaSuccess) {                                         \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(status));                          \
      std::exit(2);                                                      \
    }                                                                    \
  } while (0)

constexpr size_t kGuardBytes = 256;
constexpr unsigned char kPoison = 0xFF;  // NaN in every float type

// For compute-sanitizer: buffers end where their allocation ends, and nothing is written to them
// that no kernel writes, so that the tool sees what the guard and the poison would hide from it.
inline bool is_bare = false;

// Device memory filled with NaN, with guard bytes behind it; `shift` bytes misalign the start.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t shift = 0) : bytes_(bytes), shift_(shift) {
    NATIVE_CUDA(cudaMalloc(&base_, bytes + shift + guard_bytes()));
    poison();
  }
  template <class T>
  explicit Buffer(const std::vector<T>& host, size_t shift = 0)
      : Buffer(host.size() * sizeof(T), shift) {
    write(host);
  }
  ~Buffer() { cudaFree(base_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return static_cast<char*>(base_) + shift_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
  void poison() {
    if (!is_bare) NATIVE_CUDA(cudaMemset(base_, kPoison, bytes_ + shift_ + kGuardBytes));
  }

  template <class T>
  void write(const std::vector<T>& host) {
    NATIVE_CUDA(cudaMemcpy(data(), host.data(), bytes_, cudaMemcpyHostToDevice));
  }
  template <class T>
  std::vector<T> read() const {
    std::vector<T> host(bytes_ / sizeof(T));
    NATIVE_CUDA(cudaDeviceSynchronize());
    NATIVE_CUDA(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost));
    return host;
  }
  bool guard_is_whole() const {
    if (is_bare) return true;
    std::vector<unsigned char> tail(kGuardBytes);
    NATIVE_CUDA(cudaMemcpy(tail.data(), static_cast<char*>(data()) + bytes_, kGuardBytes,
                           cudaMemcpyDeviceToHost));
    for (const unsigned char byte : tail)
      if (byte != kPoison) return false;
    return true;
  }

 private:
  static size_t guard_bytes() { return is_bare ? 0 : kGuardBytes; }

  void* base_ = nullptr;
  size_t bytes_, shift_;
};

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct TypeOf<double> {
  static constexpr DType value = DType::kFloat64;
};
template <>
struct TypeOf<__nv_bfloat16> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct TypeOf<__half> {
  static constexpr DType value = DType::kFloat16;
};

inline double wide(float v) {
  return v;
}
inline double wide(double v) {
  return v;
}
inline double wide(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
inline double wide(__half v) {
  return __half2float(v);
}

template <class T>
T narrow(double v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(float(v));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(float(v));
  } else {
    return T(v);
  }
}

template <class T>
std::vector<T> random_values(size_t count, unsigned seed, double scale = 1.0) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(0.0, scale);
  std::vector<T> out(count);
  for (T& v : out) v = narrow<T>(normal(engine));
  return out;
}

// Sorted 256 values like the signed dynamic map's: the kernels take any ascending map.
inline std::vector<float> ascending_map() {
  std::vector<float> map(256);
  for (int i = 0; i < 256; ++i) {
    const double u = (i - 127.5) / 128.0;
    map[i] = float(u * std::fabs(u));
  }
  map[255] = 1.0f;
  return map;
}

// A quantised weight on the host, in memory order, and the exact float32 values it stands for.
struct HostWeight {
  Format format;
  int64_t N, K, blocksize;
  bool is_nested;
  std::vector<uint8_t> codes;        // tiled, or int8 [N, K]
  std::vector<float> scales;         // in memory order (not nested), or int8 [N]
  std::vector<uint8_t> scale_codes;  // in memory order (nested)
  std::vector<float> nested;
  std::vector<float> exact;  // [N, K]
};

inline HostWeight make_weight(Format format, int64_t N, int64_t K, int64_t blocksize,
                              bool is_nested, unsigned seed) {
  HostWeight w{format, N, K, blocksize, is_nested, {}, {}, {}, {}, std::vector<float>(N * K)};
  std::mt19937 engine(seed);
  if (format == Format::kInt8) {
    w.codes.resize(N * K);
    w.scales.resize(N);
    for (float& s : w.scales) s = 0.01f + float(engine() % 1000) * 1e-4f;
    for (int64_t i = 0; i < N * K; ++i) {
      const int q = int(engine() % 255) - 127;
      w.codes[i] = uint8_t(int8_t(q));
      w.exact[i] = float(q) * w.scales[i / K] * kInt8Step;
    }
    return w;
  }
  const int64_t blocks = block_count(N, K, blocksize), Np = round_up<int64_t>(N, kTileN);
  const bool by_column = scales_by_column(K, blocksize);
  std::vector<float> absmax(blocks);
  std::vector<uint8_t> q(blocks);
  if (is_nested) {
    const std::vector<float> map = ascending_map();
    w.nested.assign(257 + ceil_div<int64_t>(blocks, kNestedBlock), 0.0f);
    w.nested[0] = 0.05f;
    for (int i = 0; i < 256; ++i) w.nested[1 + i] = map[i];
    for (size_t i = 257; i < w.nested.size(); ++i)
      w.nested[i] = 0.02f + float(engine() % 100) * 1e-4f;
    for (int64_t b = 0; b < blocks; ++b) {
      q[b] = uint8_t(engine());
      const volatile float product = w.nested[1 + q[b]] * w.nested[257 + b / kNestedBlock];
      absmax[b] = product + w.nested[0];
    }
  } else {
    for (float& a : absmax) a = 0.01f + float(engine() % 1000) * 1e-4f;
  }
  const int64_t places = scale_count(N, K, blocksize);
  w.scales.assign(is_nested ? 0 : places, 0.0f);
  w.scale_codes.assign(is_nested ? places : 0, 0);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t per_row = K / blocksize;
    const int64_t at = by_column ? b % per_row * Np + b / per_row : b;
    if (is_nested)
      w.scale_codes[at] = q[b];
    else
      w.scales[at] = absmax[b];
  }
  w.codes.assign(tiled_bytes(N, K), uint8_t(zero_code(format) * 17));
  const float* table = format == Format::kNf4 ? kNf4Code : kFp4Code;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k) {
      const int code = int(engine() & 15);
      const NibblePlace at = tiled_place(n, k, K);
      w.codes[at.byte] = uint8_t((w.codes[at.byte] & ~(15 << at.shift)) | code << at.shift);
      w.exact[n * K + k] = table[code] * absmax[(n * K + k) / blocksize];
    }
  return w;
}

struct DeviceWeight {
  Buffer codes, scales, nested;
  WeightView view;

  explicit DeviceWeight(const HostWeight& w)
      : codes(w.codes),
        scales(w.is_nested ? Buffer(w.scale_codes) : Buffer(w.scales)),
        nested(w.nested) {
    view.format = w.format;
    view.N = w.N;
    view.K = w.K;
    view.blocksize = w.blocksize;
    view.codes = codes.data();
    view.scales = scales.data();
    view.nested = w.is_nested ? nested.as<float>() : nullptr;
  }
};

}  // namespace native
