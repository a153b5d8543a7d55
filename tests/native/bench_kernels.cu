// Times of the CUDA kernels without torch: CUDA-graph replays over rotated copies of the weights
// (and outputs), so that L2 never holds what a launch reads; median, p20 and p80 of the replays, in
// us a launch. `bench_kernels [--pdl] [filter]` prints one line a case whose name contains the
// filter; without --pdl every launch waits for the whole of the one before. Values are
// test_kernels' business: run it first.
#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>

#include "../../cuda/launch.h"
#include "host.h"

using namespace native;

namespace {

constexpr int64_t kRotateBytes = 256ll << 20;  // > 4 x L2
constexpr int kReplays = 9;

struct Shape {
  int64_t N, K;
};
const Shape kShapes[] = {{4096, 4096},  {1024, 4096},  {14336, 4096},
                         {4096, 14336}, {28672, 8192}, {576, 1536}};

struct Device {
  void* p = nullptr;
  explicit Device(size_t bytes) { NATIVE_CUDA(cudaMalloc(&p, bytes)); }
  ~Device() { cudaFree(p); }
};

__global__ void fill_kernel(uint32_t* p, int64_t words, uint32_t seed) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < words; i += gridDim.x * 256ll) {
    uint32_t v = uint32_t(i) * 2654435761u + seed;
    v ^= v >> 16;
    v *= 2246822519u;
    p[i] = v ^ (v >> 13);
  }
}
__global__ void fill_values_kernel(__nv_bfloat16* p, int64_t count) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll)
    p[i] = __float2bfloat16_rn(float(int(uint32_t(i) * 2654435761u >> 16) - 32768) / 32768.0f);
}

void fill(void* p, size_t bytes) {
  fill_kernel<<<1024, 256>>>(static_cast<uint32_t*>(p), bytes / 4, 7);
}
void fill_values(void* p, int64_t count) {
  fill_values_kernel<<<1024, 256>>>(static_cast<__nv_bfloat16*>(p), count);
}

// One NF4 weight, blocksize 64, double-quantised, with random codes.
struct Weight {
  Device codes, scales, nested;
  WeightView view;
  Weight(int64_t N, int64_t K)
      : codes(tiled_bytes(N, K)),
        scales(scale_count(N, K, 64)),
        nested(4 * (257 + ceil_div<int64_t>(N * K / 64, 256))) {
    fill(codes.p, tiled_bytes(N, K));
    fill(scales.p, scale_count(N, K, 64));
    std::vector<float> host(257 + ceil_div<int64_t>(N * K / 64, 256), 0.02f);
    const std::vector<float> map = ascending_map();
    std::copy(map.begin(), map.end(), host.begin() + 1);
    NATIVE_CUDA(cudaMemcpy(nested.p, host.data(), host.size() * 4, cudaMemcpyHostToDevice));
    view.N = N;
    view.K = K;
    view.codes = codes.p;
    view.scales = scales.p;
    view.nested = static_cast<float*>(nested.p);
  }
};

const char* filter = "";

// launch(i, stream) uses copy i % copies. `bytes`: what one launch must move.
void time_case(const std::string& name, int copies, double bytes,
               const std::function<void(int, cudaStream_t)>& launch) {
  if (name.find(filter) == std::string::npos) return;
  cudaStream_t stream;
  NATIVE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const int launches = std::max(copies, 24) / copies * copies;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  for (int i = 0; i < copies; ++i) launch(i, stream);  // attributes, module load
  NATIVE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < launches; ++i) launch(i % copies, stream);
  NATIVE_CUDA(cudaStreamEndCapture(stream, &graph));
  NATIVE_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  cudaEvent_t start, stop;
  NATIVE_CUDA(cudaEventCreate(&start));
  NATIVE_CUDA(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int i = 0; i < kReplays + 2; ++i) {
    NATIVE_CUDA(cudaEventRecord(start, stream));
    NATIVE_CUDA(cudaGraphLaunch(replay, stream));
    NATIVE_CUDA(cudaEventRecord(stop, stream));
    NATIVE_CUDA(cudaStreamSynchronize(stream));
    float ms = 0;
    NATIVE_CUDA(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 2) times.push_back(ms * 1000 / launches);
  }
  std::sort(times.begin(), times.end());
  const float us = times[kReplays / 2];
  std::printf("%-44s %8.2f us  (p20 %.2f p80 %.2f)  %7.0f GB/s\n", name.c_str(), us,
              times[kReplays / 5], times[kReplays - 1 - kReplays / 5], bytes / us * 1e-3);
  std::fflush(stdout);
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

