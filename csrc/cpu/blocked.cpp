// Quantised linear layer in float32 over SimdKernels. 16-bit tokens are widened first: exact, and
// no slower than the 16-bit dot products of a CPU without matrix units (cpu.h, has_fast_bf16).
//
// Few tokens: one pass over the packed bytes, sums in registers. Bound: reading W (0.52 B a
// weight), about 3.3 vector operations for 16 weights, so both at once on two AVX-512 ports.
//
// Many tokens: columns of the result (rows n of W forward, columns k backward) in units of 64, the
// reduction in chunks of 256:
//
//            <--- 64 --->                      for unit, token block        (parallel)
//      +-----------------+  ^                    for chunk of the reduction
//      | panel | panel   | 256   decoded, L2       decode 64 x 256 weights
//      +-----------------+  v                      for tile of <= 12 tokens
//   x  | tile  | tile    |       registers           c tile += x tile * panel
//      +-----------------+
//
// x is packed once as [tile][reduction][tokens of the tile], so a step of a register tile is two
// vectors of W and one broadcast a token. Low-rank factors are one more chunk: panel = scaling B or
// A, x = s or ds. Every sum has one order, whatever the threads and blocks. Bound: the FMA units;
// decoding costs 2.2 clocks for 16 weights against half a clock a token.
#include "blocked.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "numbers.h"
#include "parallel.h"

namespace fastpeft::cpu {

namespace {

constexpr int64_t kUnit = 64, kChunk = 256;

// Reduction a panel covers. With few tokens its 64 x 128 floats stay in L1 between decode and use;
// with many the longer chunk saves passes over the sums. 2.8 GHz Sapphire Rapids, one thread, 1536
// x 576: M = 16 228 us (128) against 260 (256); 4096 x 4096, M = 512: 120 ms (128), 114 (256).
int64_t chunk_for(int64_t M) {
  return M <= 32 ? 128 : kChunk;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

// Uninitialised, on a cache line.
Buffer buffer(int64_t count) {
  const size_t bytes = size_t(round_up<int64_t>(std::max<int64_t>(count, 1) * 4, 64));
  float* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  FASTPEFT_CHECK(p, "no memory for a workspace of ", bytes, " bytes");
  return Buffer(p);
}

const void* at(DType dtype, const void* base, int64_t element) {
  return static_cast<const char*>(base) + element * dtype_bytes(dtype);
}
void* at(DType dtype, void* base, int64_t element) {
  return static_cast<char*>(base) + element * dtype_bytes(dtype);
}

// [rows][width] of dtype -> float32 [rows][stride], zero padded.
Buffer widened(const SimdKernels& k, DType dtype, const void* from, int64_t rows, int64_t width,
               int64_t stride) {
  Buffer to = buffer(rows * stride);
  for (int64_t r = 0; r < rows; ++r) {
    k.widen(dtype, at(dtype, from, r * width), &to[r * stride], width);
    std::fill(&to[r * stride + width], &to[(r + 1) * stride], 0.0f);
  }
  return to;
}

// Tokens in tiles of nearly equal size: 16 become 8 + 8, not 12 + 4.
struct Tiling {
  int64_t M, count;
  Tiling(int64_t tokens, int64_t widest) : M(tokens), count(ceil_div<int64_t>(tokens, widest)) {}
  int64_t begin(int64_t tile) const { return tile * M / count; }
  int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
};

// [M][width] of dtype -> float32 [tile][depth][tokens of the tile], zero for width <= j < depth.
Buffer packed(const SimdKernels& k, const Tiling& tiling, DType dtype, const void* from,
              int64_t width, int64_t depth) {
  Buffer to = buffer(tiling.M * depth);
  parallel_for(tiling.count, ceil_div<int64_t>(4096, depth), [&](int64_t begin, int64_t end) {
    float rows[kMaxTileTokens][kChunk];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t m0 = tiling.begin(tile), tokens = tiling.size(tile);
      for (int64_t j0 = 0; j0 < depth; j0 += kChunk) {
        const int64_t count = std::min(kChunk, depth - j0);
        const int64_t inside = std::max<int64_t>(0, std::min(count, width - j0));
        for (int64_t m = 0; m < tokens; ++m) {
          k.widen(dtype, at(dtype, from, (m0 + m) * width + j0), rows[m], inside);
          std::fill(rows[m] + inside, rows[m] + count, 0.0f);
        }
        float* out = &to[m0 * depth + j0 * tokens];
        for (int64_t j = 0; j < count; ++j)
          for (int64_t m = 0; m < tokens; ++m) *out++ = rows[m][j];
      }
    }
  });
  return to;
}

// One blocked product c [M][columns] = sum over `depth` of x times panels, plus a low-rank chunk.
struct Product {
  const SimdKernels& k;
  DType dtype;
  int64_t columns, depth, rank;  // depth padded; rank 0: no low-rank chunk
  Tiling tiling;
  const float* x;         // packed, depth
  const float* low_rank;  // packed, rank
  const float* bias;      // [columns] or null
  void* out;              // [M][columns]

