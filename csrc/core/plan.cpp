#include "plan.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace fastpeft {

namespace {

// What csrc/cpu/blocked.cpp serves: every packed format, computed in float32.
bool cpu_simd_serves(const Problem& p) {
  return p.cpu_lanes > 0 && p.format != Format::kDense && p.dtype != DType::kFloat64;
}

// What cuda/qlinear_skinny_*.cu serve (aligned pointers aside).
bool skinny_serves(const Problem& p) {
  if (p.arch == 0 || !is_16bit(p.dtype) || !is_4bit(p.format) ||
      !scales_by_column(p.K, p.blocksize))
    return false;
  return p.direction == Direction::kFwd ? p.blocksize >= kTileK : p.N % 8 == 0;
}

// Microseconds of the skinny kernels from 9 tokens on, measured on an H200 (cold L2, NF4, bf16, no
// dependent launch): passes of 16 tokens over the strips (16 x 64 weights) that fall to one
// multiprocessor. us at M = 16 / 32 / 64, forward and dgrad:
//   4096x4096   9.1 / 15.8 / 29,  8.4 / 11.4 / 18.7     14336x4096  17 / 31 / 57,  18.3 / 27.4 / 49
//   1024x4096   6.3 / 6.7 / 12,   4.8 / 5.9 / 9.0       28672x8192  54 / 104 / 205, 53 / 94 / 191
// The formula is within 20 % of these.
double skinny_us(const Problem& p) {
  const bool is_fwd = p.direction == Direction::kFwd;
  const int64_t sms = std::max(p.sm_count, 1), passes = ceil_div<int64_t>(p.M, 16);
  const int64_t parts = is_fwd ? ceil_div<int64_t>(p.N, 16) : ceil_div<int64_t>(p.K, 32);
  const int64_t depth = is_fwd ? ceil_div<int64_t>(p.K, 64) : ceil_div<int64_t>(p.N, 32);
  const double waves = double(ceil_div(std::min(parts, sms) * passes, sms));
  const double strips = double(ceil_div(parts, sms) * depth);
  return is_fwd ? 2.5 + waves * (2.5 + 0.028 * strips) : 3.5 + waves * (0.3 + 0.026 * strips);
}

// Columns of LLM.int8() outliers that are kept side by side in 16 bit; those beyond are gathered by
// the kernel itself, a load an element. 512 of them take 23 MB at M = 8192, N = 14336.
constexpr int64_t kOutlierCapacity = 512;

// Tokens up to which one fused pass over the packed bytes wins over anything else. CUDA: the skinny
// kernels win at every size up to 16 (14336x4096, H200: 16 us at M = 1, 27 at 16; dequantise alone
// 41). The general ones (float32, float64, int8, ragged K; 14336x4096, M = 1 / 4: float32 65 / 111,
// int8 36 / 56, and 100 at 8) stand against about 135 and 80 of dequantise + matmul.
// CPU, SIMD: the decoded panels never leave the cache, and the product runs at torch's float32
// speed (one thread of a 2.8 GHz Sapphire Rapids without AMX, 4096 x 4096: M = 1 0.8 ms against 4
// of dequantise + matmul, 16 4.2 against 13, 512 109 against 116; bfloat16 at 512 112 against 210),
// so it serves every M. Where torch's bfloat16 matmul is the faster one by a factor f, dequantise
// (about 3 ms there) pays from M = 3 / (0.21 (1 - 1/f)) on, 16 to 30; not measured on such a
// machine. CPU, plain code or float64: decoding is scalar, the same work on either way.
int64_t fused_tokens(const Problem& p) {
  if (p.arch != 0) return skinny_serves(p) ? 16 : 4;
  if (!cpu_simd_serves(p)) return 4;
  return p.cpu_has_fast_bf16 && p.dtype == DType::kBFloat16 ? 32 : INT64_MAX;
}

// What cuda/qlinear_wgmma.cu was written for, and whether it was compiled.
bool wgmma_serves(const Problem& p) {
#ifdef FASTPEFT_HAS_SM90A
  if (p.arch != 90 || p.format != Format::kNf4 || !is_16bit(p.dtype)) return false;
  return p.M < (1 << 24) && p.N % 8 == 0 && p.K % 64 == 0 && p.blocksize >= 64 &&
         p.K % p.blocksize == 0 && p.N * (p.K / 64) < (int64_t(1) << 31);
#else
  (void)p;
  return false;
#endif
}

// Microseconds of the wgmma kernel with tiles of `tokens`, measured on an H200: a start and an end,
// then k-blocks (256 tokens: tensor cores, 1025 clocks, longer where power limits; 128: decode)
// over the waves of pairs of row tiles. A last wave that fills at most half of the clusters is cut
// in two, for an exchange of sums at 15 bytes a clock.
double wgmma_us(const Problem& p, int64_t tokens) {
  const bool is_fwd = p.direction == Direction::kFwd, is_wide = tokens == 256;
  const int64_t rows = is_fwd ? p.N : p.K, kblocks = ceil_div<int64_t>(is_fwd ? p.K : p.N, 64);
  const int64_t clusters = std::max(p.sm_count / 2, 1);
  const int64_t pairs = ceil_div<int64_t>(rows, 256) * ceil_div<int64_t>(p.M, tokens);
  const int64_t full = pairs / clusters, rest = pairs % clusters;
  const bool is_cut = rest > 0 && 2 * rest <= clusters && kblocks >= 8;
  const double waves = double(full) + (rest == 0 ? 0.0 : is_cut ? 0.5 : 1.0);
  const double exchange = !is_cut ? 0.0 : is_wide ? 2.3 : 1.3;
  return 4.0 + waves * double(kblocks) * (is_wide ? 0.636 : 0.445) + exchange;
}

// Weights whose 16-bit copy, 8 MiB, is nothing beside activations of thousands of tokens. Row tiles
// of 128 in pairs waste a quarter of the tensor cores at 576 rows.
constexpr int64_t kSmallWeight = int64_t(1) << 22;

// Microseconds of dequantise + cuBLAS on the same card: 6.9 to start, the copy at 3.3 TB/s, then 3
// or the slower of 3.5 TB/s and 720 TFLOP/s. us, model / measured: 576x1536 M = 1024 10.6 / 9.9,
// 2048 12.6 / 12.2, 4096 17.6 / 15.9, 16384 47.9 / 51.2; 576x576 M = 8192 14.7 / 14.5. Where the
// wgmma kernels serve it is asked for many tokens and small weights only: large ones get no 16-bit
// copy at any M.
double dequant_matmul_us(const Problem& p) {
  const double weights = double(p.N) * double(p.K);
  const double matmul = std::max({3.0, weights * 2.0 / 3.5e6, 2.0 * double(p.M) * weights / 7.2e8});
  return 6.9 + weights * 2.516 / 3.3e6 + matmul;
}

struct Choice {
  double us = HUGE_VAL;  // never, where the kernel does not serve
  Plan plan;