std::string label(const char* what, const Shape& s, int64_t M = 0, const char* tail = "") {
  return std::string(what) + " " + std::to_string(s.N) + "x" + std::to_string(s.K) +
         (M ? " M=" + std::to_string(M) : "") + tail;
}

// One call of a linear layer, either direction: `in` is x or dy, `low` s or ds, `factor` B or A.
struct Linear {
  WeightView w;
  int64_t M = 0, R = 0;
  DType dtype = DType::kBFloat16;
  Plan plan;
  const void *in = nullptr, *low = nullptr, *factor = nullptr;
  void* out = nullptr;
};
void launch_linear(const Linear& l, bool is_dgrad, cudaStream_t stream) {
  const auto fill = [&](auto& p) {
    p.w = l.w;
    p.M = l.M;
    p.R = l.R;
    p.plan = l.plan;
    p.dtype = l.dtype;
    p.stream = stream;
  };
  if (is_dgrad) {
    QLinearDgradParams p;
    fill(p);
    p.dy = l.in;
    p.ds = l.R ? l.low : nullptr;
    p.lora_a = l.R ? l.factor : nullptr;
    p.dx = l.out;
    cuda::qlinear_dgrad(p);
  } else {
    QLinearFwdParams p;
    fill(p);
    p.x = l.in;
    p.s = l.R ? l.low : nullptr;
    p.lora_b = l.R ? l.factor : nullptr;
    p.y = l.out;
    cuda::qlinear_fwd(p);
  }
}

double weight_bytes(const Shape& s) {
  return double(s.N * s.K) * (0.5 + 1.0 / 64 + 4.0 / (64 * 256));
}

void bench_copy() {
  const size_t bytes = 512ll << 20;
  Device from(bytes), to(bytes);
  fill(from.p, bytes);
  time_case("copy 512 MiB (cudaMemcpyAsync)", 1, 2.0 * bytes, [&](int, cudaStream_t stream) {
    NATIVE_CUDA(cudaMemcpyAsync(to.p, from.p, bytes, cudaMemcpyDeviceToDevice, stream));
  });
  const size_t small = 74ll << 20;  // as many bytes as dequantising 14336x4096 moves
  time_case("copy 74 MiB (cudaMemcpyAsync)", 6, 2.0 * small, [&](int i, cudaStream_t stream) {
    NATIVE_CUDA(cudaMemcpyAsync(static_cast<char*>(to.p) + i * small,
                                static_cast<char*>(from.p) + i * small, small,
                                cudaMemcpyDeviceToDevice, stream));
  });
}

void bench_shape(const Shape& s) {
  const int copies =
      int(std::max<int64_t>(1, ceil_div<int64_t>(kRotateBytes, tiled_bytes(s.N, s.K))));
  std::vector<std::unique_ptr<Weight>> weights;
  for (int i = 0; i < copies; ++i) weights.push_back(std::make_unique<Weight>(s.N, s.K));
  const int64_t widest = std::max(s.N, s.K), M_max = 64;
  Device x(M_max * widest * 2), y(M_max * widest * 2), low(M_max * 64 * 2), factor(widest * 64 * 2);
  for (const Device* d : {&x, &y}) fill_values(d->p, M_max * widest);
  fill_values(low.p, M_max * 64);
  fill_values(factor.p, widest * 64);
  const int outputs = int(std::max<int64_t>(2, kRotateBytes / (s.N * s.K * 2)));
  Device out(size_t(outputs) * s.N * s.K * 2);
  time_case(label("dequantize", s), copies, weight_bytes(s) + 2.0 * s.N * s.K,
            [&](int i, cudaStream_t stream) {
              DequantizeParams p;
              p.w = weights[i]->view;
              p.row_end = s.N;
              p.dtype = DType::kBFloat16;
              p.out = static_cast<char*>(out.p) + (i % outputs) * s.N * s.K * 2;
              p.stream = stream;
              cuda::dequantize(p);
            });
  const auto time_linear = [&](DType dtype, int64_t M, int64_t R, bool is_dgrad) {
    const bool is_float = dtype == DType::kFloat32;
    const std::string what = std::string(is_dgrad ? "dgrad" : "fwd") + (is_float ? " float32" : "");
    Linear l;
    l.M = M;
    l.R = R;
    l.dtype = dtype;
    l.in = x.p;
    l.low = low.p;
    l.factor = factor.p;
    l.out = y.p;
    const double bytes = weight_bytes(s) + dtype_bytes(dtype) * double(M * (s.N + s.K));
    time_case(label(what.c_str(), s, M, R ? " R=16" : ""), copies, bytes,
              [&](int i, cudaStream_t stream) {
                l.w = weights[i]->view;
                launch_linear(l, is_dgrad, stream);
              });
  };
  for (const int64_t M : {1, 4})  // the general kernels
    for (const bool is_dgrad : {false, true}) time_linear(DType::kFloat32, M, 0, is_dgrad);
  for (const int64_t M : {1, 2, 4, 8, 16, 32, 64})
    for (const int64_t R : {0, 16})
      for (const bool is_dgrad : {false, true})
        if (R == 0 || M == 1 || M == 16) time_linear(DType::kBFloat16, M, R, is_dgrad);
}