  int64_t chunk() const { return chunk_for(tiling.M); }
  int64_t sub_stride() const { return chunk() * k.panel; }

  // What one task holds: a unit of columns for a range of tiles, and its sums [tokens][kUnit].
  struct Task {
    int64_t unit, tile_begin, tile_end;
    float* c;
  };

  // c (+)= tokens [first, first + count) times panels. is_last: the sums are complete then, and go
  // out tile by tile, so that the stores hide behind the next tile's products.
  void add_chunk(const Task& task, const float* panels, const float* tokens, int64_t tokens_depth,
                 int64_t first, int64_t count, bool adds, bool is_last) const {
    const int64_t m_first = tiling.begin(task.tile_begin);
    for (int64_t tile = task.tile_begin; tile < task.tile_end; ++tile) {
      const int64_t m0 = tiling.begin(tile), size = tiling.size(tile);
      const float* x_tile = tokens + m0 * tokens_depth + first * size;
      float* c = task.c + (m0 - m_first) * kUnit;
      if (is_last) fetch_result(task.unit, m0, size);
      for (int64_t sub = 0; sub * k.panel < kUnit; ++sub)
        k.tile[size](count, panels + sub * sub_stride(), x_tile, c + sub * k.panel, kUnit, adds);
      if (is_last) finish(task.unit, m0, size, c);
    }
  }

  // Lines of the result that finish() will write, fetched while the tile computes: without it they
  // cost 10 % at 1536 x 576, M = 512.
  void fetch_result(int64_t unit, int64_t m0, int64_t size) const {
    const int64_t first = unit * kUnit, width = std::min(kUnit, columns - first);
    for (int64_t m = m0; m < m0 + size; ++m) {
      const char* row = static_cast<const char*>(at(dtype, out, m * columns + first));
      for (int64_t b = 0; b < width * dtype_bytes(dtype); b += 64) __builtin_prefetch(row + b, 1);
    }
  }

  void finish(int64_t unit, int64_t m0, int64_t size, float* c) const {
    const int64_t first = unit * kUnit, width = std::min(kUnit, columns - first);
    for (int64_t m = m0; m < m0 + size; ++m, c += kUnit) {
      for (int64_t i = 0; bias && i < width; ++i) c[i] += bias[first + i];
      k.narrow(dtype, c, at(dtype, out, m * columns + first), width);
    }
  }