  // A tile that takes `tile_us`; the first of equals stays.
  void offer(double tile_us, KernelId kernel, int64_t rows, int64_t tokens, int64_t split = 1) {
    if (tile_us >= us) return;
    us = plan.predicted_us = tile_us;
    plan.kernel = kernel;
    plan.tile_rows = rows;
    plan.tile_tokens = tokens;
    plan.split = split;
  }
};

Choice wgmma_choice(const Problem& p) {
  Choice best;
  if (!wgmma_serves(p)) return best;
  for (const int64_t tokens : {256, 128})
    best.offer(wgmma_us(p, tokens), KernelId::kWgmma, 128, tokens);
  return best;
}

// Microseconds of cuda/qlinear_narrow.cu with a tile of 64 or 128 rows whose reduction `split`
// blocks share, fitted to an H200: a launch, then for each wave of blocks a start and its k-blocks.
// Clusters of 4 find 30 places on 132 multiprocessors. us, model / measured:
//   tile    forward                                       gradient
//   64x16   4096x4096 6.8 / 6.9, 8192x8192 15.8 / 15.6    14336x4096 15.1 / 15.0
//   64x32   4096x4096 7.3 / 7.2                           28672x8192 52.7 / 52.7
//   64x64   4096x4096 8.4 / 8.4, 4096x14336 18.5 / 17.9   28672x8192 61.9 / 64.4
//   64x128  4096x4096 11.6 / 12.2 (M = 128)               4096x4096 17.9 / 17.6 (M = 256)
//   128x16  14336x4096 14.3 / 13.7, 28672x8192 46.6/46.6   4096x14336 15.0 / 15.7
//   128x32  14336x4096 15.5 / 14.7, 28672x8192 50.4/50.1   4096x14336 16.3 / 17.3
//   128x64  14336x4096 19.1 / 18.0, 28672x8192 63 / 64      4096x14336 20.0 / 21.0
//   128x128 14336x4096 25.8 / 25.9, 28672x8192 94 / 95    28672x8192 86.5 / 87.8
// Where power limits, 128x128 takes up to 11 % longer (8192x8192, M = 256: 47.7 / 53.4).
double narrow_us(const Problem& p, int64_t rows, int64_t tokens, int64_t split) {
  const bool is_fwd = p.direction == Direction::kFwd, is_tall = rows == 128;
  const int64_t outputs = is_fwd ? p.N : p.K, kblocks = ceil_div<int64_t>(is_fwd ? p.K : p.N, 64);
  const int64_t clusters = ceil_div(outputs, rows) * ceil_div(p.M, tokens);
  const int64_t sms = std::max(p.sm_count, 8);
  const int64_t places = split == 4 ? sms * 30 / 132 : sms / split;
  const double waves = double(ceil_div(clusters, std::max<int64_t>(places, 1)));
  const double each = double(ceil_div(kblocks, split));
  const int width = tokens == 16 ? 0 : tokens == 32 ? 1 : tokens == 64 ? 2 : 3;
  constexpr double kLow[4] = {0.100, 0.107, 0.126, 0.205}, kTall[4] = {0.150, 0.160, 0.205, 0.342};
  constexpr double kLowStart[4] = {1.8, 2.1, 2.6, 3.2}, kTallStart[4] = {3.5, 4.1, 4.8, 2.7};
  const double block =
      is_tall ? kTall[width] * (is_fwd ? 1.0 : 1.07) : kLow[width] * (is_fwd ? 1.0 : 1.03);
  const double start = (is_tall ? kTallStart : kLowStart)[width];
  return 1.2 + waves * (start + each * block) + (split > 1 ? 0.6 : 0.0);
}

Choice narrow_choice(const Problem& p) {
  Choice best;
  if (!wgmma_serves(p) || p.M > 4096) return best;
  const int64_t tokens = p.M <= 16 ? 16 : p.M <= 32 ? 32 : p.M <= 64 ? 64 : 128;
  for (const int64_t rows : {64, 128})
    for (const int64_t split : {1, 2, 4})
      if (rows == 64 || split <= (tokens == 128 ? 2 : 1))
        best.offer(narrow_us(p, rows, tokens, split), KernelId::kNarrow, rows, tokens, split);
  return best;
}

// What cuda/int8_skinny_fwd.cu serves (aligned pointers aside), with 16-bit or int8 activations.
bool int8_skinny_serves(const Problem& p) {
  return p.arch != 0 && is_16bit(p.dtype) && p.format == Format::kInt8 &&
         p.direction == Direction::kFwd && p.K % 16 == 0;
}

// What cuda/int8_wgmma.cu was written for, and whether it was compiled.
bool int8_wgmma_serves(const Problem& p) {
#ifdef FASTPEFT_HAS_SM90A
  return int8_skinny_serves(p) && p.arch == 90 && p.M < (1 << 24) && p.N < (1 << 24) &&
         p.N % 8 == 0;
#else
  (void)p;
  return false;
#endif
}

// What cuda/int8_weight_wgmma.cu was written for, and whether it was compiled.
bool int8_weight_wgmma_serves(const Problem& p) {
#ifdef FASTPEFT_HAS_SM90A
  return p.arch == 90 && p.format == Format::kInt8 && is_16bit(p.dtype) && p.M < (1 << 24) &&
         p.N < (1 << 24) && p.N % 8 == 0 && p.K % 16 == 0;
#else
  (void)p;
  return false;
#endif
}

// Microseconds of cuda/int8_weight_wgmma.cu with tiles of `tokens`, every one of them shared by a
// cluster of `split` (1: the last wave by two, where it fills at most half of the blocks), measured
// on an H200: a start, then k-blocks of 64, which cost decoding. Tiles of 64 tokens share a
// multiprocessor where there are that many. us, model / measured, forward:
//   14336x4096  M = 64 / 128 / 256: 26 / 27, 31 / 32.5, 47 / 47
//   4096x14336  M = 128 / 256 / 512: 43 / 45, 52 / 55, 80 / 84
//   1024x4096   M = 64: 11.8 / 10.7, 256: 13.1 / 13.2
double int8_weight_us(const Problem& p, int64_t tokens, int64_t split) {
  const bool is_fwd = p.direction == Direction::kFwd;
  const int64_t rows = is_fwd ? p.N : p.K, kblocks = ceil_div<int64_t>(is_fwd ? p.K : p.N, 64);
  const int64_t tiles = ceil_div<int64_t>(rows, 128) * ceil_div<int64_t>(p.M, tokens);
  const int64_t sms = std::max<int64_t>(p.sm_count / 2 * 2, 2);
  const auto kblock_us = [&](int64_t blocks) {
    return tokens == 256 ? 0.66 : tokens == 128 ? 0.41 : blocks > sms ? 0.60 : 0.33;
  };
  if (split > 1) {  // clusters of 3 and 4 find 40 and 30 places on 132 multiprocessors
    if (kblocks < split) return HUGE_VAL;
    const int64_t places = std::max<int64_t>(sms * (split == 3 ? 40 : 30) / 132, 1);
    const double waves = double(ceil_div(tiles, places));
    return 6.5 + waves * double(ceil_div(kblocks, split)) * kblock_us(1);
  }
  const int64_t blocks = tokens == 64 ? 2 * sms : sms, full = tiles / blocks, rest = tiles % blocks;
  const bool is_cut = rest > 0 && 2 * rest <= blocks && kblocks >= 8;
  double us = 5.0 + double(full * kblocks) * kblock_us(blocks);
  if (is_cut)
    us += 1.5 + double(kblocks) / 2 * kblock_us(2 * rest);
  else if (rest > 0)
    us += double(kblocks) * kblock_us(rest);
  return us;
}

// Weight only on the GPU, and the input gradient of every int8 layer.
Plan int8_weight_plan(const Problem& p) {
  Plan plan;
  const bool serves = int8_weight_wgmma_serves(p);
  if (p.M <= (int8_skinny_serves(p) ? 16 : serves ? 0 : 4)) {
    plan.kernel = KernelId::kFused;
    plan.fuses_lora = p.dtype != DType::kFloat64;  // it scales in float32
    return plan;
  }
  if (serves) {
    Choice best;
    for (const int64_t tokens : {64, 128, 256})
      for (const int64_t split : {1, 3, 4})
        if (tokens < 256 || split == 1)
          best.offer(int8_weight_us(p, tokens, split), KernelId::kWgmma, 128, tokens, split);
    plan = best.plan;
    plan.fuses_lora = p.R <= 64 && p.R % 8 == 0;
    return plan;
  }
  plan.kernel = KernelId::kDequantMatmul;
  plan.workspace_bytes = p.N * p.K * dtype_bytes(p.dtype);
  return plan;
}

// Microseconds of cuda/int8_wgmma.cu with tiles of `tokens`, K cut in `split`, measured on an H200:
// k-blocks of 128 bytes over the waves of pairs of row tiles; clusters of four find 30 places on
// 132 multiprocessors. us, model / measured:
//   4096x14336  M = 64 / 128 / 256 / 512: 22 / 23.6, 28 / 28.8, 35 / 39.7, 46 / 46
//   14336x4096  M = 64 / 128 / 256: 20 / 19.9, 20 / 21.7, 27 / 29      4096x4096  64: 11.3 / 10.5
double int8_us(const Problem& p, int64_t tokens, int64_t split) {
  const int64_t pairs = ceil_div<int64_t>(p.N, 256) * ceil_div<int64_t>(p.M, tokens);
  const int64_t kblocks = ceil_div<int64_t>(p.K, 128), sms = std::max(p.sm_count, 2);
  if (kblocks < split) return HUGE_VAL;
  const int64_t places = std::max<int64_t>(split == 1 ? sms / 2 : sms * 30 / 132, 1);
  const double waves = double(ceil_div(pairs, places) * ceil_div(kblocks, split));
  const double each = tokens == 256 ? 0.68 : tokens == 128 ? 0.37 : 0.27;
  const double reading = double(p.N) * double(p.K) / 4.0e6;
  return 5.0 + std::max(waves * each, reading) + (split > 1 ? 2.0 : 0.0);
}

// LLM.int8(): the tensor-core kernels, or torch's integer matmul with its matrix of sums.
Plan int8_activations_plan(const Problem& p) {
  Plan plan;
  if (int8_skinny_serves(p) && p.M <= 16) {
    plan.kernel = KernelId::kFused;
    plan.fuses_lora = true;
    return plan;
  }
  if (int8_wgmma_serves(p)) {
    Choice best;
    for (const int64_t tokens : {64, 128, 256})
      for (const int64_t split : {1, 2})
        if (tokens < 256 || split == 1)
          best.offer(int8_us(p, tokens, split), KernelId::kWgmma, 128, tokens, split);
    plan = best.plan;
    plan.fuses_lora = p.R <= 64 && p.R % 8 == 0;
    plan.outlier_capacity = kOutlierCapacity;
    plan.workspace_bytes = (p.M + p.N) * plan.outlier_capacity * 2;
    return plan;
  }
  plan.kernel = KernelId::kIntMatmul;
  plan.workspace_bytes = p.M * p.N * 4;
  return plan;
}

// Whether cuda/qlinear_dense.cu runs a dense base with its branch as one product (aligned pointers
// aside): many tokens, and tiles of 256 x 256 that fill its pairs of multiprocessors nearly as well
// as torch's smaller ones would.
bool is_one_product(const Problem& p) {
#ifdef FASTPEFT_HAS_SM90A
  if (p.arch != 90 || p.dtype != DType::kBFloat16 || p.M < 1024 || p.M >= (1 << 24)) return false;
  if (p.R == 0 || p.R > 64 || p.R % 8 != 0 || p.N % 8 != 0 || p.K % 8 != 0) return false;
  const int64_t rows = p.direction == Direction::kFwd ? p.N : p.K;
  const int64_t tiles = ceil_div<int64_t>(rows, 256) * ceil_div<int64_t>(p.M, 256);
  const int64_t pairs = std::max(p.sm_count / 2, 1), waves = ceil_div(tiles, pairs);
  return 10 * tiles >= 9 * waves * pairs;
#else
  (void)p;
  return false;
#endif
}

}  // namespace