// int8 weights: weight only, its input gradient, and LLM.int8() with 8 outlier columns (rows and
// product apart, and together).
void bench_int8(const Shape& s) {
  const int64_t N = s.N, K = s.K, most = 8192, capacity = 512;
  const int copies = int(ceil_div<int64_t>(kRotateBytes, N * K));
  const int64_t widest = std::max(N, K);
  Device codes(copies * N * K), absmax(4 * N), x(most * widest * 2), y(most * widest * 2),
      q(most * K), scale(4 * most), flags(K), list(4 * (1 + K)), x_columns(most * capacity * 2),
      w_columns(N * capacity * 2);
  fill(codes.p, copies * N * K);
  fill_values(absmax.p, 2 * N);
  fill_values(x.p, most * widest);
  const __nv_bfloat16 large = __float2bfloat16_rn(8.0f);
  for (int64_t k = 5; k < K; k += K / 8)
    NATIVE_CUDA(cudaMemcpy(static_cast<char*>(x.p) + 2 * k, &large, 2, cudaMemcpyHostToDevice));
  const auto view = [&](int i) {
    WeightView w;
    w.format = Format::kInt8;
    w.N = N;
    w.K = K;
    w.codes = static_cast<char*>(codes.p) + N * K * i;
    w.scales = absmax.p;
    return w;
  };
  const auto is_ours = [](const Plan& plan) {
    return plan.kernel == KernelId::kFused || plan.kernel == KernelId::kWgmma;
  };
  for (const int64_t M : {1, 8, 16, 64, 256, 2048, 8192}) {
    Problem problem;
    problem.format = Format::kInt8;
    problem.M = M;
    problem.N = N;
    problem.K = K;
    problem.arch = cuda::device_facts().arch;
    problem.sm_count = cuda::device_facts().sm_count;
    const double bytes = 1.0 * N * K + 2.0 * M * (N + K);
    for (const bool is_dgrad : {false, true}) {
      problem.direction = is_dgrad ? Direction::kDgrad : Direction::kFwd;
      Linear l;
      l.M = M;
      l.plan = make_plan(problem);
      l.in = x.p;
      l.out = y.p;
      if (!is_ours(l.plan)) continue;
      time_case(label(is_dgrad ? "int8 dgrad" : "int8 fwd", s, M), copies, bytes,
                [&](int i, cudaStream_t stream) {
                  l.w = view(i);
                  launch_linear(l, is_dgrad, stream);
                });
    }
    problem.direction = Direction::kFwd;
    problem.has_int8_activations = true;
    const Plan llm = make_plan(problem);
    const auto rows = [&](int i, cudaStream_t stream) {
      QuantizeRowsParams p;
      p.M = M;
      p.K = K;
      p.dtype = DType::kBFloat16;
      p.x = x.p;
      p.threshold = 6.0f;
      p.q = static_cast<int8_t*>(q.p);
      p.scale = static_cast<float*>(scale.p);
      p.outlier = static_cast<uint8_t*>(flags.p);
      p.w = view(i);
      p.columns = {llm.outlier_capacity, static_cast<int32_t*>(list.p), x_columns.p, w_columns.p};
      p.stream = stream;
      cuda::quantize_rows(p);
    };
    const auto product = [&](int i, cudaStream_t stream) {
      Int8EpilogueParams p;
      p.w = view(i);
      p.M = M;
      p.tile_tokens = llm.tile_tokens;
      p.split = llm.split;
      p.dtype = DType::kBFloat16;
      p.q = static_cast<int8_t*>(q.p);
      p.scale = static_cast<float*>(scale.p);
      p.outlier = static_cast<uint8_t*>(flags.p);
      p.columns = {llm.outlier_capacity, static_cast<int32_t*>(list.p), x_columns.p, w_columns.p};
      p.x = x.p;
      p.y = y.p;
      p.stream = stream;
      cuda::int8_epilogue(p);
    };
    if (!is_ours(llm)) continue;
    time_case(label("llm.int8 rows", s, M), copies, 3.0 * M * K, rows);
    time_case(label("llm.int8 product", s, M), copies, bytes, product);
    time_case(label("llm.int8", s, M), copies, bytes, [&](int i, cudaStream_t stream) {
      rows(i, stream);
      product(i, stream);
    });
  }
}

