// The weight formats: codebooks, packing order, tile layout, scale layout. The only copy in C++.
//
// NF4 / FP4: 4-bit codes in blocks of `blocksize` consecutive elements of the row-major [N, K]
// weight, one float32 absmax a block: w = codebook[code] * absmax, rounded once to float32.
// Dettmers et al. 2023, "QLoRA", section 3 (NF4, double quantisation).
//
// Canonical order (files, bit for bit bitsandbytes): flat row-major; element 2j is the HIGH nibble
// of byte j, 2j+1 the low. absmax flat [ceil(N*K/blocksize)].
//
// Tiled order (memory; one layout for every kernel, forward and input gradient): N padded to 16, K
// padded to 64 with code kZeroCode of the format.
//   strip = 16 n x 64 k = 512 contiguous bytes;  order [Np/16][Kp/64]
//   tile  = 16 n x 16 k = 128 contiguous bytes;  4 in a strip, along k
//   unit  =  2 n x  2 k = 4 nibbles = 16 bits;   8 x 8 in a tile, row-major: row = pair of n,
//   column = pair of k row / column j of a tile holds pair kPairOrder[j] = j/2 + 4*(j%2) nibbles of
//   a unit, low first: (n0,k0) (n0,k1) (n1,k0) (n1,k1)
// ldmatrix on a tile gives a lane its m16k16 A fragment with rows n (forward), ldmatrix.trans the
// one with rows k (dgrad).
//
// Scales in memory (float32, or uint8 when double-quantised): if K % blocksize == 0 "by column":
// [K/blocksize][Np], so that the scales of 128 rows of one k block are contiguous; otherwise blocks
// straddle rows and the order stays flat.
//
// nested (double quantisation): float32 [1 + 256 + ceil(B/256)] = offset | map[256] |
// nested_absmax, B = number of blocks;
//   absmax[b] = map[q[b]] * nested_absmax[b >> 8] + offset, b the FLAT block index, two separately
//   rounded operations.
//
// INT8: codes int8 [N, K] row-major, scales float32 [N] = row absmax; w = code * absmax / 127.
// DENSE: codes = the weight itself [N, K] in the activations' dtype, no scales.
#pragma once
#include "types.h"

namespace fastpeft {

enum class Format : int32_t { kDense = 0, kNf4 = 1, kFp4 = 2, kInt8 = 3 };

constexpr const char* format_name(Format f) {
  return f == Format::kDense ? "dense"
         : f == Format::kNf4 ? "nf4"
         : f == Format::kFp4 ? "fp4"
                             : "int8";
}

FASTPEFT_HD constexpr bool is_4bit(Format f) {
  return f == Format::kNf4 || f == Format::kFp4;
}

constexpr int kTileN = 16, kTileK = 64, kStripBytes = 512, kTileBytes = 128, kNestedBlock = 256;
constexpr int kMinBlocksize = 32, kMaxBlocksize = 4096;

// Nibble -> value. Zero is code 7 in NF4, code 0 in FP4.
constexpr float kNf4Code[16] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f,
                                0.07958029955625534f,
                                0.16093020141124725f,
                                0.24611230194568634f,
                                0.33791524171829224f,
                                0.44070982933044434f,
                                0.5626170039176941f,
                                0.7229568362236023f,
                                1.0f};
// Strict ">" against these midpoints: a value on a threshold takes the lower code.
constexpr float kNf4Threshold[15] = {
    -0.8480964004993439f,  -0.6106329262256622f,  -0.4599952697753906f,   -0.33967943489551544f,
    -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f,
    0.1202552504837513f,   0.2035212516784668f,   0.2920137718319893f,    0.3893125355243683f,
    0.5016634166240692f,   0.6427869200706482f,   0.8614784181118011f};

// FP4 (1 sign, 2 exponent, 1 mantissa bit) divided by 12. Sorted position -> nibble is kFp4Order:
// the codebook is not monotonic, and it holds zero twice (0 and 8: (0, 0.0026] takes 8, [-0.0026,
// 0] takes 0).
constexpr float kFp4Code[16] = {0.0f,
                                0.0052083334885537624f,
                                0.6666666865348816f,
                                1.0f,
                                0.3333333432674408f,
                                0.5f,
                                0.1666666716337204f,
                                0.25f,
                                0.0f,
                                -0.0052083334885537624f,
                                -0.6666666865348816f,
                                -1.0f,
                                -0.3333333432674408f,
                                -0.5f,
                                -0.1666666716337204f,
                                -0.25f};
