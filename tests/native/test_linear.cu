// Dequantise (bit for bit), linear layer forward and input gradient (error bound, same bits twice),
// and both captured in a CUDA graph.
#include <algorithm>

#include "../../cuda/launch.h"
#include "check.h"

namespace native {

namespace {

template <class T>
void test_dequantize(const HostWeight& host, const DeviceWeight& device, int64_t begin,
                     int64_t end) {
  if (is_left_out()) return;
  std::vector<T> want((end - begin) * host.K);
  for (size_t i = 0; i < want.size(); ++i) want[i] = narrow<T>(host.exact[begin * host.K + i]);
  Buffer out(want.size() * sizeof(T));
  DequantizeParams p;
  p.w = device.view;
  p.row_begin = begin;
  p.row_end = end;
  p.dtype = TypeOf<T>::value;
  p.out = out.data();
  cuda::dequantize(p);
  check_bits(out, want,
             std::string("dequantize ") + format_name(host.format) + " " + dtype_name(p.dtype) +
                 " " + std::to_string(host.N) + "x" + std::to_string(host.K) + "/" +
                 std::to_string(host.blocksize) + (host.is_nested ? " nested" : "") + " rows " +
                 std::to_string(begin) + ".." + std::to_string(end));
}

template <class T>
struct LinearCase {
  std::vector<T> x, s, factor, bias;
  std::vector<double> want, magnitude;
};

// out[m, o] = sum_i in[m, i] w(o, i) + bias[o] + scaling sum_r s[m, r] f(o, r); magnitude: the root
// of the sum of squared terms times 4, plus what rounding of the result's parts allows.
template <class T>
LinearCase<T> linear_case(const HostWeight& w, int64_t M, int64_t R, bool is_dgrad,
                          double scaling) {
  const int64_t outputs = is_dgrad ? w.K : w.N, inputs = is_dgrad ? w.N : w.K;
  LinearCase<T> c;
  c.x = random_values<T>(M * inputs, 1);
  c.s = random_values<T>(M * R, 2);
  c.factor = random_values<T>(outputs * R, 3, 0.1);
  c.bias = random_values<T>(outputs, 4);
  // Inputs outside, outputs inside where the weight lies so: large weights stay quick.
  for (int64_t m = 0; m < M; ++m) {
    std::vector<double> sum(outputs, 0.0), squares(outputs, 0.0);
    const auto add = [&](int64_t o, double term) {
      sum[o] += term;
      squares[o] += term * term;
    };
    for (int64_t o = 0; o < outputs; ++o) {
      if (!is_dgrad) add(o, wide(c.bias[o]));
      for (int64_t i = 0; !is_dgrad && i < inputs; ++i)
        add(o, wide(c.x[m * inputs + i]) * double(w.exact[o * w.K + i]));
      for (int64_t r = 0; r < R; ++r)
        add(o, scaling * wide(c.s[m * R + r]) * wide(c.factor[is_dgrad ? r * w.K + o : o * R + r]));
    }
    for (int64_t i = 0; is_dgrad && i < inputs; ++i) {
      const double x = wide(c.x[m * inputs + i]);
      for (int64_t o = 0; o < outputs; ++o) add(o, x * double(w.exact[i * w.K + o]));
    }
    const double growth =
        std::is_same_v<T, float> || std::is_same_v<T, double> ? std::sqrt(double(inputs)) : 4.0;
    for (int64_t o = 0; o < outputs; ++o) {
      c.want.push_back(sum[o]);
      c.magnitude.push_back(growth * std::sqrt(squares[o]));
    }
  }
  return c;
}

template <class T>
void test_linear(const HostWeight& host, const DeviceWeight& device, int64_t M, int64_t R,
                 size_t shift, const Plan& plan = {}) {
  if (is_left_out()) return;
  for (const bool is_dgrad : {false, true}) {
    const double scaling = is_dgrad ? 1.0 : 0.5;
    const LinearCase<T> c = linear_case<T>(host, M, R, is_dgrad, scaling);
    Buffer in(c.x, shift), s(c.s), factor(c.factor), bias(c.bias), out(c.want.size() * sizeof(T));
    const auto run = [&] {
      if (is_dgrad) {
        QLinearDgradParams p;
        p.w = device.view;
        p.M = M;
        p.R = R;
        p.plan = plan;
        p.dtype = TypeOf<T>::value;
        p.dy = in.data();
        p.ds = R ? s.data() : nullptr;
        p.lora_a = R ? factor.data() : nullptr;
        p.dx = out.data();
        cuda::qlinear_dgrad(p);
      } else {
        QLinearFwdParams p;
        p.w = device.view;
        p.M = M;
        p.R = R;
        p.plan = plan;
        p.dtype = TypeOf<T>::value;
        p.x = in.data();
        p.bias = bias.data();
        p.s = R ? s.data() : nullptr;
        p.lora_b = R ? factor.data() : nullptr;
        p.scaling = float(scaling);
        p.y = out.data();
        cuda::qlinear_fwd(p);
      }
    };
    run();
    const std::string what =
        std::string(is_dgrad ? "dgrad " : "fwd ") + format_name(host.format) + " " +
        dtype_name(TypeOf<T>::value) + " M" + std::to_string(M) + " N" + std::to_string(host.N) +
        " K" + std::to_string(host.K) + " R" + std::to_string(R) + "/" +
        std::to_string(host.blocksize) + (host.is_nested ? " nested" : "") +
        (plan.tile_tokens
             ? std::string(" ") + kernel_name(plan.kernel) + " " + std::to_string(plan.tile_rows) +
                   "x" + std::to_string(plan.tile_tokens) + "/" + std::to_string(plan.split)
             : "");
    check_sums<T>(out, c.want, c.magnitude, what);
    const std::vector<T> first = out.read<T>();
    out.poison();
    run();
    check_bits(out, first, what + " again");
  }
}

Plan tiles(KernelId kernel, int64_t rows, int64_t tokens, int64_t split) {
  Plan plan;
  plan.kernel = kernel;
  plan.tile_rows = rows;
  plan.tile_tokens = tokens;
  plan.split = split;
  return plan;
}

}  // namespace

// The tensor-core kernel of int8 weights: whole and ragged tiles, a cut last wave, every tile cut,
// with low-rank product.
void test_int8_tiles() {
  if (cuda::device_facts().arch != 90) return;
  struct Case {
    int64_t M, N, K, R;
  };
  for (const Case c : {Case{17, 136, 80, 0}, Case{64, 1032, 592, 16}, Case{130, 264, 1040, 64},
                       Case{300, 520, 624, 0}, Case{520, 400, 528, 8}, Case{1, 8, 16, 0}}) {
    const HostWeight host = make_weight(Format::kInt8, c.N, c.K, 64, false, unsigned(c.N + c.K));
    const DeviceWeight device(host);
    struct Tile {
      int64_t tokens, split;
    };
    for (const Tile t : {Tile{64, 1}, Tile{64, 3}, Tile{64, 4}, Tile{128, 1}, Tile{128, 4},
                         Tile{256, 1}, Tile{256, 3}}) {
      if (t.split > 1 && std::min(c.N, c.K) < 256) continue;
      const Plan plan = tiles(KernelId::kWgmma, 128, t.tokens, t.split);
      if (t.split != 3) test_linear<__nv_bfloat16>(host, device, c.M, c.R, 0, plan);
      if (t.split != 4) test_linear<__half>(host, device, c.M, c.R, 0, plan);
    }
  }
}

// The tensor-core kernels of NF4 with every tile and split: ragged tiles, fewer k-blocks than
// blocks of a cluster or stages, more than one tile of tokens, with low-rank product.
void test_nf4_tiles() {
  if (cuda::device_facts().arch != 90) return;
  struct Case {
    int64_t M, N, K, blocksize, R;
  };
  for (const Case c :
       {Case{13, 72, 64, 64, 0}, Case{16, 200, 320, 64, 16}, Case{40, 136, 1088, 64, 64},
        Case{64, 520, 256, 256, 0}, Case{130, 264, 1024, 128, 8}, Case{300, 136, 192, 64, 16},
        // the last group of the second level ends with the last row, 8 rows of padding follow
        Case{20, 72, 2048, 64, 0}})
    for (const bool is_nested : {false, true}) {
      const HostWeight host =
          make_weight(Format::kNf4, c.N, c.K, c.blocksize, is_nested, unsigned(c.N + c.K));
      const DeviceWeight device(host);
      const auto run = [&](const Plan& plan) {
        test_linear<__nv_bfloat16>(host, device, c.M, c.R, 0, plan);
      };
      const auto run_narrow = [&](int64_t rows, int64_t tokens, int64_t split) {
        const Plan plan = tiles(KernelId::kNarrow, rows, tokens, split);
        run(plan);
        test_linear<__half>(host, device, c.M, c.R, 0, plan);
      };
      for (const int64_t tokens : {128, 256}) {
        run(tiles(KernelId::kWgmma, 128, tokens, 1));
        test_linear<__half>(host, device, c.M, c.R, 0, tiles(KernelId::kWgmma, 128, tokens, 1));
      }
      for (const int64_t tokens : {16, 32, 64, 128}) {
        if (tokens < 128 && c.M > 2 * tokens) continue;
        for (const int64_t split : {1, 2, 4}) {
          run_narrow(64, tokens, split);
          if (split == 1 || (split == 2 && tokens == 128)) run_narrow(128, tokens, split);
        }
      }
    }
}

void test_linears() {
  struct Shape {
    Format format;
    int64_t N, K, blocksize;
  };
  const Shape shapes[] = {
      {Format::kNf4, 48, 128, 64},
      {Format::kNf4, 16, 64, 64},
      {Format::kNf4, 7, 64, 64},
      {Format::kNf4, 341, 192, 64},
      {Format::kNf4, 40, 1088, 64},
      {Format::kNf4, 33, 100, 64},
      {Format::kNf4, 24, 96, 32},
      {Format::kNf4, 5, 7, 64},
      {Format::kNf4, 64, 192, 128},
      {Format::kNf4, 520, 256, 256},
      {Format::kFp4, 72, 320, 64},
      {Format::kInt8, 33, 80, 64},
      {Format::kInt8, 19, 45, 64},
      {Format::kNf4, 2500, 64, 64},
      {Format::kInt8, 7, 16, 64},
      {Format::kInt8, 72, 2192, 64},
      {Format::kInt8, 17000, 144, 64},
      // dgrad of few tokens: several units a block, whole strips or halves; clusters of blocks.
      {Format::kNf4, 40, 14336, 64},
      {Format::kNf4, 24, 9600, 32},
      {Format::kNf4, 4104, 64, 64}};
  for (const Shape& s : shapes)
    for (const bool is_nested : {false, true}) {
      if (s.format == Format::kInt8 && is_nested) continue;
      const HostWeight host =
          make_weight(s.format, s.N, s.K, s.blocksize, is_nested, unsigned(s.N + s.K));
      const DeviceWeight device(host);
      for (const int64_t M : {1, 2, 5, 8, 13, 17}) {
        const int64_t R = M == 1 ? 0 : M == 2 ? 7 : M == 5 ? 13 : M == 8 ? 16 : 33;
        test_linear<__nv_bfloat16>(host, device, M, R, 0);
        test_linear<__half>(host, device, M, R, 0);
        if (M == 2 || M > 5) continue;
        test_linear<float>(host, device, M, R, 0);
        test_linear<double>(host, device, M, R, 0);
        test_linear<__nv_bfloat16>(host, device, M, R, 2);  // misaligned activations
      }
      if (is_nested) {
        test_dequantize<__nv_bfloat16>(host, device, 0, host.N);
        test_dequantize<__half>(host, device, 0, host.N);
        test_dequantize<__nv_bfloat16>(host, device, 3, host.N - 1);
      }
      test_dequantize<float>(host, device, 0, host.N);
      test_dequantize<double>(host, device, host.N / 2, host.N);
      test_dequantize<__nv_bfloat16>(host, device, 1, host.N);
    }
}

// More columns than the warps of a block take in one go, for one and for several row strips a
// block.
void test_wide_linears() {
  for (const int64_t N : {20, 2136})
    for (const bool is_nested : {false, true}) {
      const HostWeight host = make_weight(Format::kNf4, N, 4416, 64, is_nested, unsigned(N));
      const DeviceWeight device(host);
      for (const int64_t M : {2, 3, 14}) test_linear<__nv_bfloat16>(host, device, M, 8, 0);
    }
}

// Launches captured on a stream replay to the same bits.
void test_graph() {
  const HostWeight host = make_weight(Format::kNf4, 96, 128, 64, true, 77);
  const DeviceWeight device(host);
  const int64_t M = 3;
  Buffer x(random_values<__nv_bfloat16>(M * host.K, 12)), y(M * host.N * 2), dx(M * host.K * 2);
  cudaStream_t stream;
  NATIVE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto run = [&] {
    QLinearFwdParams f;
    f.w = device.view;
    f.M = M;
    f.dtype = DType::kBFloat16;
    f.x = x.data();
    f.y = y.data();
    f.stream = stream;
    cuda::qlinear_fwd(f);
    QLinearDgradParams d;
    d.w = device.view;
    d.M = M;
    d.dtype = DType::kBFloat16;
    d.dy = y.data();
    d.dx = dx.data();
    d.stream = stream;
    cuda::qlinear_dgrad(d);
  };
  run();
  const std::vector<uint16_t> want = dx.read<uint16_t>();
  dx.poison();
  y.poison();
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  NATIVE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  run();
  NATIVE_CUDA(cudaStreamEndCapture(stream, &graph));
  NATIVE_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  NATIVE_CUDA(cudaGraphLaunch(replay, stream));
  check_bits(dx, want, "graph replay");
  NATIVE_CUDA(cudaGraphExecDestroy(replay));
  NATIVE_CUDA(cudaGraphDestroy(graph));
  NATIVE_CUDA(cudaStreamDestroy(stream));
}

}  // namespace native