// The kernels no Part of the tables above: one shape each.
void bench_rest() {
  const int64_t N = 14336, K = 4096;
  const int copies = 4;
  Device w(copies * N * K * 2), codes(copies * N * K), absmax(N * K / 64 * 4), seed(8);
  fill_values(w.p, copies * N * K);
  fill(codes.p, copies * N * K);
  fill(absmax.p, 4 * N);
  NATIVE_CUDA(cudaMemset(seed.p, 1, 8));
  const auto part = [](const Device& d, int64_t bytes, int i) {
    return static_cast<char*>(d.p) + bytes * i;
  };
  time_case("quantize nf4 14336x4096 bf16", copies, 2.57 * N * K, [&](int i, cudaStream_t stream) {
    QuantizeParams p;
    p.N = N;
    p.K = K;
    p.dtype = DType::kBFloat16;
    p.w = part(w, N * K * 2, i);
    p.codes = part(codes, N * K / 2, i);
    p.absmax = static_cast<float*>(absmax.p);
    p.stream = stream;
    cuda::quantize(p);
  });
  time_case("tile 14336x4096", copies, 1.0 * N * K, [&](int i, cudaStream_t stream) {
    TileParams p;
    p.N = N;
    p.K = K;
    p.from = reinterpret_cast<uint8_t*>(part(codes, N * K / 2, i));
    p.to = static_cast<uint8_t*>(w.p) + i * (N * K / 2);
    p.stream = stream;
    cuda::tile(p);
  });
  time_case("dequantize int8 14336x4096", copies, 3.0 * N * K, [&](int i, cudaStream_t stream) {
    DequantizeParams p;
    p.w.format = Format::kInt8;
    p.w.N = N;
    p.w.K = K;
    p.w.codes = part(codes, N * K, i);
    p.w.scales = absmax.p;
    p.row_end = N;
    p.dtype = DType::kBFloat16;
    p.out = part(w, N * K * 2, i);
    p.stream = stream;
    cuda::dequantize(p);
  });
  time_case("dropout 8192x4096 bf16", copies, 4.0 * 8192 * K, [&](int i, cudaStream_t stream) {
    DropoutParams p;
    p.count = 8192 * K;
    p.dtype = DType::kBFloat16;
    p.x = part(w, 8192 * K * 2, i);
    p.p = 0.1f;
    p.seed = static_cast<int64_t*>(seed.p);
    p.y = part(codes, 8192 * K * 2, i % 3);
    p.stream = stream;
    cuda::dropout(p);
  });
}