constexpr float kFp4Threshold[15] = {
    -0.8333333730697632f,   -0.5833333730697632f, -0.4166666865348816f,    -0.2916666865348816f,
    -0.2083333432674408f,   -0.0859375f,          -0.0026041667442768812f, 0.0f,
    0.0026041667442768812f, 0.0859375f,           0.2083333432674408f,     0.2916666865348816f,
    0.4166666865348816f,    0.5833333730697632f,  0.8333333730697632f};
constexpr int kFp4Order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};

// Rounding of the 4-bit quantiser, as bitsandbytes' CPU wheel has it (its ragged last block differs
// from the full ones):
//   full block: t = w * (1 / max(absmax, kTinyAbsmax)), absmax stored as it is;
//   last block shorter than blocksize: t = w / max(absmax, kTinyAbsmax), and that maximum is what
//   is stored. code = order[number of thresholds < t]; so an all-zero block gets the zero code. An
//   odd last nibble is the zero code.
constexpr float kTinyAbsmax = 1e-38f;

// Double quantisation, the same wheel: t = clamp((absmax - offset) * (1 / nested_absmax), -1, 1) is
// first snapped to a grid of 65536 points, then takes the map entry whose midpoints enclose the
// grid point: code = number of midpoints (map[i] + map[i+1]) * 0.5 that are < nested_grid(t). A
// group of 256 with nested_absmax 0 gets code 0.
FASTPEFT_HD float nested_grid(float t) {
  const float half =
      (t + 1.0f) *
      0.5f;  // exact product and sum in double, rounded to float once: what an FMA gives
  const int point = int(float(double(half) * 65535.0 + 0.5));
  return float(point) * 2.0f / 65535.0f - 1.0f;
}

// INT8: q = round half to even(w * int8_inverse(absmax)); w = q * absmax * kInt8Step in this order,
// two float32 roundings, kInt8Step = float32(1 / 127).
FASTPEFT_HD float int8_inverse(float absmax) {
  // reciprocal first, then times 127: what torch makes of 127 / tensor. Below 4e-37 it overflows:
  // such a row is zero.
  return absmax > 4e-37f ? (1.0f / absmax) * 127.0f : 0.0f;
}
constexpr float kInt8Step = 7.874015718698502e-3f;

constexpr int kPairOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // stored position -> pair
constexpr int kPairPlace[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // pair -> stored position

FASTPEFT_HD constexpr int zero_code(Format f) {
  return f == Format::kNf4 ? 7 : 0;
}

struct NibblePlace {
  int64_t byte;
  int shift;  // 0 or 4
};

// Where element (n, k) lies in the tiled order; K is the unpadded width.
FASTPEFT_HD constexpr NibblePlace tiled_place(int64_t n, int64_t k, int64_t K) {
  const int64_t strip = (n / kTileN) * ceil_div<int64_t>(K, kTileK) + k / kTileK;
  const int row_pair = int(n % kTileN) / 2, col_pair = int(k % 16) / 2;
  const int row = row_pair < 4 ? 2 * row_pair : 2 * row_pair - 7;  // kPairPlace without a table
  const int col = col_pair < 4 ? 2 * col_pair : 2 * col_pair - 7;
  const int64_t byte =
      strip * kStripBytes + (int(k % kTileK) / 16) * kTileBytes + row * 16 + col * 2 + int(n % 2);
  return {byte, int(k % 2) * 4};
}

FASTPEFT_HD constexpr int64_t tiled_bytes(int64_t N, int64_t K) {
  return ceil_div<int64_t>(N, kTileN) * ceil_div<int64_t>(K, kTileK) * kStripBytes;
}
FASTPEFT_HD constexpr int64_t block_count(int64_t N, int64_t K, int64_t blocksize) {
  return ceil_div<int64_t>(N * K, blocksize);
}
FASTPEFT_HD constexpr bool scales_by_column(int64_t K, int64_t blocksize) {
  return K % blocksize == 0;
}

// Elements of the in-memory scale tensor.
FASTPEFT_HD constexpr int64_t scale_count(int64_t N, int64_t K, int64_t blocksize) {
  return scales_by_column(K, blocksize) ? K / blocksize * round_up<int64_t>(N, kTileN)
                                        : block_count(N, K, blocksize);
}

}  // namespace fastpeft
