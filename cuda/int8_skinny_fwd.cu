// int8 linear layer for few tokens on tensor cores (mma.sync, sm_80 and newer).
//
//   weight only   y [M, N] = (x codes^T) absmax / 127 + bias + scaling * s B^T     x [M, K] 16 bit
//   LLM.int8()    y [M, N] = (q codes^T) scale_x absmax / 127^2 + bias + scaling * s B^T
//                            + sum over outlier columns k of x[m, k] W[n, k]       q [M, K] int8
//   codes int8 [N, K] row-major, absmax float32 [N]; s [M, R], B [N, R]
//
// Weights are the 16-row operand, 8 (kTok = 1) or 16 tokens the columns of mma. The order of the
// reduction is free, so a lane takes 16 neighbouring bytes of rows g and g + 8 straight from
// memory: lane t of a row holds columns 16t .. 16t+15 of 64. Weight only: a word's even bytes are
// one fragment register and its odd bytes another (int8_decode.cuh), and x, loaded from the same 16
// columns, is put in that order once for all row strips. int8: the words are fragments as they are.
//
//     block: row strips [s0, s1) of 16, all of K        K:  | warp 0 | warp 1 | ... | warp 15 |
//     a warp: x of its columns in registers (up to kUnits * 128 at a time), then strip after strip,
//             so that a block reads memory in order; its own ring of kDepth units in shared memory
//             keeps kDepth * 32 KB a multiprocessor in flight
//
// Sums of the warps are added in their order through shared memory: no atomics, same bits on every
// run. Scales belong to rows, so they come last. Bound: reading the codes once. At 4.1 TB/s a
// multiprocessor has 58 issue slots for 256 weights; weight only needs 17 for 8 tokens.
#include <algorithm>

#include "dependent_launch.cuh"
#include "device/copy.cuh"
#include "device/mma.cuh"
#include "int8_decode.cuh"
#include "int8_skinny.h"

namespace fastpeft::cuda {

namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kStripRows = 16;
constexpr int kHalf = 64, kUnit = 2 * kHalf;  // columns of a row's four lanes: one copy each, two

struct Args {
  const int8_t* codes;  // [N, K]
  const float* absmax;  // [N]
  int N, K, M, R;
  const void* in;      // x [M, K], or q int8 [M, K]
  const void* bias;    // [N] or null
  const void* s;       // [M, R] or null
  const void* lora_b;  // [N, R]
  float scaling;
  const float* scale;   // int8: [M]
  const int32_t* list;  // int8: number of outlier columns, then the columns; or null
  const void* x;        // int8: [M, K]
  void* y;              // [M, N]
  int units;            // of 128 columns
  int base, rest;       // row strips a block; the first `rest` blocks have one more
  int chunk[2];         // row strips of a chunk, whose sums fit shared memory: short, long block
};

// What differs between 16-bit and int8 activations: the fragment of 64 columns of 8 tokens, and the
// product with a lane's 2 x 16 weight bytes.
template <class T>
struct WideTokens {
  using Sum = float;
  uint32_t b[8];  // as loaded: columns 2i, 2i + 1; arranged: step i takes b[2i], b[2i + 1]

  __device__ __forceinline__ void load(const void* in, int64_t row, int k, bool is_valid) {
    uint4 v[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    if (is_valid) {
      const uint4* at = reinterpret_cast<const uint4*>(static_cast<const T*>(in) + row + k);
      v[0] = __ldg(at);
      v[1] = __ldg(at + 1);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) b[i] = word_of(v[i / 4], i % 4);
  }
  // Columns 4i, 4i + 2 meet a word's even bytes, 4i + 1, 4i + 3 its odd ones.
  __device__ __forceinline__ WideTokens arranged() const {
    WideTokens to;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to.b[2 * i] = __byte_perm(b[2 * i], b[2 * i + 1], 0x5410);
      to.b[2 * i + 1] = __byte_perm(b[2 * i], b[2 * i + 1], 0x7632);
    }
    return to;
  }
  template <int kTok>
  static __device__ __forceinline__ void multiply(float (&acc)[kTok][4], const uint4& top,
                                                  const uint4& bottom, const WideTokens (&x)[kTok],
                                                  const ByteDecoder<T>& decoder) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      decoder.word(word_of(top, i), a[0], a[2]);
      decoder.word(word_of(bottom, i), a[1], a[3]);
#pragma unroll
      for (int j = 0; j < kTok; ++j) mma_16x8x16<T>(acc[j], a, x[j].b[2 * i], x[j].b[2 * i + 1]);
    }
  }
};