// The narrow products of LoRA, over rotated activations.
void bench_lora() {
  const size_t total = 1ll << 29;
  Device activations(total), grads(total), factor(28672 * 64 * 2), low(8192 * 64 * 2),
      narrow(8192 * 64 * 2), dA(28672 * 64 * 4), dB(28672 * 64 * 4), seed(8), space(256 << 20);
  for (const Device* d : {&activations, &grads}) fill_values(d->p, total / 2);
  fill_values(factor.p, 28672 * 64);
  fill_values(low.p, 8192 * 64);
  NATIVE_CUDA(cudaMemset(seed.p, 1, 8));
  const auto copy_of = [total](const Device& d, int64_t bytes, int i) {
    return static_cast<char*>(d.p) + i % int64_t(total / bytes) * bytes;
  };
  const auto copies_of = [total](int64_t bytes) {
    return int(std::min<int64_t>(64, std::max<int64_t>(1, kRotateBytes / bytes)));
  };
  for (const int64_t K : {4096, 14336})
    for (const int64_t R : {16, 64})
      for (const int64_t M : {1, 16, 64, 1024, 8192})
        for (const int kind : {0, 1, 2}) {
          const char* names[] = {"lora_shrink", "lora_shrink dropout", "lora_shrink transposed"};
          const Shape shape{R, K};
          time_case(label(names[kind], shape, M), copies_of(M * K * 2), 2.0 * M * K,
                    [&](int i, cudaStream_t stream) {
                      LoraShrinkParams p;
                      p.M = M;
                      p.K = K;
                      p.R = R;
                      p.dtype = DType::kBFloat16;
                      p.x = copy_of(activations, M * K * 2, i);
                      p.factor = factor.p;
                      p.is_transposed = kind == 2;
                      p.p = kind == 1 ? 0.1f : 0.0f;
                      p.seed = static_cast<int64_t*>(seed.p);
                      p.s = narrow.p;
                      p.stream = stream;
                      cuda::lora_shrink(p);
                    });
        }
  for (const int64_t C : {4096, 14336})
    for (const int64_t R : {16})
      for (const int64_t M : {16, 1024, 8192})
        for (const int kind : {0, 1, 2}) {
          const char* names[] = {"lora_expand", "lora_expand dropout", "lora_expand add"};
          const Shape shape{C, R};
          time_case(label(names[kind], shape, M), copies_of(M * C * 2),
                    (kind == 2 ? 4.0 : 2.0) * M * C, [&](int i, cudaStream_t stream) {
                      LoraExpandParams p;
                      p.M = M;
                      p.C = C;
                      p.R = R;
                      p.dtype = DType::kBFloat16;
                      p.s = low.p;
                      p.factor = factor.p;
                      p.is_transposed = kind == 1;
                      p.p = kind == 1 ? 0.1f : 0.0f;
                      p.seed = static_cast<int64_t*>(seed.p);
                      p.add = kind == 2;
                      p.out = copy_of(grads, M * C * 2, i);
                      p.stream = stream;
                      cuda::lora_expand(p);
                    });
        }
  for (const Shape& s : {Shape{4096, 4096}, Shape{14336, 4096}, Shape{4096, 14336}})
    for (const int64_t R : {16, 64})
      for (const int64_t M : {1, 64, 1024, 8192})
        for (const bool drops : {false, true}) {
          if (drops && M < 8192) continue;
          const std::string tail = " R=" + std::to_string(R) + (drops ? " dropout" : "");
          LoraWgradParams p;
          p.M = M;
          p.N = s.N;
          p.K = s.K;
          p.R = R;
          p.dtype = DType::kBFloat16;
          p.s = low.p;
          p.lora_b = factor.p;
          p.p = drops ? 0.1f : 0.0f;
          p.seed = static_cast<int64_t*>(seed.p);
          p.ds = narrow.p;
          p.dA = dA.p;
          p.dB = dB.p;
          p.workspace = space.p;
          if (cuda::lora_wgrad_workspace(p) > 256 << 20) throw std::runtime_error("workspace");
          time_case(label("lora_wgrad", s, M, tail.c_str()), copies_of(M * s.K * 2),
                    2.0 * M * (s.N + s.K), [&](int i, cudaStream_t stream) {
                      p.x = copy_of(activations, M * s.K * 2, i);
                      p.dy = copy_of(grads, M * s.N * 2, i);
                      p.stream = stream;
                      cuda::lora_wgrad(p);
                    });
        }
}

}  // namespace

int main(int argc, char** argv) {
  const bool is_dependent = argc > 1 && std::strcmp(argv[1], "--pdl") == 0;
  cuda::set_dependent_launch(is_dependent);
  if (argc > 1 + is_dependent) filter = argv[1 + is_dependent];
  cudaDeviceProp properties;
  NATIVE_CUDA(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s\n", properties.name);
  try {
    bench_copy();
    for (const Shape& s : kShapes) bench_shape(s);
    for (const Shape& s : {Shape{14336, 4096}, Shape{4096, 14336}, Shape{4096, 4096}})
      bench_int8(s);
    bench_rest();
    bench_lora();
  } catch (const Error& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  NATIVE_CUDA(cudaDeviceSynchronize());
  return 0;
}