  // decode(unit, first, count, panels): reduction first ... first + count of the unit's columns;
  // factor(unit, first, count, panels): the same for the low-rank factor, which goes first.
  template <class Decode, class Factor>
  void run(const Decode& decode, const Factor& factor) const {
    // Blocks of about 96 tokens share the work out evenly; neighbours of one unit that fall to one
    // thread are done together, up to about 512 tokens, so that panels are rarely decoded twice.
    const int64_t units = ceil_div(columns, kUnit), per_block = 96 / k.tile_tokens;
    const int64_t blocks = ceil_div(tiling.count, per_block), most = std::min<int64_t>(blocks, 5);
    parallel_for(units * blocks, 1, [&](int64_t begin, int64_t end) {
      const Buffer panels = buffer(kUnit * chunk());
      const Buffer c = buffer(most * per_block * k.tile_tokens * kUnit);
      int64_t together = 1;
      for (int64_t i = begin; i < end; i += together) {
        const int64_t unit = i / blocks, block = i % blocks;
        together = std::min({most, blocks - block, end - i});
        const int64_t tile_end = std::min(tiling.count, (block + together) * per_block);
        const Task task{unit, block * per_block, tile_end, c.get()};
        for (int64_t j = 0; j < rank; j += chunk()) {
          const int64_t count = std::min(chunk(), rank - j);
          factor(unit, j, count, panels.get());
          add_chunk(task, panels.get(), low_rank, rank, j, count, j > 0, false);
        }
        for (int64_t j = 0; j < depth; j += chunk()) {
          const int64_t count = std::min(chunk(), depth - j);
          decode(unit, j, count, panels.get());
          add_chunk(task, panels.get(), x, depth, j, count, rank > 0 || j > 0, j + count == depth);
        }
      }
    });
  }
};

// Strips a piece of work should hold at least, so that waking a thread pays.
int64_t grain_strips(int64_t weights_per_strip, int64_t M) {
  return ceil_div<int64_t>(131072, weights_per_strip * (M + 3));
}

void few_tokens_fwd(const SimdKernels& k, const QLinearFwdParams& p) {
  const int64_t M = p.M, N = p.w.N, K = p.w.K, R = p.s ? p.R : 0;
  const int64_t Kp = round_up<int64_t>(K, kTileK);
  const Buffer x = widened(k, p.dtype, p.x, M, K, Kp);
  const Buffer s = widened(k, p.dtype, p.s, R ? M : 0, R, R);
  parallel_for(ceil_div<int64_t>(N, 16), grain_strips(16 * Kp, M), [&](int64_t begin, int64_t end) {
    alignas(64) float y[kMaxFewTokens * 16], bias[16] = {};
    const Buffer b = buffer(16 * R), columns = buffer(16 * R);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t n0 = strip * 16, rows = std::min<int64_t>(16, N - n0);
      k.few_fwd[M](p.w, strip, x.get(), Kp, y);
      if (R) k.widen(p.dtype, at(p.dtype, p.lora_b, n0 * R), b.get(), rows * R);
      for (int64_t r = 0; r < R; ++r)
        for (int64_t n = 0; n < 16; ++n) columns[r * 16 + n] = n < rows ? b[n * R + r] : 0.0f;
      if (p.bias) k.widen(p.dtype, at(p.dtype, p.bias, n0), bias, rows);
      for (int64_t m = 0; m < M; ++m) {
        float low_rank[16] = {};
        for (int64_t r = 0; r < R; ++r)
          k.add_scaled(&columns[r * 16], 16, p.scaling * s[m * R + r], low_rank);
        for (int64_t n = 0; n < 16; ++n) y[m * 16 + n] += low_rank[n] + bias[n];
        k.narrow(p.dtype, y + m * 16, at(p.dtype, p.y, m * N + n0), rows);
      }
    }
  });
}

void few_tokens_dgrad(const SimdKernels& k, const QLinearDgradParams& p) {
  const int64_t M = p.M, N = p.w.N, K = p.w.K, R = p.ds ? p.R : 0;
  const int64_t Np = round_up<int64_t>(N, kTileN), strips = ceil_div<int64_t>(K, kTileK);
  const int64_t chunk = M <= 4 ? 16 : 8;  // strips whose sums stay in L1
  const Buffer dy = widened(k, p.dtype, p.dy, M, N, Np);
  const Buffer ds = widened(k, p.dtype, p.ds, R ? M : 0, R, R);
  parallel_for(strips, grain_strips(64 * Np, M), [&](int64_t begin, int64_t end) {
    const Buffer dx = buffer(M * chunk * 64), sum = buffer(chunk * 64);
    const Buffer a = buffer(R ? 16 * chunk * 64 : 0);
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t last = std::min(end, first + chunk), k0 = first * 64;
      const int64_t width = std::min(K, last * 64) - k0, stride = chunk * 64;
      k.few_dgrad[M](p.w, first, last, dy.get(), Np, dx.get(), stride);
      for (int64_t r0 = 0; r0 < R; r0 += 16) {
        const int64_t ranks = std::min<int64_t>(16, R - r0);
        for (int64_t r = 0; r < ranks; ++r)
          k.widen(p.dtype, at(p.dtype, p.lora_a, (r0 + r) * K + k0), &a[r * stride], width);
        for (int64_t m = 0; m < M; ++m) {
          std::fill(sum.get(), sum.get() + width, 0.0f);
          for (int64_t r = 0; r < ranks; ++r)
            for (int64_t i = 0; i < width; ++i) sum[i] += ds[m * R + r0 + r] * a[r * stride + i];
          for (int64_t i = 0; i < width; ++i) dx[m * stride + i] += sum[i];
        }
      }
      for (int64_t m = 0; m < M; ++m)
        k.narrow(p.dtype, &dx[m * stride], at(p.dtype, p.dx, m * K + k0), width);
    }
  });
}