template <class T>
struct ByteTokens {
  using Sum = int;
  uint4 b;

  __device__ __forceinline__ void load(const void* in, int64_t row, int k, bool is_valid) {
    b = make_uint4(0, 0, 0, 0);
    if (is_valid)
      b = __ldg(reinterpret_cast<const uint4*>(static_cast<const int8_t*>(in) + row + k));
  }
  __device__ __forceinline__ ByteTokens arranged() const { return *this; }
  template <int kTok>
  static __device__ __forceinline__ void multiply(int (&acc)[kTok][4], const uint4& top,
                                                  const uint4& bottom, const ByteTokens (&x)[kTok],
                                                  const ByteDecoder<T>&) {
#pragma unroll
    for (int j = 0; j < kTok; ++j) {
      mma_16x8x32_s8(acc[j], top.x, bottom.x, top.y, bottom.y, x[j].b.x, x[j].b.y);
      mma_16x8x32_s8(acc[j], top.z, bottom.z, top.w, bottom.w, x[j].b.z, x[j].b.w);
    }
  }
};

// s B^T of strip `strip`, unscaled, as one more partial sum.
template <class T, int kTok>
__device__ __forceinline__ void low_rank(const Args& a, int strip, int m0, int g, int t,
                                         float (&acc)[kTok][4]) {
  const T* s = static_cast<const T*>(a.s);
  const T* factor = static_cast<const T*>(a.lora_b);
  const auto pair = [&](const T* matrix, int row, int rows, int r) {
    const int64_t at = int64_t(min(row, rows - 1)) * a.R;
    const float low = r < a.R ? to_acc(matrix[at + r]) : 0.0f;
    const float high = r + 1 < a.R ? to_acc(matrix[at + r + 1]) : 0.0f;
    return pack_pair<T>(low, high);
  };
  for (int r0 = 0; r0 < a.R; r0 += 16) {
    uint32_t f[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      f[i] = pair(factor, strip * kStripRows + g + i % 2 * 8, a.N, r0 + 2 * t + i / 2 * 8);
#pragma unroll
    for (int j = 0; j < kTok; ++j)
      mma_16x8x16<T>(acc[j], f, pair(s, m0 + 8 * j + g, a.M, r0 + 2 * t),
                     pair(s, m0 + 8 * j + g, a.M, r0 + 2 * t + 8));
  }
}

// One output from the sum over warps.
template <class T, class Sum>
__device__ __forceinline__ float finished(const Args& a, Sum sum, float absmax, float lora, int m,
                                          int n) {
  float value;
  if constexpr (std::is_same_v<Sum, int>) {
    value = float(sum) * (__ldg(a.scale + m) * absmax) * (1.0f / (127.0f * 127.0f));
    const int count = a.list ? __ldg(a.list) : 0;
    float outer = 0.0f;
    for (int i = 0; i < count; ++i) {
      const int64_t k = __ldg(a.list + 1 + i);
      outer += to_acc(static_cast<const T*>(a.x)[int64_t(m) * a.K + k]) *
               float(a.codes[int64_t(n) * a.K + k]);
    }
    value += outer * (absmax * kInt8Step);
  } else {
    value = sum * (absmax * kInt8Step);
  }
  if (a.s) value += a.scaling * lora;
  if (a.bias) value += to_acc(static_cast<const T*>(a.bias)[n]);
  return value;
}

// A warp's ring in shared memory, a unit (16 rows x 128 columns) a slot. A lane copies the very
// bytes that it will read, so nobody waits for anybody: slot [2 halves][rows g, g + 8][32 lanes][16
// bytes].
template <int kUnits, int kDepth>
struct Ring {
  static constexpr int kSlot = 2048, kBytes = kDepth * kSlot;
  uint32_t base;  // this lane's place in slot 0
  int write = 0, read = 0;
  // What is asked for next: unit i of those of a pass, of row strip `row` of the chunk from strip
  // `at`.
  int left;  // units
  int at, rows, row, u0, units, i;
  const int8_t* source;  // this lane's first 16 bytes of row g
  int64_t eight_rows;    // bytes

  __device__ __forceinline__ void start_pass(const Args& a, int first_unit, int u_end, int g,
                                             int t) {
    row = i = 0;
    u0 = first_unit;
    units = min(kUnits, u_end - u0);
    source = a.codes + int64_t(at * kStripRows + g) * a.K + u0 * kUnit + t * 16;
  }
  // Rows past N and columns past K arrive as zeros.
  __device__ __forceinline__ void feed(const Args& a, int s_end, int u_begin, int u_end, int g,
                                       int t) {
    if (left > 0) {
      --left;
      const int n = (at + row) * kStripRows + g, k = (u0 + i) * kUnit + t * 16;
      const int8_t* bottom = source + eight_rows;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool is_column = k + h * kHalf < a.K;
        copy_async16(base + write + h * 1024, source + h * kHalf, is_column && n < a.N ? 16 : 0);
        copy_async16(base + write + h * 1024 + 512, bottom + h * kHalf,
                     is_column && n + 8 < a.N ? 16 : 0);
      }
      source += kUnit;
      if (++i == units) {
        i = 0;
        source += 2 * eight_rows - units * kUnit;
        if (++row == rows) {
          if (u0 + kUnits < u_end) {
            start_pass(a, u0 + kUnits, u_end, g, t);
          } else {
            at += rows;
            rows = min(rows, s_end - at);
            start_pass(a, u_begin, u_end, g, t);
          }
        }
      }
    }
    commit_copies();
    write = write == (kDepth - 1) * kSlot ? 0 : write + kSlot;
  }
};

