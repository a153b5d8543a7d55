// What the low-rank products share: tiles of activations in a ring of a warp, and dropout on a
// piece.
//
// A piece is 8 consecutive 16-bit elements of one token, 16 bytes. The order of a reduction is
// free, so the products choose theirs such that a lane's operands are whole pieces: cp.async into
// shared memory and back by 16 bytes, no barrier beyond the warp.
#pragma once
#include "../csrc/core/philox.h"
#include "device/copy.cuh"
#include "device/mma.cuh"

namespace fastpeft::cuda {

constexpr int kPieceBytes = 16;

__device__ __forceinline__ uint32_t keep_mask(uint32_t low, uint32_t high, uint32_t threshold) {
  return (low < threshold ? 0u : 0x0000FFFFu) | (high < threshold ? 0u : 0xFFFF0000u);
}

// A tile of 16 tokens x 64 columns (2 KB), copied in whole lines of 128 bytes: lane L copies piece
// L % 8 of rows L / 8, + 4, ... Piece e of row r stands where neither way to read it meets a bank
// twice: pieces t, 4 + t of rows g, g + 8 (tokens as rows of the mma) and piece g of rows t, t + 4,
// t + 8, t + 12 (tokens as its k). Rows 4 apart are 512 bytes apart.
constexpr int kTileTokens = 16, kTileColumns = 64, kTileSize = kTileTokens * kTileColumns * 2;
__device__ __forceinline__ uint32_t tile_place(int row, int piece) {
  return uint32_t(row * 8 + (piece ^ (row & 2) ^ (4 * (row & 1)))) * kPieceBytes;
}

// Zeros where dropped; the factor 1 / (1 - p) is the caller's. `element`: index of the first of the
// 8, a multiple of 8.
__device__ __forceinline__ uint4 drop_piece(const uint4& v, uint64_t seed, uint32_t threshold,
                                            int64_t element) {
  const Philox4 a = philox(seed, uint64_t(element) / 4),
                b = philox(seed, uint64_t(element) / 4 + 1);
  return make_uint4(
      v.x & keep_mask(a.v[0], a.v[1], threshold), v.y & keep_mask(a.v[2], a.v[3], threshold),
      v.z & keep_mask(b.v[0], b.v[1], threshold), v.w & keep_mask(b.v[2], b.v[3], threshold));
}

// The last `bytes` (even, < 16) of a matrix and zeros behind them; a copy of 16 bytes would name
// some that are not there.
__device__ __forceinline__ void copy_tail(uint32_t to, const char* from, int bytes) {
  uint32_t v[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (2 * i < bytes)
      v[i / 2] |= uint32_t(__ldg(reinterpret_cast<const unsigned short*>(from) + i))
                  << (i % 2 * 16);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

// 16 rows of [M, R] in a ring: rows are contiguous, so they come as 2 R pieces, whatever R is.
// `bytes`: what is left of the matrix from the first row on. R = 64: piece e of row r stands at
// e ^ 2 (r % 4), so that lanes t of four rows meet different banks.
template <int kMaxRank>
__device__ __forceinline__ void copy_rank_rows(uint32_t to, const char* from, int R, int64_t bytes,
                                               int lane) {
#pragma unroll
  for (int i = 0; i < kMaxRank / 16; ++i) {
    const int piece = i * 32 + lane;
    if (piece >= 2 * R) break;
    const int64_t left = bytes - piece * kPieceBytes;
    const int place = kMaxRank == 64 && R == 64 ? piece ^ (2 * (piece >> 3 & 3)) : piece;
    if (left > 0 && left < kPieceBytes)
      copy_tail(to + place * kPieceBytes, from + piece * kPieceBytes, int(left));
    else
      copy_async16(to + place * kPieceBytes, from + piece * kPieceBytes,
                   left > 0 ? kPieceBytes : 0);
  }
}

// Row k of 32 of a [K, R] factor stands at row place_of(k), so that lane L names row L to ldmatrix:
// matrix L / 8 holds k = 8a + 2 (L / 8) + b for a = 0 .. 3, b = 0, 1: words L / 8 of the pieces of
// lanes t = a.
__device__ __forceinline__ int place_of(int k) {
  return (k >> 1 & 3) * 8 + (k >> 3) * 2 + (k & 1);
}

// At most `pending` groups of copies are still under way afterwards; pending < 4.
__device__ __forceinline__ void wait_copies_but(int pending) {
  if (pending == 0)
    wait_copies<0>();
  else if (pending == 1)
    wait_copies<1>();
  else if (pending == 2)
    wait_copies<2>();
  else
    wait_copies<3>();
}

// Halves of two tokens' words -> pairs along tokens: of the low column (or rank), of the high one.
__device__ __forceinline__ uint32_t low_pair(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
__device__ __forceinline__ uint32_t high_pair(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

__device__ __forceinline__ uint32_t load_shared4(uint32_t shared) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared2(uint32_t shared) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(shared) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared2(uint32_t shared, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(v) : "memory");
}

}  // namespace fastpeft::cuda