void many_tokens_fwd(const SimdKernels& k, const QLinearFwdParams& p) {
  const int64_t N = p.w.N, R = p.s ? p.R : 0, Kp = round_up<int64_t>(p.w.K, kTileK);
  const Tiling tiling(p.M, k.tile_tokens);
  const Buffer x = packed(k, tiling, p.dtype, p.x, p.w.K, Kp);
  const Buffer s = R ? packed(k, tiling, p.dtype, p.s, R, R) : Buffer();
  const Buffer bias = p.bias ? widened(k, p.dtype, p.bias, 1, N, N) : Buffer();
  const Product product{k, p.dtype, N, Kp, R, tiling, x.get(), s.get(), bias.get(), p.y};
  const int64_t strips_n = ceil_div<int64_t>(N, kTileN);
  product.run(
      [&](int64_t unit, int64_t first, int64_t count, float* panels) {
        for (int64_t i = 0; i < kUnit / 16 && unit * (kUnit / 16) + i < strips_n; ++i) {
          float* out = panels + i * 16 / k.panel * product.sub_stride() + i * 16 % k.panel;
          for (int64_t j = 0; j < count; j += 64)
            k.decode_columns(p.w, unit * (kUnit / 16) + i, (first + j) / 64, out + j * k.panel,
                             k.panel);
        }
      },
      [&](int64_t unit, int64_t first, int64_t count, float* panels) {
        float row[kChunk];
        for (int64_t i = 0; i < std::min(kUnit, N - unit * kUnit); ++i) {
          k.widen(p.dtype, at(p.dtype, p.lora_b, (unit * kUnit + i) * R + first), row, count);
          float* out = panels + i / k.panel * product.sub_stride() + i % k.panel;
          for (int64_t r = 0; r < count; ++r) out[r * k.panel] = p.scaling * row[r];
        }
      });
}

void many_tokens_dgrad(const SimdKernels& k, const QLinearDgradParams& p) {
  const int64_t N = p.w.N, K = p.w.K, R = p.ds ? p.R : 0, Np = round_up<int64_t>(N, kTileN);
  const Tiling tiling(p.M, k.tile_tokens);
  const Buffer dy = packed(k, tiling, p.dtype, p.dy, N, Np);
  const Buffer ds = R ? packed(k, tiling, p.dtype, p.ds, R, R) : Buffer();
  const Product product{k, p.dtype, K, Np, R, tiling, dy.get(), ds.get(), nullptr, p.dx};
  const int64_t strips_k = ceil_div<int64_t>(K, kTileK);
  product.run(
      [&](int64_t unit, int64_t first, int64_t count, float* panels) {
        for (int64_t i = 0; i < kUnit / 64 && unit * (kUnit / 64) + i < strips_k; ++i) {
          float* out = panels + i * 64 / k.panel * product.sub_stride();
          for (int64_t j = 0; j < count; j += 16)
            k.decode_rows(p.w, (first + j) / 16, unit * (kUnit / 64) + i, out + j * k.panel,
                          k.panel, product.sub_stride());
        }
      },
      [&](int64_t unit, int64_t first, int64_t count, float* panels) {
        float row[kUnit];
        const int64_t width = std::min(kUnit, K - unit * kUnit);
        for (int64_t r = 0; r < count; ++r) {
          k.widen(p.dtype, at(p.dtype, p.lora_a, (first + r) * K + unit * kUnit), row, width);
          std::fill(row + width, row + kUnit, 0.0f);
          for (int64_t i = 0; i < kUnit; i += k.panel)
            std::copy(row + i, row + i + k.panel,
                      panels + i / k.panel * product.sub_stride() + r * k.panel);
        }
      });
}

}  // namespace

void tokens_fwd(const SimdKernels& k, const QLinearFwdParams& p) {
  p.M <= kMaxFewTokens ? few_tokens_fwd(k, p) : many_tokens_fwd(k, p);
}

void tokens_dgrad(const SimdKernels& k, const QLinearDgradParams& p) {
  p.M <= kMaxFewTokens ? few_tokens_dgrad(k, p) : many_tokens_dgrad(k, p);
}

}  // namespace fastpeft::cpu