template <class T, bool kIsWide, int kTok>
struct Config {
  using Tokens = std::conditional_t<kIsWide, WideTokens<T>, ByteTokens<T>>;
  using Sum = typename Tokens::Sum;
  static constexpr int kUnits = kTok == 1 ? 4 : 2;  // units of x that a lane holds in registers
  static constexpr int kTokens = 8 * kTok, kPitch = kTokens + 1;
  static constexpr int kPartial = kStripRows * kPitch;  // sums of a strip
  // Shared memory of a row strip: partial sums [kWarps][kPartial], low-rank product [kPartial],
  // absmax [kStripRows].
  static constexpr int kStripBytes = ((kWarps + 1) * kPartial + kStripRows) * 4;
};

template <class T, bool kIsWide, int kTok, int kDepth>
__global__ void __launch_bounds__(kThreads, 1)
    int8_fwd_skinny_kernel(const __grid_constant__ Args a) {
  using C = Config<T, kIsWide, kTok>;
  using Tokens = typename C::Tokens;
  using Sum = typename C::Sum;
  constexpr int kTokens = C::kTokens, kPitch = C::kPitch, kPartial = C::kPartial,
                kUnits = C::kUnits;
  extern __shared__ __align__(16) unsigned char shared[];
  // [rows][kWarps][kPartial], then [rows][kPartial]
  Sum* partial = reinterpret_cast<Sum*>(shared + kWarps * Ring<kUnits, kDepth>::kBytes);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int block = blockIdx.x, is_long = block < a.rest;
  const int s_begin = block * a.base + min(block, a.rest), s_end = s_begin + a.base + is_long;
  const int chunk = a.chunk[is_long];
  const int u_begin = a.units * warp / kWarps, u_end = a.units * (warp + 1) / kWarps;
  const int m0 = blockIdx.y * kTokens;
  float* lora = reinterpret_cast<float*>(partial + chunk * kWarps * kPartial);
  float* absmax = lora + chunk * kPartial;  // [rows][kStripRows]
  // Asked for long before it is needed: a load behind the sums would cost the latency of memory.
  // Part of the next group of copies.
  const auto load_absmax = [&](int base, int rows) {
    const int n = base * kStripRows + threadIdx.x;
    if (threadIdx.x < rows * kStripRows)
      copy_async4(shared_address(absmax + threadIdx.x), a.absmax + n, n < a.N ? 4 : 0);
  };

  Ring<kUnits, kDepth> ring;
  ring.base = shared_address(shared) + warp * ring.kBytes + lane * 16;
  ring.left = (u_end - u_begin) * (s_end - s_begin);
  ring.eight_rows = int64_t(a.K) * 8;
  ring.at = s_begin;
  ring.rows = chunk;
  ring.start_pass(a, u_begin, u_end, g, t);
  // One unit of weights before x, the rest of the ring behind it: x asked for behind a whole ring
  // arrives when the ring has long been full (measured: the deeper the ring, the slower).
  load_absmax(s_begin, chunk);
  ring.feed(a, s_end, u_begin, u_end, g, t);
  launch_dependents();
  wait_for_predecessor();

  const ByteDecoder<T> decoder;
  Tokens x[kUnits][2][kTok];  // of the units of a pass
  const auto load_tokens = [&](int u0, int units) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < kTok; ++j) {
          const int k = (u0 + i) * kUnit + h * kHalf + t * 16, m = m0 + 8 * j + g;
          x[i][h][j].load(a.in, int64_t(m) * a.K, k, m < a.M && k < a.K && i < units);
        }
  };
  const auto arrange_tokens = [&] {
#pragma unroll
    for (int i = 0; i < kUnits; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < kTok; ++j) x[i][h][j] = x[i][h][j].arranged();
  };
  load_tokens(u_begin, u_end - u_begin);