Plan make_plan(const Problem& p) {
  if (p.has_int8_activations) return int8_activations_plan(p);
  if (p.format == Format::kInt8 && p.arch != 0) return int8_weight_plan(p);
  Plan plan;
  if (p.format == Format::kDense) {
    plan.kernel = KernelId::kDense;
    plan.fuses_lora = is_one_product(p);
    return plan;
  }
  const Choice wgmma = wgmma_choice(p), narrow = narrow_choice(p);
  const Choice& tensor = narrow.us < wgmma.us ? narrow : wgmma;
  const bool may_copy = !wgmma_serves(p) || (p.M > 2048 && p.N * p.K <= kSmallWeight);
  const double dense_us = may_copy ? dequant_matmul_us(p) : HUGE_VAL;
  const int64_t few = wgmma_serves(p) ? 8 : fused_tokens(p);  // nothing else comes near
  const double fused_us = p.M <= few                       ? 0.0
                          : skinny_serves(p) && p.M <= 256 ? skinny_us(p)
                                                           : HUGE_VAL;
  if (fused_us < std::min(dense_us, tensor.us)) {
    if (p.M > few) plan.predicted_us = fused_us;
    plan.kernel = KernelId::kFused;
    plan.fuses_lora = p.dtype != DType::kFloat64;  // it scales in float32
    return plan;
  }
  if (tensor.us < dense_us) {
    plan = tensor.plan;
    plan.fuses_lora = p.R <= 64 && p.R % 8 == 0;
    return plan;
  }
  if (p.arch == 0 && p.direction == Direction::kFwd) {
    // About 8 MiB a panel: 4096 x 4096 in float32, plain code, M = 64 / 512: 42 / 141 ms; whole 68
    // / 161; 1 MiB 44 / 145. The input gradient sums over panels, so it takes W whole.
    const int64_t rows = std::max<int64_t>(256, (8 << 20) / (p.K * dtype_bytes(p.dtype)));
    plan.kernel = KernelId::kPanels;
    plan.panel_rows = std::min(rows, p.N);
    plan.workspace_bytes = plan.panel_rows * p.K * dtype_bytes(p.dtype);
    return plan;
  }
  if (p.arch != 0) plan.predicted_us = dense_us;
  plan.kernel = KernelId::kDequantMatmul;
  plan.workspace_bytes = p.N * p.K * dtype_bytes(p.dtype);
  return plan;
}

std::string describe(const Problem& p, const Plan& plan) {
  std::ostringstream s;
  s << format_name(p.format) << (p.direction == Direction::kFwd ? " fwd " : " dgrad ")
    << dtype_name(p.dtype) << " M=" << p.M << " N=" << p.N << " K=" << p.K << " R=" << p.R
    << " blocksize=" << p.blocksize << " on "
    << (p.arch ? "sm_" + std::to_string(p.arch) : std::string("cpu")) << ": "
    << kernel_name(plan.kernel);
  if (plan.panel_rows) s << " panel_rows=" << plan.panel_rows;
  if (plan.tile_tokens) s << " tile=" << plan.tile_rows << "x" << plan.tile_tokens;
  if (plan.split > 1) s << " split=" << plan.split;
  s << " workspace_bytes=" << plan.workspace_bytes;
  return s.str();
}

}  // namespace fastpeft