#pragma unroll
  for (int i = 1; i < kDepth; ++i) ring.feed(a, s_end, u_begin, u_end, g, t);
  arrange_tokens();
  for (int base = s_begin; base < s_end; base += chunk) {
    const int rows = min(chunk, s_end - base);
    if (base > s_begin) load_absmax(base, rows);
    if (a.s && warp < rows) {
      float low[kTok][4] = {};
      low_rank<T, kTok>(a, base + warp, m0, g, t, low);
#pragma unroll
      for (int j = 0; j < kTok; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          lora[warp * kPartial + (g + e / 2 * 8) * kPitch + 8 * j + 2 * t + e % 2] = low[j][e];
    }
    int u0 = u_begin;
    do {
      const int units = min(kUnits, u_end - u0);
      if ((base > s_begin || u0 > u_begin) && u_end - u_begin > kUnits) {
        load_tokens(u0, units);
        arrange_tokens();
      }
      for (int row = 0; row < rows; ++row) {
        Sum acc[kTok][4] = {};
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          if (i >= units) break;
          wait_copies<kDepth - 1>();
          uint4 top[2], bottom[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            top[h] = load_shared16(ring.base + ring.read + h * 1024);
            bottom[h] = load_shared16(ring.base + ring.read + h * 1024 + 512);
          }
          ring.read = ring.read == (kDepth - 1) * ring.kSlot ? 0 : ring.read + ring.kSlot;
          ring.feed(a, s_end, u_begin, u_end, g, t);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            Tokens::template multiply<kTok>(acc, top[h], bottom[h], x[i][h], decoder);
        }
        Sum* to = partial + (row * kWarps + warp) * kPartial + g * kPitch + 2 * t;
#pragma unroll
        for (int j = 0; j < kTok; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            Sum& at = to[e / 2 * 8 * kPitch + 8 * j + e % 2];
            at = u0 == u_begin ? acc[j][e] : at + acc[j][e];
          }
      }
      u0 += kUnits;
    } while (u0 < u_end);
    wait_copies<0>();  // absmax
    __syncthreads();
    const int outputs = rows * kStripRows * min(kTokens, a.M - m0);
    for (int o = threadIdx.x; o < outputs; o += kThreads) {
      const int in_chunk = o % (rows * kStripRows), token = o / (rows * kStripRows);
      const int row = in_chunk / kStripRows, at = in_chunk % kStripRows * kPitch + token;
      const int n = base * kStripRows + in_chunk, m = m0 + token;
      if (n >= a.N) continue;
      Sum sum = 0;
#pragma unroll
      for (int part = 0; part < kWarps; ++part)
        sum += partial[(row * kWarps + part) * kPartial + at];
      static_cast<T*>(a.y)[int64_t(m) * a.N + n] = from_acc<T>(
          finished<T>(a, sum, absmax[in_chunk], a.s ? lora[row * kPartial + at] : 0.0f, m, n));
    }
    if (base + chunk < s_end) __syncthreads();  // the partial sums are read
  }
}

template <class T, bool kIsWide, int kTok, int kDepth>
void launch(Args a, Stream stream) {
  using C = Config<T, kIsWide, kTok>;
  constexpr int kRingBytes = kWarps * Ring<C::kUnits, kDepth>::kBytes;
  const auto kernel = int8_fwd_skinny_kernel<T, kIsWide, kTok, kDepth>;
  const DeviceFacts facts = device_facts();
  const int strips = ceil_div(a.N, kStripRows), blocks = std::min(strips, facts.sm_count);
  const int room = (facts.shared_bytes - kRingBytes) / C::kStripBytes;
  FASTPEFT_CHECK(room > 0, "int8_fwd_skinny_kernel: ", kRingBytes + C::kStripBytes,
                 " bytes of shared memory a block are needed, the device has ", facts.shared_bytes);
  a.units = ceil_div(a.K, kUnit);
  a.base = strips / blocks;
  a.rest = strips % blocks;
  for (int i = 0; i < 2; ++i)
    a.chunk[i] = ceil_div(a.base + i, ceil_div(a.base + i, std::min(room, kWarps)));
  allow_shared_memory(reinterpret_cast<const void*>(kernel),
                      kRingBytes + std::min(room, kWarps) * C::kStripBytes);
  const int token_chunks = ceil_div(a.M, C::kTokens);
  FASTPEFT_CHECK(token_chunks < 65536, "int8_fwd_skinny_kernel: ", a.M, " tokens in one launch");
  launch_kernel(kernel, "int8_fwd_skinny_kernel", dim3(unsigned(blocks), unsigned(token_chunks)),
                kThreads, kRingBytes + std::max(a.chunk[0], a.chunk[a.rest > 0]) * C::kStripBytes,
                stream, 1, a);
}

template <class T, bool kIsWide>
void run(const Args& a, Stream stream) {
  const bool is_wide = a.M > 8;
  if (device_facts().shared_bytes < (160 << 10))  // 99 KB of sm_86, sm_89 and sm_120
    return is_wide ? launch<T, kIsWide, 2, 2>(a, stream) : launch<T, kIsWide, 1, 2>(a, stream);
  is_wide ? launch<T, kIsWide, 2, 3>(a, stream) : launch<T, kIsWide, 1, 3>(a, stream);
}

template <bool kIsWide>
void run_dtype(const Args& a, DType dtype, Stream stream) {
  dtype == DType::kBFloat16 ? run<bf16, kIsWide>(a, stream) : run<fp16, kIsWide>(a, stream);
}

bool weight_fits(const WeightView& w, DType dtype) {
  return w.format == Format::kInt8 && w.K % 16 == 0 && is_aligned(w.codes, 16) && is_16bit(dtype) &&
         w.N < (1 << 30) && w.K < (1 << 30);
}

Args weight_args(const WeightView& w, int64_t M) {
  Args a = {};
  a.codes = static_cast<const int8_t*>(w.codes);
  a.absmax = static_cast<const float*>(w.scales);
  a.N = int(w.N);
  a.K = int(w.K);
  a.M = int(M);
  return a;
}

}  // namespace

bool int8_skinny_fits(const QLinearFwdParams& p) {
  return weight_fits(p.w, p.dtype) && is_aligned(p.x, 16);
}

bool int8_skinny_fits(const Int8EpilogueParams& p) {
  return weight_fits(p.w, p.dtype) && is_aligned(p.q, 16) && !p.acc &&
         (p.outlier == nullptr || p.columns.list != nullptr);
}

void int8_skinny_fwd(const QLinearFwdParams& p) {
  Args a = weight_args(p.w, p.M);
  a.R = p.s ? int(p.R) : 0;
  a.in = p.x;
  a.bias = p.bias;
  a.s = p.R > 0 ? p.s : nullptr;
  a.lora_b = p.lora_b;
  a.scaling = p.scaling;
  a.y = p.y;
  run_dtype<true>(a, p.dtype, p.stream);
}

void int8_skinny_fwd(const Int8EpilogueParams& p) {
  Args a = weight_args(p.w, p.M);
  a.R = p.s ? int(p.R) : 0;
  a.in = p.q;
  a.bias = p.bias;
  a.s = p.R > 0 ? p.s : nullptr;
  a.lora_b = p.lora_b;
  a.scaling = p.scaling;
  a.scale = p.scale;
  a.list = p.outlier ? p.columns.list : nullptr;
  a.x = p.x;
  a.y = p.y;
  run_dtype<false>(a, p.dtype, p.stream);
}

}  // namespace fastpeft::cuda
